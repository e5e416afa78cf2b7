"""The rows of G through J and the output factor, computed anew for each batch and each product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherops._linop import identity
from fisherops.problem.evaluation import Evaluation
from fisherops.scores.build import CannotHoldError, RowsBuilder
from fisherops.scores.kinds import FactorOf, Kind, Sampler
from fisherops.scores.rows import list_rows

# Bytes of the columns of G from which GᵀG is found at once.
_FEW_BYTES = 2**26


class LazyBatch:
    """G = Sᵀ J of one batch, where neither J nor G is kept, or J as a linearization.

    Its rows are ordered by block of S and then by vector: (B · R) × D.

    Parameters
    ----------
    evaluation : Evaluation
    factor_of : FactorOf
        What S is made from.
    compressed : bool
        Whether S has at most as many vectors as outputs.
    """

    columns = 32
    """Vectors that are differentiated together; each holds the activations of a batch."""

    def __init__(self, evaluation: Evaluation, factor_of: FactorOf, compressed: bool = True) -> None:
        self._evaluation, self._factor_of, self._compressed = evaluation, factor_of, compressed
        self.factor = factor_of(evaluation, compressed)
        """S."""

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.factor.blocks * self.factor.rank

    def redrawn(self, kind: Kind, sampler: Sampler | None) -> LazyBatch:
        """Return the same for other draws."""
        return LazyBatch(self._evaluation, self._factor_of.redrawn(kind, sampler))

    def divide(self, c: Tensor) -> None:
        """Take another divisor c of each head, in place."""
        self._factor_of = self._factor_of.divided(c)
        self.factor = self._factor_of(self._evaluation, self._compressed)

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (K, D) → (K, D)."""
        return self.apply_t(self.apply(V))

    def apply(self, V: Tensor) -> Tensor:
        """Multiply G: (K, D) → (K, B · R)."""
        factor = self.factor
        U = self._evaluation.jvp(V).reshape(len(V), factor.blocks, factor.outputs)
        return factor.adjoint(U).flatten(1)

    def apply_t(self, W: Tensor) -> Tensor:
        """Multiply Gᵀ: (K, B · R) → (K, D)."""
        factor = self.factor
        U = factor.apply(W.reshape(len(W), factor.blocks, factor.rank))
        return self._evaluation.vjp(U.reshape(len(W), *self._evaluation.outputs.shape))

    def diagonal(self) -> Tensor:
        """Return the squared norms of the columns, (D,)."""
        D = self._evaluation.problem.parameters.numel
        few = self.count // self._factor_of.size >= D  # one product with J for each column
        if not few and self._evaluation.reached and not self._evaluation.custom_functions:
            try:
                # As many backward passes as a datum has rows, where `rows` may need one for each row of the batch.
                builder = RowsBuilder(self._evaluation, self.factor, self._factor_of.size)
                if builder.nbytes("factors") <= 2 * self._evaluation.saved_bytes():
                    return builder.build("factors")[0].diagonal()
            except CannotHoldError:
                pass
        if few or self.count >= D:
            return torch.cat([self.apply(units).square().sum(1) for units in self._units()])
        blocks = (rows.square().sum(0) for rows in self.rows())
        return sum(blocks, self._evaluation.outputs.new_zeros(D))

    def gram_of_columns(self) -> Tensor | None:
        """Return GᵀG, (D, D), from the columns of G if they are few numbers; None if they are not."""
        D, f = self._evaluation.problem.parameters.numel, self._evaluation.outputs
        if self.count < D or D * self.count * f.itemsize > _FEW_BYTES:
            return None
        columns = torch.cat([self.apply(units) for units in self._units()])
        return columns @ columns.T

    def _units(self) -> Iterator[Tensor]:
        f = self._evaluation.outputs
        return identity(self._evaluation.problem.parameters.numel, f.dtype, f.device, self.columns)

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Iterator[Tensor]:
        """List the rows from `start` to `stop` in blocks (r, D), and write them to `out` (rows, D) if it is given."""
        stop = self.count if stop is None else stop
        first = 0
        for rows in list_rows(self._evaluation, self.factor, self._factor_of.size):
            part = rows[max(start - first, 0) : max(stop - first, 0)]
            if out is not None:
                out[max(first - start, 0) :][: len(part)] = part
            yield part
            first += len(rows)
            if first >= stop:
                return

    def row_squares(self) -> Tensor:
        """Return the squared norms of the rows, (rows,) in float64."""
        return torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square() for rows in self.rows()])

    def square_norm(self) -> Tensor:
        """Return the squared Frobenius norm in float64."""
        total, limits = self.diagonal().sum(dtype=torch.float64), torch.finfo(self._evaluation.outputs.dtype)
        # Some squares may be outside of the range of the precision.
        is_in_range = limits.tiny / limits.eps < total < limits.max
        return total if is_in_range else self.row_squares().sum()
