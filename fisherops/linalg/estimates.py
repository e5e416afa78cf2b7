"""Traces, norms and determinants: exact from rows or a dense matrix, or by random probes with a standard error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops._checks import integer
from fisherops._linop import TorchLinearOperator, as_damping
from fisherops._torch import outside_of_autocast
from fisherops.linalg.eigen import leave_for
from fisherops.linalg.methods import (
    CHOLESKY,
    EIGENVALUES,
    EXACT,
    Task,
    as_operator,
    choose,
    is_shifted,
    summands,
)
from fisherops.linalg.primal import rademacher
from fisherops.linalg.results import Estimate, LogDeterminant, Mean
from fisherops.linalg.solve import Inverse

PROBES, STEPS = 30, 40

# Rows of an operator that is multiplied with the identity to find its trace or diagonal, instead of an estimate.
_SMALL = 1000
_SEED = 0


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
    exact, method, rest = _exactly(A, lambda G: G.square_norm(), lambda inverse: inverse.trace(), _sum_of_diagonal)
    if rest is None:
        return Estimate(float(exact), 0.0, method)
    if rest.shape[0] <= _SMALL:
        return Estimate(float(exact) + float(np.trace(rest.todense())), 0.0, "dense")
    value, error = _hutch(rest, probes // 3, seed)
    return Estimate(float(exact) + value, error, "primal")


def _exactly(
    A: TorchLinearOperator,
    of_scores: Callable[[Any], Any],
    of_inverse: Callable[[Inverse], Any],
    of_identity: Callable[[int, Any], Any],
) -> tuple[Any, str, TorchLinearOperator | None]:
    """Sum a linear function over the parts of an operator.

    Returns
    -------
    exact : float or torch.Tensor
        The sum over multiples of the identity, Fisher operators and inverses with a factorization.
    method : str
    rest : TorchLinearOperator or None
        The sum of the other parts.
    """
    exact, method = 0.0, "rows"
    rest: TorchLinearOperator | None = None
    for part, factor in summands(A):
        if part is None:
            exact = exact + of_identity(A.shape[0], factor)
        elif part.score_matrix is not None:
            exact = exact + factor * of_scores(part.score_matrix)
        elif isinstance(part, Inverse) and part.is_exact:
            exact, method = exact + factor * of_inverse(part), part.method
        else:
            own = part._scaled(factor)
            rest = own if rest is None else rest._plus(own)
    return exact, method, rest


def _sum_of_diagonal(n: int, diagonal: Any) -> float:
    """Return the trace of a multiple of the identity, or of a diagonal matrix."""
    return float(diagonal.sum()) if isinstance(diagonal, Tensor) else n * diagonal


def _hutch(A: TorchLinearOperator, third: int, seed: int) -> Mean:
    """Estimate the trace by Hutch++ with three times `third` products."""
    Q = torch.linalg.qr(A.multiply(rademacher(A, third, seed)).T)[0].T
    caught = float((Q * A.multiply(Q)).sum(dtype=torch.float64))
    Z = rademacher(A, third, seed + 1)
    Z = Z - (Z @ Q.T) @ Q
    value, error = Mean.of((Z * A.multiply(Z)).sum(1, dtype=torch.float64))
    return Mean(caught + float(value), float(error))


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
    if A.score_matrix is not None and A.score_matrix.is_divided:
        raise NotImplementedError("`op` must have whole parameters, got sharded ones. Use `op.diagonal()`.")
    start = torch.zeros(D, dtype=torch.float64, device=A.device)
    exact, method, rest = _exactly(
        A, lambda G: G.col_squares(), lambda inverse: inverse.diagonal(), lambda _, factor: start + factor
    )
    exact, error = start + exact, start
    if rest is not None and D <= _SMALL:
        exact, method = exact + torch.as_tensor(rest.todense().diagonal().copy(), device=A.device), "dense"
    elif rest is not None:
        Z = rademacher(rest, probes, seed)
        value, error = Mean.of(Z * rest.multiply(Z))
        exact, method = exact + value, "primal"
    return Estimate(leave(exact.to(A.torch_dtype)), leave(error.to(A.torch_dtype)), method)


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
    task = Task(EXACT * probes, 0.0, is_spectrum=True)
    chosen = choose(as_operator(op), task, method, probes=probes, seed=seed)
    value, error = map(float, chosen.square_norm())
    return Estimate(value**0.5, error / (2 * value**0.5) if error > 0 else 0.0, chosen.name)


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
    A, damping = as_operator(op), as_damping(damping)
    task = Task(EXACT * probes * steps, CHOLESKY if damping > 0 or is_shifted(A) else EIGENVALUES)
    chosen = choose(A, task, method, damping, probes=probes, steps=steps, seed=seed)
    value, error = map(float, chosen.log_determinant())
    return LogDeterminant(0.0 if value == -np.inf else 1.0, value, error, chosen.name)


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
    A, damping = as_operator(op), as_damping(damping)
    if damping == 0:
        raise ValueError(
            "`damping` must be positive, got 0. The effective dimension without damping is the rank: use eigvalsh."
        )
    task = Task(EXACT * probes * steps, EIGENVALUES)
    chosen = choose(A, task, method, damping, probes=probes, steps=steps, seed=seed)
    value, error = map(float, chosen.effective_dimension())
    return Estimate(value, error, chosen.name)
