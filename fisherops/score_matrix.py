"""The score matrix G of an operator F = GᵀG, as an operator itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherops._linop import TorchLinearOperator, Transposed, check_result, opaque
from fisherops._sums import CompensatedSum
from fisherops.scores import MaterializedBatch, Scores, sharded

if TYPE_CHECKING:
    from fisherops.fisher import FisherOperator

# Columns of the identity that the Gram matrix is multiplied from where rows are not kept.
_BLOCK = 128


class ScoreMatrix(TorchLinearOperator):
    """The score matrix G of a Fisher, F = GᵀG: one row for each vector of each loss term, √(w/c) · gᵀJ.

    Made by ``op.scores``. Rows are ordered by batch, datum, term and vector; with ``rows="datum"`` by batch, datum and
    vector. There are ``min(mc_samples, C)`` vectors for the Monte-Carlo Fisher, at most C for the exact one, and one
    for the empirical one. ``svds(op.scores)``, ``op.scores @ v`` and ``op.scores.T @ w`` work as for any SciPy
    operator.

    Attributes
    ----------
    shape : tuple of int
        (rows, D).
    """

    def __init__(self, fisher: FisherOperator) -> None:
        self._fisher = fisher
        self._ranks = fisher.ranks
        with fisher._ordered_pass("rows") as batches:
            self._counts = [scores.count for scores in batches]
            by_rank = self._ranks.share(sum(self._counts))
        start = sum(by_rank[: self._ranks.rank])
        self._own = slice(start, start + sum(self._counts))
        super().__init__((sum(by_rank), fisher.shape[1]), fisher.torch_dtype, fisher.device)

    def _times(self, V: Tensor) -> Tensor:
        sharding = self._fisher.sharding
        if sharding is None:
            return super()._times(V)
        local = sharding.local(V).to(self.torch_dtype)
        with self._fisher._held_pass("scores", local) as batches:
            products = sharded.apply(batches, sharding, self._fisher.parameter_spans, local)
            return torch.cat(self._ranks.gather(torch.cat(products, 1).T))

    def _apply(self, V: Tensor) -> Tensor:
        with self._fisher._ordered_pass("scores", V) as batches:
            blocks = [
                torch.cat([scores.apply(columns) for columns in V.split(scores.columns, dim=1)], 1)
                for scores in batches
            ]
            own = torch.cat(blocks) if blocks else V.new_empty(0, V.shape[1])
            return torch.cat(self._ranks.gather(own))

    def _apply_transposed(self, W: Tensor) -> Tensor:
        sharding = self._fisher.sharding
        if sharding is not None:
            with self._fisher._held_pass("transposed scores", W) as held:
                products = [own.T for own in W[self._own].split(self._counts)]
                local = sharded.apply_transposed(held, sharding, self._fisher.parameter_spans, products)
            return self._fisher.sharded(local)  # type: ignore[no-any-return]
        total = CompensatedSum(W.new_empty(self.shape[1], W.shape[1]))
        with self._fisher._ordered_pass("transposed scores", W) as batches:
            for scores, own in zip(batches, W[self._own].split(self._counts), strict=True):
                blocks = [scores.apply_transposed(w).T for w in own.split(scores.columns, dim=1)]
                total.add((torch.cat(blocks) if len(blocks) > 1 else blocks[0]).T)
            return self._ranks.sum(total.value())

    def _transpose(self) -> Transposed:
        return Transposed(self)

    @property
    def version(self) -> int:
        """That of the operator F = GᵀG."""
        return self._fisher.version

    def refresh(self) -> None:
        """Forget what is cached; see `FisherMCLinearOperator.refresh`."""
        self._fisher.refresh()

    @opaque
    def gram(self) -> np.ndarray[Any, Any]:
        """Return the Gram matrix G Gᵀ as a NumPy array of shape (rows, rows).

        Its nonzero eigenvalues are those of F. Where rows are kept, it is found from them by blocks: for factors Σ (A
        Aᵀ) ∘ (B Bᵀ) over the layers; otherwise by products with G and Gᵀ, one of each for every row.
        """
        return self.gram_tensor().cpu().numpy()

    def gram_tensor(self) -> Tensor:
        """Return the Gram matrix as a torch tensor on the operator's device; see `gram`."""
        R = self.shape[0]
        with self._fisher._ordered_pass("Gram matrix") as batches:
            result = self._gram_of_held(batches if isinstance(batches, list) else None)
        if result is None:
            result = torch.empty(R, R, dtype=self.torch_dtype, device=self.device)
            for start in range(0, R, _BLOCK):
                width = min(_BLOCK, R - start)
                identity = torch.zeros(R, width, dtype=self.torch_dtype, device=self.device)
                identity.diagonal(-start)[:width] = 1
                result[:, start : start + width] = self._apply(self._apply_transposed(identity))
            result = (result + result.T).div_(2)
        return check_result(result)

    def _gram_of_held(self, batches: list[Scores] | None) -> Tensor | None:
        """Multiply every two batches that are held, whatever rank holds them; None if some are not."""
        ranks = self._ranks
        own = [scores for scores in batches or [] if isinstance(scores, MaterializedBatch)]
        known = ranks.share(len(own) if batches is not None and len(own) == len(batches) else None)
        if None in known:
            return None
        if ranks.size > 1:
            own = [scores.without_graphs() for scores in own]
        # A rank fills in the blocks that it finds, and leaves zeros for the others.
        R = self.shape[0]
        result = torch.zeros(R, R, dtype=self.torch_dtype, device=self.device)
        column = 0
        for source, count in enumerate(known):
            for k in range(count):
                other = ranks.broadcast(own[k] if source == ranks.rank else None, source)
                row = self._own.start
                for j, scores in enumerate(own):
                    mine, theirs = slice(row, row + scores.count), slice(column, column + other.count)
                    row += scores.count
                    if source == ranks.rank and j == k:
                        block = scores.gram(scores)
                        result[mine, mine] = (block + block.T).div_(2)
                    elif j < k if source == ranks.rank else _falls_to(ranks.rank, source, ranks.size):
                        block = scores.gram(other)
                        result[mine, theirs] = block
                        result[theirs, mine] = block.T
                column += other.count
        if ranks.size > 1:
            for rows in result.split(_BLOCK):
                rows.copy_(ranks.sum(rows))
        return result


def _falls_to(rank: int, other: int, size: int) -> bool:
    """Whether the products of the rows of two ranks are found by the first, so that each rank has as many."""
    distance = (other - rank) % size
    return distance < size - distance or (2 * distance == size and rank < other)
