"""The columns of G that belong to one parameter, in the form that is cheapest for its kind of use.

Rows are ordered by datum n and then by vector q of the datum: G of a part is (N · q) × d. Vectors come and go
transposed, so that each is contiguous: V (K, d), W (K, N, q).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


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
        return (V @ self._rows.view(N * q, d).T).view(-1, N, q)

    def apply_transposed(self, W: Tensor, out: Tensor) -> None:
        N, q, d = self._rows.shape
        out.copy_(W.reshape(-1, N * q) @ self._rows.view(N * q, d))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._rows[start:stop]

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
        Backpropagated vectors, (N, q, T, o).
    rows_are_outputs : bool
        Whether the parameter is W (o, i), and not its transpose.
    """

    def __init__(self, A: Tensor, B: Tensor, rows_are_outputs: bool) -> None:
        self._A, self._B = A.detach().contiguous(), B.detach().contiguous()
        self._rows_are_outputs = rows_are_outputs

    def apply(self, V: Tensor) -> Tensor:
        (N, q, T, o), i = self._B.shape, self._A.shape[2]
        W = V.new_empty(len(V), N, q)
        A = self._A.view(N * T, i)
        for start in range(0, len(V), self._step):
            v = V[start : start + self._step]
            K = len(v)
            v = v.reshape(K * o, i) if self._rows_are_outputs else v.reshape(K, i, o).mT.reshape(K * o, i)
            H = (A @ v.T).view(N, T, K, o)
            if T == 1 and q == 1 and K == 1:
                W[start] = H.view(N, o).mul_(self._B.view(N, o)).sum(1, keepdim=True)
            else:
                W[start : start + K] = torch.einsum("ntko,nqto->knq", H, self._B)
        return W

    def apply_transposed(self, W: Tensor, out: Tensor) -> None:
        (N, q, T, o), i = self._B.shape, self._A.shape[2]
        A = self._A.view(N * T, i)
        for start in range(0, len(W), self._step):
            w = W[start : start + self._step]
            K = len(w)
            H = w.reshape(K, N, 1, 1) * self._B[:, 0] if q == 1 else torch.einsum("knq,nqto->knto", w, self._B)
            H = H.reshape(K, N * T, o)
            if self._rows_are_outputs:
                target = out[start : start + K].view(K, o, i)
                if K == 1:
                    torch.mm(H[0].T, A, out=target[0])
                else:
                    target.copy_((H.mT.reshape(K * o, N * T) @ A).view(K, o, i))
            else:
                out[start : start + K].view(K, i, o).copy_(torch.matmul(A.T, H))

    @property
    def _step(self) -> int:
        """Columns that fill a matrix product; more of them only need more memory."""
        N, _, T, _ = self._B.shape
        return max(1, 256 // (N * T))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        letters = "nqto,nti->nqoi" if self._rows_are_outputs else "nqto,nti->nqio"
        return torch.einsum(letters, self._B[start:stop], self._A[start:stop]).flatten(2)

    @property
    def nbytes(self) -> int:
        return self._A.nbytes + self._B.nbytes

    @property
    def dense_is_cheaper(self) -> bool:
        _, q, T, _ = self._B.shape
        return rows_are_cheaper(T, q)

    def joined(self, other: LinearPart) -> LinearPart:
        """Return the sum of two uses of the same parameter: their positions one after the other."""
        A = torch.cat([self._A, other._A], 1)
        return LinearPart(A, torch.cat([self._B, other._B], 2), self._rows_are_outputs)

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

    def apply(self, V: Tensor) -> Tensor:
        d = self._B.shape[3]
        looked_up = V.reshape(len(V), self._count, d)[:, self._index]
        return torch.einsum("kntd,nqtd->knq", looked_up, self._B)

    def apply_transposed(self, W: Tensor, out: Tensor) -> None:
        K, d = len(W), self._B.shape[3]
        weighted = torch.einsum("knq,nqtd->kntd", W, self._B)
        table = out.zero_().view(K, self._count, d)
        table.index_add_(1, self._index.reshape(-1), weighted.reshape(K, -1, d))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        B, index = self._B[start:stop], self._index[start:stop]
        rows = B.new_zeros(*B.shape[:2], self._count, B.shape[3])
        return rows.scatter_add_(2, index[:, None, :, None].expand(B.shape), B).flatten(2)

    @property
    def nbytes(self) -> int:
        return self._B.nbytes + self._index.nbytes

    @property
    def numbers_per_column(self) -> int:
        N, _, T, d = self._B.shape
        return N * T * d + self._count * d
