"""Products with G where the parameters are sharded: one parameter after the other, none of them all at once.

Every rank has the rows of its own data for all parameters, as factors, and its own pieces of vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherops._sharding import Sharding
from fisherops.scores.held import HeldScores

Span = tuple[int, int]


def apply(batches: Sequence[HeldScores], sharding: Sharding, spans: Mapping[str, Span], local: Tensor) -> list[Tensor]:
    """Multiply G of each batch: (d, K) → (K, rows)."""
    products = [local.new_zeros(local.shape[1], scores.count) for scores in batches]
    for name, span in spans.items():
        v = sharding.gathered(name, local)
        for scores, W in zip(batches, products, strict=True):
            for part in scores.parts_at(span):
                W += part.apply(v).flatten(1)
    return products


def apply_transposed(
    batches: Sequence[HeldScores], sharding: Sharding, spans: Mapping[str, Span], products: Sequence[Tensor]
) -> Tensor:
    """Multiply Gᵀ and sum over batches and ranks: (K, rows) for each batch → (d, K)."""
    K = len(products[0])
    local = products[0].new_empty(sharding.numel, K)
    for name, span in spans.items():
        total = local.new_zeros(K, span[1] - span[0])
        for scores, W in zip(batches, products, strict=True):
            for part in scores.parts_at(span):
                own = torch.empty_like(total)
                part.apply_transposed(W.view(K, part.count, -1), own)
                total += own
        sharding.scattered(name, total, local)
    return local


def diagonal(batches: Sequence[HeldScores], sharding: Sharding, spans: Mapping[str, Span]) -> Tensor:
    """Return the squared norms of the columns of G, summed over batches and ranks, (d,)."""
    local = batches[0].empty(sharding.numel, 1)
    for name, (start, stop) in spans.items():
        total = local.new_zeros(1, stop - start)
        for scores in batches:
            parts = scores.parts_at((start, stop))
            if len(parts) == 1:
                total += parts[0].diagonal()
            elif parts:  # the uses of a parameter are summed before they are squared
                total += torch.stack([part.dense() for part in parts]).sum(0).square().sum((0, 1))
        sharding.scattered(name, total, local)
    return local[:, 0]
