"""Choosing between the Gram matrix, the dense matrix and products, by predicted cost and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherops._linop import TorchLinearOperator, _Damped, _Scaled, _Sum, as_torch_operator
from fisherops._memory import as_bytes
from fisherops.linalg.dense import SINGULAR, Dense
from fisherops.linalg.dual import Dual, ScaledDense, ScaledDual
from fisherops.linalg.lanczos import Matrix
from fisherops.linalg.panels import bytes_at_work, bytes_of
from fisherops.linalg.primal import Primal
from fisherops.linalg.results import Mean, Pairs, Solved
from fisherops.scores.protocol import Scores

METHODS = ("auto", "dual", "dense", "primal")

# What LAPACK does with a symmetric matrix of size n, in n³ and in the time of a flop of a matrix product: all
# eigenvectors, some of them, eigenvalues alone, and Cholesky. Measured for n = 1024.
EIGEN, SOME_EIGEN, EIGENVALUES, CHOLESKY = 20.0, 2.0, 8.0, 0.5

# Likewise a product with F, for each number of G, and besides: rows are read from memory, and Python takes its time.
_PRODUCT, _OVERHEAD = 8.0, 2e8

# How many times its cost an exact result is worth, if the other is an estimate.
EXACT = 100.0

# Numbers of 8 bytes, in n², that LAPACK and we need besides a matrix in the compute precision: for eigenvalues, and for
# the Cholesky factor of F in place, after a copy that makes it symmetric.
_EIGEN_WORK, _CHOLESKY_WORK = 4, 2


def eigen_memory(name: str, n: int, G: Scores | None, itemsize: int) -> int:  # noqa: ARG001
    """Return the bytes that eigenvalues of a matrix of size n take, with the matrix, for a method."""
    return n * n * (itemsize + 8 * _EIGEN_WORK)


def cholesky_memory(
    name: str, n: int, G: Scores | None, itemsize: int, of_entry: int = 8, in_files: bool = False
) -> int:
    """Return the bytes that a Cholesky factor takes, with the matrix; of the Gram matrix by panels, maybe in files."""
    if name == "dense" or G is None:
        return n * n * (itemsize + 8 * _CHOLESKY_WORK)
    at_work = bytes_at_work(n, itemsize, in_files) if G.gram_is_by_panels else n * n * itemsize
    return at_work + (0 if in_files else bytes_of(n, of_entry))


class Method(Protocol):
    """F + shift · I with a damping λ, total = shift + λ; F is `op`. Vectors are rows (K, D)."""

    name: ClassVar[str]
    is_exact: ClassVar[bool]
    op: TorchLinearOperator
    shift: Any
    total: Any

    def prepare(self) -> None:
        """Compute the factorization, if there is one."""

    def solve(self, B: Tensor, targets: Tensor) -> Solved:
        """Solve (F + total · I) x = b for rows (K, D), to norms of residuals (K,)."""

    def eigenpairs(self, k: int, largest: bool, with_vectors: bool) -> Pairs:
        """Return k eigenpairs of F at one end of the spectrum."""

    def zero(self, largest: float) -> float:
        """Return the size below which eigenvalues are zero to rounding, for the largest of them."""

    def largest_eigenvalue(self) -> float:
        """Return the largest eigenvalue of F."""

    def spectral_sum(self, function: Callable[[Matrix], Matrix]) -> Mean:
        """Return tr f(F + shift · I)."""

    def square_norm(self) -> Mean:
        """Return ‖F + shift · I‖²."""

    def effective_dimension(self) -> Mean:
        """Return tr A (A + λI)⁻¹ for A = F + shift · I."""

    def log_determinant(self) -> Mean:
        """Return log det (F + total · I)."""


class Task(NamedTuple):
    """What a method is chosen for."""

    products: float
    """Products with F that the primal method is expected to take, its own work included."""
    flops: float
    """Work with a dense matrix of size n, in n³."""
    is_spectrum: bool = False
    """Whether the eigenvalues of the operator itself are wanted, which dampings of single parameters change."""
    needs_damping: bool = False
    """Whether the dual method needs a positive damping."""
    memory: Callable[[str, int, Scores | None, int], int] = eigen_memory
    """Takes the name of a method, the size of its matrix, G and the bytes of an entry, and returns those it needs."""
    advice: str = "Raise it"
    """What gives the dual method enough of them."""
    refusals: tuple[str, str] | None = None
    """Errors if there is no primal method: if it is asked for, and if no matrix fits into memory."""


def as_operator(op: Any) -> TorchLinearOperator:
    """Return a real, square operator as one that computes in torch."""
    if not isinstance(op, LinearOperator):
        raise TypeError(f"`op` must be a Fisher operator or a SciPy LinearOperator, got {type(op).__name__}.")
    if op.dtype is not None and np.dtype(op.dtype).kind == "c":
        raise TypeError(f"`op` must be real and symmetric, got an operator of dtype {op.dtype}.")
    if op.shape[0] != op.shape[1]:
        raise ValueError(
            f"`op` must be square, got shape {op.shape}. For a score matrix use `op.scores.gram()` or SciPy's `svds`."
        )
    return as_torch_operator(op)


def summands(op: Any, factor: float = 1.0) -> Iterator[tuple[TorchLinearOperator | None, Any]]:
    """List the operators that a composite is the sum of, with factors; None is the identity, by a number or (D,)."""
    if isinstance(op, _Sum):
        yield from summands(op._A, factor)
        yield from summands(op._B, factor)
    elif isinstance(op, _Scaled) and not isinstance(op._alpha, complex):
        yield from summands(op._A, factor * op._alpha)
    elif isinstance(op, _Damped):
        yield from summands(op._A, factor)
        yield None, factor * op.damping
    elif isinstance(op, TorchLinearOperator) and is_shifted(op):
        yield op.undamped, factor
        yield None, factor * op.shift
    else:
        yield op, factor


def is_shifted(op: TorchLinearOperator) -> bool:
    """Return whether an operator is F with a multiple of the identity, or a diagonal."""
    return isinstance(op.shift, Tensor) or op.shift != 0


def choose(op: TorchLinearOperator, task: Task, method: str = "auto", damping: float = 0.0, **options: Any) -> Any:
    """Return the method of least predicted cost whose matrices fit into memory, or the one that is asked for.

    Parameters
    ----------
    op : TorchLinearOperator
        Symmetric and positive semi-definite, (D, D).
    task : Task
    method : str
        One of `METHODS`.
    damping : float
        λ ≥ 0, which is added to `op`.
    **options
        Those of `Primal`.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    name = method
    if method == "primal":
        if task.refusals is not None:
            raise ValueError(task.refusals[0])
    else:
        name = _cheapest(op, task, method, damping)
    by_parameter = isinstance(op.shift, Tensor)
    if by_parameter and name != "primal" and not task.is_spectrum and float(op.shift.min()) + damping > 0:
        return (ScaledDual if name == "dual" else ScaledDense)(op.undamped, op.shift, damping)
    # The eigenvalues of F + diag(d) are not those of F, so the other methods take it as it is.
    F, shift = (op, 0.0) if by_parameter or op.shift == 0 else (op.undamped, op.shift)
    if name == "dual":
        return Dual(F, shift, damping)
    if name == "dense":
        return Dense(F, shift, damping)
    if task.refusals is not None:
        raise ValueError(task.refusals[1])
    return Primal(F, shift, damping, **options)


def _cheapest(op: TorchLinearOperator, task: Task, method: str, damping: float) -> str:
    """Return the name of the cheapest method that fits into memory; or `method`, unless "auto", if that fits."""
    D, itemsize, G = op.shape[0], op.dtype.itemsize, op.score_matrix
    sizes, rows = {"dense": D}, D
    if G is None:
        if method == "dual":
            raise ValueError(
                "`op` must be a Fisher operator for method='dual', got an operator without a score matrix. "
                "Pass the operator itself, with its damping as an argument, or use method='primal'."
            )
        memory = op.processes.least(as_bytes(None, op.device))
    else:
        if G.is_divided:
            del sizes["dense"]
            if method == "dense":
                raise NotImplementedError(
                    "`method` must not be 'dense' for sharded parameters, because every rank would hold all of F. Use "
                    "method='auto'."
                )
        rows = G.shape[0]
        reason = _closed(op, task, damping)
        if method == "dual":
            G.require_order()
            if reason is not None:
                raise ValueError(reason)
        if reason is None and (method == "dual" or G.rows_have_order):
            sizes["dual"] = rows
        size = G.cache_size
        memory = size.memory_left
    needed = {name: task.memory(name, n, G, itemsize) for name, n in sizes.items()}
    costs = {}
    for name, n in sizes.items():
        if needed[name] <= memory:
            costs[name] = task.flops * n**3
    if method in costs:
        return method
    if method != "auto":
        n, advice = sizes[method], task.advice if method == "dual" else "Raise it"
        raise ValueError(
            f"`max_memory` must leave {needed[method]} bytes for method={method!r}, which needs a matrix of "
            f"size {n} and its factors, got {max(memory, 0)}. {advice}, or use method='auto' or 'primal'."
        )
    if "dense" in costs:
        costs["dense"] += 2.0 * rows * D**2
    if "dual" in costs:
        # From what is cached, each number of a row meets those of all other rows; otherwise by products with G and Gᵀ.
        cached = size.nbytes / itemsize if size.holds_rows else 4.0 * D * rows
        costs["dual"] += 2.0 * rows * cached
    costs["primal"] = task.products * (_PRODUCT * rows * D + _OVERHEAD)
    return min(costs, key=costs.__getitem__)


def _closed(op: TorchLinearOperator, task: Task, damping: float) -> str | None:
    """Return why there is no dual method, or None if there is one."""
    by_parameter = isinstance(op.shift, Tensor)
    least = (float(op.shift.min()) if by_parameter else op.shift) + damping
    G = op.score_matrix
    if by_parameter and (task.is_spectrum or least == 0 or G.is_divided):
        return (
            "`method` must be 'auto', 'dense' or 'primal' for an operator with a damping of its own for each "
            "parameter, whose eigenvalues the Gram matrix does not have, got 'dual'."
        )
    if task.needs_damping and least == 0:
        return SINGULAR.format("or Woodbury's identity has no meaning for it")
    return None


def choose_root(rows: int, dim: int, alone: bool, method: str) -> str:
    """Return "dual" for the rows of the square root of F themselves, or "dense" for their triangular factor."""
    if method == "primal":
        raise ValueError("a singular F is told from a regular one by its eigenvalues: use method='dual' or 'dense'.")
    if method not in METHODS:
        raise ValueError(f"`method` must be 'auto', 'dual' or 'dense', got {method!r}.")
    if method == "auto":
        return "dual" if alone and rows < dim else "dense"
    return method
