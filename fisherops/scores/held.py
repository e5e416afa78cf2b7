"""G of one batch, held as dense rows for some parameters and as factors for others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherops._matmul import takes_onednn, times_transposed
from fisherops.scores.parts import Part

# Rows are multiplied by G and then by Gᵀ while they are in the processor's cache, some bytes of them; oneDNN needs many
# rows at once, and where there are few long ones the kernels for vectors are the fastest.
_CACHED_BYTES = 5 * 2**19
_MANY_ROWS, _FEW_ROWS = 128, 64
_LONG = 2**17

# Rows that are summed at once in the compute precision: more of them would lose digits.
_ROWS_PER_SUM = 2**14

# Bytes that a block of rows, or what a product needs beside its vectors, may take.
_BLOCK_BYTES = 2**26

Span = tuple[int, int]


class HeldScores:
    """G of one batch: dense rows for some parameters, factors for others.

    Parameters
    ----------
    dense : torch.Tensor
        (N · q, d), the rows for all parameters that are held that way.
    spans : list of (int, int)
        Where the columns of `dense` lie in the flat vector of parameters, in order.
    parts : list of (Span, Part)
        The other parameters.
    size : int
        N.
    numel : int
        D.
    """

    def __init__(self, dense: Tensor, spans: list[Span], parts: list[tuple[Span, Part]], size: int, numel: int) -> None:
        self._dense, self._spans, self._parts, self._N, self._numel = dense, spans, parts, size, numel
        self._whole = len(spans) == 1 and spans[0] == (0, numel)
        numbers = max([1, dense.shape[1], *(part.numbers_per_column for _, part in parts)])
        self.columns = min(256, max(1, _BLOCK_BYTES // (numbers * dense.itemsize)))
        """Columns that are multiplied together."""

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self._dense)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self._dense.nbytes + sum(part.nbytes for _, part in self._parts)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._dense.device

    @property
    def description(self) -> str:
        """What is held, in words."""
        if not self._parts:
            return "dense rows"
        return "factors and dense rows" if self._spans else "factors"

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (D, K) → (D, K), reading dense rows once."""
        V = V.T.contiguous()
        W = self._apply_parts(V)
        result = self._empty(len(V), V)
        if self._spans:
            self._scatter(self._dense_product(self._dense_columns(V), W), result)
        self._transpose_parts(W, result)
        return result.T

    def _dense_product(self, V: Tensor, W: Tensor) -> Tensor:
        """Add the dense rows' product with V to W, and multiply their transpose with it."""
        count, length = self._dense.shape
        total = torch.zeros_like(V)
        if len(V) == 1 and count < _FEW_ROWS and length > _LONG and V.device.type == "cpu":
            w, own = W[0], total[0]
            for n, row in enumerate(self._dense):
                w[n] += times_transposed(row[None], V)[0, 0]
                own.addcmul_(row, w[n])
            return total
        cached, least = (8 * _CACHED_BYTES, _MANY_ROWS) if takes_onednn(V) else (_CACHED_BYTES, 2)
        if V.device.type != "cpu":
            cached = _BLOCK_BYTES
        step = min(max(least, cached // (length * self._dense.itemsize)), _ROWS_PER_SUM)
        for rows, w in zip(self._dense.split(step), W.split(step, 1), strict=True):
            w += times_transposed(V, rows)
            w = w.contiguous()
            if step >= count:
                return times_transposed(w, rows.T)
            total += times_transposed(w, rows.T)
        return total

    def apply(self, V: Tensor) -> Tensor:
        """Multiply G: (D, K) → (N · q, K)."""
        V = V.T.contiguous()
        W = self._apply_parts(V)
        if self._spans:
            W += times_transposed(self._dense_columns(V), self._dense)
        return W.T

    def apply_transposed(self, W: Tensor) -> Tensor:
        """Multiply Gᵀ: (N · q, K) → (D, K)."""
        W = W.T.contiguous()
        result = self._empty(len(W), W)
        if self._spans:
            self._scatter(times_transposed(W, self._dense.T), result)
        self._transpose_parts(W, result)
        return result.T

    def parts_at(self, span: Span) -> list[Part]:
        """Return how the parameter at a place of the flat vector is held, where it is not by dense rows."""
        return [part for own, part in self._parts if own == span]

    def empty(self, *shape: int) -> Tensor:
        """Return room for numbers like those of the rows."""
        return self._dense.new_empty(shape)

    @property
    def layout(self) -> tuple[object, ...] | None:
        """How each parameter is held; None where one has several parts, of which its rows are the sum."""
        if self._has_ties():
            return None
        return (*self._spans, *((span, type(part).__name__) for span, part in self._parts))

    def gram(self, other: HeldScores) -> Tensor:
        """Multiply with the transpose of another batch of the same layout."""
        total = times_transposed(self._dense, other._dense)
        for (_, part), (_, other_part) in zip(self._parts, other._parts, strict=True):
            total += part.gram(other_part)
        return total

    def diagonal(self) -> Tensor:
        """Return the squared norms of the columns, (D,)."""
        if self._has_ties():  # the uses of a parameter are summed before they are squared
            blocks = (rows.square().sum(0) for rows in self.rows())
            return sum(blocks, self._dense.new_zeros(self._numel))
        total = self._dense.new_zeros(1, self._numel)
        self._scatter(self._dense.square().sum(0, keepdim=True, dtype=torch.float64).to(total.dtype), total)
        for (start, stop), part in self._parts:
            total[0, start:stop] = part.diagonal()
        return total[0]

    def rows(self) -> Iterator[Tensor]:
        """List G in blocks of rows (r, D)."""
        q = len(self._dense) // self._N
        step = max(1, _BLOCK_BYTES // (q * self._numel * self._dense.itemsize))
        for first in range(0, self._N, step):
            last = min(first + step, self._N)
            rows = self._dense.new_zeros((last - first) * q, self._numel)
            self._scatter(self._dense[first * q : last * q], rows)
            for (start, stop), part in self._parts:
                rows[:, start:stop] += part.dense(first, last).flatten(0, 1)
            yield rows

    def _has_ties(self) -> bool:
        """Whether a parameter has several parts, of which its rows are the sum."""
        return len({span for span, _ in self._parts}) < len(self._parts)

    def _apply_parts(self, V: Tensor) -> Tensor:
        W = V.new_zeros(len(V), len(self._dense))
        for (start, stop), part in self._parts:
            W += part.apply(V[:, start:stop]).flatten(1)
        return W

    def _transpose_parts(self, W: Tensor, result: Tensor) -> None:
        written: set[Span] = set()
        for (start, stop), part in self._parts:
            out = result[:, start:stop]
            own = W.view(len(W), self._N, -1)
            if (start, stop) not in written:
                part.apply_transposed(own, out)
                written.add((start, stop))
            else:  # another use of the same parameter
                more = torch.empty_like(out)
                part.apply_transposed(own, more)
                out += more

    def _empty(self, K: int, like: Tensor) -> Tensor:
        """Return room for a result (K, D), zero where nothing is held."""
        held = sum(stop - start for start, stop in {*self._spans, *(span for span, _ in self._parts)})
        make = like.new_empty if held == self._numel else like.new_zeros
        return make(K, self._numel)

    def _dense_columns(self, V: Tensor) -> Tensor:
        return V if self._whole else torch.cat([V[:, start:stop] for start, stop in self._spans], 1)

    def _scatter(self, dense: Tensor, result: Tensor) -> None:
        offset = 0
        for start, stop in self._spans:
            result[:, start:stop] = dense[:, offset : offset + stop - start]
            offset += stop - start
