"""The score matrix G of a problem and its data, F = GᵀG, as an operator itself."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fisherops import _torch
from fisherops._checks import noting
from fisherops._data import Batch
from fisherops._fingerprint import checksum_of
from fisherops._linop import check_result
from fisherops._memory import as_bytes, as_folder, is_memory_error
from fisherops._sizes import SIZES, Sizes
from fisherops._sums import CompensatedSum
from fisherops._torch import opaque
from fisherops.problem import Evaluation, Parameters
from fisherops.scores import (
    CACHES,
    BatchScores,
    Cache,
    Kind,
    LazyBatch,
    MaterializedBatch,
    Plan,
    compute,
)
from fisherops.scores.batch import gram_of_batches
from fisherops.scores.cache import uses_of
from fisherops.scores.gram import panels_by_rows, panels_of_batches, parts_of_batches
from fisherops.scores.kinds import FactorOf, kind_of
from fisherops.scores.lazy import rows_or_columns, squares_of
from fisherops.scores.projection import Signs, projected
from fisherops.scores.protocol import CacheSize, Scores, Sums, SumsOfUses, by_rows, clipped
from fisherops.scores.reader import Reader, as_weights

# Columns of a product are taken together up to some size, but a few at least.
_FEW_COLUMNS = 8

# Entries of each vector that are copied at once into another order of memory.
_PIECE = 2**12

NO_ORDER = (
    "the batches come in another order in every pass and are not all kept, so the rows of the score matrix have no "
    "order: pass data in a fixed order, or a larger max_memory."
)

Result = TypeVar("Result")


class BatchedScores(Scores):
    """A score matrix whose rows are those of batches, one after the other."""

    # ---- What a subclass says -----------------------------------------------------------------

    def _over(self, description: str, function: Callable[[Any], Result]) -> Result:
        """Return ``function(batches)`` for all batches of G, which it must go through to the end."""
        raise NotImplementedError

    def _over_in_order(self, description: str, function: Callable[[Any], Result]) -> Result:
        """As `_over`, with batches that come in the same order every time, as the rows of G do."""
        self.require_order()
        return self._over(description, function)

    def materialized(self) -> list[MaterializedBatch] | None:
        """Return all batches, always in the same order, if the rows of each are cached."""
        raise NotImplementedError

    def storable(self, folder: Path) -> list[MaterializedBatch]:  # noqa: ARG002
        """Return all batches without graphs, some of them in files in a folder."""
        return self.materialized() or []

    # ---- Products -----------------------------------------------------------------------------

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (K, D) → (K, D)."""
        return self._over("product", partial(_sum_of_products, V))

    def _mul(self, V: Tensor) -> Tensor:
        def product(batches: Iterable[BatchScores]) -> Tensor:
            own = [
                torch.cat([batch.apply(part) for part in V.contiguous().split(batch.columns)]).T for batch in batches
            ]
            return torch.cat(own).T if own else V.new_empty(len(V), 0)

        return self._over_in_order("scores", product)

    def _mul_t(self, W: Tensor) -> Tensor:
        total = CompensatedSum(W.new_empty(len(W), self.parameters.numel))

        def product(batches: Iterable[BatchScores]) -> Tensor:
            first = 0
            for batch in batches:
                own = W[:, first : first + batch.count]
                first += batch.count
                parts = [batch.apply_t(part.contiguous()) for part in own.split(batch.columns)]
                total.add(torch.cat(parts) if len(parts) > 1 else parts[0])
            return total.value()

        return self._over_in_order("transposed scores", product)

    # ---- What F = GᵀG asks --------------------------------------------------------------------

    def dense(self) -> Tensor:
        """Return GᵀG as a matrix (D, D), from the rows."""
        return check_result(self.sum_of_squares())

    def sum_of_squares(self) -> Tensor:
        """Return GᵀG as `dense` does, finite or not."""
        D = self.parameters.numel

        def dense(batches: Iterable[BatchScores]) -> Tensor:
            return self._sum((part for batch in batches for part in squares_of(batch)), D, D)

        with _torch.full_precision():
            return self._over("dense", dense)

    def col_squares(self) -> Tensor:
        """Return the squared norms of the columns, (D,): the diagonal of F."""
        return check_result(self.sum_of_diagonals())

    def sum_of_diagonals(self) -> Tensor:
        """Return the squared norms of the columns as `col_squares` does, finite or not."""
        D = self.parameters.numel
        return self._over("diagonal", lambda batches: self._sum((batch.diagonal() for batch in batches), D))

    def square_norm(self) -> float:
        """Return the squared Frobenius norm, which is the trace of F, by the rows or columns, whichever is cheaper."""
        return float(check_result(self.sum_of_squared_norms()))

    def sum_of_squared_norms(self) -> Tensor:
        """Return the squared Frobenius norm in float64, finite or not."""
        squares = partial(self._sum, dtype=torch.float64)
        return self._over("trace", lambda batches: squares(batch.square_norm() for batch in batches))

    def square_root(self, triangular: bool) -> Tensor:
        """Return B in float64 with BᵀB = F: the rows of G that are not zero, or the triangle R of G = QR.

        Products with B keep the digits that F loses, because the condition number of F is the square of that of B.

        Parameters
        ----------
        triangular : bool
            Whether to return at most D rows. The rows of G are then joined to R a block at a time.

        Returns
        -------
        torch.Tensor
            (n, D).
        """
        D = self.parameters.numel

        def root(batches: Iterable[BatchScores]) -> Tensor:
            blocks, rows = [torch.empty(0, D, dtype=torch.float64, device=self.device)], 0
            for batch in batches:
                for block in rows_or_columns(batch, D, self.torch_dtype, self.device):
                    block = check_result(block)[(block != 0).any(1)]
                    blocks.append(block.double())
                    rows += len(block)
                    if triangular and rows > 2 * D:
                        blocks = [torch.linalg.qr(torch.cat(blocks), mode="r")[1]]
                        rows = len(blocks[0])
            return torch.cat(blocks)

        B = self._over("square root", root)
        return torch.linalg.qr(B, mode="r")[1] if triangular and len(B) > D else B

    # ---- Its rows -----------------------------------------------------------------------------

    def block(self, start: int, stop: int) -> Tensor:
        """Return some rows, (stop − start, D)."""

        def rows(batches: Iterable[BatchScores]) -> Tensor:
            result = torch.empty(stop - start, self.parameters.numel, dtype=self.torch_dtype, device=self.device)
            first = 0
            for batch in batches:
                low, high = clipped(start - first, stop - first, batch.count)
                if low < high:
                    own = result[first + low - start : first + high - start]
                    deque(batch.rows(low, high, out=own), 0)
                first += batch.count
            return result

        return self._over_in_order("rows", rows)

    def row_squares(self) -> Tensor:
        """Return the squared norms of the rows, (rows,) in float64."""
        empty = torch.empty(0, dtype=torch.float64, device=self.device)
        return self._over_in_order(
            "norms of the rows", lambda batches: torch.cat([empty, *(batch.row_squares() for batch in batches)])
        )

    def projected(self, signs: Signs) -> Tensor:
        """Multiply with random signs (D, k), from factors where there are some: (rows, k)."""
        if signs.parameters.shapes != self.parameters.shapes:
            return super().projected(signs)
        empty = torch.empty(0, signs.k, dtype=self.torch_dtype, device=self.device)

        def rows(batches: Iterable[BatchScores]) -> Tensor:
            return torch.cat([empty, *(projected(batch, signs) for batch in batches)])

        return self._over_in_order("projection", rows)

    def cross(self, other: Scores, scale: Tensor | None = None) -> Tensor:
        """Multiply G diag(scale) Hᵀ: (rows, rows of H), from the rows of both if they are cached."""
        if isinstance(other, BatchedScores) and self.parameters.spans == other.parameters.spans:
            mine = self.materialized()
            theirs = mine if other is self else other.materialized()
            if mine and theirs:
                return gram_of_batches(mine, theirs, scale)
        return by_rows(self, other, scale)

    def blocks_of_gram(self, other: Scores, step: int) -> Iterator[Tensor]:
        """List G Hᵀ in blocks (b, rows of H), b ≤ `step` or the rows of an example, from those cached if all are."""
        mine = self.materialized()
        theirs = other.materialized() if isinstance(other, BatchedScores) and self.has_columns_of(other) else None
        if not mine or not theirs:
            yield from super().blocks_of_gram(other, step)
            return
        for _, part, own in parts_of_batches(mine, 0, self.num_rows, step):
            yield gram_of_batches([part], theirs, None)[own]

    gram_is_by_panels = True

    def panels_of_gram(self, width: int, first: int = 0, scale: Tensor | None = None) -> Iterator[Tensor]:
        """List K[a:, a:b] of K = G diag(scale) Gᵀ for panels of `width` columns, from the one of number `first` on."""
        batches = self.materialized() if self.num_rows > width else None
        if self.num_rows <= width:
            panels = super().panels_of_gram(width, first, scale)
        elif batches:
            panels = panels_of_batches(batches, width, first, scale)
        else:
            panels = panels_by_rows(self, width, first, scale)
        for panel in panels:
            yield check_result(panel)

    def _sum(self, terms: Iterable[Tensor], *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Sum over batches."""
        total = CompensatedSum(torch.empty(shape, dtype=dtype or self.torch_dtype, device=self.device))
        for term in terms:
            total.add(term)
        return total.value()


class ScoreMatrix(BatchedScores):
    """The score matrix G of a Fisher, F = GᵀG: one row for each vector of each loss term, √(w/c) · gᵀJ.

    Made by ``op.scores``. Rows are ordered by batch, datum, term and vector; with ``rows="datum"`` by batch, datum and
    vector. There are ``min(mc_samples, C)`` vectors for the Monte-Carlo Fisher, at most C for the exact one, and one
    for the empirical one. ``svds(op.scores)``, ``op.scores @ v`` and ``op.scores.T @ w`` work as for any SciPy
    operator.

    It owns the passes over the data, and what is cached between products, at one version of the problem.

    Parameters
    ----------
    reader : Reader
        The problem, its data and the kind of output factor.
    cache, max_memory, spill
        What is cached between products, see `FisherMCLinearOperator`.

    Attributes
    ----------
    shape : tuple of int
        (rows, D).
    """

    def __init__(self, reader: Reader, *, cache: str, max_memory: Any, spill: Any) -> None:
        if cache not in CACHES:
            raise ValueError(f"`cache` must be one of {', '.join(map(repr, CACHES))}, got {cache!r}.")
        if reader.problem.is_divided and cache not in ("auto", "factors"):
            raise NotImplementedError(
                f"cache={cache!r} cannot be had where the parameters are sharded: use 'auto' or 'factors'."
            )
        self.reader, self.problem = reader, reader.problem
        self._asked, self._spill, self._memory = cache, as_folder(spill), max_memory
        self.max_memory = as_bytes(max_memory, self.problem.device)
        self._cache: Cache | None = None
        self._version, self._refreshes = -1, 0
        self._index: list[Tensor] = []
        self.shows_progress = reader.data.progressbar
        self.counts: list[int] | None = None
        """Rows of each batch, after the first pass that computes them; each such pass makes another list."""
        super().__init__()

    def check(self) -> None:
        """Check that the model is deterministic and the data do not change, if that was asked for."""
        if self.reader.checks:
            self.reader.check()

    # ---- What it is ---------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """Number of rows; found by a pass over the data if there was none."""
        if self.counts is None:
            _ = self.plan
        return sum(self.counts or ())

    @property
    def parameters(self) -> Parameters:
        """The parameters, which the columns belong to."""
        return self.problem.parameters

    @property
    def kind(self) -> Kind:
        """Which vectors make the output factor."""
        return self.reader.kind

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kind, as one of a stack has it."""
        return frozenset([self.kind])

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of the loss."""
        return self.reader.reductions

    @property
    def num_data(self) -> int | None:
        """Number of data, if they were read."""
        return self.reader.data.num_data

    @property
    def version(self) -> int:
        """A number that grows whenever the model, its tensors or the loss were seen to change."""
        return self.problem.look() + self._refreshes

    @property
    def is_current(self) -> bool:
        """Whether a pass has found G of the present model, some batches of which may be cached."""
        return self._cache is not None and self._version == self.problem.look()

    @property
    def is_cached(self) -> bool:
        """Whether all batches of G of the present model are cached."""
        return self.is_current and self._cache is not None and self._cache.is_complete

    @property
    def rows_have_order(self) -> bool:
        """Whether every pass lists the rows in the same order, as products with G need it."""
        _ = self.plan
        assert self._cache is not None
        return not self.reader.data.order_is_free or self._cache.is_complete

    @property
    def cache_size(self) -> CacheSize:
        """What is cached between products."""
        plan = self.plan
        return CacheSize(plan.nbytes + plan.file_size, self.max_memory - plan.nbytes, plan.holds_rows)

    @property
    @opaque
    def plan(self) -> Plan:
        """What is cached between products, its memory and why; made by a pass over the data if there was none."""
        if not self.is_current:
            self._over("plan", lambda batches: deque(batches, 0))
        assert self._cache is not None
        return self._cache.plan

    def refresh(self) -> None:
        """Forget what is cached; see `FisherMCLinearOperator.refresh`."""
        self._cache = None
        self._refreshes += 1

    @property
    def parameter_checksum(self) -> int:
        """A checksum of the present values of the parameters."""
        return checksum_of(self.parameters.point().values())

    def redrawn(self, kind: Kind) -> ScoreMatrix:
        """Return G of the same problem and data with other draws; what was learnt about these is shared."""
        other = copy.copy(self)
        other.reader = self.reader.of_kind(kind)
        other._cache, other.counts = None, None
        if self._cache is not None and self.is_current:
            with self.problem.isolated(), torch.no_grad():
                other._cache = self._cache.redrawn(kind, kind.sampler(self.reader.stream, self.device))
        if other._cache is not None:
            other._version, other.counts = self._version, self.counts
        return other

    def to(self, device: Any) -> ScoreMatrix:
        """Return G of the same problem, data and draws on another device; see `FisherOperator.to`."""
        reader = self.reader.to(_torch.as_device(device))
        return ScoreMatrix(reader, cache=self._asked, max_memory=self._memory, spill=self._spill)

    @opaque
    def on(
        self,
        data: Any,
        kind: str | None = None,
        *,
        reduction: str = "sum",
        mc_samples: int | None = None,
        seed: int | None = None,
        rows: str | None = None,
        cache: str = "auto",
        max_memory: int | str | None = None,
        spill: Any = None,
        batch_size: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        sample_weight: Any = None,
        progressbar: bool = False,
    ) -> ScoreMatrix:
        """Return the score matrix of other data for the same model, loss and parameters.

        What was learned about the model is shared, and the model is not checked again. Nothing is read before the first
        product.

        Parameters
        ----------
        data : iterable of (X, y) or (X, y, index), or a pair of arrays (X, y)
            As for the operator; one example, or none, are accepted too.
        kind : {"mc", "exact", "empirical", "outputs"}, optional
            Which rows: of the Monte-Carlo, the exact or the empirical Fisher; or the Jacobian J of the outputs f, with
            C rows for each term and without weights. f are the coordinates of the likelihood, as the loss arranges
            them: for ``BCELoss`` the logits, for ``PoissonNLLLoss(log_input=False)`` the logarithms of the rates.
            Default: that of this matrix.
        reduction : {"sum", "mean"}
            Whether rows are divided by √c, with c what the mean of the loss over these data divides by. Default: "sum":
            a row of kind "empirical" with rows="datum" is the gradient of the example's loss.
        mc_samples, seed : int, optional
            As for `FisherMCLinearOperator`, for kind "mc". Default: those of this matrix, or 1 and 2147483647.
        rows : {"term", "datum"}, optional
            As for `FisherMCLinearOperator`, for the kinds "mc" and "empirical". Default: as in this matrix, and "term"
            for the other kinds.
        cache, max_memory, spill, batch_size, batch_size_fn, sample_weight, progressbar
            As for `FisherMCLinearOperator`.

        Returns
        -------
        ScoreMatrix
            (rows, D).

        Raises
        ------
        ValueError, TypeError
            If an option, or the type of the data, does not fit.

        Examples
        --------
        Inner products of the gradients of test losses with those of the training data:

        >>> import torch, fisherops as fo
        >>> _ = torch.manual_seed(0)
        >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
        >>> op = fo.EmpiricalFisherLinearOperator(
        ...     torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(reduction="sum"), data=(X[:40], y[:40])
        ... )
        >>> op.scores.on((X[40:], y[40:])).gram(op.scores).shape
        (10, 40)
        """
        if reduction not in ("sum", "mean"):
            raise ValueError(f"`reduction` must be 'sum' or 'mean', got {reduction!r}.")
        chosen = kind_of(kind, self.kind, mc_samples, seed)
        if chosen.name == "outputs" and (reduction != "sum" or sample_weight is not None):
            raise ValueError("kind='outputs' has no weights and no mean: leave out `reduction` and `sample_weight`.")
        own = self.reader.data.of(
            data,
            batch_size=batch_size,
            order=chosen.order if sample_weight is None else chosen.order_with_weights,
            batch_size_fn=batch_size_fn,
            progressbar=progressbar,
        )
        weights = None if sample_weight is None else as_weights(sample_weight)
        reader = self.reader.of_data(own, chosen, rows=rows, reduction=reduction, weights=weights)
        return ScoreMatrix(reader, cache=cache, max_memory=max_memory, spill=spill)

    def __repr__(self) -> str:
        rows = "rows not counted yet" if self.counts is None else f"{sum(self.counts)} rows"
        return f"<{type(self).__name__}: {rows}, D={self.parameters.numel}, kind={self.kind.description}>"

    def __getstate__(self) -> dict[str, Any]:
        # Graphs cannot be copied; what is cached is found again. SciPy has a state of its own from 1.18 on.
        return {**super().__getstate__(), "_cache": None, "_version": -1}

    # ---- Sums over the data ---------------------------------------------------------------------

    def gradient(self) -> Tensor:
        """Return the gradient of the loss over all data, (D,)."""
        return check_result(self.sum_of_gradients())

    def sum_of_gradients(self) -> Tensor:
        """Return the gradient as `gradient` does, finite or not."""
        D = self.parameters.numel
        return self._over("gradient", lambda gradients: self._sum(gradients, D), read=self.reader.gradients)

    def moments_of_forms(self, V: Tensor) -> Tensor:
        """Sum the variance and the second moment of vᵀFv over the M samples of each term, (2, K) in float64."""
        return check_result(self.sum_of_moments(V), V)

    def sum_of_moments(self, V: Tensor) -> Tensor:
        """Return the moments as `moments_of_forms` does, finite or not."""
        M = self.kind.samples

        def moments(batches: Iterable[BatchScores]) -> Tensor:
            forms = (batch.apply(V).double().square().view(len(V), -1, M) for batch in batches)
            sums = (torch.stack([own.var(2).sum(1), own.square().mean(2).sum(1)]) for own in forms)
            return self._sum(sums, 2, len(V), dtype=torch.float64)

        def drawn(batches: Iterator[Any]) -> Iterator[BatchScores]:
            for batch, evaluation, factor_of in self.reader.evaluations(batches):
                with noting(f"batch {batch.number}"):
                    yield compute(evaluation, factor_of, compressed=False)

        return self._over("standard error", moments, read=drawn)

    # ---- Its rows -----------------------------------------------------------------------------

    @property
    def datum(self) -> np.ndarray[Any, Any]:
        """The index in the data set of the example that each row belongs to, (rows,) of int64.

        Of a loader that samples the examples in an order of its own it is known only if batches are (X, y, index).
        """
        self.require_order()
        data = self.reader.data
        if not data.is_indexed and not data.has_known_order:
            raise ValueError(
                "the DataLoader samples the examples in an order of its own, so it is not known which row is whose. "
                "Let it yield (X, y, index)."
            )
        _ = self.shape
        index = [torch.empty(0, dtype=torch.int64)]
        for own, count in zip(self._index, self.counts or (), strict=True):
            if count % len(own):
                raise ValueError(
                    f"{count} rows do not belong to {len(own)} examples in equal numbers, so the example of a row is "
                    "not known."
                )
            index.append(own.repeat_interleave(count // len(own)))
        return torch.cat(index).numpy()

    def materialized(self) -> list[MaterializedBatch] | None:
        """Return all batches, always in the same order, by their rows: cached, or made if they fit into what is left.

        They take as many backward passes as a datum has rows; products with every row take as many as a batch has.
        """
        plan = self.plan
        if plan.holds_rows:
            return self._over("rows", list[MaterializedBatch])

        def made(batches: Iterable[BatchScores]) -> list[MaterializedBatch] | None:
            found: list[MaterializedBatch] | None = []
            left = self.max_memory - plan.nbytes
            for batch in batches:
                if found is None:
                    continue
                own = batch.materialized(left) if isinstance(batch, LazyBatch) else batch
                if own is None or own.nbytes > left:
                    found = None
                    continue
                found.append(own)
                left -= own.nbytes
            return found

        return self._over("rows", made)

    def storable(self, folder: Path) -> list[MaterializedBatch]:
        """Return all batches without graphs, those that are not cached in files in a folder."""
        batches = self.materialized()
        if batches is None:
            other = ScoreMatrix(self.reader, cache="factors", max_memory=self.max_memory, spill=folder)
            batches = other.materialized() or []
        return [batch.without_graphs() for batch in batches]

    def over_uses(self, sums_of: SumsOfUses, kept: list[MaterializedBatch] | None = None) -> Sums:
        """Return sums over batches with the factors of every contraction; those cached otherwise are built again."""
        if not kept and self.is_cached and self.plan.holds_rows:
            cached = self._over("rows", list[MaterializedBatch])
            kept = cached if all(batch.has_factors for batch in cached) else kept
        if kept:
            return sums_of(kept)
        reader, left = self.reader, self.max_memory - (self.plan.nbytes if self.is_current else 0)

        def built(batches: Iterator[Any]) -> Iterator[MaterializedBatch]:
            nonlocal left
            for batch, evaluation, factor_of in reader.evaluations(batches):
                with noting(f"batch {batch.number}"):
                    uses = uses_of(evaluation, factor_of)
                left -= uses.nbytes
                if kept is not None and left >= 0:
                    kept.append(uses)
                yield uses

        with torch.no_grad(), reader.reading("uses") as items:
            is_late = reader.finds_c_late
            if not is_late:
                reader.divisor()
            sums = sums_of(built(items))
        if kept is not None and left < 0:
            kept.clear()
        if is_late:  # c is known when all data were read
            c = float(reader.divisor())
            for uses in kept or ():
                uses.scale(c**-0.5)
            powers = {key: 1 if key.is_of_rows else 0.5 if key.lists_rows else 0 for key in sums}
            sums = {key: value / c ** powers[key] for key, value in sums.items()}
        return sums

    # ---- Passes over the batches --------------------------------------------------------------

    def _over(
        self,
        description: str,
        function: Callable[[Any], Result],
        read: Callable[[Iterator[Any]], Iterator[Any]] | None = None,
    ) -> Result:
        """Return ``function(batches)`` for all batches of G, which it must go through to the end.

        They are a list if all are cached; the others are found by reading the data. With `read` all data are read, and
        ``read(batches)`` is what the function gets.
        """
        version = self.problem.look()
        cache = self._cache if read is None and self._version == version else None
        batches = None if cache is None else cache.in_order()
        if cache is not None and batches is not None:
            if not cache.plan.holds_rows:  # linearizations may evaluate the model again
                with _torch.EVALUATION, _torch.own_precision(self.device):
                    return function(batches)
            # Nothing of the process is touched: no lock, no random numbers.
            if not _torch.needs_own_precision(self.device):
                return function(batches)
            with _torch.own_precision(self.device):
                return function(batches)
        with torch.no_grad():
            reader = self.reader
            with reader.reading(description) as items:
                if read is not None or cache is not None or self._spill is not None or self._asked == "none":
                    reader.divisor()
                    return function(read(items) if read is not None else self._filled(items, cache, version))
                if not reader.finds_c_late:
                    return function(self._filled(items, None, version))
                # c is known when all data were read, and divides what is cached.
                deque(self._filled(items, None, version), 0)
        return self._over(description, function)

    def require_order(self) -> None:
        """Raise ValueError if the rows have no order."""
        if not self.rows_have_order:
            raise ValueError(NO_ORDER)

    def find(self, see: Callable[[Batch, Evaluation, FactorOf], object]) -> None:
        """Find G of all batches in one pass, and show `see` each batch, its evaluation, and what makes S."""
        version = self.problem.look()
        with torch.no_grad(), self.reader.reading("rows") as items:
            if not self.reader.finds_c_late:
                self.reader.divisor()
            deque(self._filled(items, None, version, see), 0)

    def _filled(
        self,
        batches: Iterator[Any],
        known: Cache | None,
        version: int,
        see: Callable[[Batch, Evaluation, FactorOf], object] | None = None,
    ) -> Iterator[BatchScores]:
        """Compute each batch that is not cached; if none is known yet, a new cache chooses the forms.

        The first batches that are cached are given when it is known whether all are, so that they can be merged.
        """
        reader, cache, late = self.reader, known, self.reader.finds_c_late
        if cache is None:
            self._cache = None
            cache = Cache(self._asked, self.max_memory, self._spill, reader.data.num_batches)
        counts, index, given = [], [], known is not None
        records = self._asked != "linearization"
        for batch, evaluation, factor_of in reader.evaluations(batches, () if known is None else known, records):
            with noting(f"batch {batch.number}"):
                if see is not None:
                    see(batch, evaluation, factor_of)
                if evaluation is None:
                    scores = cache.batch(batch.number)
                else:
                    scores = cache.add(evaluation, factor_of) if known is None else compute(evaluation, factor_of)
            counts.append(scores.count)
            index.append(batch.places.cpu())
            if not given and batch.number in cache:
                continue
            if not given:
                yield from map(cache.batch, range(batch.number))
                given = True
            yield scores
        is_stream = self.kind.order == "fixed"
        if not cache.is_complete and (reader.data.order_is_free or is_stream):
            why = "a stream of draws reads them all" if is_stream else "they come in another order each time"
            cache.forget(f"not all batches can be kept, and {why}")
        if known is not None:
            return
        if late:
            cache.divide(reader.divisor())
        cache.merge()
        self._cache, self._version, self.counts, self._index = cache, version, counts, index
        if not given:
            yield from cache.in_order() or ()


def column_step(V: Tensor, sizes: Sizes) -> int:
    """Return how many of the vectors (K, D) are multiplied together: few, whose memory is used again for the next."""
    return max(_FEW_COLUMNS, sizes.columns // (V.shape[1] * V.itemsize))


def _sum_of_products(V: Tensor, batches: Iterable[BatchScores]) -> Tensor:
    """Sum GᵀG V over batches; in blocks of V if it is large, but data are read once for all blocks."""
    step = column_step(V, SIZES[V.device])
    if len(V) <= step and V.is_contiguous():
        total = CompensatedSum(V)
        for batch in batches:
            total.add(_product(batch, V))
        return total.value()
    result = torch.empty_like(V)
    scratch = torch.empty_like(V[:step], memory_format=torch.contiguous_format)
    blocks = list(zip(V.split(step), result.split(step), strict=True))
    in_memory = type(batches) is list  # and not read from files
    for group in [[block] for block in blocks] if in_memory else [blocks]:
        totals = [CompensatedSum(out) for _, out in group]
        own = _copied(group[0][0], scratch)
        for batch in batches:
            for total, (block, _) in zip(totals, group, strict=True):
                total.add(_product(batch, own if in_memory else _copied(block, scratch)))
        for total, (_, out) in zip(totals, group, strict=True):
            _copied(total.value(), out)
    return result


def _copied(source: Tensor, out: Tensor) -> Tensor:
    """Copy vectors (K, D) into another order of memory, in pieces that stay in the processor's cache."""
    out = out[: len(source)]
    step = source.shape[1] if source.device.type != "cpu" or source.stride() == out.stride() else _PIECE
    for piece, own in zip(source.split(step, 1), out.split(step, 1), strict=True):
        own.copy_(piece)
    return out


def _product(batch: BatchScores, V: Tensor) -> Tensor:
    """Multiply GᵀG, (K, D), with as many vectors at once as memory allows."""
    products, done = [], 0
    while done < len(V):
        try:
            products.append(batch.product(V[done : done + batch.columns]))
        except (MemoryError, RuntimeError) as error:
            if batch.columns == 1 or not is_memory_error(error):
                raise
            batch.columns //= 2
        else:
            done += batch.columns
    return torch.cat(products) if len(products) > 1 else products[0]
