"""Choosing between the Gram matrix, the dense matrix and products, by predicted cost and memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherops._linop import TorchLinearOperator, _Damped, _Scaled, _Sum, as_torch_operator, opaque
from fisherops._memory import as_bytes
from fisherops.fisher import FisherOperator

METHODS = ("auto", "dual", "dense", "primal")

# What LAPACK does with a symmetric matrix of size n, in n³ and in the time of a flop of a matrix product: all
# eigenvectors, some of them, eigenvalues alone, and Cholesky. Measured for n = 1024.
EIGEN, SOME_EIGEN, EIGENVALUES, CHOLESKY = 20.0, 2.0, 8.0, 0.5

# Likewise a product with F, for each number of G, and beside: rows are read from memory, and Python takes its time.
_PRODUCT, _OVERHEAD = 8.0, 2e8

# How many times its cost an exact result is worth, where the other is an estimate.
EXACT = 100.0

# Numbers of 8 bytes, in n², that LAPACK and we need beside the matrix in the compute precision.
_DENSE_WORK = 4


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


def undamped(op: TorchLinearOperator, damping: float = 0.0) -> tuple[TorchLinearOperator, float]:
    """Return GᵀG alone of a Fisher operator with a multiple of the identity, and that multiple with `damping` added."""
    if isinstance(op, FisherOperator) and op.shift:
        return op.undamped, op.shift + damping
    return op, damping


def summands(op: Any, factor: float = 1.0) -> Iterator[tuple[TorchLinearOperator | None, float]]:
    """List the operators that a composite is the sum of, with their factors; None is the identity."""
    if isinstance(op, _Sum):
        yield from summands(op._A, factor)
        yield from summands(op._B, factor)
    elif isinstance(op, _Scaled) and not isinstance(op._alpha, complex):
        yield from summands(op._A, factor * op._alpha)
    elif isinstance(op, _Damped):
        yield from summands(op._A, factor)
        yield None, factor * op.damping  # type: ignore[misc]
    elif isinstance(op, FisherOperator) and op.shift:
        yield op.undamped, factor
        yield None, factor * op.shift
    else:
        yield op, factor


def choose(op: TorchLinearOperator, method: str, products: float, dense_flops: float, dual: bool = True) -> str:
    """Return "dual", "dense" or "primal".

    Parameters
    ----------
    op : TorchLinearOperator
    method : str
        One of `METHODS`.
    products : float
        Products with F that the primal way is expected to take, its own work counted too.
    dense_flops : float
        Of the algebra with a dense matrix of size n, in n³.
    dual : bool
        Whether the dual is open; it is not where zero eigenvalues of F matter.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    if method == "primal":
        return "primal"
    fisher = op if isinstance(op, FisherOperator) else None
    if method == "dual" and fisher is None:
        raise ValueError(
            "`op` must be a Fisher operator for method='dual', got an operator without a score matrix. "
            "Pass the operator itself, with its damping as an argument, or use method='primal'."
        )
    D, itemsize = op.shape[0], op.dtype.itemsize
    sizes: dict[str, int] = {"dense": D}
    rows = D
    if fisher is not None:
        if fisher.score_matrix.is_divided:
            del sizes["dense"]
            if method == "dense":
                raise NotImplementedError(
                    "`method` must not be 'dense' for sharded parameters, because every rank would hold all of F. Use "
                    "method='auto'."
                )
        rows = fisher.num_rows
        if method == "dual":
            _ = fisher.scores  # or the error that says why there are none
        if dual and fisher.rows_have_order:
            sizes["dual"] = rows
        kept = fisher.kept
        memory = kept.memory_left
    else:
        memory = op.processes.least(as_bytes(None, op.device))
    fitting = {way: n for way, n in sizes.items() if n * n * (itemsize + 8 * _DENSE_WORK) <= memory}
    if method != "auto":
        if method not in fitting:
            needed = sizes[method] ** 2 * (itemsize + 8 * _DENSE_WORK)
            raise ValueError(
                f"`max_memory` must leave {needed} bytes for method={method!r}, which needs a matrix of size "
                f"{sizes[method]} and its factors, got {max(memory, 0)}. Raise it, or use method='auto' or 'primal'."
            )
        return method
    product = _PRODUCT * rows * D + _OVERHEAD
    costs = {"primal": products * product}
    for way, n in fitting.items():
        costs[way] = dense_flops * n**3
    if "dual" in costs and fisher is not None:
        # From what is held, each number of a row meets those of all other rows; otherwise by products with G and Gᵀ.
        held = kept.nbytes / itemsize if kept.holds_rows else 4.0 * D * sizes["dual"]
        costs["dual"] += 2.0 * sizes["dual"] * held
    if "dense" in costs:
        costs["dense"] += 2.0 * rows * D**2
    return min(costs, key=costs.__getitem__)


def dense_matrix(op: TorchLinearOperator, way: str) -> Tensor:
    """Return the Gram matrix or F itself in float64, where LAPACK loses nothing of what the precision gave."""
    if way == "dual":
        assert isinstance(op, FisherOperator)
        return op.scores.gram_tensor().double()
    F = torch.as_tensor(op.todense(), device=op.device).double()
    return (F + F.T).div_(2)


def zero_threshold(op: TorchLinearOperator, largest: float) -> float:
    """Return the size below which eigenvalues are zero to rounding: λ_max · eps · max(n, √m).

    n and m are the smaller and the larger side of G, both D for an operator without. λ_max · eps · n is NumPy's
    convention for the rank of a matrix of size n; its entries are sums of m terms, whose rounding is about √m · eps.
    """
    D = op.shape[0]
    return rank_threshold(largest, D, op.num_rows if isinstance(op, FisherOperator) else D, np.dtype(op.dtype))


def rank_threshold(largest: float, dim: int, rows: int, dtype: Any) -> float:
    """Return the size below which eigenvalues of F = GᵀG, (dim, dim) with G (rows, dim), are zero to rounding."""
    return abs(largest) * max(min(dim, rows), math.sqrt(max(dim, rows))) * float(np.finfo(dtype).eps)


Function = TypeVar("Function", bound=Callable[..., Any])


@contextmanager
def quiet() -> Iterator[None]:
    """Compute in one's own precision and without graphs, whatever the caller's contexts."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def outside_of_autocast(function: Function) -> Function:
    """Let a routine compute in its own precision and without graphs, whatever the caller's contexts."""

    @opaque
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with quiet():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
