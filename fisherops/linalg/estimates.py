"""Traces, norms and determinants: exact from rows or a dense matrix, or by random probes with a standard error."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fisherops._checks import integer
from fisherops._linop import TorchLinearOperator, as_damping
from fisherops.fisher import FisherOperator
from fisherops.linalg._probes import rademacher, spectral_sums
from fisherops.linalg._results import Estimate
from fisherops.linalg._ways import (
    CHOLESKY,
    EIGENVALUES,
    EXACT,
    as_operator,
    choose,
    dense_matrix,
    outside_of_autocast,
    summands,
    undamped,
    zero_threshold,
)
from fisherops.linalg.eigen import leave_for, spectrum_of
from fisherops.linalg.solve import DampedInverse

PROBES, STEPS = 30, 40

# Rows of an operator that is multiplied with the identity to find its trace or diagonal, instead of an estimate.
_SMALL = 1000
_SEED = 0


class LogDeterminant(NamedTuple):
    """As of ``numpy.linalg.slogdet``, with a standard error.

    Attributes
    ----------
    sign : float
        1, or 0 where the determinant is.
    logabsdet : float
        −inf where the determinant is 0.
    standard_error : float
        Of `logabsdet`; 0 where it is exact to rounding.
    method : str
        "dual", "dense" or "primal".
    """

    sign: float
    logabsdet: float
    standard_error: float
    method: str


@outside_of_autocast
def trace(op: Any, *, probes: int = PROBES, seed: int = _SEED) -> Estimate:
    """Return the trace of F: exact for Fisher operators, their sums, multiples and inverses; else by Hutch++.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    probes : int
        Number of products for other operators of more than 1000 rows, at least 6. Default: 30.
    seed : int
        Seed of the probes. Default: 0.

    Returns
    -------
    Estimate
        The trace and its standard error, which is 0 if the trace is exact.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator.
    ValueError
        If `op` is not square, or an argument is out of range.

    References
    ----------
    R. Meyer, C. Musco, C. Musco, D. Woodruff, Hutch++: optimal stochastic trace estimation, SOSA 2021,
    doi:10.1137/1.9781611976496.16.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> trace = fo.linalg.trace(op)
    >>> trace.method, trace.standard_error
    ('rows', 0.0)
    """
    A, probes = as_operator(op), integer("probes", probes, 6)
    exact, way = 0.0, "rows"
    rest: TorchLinearOperator | None = None
    for part, factor in summands(A):
        if part is None:
            exact += factor * A.shape[0]
        elif isinstance(part, FisherOperator):
            exact += factor * part.trace()
        elif isinstance(part, DampedInverse) and part.method != "primal":
            exact, way = exact + factor * part.trace(), part.method
        else:
            own = part._scaled(factor)
            rest = own if rest is None else rest._plus(own)
    if rest is None:
        return Estimate(exact, 0.0, way)
    if rest.shape[0] <= _SMALL:
        return Estimate(exact + float(np.trace(rest.todense())), 0.0, "dense")
    value, error = _hutch(rest, probes // 3, seed)
    return Estimate(exact + value, error, "primal")


def _hutch(A: TorchLinearOperator, third: int, seed: int) -> tuple[float, float]:
    """Estimate the trace by Hutch++ with three times `third` products, and its standard error."""
    Q = torch.linalg.qr(A.times_columns(rademacher(A, third, seed)))[0]
    caught = float((Q * A.times_columns(Q)).sum(dtype=torch.float64))
    Z = rademacher(A, third, seed + 1)
    Z = Z - Q @ (Q.T @ Z)
    samples = (Z * A.times_columns(Z)).sum(0, dtype=torch.float64)
    return caught + float(samples.mean()), float(samples.std()) / third**0.5


@outside_of_autocast
def diagonal(op: Any, *, like: Any = None, probes: int = PROBES, seed: int = _SEED) -> Estimate:
    """Return the diagonal of F: exact for Fisher operators, their sums, multiples and inverses; else by random signs.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    like : array, optional
        Array whose library and device the result has. Default: NumPy.
    probes : int
        Number of products for other operators of more than 1000 rows, at least 2. Default: 30.
    seed : int
        Seed of the probes. Default: 0.

    Returns
    -------
    Estimate
        With arrays (D,) as value and standard error, which is 0 if the diagonal is exact.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator.
    ValueError
        If `op` is not square, or an argument is out of range.

    References
    ----------
    C. Bekas, E. Kokiopoulou, Y. Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57 (2007)
    1214–1229, doi:10.1016/j.apnum.2007.01.003.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> fo.linalg.diagonal(op).value.shape
    (15,)
    """
    A, leave = as_operator(op), leave_for(like)
    D, probes = A.shape[0], integer("probes", probes, 2)
    exact, way = torch.zeros(D, dtype=torch.float64, device=A.device), "rows"
    rest: TorchLinearOperator | None = None
    for part, factor in summands(A):
        if part is None:
            exact += factor
        elif isinstance(part, FisherOperator):
            exact += factor * torch.as_tensor(part.diagonal(), device=A.device)
        elif isinstance(part, DampedInverse) and part.method != "primal":
            exact, way = exact + factor * part.diagonal(), part.method
        else:
            own = part._scaled(factor)
            rest = own if rest is None else rest._plus(own)
    error = torch.zeros_like(exact)
    if rest is not None and D <= _SMALL:
        exact, way = exact + torch.as_tensor(rest.todense().diagonal().copy(), device=A.device), "dense"
    elif rest is not None:
        Z = rademacher(rest, probes, seed)
        samples = Z * rest.times_columns(Z)
        exact, error, way = exact + samples.mean(1), error + samples.std(1) / probes**0.5, "primal"
    return Estimate(leave(exact.to(A.torch_dtype)), leave(error.to(A.torch_dtype)), way)


@outside_of_autocast
def frobenius_norm(op: Any, *, method: str = "auto", probes: int = PROBES, seed: int = _SEED) -> Estimate:
    """Return ‖F‖_F, the root of the sum of squared eigenvalues.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    method : {"auto", "dual", "dense", "primal"}
        "dual" and "dense" are exact; "primal" is the mean of ‖F z‖² over random signs z. Default: the cheapest.
    probes : int
        Number of random vectors of the primal method, at least 2. Default: 30.
    seed : int
        Seed of the probes. Default: 0.

    Returns
    -------
    Estimate
        The norm and its standard error, which is 0 if the norm is exact.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator.
    ValueError
        If `op` is not square, an argument is out of range, or `method` is not available for `op` within its
        ``max_memory``.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> norm = fo.linalg.frobenius_norm(op)
    >>> bool(abs(norm.value - (op.todense() ** 2).sum() ** 0.5) < 1e-5)
    True
    """
    A, shift = undamped(as_operator(op))
    D = A.shape[0]
    way = choose(A, method, products=EXACT * probes, dense_flops=0.0)
    if way != "primal":
        matrix = dense_matrix(A, way)
        square = float(matrix.norm()) ** 2 + 2 * shift * float(matrix.trace()) + D * shift**2
        return Estimate(square**0.5, 0.0, way)
    Z = rademacher(A, integer("probes", probes, 2), seed)
    samples = (A.times_columns(Z) + shift * Z).norm(dim=0, dtype=torch.float64).square()
    mean, error = float(samples.mean()), float(samples.std()) / probes**0.5
    return Estimate(mean**0.5, error / (2 * mean**0.5) if mean > 0 else 0.0, "primal")


@outside_of_autocast
def slogdet(
    op: Any, damping: float = 0.0, *, method: str = "auto", probes: int = PROBES, steps: int = STEPS, seed: int = _SEED
) -> LogDeterminant:
    """Return the logarithm of the determinant of F + λI.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    damping : float
        λ ≥ 0, in the units of F's eigenvalues. Default: 0.
    method : {"auto", "dual", "dense", "primal"}
        "primal" is stochastic Lanczos quadrature and needs λ > 0. Its standard error covers the probes. The quadrature
        itself is exact if F has at most `steps` distinct eigenvalues, and close if λ is not far below the largest over
        steps². Default: the cheapest.
    probes, steps : int
        Number of random vectors of the primal method, at least 2, and number of products with each. Default: 30 and 40.
    seed : int
        Seed of the probes. Default: 0.

    Returns
    -------
    LogDeterminant
        A named tuple (sign, logabsdet, standard_error, method).

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator.
    ValueError
        If `op` is not square, an argument is out of range, or `method` is not available for `op` within its
        ``max_memory``.

    See Also
    --------
    numpy.linalg.slogdet : the same for a dense array.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> sign, logabsdet, *_ = fo.linalg.slogdet(op, damping=0.1)
    >>> sign
    1.0
    """
    A, damping = undamped(as_operator(op), as_damping(damping))
    way = choose(A, method, products=EXACT * probes * steps, dense_flops=CHOLESKY if damping > 0 else EIGENVALUES)
    D = A.shape[0]
    if way == "primal":
        if damping == 0:
            raise ValueError(
                "`damping` must be positive for method='primal', because the logarithm of zero eigenvalues has no "
                "quadrature, got 0. Pass damping > 0, or method='dense'."
            )
        value, error = spectral_sums(
            A, lambda nodes: np.log(nodes + damping), integer("probes", probes, 2), integer("steps", steps, 1), seed
        )
        return LogDeterminant(1.0, float(value), float(error), way)
    if damping == 0:
        values = spectrum_of(A, way)
        if len(values) < D or float(values[0]) <= zero_threshold(A, float(values[-1])):
            return LogDeterminant(0.0, -math.inf, 0.0, way)
        return LogDeterminant(1.0, float(values.log().sum()), 0.0, way)
    matrix = dense_matrix(A, way)
    n = len(matrix)
    if damping < 100 * zero_threshold(A, float(matrix.norm())):
        # Eigenvalues of the size of rounding would count beside λ.
        values = _without_rounding(A, torch.linalg.eigvalsh(matrix)[-D:])
        value = float((values + damping).log().sum()) + (D - len(values)) * math.log(damping)
        return LogDeterminant(1.0, value, 0.0, way)
    matrix.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise ValueError(
            f"`damping` must make F + λI positive definite to rounding, got {damping:g}. Pass a larger one."
        )
    # The other D − n eigenvalues of F are zero; where n > D, n − D of the Gram matrix are.
    value = 2 * float(factor.diagonal().log().sum()) + (D - n) * math.log(damping)
    return LogDeterminant(1.0, value, 0.0, way)


@outside_of_autocast
def effective_dimension(
    op: Any, damping: float, *, method: str = "auto", probes: int = PROBES, steps: int = STEPS, seed: int = _SEED
) -> Estimate:
    """Return the effective dimension tr F(F + λI)⁻¹ = Σ λ_i / (λ_i + λ).

    It is the number of directions that the data determine, against a prior or noise of size λ.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    damping : float
        λ > 0, in the units of F's eigenvalues.
    method : {"auto", "dual", "dense", "primal"}
        "primal" is stochastic Lanczos quadrature, see `slogdet`. Default: the cheapest.
    probes, steps : int
        Number of random vectors of the primal method, at least 2, and number of products with each. Default: 30 and 40.
    seed : int
        Seed of the probes. Default: 0.

    Returns
    -------
    Estimate
        The effective dimension, between 0 and D, and its standard error, which is 0 if it is exact.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator.
    ValueError
        If `op` is not square, an argument is out of range, or `method` is not available for `op` within its
        ``max_memory``.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> 0 < fo.linalg.effective_dimension(op, damping=0.1).value < 15
    True
    """
    (A, shift), damping = undamped(as_operator(op)), as_damping(damping)
    if damping == 0:
        raise ValueError(
            "`damping` must be positive, got 0. The effective dimension without damping is the rank: use eigvalsh."
        )
    way = choose(A, method, products=EXACT * probes * steps, dense_flops=EIGENVALUES)
    if way == "primal":
        value, error = spectral_sums(
            A,
            lambda nodes: (nodes + shift) / (nodes + shift + damping),
            integer("probes", probes, 2),
            integer("steps", steps, 1),
            seed,
        )
        return Estimate(float(value), float(error), way)
    values = _without_rounding(A, spectrum_of(A, way)) + shift
    others = (A.shape[0] - len(values)) * shift / (shift + damping)
    return Estimate(float((values / (values + damping)).sum()) + others, 0.0, way)


def _without_rounding(A: TorchLinearOperator, values: Tensor) -> Tensor:
    """Return eigenvalues with those that are zero to rounding as zeros."""
    threshold = zero_threshold(A, float(values[-1]))
    return torch.where(values > threshold, values, torch.zeros_like(values))
