"""The rows of G through J and the output factor, computed anew for each batch and each product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherops._linop import identity
from fisherops._sizes import SIZES
from fisherops.likelihoods.factors import DenseFactor
from fisherops.problem.evaluation import Evaluation
from fisherops.scores.batch import ROWS_PER_SUM, MaterializedBatch
from fisherops.scores.build import CannotHoldError, RowsBuilder
from fisherops.scores.kinds import FactorOf, Kind, Sampler
from fisherops.scores.rows import list_rows

# Bytes of the factors that are made at once where none are kept: making them takes about four times as much.
_PART_BYTES = 2**20


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
        zeros = self._evaluation.outputs.new_zeros(D)
        if self.count // self._factor_of.size < D:
            try:
                return sum((part.diagonal() for part in self._parts()), zeros)
            except CannotHoldError:
                pass
        if self.count >= D:  # one product with J for each column
            return torch.cat([self.apply(units).square().sum(1) for units in self._units()])
        return sum((rows.square().sum(0) for rows in self.rows()), zeros)

    def _parts(self) -> Iterator[MaterializedBatch]:
        """List G with some of the vectors of S at a time, as factors.

        That takes as many backward passes as a datum has rows, and no memory for rows of all parameters.

        Raises
        ------
        CannotHoldError
            If rows do not belong to data, or those for one vector take much memory.
        """
        evaluation, rank = self._evaluation.recorded(), self.factor.rank
        nbytes = self._builder(evaluation, 0, 1).nbytes("factors")
        if nbytes > max(SIZES[evaluation.outputs.device].block, 2 * evaluation.saved_bytes()):
            raise CannotHoldError("rows for one vector take much memory")
        step = max(1, _PART_BYTES // max(1, nbytes))
        for start in range(0, rank, step):
            yield self._builder(evaluation, start, min(start + step, rank)).build("factors")[0]

    def materialized(self, limit: int) -> MaterializedBatch | None:
        """Return the batch by its rows, as factors, None if they take more bytes than a limit or cannot be held."""
        try:
            builder = self._builder(self._evaluation.recorded(), 0, self.factor.rank)
            return builder.build("factors")[0] if builder.nbytes("factors") <= limit else None
        except CannotHoldError:
            return None

    def _builder(self, evaluation: Evaluation, start: int, stop: int) -> RowsBuilder:
        """Return what builds the rows for some vectors of each block of S."""
        if not evaluation.reached or evaluation.custom_functions:
            raise CannotHoldError("rows of this batch are not looked for")
        part = DenseFactor(self.factor.vectors(start, stop, evaluation.outputs))
        return RowsBuilder(evaluation, part, self._factor_of.size)

    def gram_of_columns(self) -> Tensor | None:
        """Return GᵀG, (D, D), from the columns of G if they are few numbers; None if they are not."""
        D, f = self._evaluation.problem.parameters.numel, self._evaluation.outputs
        if self.count < D or D * self.count * f.itemsize > SIZES[f.device].block:
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
        blocks = self.factor.blocks
        try:
            return torch.cat([part.row_squares().view(blocks, -1) for part in self._parts()], 1).flatten()
        except CannotHoldError:
            rows = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in self.rows())
            return torch.cat([norms.square() for norms in rows])

    def square_norm(self) -> Tensor:
        """Return the squared Frobenius norm in float64."""
        total, limits = self.diagonal().sum(dtype=torch.float64), torch.finfo(self._evaluation.outputs.dtype)
        # Some squares may be outside of the range of the precision.
        is_in_range = limits.tiny / limits.eps < total < limits.max
        return total if is_in_range else self.row_squares().sum()


def squares_of(batch: MaterializedBatch | LazyBatch) -> Iterator[Tensor]:
    """Return matrices (D, D) whose sum is GᵀG of a batch."""
    whole = batch.gram_of_columns() if isinstance(batch, LazyBatch) else None
    if whole is not None:
        yield whole
        return
    for rows in batch.rows():
        yield from (block.T @ block for block in rows.split(ROWS_PER_SUM))


def rows_or_columns(
    batch: MaterializedBatch | LazyBatch, D: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """List G of a batch in blocks of rows (r, D): by its D columns if there are fewer of them than rows."""
    if batch.count < D:
        for rows in batch.rows():
            yield from rows.split(ROWS_PER_SUM)
    else:
        yield torch.cat([batch.apply(units) for units in identity(D, dtype, device, batch.columns)]).T
