"""Gram matrices G Gᵀ by panels of columns, of which only the lower triangle is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.protocol import BLOCKS, Scores, rows_of_block

# Rows of the parts of batches that meet the columns of a panel.
_ROWS = 2**11


def panels_of_batches(
    batches: Sequence[MaterializedBatch], width: int, first: int = 0, scale: Tensor | None = None
) -> Iterator[Tensor]:
    """List K[a:, a:b] of K = G diag(scale) Gᵀ for panels of columns a to b, (R − a, b − a), from cached rows.

    Parameters
    ----------
    batches : sequence of MaterializedBatch
        All of G, (R, D).
    width : int
        Columns of a panel; the last one may have fewer.
    first : int
        Number of the panel to begin with. Default: 0.
    scale : torch.Tensor, optional
        (D,). Default: ones.
    """
    rows = sum(batch.count for batch in batches)
    for start in range(first * width, rows, width):
        stop = min(start + width, rows)
        panel = batches[0].empty(rows - start, stop - start)
        columns = list(parts_of_batches(batches, start, stop, width))
        for at, part, own in parts_of_batches(batches, start, rows, _ROWS):
            for left, theirs, chosen in columns:
                block = part.gram(theirs, scale)[own, chosen]
                panel[at : at + block.shape[0], left : left + block.shape[1]] = block
        yield panel


def parts_of_batches(
    batches: Sequence[MaterializedBatch], start: int, stop: int, step: int
) -> Iterator[tuple[int, MaterializedBatch, slice]]:
    """List parts of batches of about `step` rows that have the rows from `start` to `stop`.

    Each comes with the place of the first of these rows in it after `start`, and the slice of its rows that they are.
    """
    first = 0
    for batch in batches:
        q = batch.vectors
        low, high = max(start - first, 0), min(stop - first, batch.count)
        for n in range(low // q, -(-high // q), max(1, step // q)):
            m = min(n + max(1, step // q), -(-high // q))
            own = slice(max(low - n * q, 0), min(high, m * q) - n * q)
            yield first + n * q + own.start - start, batch.part(n, m), own
        first += batch.count


def panels_by_rows(G: Scores, width: int, first: int = 0, scale: Tensor | None = None) -> Iterator[Tensor]:
    """List panels as `panels_of_batches` does, by products with blocks of dense rows, none of which may be cached."""
    R, step = G.num_rows, rows_of_block(G, BLOCKS)
    for start in range(first * width, R, width):
        stop = min(start + width, R)
        panel = torch.empty(R - start, stop - start, dtype=G.torch_dtype, device=G.device)
        for n in range(start, stop, step):
            m = min(n + step, stop)
            rows = G.block(n, m)
            panel[:, n - start : m - start] = G._mul(rows if scale is None else rows * scale)[:, start:].T
        yield panel
