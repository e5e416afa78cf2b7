"""Eigenvalues and eigenvectors."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fisherops import _arrays
from fisherops._checks import integer
from fisherops._linop import TorchLinearOperator, check_result
from fisherops.fisher import FisherOperator
from fisherops.linalg import _lanczos
from fisherops.linalg._checkpoint import Checkpoint
from fisherops.linalg._lanczos import Krylov
from fisherops.linalg._results import Eigenpairs, Interrupted
from fisherops.linalg._ways import (
    EIGEN,
    EIGENVALUES,
    SOME_EIGEN,
    as_operator,
    choose,
    dense_matrix,
    outside_of_autocast,
    undamped,
    zero_threshold,
)

# Residuals, in units of eps and the largest eigenvalue, that rounding may cause.
_ROUNDING = 1000.0


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
    A, shift = undamped(as_operator(op))
    D = A.shape[0]
    k = integer("k", k, 1, D)
    if isinstance(A, FisherOperator) and A.score_matrix.is_divided and (return_eigenvectors or method != "dual"):
        raise NotImplementedError(
            "`method` must be 'dual' and `return_eigenvectors` False for sharded parameters, of which eigenvalues "
            "alone are supported."
        )
    if which not in ("LM", "LA", "SA", "SM"):
        raise ValueError(f"`which` must be 'LM', 'LA', 'SA' or 'SM', got {which!r}.")
    if not 0 <= tol < 1:
        raise ValueError(f"`tol` must be at least 0 and below 1, got {tol!r}.")
    largest = which in ("LM", "LA")
    ncv = min(D, max(2 * k + 1, 20)) if ncv is None else integer("ncv", ncv, min(k + 1, D), D)
    # Beside each product a vector is made orthogonal to half of ncv others, twice.
    way = choose(A, method, products=20.0 + 5.0 * k, dense_flops=SOME_EIGEN if largest and 8 * k < D else EIGEN)
    leave = leave_for(like)
    found: tuple[Any, ...]
    if way == "primal":
        maxiter = 10 * D if maxiter is None else integer("maxiter", maxiter, 1)

        try:
            found = _primal(A, k, largest, v0, ncv, maxiter, tol, callback, progressbar, checkpoint)
        except _HaltedError as halt:
            raise Interrupted(
                _finish(A, shift, tol, halt.found, return_eigenvectors, way, leave, product=False)
            ) from None
    else:
        values, vectors, scale = _dense(A, way, k, largest, return_eigenvectors)
        found = values, vectors, None, 0, True, scale
    return _finish(A, shift, tol, found, return_eigenvectors, way, leave)


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
    A, shift = undamped(as_operator(op))
    if method == "primal":
        raise ValueError(
            "`method` must be 'auto', 'dual' or 'dense', which find all eigenvalues, got 'primal'. For some of them "
            "use eigsh."
        )
    way = choose(A, method, products=float("inf"), dense_flops=EIGENVALUES)
    if way == "primal":
        raise ValueError(
            "`max_memory` must hold the Gram matrix or F, and neither fits. Raise it, or use eigsh for some "
            "eigenvalues and spectral_density for their distribution."
        )
    values = spectrum_of(A, way) + shift
    return leave_for(like)(check_result(values.to(A.torch_dtype), values))


def spectrum_of(A: TorchLinearOperator, way: str) -> Tensor:
    """Return the eigenvalues in float64, ascending; where there are fewer than D, the others are zero."""
    values: Tensor = torch.linalg.eigvalsh(dense_matrix(A, way))
    return values[-A.shape[0] :]  # where there are more rows, as many of the others are zero


def top_of_matrix(matrix: Tensor, k: int, tol: float) -> tuple[Tensor, Tensor]:
    """Return the k largest eigenpairs of a dense symmetric matrix, ascending.

    Some of many are found by Lanczos' method, to residuals of `tol` relative to the largest. That none was missed is
    proved by inertia: without those found, no eigenvalue is above the smallest of them, so a Cholesky factor exists.
    """
    n = len(matrix)
    if 8 * k < n:
        generator = torch.Generator("cpu").manual_seed(0)
        start = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu").to(matrix)
        space = Krylov.start(start, max(2 * k + 1, 20))
        found, S, _, converged = _lanczos.eigenpairs(
            space, lambda v: matrix @ v, k, True, tol, n, lambda: torch.zeros_like(start), lambda *_: None
        )
        if converged:
            values = torch.as_tensor(found).to(matrix)
            vectors = space.basis[: len(S)].T @ torch.as_tensor(S).to(matrix)
            rest = torch.addmm(matrix, vectors * values, vectors.T, alpha=-1).neg_()
            rest.diagonal().add_(values[0] + 10 * tol * values[-1])
            if int(torch.linalg.cholesky_ex(rest)[1]) == 0:
                return values, vectors
    values, vectors = torch.linalg.eigh(matrix)
    return values[n - k :], vectors[:, n - k :]


def _dense(
    A: TorchLinearOperator, way: str, k: int, largest: bool, vectors: bool
) -> tuple[Tensor, Tensor | None, float]:
    """Return eigenvalues in float64, eigenvectors in the compute precision, and the norm of the matrix."""
    matrix = dense_matrix(A, way)
    norm = float(matrix.norm())
    tol = max(0.1 * float(torch.finfo(A.torch_dtype).eps), 1e-14)
    if way == "dense":
        if largest:
            values, V = top_of_matrix(matrix, k, tol)
        else:
            values, V = (pairs[..., :k] for pairs in torch.linalg.eigh(matrix))
        return values, V.to(A.torch_dtype), norm
    assert isinstance(A, FisherOperator)
    n, D = len(matrix), A.shape[0]
    values, U = top_of_matrix(matrix, min(k, n) if largest else n, tol)
    positive = values > zero_threshold(A, float(values[-1]))
    values, U = values[positive], U[:, positive]
    rank = len(values)  # or k, if that is less
    # F has D − rank zeros beside.
    zeros = max(0, k - rank) if largest else min(k, D - rank)
    chosen = slice(rank) if largest else slice(k - zeros)
    eigenvalues = torch.cat([values.new_zeros(zeros), values[chosen]])
    if not vectors:
        return eigenvalues, None, norm
    lifted = _lift(A, U[:, chosen])
    if zeros:
        lifted = torch.cat([_complement(_lift(A, U), zeros), lifted], 1)
    return eigenvalues, lifted, norm


def _lift(A: FisherOperator, U: Tensor) -> Tensor:
    """Return the orthonormal eigenvectors of F for those of G Gᵀ, in ascending order."""
    V: Tensor = A.scores.T.times_columns(U.to(A.torch_dtype))
    if not V.shape[1]:
        return V
    inner = V.T @ V
    V /= inner.diagonal().sqrt()
    overlaps = inner / torch.outer(inner.diagonal(), inner.diagonal()).sqrt()
    eps = float(torch.finfo(V.dtype).eps)
    if float(overlaps.fill_diagonal_(0).abs().max()) > 100 * eps:
        # The images of larger ones are orthogonal to rounding; those of smaller ones are made so to them.
        Q, R = torch.linalg.qr(V.flip(1))
        V = (Q * R.diagonal().sign()).flip(1)
        V /= (V.T @ V).diagonal().sqrt()
    return V


def _crc(v: Tensor) -> int:
    return zlib.crc32(v.cpu().contiguous().numpy().tobytes())


def _complement(V: Tensor, count: int) -> Tensor:
    """Return orthonormal vectors that are orthogonal to the columns of V, which are orthonormal."""
    generator = torch.Generator("cpu").manual_seed(0)
    Z = torch.randn(len(V), count, generator=generator, dtype=torch.float64, device="cpu").to(V.device, V.dtype)
    for _ in range(2):
        Z = torch.linalg.qr(Z - V @ (V.T @ Z))[0]
    return Z


def _primal(
    A: TorchLinearOperator,
    k: int,
    largest: bool,
    v0: Any,
    ncv: int,
    maxiter: int,
    tol: float,
    callback: Callable[[int, Any, Any], object] | None,
    progressbar: bool,
    checkpoint: Any,
) -> tuple[Tensor, Tensor, Tensor, int, bool, float]:
    D = A.shape[0]

    def random(seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(D, generator=generator, dtype=torch.float64, device="cpu").to(A.device, A.torch_dtype)

    start = random(0) if v0 is None else _arrays.enter(v0)[0].to(A.device, A.torch_dtype)
    if start.shape != (D,) or not 0 < float(start.norm(dtype=torch.float64)) < float("inf"):
        raise ValueError(
            f"`v0` must be {D} finite numbers, not all zero, got shape {tuple(start.shape)}, or entries that are not."
        )
    space = Krylov.start(start, ncv)
    file = None
    if checkpoint is not None:
        file = Checkpoint(checkpoint, "eigsh", A, k=k, largest=largest, ncv=ncv, **{"checksum of v0": _crc(start)})
        state = file.load()
        if state is not None:
            basis = torch.as_tensor(state["basis"])
            space.restore(basis, state["projected"], float(state["coupling"]), int(state["products"]))
    bar = tqdm(desc="eigsh", unit=" products", leave=False, disable=not progressbar or not A.processes.leads)
    bar.update(space.products)

    def multiply(v: Tensor) -> Tensor:
        product = A.times_columns(v[:, None])[:, 0]
        bar.update()
        return product

    def save() -> None:
        if file is not None:
            basis = space.basis[: space.size + 1].cpu()
            file.save(basis=basis, projected=space.projected, coupling=space.coupling, products=space.products)

    def report(space: Krylov, values: Any, residuals: Any) -> None:
        scale = max(abs(values).max(initial=0), 1e-300)
        bar.set_postfix_str(f"residual {residuals.max(initial=0) / scale:.1e} of the largest", refresh=False)
        save()
        if callback is not None:
            with A.processes.guard("the callback of eigsh"):
                callback(space.products, values, residuals)

    tol = max(tol, float(torch.finfo(A.torch_dtype).eps))
    with bar:
        try:
            pairs = _lanczos.eigenpairs(
                space, multiply, k, largest, tol, maxiter, lambda: random(space.products), report
            )
        except KeyboardInterrupt:
            save()
            values, vectors = space.ritz() if space.size else (np.zeros(0), np.zeros((0, 0)))
            ends = slice(max(0, len(values) - k), None) if largest else slice(k)
            residuals = space.residuals(vectors) if space.size else values
            pairs = values[ends], vectors[:, ends], residuals[ends], False
            raise _HaltedError(_lifted(A, space, pairs)) from None
    return _lifted(A, space, pairs)


class _HaltedError(Exception):
    """Lanczos' method was interrupted: what it had found."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


def _lifted(A: TorchLinearOperator, space: Krylov, pairs: Any) -> tuple[Tensor, Tensor, Tensor, int, bool, float]:
    values, S, residuals, converged = pairs
    S = torch.as_tensor(S, dtype=A.torch_dtype, device=A.device)
    vectors = (S.T @ space.basis[: len(S)]).T
    values, residuals = (torch.as_tensor(x, device=A.device) for x in (values, residuals))
    scale = float(abs(space.ritz()[0]).max(initial=0)) if space.size else 0.0
    return values, vectors, residuals, space.products, converged, scale


def _finish(
    A: TorchLinearOperator,
    shift: float,
    tol: float,
    found: Any,
    vectors: bool,
    way: str,
    leave: Callable[[Tensor], Any],
    product: bool = True,
) -> Eigenpairs:
    values, V, residuals, products, converged, scale = found
    values = values.to(A.device)
    values = check_result(values.to(A.torch_dtype), values)
    if vectors and product:
        residuals = A.times_columns(V).addcmul_(V, values, value=-1).norm(dim=0, dtype=torch.float64)
        products += V.shape[1]
        # A true residual: a wrong Gram matrix, or an operator that is not symmetric, must not look converged.
        rounding = _ROUNDING * float(torch.finfo(A.torch_dtype).eps)
        converged = converged and bool((residuals <= max(tol, rounding) * scale).all())
    return Eigenpairs(
        leave(values + shift),
        leave(V) if vectors else None,
        None if residuals is None else leave(residuals.to(A.torch_dtype)),
        way,
        products,
        converged,
    )


def leave_for(like: Any) -> Callable[[Tensor], Any]:
    """Return how tensors go to the library and device of `like`, in their own dtype."""
    if like is None:
        return lambda t: t.cpu().numpy()
    return _arrays.leave_like(like)
