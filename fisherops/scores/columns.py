"""Columns of G that belong to one use of parameters, in the coordinates (g, o, i) of what is used.

The row of datum n and vector q is Σ_t b[q, n, t] a[n, t]ᵀ over the positions t of the datum; each group g has its own a
and b. Vectors come and go as V (K, g, o, i) and W (K, N, q), contiguous in their last axes where that is fastest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fisherops._matmul import takes_onednn, times_transposed
from fisherops._sizes import SIZES
from fisherops._sums import CompensatedSum, SegmentSum

# Positions from which products with several vectors may be faster by rows.
_SHORT = 8

# Terms that are summed at once in the compute precision, and vectors of a block of rows likewise.
TERMS = 2**12

# Sizes up to 2 to this power, and down to its reciprocal, may be squared and summed in float32.
_SAFE = 24


Concatenate = Callable[[Sequence[Tensor]], Tensor]
"""Joins tensors along their first axis; the same ones again give the same result."""


class Columns(ABC):
    """Columns of G for one use, (N · q) × (g · o · i). Tensors and integers only, nothing shared with the user."""

    count: int
    """N, the number of data."""
    shape: tuple[int, int, int]
    """(g, o, i)."""

    @abstractmethod
    def apply(self, V: Tensor) -> Tensor:
        """Multiply: (K, g, o, i) → (K, N, q)."""

    @abstractmethod
    def apply_t(self, W: Tensor) -> Tensor:
        """Multiply the transpose: (K, N, q) → (K, g, o, i)."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows of some data, (n, q, g, o, i)."""

    @abstractmethod
    def gram(self, other: Columns) -> Tensor | None:
        """Multiply with the transpose of columns of the same parameters, (N · q, N' · q'), or None if only rows can."""

    @abstractmethod
    def scale(self, factor: float) -> None:
        """Multiply by a number; the gradients may be those of another use too, so not in their memory."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""

    @property
    @abstractmethod
    def key(self) -> Any:
        """Equal for columns of the same elements that can be merged."""

    @abstractmethod
    def merged(self, parts: Sequence[Self], cat: Concatenate) -> Self:
        """Return columns of the data of all parts, one after the other; this one is the first of them."""

    @abstractmethod
    def part(self, start: int, stop: int) -> Self:
        """Return the columns of some data."""

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def shared(self) -> tuple[Tensor, ...]:
        """What is held together with other uses, such as the input of two convolutions."""
        return ()

    @property
    def elements_per_vector(self) -> int:
        """Temporary elements of a product for each vector."""
        return 0

    def col_squares(self) -> Tensor:
        """Return the squared norms of the columns, (g, o, i)."""
        step = min(TERMS, max(1, SIZES[self.tensors[0].device].filling // math.prod(self.shape)))
        return summed(self.rows(n, n + step).square().sum((0, 1)) for n in range(0, self.count, step))

    def row_squares(self) -> Tensor:
        """Return the squared norms of the rows, (N, q) in float64."""
        step = max(1, SIZES[self.tensors[0].device].filling // math.prod(self.shape))
        norms = [
            torch.linalg.vector_norm(
                self.rows(n, min(n + step, self.count)).flatten(2), dim=2, dtype=torch.float64
            ).square()
            for n in range(0, self.count, step)
        ]
        return torch.cat(norms)


def rows_are_better(form: str, rows: int, factors: int, T: int, q: int) -> bool:
    """Whether to hold dense rows of a use instead of factors, to be small ("factors") or fast ("auto").

    A matrix product does several multiplications in the time that one element takes from memory, so products with
    factors may take longer. In "auto" rows may take up to 1.5 times the memory of the factors, or as many times as they
    are faster.

    Parameters
    ----------
    form : {"auto", "factors", "uses"}
        In "uses", rows are never better.
    rows, factors : int
        Elements of the rows, and of the factors.
    T, q : int
        Positions and vectors of a datum.
    """
    faster = T / (8 * q)
    if form == "uses":
        return False
    return rows <= factors or (form == "auto" and faster > 1 and rows <= max(1.5, faster) * factors)


class Rows(Columns):
    """The rows themselves, (N, q, g, o, i)."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = owned(rows.detach())
        self.count = len(rows)
        self.shape = rows.shape[2], rows.shape[3], rows.shape[4]

    def apply(self, V: Tensor) -> Tensor:
        return times_transposed(V.reshape(len(V), -1), self._matrix).view(len(V), self.count, -1)

    def apply_t(self, W: Tensor) -> Tensor:
        return times_transposed(W.reshape(len(W), -1), self._matrix.T).view(len(W), *self.shape)

    @property
    def _matrix(self) -> Tensor:
        return self._rows.view(self.count * self._rows.shape[1], -1)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._rows[start:stop]

    def gram(self, other: Columns) -> Tensor | None:
        if not isinstance(other, Rows) or other.shape != self.shape:
            return None
        return times_transposed(self._matrix, other._matrix)

    def scale(self, factor: float) -> None:
        self._rows = self._rows * factor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self._rows,)

    @property
    def key(self) -> Any:
        return Rows, self._rows.shape[1:]

    def merged(self, parts: Sequence[Rows], cat: Concatenate) -> Rows:
        return Rows(cat([part._rows for part in parts]))

    def part(self, start: int, stop: int) -> Rows:
        return Rows(self._rows[start:stop])


class Factors(Columns):
    """A contraction: dense layers, einsum, grouped products.

    Parameters
    ----------
    A : torch.Tensor
        Inputs, (N, T, g, i).
    B : torch.Tensor
        Gradients at the outputs, (N, T, q, g, o).
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        (self.count, self._T, g, i), (_, _, self._q, _, o) = A.shape, B.shape
        self.shape = g, o, i
        N, T, q = self.count, self._T, self._q
        # In this order both products take and give contiguous matrices.
        self._A = owned(A.detach().permute(2, 0, 1, 3).reshape(g, N * T, i))
        self._B = owned(B.detach().permute(2, 3, 4, 0, 1).reshape(q, g * o, N, T))
        # Vectors that fill a matrix product; more of them only need more memory.
        self._step = max(1, SIZES[A.device].filling // max(1, g * o * N * T))

    def apply(self, V: Tensor) -> Tensor:
        g, o, i = self.shape
        W = V.new_empty(len(V), self.count, self._q)
        if self._T >= _SHORT and self._rows_are_cheaper(len(V)):
            for start, rows in self._blocks_of_rows(len(V)):
                products = times_transposed(V.reshape(len(V), -1), rows)
                W[:, start : start + len(rows) // self._q] = products.view(len(V), -1, self._q)
            return W
        for start in range(0, len(V), self._step):
            v = V[start : start + self._step]
            H = torch.matmul(v, self._A.mT) if g > 1 else times_transposed(v.reshape(len(v) * o, i), self._A[0])
            H = H.view(len(v), g * o, self.count, self._T)
            for r, b in enumerate(self._B):
                product = H.mul_(b) if r == self._q - 1 else H * b
                W[start : start + len(v), :, r] = product.sum((1, 3))
        return W

    def apply_t(self, W: Tensor) -> Tensor:
        g, o, i = self.shape
        NT = self.count * self._T
        if self._T >= _SHORT and self._rows_are_cheaper(len(W)):
            total = W.new_zeros(len(W), g * o * i)
            for start, rows in self._blocks_of_rows(len(W)):
                own = W[:, start : start + len(rows) // self._q].reshape(len(W), -1)
                total += times_transposed(own, rows.T)
            return total.view(len(W), g, o, i)
        out = W.new_empty(len(W), g, o, i) if len(W) > self._step else None
        for start in range(0, len(W), self._step):
            w = W[start : start + self._step, None, :, :, None]
            H = w[:, :, :, 0] * self._B[0]
            for r in range(1, self._q):
                H.addcmul_(w[:, :, :, r], self._B[r])
            if g == 1:
                product = times_transposed(H.reshape(len(w) * o, NT), self._A[0].T).view(len(w), g, o, i)
            else:
                product = torch.matmul(H.reshape(len(w), g, o, NT), self._A)
            if out is None:
                return product
            out[start : start + len(w)] = product
        assert out is not None
        return out

    def _rows_are_cheaper(self, K: int) -> bool:
        """Whether to make dense rows, a block at a time, for products with K vectors.

        They take T multiplications an element once, and then one for each vector; the factors take T for each vector.
        """
        return 2 * self._q * (self._T + K) < K * self._T

    def _blocks_of_rows(self, K: int) -> Iterator[tuple[int, Tensor]]:
        """List the first datum of blocks with their rows (n · q, g · o · i): as many as vectors if that is more."""
        step = max(1, max(SIZES[self._A.device].filling // math.prod(self.shape), K) // self._q)
        for start in range(0, self.count, step):
            yield start, self.rows(start, start + step).flatten(2).flatten(0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        A, B = self.by_datum()
        return rows_of_contraction(A[start:stop], B[start:stop])

    def by_datum(self) -> tuple[Tensor, Tensor]:
        """Return views of A as (N, T, g, i) and B as (N, T, q, g, o)."""
        return self._arranged(self._A, self._B)

    def _arranged(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        g, o, i = self.shape
        N, T, q = self.count, self._T, self._q
        return A.view(g, N, T, i).permute(1, 2, 0, 3), B.view(q, g, o, N, T).permute(3, 4, 0, 1, 2)

    def _in_range(self) -> tuple[Tensor, Tensor, int, int]:
        """Return A / 2ᵃ and B / 2ᵇ as `by_datum` does, with a and b, so that squares stay in range."""
        (A, a), (B, b) = _in_range(self._A), _in_range(self._B)
        return *self._arranged(A, B), a, b

    @property
    def terms(self) -> int:
        """T, the positions of a datum."""
        return self._T

    def gram(self, other: Columns) -> Tensor | None:
        if isinstance(other, Table):
            own = other.gram(self)
            return None if own is None else own.T
        if not isinstance(other, Factors) or other.shape != self.shape or self.prefers_rows(other):
            return None
        return self.gram_with(other, bias=False)

    def prefers_rows(self, other: Factors) -> bool:
        """Whether products of rows, which are made a block at a time, take fewer flops than pairs of positions."""
        (_, o, i), q, p, T, S = self.shape, self._q, other._q, self._T, other._T
        return o * i * (q * p + q * T / other.count + p * S / self.count) < T * S * (i + q * p * o)

    def gram_with(self, other: Factors, bias: bool) -> Tensor:
        """Multiply with the transpose, those of a bias that is added to the outputs counted too: its rows are Σ b."""
        (A, B, a, b), (C, E, c, e) = self._in_range(), other._in_range()

        if bias and a + c < 0:  # beside the 1 of the bias small inputs need no digits, and its power would overflow
            (A, a), (C, c) = (self.by_datum()[0], 0), (other.by_datum()[0], 0)

        def of_group(g: int) -> Tensor:
            def inputs(mine: slice, theirs: slice) -> Tensor:
                products = times_transposed(flat(A[mine, :, g]), flat(C[theirs, :, g]))
                return products.add_(2.0 ** -(a + c)) if bias else products

            return _gram(inputs, B[:, :, :, g], E[:, :, :, g])

        total = of_group(0)
        for g in range(1, self.shape[0]):
            total += of_group(g)
        return _times_power(total, a + b + c + e)

    def col_squares(self) -> Tensor:
        if self._T > 1:
            return super().col_squares()
        (A, a), (B, b) = _in_range(self._A), _in_range(self._B)
        squares = B[0].square()
        for of_vector in B[1:]:
            squares.addcmul_(of_vector, of_vector)
        squares = squares.view(*self.shape[:2], -1)
        if self.shape[0] == 1:
            norms = times_transposed(squares[0], A[0].square().T)[None]
        else:
            norms = torch.matmul(squares, A.square())
        return _times_power(norms, 2 * (a + b))

    def row_squares(self) -> Tensor:
        g, o, i = self.shape
        if self._T == 1:
            a = _square_norms(self._A.view(-1, i), 1).view(g, -1)
            b = _square_norms(self._B.view(-1, o, self.count), 1).view(self._q, g, -1)
            return torch.einsum("gn,qgn->nq", a, b)
        if self._T * (i + self._q * o) > self._q * o * i:
            return super().row_squares()
        A, B = self.by_datum()
        norms = [_squares_of_pairs(torch.einsum("ntgi,nsgi->ntgs", a, a), b) for a, b in _by_pairs(A, B)]
        return torch.cat(norms)

    def scale(self, factor: float) -> None:
        self._B = self._B * factor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._A, self._B

    @property
    def key(self) -> Any:
        return Factors, self.shape, self._T, self._q

    def merged(self, parts: Sequence[Factors], cat: Concatenate) -> Factors:
        A, B = zip(*(part.by_datum() for part in parts), strict=True)
        return Factors(cat(A), cat(B))

    def part(self, start: int, stop: int) -> Factors:
        A, B = self.by_datum()
        return Factors(A[start:stop], B[start:stop])


def rows_of_contraction(A: Tensor, B: Tensor) -> Tensor:
    """Return Σ_t b aᵀ of A (N, T, g, i) and B (N, T, q, g, o), (N, q, g, o, i)."""
    (N, T, q, g, o), i = B.shape, A.shape[3]
    if T > TERMS:
        return summed(map(rows_of_contraction, A.split(TERMS, 1), B.split(TERMS, 1)))
    if T == 1:
        return B[:, 0].unsqueeze(-1) * A[:, 0][:, None, :, None]
    if i == 1:
        return (B * A[:, :, None]).sum(1)[..., None]
    if g == 1:
        return torch.bmm(B.reshape(N, T, q * o).mT, A.reshape(N, T, i)).view(N, q, 1, o, i)
    return torch.einsum("ntqgo,ntgi->nqgoi", B, A)


class Table(Columns):
    """Look-ups of rows of a table (o rows of length i): never a dense table for each datum.

    Parameters
    ----------
    index : torch.Tensor
        (N, T).
    B : torch.Tensor
        Gradients at what was looked up, (N, T, q, i).
    length : int
        o, rows of the table.
    """

    def __init__(self, index: Tensor, B: Tensor, length: int) -> None:
        self.index, self.gradients = owned(index), owned(B.detach().permute(0, 2, 1, 3))
        self.count, self.shape = len(B), (1, length, B.shape[3])
        self._sum = SegmentSum(index.reshape(-1), length)

    def apply(self, V: Tensor) -> Tensor:
        step = max(1, TERMS // self.shape[2])
        pieces = zip(self.index.split(step, 1), self.gradients.split(step, 2), strict=True)
        return summed(torch.einsum("kntd,nqtd->knq", V[:, 0][:, index], b) for index, b in pieces)

    def apply_t(self, W: Tensor) -> Tensor:
        weighted = torch.einsum("knq,nqtd->kntd", W, self.gradients)
        out = W.new_empty(len(W), *self.shape[1:])
        self._sum(weighted.flatten(1, 2), out)
        return out[:, None]

    def rows(self, start: int, stop: int) -> Tensor:
        B, index = self.gradients[start:stop], self.index[start:stop]
        (n, q, _, d), length = B.shape, self.shape[1]
        rows = B.new_empty(q, n * length, d)
        own = index + length * torch.arange(n, device=index.device)[:, None]
        SegmentSum(own.reshape(-1), n * length)(B.transpose(0, 1).reshape(q, -1, d), rows)
        return rows.view(q, n, 1, length, d).transpose(0, 1)

    def gram(self, other: Columns) -> Tensor | None:
        if other.shape != self.shape:
            return None
        if isinstance(other, Factors):
            return self._gram_with_factors(other)
        if not isinstance(other, Table):
            return None

        def inputs(mine: slice, theirs: slice) -> Tensor:
            same = self.index[mine].reshape(-1, 1) == other.index[theirs].reshape(1, -1)
            return same.to(self.gradients.dtype)

        return _gram(inputs, self.gradients.transpose(1, 2), other.gradients.transpose(1, 2))

    def col_squares(self) -> Tensor:
        # The look-ups of one row of the table by one datum are summed before they are squared.
        (N, q, _, d), length = self.gradients.shape, self.shape[1]
        own = self.index + length * torch.arange(N, device=self.index.device)[:, None]
        used, place = own.unique(return_inverse=True)
        rows = self.gradients.new_empty(q, len(used), d)
        SegmentSum(place.flatten(), len(used))(self.gradients.transpose(0, 1).reshape(q, -1, d), rows)
        squares = self.gradients.new_empty(1, length, d)
        SegmentSum(used % length, length)(rows.square().sum(0, keepdim=True), squares)
        return squares

    def row_squares(self) -> Tensor:
        B = self.gradients.transpose(1, 2).unsqueeze(3)
        norms = [
            _squares_of_pairs((index.unsqueeze(2) == index.unsqueeze(1)).unsqueeze(2), b)
            for index, b in _by_pairs(self.index, B)
        ]
        return torch.cat(norms)

    def _gram_with_factors(self, other: Factors) -> Tensor:
        """Multiply with a dense use of the same table, as of tied embeddings: Σ ⟨b_t, a_s⟩ b_s[index_t]."""
        A, B = other.by_datum()  # (M, S, 1, i), (M, S, p, 1, o)
        (N, q, T, d), (M, S, p) = self.gradients.shape, B.shape[:3]
        result = A.new_empty(N, q, M, p)
        step = max(1, SIZES[A.device].filling // (M * S * T * max(q, p)))
        inputs, outputs = flat(A[:, :, 0]), B[:, :, :, 0]
        for n in range(0, N, step):
            own = self.gradients[n : n + step]
            products = times_transposed(own.reshape(-1, d).contiguous(), inputs).view(len(own), q, T, M, S)
            picked = outputs[..., self.index[n : n + step]]  # (M, S, p, n, T)
            result[n : n + step] = torch.einsum("nqtms,mspnt->nqmp", products, picked)
        return result.view(N * q, M * p)

    def scale(self, factor: float) -> None:
        self.gradients = self.gradients * factor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.index, self.gradients

    @property
    def key(self) -> Any:
        return Table, self.shape, self.gradients.shape[1:]

    def merged(self, parts: Sequence[Table], cat: Concatenate) -> Table:
        index, B = (cat(own) for own in zip(*(part.tensors for part in parts), strict=True))
        return Table(index, B.transpose(1, 2), self.shape[1])

    def part(self, start: int, stop: int) -> Table:
        return Table(self.index[start:stop], self.gradients[start:stop].transpose(1, 2), self.shape[1])

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._sum.nbytes

    @property
    def elements_per_vector(self) -> int:
        N, _, T, d = self.gradients.shape
        return (N * T + self._sum.rows + self.shape[1]) * d


def _by_pairs(A: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut factors into blocks of data, of which products of every two positions are few numbers.

    In float64, because the sum over the pairs may be much smaller than its terms.
    """
    T, q, g = B.shape[1:4]
    step = max(1, SIZES[B.device].filling // (T * T * q * g))
    for a, b in zip(A.split(step), B.split(step), strict=True):
        yield a.double() if a.is_floating_point() else a, b.double()


def _squares_of_pairs(inputs: Tensor, B: Tensor) -> Tensor:
    """Return Σ_{t,s} ⟨a_t, a_s⟩ ⟨b_t, b_s⟩, (n, q), for products of inputs (n, t, g, s) and B (n, t, q, g, o)."""
    outputs = torch.einsum("ntqgo,nsqgo->ntqgs", B, B)
    return (inputs.unsqueeze(2) * outputs).sum((1, 3, 4)).clamp_min_(0)


def _square_norms(x: Tensor, axis: int) -> Tensor:
    """Return squared norms along an axis in float64, in pieces along the first, because torch casts all it is given."""
    step = max(1, SIZES[x.device].filling // max(1, x[:1].numel()))
    norms = [torch.linalg.vector_norm(piece, dim=axis, dtype=torch.float64) for piece in x.split(step)]
    return torch.cat(norms).square_()


def owned(t: Tensor) -> Tensor:
    """Return a tensor as contiguous, without the rest of a larger one that it may be a view of."""
    t = t.contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def summed(terms: Iterator[Tensor]) -> Tensor:
    """Sum tensors, at least one, without losing digits by their number."""
    first = next(terms)
    result = CompensatedSum(first)
    result.add(first)
    for term in terms:
        result.add(term)
    return result.value()


def _in_range(x: Tensor) -> tuple[Tensor, int]:
    """Return x / 2ᵉ and e, which is 0 unless squares of x could leave the range of its precision."""
    largest = max(map(abs, torch.stack(x.aminmax()).tolist())) if x.numel() else 0.0
    if largest == 0 or not math.isfinite(largest) or 2.0**-_SAFE <= largest <= 2.0**_SAFE:
        return x, 0
    exponent = math.frexp(largest)[1]
    return torch.ldexp(x, torch.tensor(-exponent, device=x.device)), exponent


def _times_power(x: Tensor, exponent: int) -> Tensor:
    """Multiply by 2 to a power."""
    return torch.ldexp(x, torch.tensor(exponent, device=x.device)) if exponent else x


def flat(A: Tensor) -> Tensor:
    """Return (..., i) as contiguous rows."""
    return A.reshape(-1, A.shape[-1]).contiguous()


def _rows_of_kernel(X: Tensor) -> Tensor:
    """Return a matrix as the fastest kernel takes it without a copy of its own."""
    return X if 1 in X.stride() and not takes_onednn(X) else X.contiguous()


def _gram(inputs: Callable[[slice, slice], Tensor], B: Tensor, other: Tensor) -> Tensor:
    """Return Σ_{t,t'} ⟨a_t, a_t'⟩ ⟨b_qt, b_q't'⟩ for all pairs of data, (N · q, N' · q'), a block of them at a time.

    Parameters
    ----------
    inputs : callable
        Takes two slices of data and returns ⟨a_t, a_t'⟩ for them, (n · T, n' · T').
    B, other : torch.Tensor
        (N, T, q, o) and (N', T', q', o).
    """
    (N, T, q, o), (M, S, p, _) = B.shape, other.shape
    result = B.new_empty(N, q, M, p)
    step = max(1, int((SIZES[B.device].filling / (T * q * S * p)) ** 0.5))
    for n in range(0, N, step):
        for m in range(0, M, step):
            mine, theirs = slice(n, min(n + step, N)), slice(m, min(m + step, M))
            left, right = (_rows_of_kernel(x.reshape(-1, o)) for x in (B[mine], other[theirs]))
            products = times_transposed(left, right).view(-1, T, q, theirs.stop - m, S, p)
            weights = inputs(mine, theirs).view(-1, T, 1, theirs.stop - m, S, 1)
            if T * S > 1:
                result[mine, :, theirs] = products.mul_(weights).sum((1, 4))
            else:
                torch.mul(products[:, 0, :, :, 0], weights[:, 0, :, :, 0], out=result[mine, :, theirs])
    return result.view(N * q, M * p)
