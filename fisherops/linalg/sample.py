"""Normal random vectors whose covariance is F + λI or its inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays, _philox
from fisherops._checks import integer
from fisherops._linop import TorchLinearOperator, as_damping, check_result
from fisherops._torch import outside_of_autocast
from fisherops.linalg.dense import times
from fisherops.linalg.dual import Dual
from fisherops.linalg.lanczos import Krylov
from fisherops.linalg.methods import CHOLESKY, Task, as_operator, choose
from fisherops.linalg.primal import Primal, random_vector
from fisherops.linalg.results import Draws
from fisherops.linalg.solve import least, refuse_singular

# What the counters of the two vectors of a draw have as their last word.
_OF_PARAMETERS, _OF_ROWS = 0, 1


@outside_of_autocast
def sample(
    op: Any,
    size: int | None = None,
    *,
    damping: float,
    inverse: bool = True,
    rng: int | None = None,
    method: str = "auto",
    rtol: float = 1e-5,
    maxiter: int = 500,
    like: Any = None,
) -> Draws:
    """Draw from the normal distribution N(0, (F + λI)⁻¹), or N(0, F + λI).

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    size : int, optional
        Number of draws. Default: one draw, of shape (D,).
    damping : float
        λ ≥ 0, in the units of F's eigenvalues.
    inverse : bool
        Whether the covariance is (F + λI)⁻¹, as of a Laplace approximation, or F + λI. Default: True.
    rng : int, optional
        Seed, at least 0 and below 2⁶⁴. The draws are a function of the seed and the operator, the same on every device
        to rounding. Default: 0.
    method : {"auto", "dual", "dense", "primal"}
        "dual": exactly, by one system with G Gᵀ + λI for each draw; "dense": by a Cholesky factor; "primal": by
        Lanczos' square root. Default: "auto". Without `inverse`, draws of Fisher operators are exact by products with
        Gᵀ, whatever the method.
    rtol : float
        Relative change at which Lanczos' method stops. Default: 1e-5.
    maxiter : int
        Maximal number of its steps. Default: 500.
    like : array, optional
        Array whose library and device the draws have. Default: NumPy.

    Returns
    -------
    Draws
        The draws, (size, D) or (D,), with their error and the method.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator, or `rng` is not an integer.
    ValueError
        If λ is negative, or zero and F is singular; or if `size` or `rng` is out of range.

    Notes
    -----
    A draw of "dual" is x = w − Gᵀ (G Gᵀ + λI)⁻¹ (G w + ε) for independent normal w of covariance I/λ and ε of
    covariance I: its covariance is (I/λ) (I − Gᵀ (G Gᵀ + λI)⁻¹ G) = (F + λI)⁻¹.

    References
    ----------
    A. Bhattacharya, A. Chakraborty, B. Mallick, Fast sampling with Gaussian scale mixture priors in high-dimensional
    regression, Biometrika 103 (2016) 985–991, doi:10.1093/biomet/asw042.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> fo.linalg.sample(op, 5, damping=0.1).value.shape
    (5, 15)
    """
    A, damping = as_operator(op), as_damping(damping)
    count = 1 if size is None else integer("size", size, 0)
    seed = 0 if rng is None else integer("rng", rng, 0)
    if seed >= 2**64:
        raise ValueError(f"`rng` must be below 2**64, got {seed}.")
    maxiter = integer("maxiter", maxiter, 1)
    if A.score_matrix is not None and A.score_matrix.is_divided:
        raise NotImplementedError("`op` must not have sharded parameters for `sample`.")
    if inverse:
        refuse_singular(A, damping)
    chosen = choose(A, Task(100.0 * max(1, count), CHOLESKY, needs_damping=inverse), method, damping)
    Z = normal(count, A.shape[0], seed, _OF_PARAMETERS, A)
    G, error = A.score_matrix, 0.0
    if not inverse and G is not None:
        G.require_order()
        E = normal(count, G.num_rows, seed, _OF_ROWS, A)
        X = G._mul_t(E).add_(_root(A.shift + damping, Z)) if count else Z
    elif not count:
        X = Z
    elif isinstance(chosen, Primal):
        X, error = _by_lanczos(chosen, Z, inverse, rtol, maxiter)
    elif isinstance(chosen, Dual):
        chosen.prepare()
        X = chosen.draw(Z, normal(count, chosen.rows, seed, _OF_ROWS, A))
    else:
        X = chosen.draw(Z) if inverse else chosen.draw_of_itself(Z)
    leave = _arrays.leave_like(like) if like is not None else _arrays.to_numpy
    value = leave(check_result(X[0] if size is None else X))
    return Draws(value, error, error <= rtol, chosen.name)


def normal(count: int, n: int, seed: int, stream: int, op: TorchLinearOperator) -> Tensor:
    """Return standard normal numbers (count, n) that are a function of the seed, the draw and the index alone."""
    draw = torch.arange(count, device=op.device)[:, None]
    pair = torch.arange(-(-n // 2), device=op.device)
    zero = torch.zeros_like(draw)
    key = seed & _philox.MASK, seed >> 32
    uniform = torch.stack(_philox.uniform((draw, pair & _philox.MASK, pair >> 32, zero + stream), key), -1)
    numbers: Tensor = torch.special.ndtri(uniform.flatten(1)[:, :n])
    return numbers.to(op.torch_dtype)


def _root(total: Any, Z: Tensor) -> Tensor:
    """Multiply rows (K, D) by the square root of a damping."""
    return times(total.double().sqrt() if isinstance(total, Tensor) else total**0.5, Z)


def _by_lanczos(method: Primal, Z: Tensor, inverse: bool, rtol: float, maxiter: int) -> tuple[Tensor, float]:
    """Return (F + λI)^∓½ z for rows (K, D), and the largest relative change by the last steps."""
    op, found, error = method.op, [], 0.0
    power = -0.5 if inverse else 0.5

    def multiply(v: Tensor) -> Tensor:
        return op.multiply(v[None]).add_(times(method.total, v[None]))[0]

    for z in Z:
        steps = min(maxiter, len(z))
        space, before, change = Krylov.from_vector(z, steps), torch.zeros(0, dtype=torch.float64), 1.0
        for step in range(1, steps + 1):
            space = space.grown(multiply, lambda number: random_vector(op, number))
            if step % 5 and step < steps and space.coupling:
                continue
            values, vectors = space.ritz()
            floor = max(float(values[-1]) * 1e-300, least(method.total))
            coefficients = torch.from_numpy(vectors @ (np.clip(values, floor, None) ** power * vectors[0]))
            last = torch.nn.functional.pad(before, (0, len(coefficients) - len(before)))
            change = float((coefficients - last).norm() / coefficients.norm())
            before = coefficients
            if change <= rtol or not space.coupling or step == len(z):
                change = 0.0 if not space.coupling or step == len(z) else change
                break
        found.append(before.to(z) @ space.basis[: len(before)] * z.norm())
        error = max(error, change)
    return torch.stack(found), error
