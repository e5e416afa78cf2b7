"""The columns of G that belong to one parameter, in the form that is cheapest for its kind of use.

Rows are ordered by datum n and then by vector q of the datum: G of a part is (N · q) × d. Vectors come and go
transposed, so that each is contiguous: V (K, d), W (K, N, q).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor

from fisherops._matmul import times_transposed
from fisherops._sums import CompensatedSum, SegmentSum

# Numbers of a matrix that is large enough for the kernels, and stays in the processor's cache.
_FILLING = 2**21

# Products that one kernel sums in the compute precision: more of them would lose digits.
_TERMS = 2**12


class Part(ABC):
    """Columns of G for one parameter."""

    @abstractmethod
    def apply(self, V: Tensor) -> Tensor:
        """Multiply: (K, d) → (K, N, q)."""

    @abstractmethod
    def apply_transposed(self, W: Tensor, out: Tensor) -> None:
        """Multiply the transpose: (K, N, q) → `out` (K, d)."""

    @abstractmethod
    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows of some data, (n, q, d)."""

    @abstractmethod
    def gram(self, other: Self) -> Tensor:
        """Multiply with the transpose of the same parameter's part for other data: (N · q, N' · q')."""

    def diagonal(self) -> Tensor:
        """Return the squared norms of the columns, (d,)."""
        first = self.dense(0, 1).square().sum((0, 1))
        total = CompensatedSum(first)
        total.add(first)
        step = max(1, _FILLING // first.numel())
        for n in range(1, self.count, step):
            total.add(self.dense(n, n + step).square().sum((0, 1)))
        return total.value()

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of data."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory that the part holds."""

    @property
    def numbers_per_column(self) -> int:
        """Temporary numbers of a product for each column."""
        return 0

    @property
    def dense_is_cheaper(self) -> bool:
        """Whether its rows should be kept instead."""
        return False


def rows_are_cheaper(T: int, q: int) -> bool:
    """Whether q dense rows for each datum are multiplied faster than the factors of T positions.

    A matrix product does several multiplications in the time that one number takes from memory.
    """
    return 8 * q < T


class RowsPart(Part):
    """The rows themselves, (N, q, d)."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows.detach().contiguous()

    def apply(self, V: Tensor) -> Tensor:
        N, q, d = self._rows.shape
        return times_transposed(V, self._rows.view(N * q, d)).view(-1, N, q)

    def apply_transposed(self, W: Tensor, out: Tensor) -> None:
        N, q, d = self._rows.shape
        out.copy_(times_transposed(W.reshape(-1, N * q), self._rows.view(N * q, d).T))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._rows[start:stop]

    def gram(self, other: RowsPart) -> Tensor:
        return times_transposed(self._rows.flatten(0, 1), other._rows.flatten(0, 1))

    @property
    def count(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes


class LinearPart(Part):
    """G_row = Σ_t b_t a_tᵀ, the gradient of a weight (o, i) that is used at positions t.

    Parameters
    ----------
    A : torch.Tensor
        Inputs, (N, T, i).
    B : torch.Tensor
        Backpropagated vectors, (q, o, N, T): in this order both products take and give contiguous matrices.
    rows_are_outputs : bool
        Whether the parameter is W (o, i), and not its transpose.
    """

    def __init__(self, A: Tensor, B: Tensor, rows_are_outputs: bool) -> None:
        self._A, self._B = A.detach().contiguous(), B.detach().contiguous()
        self._rows_are_outputs = rows_are_outputs

    def apply(self, V: Tensor) -> Tensor:
        q, o, N, T = self._B.shape
        A = self._A.view(N * T, -1)
        W = V.new_empty(len(V), N, q)
        for start in range(0, len(V), self._step):
            v = V[start : start + self._step]
            K = len(v)
            v = v.reshape(K * o, -1) if self._rows_are_outputs else v.reshape(K, -1, o).mT.reshape(K * o, -1)
            H = times_transposed(v, A).view(K, o, N, T)
            for r, b in enumerate(self._B):
                product = H.mul_(b) if r == q - 1 else H * b
                W[start : start + K, :, r] = product.sum((1, 3))
        return W

    def apply_transposed(self, W: Tensor, out: Tensor) -> None:
        q, o, N, T = self._B.shape
        A = self._A.view(N * T, -1)
        for start in range(0, len(W), self._step):
            w = W[start : start + self._step, None, :, :, None]
            K = len(w)
            H = w[:, :, :, 0] * self._B[0]
            for r in range(1, q):
                H.addcmul_(w[:, :, :, r], self._B[r])
            product = times_transposed(H.reshape(K * o, N * T), A.T)
            target = out[start : start + K]
            if self._rows_are_outputs:
                target.copy_(product.view(K, -1))
            else:
                target.view(K, -1, o).copy_(product.view(K, o, -1).mT)

    @property
    def _step(self) -> int:
        """Columns that fill a matrix product; more of them only need more memory."""
        _, o, N, T = self._B.shape
        return max(1, _FILLING // (o * N * T))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        letters = "qont,nti->nqoi" if self._rows_are_outputs else "qont,nti->nqio"
        A, B = self._A[start:stop], self._B[:, :, start:stop]
        pieces = zip(B.split(_TERMS, 3), A.split(_TERMS, 1), strict=True)
        return _total(torch.einsum(letters, b, a) for b, a in pieces).flatten(2)

    def gram(self, other: LinearPart) -> Tensor:
        def inputs(mine: slice, theirs: slice) -> Tensor:
            return times_transposed(self._A[mine].flatten(0, 1), other._A[theirs].flatten(0, 1))

        return _gram(inputs, self._B.permute(2, 3, 0, 1), other._B.permute(2, 3, 0, 1))

    def diagonal(self) -> Tensor:
        if self._A.shape[1] > 1:
            return super().diagonal()
        squares = self._B.square().sum(0).flatten(1), self._A.square().flatten(1)
        total = times_transposed(squares[0], squares[1].T)
        return (total if self._rows_are_outputs else total.T).flatten()

    @property
    def count(self) -> int:
        return len(self._A)

    @property
    def nbytes(self) -> int:
        return self._A.nbytes + self._B.nbytes

    @property
    def dense_is_cheaper(self) -> bool:
        q, _, _, T = self._B.shape
        return rows_are_cheaper(T, q)

    def joined(self, other: LinearPart) -> LinearPart:
        """Return the sum of two uses of the same parameter: their positions one after the other."""
        A = torch.cat([self._A, other._A], 1)
        return LinearPart(A, torch.cat([self._B, other._B], 3), self._rows_are_outputs)

    def joins(self, other: Part) -> bool:
        """Whether `joined` takes the other part."""
        return isinstance(other, LinearPart) and other._rows_are_outputs == self._rows_are_outputs


class EmbeddingPart(Part):
    """Gradients of the rows of a table that are looked up: never a dense table for each datum.

    Parameters
    ----------
    index : torch.Tensor
        (N, T).
    B : torch.Tensor
        Backpropagated vectors, (N, q, T, d).
    count : int
        Rows of the table.
    """

    def __init__(self, index: Tensor, B: Tensor, count: int) -> None:
        self._index, self._B, self._count = index, B.contiguous(), count
        self._sum = SegmentSum(index.reshape(-1), count)

    def apply(self, V: Tensor) -> Tensor:
        d = self._B.shape[3]
        table = V.reshape(len(V), self._count, d)
        step = max(1, _TERMS // d)
        pieces = zip(self._index.split(step, 1), self._B.split(step, 2), strict=True)
        return _total(torch.einsum("kntd,nqtd->knq", table[:, index], b) for index, b in pieces)

    def apply_transposed(self, W: Tensor, out: Tensor) -> None:
        K, d = len(W), self._B.shape[3]
        weighted = torch.einsum("knq,nqtd->kntd", W, self._B)
        self._sum(weighted.reshape(K, -1, d), out.view(K, self._count, d))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        B, index = self._B[start:stop], self._index[start:stop]
        N, q, _, d = B.shape
        rows = B.new_empty(q, N * self._count, d)
        own = index + self._count * torch.arange(N, device=index.device)[:, None]
        SegmentSum(own.reshape(-1), N * self._count)(B.transpose(0, 1).reshape(q, -1, d), rows)
        return rows.view(q, N, -1).transpose(0, 1)

    def gram(self, other: EmbeddingPart) -> Tensor:
        def inputs(mine: slice, theirs: slice) -> Tensor:
            same = self._index[mine].reshape(-1, 1) == other._index[theirs].reshape(1, -1)
            return same.to(self._B.dtype)

        return _gram(inputs, self._B.transpose(1, 2), other._B.transpose(1, 2))

    @property
    def count(self) -> int:
        return len(self._B)

    @property
    def nbytes(self) -> int:
        return self._B.nbytes + self._index.nbytes + self._sum.nbytes

    @property
    def numbers_per_column(self) -> int:
        N, _, T, d = self._B.shape
        return (N * T + self._sum.rows + self._count) * d


def _total(terms: Iterator[Tensor]) -> Tensor:
    first = next(terms)
    total = CompensatedSum(first)
    total.add(first)
    for term in terms:
        total.add(term)
    return total.value()


def _gram(inputs: Callable[[slice, slice], Tensor], B: Tensor, B_other: Tensor) -> Tensor:
    """Return Σ_{t,t'} ⟨a_t, a_t'⟩ ⟨b_qt, b_q't'⟩ for all pairs of data, (N · q, N' · q'), a block of them at a time.

    Parameters
    ----------
    inputs : callable
        Takes two slices of data and returns ⟨a_t, a_t'⟩ for them, (n · T, n' · T').
    B, B_other : torch.Tensor
        (N, T, q, o) and (N', T', q', o).
    """
    (N, T, q, o), (M, S, p, _) = B.shape, B_other.shape
    result = B.new_empty(N, q, M, p)
    step = max(1, int((_FILLING / (T * q * S * p)) ** 0.5))
    for n in range(0, N, step):
        for m in range(0, M, step):
            mine, theirs = slice(n, min(n + step, N)), slice(m, min(m + step, M))
            left, right = (x.reshape(-1, o).contiguous() for x in (B[mine], B_other[theirs]))
            products = times_transposed(left, right).view(-1, T, q, theirs.stop - m, S, p)
            products *= inputs(mine, theirs).view(-1, T, 1, theirs.stop - m, S, 1)
            result[mine, :, theirs] = products.sum((1, 4)) if T * S > 1 else products[:, 0, :, :, 0]
    return result.view(N * q, M * p)
