"""The rows of G through J and the output factor, computed anew for each batch and each product."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fisherops.problem.evaluation import Evaluation
from fisherops.scores.build import CannotHoldError, RowsBuilder
from fisherops.scores.factor import Factor
from fisherops.scores.rows import list_rows


class RecomputedScores:
    """G = Sᵀ J of one batch, where neither J nor G is kept.

    Its rows are ordered by block of S and then by vector: (B · R) × D.

    Parameters
    ----------
    evaluation : Evaluation
    factor : Factor
    size : int
        Number of data in the batch.
    """

    columns = 32
    """Columns that are differentiated together; each holds the activations of a batch."""

    def __init__(self, evaluation: Evaluation, factor: Factor, size: int) -> None:
        self._evaluation = evaluation
        self._factor = factor
        self._size = size

    @property
    def count(self) -> int:
        """Number of rows."""
        return self._factor.blocks * self._factor.rank

    def with_factor(self, factor: Factor) -> RecomputedScores:
        """Return the same with another output factor."""
        return RecomputedScores(self._evaluation, factor, self._size)

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (D, K) → (D, K)."""
        return self.apply_transposed(self.apply(V))

    def apply(self, V: Tensor) -> Tensor:
        """Multiply G: (D, K) → (B · R, K)."""
        factor = self._factor
        U = self._evaluation.jvp(V).reshape(V.shape[1], factor.blocks, factor.outputs)
        return factor.adjoint(U).flatten(1).T

    def apply_transposed(self, W: Tensor) -> Tensor:
        """Multiply Gᵀ: (B · R, K) → (D, K)."""
        factor = self._factor
        U = factor.apply(W.T.reshape(W.shape[1], factor.blocks, factor.rank))
        return self._evaluation.vjp(U.reshape(W.shape[1], *self._evaluation.outputs.shape))

    def diagonal(self) -> Tensor:
        """Return the squared norms of the columns, (D,)."""
        if self._evaluation.reached and not self._evaluation.custom_functions:
            try:
                # As many backward passes as a datum has rows, where `rows` may need one for each row of the batch.
                builder = RowsBuilder(self._evaluation, self._factor, self._size)
                if builder.nbytes("factors") <= 2 * self._evaluation.saved_bytes():
                    return builder.build("factors")[0].diagonal()
            except CannotHoldError:
                pass
        blocks = (rows.square().sum(0) for rows in self.rows())
        return sum(blocks, self._evaluation.outputs.new_zeros(self._evaluation.problem.parameters.numel))

    def rows(self) -> Iterator[Tensor]:
        """List G in blocks of rows (r, D)."""
        return list_rows(self._evaluation, self._factor.columns(), self._size)
