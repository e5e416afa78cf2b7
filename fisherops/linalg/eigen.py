"""Eigenvalues and eigenvectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._checks import integer
from fisherops._linop import TorchLinearOperator, check_result
from fisherops._torch import outside_of_autocast
from fisherops.linalg.iteration import Iteration
from fisherops.linalg.methods import (
    EIGEN,
    EIGENVALUES,
    SOME_EIGEN,
    Method,
    Task,
    as_operator,
    choose,
)
from fisherops.linalg.results import Eigenpairs, HaltedError, Interrupted, Pairs

# Residuals, in units of eps and the largest eigenvalue, that rounding may cause.
_ROUNDING = 1000.0

_NO_PRIMAL = (
    "`method` must be 'auto', 'dual' or 'dense', which find all eigenvalues, got 'primal'. For some of them use eigsh.",
    "`max_memory` must hold the Gram matrix or F, and neither fits. Raise it, or use eigsh for some eigenvalues and "
    "spectral_density for their distribution.",
)


@outside_of_autocast
def eigsh(
    op: Any,
    k: int = 6,
    which: str = "LM",
    *,
    v0: Any = None,
    ncv: int | None = None,
    maxiter: int | None = None,
    tol: float = 0.0,
    return_eigenvectors: bool = True,
    method: str = "auto",
    like: Any = None,
    callback: Callable[[int, Any, Any], object] | None = None,
    progressbar: bool = False,
    checkpoint: Any = None,
) -> Eigenpairs:
    """Find k eigenvalues of a Fisher matrix, and their eigenvectors.

    Parameters
    ----------
    op : LinearOperator
        Symmetric and positive semi-definite, (D, D).
    k : int
        Number of eigenvalues, from 1 to D. Default: 6.
    which : {"LM", "LA", "SA", "SM"}
        The largest ("LM" and "LA" are the same here) or the smallest.
    v0 : array, optional
        (D,), start of the primal way; random with a fixed seed otherwise.
    ncv : int, optional
        Vectors of the primal way's space, k < ncv ≤ D; ``min(D, max(2 k + 1, 20))`` otherwise. It holds ncv + 1 of D
        numbers.
    maxiter : int, optional
        Products of the primal way at most, ``10 * D`` otherwise.
    tol : float
        Residuals ‖F v − λ v‖ that the primal way stops at, relative to the largest eigenvalue; 0 means the precision.
    return_eigenvectors : bool
        Whether to find eigenvectors, and residuals by a product with them.
    method : {"auto", "dual", "dense", "primal"}
        "dual" finds every nonzero eigenvalue from the Gram matrix, so clusters and multiple eigenvalues too; "primal"
        is Lanczos' method with thick restarts, which like ARPACK may miss copies of a multiple eigenvalue.
    like : array, optional
        Results are of the library and device of this array; NumPy otherwise.
    callback : callable, optional
        ``callback(products, eigenvalues, residuals)`` after each cycle of the primal way.
    progressbar : bool
        Whether the primal way shows its products and largest residual on stderr.
    checkpoint : path, optional
        Where the primal way keeps its state after each cycle and when it is interrupted; if the file is there, it goes
        on from it, to the same result. Written whole or not at all.

    Returns
    -------
    Eigenpairs
        Unpacks as ``values, vectors``, ascending.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator.
    ValueError
        If an argument is out of range, `method` is not available for `op` within its ``max_memory``, or a checkpoint is
        damaged or of another problem.
    Interrupted
        At a KeyboardInterrupt in the primal way; `result` holds the best pairs so far.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> values, vectors = fo.linalg.eigsh(op, k=2)
    >>> vectors.shape
    (15, 2)
    """
    A = as_operator(op)
    D = A.shape[0]
    k = integer("k", k, 1, D)
    if which not in ("LM", "LA", "SA", "SM"):
        raise ValueError(f"`which` must be 'LM', 'LA', 'SA' or 'SM', got {which!r}.")
    if not 0 <= tol < 1:
        raise ValueError(f"`tol` must be at least 0 and below 1, got {tol!r}.")
    largest = which in ("LM", "LA")
    ncv = min(D, max(2 * k + 1, 20)) if ncv is None else integer("ncv", ncv, min(k + 1, D), D)
    # Besides each product a vector is made orthogonal to half of ncv others, twice.
    task = Task(20.0 + 5.0 * k, SOME_EIGEN if largest and 8 * k < D else EIGEN, is_spectrum=True)
    iteration = Iteration(callback, progressbar, checkpoint)
    v0 = None if v0 is None else _first_vector(A, v0)
    chosen = choose(A, task, method, iteration=iteration, v0=v0, ncv=ncv, maxiter=maxiter, tol=tol)
    if A.score_matrix is not None and A.score_matrix.is_divided and (return_eigenvectors or not chosen.is_exact):
        raise NotImplementedError(
            "`method` must be 'dual' and `return_eigenvectors` False for sharded parameters, of which eigenvalues "
            "alone are supported."
        )
    leave = leave_for(like)
    try:
        pairs = chosen.eigenpairs(k, largest, return_eigenvectors)
    except HaltedError as halt:
        raise Interrupted(_eigenpairs(chosen, halt.found, return_eigenvectors, leave)) from None
    if return_eigenvectors:
        pairs = _with_residuals(chosen.op, pairs, tol)
    return _eigenpairs(chosen, pairs, return_eigenvectors, leave)


@outside_of_autocast
def eigvalsh(op: Any, *, method: str = "auto", like: Any = None) -> Any:
    """Return the whole nonzero spectrum of a Fisher matrix, ascending.

    From the Gram matrix (rows × rows) or F (D × D); there is no primal way.

    Parameters
    ----------
    op : LinearOperator
        Symmetric and positive semi-definite, (D, D).
    method : {"auto", "dual", "dense"}
        Matrix whose eigenvalues are computed: the Gram matrix or F. Default: the cheaper one.
    like : array, optional
        Array whose library and device the result has. Default: NumPy.

    Returns
    -------
    array
        (n,) with n the smaller of D and the number of rows of the score matrix in "dual", and D in "dense". All other
        eigenvalues are zero, or λ for ``op.damped(λ)``. Those below λ_max · n · eps are zero to rounding, and may be of
        either sign.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator.
    ValueError
        If `op` is not square, an argument is out of range, or `method` is not available for `op` within its
        ``max_memory``.

    See Also
    --------
    eigsh : some of the eigenvalues, and their eigenvectors.
    spectral_density : the distribution of the eigenvalues, also of large matrices.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> fo.linalg.eigvalsh(op).shape
    (15,)
    """
    A = as_operator(op)
    chosen = choose(A, Task(float("inf"), EIGENVALUES, is_spectrum=True, refusals=_NO_PRIMAL), method)
    values = chosen.eigenvalues() + chosen.shift
    return leave_for(like)(check_result(values.to(A.torch_dtype), values))


def _first_vector(A: TorchLinearOperator, v0: Any) -> Tensor:
    """Return the first vector of Lanczos' method, (D,)."""
    v: Tensor = _arrays.enter(v0)[0].to(A.device, A.torch_dtype)
    if v.shape != A.shape[:1] or not 0 < float(v.norm(dtype=torch.float64)) < float("inf"):
        raise ValueError(
            f"`v0` must be {A.shape[0]} finite numbers, not all zero, got shape {tuple(v.shape)}, or entries that are "
            "not."
        )
    return v


def _with_residuals(op: TorchLinearOperator, pairs: Pairs, tol: float) -> Pairs:
    """Return eigenpairs of F with ‖F v − λ v‖, by a product with F.

    A true residual: a wrong Gram matrix, or an operator that is not symmetric, must not look converged.
    """
    V, values = pairs.vectors, pairs.values.to(op.torch_dtype)[:, None]
    assert V is not None
    residuals = op.processes.norms(op.multiply(V).addcmul_(V, values, value=-1))
    rounding = _ROUNDING * float(torch.finfo(op.torch_dtype).eps)
    converged = pairs.converged and bool((residuals <= max(tol, rounding) * pairs.scale).all())
    return pairs._replace(residuals=residuals, products=pairs.products + len(V), converged=converged)


def _eigenpairs(method: Method, pairs: Pairs, with_vectors: bool, leave: Callable[[Tensor], Any]) -> Eigenpairs:
    """Return eigenpairs of F + shift · I in the library of the caller."""
    dtype = method.op.torch_dtype
    values = check_result(pairs.values.to(dtype), pairs.values) + method.shift
    return Eigenpairs(
        leave(values),
        leave(pairs.vectors.T) if with_vectors and pairs.vectors is not None else None,
        None if pairs.residuals is None else leave(pairs.residuals.to(dtype)),
        method.name,
        pairs.products,
        pairs.converged,
    )


def leave_for(like: Any) -> Callable[[Tensor], Any]:
    """Return how tensors go to the library and device of `like`, in their own dtype."""
    if like is None:
        return lambda t: t.cpu().contiguous().numpy()
    return _arrays.leave_like(like)
