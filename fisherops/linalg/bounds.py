"""Cramér-Rao bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._checks import warn
from fisherops._linop import TorchLinearOperator
from fisherops._torch import outside_of_autocast
from fisherops.linalg.dense import Dense
from fisherops.linalg.methods import choose_root, summands
from fisherops.linalg.results import Bounds
from fisherops.scores import MonteCarlo

_NAMED_DIRECTIONS, _NAMED_ENTRIES = 10, 4

# Rounding of a score, and of the algebra with it, in units of eps.
_ROUNDING = 8.0

# In float64, directions whose information is zero to rounding are unidentifiable if a gap of this factor separates them
# from the others. A spectrum that decays into rounding without a gap tells nothing about its smallest values, and
# neither does float32, where float64 can tell.
_GAP = 1000.0

# Numbers of 8 bytes for each entry of B that a singular value decomposition needs.
_SVD_WORK = 4


@outside_of_autocast
def crlb(op: Any, of: Any = None, *, method: str = "auto") -> Bounds:
    r"""Return Cramér-Rao bounds: the least covariance of unbiased estimates of the parameters, or of functions of them.

    .. math:: \operatorname{Cov}(\hat\psi) \succeq A^\top F^{+} A, \qquad \psi = A^\top \theta,

    with F the Fisher information of all data, so of an operator with ``reduction="sum"`` (or ``loss_func=None``).

    Parameters
    ----------
    op : FisherOperator or sum of operators
        An exact Fisher; with ``dtype="float64"`` if the bounds are to have more than a few digits. Sums of operators
        with positive factors are the information of several experiments, ``op + other``. ``op.damped(1 / τ**2)`` adds a
        Gaussian prior of standard deviation τ on every parameter, and ``op + aslinearoperator(P)`` one of precision
        matrix P: the result is then the Bayesian bound.
    of : None, str, list of str, mapping or array
        None: every element of every parameter. Names of parameters: all their elements. An array (D,) or (D, p): linear
        functions, as columns A. A mapping from the name of a function to a mapping from names of parameters to
        coefficients: likewise, by name. For a function that is not linear pass its gradient.
    method : {"auto", "dual", "dense"}
        Matrix whose singular values are found, in units in which each parameter has unit information: the score matrix
        (rows × D) or its triangular factor (D × D). The default is the smaller of them.

    Returns
    -------
    Bounds
        If F is singular, functions that depend on directions without information have infinite bounds, and
        `unidentifiable` names these directions. `digits` estimates how many digits of each bound are right.

    Raises
    ------
    TypeError
        If there is no Fisher operator in `op`.
    ValueError
        If an operator is of a mean, or subtracted; if names or shapes do not fit; if `max_memory` is too small.

    Warns
    -----
    UserWarning
        If `op` is a Monte-Carlo Fisher, whose inverse is not a bound; if digits are lost, see `Bounds.lost`.

    References
    ----------
    P. Stoica, T. Marzetta, Parameter estimation problems with singular information matrices, IEEE Trans. Signal
    Process. 49 (2001) 87–90, doi:10.1109/78.890346.

    Examples
    --------
    The mean of ten observations of standard deviation √½ has a variance of ½ / 10:

    >>> import torch, fisherops as fo
    >>> X, y = torch.ones(10, 1), torch.zeros(10, 1)
    >>> mean = torch.nn.Linear(1, 1, bias=False)
    >>> op = fo.FisherLinearOperator(mean, torch.nn.MSELoss(reduction="sum"), data=(X, y))
    >>> fo.linalg.crlb(op).covariance.round(3)
    array([[0.05]])

    A prior of variance 0.05 on the weight counts as much as the data:

    >>> fo.linalg.crlb(op.damped(1 / 0.05)).covariance.round(3)
    array([[0.025]])
    """
    parts = list(summands(op))
    fishers = [part for part, _ in parts if part is not None and _is_fisher(part)]
    if not fishers:
        raise TypeError(
            f"`op` must be a Fisher operator or a sum of operators with one, got {type(op).__name__}. Pass the "
            "information itself, not its inverse, a product or a power, and start a sum with the Fisher operator."
        )
    matrices = [fisher.score_matrix for fisher in fishers]
    if any("mean" in G.reductions for G in matrices):
        raise ValueError(
            "the Cramér-Rao bound needs the information of all data, and this operator is of a mean: use a loss with "
            "reduction='sum'."
        )
    if any(G.is_divided for G in matrices):
        raise NotImplementedError("`op` must have whole parameters, got sharded ones. Gather the parameters first.")
    if any((float(factor.min()) if isinstance(factor, Tensor) else factor) < 0 for _, factor in parts):
        raise ValueError(
            "`op` must be a sum of information with positive factors, got a negative factor or damping. Leave out "
            "what is subtracted."
        )
    D, rows = fishers[0].shape[0], [G.shape[0] for G in matrices]
    method = choose_root(rows[0], D, len(parts) == 1, method)
    if any(isinstance(kind, MonteCarlo) for G in matrices for kind in G.kinds):
        warn(
            "the inverse of a Monte-Carlo Fisher is not a Cramér-Rao bound, and its error is that of the draws. Use "
            "FisherLinearOperator, the exact Fisher."
        )
    A, names = _functions(fishers[0], of)
    if not names:
        raise ValueError("`of` names no function.")
    if not bool(A.isfinite().all()):
        raise ValueError("`of` contains NaN or infinity.")
    B, noise = _square_root(parts, matrices, method)
    single = any(fisher.torch_dtype != torch.float64 for fisher in fishers)
    covariance, digits, basis, nullity, lost = _bounds(B, A, noise, float("inf") if single else _GAP)
    if lost:
        advice = "Pass dtype='float64' to the operator" if single else "Use parameters that are less correlated"
        warn(
            f"the information about {lost} of {len(A)} directions is lost to rounding, so no bound is known. {advice}."
        )
    directions = _name_directions(matrices[0], basis, nullity)
    deviation = np.sqrt(np.diag(covariance))
    return Bounds(covariance, deviation, digits, tuple(names), directions, nullity, lost, method)


def _is_fisher(op: Any) -> bool:
    return getattr(op, "score_matrix", None) is not None


def _square_root(
    parts: list[tuple[TorchLinearOperator | None, Any]], matrices: list[Any], method: str
) -> tuple[Tensor, float]:
    """Return B (n, D) with BᵀB = F, and its relative rounding."""
    D, device = matrices[0].shape[1], matrices[0].device
    is_triangular = method == "dense"
    n = sum(min(G.shape[0], D) if is_triangular else G.shape[0] for G in matrices)
    n += D * (len(parts) - len(matrices))
    needed, left = 8 * _SVD_WORK * n * D, min(G.cache_size.memory_left for G in matrices)
    if needed > left:
        raise ValueError(
            f"the square root of F takes a matrix of shape {(n, D)}, {needed} bytes with its factors, and "
            f"{max(left, 0)} are left of max_memory. Raise max_memory, or pass an operator of fewer parameters."
        )
    eps = max(float(torch.finfo(part.torch_dtype).eps) for part, _ in parts if part is not None)
    noise, blocks = _ROUNDING * eps * D**0.5, []
    for part, factor in parts:
        if not isinstance(factor, Tensor) and factor == 0:
            continue
        if part is None:
            block = torch.eye(D, dtype=torch.float64, device=device)
        elif part.score_matrix is not None:
            block = part.score_matrix.square_root(triangular=is_triangular)
        else:
            block, amplification = _root_of_matrix(Dense(part, 0.0, 0.0).matrix(), noise)
            noise *= amplification
        blocks.append(factor**0.5 * block.to(device))
    # Large rows first: QR keeps the digits of small rows below large ones only in this order.
    blocks.sort(key=lambda block: -float(block.abs().max()) if block.numel() else 0.0)
    return torch.cat(blocks), noise


def _root_of_matrix(H: Tensor, noise: float) -> tuple[Tensor, float]:
    """Return B (n, D) with BᵀB = H, and by how much the rounding of B is larger than that of H."""
    diagonal = H.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt()
    values, V = torch.linalg.eigh(H / scale / scale[:, None])
    if float(values[0]) < -noise * float(values[-1].clamp_min(1)):
        raise ValueError(
            "`op` must be a sum of positive semi-definite operators, got one with the eigenvalue "
            f"{float(torch.linalg.eigvalsh(H)[0]):.3g}. Pass a precision matrix."
        )
    positive = values > noise
    values, V = values[positive], V[:, positive]
    amplification = max(1.0, float(values.min()) ** -0.5) if len(values) else 1.0
    return values.sqrt()[:, None] * V.T * scale, amplification


def _bounds(B: Tensor, A: Tensor, noise: float, gap: float) -> tuple[Any, Any, Tensor, int, int]:
    """Return the covariance, the digits of its diagonal, a basis of what is identifiable, the nullity and what is lost.

    Parameters
    ----------
    B : torch.Tensor
        (n, D).
    A : torch.Tensor
        (D, p).
    noise : float
        Norm of the rounding of B if its columns have norm 1.
    gap : float
        Ratio of singular values above which those that are zero to rounding are zero.
    """
    D = len(A)
    # In units in which each parameter has unit information, neither rank nor digits depend on the user's units.
    norms = torch.linalg.vector_norm(B, dim=0)
    known = norms > 0
    scale = torch.where(known, norms, torch.ones_like(norms))
    B, A = B / scale, A / scale[:, None]
    if len(B) > D:
        B = torch.linalg.qr(B, mode="r")[1]
    _, values, Vt = torch.linalg.svd(B, full_matrices=False)
    # Zero columns, and fewer rows than parameters, leave directions without information whatever the rounding.
    certain = min(len(B), int(known.sum()))
    values, Vt = values[:certain], Vt[:certain]
    rank = int((values > noise).sum())
    least = float(values[rank - 1]) if rank else float("inf")
    separated = rank == certain or least > gap * noise
    lost = 0 if separated and least > 10 * noise else int((values <= 10 * noise).sum())
    nullity = D - (rank if separated else certain)
    # The complement of the null space in the user's units.
    basis = torch.linalg.qr(Vt[: D - nullity].T * scale[:, None])[0]
    values, Vt = values[:rank], Vt[:rank]
    inner = Vt @ A
    scaled = inner / values[:, None]
    covariance = (scaled.T @ scaled).cpu().numpy()
    deviations = scaled.norm(dim=0)
    # A perturbation E of B changes B⁺ᵀa by about B⁺ᵀEᵀB⁺ᵀa, and turns each singular vector by at most ‖E‖/σ.
    error = noise * (scaled / values[:, None]).norm(dim=0) / deviations.clamp_min(1e-300) + (noise / least) ** 2
    digits = (-error.log10()).clamp(0, 15).cpu().numpy()
    outside = (A - Vt.T @ inner).norm(dim=0) > 10 * noise * deviations.maximum(A.norm(dim=0))
    infinite = outside.cpu().numpy()
    covariance[infinite] = covariance[:, infinite] = np.inf
    digits[infinite] = np.inf
    if lost:
        covariance[:], digits[:] = np.nan, 0
    return covariance, digits, basis, nullity, lost


def _functions(op: TorchLinearOperator, of: Any) -> tuple[Tensor, list[str]]:
    """Return the coefficients A (D, p) in float64, and names."""
    D, G = op.shape[0], op.score_matrix
    entries, shapes, spans = _entry_names(G), G.parameters.shapes, G.parameters.spans

    def check(name: Any) -> str:
        if name not in shapes:
            raise ValueError(f"`of` names {name!r}, which is no parameter: they are {list(shapes)}.")
        return str(name)

    def zeros(p: int) -> Tensor:
        if 16 * D * p > G.max_memory:
            raise ValueError(f"{p} functions of {D} parameters take {16 * D * p} bytes: pass fewer as `of`.")
        return torch.zeros(D, p, dtype=torch.float64, device=op.device)

    if of is None or isinstance(of, str) or (isinstance(of, list) and of and all(isinstance(n, str) for n in of)):
        names = list(shapes) if of is None else [of] if isinstance(of, str) else of
        chosen = [k for name in names for k in range(*spans[check(name)])]
        A = zeros(len(chosen))
        A[chosen, list(range(len(chosen)))] = 1
        return A, [entries[k] for k in chosen]
    if isinstance(of, Mapping):
        A = zeros(len(of))
        for column, function in enumerate(of.values()):
            if not isinstance(function, Mapping):
                raise TypeError(
                    f"`of` maps the name of a function to a mapping of coefficients by parameter, got {function!r}."
                )
            for name, coefficients in function.items():
                shape = shapes[check(name)]
                values = coefficients.detach() if isinstance(coefficients, Tensor) else coefficients
                values = torch.as_tensor(values, dtype=torch.float64, device=op.device)
                if values.shape not in ((), shape):
                    raise ValueError(
                        f"the coefficients of {name!r} have shape {tuple(values.shape)}, the parameter {tuple(shape)}."
                    )
                A[slice(*spans[name]), column] = values.expand(shape).reshape(-1)
        return A, [str(name) for name in of]
    A = _arrays.enter(of)[0]
    op._check_shape(A, "crlb")
    if A.is_complex():
        raise TypeError("real functions are taken, got complex coefficients: pass their parts.")
    A = A.to(op.device, torch.float64)
    A = A[:, None] if A.ndim == 1 else A
    return A, [f"function {k}" for k in range(A.shape[1])]


def _entry_names(G: Any) -> list[str]:
    """Return a name for each element of the flat vector of the parameters."""
    names = []
    for name, shape in G.parameters.shapes.items():
        places = np.ndindex(*shape)
        names += [f"{name}[{', '.join(map(str, place))}]" if place else name for place in places]
    return names


def _name_directions(G: Any, V: Tensor, nullity: int) -> tuple[str, ...]:
    """Describe some directions of the null space, the complement of the columns of V, by their largest entries."""
    if nullity == 0:
        return ()
    D = G.shape[1]
    # The projector onto the null space; its pivoted columns are the directions nearest to single parameters.
    entries = _entry_names(G)
    remaining = 1 - V.square().sum(1)
    found: list[Tensor] = []
    texts = []
    for _ in range(min(nullity, _NAMED_DIRECTIONS)):
        pivot = int(remaining.argmax())
        direction = -(V @ V[pivot])
        direction[pivot] += 1
        for other in found:
            direction -= (other @ direction) * other
        direction /= direction.norm()
        found.append(direction)
        remaining = remaining - direction.square()
        largest = direction.abs().argsort(descending=True)[:_NAMED_ENTRIES].tolist()
        terms = [(float(direction[k]), entries[k]) for k in largest if abs(float(direction[k])) > 1e-6]
        more = " + …" if len(terms) < D and float(direction.abs().sort().values[-len(terms) - 1 :][0]) > 1e-6 else ""
        texts.append(" ".join(f"{value:+.3g} {name}" for value, name in terms).removeprefix("+") + more)
    return tuple(texts)
