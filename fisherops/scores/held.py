"""G of one batch, held as dense rows for some parameters and as factors for others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherops.scores.parts import Part

# Bytes of rows that are multiplied by G and then by Gᵀ while they are in the processor's cache.
_CACHED_BYTES = {"cpu": 5 * 2**19, "cuda": 2**25}

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
    def nbytes(self) -> int:
        """Memory held."""
        return self._dense.nbytes + sum(part.nbytes for _, part in self._parts)

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
            v = self._dense_columns(V)
            total = torch.zeros_like(v)
            cached = _CACHED_BYTES.get(V.device.type, _BLOCK_BYTES)
            step = max(2, cached // (self._dense.shape[1] * self._dense.itemsize))
            for start in range(0, len(self._dense), step):
                rows = self._dense[start : start + step]
                w = W[:, start : start + step].addmm_(v, rows.T)
                total.addmm_(w, rows)
            self._scatter(total, result)
        self._transpose_parts(W, result)
        return result.T

    def apply(self, V: Tensor) -> Tensor:
        """Multiply G: (D, K) → (N · q, K)."""
        V = V.T.contiguous()
        W = self._apply_parts(V)
        if self._spans:
            W = torch.addmm(W, self._dense_columns(V), self._dense.T)
        return W.T

    def apply_transposed(self, W: Tensor) -> Tensor:
        """Multiply Gᵀ: (N · q, K) → (D, K)."""
        W = W.T.contiguous()
        result = self._empty(len(W), W)
        if self._spans:
            self._scatter(W @ self._dense, result)
        self._transpose_parts(W, result)
        return result.T

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
