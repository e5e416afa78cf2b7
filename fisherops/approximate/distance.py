"""How far an approximation is from the Fisher matrix, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import Tensor

from fisherops import _arrays
from fisherops._checks import integer
from fisherops._linop import TorchLinearOperator, as_damping, as_torch_operator, check_result, same_device
from fisherops._torch import outside_of_autocast
from fisherops.approximate.assembly import scores_of
from fisherops.approximate.exact import diagonal, layers
from fisherops.approximate.factored import ekfac, kfac, kronecker
from fisherops.approximate.inner import inner_product
from fisherops.approximate.lowrank import nystrom
from fisherops.approximate.structured import StructuredOperator
from fisherops.problem import Parameters
from fisherops.scores.protocol import Scores, rows_of_block
from fisherops.scores.selected import SelectedScores

BUILDERS: dict[str, Callable[[Any], StructuredOperator]] = {
    "diagonal": diagonal,
    "layers": layers,
    "kfac": kfac,
    "ekfac": ekfac,
    "kronecker": kronecker,
    "nystrom": nystrom,
}
"""Approximations by name, with their default options."""

RATIOS = (1e-4, 1e-6, 1e-8)
"""Dampings of the systems that `compare` solves, in units of the largest eigenvalue."""

# Rows of a Gram matrix, and of a dense approximation, from which on errors are estimated.
_MANY_ROWS, _MANY_COLUMNS = 2**13, 2**12


class Error(NamedTuple):
    """A relative error and its standard error, 0 if it is exact; a number in comparisons with others."""

    value: float
    standard_error: float = 0.0

    def __float__(self) -> float:
        return self.value


class Comparison(NamedTuple):
    """What `compare` finds for one approximation.

    Attributes
    ----------
    name : str
    error : Error
        Relative distance from F.
    nbytes : int
        Memory.
    seconds : float
        Time to build it; NaN if it was passed.
    iterations : dict of float to (int or None)
        Iterations of conjugate gradients for each damping λ; None if they were not enough.
    """

    name: str
    error: Error
    nbytes: int
    seconds: float
    iterations: dict[float, int | None]


@outside_of_autocast
def error(
    op: Any, K: Any, *, per_layer: bool = False, probes: int | None = None, seed: int = 0
) -> Error | dict[str, Error]:
    """Return the relative distance ‖F − K‖_F / ‖F‖_F of an approximation from a Fisher matrix.

    ‖F − K‖² = ‖G Gᵀ‖² − 2 Σ_r g_rᵀ K g_r + ‖K‖², exactly, for the rows g of G. For more than 8,192 rows, or if K is
    another operator of more than 4,096 columns, it is estimated from products with random signs z,
    ‖F − K‖² = E ‖(F − K) z‖², which keeps its relative precision if K is near F.

    Parameters
    ----------
    op : FisherOperator
        F, (D, D).
    K : LinearOperator
        Symmetric, (D, D), such as what the functions of this module return.
    per_layer : bool
        Whether to return the distances of the diagonal blocks of the layers, ‖F_ll − K_ll‖ / ‖F_ll‖, by the names of
        their parameters. Default: False.
    probes : int, optional
        Number of random vectors, at least 2, to estimate the error whatever its cost. Default: 64 if it is estimated.
    seed : int
        Of the random vectors. Default: 0.

    Returns
    -------
    Error or dict of str to Error
        `value` and `standard_error`, which is 0 if the value is exact.

    Raises
    ------
    TypeError
        If `op` has no score matrix, or `K` is not an operator.
    ValueError
        If the shapes or the devices differ.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> distance = fo.approximate.error(op, fo.approximate.diagonal(op))
    >>> 0 < distance.value < 1, distance.standard_error
    (True, 0.0)
    """
    G, shift = scores_of(op)
    if not isinstance(K, LinearOperator):
        raise TypeError(f"`K` must be a SciPy LinearOperator, got {type(K).__name__}. Pass an approximation of `op`.")
    if tuple(K.shape) != tuple(op.shape):
        raise ValueError(f"`K` must have the shape of `op`, {tuple(op.shape)}, got {tuple(K.shape)}.")
    count, seed = None if probes is None else integer("probes", probes, 2), integer("seed", seed, 0)
    own = as_torch_operator(K, G.device, G.torch_dtype)
    same_device(G, own)
    if not per_layer:
        return _distance(G, shift, own, count, seed)
    spans = G.parameters.spans
    plan = getattr(K, "plan", {})
    names = [tuple(label.split(", ")) for label in plan] if set(", ".join(plan).split(", ")) == set(spans) else None
    found = {}
    for group in names or [(name,) for name in spans]:
        index = torch.cat([torch.arange(*spans[name]) for name in group]).to(G.device)
        block = SelectedScores(G, index, parameters=_parameters(G, group))
        found[", ".join(group)] = _distance(block, shift, _Restricted(own, index), count, seed)
    return found


def _parameters(G: Scores, group: Sequence[str]) -> Parameters:
    return Parameters({name: G.parameters.tensors[name] for name in group}, G.parameters.dtype)


class _Restricted(TorchLinearOperator):
    """Rows and columns of an operator."""

    def __init__(self, K: TorchLinearOperator, index: Tensor) -> None:
        super().__init__((len(index), len(index)), K.torch_dtype, K.device)
        self._K, self._index = K, index

    def _mul(self, V: Tensor) -> Tensor:
        whole = V.new_zeros(len(V), self._K.shape[0])
        whole[:, self._index] = V
        return self._K._times(whole)[:, self._index]


def _distance(G: Scores, shift: float, K: TorchLinearOperator, probes: int | None, seed: int) -> Error:
    R, D = G.shape
    fits = G.cache_size.memory_left >= 4 * 8 * R * R and R <= _MANY_ROWS and G.rows_have_order
    if probes is None and fits and (D <= _MANY_COLUMNS or isinstance(K, StructuredOperator)):
        return _exact(G, shift, K)
    return _estimated(G, shift, K, probes or 64, seed)


def _exact(G: Scores, shift: float, K: TorchLinearOperator) -> Error:
    """Return the error from the norms of G Gᵀ and K and their inner product."""
    D = G.shape[1]
    gram = G.gram_tensor().double()
    trace = float(gram.trace())
    of_F = float(gram.square().sum()) + 2 * shift * trace + D * shift**2
    of_K, of_trace = 0.0, 0.0
    found = inner_product(G, K)
    inner = _inner_of_rows(G, K) if found is None else found
    if isinstance(K, StructuredOperator):
        of_K, of_trace = K.square_norm(), K.trace()
    else:
        dense = K.todense().astype(np.float64)
        of_K, of_trace = float(np.square(dense).sum()), float(np.trace(dense))
    square = of_F - 2 * (inner + shift * of_trace) + of_K
    if of_F == 0:
        return Error(0.0 if of_K == 0 else float("inf"))
    # What cancels leaves the rounding of the terms.
    return Error(float(check_result(torch.tensor(max(square, 0.0) / of_F, dtype=torch.float64).sqrt())))


def _inner_of_rows(G: Scores, K: TorchLinearOperator) -> float:
    """Return Σ_r g_rᵀ K g_r by products with the rows."""
    return sum(float((rows.double() * K.multiply(rows).double()).sum()) for rows in _rows(G))


def _rows(G: Scores) -> Iterator[Tensor]:
    """List the rows of G in blocks."""
    R, step = G.num_rows, rows_of_block(G)
    for start in range(0, R, step):
        yield G.block(start, min(start + step, R))


def _estimated(G: Scores, shift: float, K: TorchLinearOperator, probes: int, seed: int) -> Error:
    """Return the error by products with random signs, and its standard error by the delta method."""
    D = G.shape[1]
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(2, (D, probes), generator=generator, dtype=torch.int8, device="cpu").T
    Z = signs.to(G.device, G.torch_dtype).mul_(2).sub_(1)
    FZ = G.product(Z).add_(Z, alpha=shift)
    difference = FZ - K.multiply(Z).to(FZ.dtype)
    squares, total = (x.double().square().sum(1) for x in (difference, FZ))
    if float(total.sum()) == 0:
        return Error(0.0 if float(squares.sum()) == 0 else float("inf"))
    ratio = float(squares.mean() / total.mean())
    # Of a ratio of means; the square root halves the relative error.
    deviation = float((squares - ratio * total).std()) / (float(total.mean()) * probes**0.5)
    value = sqrt(ratio)
    return Error(value, deviation / (2 * value) if value else 0.0)


@outside_of_autocast
def compare(
    op: Any,
    approximations: Sequence[str | StructuredOperator] | Mapping[str, StructuredOperator] = tuple(BUILDERS),
    *,
    damping: float | Sequence[float] | None = None,
    rtol: float = 1e-6,
    maxiter: int = 1000,
    prints: bool = True,
) -> list[Comparison]:
    """Compare approximations of a Fisher matrix by their errors, and as preconditioners.

    Parameters
    ----------
    op : FisherOperator
        F.
    approximations : sequence of (str or StructuredOperator), or mapping of str to StructuredOperator
        Names of functions of this module, which build them with their default options, or approximations. Default: all
        functions.
    damping : float or sequence of float, optional
        λ > 0 of the systems (F + λI) x = b that conjugate gradients solve, for a normal random b. Default: 10⁻⁴, 10⁻⁶
        and 10⁻⁸ times the largest eigenvalue of F.
    rtol : float
        Relative residual at which they stop. Default: 1e-6.
    maxiter : int
        Iterations at most. Default: 1000.
    prints : bool
        Whether to print a table. Default: True.

    Returns
    -------
    list of Comparison
        Name, error, bytes, seconds to build, and iterations; the first is without an approximation.

    Raises
    ------
    TypeError
        If `op` has no score matrix.
    ValueError
        If a name is unknown, or λ is not positive.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> table = fo.approximate.compare(op, ["diagonal", "kfac"], damping=0.1, prints=False)
    >>> [line.name for line in table]
    ['none', 'diagonal', 'kfac']
    """
    G, shift = scores_of(op)
    if damping is None:
        largest = float(eigsh(op, k=1, tol=1e-2, return_eigenvectors=False)[0]) if op.shape[0] > 1 else op.trace()
        dampings = [ratio * largest for ratio in RATIOS]
    else:
        given = damping if isinstance(damping, Sequence | np.ndarray) else [damping]
        dampings = [as_damping(x, G.torch_dtype) for x in given]
    if not dampings:
        raise ValueError("`damping` must have at least one value, got none. Leave it out, or pass λ > 0.")
    if not 0 < _arrays.real("rtol", rtol) < 1:
        raise ValueError(f"`rtol` must be above 0 and below 1, got {rtol!r}. Pass a relative residual such as 1e-6.")
    maxiter = integer("maxiter", maxiter, 1)
    if min(dampings) + shift == 0:
        raise ValueError("`damping` must be positive, got 0. Pass the damping of the systems that you solve.")
    named: list[tuple[str, Any]] = (
        list(approximations.items())
        if isinstance(approximations, Mapping)
        else [(approximations, approximations)]
        if isinstance(approximations, str)
        else [(x if isinstance(x, str) else type(x).__name__, x) for x in approximations]
    )
    unknown = [x for _, x in named if isinstance(x, str) and x not in BUILDERS]
    if unknown:
        raise ValueError(f"`approximations` must be among {', '.join(map(repr, BUILDERS))}, got {unknown[0]!r}.")
    for name, x in named:
        if not isinstance(x, str | StructuredOperator):
            raise TypeError(
                f"`approximations` must be names or what the functions of this module return, got {type(x).__name__} "
                f"for {name!r}. Pass one of {', '.join(map(repr, BUILDERS))}."
            )
    b = np.random.default_rng(0).standard_normal(op.shape[0]).astype(op.dtype)

    def iterations(K: StructuredOperator | None) -> dict[float, int | None]:
        return {
            value: _iterations(op.damped(value), b, None if K is None else K.inv(value), rtol, maxiter)
            for value in dampings
        }

    found = [Comparison("none", Error(1.0), 0, 0.0, iterations(None))]
    for name, x in named:
        begun = time.perf_counter()
        K = BUILDERS[x](op) if isinstance(x, str) else x
        seconds = time.perf_counter() - begun if isinstance(x, str) else float("nan")
        found.append(Comparison(name, _distance(G, shift, K, None, 0), K.nbytes, seconds, iterations(K)))
    if prints:
        print("\n".join(table_of(found)))  # noqa: T201
    return found


def table_of(found: Sequence[Comparison]) -> list[str]:
    """Return a comparison as lines of text."""
    dampings = list(found[0].iterations)
    head = "".join(f"{f'λ = {value:.2g}':>14}" for value in dampings)
    lines = [f"{'':<10} {'error':>16} {'memory':>11} {'build':>9}{head}  (iterations of CG)"]
    for x in found:
        distance = f"{x.error.value:.4f}" + (f" ± {x.error.standard_error:.4f}" if x.error.standard_error else "")
        seconds = "" if np.isnan(x.seconds) else f"{x.seconds:.3f} s"
        counts = "".join(f"{'too many' if x.iterations[v] is None else x.iterations[v]:>14}" for v in dampings)
        lines.append(f"{x.name:<10} {distance:>16} {x.nbytes / 2**20:>7.2f} MiB {seconds:>9}{counts}")
    return lines


def _iterations(A: Any, b: Any, M: Any, rtol: float, maxiter: int) -> int | None:
    """Return the iterations that SciPy's conjugate gradients take, or None if they were not enough."""
    count = 0

    def counting(_: Any) -> None:
        nonlocal count
        count += 1

    _, info = cg(A, b, rtol=rtol, maxiter=maxiter, M=M, callback=counting)
    return None if info else count
