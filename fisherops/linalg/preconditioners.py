"""Preconditioners of conjugate gradients by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fisherops import approximate
from fisherops._linop import TorchLinearOperator
from fisherops.linalg.methods import EIGEN
from fisherops.linalg.primal import jacobi

# Iterations with a preconditioner that leaves a condition number of about 30, and log(2 / tolerance).
_FEW, _DIGITS = 12.0, 12.0

Preconditioner = Callable[[Tensor], Tensor]


def _structured(build: Callable[[Any], Any], op: TorchLinearOperator, total: Any) -> Preconditioner:
    """Return products with the inverse of an approximation."""
    inverse = build(op).inv(_number(total))
    return lambda R: inverse.multiply(R).to(R)


def nystrom(op: TorchLinearOperator, total: Any) -> Preconditioner:
    """Return products with the inverse of a low-rank approximation, whose smallest eigenvalue stands for the rest.

    References
    ----------
    Z. Frangella, J. Tropp, M. Udell, Randomized Nyström preconditioning, SIAM J. Matrix Anal. Appl. 44 (2023) 718–752,
    doi:10.1137/21M1466244, equation (1.3).
    """
    damping = _number(total)
    K: Any = approximate.nystrom(op, damping=damping)
    if len(K.values) < K.shape[0]:
        rest = float(K.values.min()) if len(K.values) else 0.0
        K = approximate.LowRank(K.vectors, K.values - rest, K.added + rest)
    inverse = K.inv(damping)
    return lambda R: inverse.multiply(R).to(R)


def cheapest(op: TorchLinearOperator, total: Any) -> Preconditioner:
    """Return the preconditioner of least predicted cost, in products with F."""
    G = op.score_matrix
    if G is None or G.is_divided or isinstance(total, Tensor) or total == 0:
        return jacobi(op, total)
    trace, (R, D) = G.square_norm(), G.shape
    ratio = trace / total
    rank = min(3.0 * min(R, ratio) + 1, R)
    # A factor of side n takes its eigenvectors; layers are thought of as square.
    sides = [math.sqrt(shape.numel()) for shape in G.parameters.shapes.values()]
    iterations = min(R, 0.5 * math.sqrt(1 + ratio) * _DIGITS)
    half_way = math.sqrt(iterations * _FEW)  # between no preconditioner and a good one, because nothing better is known
    costs = {
        "jacobi": iterations,
        "nystrom": rank + _FEW,
        "ekfac": 2 * EIGEN * sum(n**3 for n in sides) / (4.0 * R * D) + half_way,
    }
    return PRECONDITIONERS[min(costs, key=costs.__getitem__)](op, total)


def _number(total: Any) -> float:
    if isinstance(total, Tensor):
        raise ValueError(
            "`M` must be 'jacobi', None or a LinearOperator for an operator with a damping of its own for each "
            "parameter. Leave it out."
        )
    return float(total)


PRECONDITIONERS: dict[str, Callable[[TorchLinearOperator, Any], Preconditioner]] = {
    "jacobi": jacobi,
    "kfac": partial(_structured, approximate.kfac),
    "ekfac": partial(_structured, approximate.ekfac),
    "nystrom": nystrom,
    "auto": cheapest,
}
"""Functions of F and the total damping that return products with an approximation of the inverse."""
