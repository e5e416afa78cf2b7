"""The rows of G through J and the output factor, computed anew for each batch and each product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from fisherops.scores.jacobian import BatchJacobian
from fisherops.scores.rows import list_rows


class Factor(Protocol):
    """What G needs to know of the output factor S: C × R for each of T terms."""

    rank: int

    def apply(self, W: Tensor) -> Tensor:
        """Multiply S: (K, T, R) → (K, T, C)."""
        ...

    def adjoint(self, U: Tensor) -> Tensor:
        """Multiply Sᵀ: (K, T, C) → (K, T, R)."""
        ...

    def columns(self) -> Tensor:
        """List the vectors, (T, R, C)."""
        ...


class RecomputedScores:
    """G = Sᵀ J of one batch, where neither J nor G is kept.

    Its rows are ordered by group of terms and then by vector: (T / group · R) × D.

    Parameters
    ----------
    jacobian : BatchJacobian
    factor : Factor
    size : int
        Number of data in the batch.
    group : int
        Successive terms whose scores are summed into one row: 1, or the number of terms of a datum.
    """

    def __init__(self, jacobian: BatchJacobian, factor: Factor, size: int, group: int = 1) -> None:
        self._jacobian = jacobian
        self._factor = factor
        self._size = size
        self._group = group

    def apply(self, V: Tensor) -> Tensor:
        """Multiply G: (D, K) → (T / group · R, K)."""
        scores = self._factor.adjoint(self._jacobian.jvp(V))
        K, T, R = scores.shape
        return scores.view(K, T // self._group, self._group, R).sum(2).flatten(1).T

    def apply_transposed(self, W: Tensor) -> Tensor:
        """Multiply Gᵀ: (T / group · R, K) → (D, K)."""
        scores = W.T.reshape(W.shape[1], -1, self._factor.rank).repeat_interleave(self._group, dim=1)
        return self._jacobian.vjp(self._factor.apply(scores))

    def rows(self) -> Iterator[Tensor]:
        """List G in blocks of rows (r, D)."""
        return list_rows(self._jacobian, self._factor.columns(), self._size, self._group)
