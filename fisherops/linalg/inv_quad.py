"""Rows of score matrices with a damped inverse between them, Q (F + λI)⁻¹ Tᵀ."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._linop import TorchLinearOperator, as_damping, check_result
from fisherops._memory import as_bytes, as_folder
from fisherops._torch import outside_of_autocast
from fisherops.linalg.dense import times
from fisherops.linalg.dual import Dual
from fisherops.linalg.iteration import Iteration
from fisherops.linalg.methods import CHOLESKY, EIGEN, Task, as_operator, cholesky_memory, choose
from fisherops.linalg.panels import Panels, Storage, bytes_of, check_disk
from fisherops.linalg.primal import Primal, random_signs
from fisherops.linalg.results import HaltedError, InverseForms
from fisherops.linalg.solve import NO_LEAST_NORM, least, preconditioner_of, refuse_singular
from fisherops.scores.given import GivenRows
from fisherops.scores.protocol import Scores

# Vectors (D,) that conjugate gradients, or refinement, hold for each right-hand side.
_VECTORS = 10

# Random combinations of the rows, of which the residuals are found by products with F.
_PROBES = 2


class _Found(NamedTuple):
    """Values, their relative residual, and whether that meets the tolerance."""

    value: Tensor
    residual: float
    converged: bool


class _Factorization(NamedTuple):
    key: tuple[Any, ...]
    panels: Panels
    norm: float


# The last Cholesky factor of each score matrix, as long as that lives.
_KEPT: WeakKeyDictionary[Any, _Factorization] = WeakKeyDictionary()


@outside_of_autocast
def inv_quad(
    op: Any,
    Q: Any,
    T: Any = None,
    *,
    damping: float,
    diagonal: bool = False,
    least_norm: bool = False,
    method: str = "auto",
    rtol: float = 1e-4,
    maxiter: int | None = None,
    M: Any = "jacobi",
    progressbar: bool = False,
    spill: Any = None,
    checkpoint: Any = None,
    like: Any = None,
) -> InverseForms:
    """Return Q (F + λI)⁻¹ Tᵀ for the rows of two score matrices.

    With gradients of test losses as Q and of training losses as T these are influence scores; with Jacobians of the
    outputs, predictive covariances; with Q the rows of G itself, the diagonal holds their leverages.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    Q, T : ScoreMatrix or array
        Score matrices of the same parameters, such as ``op.scores`` and ``op.scores.on(...)``; or arrays (k, D).
        Default for `T`: `Q`, and the result is symmetric.
    damping : float
        λ ≥ 0, in the units of F's eigenvalues.
    diagonal : bool
        Whether to return only the entries q (F + λI)⁻¹ qᵀ of the rows of Q. Default: False.
    least_norm : bool
        Whether to use F⁺ for λ = 0, also if F is singular; with "dual" and "dense" only. Default: False.
    method : {"auto", "dual", "dense", "primal"}
        "dual": (Q Tᵀ − Q Gᵀ (G Gᵀ + λI)⁻¹ G Tᵀ) / λ from Gram matrices, or from solutions for the rows of the smaller
        of Q and T, whichever is cheaper. The Cholesky factor of the Gram matrix is kept with the score matrix of `op`
        for the next call. "dense": Cholesky factorization of F. "primal": conjugate gradients for all rows of the
        smaller of Q and T. Default: "auto", the cheapest.
    rtol : float
        Relative residual of the solutions (F + λI) x = q. In float32 the Gram matrix is factorized in float32 if
        eps ‖G Gᵀ‖ / λ is at most `rtol`, and in float64 otherwise. If the residual of "dual" is larger, because of the
        rounding of Gram matrices, solutions are computed in full and refined. Default: 1e-4.
    maxiter : int, optional
        Maximal number of iterations of conjugate gradients. Default: ``10 * D``.
    M : {"jacobi", None} or LinearOperator
        Preconditioner of conjugate gradients, as for `solve`.
    progressbar : bool
        Whether the factorization or conjugate gradients show their progress on stderr. Default: False.
    spill : path, optional
        Folder for the Cholesky factor of the Gram matrix if it does not fit into the memory that ``max_memory`` leaves:
        4 bytes for each of R² entries, or 2 in float32, for R rows. Its files are removed with the score matrix.
    checkpoint : path, optional
        File for the state of conjugate gradients, as for `solve`; with ``-1``, ``-2``, ... appended for further blocks
        of rows, if memory allows only some at a time. With `spill`, also the state of the factorization, which resumes
        after an interrupt or the end of the process: the factor is then in a folder of this name within `spill`, which
        is not removed.
    like : array, optional
        Array whose library and device the result has. Default: that of `Q` if it is an array, or NumPy.

    Returns
    -------
    InverseForms
        The matrix (rows of Q, rows of T), or the diagonal (rows of Q,), with the residual and the method.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator, or `Q` or `T` is neither a score matrix nor a real array.
    ValueError
        If `Q` or `T` is of other parameters or not finite; if λ is negative, or zero and F is singular; if a matrix
        does not fit into ``max_memory``.

    Notes
    -----
    Rows are read in blocks that fit into the memory that ``max_memory`` leaves. The residual of "dual" is estimated
    from two random combinations of the rows, by products with F.

    References
    ----------
    P. Koh, P. Liang, Understanding black-box predictions via influence functions, ICML 2017, arXiv:1703.04730.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X[:40], y[:40]))
    >>> train = op.scores.on((X[:40], y[:40]), kind="empirical")
    >>> test = op.scores.on((X[40:], y[40:]), kind="empirical")
    >>> fo.linalg.inv_quad(op, test, train, damping=0.1).value.shape
    (10, 40)
    """
    A, damping = as_operator(op), as_damping(damping)
    if not 0 <= rtol < 1:
        raise ValueError(f"`rtol` must be at least 0 and below 1, got {rtol!r}.")
    if diagonal and T is not None:
        raise ValueError("`T` must be None for diagonal=True, which has the rows of Q on both sides. Leave it out.")
    if A.score_matrix is not None and A.score_matrix.is_divided:
        raise NotImplementedError("`op` must not have sharded parameters for `inv_quad`. Use `linalg.solve`.")
    rows = _as_rows(A, Q, "Q")
    others = rows if T is None or T is Q else _as_rows(A, T, "T")
    leave = _leave(like, Q)
    if not least_norm:
        refuse_singular(A, damping)
    swapped = not diagonal and others.num_rows < rows.num_rows
    first, second = (others, rows) if swapped else (rows, others)
    folder = as_folder(spill)
    task = Task(
        30.0 * max(1, first.num_rows),
        CHOLESKY,
        needs_damping=True,
        memory=partial(cholesky_memory, of_entry=A.dtype.itemsize, in_files=folder is not None),
        advice="Raise it, pass a folder as `spill`" if folder is None else "Raise it",
    )
    if least_norm:
        task = Task(float("inf"), EIGEN, refusals=(NO_LEAST_NORM, NO_LEAST_NORM))
    iteration = Iteration(None, progressbar, checkpoint)
    chosen = choose(
        A, task, method, damping, iteration=iteration, maxiter=maxiter, precondition=preconditioner_of(A, M)
    )
    if least_norm and least(chosen.total) > 0:
        least_norm = False
    if isinstance(chosen, Dual) and not least_norm:
        _place(chosen, folder, iteration, rtol)
    problem = _Problem(A, chosen, first, second, diagonal, rtol)
    try:
        value, residual, converged = problem.found(least_norm)
    except HaltedError:
        raise KeyboardInterrupt from None  # what is done is in the files of `checkpoint`
    value = value.T if swapped else value
    return InverseForms(leave(check_result(value.to(A.torch_dtype))), residual, converged, chosen.name)


class _Problem:
    """Q (F + λI)⁻¹ Tᵀ or its diagonal, by one method; Q is the one of fewer rows.

    Parameters
    ----------
    op : TorchLinearOperator
        F with what it is damped by, (D, D).
    method : Method
    Q, T : Scores
    diagonal : bool
    rtol : float
    """

    def __init__(self, op: TorchLinearOperator, method: Any, Q: Scores, T: Scores, diagonal: bool, rtol: float) -> None:
        self._op, self._method, self._Q, self._T = op, method, Q, T
        self._diagonal, self._rtol = diagonal, rtol
        G = op.score_matrix
        self._memory = as_bytes(None, op.device) if G is None else max(G.cache_size.memory_left, 0)

    def found(self, least_norm: bool) -> _Found:
        """Return the values by the cheapest way that meets the tolerance.

        Raises
        ------
        HaltedError
            At a KeyboardInterrupt in a factorization or in conjugate gradients.
        """
        method = self._method
        if isinstance(method, Dual) and not least_norm:
            while True:
                _prepare(method)
                found = self.by_solutions(direct=True) if self._vectors_are_cheaper() else self._by_gram()
                if found.converged:
                    return found
                if not method.widen():
                    break
        return self.by_solutions(least_norm)

    def _vectors_are_cheaper(self) -> bool:
        """Whether products with the rows of Q as vectors take fewer flops than the Gram matrices of Q and T with G."""
        G, D = self._op.score_matrix, self._op.shape[0]
        k, m, R = self._Q.num_rows, self._T.num_rows, G.num_rows
        size = G.cache_size
        numbers = size.nbytes / self._op.dtype.itemsize if size.holds_rows else 4.0 * D * R
        of_gram = (k if self._diagonal or self._T is self._Q else k + m) * numbers
        return bool((2 * R + (0 if self._diagonal else m)) * k * D < of_gram)

    def _by_gram(self) -> _Found:
        """Return the values, in float64, from Gram matrices by Woodbury's identity."""
        method: Dual = self._method
        left = max(self._memory - method.factorization()[0].nbytes, 0)
        step = max(1, left // (24 * max(1, method.rows)))
        if self._diagonal:
            value, total = method.diagonal_form(self._Q, step)
            digits = (total / value.abs()).nan_to_num(1.0).max() if len(value) else total.new_zeros(())
        else:
            value, total = method.form(self._Q, self._T, step)
            digits = total / value.norm() if total > 0 else total
        rounding = float(digits) * float(torch.finfo(self._op.torch_dtype).eps)
        residual = rounding
        if self._Q.num_rows:
            rows = self._Q._mul_t(self._signs(self._Q.num_rows))
            residual = max(self._residual(rows, method.direct(rows)), rounding)
        return _Found(value, residual, residual <= self._rtol)

    def _signs(self, count: int) -> Tensor:
        return random_signs(_PROBES, count, 0, self._op.torch_dtype, self._op.device)

    def _residual(self, rows: Tensor, X: Tensor) -> float:
        """Return ‖rows − X (F + λI)‖ / ‖rows‖ for solutions X (K, D)."""
        op = self._op
        residuals = rows - op.multiply(X).add_(times(self._method.damping, X))
        size = float(op.processes.norms(rows).norm())
        return float(op.processes.norms(residuals).norm()) / size if size else 0.0

    def by_solutions(self, least_norm: bool = False, direct: bool = False) -> _Found:
        """Return the values from solutions (F + λI) x = q, a block of rows at a time.

        Parameters
        ----------
        least_norm : bool
            Whether to use F⁺. Default: False.
        direct : bool
            Whether solutions are those of the factorization, of which the residuals of random combinations are found.
            Default: False, they are refined.
        """
        op, Q, T = self._op, self._Q, self._T
        D, count = op.shape[0], Q.num_rows
        step = min(max(1, self._memory // (_VECTORS * D * op.dtype.itemsize)), max(1, count))
        found = [torch.empty(0 if self._diagonal else (0, T.num_rows), dtype=op.torch_dtype, device=op.device)]
        residual, converged = 0.0, True
        for number, start in enumerate(range(0, count, step)):
            rows = Q.block(start, min(start + step, count))
            method = self._of_block(number)
            if direct:
                X, signs = method.direct(rows), self._signs(len(rows))
                residual = max(residual, self._residual(signs @ rows, signs @ X))
                converged = residual <= self._rtol
            else:
                norms = op.processes.norms(rows)
                X, norms_left, _, is_solved, *_ = (method.solve_least_norm if least_norm else method.solve)(
                    rows, self._rtol * norms
                )
                residual = max(residual, float((norms_left / norms).nan_to_num(0.0).max()))
                converged = converged and is_solved
            found.append((X * rows).sum(1) if self._diagonal else T._mul(X))
        value = torch.cat(found)
        return _Found((value + value.T).div_(2) if T is Q and not self._diagonal else value, residual, converged)

    def _of_block(self, number: int) -> Any:
        """Return the method for a block of rows, whose checkpoint is a file of its own."""
        method = self._method
        if not isinstance(method, Primal) or method.iteration.checkpoint is None or not number:
            return method
        path = Path(method.iteration.checkpoint)
        own = path.with_name(f"{path.name}-{number}")
        return replace(method, iteration=method.iteration._replace(checkpoint=own))


def _prepare(method: Dual) -> None:
    """Factorize, or take the factorization that was kept with the score matrix."""
    G = method.op.score_matrix
    total = method.total.cpu().numpy().tobytes() if isinstance(method.total, Tensor) else method.total
    key = (type(method), total, method.op.version)
    kept = _KEPT.get(G)
    if kept is not None and kept.key == key and kept.panels.dtype.itemsize in method.itemsizes:
        method.adopt(*kept[1:])
        return
    del kept
    _KEPT.pop(G, None)
    _KEPT[G] = _Factorization(key, *method.factorization())


def _place(method: Dual, folder: Path | None, iteration: Iteration, rtol: float) -> None:
    """Choose where the Cholesky factor goes, and in which precision, by the memory that is left."""
    G, itemsize = method.op.score_matrix, method.op.dtype.itemsize
    memory, n = G.cache_size.memory_left, method.rows
    is_resumed = folder is not None and iteration.checkpoint is not None
    fits = cholesky_memory("dual", n, G, itemsize) <= memory
    method.rtol = rtol
    if itemsize == 4:
        method.itemsizes = (4, 8) if fits or folder is not None else (4,)
    if folder is not None and (is_resumed or not fits):
        check_disk(folder, bytes_of(n, 8))
        name = f"{Path(iteration.checkpoint).name}.panels" if is_resumed else None
        method.storage = Storage(folder, name, memory)
    method.iteration = iteration if is_resumed else iteration._replace(checkpoint=None)


def _as_rows(A: TorchLinearOperator, given: Any, name: str) -> Scores:
    """Return a score matrix or an array (k, D) as rows for the operator."""
    G = A.score_matrix
    if isinstance(given, Scores):
        if given is not G:
            if G is None and given.parameters.numel != A.shape[0]:
                raise ValueError(f"`{name}` must have {A.shape[0]} columns, got {given.parameters.numel}.")
            if G is not None:
                try:
                    G.check_same_parameters(given)
                except ValueError as error:
                    raise ValueError(f"`{name}` must belong to the operator's problem: {error}") from None
            given.require_order()
        return given
    if not (_arrays.is_array(given) or isinstance(given, list | tuple)):
        raise TypeError(f"`{name}` must be a score matrix or an array (k, D), got {type(given).__name__}.")
    rows = _arrays.to_tensor(given if _arrays.is_array(given) else np.asarray(given), name)
    if rows.ndim != 2 or rows.shape[1] != A.shape[0]:
        raise ValueError(
            f"`{name}` must have shape (k, {A.shape[0]}), one column for each parameter, got {tuple(rows.shape)}."
        )
    if rows.is_complex():
        raise TypeError(f"`{name}` must be real, got {rows.dtype}.")
    if not bool(rows.isfinite().all()):
        raise ValueError(f"`{name}` must be finite, got NaN or infinity. Check the gradients that it is made of.")
    return GivenRows(rows.to(A.device, A.torch_dtype).contiguous(), A.processes, None if G is None else G.parameters)


def _leave(like: Any, Q: Any) -> Any:
    """Return how results become arrays of the library of `like`, or of Q if that is an array."""
    template = like if like is not None else Q if _arrays.is_array(Q) and not isinstance(Q, Scores) else None
    return _arrays.leave_like(template) if template is not None else _arrays.to_numpy
