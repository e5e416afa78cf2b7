"""The score matrix G of a problem and its data, F = GᵀG, as an operator itself."""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fisherops import _torch
from fisherops._checks import noting
from fisherops._linop import TorchLinearOperator, Transposed, check_result, identity, opaque
from fisherops._memory import is_memory_error
from fisherops._ranks import Alone, fingerprint
from fisherops._sharding import Sharding
from fisherops._sums import CompensatedSum
from fisherops.problem import Parameters
from fisherops.scores import (
    BatchScores,
    Cache,
    Kind,
    LazyBatch,
    MaterializedBatch,
    Plan,
    compute,
    sharded,
)
from fisherops.scores.reader import Reader

# Columns of a product are taken together up to this size, but a few at least.
_CHUNK_BYTES = 2**24
_FEW_COLUMNS = 8

# Rows that are summed in the compute precision without compensation.
_ROWS_PER_SUM = 4096

# Rows of the Gram matrix that are summed over ranks at a time.
_FEW_ROWS = 128

# What the ranks of a process group compare before they sum.
_VECTORS = (
    "the checksum of the vectors (SciPy's solvers draw others on each rank unless v0 or rng is given; "
    "ranks with other processors or numbers of threads round differently)"
)

Result = TypeVar("Result")
Item = TypeVar("Item")


class Kept(NamedTuple):
    """What all ranks cache, and the memory that is left on the one with the least."""

    nbytes: int
    memory_left: int
    holds_rows: bool


class ScoreMatrix(TorchLinearOperator):
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
    ranks : Alone
        The processes among which the data are divided.

    Attributes
    ----------
    shape : tuple of int
        (rows, D).
    is_divided : bool
        Whether vectors (K, D) are divided among the processes, so that each has its pieces (K, d).
    """

    def __init__(self, reader: Reader, *, cache: str, max_memory: int, spill: Any, ranks: Alone) -> None:
        self._reader, self.problem = reader, reader.problem
        self._asked, self.max_memory, self._spill, self._ranks = cache, max_memory, spill, ranks
        self.sharding = Sharding(self.parameters.tensors, ranks) if self.problem.sharded else None
        self.is_divided = self.sharding is not None
        self._cache: Cache | None = None
        self._version, self._refreshes = -1, 0
        self._counts: list[int] | None = None
        self._by_rank: list[int] | None = None
        self._number = ranks.number()
        D = self.parameters.numel
        super().__init__((D, D), self.parameters.dtype, self.parameters.device)
        with self._step("construction", **self._identity()):
            if self.sharding is not None or (ranks.size > 1 and not reader.checks):
                self._read_once()  # which data are whose must be known before the first draw
            if reader.checks:
                reader.check()

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same on all ranks."""
        if self._ranks.size == 1:
            return {}
        reader, likelihood = self._reader, self.problem.likelihood
        return {
            "the operator": reader.name,
            "the dtype": str(self.torch_dtype),
            "the loss": f"{type(likelihood).__name__} ({', '.join(likelihood.reductions)})",
            "the checksum of the loss's options": fingerprint(likelihood),
            "the shapes of the parameters": {name: tuple(shape) for name, shape in self.parameters.shapes.items()},
            "the checksum of the parameters": self.parameter_checksum,
            "the checksum of all parameters and buffers of the model": self._checksum_of_model(),
            "check_deterministic": reader.checks,
            "rows": "datum" if reader.sums else "term",
            **self.kind.identity(),
        }

    def _read_once(self) -> None:
        counts = self._ranks.share(self._reader.count())
        if self.sharding is not None and len(set(counts)) > 1:
            raise ValueError(
                f"a sharded model is evaluated by all ranks together, and they have {', '.join(map(str, counts))} "
                "batches: give them equally many."
            )

    # ---- What it is ---------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, D), the rows of all ranks; found by a pass over the data if there was none."""
        if self._counts is None:
            _ = self.plan
        if self._by_rank is None:
            with self._step("rows"):
                self._by_rank = self._ranks.share(sum(self._counts or ()))
        return sum(self._by_rank), self.parameters.numel

    @shape.setter
    def shape(self, _: Any) -> None:
        """Do nothing: SciPy's constructor sets a shape."""

    @property
    def parameters(self) -> Parameters:
        """The parameters, which the columns belong to."""
        return self.problem.parameters

    @property
    def kind(self) -> Kind:
        """Which vectors make the output factor."""
        return self._reader.kind

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kind, as one of a stack has it."""
        return frozenset([self.kind])

    @property
    def parts(self) -> tuple[tuple[float, ScoreMatrix], ...]:
        """Itself with the factor 1, as one of a stack."""
        return ((1.0, self),)

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of the loss."""
        return tuple(self.problem.likelihood.reductions)

    @property
    def num_data(self) -> int | None:
        """Number of data on this rank, if they were read."""
        return self._reader.data.num_data

    @property
    def version(self) -> int:
        """A number that grows whenever the model, its tensors or the loss were seen to change."""
        return self.problem.look() + self._refreshes

    @property
    def ranks(self) -> Alone:
        """The processes among which the data are divided."""
        return self._ranks

    @property
    def rows_have_order(self) -> bool:
        """Whether every pass lists the rows in the same order, as products with G need it."""
        _ = self.plan
        assert self._cache is not None
        with self._step("order of the rows"):
            return all(self._ranks.share(not self._reader.data.order_is_free or self._cache.is_complete))

    @property
    def kept(self) -> Kept:
        """What is cached between products on all ranks together."""
        plan = self.plan
        with self._step("what is kept"):
            own = plan.nbytes + plan.file_size, self.max_memory - plan.nbytes, plan.holds_rows
            shares = self._ranks.share(own)
        nbytes, left, rows = zip(*shares, strict=True)
        return Kept(sum(nbytes), min(left), all(rows))

    @property
    @opaque
    def plan(self) -> Plan:
        """What is cached between products, its memory and why; made by a pass over the data if there was none."""
        if self._cache is None or self._version != self.problem.look():
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
        return self._checksum(self.parameters.point().values())

    def redrawn(self, kind: Kind) -> ScoreMatrix:
        """Return G of the same problem and data with other draws; what was learnt about these is shared."""
        other = copy.copy(self)
        other._reader = self._reader.of_kind(kind)
        other._number = self._ranks.number()
        other._counts = other._by_rank = None
        with self._step("resampling", **kind.identity()):
            cache = None
            if self._cache is not None and self._version == self.problem.look():
                with self.problem.isolated(), torch.no_grad():
                    cache = self._cache.redrawn(kind, kind.sampler(self._ranks.rank, self.device))
            # All ranks share what was learnt, or none does.
            shared = all(self._ranks.share(cache is not None))
        other._cache, other._version = (cache, self._version) if shared else (None, -1)
        other._counts = self._counts if shared else None
        return other

    def __getstate__(self) -> dict[str, Any]:
        # Graphs cannot be copied; what is cached is found again. SciPy has a state of its own from 1.18 on.
        return {**super().__getstate__(), "_cache": None, "_version": -1}

    # ---- Products -----------------------------------------------------------------------------

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (K, D) → (K, D); each rank's pieces (K, d) if the parameters are sharded."""
        if self.sharding is not None:
            sharding, spans = self.sharding, self.parameters.spans

            def product(held: list[MaterializedBatch]) -> Tensor:
                products = sharded.apply(held, sharding, spans, V.T)
                return sharded.apply_transposed(held, sharding, spans, products).T

            return self._over_held("product", product, V)
        return self._over("product", lambda batches: self._sum_of_products(batches, V), V)

    def _mul(self, V: Tensor) -> Tensor:
        if self.sharding is not None:
            sharding, spans = self.sharding, self.parameters.spans

            def gathered(held: list[MaterializedBatch]) -> Tensor:
                products = sharded.apply(held, sharding, spans, V.T)
                return torch.cat(self._ranks.gather(torch.cat(products, 1).T)).T

            return self._over_held("scores", gathered, V)

        def product(batches: Iterable[BatchScores]) -> Tensor:
            own = [
                torch.cat([batch.apply(part) for part in V.contiguous().split(batch.columns)]).T for batch in batches
            ]
            return torch.cat(self._ranks.gather(torch.cat(own) if own else V.new_empty(0, len(V)))).T

        return self._over_in_order("scores", product, V)

    def _mul_t(self, W: Tensor) -> Tensor:
        if self.sharding is not None:
            sharding, spans, products = self.sharding, self.parameters.spans, self._own(W)
            return self._over_held(
                "transposed scores", lambda held: sharded.apply_transposed(held, sharding, spans, products).T, W
            )
        total = CompensatedSum(W.new_empty(len(W), self.parameters.numel))

        def product(batches: Iterable[BatchScores]) -> Tensor:
            for batch, own in zip(batches, self._own(W), strict=True):
                parts = [batch.apply_t(part.contiguous()) for part in own.split(batch.columns)]
                total.add(torch.cat(parts) if len(parts) > 1 else parts[0])
            return self._ranks.sum(total.value())

        return self._over_in_order("transposed scores", product, W)

    def _own(self, W: Tensor) -> Any:
        """Return the pieces of vectors (K, rows) for this rank's batches."""
        _ = self.shape
        assert self._by_rank is not None
        assert self._counts is not None
        start = sum(self._by_rank[: self._ranks.rank])
        return W[:, start : start + sum(self._counts)].split(self._counts, 1)

    def _transpose(self) -> Transposed:
        return Transposed(self) if self.sharding is None else _TransposedPieces(self)

    def multiply(self, V: Tensor) -> Tensor:
        """Multiply G; from a DTensor (K, D) where the parameters are sharded."""
        sharding = self.sharding
        if sharding is None:
            return super().multiply(V)
        local = sharding.local(V.T).T.to(self.torch_dtype)
        return check_result(self._mul(local), local)

    def _sum_of_products(self, batches: Iterable[BatchScores], V: Tensor) -> Tensor:
        # Few vectors at a time, whose memory is used again for the next; as many on all ranks.
        step = max(_FEW_COLUMNS, _CHUNK_BYTES // (V.shape[1] * V.itemsize))
        if len(V) <= step:
            total = CompensatedSum(V)
            for batch in batches:
                total.add(_product(batch, V.contiguous()))
            return self._ranks.sum(total.value())
        # The sum of a block over the ranks is under way while the next block is multiplied.
        sums = _one_ahead(map(self._ranks.begin_sum, _sums_of_products(batches, V.split(step))))
        result = torch.empty_like(V, memory_format=torch.contiguous_format)
        for rows, pending in zip(result.split(step), sums, strict=True):
            rows.copy_(pending.value())
        return result

    # ---- What F = GᵀG asks --------------------------------------------------------------------

    def dense(self) -> Tensor:
        """Return GᵀG as a matrix (D, D), from the rows."""
        if self.sharding is not None:
            raise NotImplementedError("the parameters are sharded, and F as a dense matrix would be on every rank.")
        D = self.parameters.numel

        def dense(batches: Iterable[BatchScores]) -> Tensor:
            return self._sum((part for batch in batches for part in _squares(batch)), D, D)

        return check_result(self._over("dense", dense))

    def col_norms(self) -> Tensor:
        """Return the squared norms of the columns, (D,): the diagonal of F; (d,) if the parameters are sharded."""
        if self.sharding is not None:
            sharding = self.sharding
            return check_result(
                self._over_held("diagonal", lambda held: sharded.diagonal(held, sharding, self.parameters.spans))
            )
        D = self.parameters.numel
        return check_result(
            self._over("diagonal", lambda batches: self._sum((batch.diagonal() for batch in batches), D))
        )

    def square_norm(self) -> float:
        """Return the squared Frobenius norm, which is the trace of F."""
        norms = self.col_norms()
        if self.sharding is None:
            total = float(norms.sum(dtype=torch.float64))
            limits = torch.finfo(self.torch_dtype)
            return total if total > limits.tiny / limits.eps else self._square_norm_of_rows()
        with self._step("trace"):
            return float(self._ranks.sum(norms.sum(dtype=torch.float64)))

    def _square_norm_of_rows(self) -> float:
        """Sum the squares in float64, which are below the range of the compute precision."""

        def norm(batches: Iterable[BatchScores]) -> Tensor:
            squares = (rows.double().square().sum() for batch in batches for rows in batch.rows())
            return self._sum(squares, dtype=torch.float64)

        return float(self._over("trace", norm))

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
                for block in _rows_or_columns(batch, D, self.torch_dtype, self.device):
                    block = check_result(block)[(block != 0).any(1)]
                    blocks.append(block.double())
                    rows += len(block)
                    if triangular and rows > 2 * D:
                        blocks = [torch.linalg.qr(torch.cat(blocks), mode="r")[1]]
                        rows = len(blocks[0])
            return torch.cat(self._ranks.gather(torch.cat(blocks)))

        B = self._over("square root", root)
        return torch.linalg.qr(B, mode="r")[1] if triangular and len(B) > D else B

    def gradient(self) -> Tensor:
        """Return the gradient of the loss over all data, (D,)."""
        if self.sharding is not None:
            raise NotImplementedError(
                "the gradient of sharded parameters is not supported. Compute it by `loss.backward()` and pass "
                "`{name: p.grad}` to `linalg.natural_gradient`."
            )
        D = self.parameters.numel
        return check_result(
            self._over("gradient", lambda gradients: self._sum(gradients, D), read=self._reader.gradients)
        )

    def moments_of_forms(self, V: Tensor) -> Tensor:
        """Sum the variance and the second moment of vᵀFv over the M samples of each term, (2, K) in float64."""
        M = self.kind.samples

        def moments(batches: Iterable[BatchScores]) -> Tensor:
            forms = (batch.apply(V).double().square().view(len(V), -1, M) for batch in batches)
            sums = (torch.stack([own.var(2).sum(1), own.square().mean(2).sum(1)]) for own in forms)
            return self._sum(sums, 2, len(V), dtype=torch.float64)

        def drawn(batches: Iterator[Any]) -> Iterator[BatchScores]:
            for batch, evaluation, factor_of in self._reader.evaluations(batches):
                with noting(f"batch {batch.number}"):
                    yield compute(evaluation, factor_of, compressed=False)

        return check_result(self._over("standard error", moments, V, read=drawn), V)

    def gram(self) -> np.ndarray[Any, Any]:
        """Return the Gram matrix G Gᵀ as a NumPy array of shape (rows, rows).

        Its nonzero eigenvalues are those of F. Where rows are cached, it is found from them by blocks: for factors Σ (A
        Aᵀ) ∘ (B Bᵀ) over the layers; otherwise by products with G and Gᵀ, one of each for every row.
        """
        return self.gram_tensor().cpu().numpy()

    @opaque
    def gram_tensor(self) -> Tensor:
        """Return the Gram matrix as a torch tensor on the operator's device; see `gram`."""
        R = self.shape[0]

        def gram(batches: Iterable[BatchScores]) -> Tensor | None:
            return self._gram_of_held(batches if isinstance(batches, list) else None)

        result: Tensor | None = self._over_in_order("Gram matrix", gram)
        if result is None:
            with torch.no_grad():
                blocks = [self._mul(self._mul_t(rows)) for rows in identity(R, self.torch_dtype, self.device)]
            result = torch.cat(blocks) if blocks else torch.empty(0, 0, dtype=self.torch_dtype, device=self.device)
            result = (result + result.T).div_(2)
        return check_result(result)

    def cross(self, other: ScoreMatrix) -> Tensor | None:
        """Multiply with the transpose of another score matrix of the same parameters, if both have cached all rows."""
        if self._ranks.size > 1 or self.parameters.spans != other.parameters.spans:
            return None

        def held(batches: Any) -> list[MaterializedBatch] | None:
            own = list(batches)
            return own if all(isinstance(batch, MaterializedBatch) for batch in own) else None

        if not self.kept.holds_rows or not other.kept.holds_rows:
            return None
        mine, theirs = self._over_in_order("rows", held), other._over_in_order("rows", held)
        if mine is None or theirs is None:
            return None
        return check_result(torch.cat([torch.cat([left.gram(right) for right in theirs], 1) for left in mine]))

    def _gram_of_held(self, batches: list[BatchScores] | None) -> Tensor | None:
        """Multiply every two batches that are cached, whatever rank has them; None if some are not."""
        ranks = self._ranks
        own = [batch for batch in batches or [] if isinstance(batch, MaterializedBatch)]
        known = ranks.share(len(own) if batches is not None and len(own) == len(batches) else None)
        if None in known:
            return None
        if ranks.size > 1:
            own = [batch.without_graphs() for batch in own]
        # A rank fills in the blocks that it finds, and leaves zeros for the others.
        assert self._by_rank is not None
        R, first = sum(self._by_rank), sum(self._by_rank[: ranks.rank])
        result = torch.zeros(R, R, dtype=self.torch_dtype, device=self.device)
        column = 0
        for source, count in enumerate(known):
            for k in range(count):
                other = ranks.broadcast(own[k] if source == ranks.rank else None, source)
                row = first
                for j, batch in enumerate(own):
                    mine, theirs = slice(row, row + batch.count), slice(column, column + other.count)
                    row += batch.count
                    if source == ranks.rank and j == k:
                        block = batch.gram(batch)
                        result[mine, mine] = (block + block.T).div_(2)
                    elif j < k if source == ranks.rank else _falls_to(ranks.rank, source, ranks.size):
                        block = batch.gram(other)
                        result[mine, theirs] = block
                        result[theirs, mine] = block.T
                column += other.count
        if ranks.size > 1:
            for rows in result.split(_FEW_ROWS):
                rows.copy_(ranks.sum(rows))
        return result

    # ---- Passes over the batches --------------------------------------------------------------

    def _over(
        self,
        description: str,
        function: Callable[[Any], Result],
        V: Tensor | None = None,
        read: Callable[[Iterator[Any]], Iterator[Any]] | None = None,
    ) -> Result:
        """Return ``function(batches)`` for all batches of G, which it must go through to the end.

        They are a list if all are cached; the others are found by reading the data. With `read` all data are read, and
        ``read(batches)`` is what the function gets.
        """
        version = self.problem.look()
        cache = self._cache if read is None and self._version == version else None
        if cache is not None and self._ranks.size == 1 and cache.is_complete:
            # Nothing of the process is touched: no lock, no random numbers.
            if not _torch.needs_own_precision(self.device):
                return function(cache.in_order())
            with _torch.own_precision(self.device):
                return function(cache.in_order())
        values: dict[str, Any] = {}
        if V is not None:
            values = {"the number of columns": len(V)}
            if self.sharding is None:
                values[_VECTORS] = self._ranks.checksum(V)
        # What a rank does next must not depend on more than the ranks have compared.
        values["whether the parameters are those of the last product"] = cache is not None
        with torch.no_grad(), self._step(description, **values):
            if cache is not None and cache.is_complete:
                with _torch.own_precision(self.device):
                    return function(cache.in_order())
            reader = self._reader
            with reader.reading(description) as batches:
                if read is not None or cache is not None or self._spill is not None or self._asked == "none":
                    reader.divisor()
                    return function(read(batches) if read is not None else self._filled(batches, cache, version))
                if not reader.finds_c_late:
                    return function(self._filled(batches, None, version))
                # c is known when all data were read, and divides what is cached.
                deque(self._filled(batches, None, version), 0)
        return self._over(description, function, V)

    def _over_in_order(self, description: str, function: Callable[[Any], Result], V: Tensor | None = None) -> Result:
        """As `_over`, with batches that come in the same order every time, as the rows of G do."""
        self.require_order()
        return self._over(description, function, V)

    def require_order(self) -> None:
        """Raise ValueError if the rows have no order."""
        if not self.rows_have_order:
            raise ValueError(
                "the batches come in another order in every pass and are not all kept, so the rows of the score "
                "matrix have no order: pass data in a fixed order, or a larger max_memory."
            )

    def _over_held(
        self, description: str, function: Callable[[list[MaterializedBatch]], Tensor], V: Tensor | None = None
    ) -> Tensor:
        """As `_over`, where the parameters are sharded and so all batches are cached; vectors are not compared."""

        def held(batches: Iterable[BatchScores]) -> Tensor:
            return function([batch for batch in batches if isinstance(batch, MaterializedBatch)])

        return self._over(description, held, V)

    def _filled(self, batches: Iterator[Any], known: Cache | None, version: int) -> Iterator[BatchScores]:
        """Compute each batch that is not cached; if none is known yet, a new cache chooses the forms."""
        reader, cache, late = self._reader, known, self._reader.finds_c_late
        if cache is None:
            self._cache = None
            if self._ranks.size > 1:
                checksum = self._checksum_of_model()
                self._ranks.agree("parameters", **{"the checksum of the parameters and buffers": checksum})
            cache = Cache(self._asked, self.max_memory, self._spill)
        counts = []
        records = self._asked != "linearization"
        for batch, evaluation, factor_of in reader.evaluations(batches, () if known is None else known, records):
            with noting(f"batch {batch.number}"):
                if evaluation is None:
                    scores = cache.batch(batch.number)
                else:
                    scores = cache.add(evaluation, factor_of) if known is None else compute(evaluation, factor_of)
            counts.append(scores.count)
            yield scores
        is_stream = self.kind.order == "fixed"
        if not cache.is_complete and (reader.data.order_is_free or is_stream):
            why = "a stream of draws reads them all" if is_stream else "they come in another order each time"
            cache.forget(f"not all batches can be kept, and {why}")
        if known is not None:
            return
        if late:
            cache.divide(reader.divisor())
        self._cache, self._version, self._counts, self._by_rank = cache, version, counts, None

    def _step(self, description: str, **values: Any) -> AbstractContextManager[None]:
        """Do something together with the other ranks, which must pass the same values."""
        return self._ranks.step(f"{description} of operator {self._number}", **values)

    def _sum(self, terms: Iterable[Tensor], *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Sum over batches and ranks."""
        total = CompensatedSum(torch.empty(shape, dtype=dtype or self.torch_dtype, device=self.device))
        for term in terms:
            total.add(term)
        return self._ranks.sum(total.value())

    def _checksum_of_model(self) -> int:
        return self._checksum(self.problem.model.tensors())

    def _checksum(self, tensors: Iterable[Tensor]) -> int:
        checksum = zlib.crc32(repr([fingerprint(tensor) for tensor in tensors]).encode())
        if self.sharding is None:
            return checksum
        with self._step("checksum of the parameters"):
            return zlib.crc32(repr(self._ranks.share(checksum)).encode())


class _TransposedPieces(Transposed):
    """Gᵀ of sharded parameters, whose products are DTensors."""

    def _mul(self, W: Tensor) -> Any:
        return self._A.sharding.whole(self._A._mul_t(W).T, self.shape[0]).T


def _falls_to(rank: int, other: int, size: int) -> bool:
    """Whether the products of the rows of two ranks are found by the first, so that each rank has as many."""
    distance = (other - rank) % size
    return distance < size - distance or (2 * distance == size and rank < other)


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item when the next is made."""
    previous: list[Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _squares(batch: BatchScores) -> Iterator[Tensor]:
    """Return matrices (D, D) whose sum is GᵀG of a batch."""
    whole = batch.gram_of_columns() if isinstance(batch, LazyBatch) else None
    if whole is not None:
        yield whole
        return
    for rows in batch.rows():
        yield from (block.T @ block for block in rows.split(_ROWS_PER_SUM))


def _rows_or_columns(batch: BatchScores, D: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """List G of a batch in blocks of rows (r, D): by its D columns if there are fewer of them than rows."""
    if batch.count < D:
        for rows in batch.rows():
            yield from rows.split(_ROWS_PER_SUM)
    else:
        yield torch.cat([batch.apply(units) for units in identity(D, dtype, device, batch.columns)]).T


def _sums_of_products(batches: Iterable[BatchScores], blocks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Sum GᵀG V over batches for blocks of V, one after the other; but data are read once for all blocks."""
    in_memory = type(batches) is list
    for group in [[V] for V in blocks] if in_memory else [blocks]:
        totals = deque(CompensatedSum(V) for V in group)
        for batch in batches:
            for total, V in zip(totals, group, strict=True):
                total.add(_product(batch, V.contiguous()))
        while totals:
            yield totals.popleft().value()


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
