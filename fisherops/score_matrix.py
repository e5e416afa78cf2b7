"""The score matrix G of an operator F = GᵀG, as an operator itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherops._linop import TorchLinearOperator, Transposed
from fisherops._sums import CompensatedSum
from fisherops.scores import HeldScores

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
        with fisher._ordered_pass("rows") as batches:
            self._counts = [scores.count for scores in batches]
        super().__init__((sum(self._counts), fisher.shape[1]), fisher.torch_dtype, fisher.device)

    def _apply(self, V: Tensor) -> Tensor:
        with self._fisher._ordered_pass("scores") as batches:
            blocks = [
                torch.cat([scores.apply(columns) for columns in V.split(scores.columns, dim=1)], 1)
                for scores in batches
            ]
        return torch.cat(blocks)

    def _apply_transposed(self, W: Tensor) -> Tensor:
        total = CompensatedSum()
        with self._fisher._ordered_pass("transposed scores") as batches:
            for scores, own in zip(batches, W.split(self._counts), strict=True):
                blocks = [scores.apply_transposed(w).T for w in own.split(scores.columns, dim=1)]
                total.add((torch.cat(blocks) if len(blocks) > 1 else blocks[0]).T)
        return total.value()

    def _transpose(self) -> Transposed:
        return Transposed(self)

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
            result = self._gram_of_held(batches) if isinstance(batches, list) else None
        if result is None:
            result = torch.empty(R, R, dtype=self.torch_dtype, device=self.device)
            for start in range(0, R, _BLOCK):
                width = min(_BLOCK, R - start)
                identity = torch.zeros(R, width, dtype=self.torch_dtype, device=self.device)
                identity.diagonal(-start)[:width] = 1
                result[:, start : start + width] = self._apply(self._apply_transposed(identity))
            result = (result + result.T).div_(2)
        return result

    def _gram_of_held(self, batches: list[Any]) -> Tensor | None:
        if not all(isinstance(scores, HeldScores) for scores in batches):
            return None
        R = self.shape[0]
        result = torch.empty(R, R, dtype=self.torch_dtype, device=self.device)
        row = 0
        for k, scores in enumerate(batches):
            column = row
            for other in batches[k:]:
                block = scores.gram(other)
                if block is None:
                    return None
                mine, theirs = slice(row, row + scores.count), slice(column, column + other.count)
                if other is scores:
                    result[mine, mine] = (block + block.T).div_(2)
                else:
                    result[mine, theirs] = block
                    result[theirs, mine] = block.T
                column += other.count
            row += scores.count
        return result
