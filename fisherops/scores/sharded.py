"""Products with G where the parameters are sharded: one parameter after the other, none of them all at once.

Every rank has the rows of its own data for all parameters, as factors, and its own pieces of vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fisherops._sharding import Sharding
from fisherops.scores.batch import MaterializedBatch

Span = tuple[int, int]


def apply(
    batches: Sequence[MaterializedBatch], sharding: Sharding, spans: Mapping[str, Span], local: Tensor
) -> list[Tensor]:
    """Multiply G of each batch: (d, K) → (K, rows)."""
    products = [local.new_zeros(local.shape[1], scores.count) for scores in batches]
    for name in spans:
        v = sharding.gathered(name, local)
        for scores, W in zip(batches, products, strict=True):
            for derived, columns in scores.blocks_of(name):
                W += columns.apply(derived.push({name: v})).flatten(1)
    return products


def apply_transposed(
    batches: Sequence[MaterializedBatch], sharding: Sharding, spans: Mapping[str, Span], products: Sequence[Tensor]
) -> Tensor:
    """Multiply Gᵀ and sum over batches and ranks: (K, rows) for each batch → (d, K)."""
    K = len(products[0])
    local = products[0].new_empty(sharding.numel, K)
    for name, span in spans.items():
        total = local.new_zeros(K, span[1] - span[0])
        for scores, W in zip(batches, products, strict=True):
            for derived, columns in scores.blocks_of(name):
                total += derived.pull(columns.apply_t(W.view(K, columns.count, -1)))[name]
        sharding.scattered(name, total, local)
    return local


def diagonal(batches: Sequence[MaterializedBatch], sharding: Sharding, spans: Mapping[str, Span]) -> Tensor:
    """Return the squared norms of the columns of G, summed over batches and ranks, (d,)."""
    local = batches[0].empty(sharding.numel, 1)
    for name, (start, stop) in spans.items():
        total = local.new_zeros(1, stop - start)
        for scores in batches:
            total += scores.col_norms_of(name)
        sharding.scattered(name, total, local)
    return local[:, 0]
