"""What every Fisher operator does: passes over the data, products, what is kept between them, and checks."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fisherops import _torch
from fisherops._checks import noting, prefixing
from fisherops._data import Batch, Data
from fisherops._draws import CounterDraws, CounterSampler, StreamSampler
from fisherops._linop import TorchLinearOperator, check_result, opaque
from fisherops._memory import as_bytes, as_folder, is_memory_error
from fisherops._ranks import Alone, fingerprint, ranks_of
from fisherops._sharding import Sharding
from fisherops._sums import CompensatedSum
from fisherops._tree import copied
from fisherops.distributed import with_indices
from fisherops.likelihoods import Draws, Likelihood, OutputFactor, Terms
from fisherops.problem import Evaluation, Parameters, Problem
from fisherops.score_matrix import ScoreMatrix
from fisherops.scores import (
    CACHES,
    InOrder,
    Keeper,
    MaterializedBatch,
    Plan,
    Scores,
    compute,
    sharded,
)

# Columns of a product are taken together up to this size, but a few at least.
_CHUNK_BYTES = 2**24
_FEW_COLUMNS = 8

# What the ranks of a process group compare before they sum.
_VECTORS = (
    "the checksum of the vectors (SciPy's solvers draw others on each rank unless v0 or rng is given; "
    "ranks with other processors or numbers of threads round differently)"
)

Item = TypeVar("Item")

# Rows that are summed in the compute precision without compensation.
_ROWS_PER_SUM = 4096


class Kept(NamedTuple):
    """What all ranks of an operator keep, and the memory that is left on the one with the least."""

    nbytes: int
    memory_left: int
    holds_rows: bool


class FisherOperator(TorchLinearOperator):
    """F = (1/c) Σ_b G_bᵀ G_b over the batches b of a data set; subclasses choose the output factor."""

    _kind: str
    """Which Fisher it is, as `repr` describes it."""
    _order = "any"
    """Which order of the examples F depends on, see `Data`."""
    _needs_targets = False
    _samples = 1
    """M, what sums over draws are divided by."""
    _any_loss = False
    """Whether losses are accepted that are not a likelihood."""

    @opaque
    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Any = None,
        data: Any = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        rows: str = "term",
        dtype: Any = None,
        batch_size: int | None = None,
        cache: str = "auto",
        max_memory: int | str | None = None,
        spill: Any = None,
        process_group: Any = None,
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"`cache` must be one of {', '.join(map(repr, CACHES))}, got {cache!r}.")
        if rows not in ("term", "datum"):
            raise ValueError(f"`rows` must be 'term' or 'datum', got {rows!r}.")
        self._rows = rows
        self._needs_terms_by_datum = rows == "datum"
        self._problem = Problem(model_func, loss_func, params, dtype=dtype, any_loss=self._any_loss)
        self._loss_name, self._num_data = _name_of_loss(loss_func), num_data
        self._ranks = ranks_of(process_group, self._problem.device)
        self._sharding = None
        if self._problem.sharded:
            if cache not in ("auto", "factors"):
                raise NotImplementedError(
                    f"cache={cache!r} cannot be had where the parameters are sharded: use 'auto' or 'factors'."
                )
            self._sharding = Sharding(self._parameters.tensors, self._ranks)
        self._data = Data(
            with_indices(data, self._ranks),
            device=self._parameters.device,
            dtype=self._parameters.dtype,
            convert=self._problem.model.converts,
            batch_size=batch_size,
            batch_size_fn=batch_size_fn,
            num_data=num_data,
            verify=check_deterministic,
            order=self._order,
            progressbar=progressbar,
            ranks=self._ranks,
        )
        self._cache = cache
        self._max_memory = as_bytes(max_memory, self._parameters.device)
        self._spill = as_folder(spill)
        self._keeper: Keeper | None = None
        self._version = -1
        self._refreshes = 0
        self._structure = self._loss_version = 0
        D = self._parameters.numel
        super().__init__((D, D), self._parameters.dtype, self._parameters.device)
        self._checked = check_deterministic
        self._reached: frozenset[str] = frozenset()
        self._divisors = _Divisors(self._likelihood)
        self._c: Tensor | None = None
        self._number = self._ranks.number()
        with self._step("construction", **self._identity()):
            if self._sharding is not None or (self._ranks.size > 1 and not check_deterministic):
                self._read()  # which data are whose must be known before the first draw
            if check_deterministic:
                self._check_deterministic()

    def __repr__(self) -> str:
        N = self._data.num_data or self._num_data
        data = "number of examples unknown before the first pass" if N is None else f"{N:,} examples"
        if self._ranks.size > 1:
            data += f" on rank {self._ranks.rank} of {self._ranks.size}"
        return (
            f"<{type(self).__name__}: D={self.shape[0]}, kind={self._kind}, loss={self._loss_name}, {data}, "
            f"{self.device}, {self.dtype.name}, cache={self._cache!r}>"
        )

    # ---- What a subclass says -----------------------------------------------------------------

    @property
    def _likelihood(self) -> Likelihood:
        return self._problem.likelihood

    @property
    def _parameters(self) -> Parameters:
        return self._problem.parameters

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same on all ranks."""
        if self._ranks.size == 1:
            return {}
        return {
            "the operator": type(self).__name__,
            "the dtype": str(self.torch_dtype),
            "the loss": f"{type(self._likelihood).__name__} ({', '.join(self._likelihood.reductions)})",
            "the checksum of the loss's options": fingerprint(self._likelihood),
            "the shapes of the parameters": {name: tuple(shape) for name, shape in self.parameter_shapes.items()},
            "the checksum of the parameters": self.parameter_checksum,
            "the checksum of all parameters and buffers of the model": self._checksum(self._problem.model.tensors()),
            "check_deterministic": self._checked,
            "rows": self._rows,
            "mc_samples": self._samples,
        }

    def _start_sampler(self) -> StreamSampler | CounterSampler | None:
        """Return the sampler for one pass over the data, if any is needed."""
        return None

    def _factor(self, q: Likelihood, f: Tensor, terms: Terms, draws: Draws | None) -> OutputFactor:
        """Return S for flattened outputs (T, C), without weights and normalization."""
        raise NotImplementedError

    # ---- Products -----------------------------------------------------------------------------

    def _apply(self, V: Tensor) -> Tensor:
        with self._pass("product", **self._marks(V)) as batches:
            # Few columns at a time, whose memory is used again for the next; as many on all ranks.
            step = max(_FEW_COLUMNS, _CHUNK_BYTES // (V.shape[0] * V.itemsize))
            blocks = torch.split(V, step, dim=1)
            # The sum of a block over the ranks is under way while the next block is multiplied.
            sums = _one_ahead(map(self._ranks.begin_sum, _sums_of_products(batches, blocks)))
            if len(blocks) == 1:
                result = next(sums).value()
            else:
                result = torch.empty_like(V, memory_format=torch.contiguous_format)
                for columns, total in zip(torch.split(result, step, dim=1), sums, strict=True):
                    columns.copy_(total.value())
        return result

    @opaque
    def todense(self) -> np.ndarray[Any, Any]:
        """Return F as a NumPy array of shape (D, D), from the rows of G."""
        if self._sharding is not None:
            raise NotImplementedError("the parameters are sharded, and F as a dense matrix would be on every rank.")
        with self._pass("dense") as batches:
            blocks = (block for scores in batches for rows in scores.rows() for block in rows.split(_ROWS_PER_SUM))
            result = self._sum((block.T @ block for block in blocks), *self.shape)
        return check_result(result).cpu().numpy()

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
        D, blocks, rows = self.shape[0], [torch.empty(0, self.shape[0], dtype=torch.float64, device=self.device)], 0
        with self._pass("square root") as batches:
            for scores in batches:
                for block in _rows_or_columns(scores, D, self.torch_dtype, self.device):
                    block = check_result(block)[(block != 0).any(1)]
                    blocks.append(block.double())
                    rows += len(block)
                    if triangular and rows > 2 * D:
                        blocks = [torch.linalg.qr(torch.cat(blocks), mode="r")[1]]
                        rows = len(blocks[0])
            B = torch.cat(self._ranks.gather(torch.cat(blocks)))
        return torch.linalg.qr(B, mode="r")[1] if triangular and len(B) > D else B

    @opaque
    def diagonal(self) -> np.ndarray[Any, Any]:
        """Return the diagonal of F as a NumPy array of shape (D,), exactly: the squared norms of the columns of G.

        A DTensor where the parameters are sharded.
        """
        diagonal: Any = self._diagonal()
        return diagonal if self._sharding is not None else diagonal.cpu().numpy()  # type: ignore[no-any-return]

    @opaque
    def trace(self) -> float:
        """Return the trace of F, exactly: the squared Frobenius norm of G."""
        diagonal = self._diagonal()
        if self._sharding is None:
            return float(diagonal.sum(dtype=torch.float64))
        with self._step("trace"):
            return float(self._ranks.sum(self._sharding.local(diagonal).sum(dtype=torch.float64)))

    def gradient(self) -> np.ndarray[Any, Any]:
        """Return the gradient of the loss over the whole data set as a NumPy array of shape (D,).

        The gradient is at the observed targets for all three operators, in the compute precision. Its divisor is that
        of F: with ``reduction="mean"`` the loss is the mean over the whole data set, however it is split into batches.
        With ``loss_func=None`` it is the gradient of the summed negative log-likelihood. Parameters that the model does
        not use have zeros.

        Raises
        ------
        NotImplementedError
            If the parameters are sharded.
        FloatingPointError
            If a derivative is NaN or infinite.

        Examples
        --------
        >>> import torch, fisherops as fo
        >>> X, y = torch.ones(10, 1), torch.ones(10, 1)
        >>> model = torch.nn.Linear(1, 1)
        >>> _ = [p.data.fill_(1.0) for p in model.parameters()]
        >>> op = fo.FisherLinearOperator(model, torch.nn.MSELoss(), data=(X, y))
        >>> op.gradient().round(3)
        array([2., 2.], dtype=float32)
        """
        if self._sharding is not None:
            raise NotImplementedError(
                "the gradient of sharded parameters is not supported. Compute it by `loss.backward()` and pass "
                "`{name: p.grad}` to `linalg.natural_gradient`."
            )
        with self._pass("gradient", read=self._gradients) as gradients:
            result = self._sum(gradients, self.shape[0])
        return check_result(result).cpu().numpy()

    def _diagonal(self) -> Tensor:
        if self._sharding is not None:
            with self._held_pass("diagonal") as held:
                local = sharded.diagonal(held, self._sharding, self._parameters.spans)
            return self.sharded(check_result(local))  # type: ignore[no-any-return]
        with self._pass("diagonal") as batches:
            result = self._sum((scores.diagonal() for scores in batches), self.shape[0])
        return check_result(result)

    def _times(self, V: Tensor) -> Tensor:
        if self._sharding is None:
            return super()._times(V)
        local = self._sharding.local(V).to(self.torch_dtype)
        with self._held_pass("product", local) as batches:
            spans = self._parameters.spans
            products = sharded.apply(batches, self._sharding, spans, local)
            result = sharded.apply_transposed(batches, self._sharding, spans, products)
        return self.sharded(check_result(result, local))  # type: ignore[no-any-return]

    def sharded(self, local: Tensor) -> Any:
        """Return a vector of this operator from each rank's own part of it, where the parameters are sharded (FSDP2).

        Parameters
        ----------
        local : torch.Tensor
            (d,) or (d, K), d the numbers of this rank's pieces of all parameters: these pieces (``p.to_local()``), flat
            and one after the other in the order of the parameters.

        Returns
        -------
        torch.distributed.tensor.DTensor
            (D,) or (D, K), which products take and give.

        Raises
        ------
        ValueError
            If the parameters are not sharded, or the length is not d.
        """
        if self._sharding is None:
            raise ValueError("the parameters are not sharded: vectors are plain arrays.")
        if local.ndim not in (1, 2) or len(local) != self._sharding.numel:
            raise ValueError(f"got shape {tuple(local.shape)}, and this rank has {self._sharding.numel} numbers.")
        return self._sharding.whole(local.to(self.device, self.torch_dtype), self.shape[0])

    @contextmanager
    def _held_pass(self, description: str, V: Tensor | None = None) -> Iterator[list[MaterializedBatch]]:
        """Go through G where the parameters are sharded: all batches are held."""
        marks: dict[str, Any] = {} if V is None else {"the number of columns": V.shape[1]}
        with self._pass(description, **marks) as batches:
            held = [scores for scores in batches if isinstance(scores, MaterializedBatch)]
            yield held

    def _sum(self, terms: Iterable[Tensor], *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Sum over batches and ranks."""
        total = CompensatedSum(torch.empty(shape, dtype=dtype or self.torch_dtype, device=self.device))
        for term in terms:
            total.add(term)
        return self._ranks.sum(total.value())

    @property
    def parameter_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters by name, in the order of the flat vector."""
        return dict(self._parameters.shapes)

    @property
    def parameter_spans(self) -> dict[str, tuple[int, int]]:
        """Where each parameter lies in the flat vector: the first place, and the first after it."""
        return self._parameters.spans

    @property
    def parameter_checksum(self) -> int:
        """A checksum of the present values of the parameters."""
        return self._checksum(self._parameters.point().values())

    def _checksum(self, tensors: Iterable[Tensor]) -> int:
        checksum = zlib.crc32(repr([fingerprint(tensor) for tensor in tensors]).encode())
        if self._sharding is None:
            return checksum
        with self._step("checksum of the parameters"):
            return zlib.crc32(repr(self._ranks.share(checksum)).encode())

    @property
    def version(self) -> int:
        """A number that grows whenever the model, its tensors or the loss were seen to change."""
        return self._problem.look() + self._refreshes

    @property
    def ranks(self) -> Alone:
        """The processes among which the data are divided; all of them make the same calls (see `process_group`)."""
        return self._ranks

    @property
    def sharding(self) -> Sharding | None:
        """How the parameters are divided among the ranks; None where each rank has all of them."""
        return self._sharding

    @property
    def max_memory(self) -> int:
        """Bytes that may be kept, on this rank."""
        return self._max_memory

    @property
    def kept(self) -> Kept:
        """What is kept between products on all ranks together."""
        plan = self.plan
        with self._step("what is kept"):
            own = plan.nbytes + plan.file_size, self._max_memory - plan.nbytes, plan.holds_rows
            shares = self._ranks.share(own)
        nbytes, left, rows = zip(*shares, strict=True)
        return Kept(sum(nbytes), min(left), all(rows))

    @property
    def num_rows(self) -> int:
        """Rows of the score matrix, of all ranks."""
        _ = self.plan
        with self._pass("rows") as batches:
            return sum(self._ranks.share(sum(scores.count for scores in batches)))

    @property
    def rows_have_order(self) -> bool:
        """Whether every pass lists the rows of the score matrix in the same order, as `scores` needs it."""
        _ = self.plan
        assert self._keeper is not None
        with self._step("order of the rows"):
            return all(self._ranks.share(not self._data.order_is_free or self._keeper.complete))

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of the loss."""
        return tuple(self._likelihood.reductions)

    @property
    @opaque
    def scores(self) -> ScoreMatrix:
        """The score matrix G, F = GᵀG, as an operator (rows, D): :class:`fisherops.score_matrix.ScoreMatrix`."""
        return ScoreMatrix(self)

    @contextmanager
    def _ordered_pass(self, description: str, V: Tensor | None = None) -> Iterator[Iterable[Scores]]:
        """Go through G by batches that come in the same order every time, as the rows of G do."""
        if not self.rows_have_order:
            raise ValueError(
                "the batches come in another order in every pass and are not all kept, so the rows of the score "
                "matrix have no order: pass data in a fixed order, or a larger max_memory."
            )
        with self._pass(description, **self._marks(V)) as batches:
            yield batches

    # ---- What is kept -------------------------------------------------------------------------

    @property
    @opaque
    def plan(self) -> Plan:
        """What is kept between products, its memory and why; made by a pass over the data if there was none."""
        if self._keeper is None or self._version != self._problem.look():
            with self._pass("plan") as batches:
                for _ in batches:
                    pass
        assert self._keeper is not None
        return self._keeper.plan

    def refresh(self) -> None:
        """Forget what is kept, and compute it anew in the next product.

        Changes of the model, its tensors and the loss are noticed without it, except those that
        docs/explanation/limits lists.
        """
        self._keeper = None
        self._refreshes += 1

    def __getstate__(self) -> dict[str, Any]:
        # Graphs cannot be copied; what is kept is found again. SciPy has a state of its own from 1.18 on.
        return {**super().__getstate__(), "_keeper": None, "_version": -1}

    # ---- One pass over the data ---------------------------------------------------------------

    def _marks(self, V: Tensor | None) -> dict[str, Any]:
        """Return what the ranks compare of the vectors that they multiply."""
        return {} if V is None else {"the number of columns": V.shape[1], _VECTORS: self._ranks.checksum(V)}

    def _step(self, description: str, **values: Any) -> AbstractContextManager[None]:
        """Do something together with the other ranks, which must pass the same values."""
        return self._ranks.step(f"{description} of operator {self._number}", **values)

    @contextmanager
    def _pass(
        self, description: str, read: Callable[[Iterator[Batch], Tensor], Iterator[Any]] | None = None, **values: Any
    ) -> Iterator[Iterable[Any]]:
        """Go through G by batches: those that are kept, as a list if they are all, and the others by reading the data.

        With `read` all data are read, nothing is kept, and ``read(batches, c)`` is what the pass goes through. All
        ranks go through their own batches; what they find is summed or gathered inside.
        """
        version = self._problem.look()
        keeper = self._keeper if read is None and self._version == version else None
        # What a rank does next must not depend on more than the ranks have compared.
        values["whether the parameters are those of the last product"] = keeper is not None
        with torch.no_grad(), self._step(description, **values), ExitStack() as stack:
            if keeper is not None and keeper.complete:
                # Nothing of the process is touched: no lock, no random numbers.
                if _torch.needs_own_precision(self.device):
                    stack.enter_context(_torch.own_precision(self.device))
                yield keeper.in_order()
                return
            stack.enter_context(self._problem.isolated())
            self._problem.model.check_unchanged()
            if self._checked:
                stack.enter_context(self._problem.model.refuse_faults())
            if self._follow_changes():
                self._c = None
            if self._c is None:
                self._sum_divisors()
            assert self._c is not None
            batches = stack.enter_context(self._batches(description))
            if read is not None:
                yield read(batches, self._c)
            elif keeper is not None:
                yield self._scores(batches, self._c, keeper)
            else:
                self._keeper = None
                if self._ranks.size > 1:
                    checksum = self._checksum(self._problem.model.tensors())
                    self._ranks.agree("parameters", **{"the checksum of the parameters and buffers": checksum})
                keeper = Keeper(self._cache, self._max_memory, self._spill)
                yield self._scores(batches, self._c, keeper)
                is_stream = self._order == "fixed"
                if not keeper.complete and (self._data.order_is_free or is_stream):
                    why = "a stream of draws reads them all" if is_stream else "they come in another order each time"
                    keeper.forget(f"not all batches can be kept, and {why}")
                self._keeper, self._version = keeper, version

    def _scores(self, batches: Iterator[Batch], c: Tensor, keeper: Keeper | None = None) -> Iterator[Scores]:
        """Compute G of each batch that is not kept; a keeper that has nothing yet chooses the forms.

        Without a keeper, the vectors of the output factor are as they were drawn.
        """
        sampler = self._start_sampler()
        divisors, reached = _Divisors(self._likelihood), frozenset[str]()
        choosing = keeper is not None and not keeper.kept
        # A graph that is kept must not share memory with the user, and products must round the same whether it is kept
        # or not, which depends on how tensors are aligned.
        point = self._parameters.point(copied=True)
        for batch in batches:
            known = keeper.batch(batch.number) if keeper is not None and not choosing else None
            if known is not None:
                yield known
                continue
            X = copied(batch.X)
            with noting(f"batch {batch.number}"):
                evaluation = self._problem.evaluate(X, point, records=self._cache != "linearization")
                if not reached:
                    evaluation.compare_with_plain()
            reached |= evaluation.reached
            terms = self._terms(evaluation.output, batch)
            _check_finite(evaluation.outputs, batch)
            divisors.add(terms)
            if self._needs_terms_by_datum:
                _check_terms_by_datum(evaluation.outputs, batch)
            draws = sampler.batch(batch.places) if sampler is not None else None

            def make_factor(
                evaluation: Evaluation = evaluation,
                terms: Terms = terms,
                size: int = batch.size,
                draws: StreamSampler | CounterDraws | None = draws,
            ) -> OutputFactor:
                again = draws.again() if draws is not None else None
                return self._output_factor(evaluation, terms, c, size, again, compressed=keeper is not None)

            def redraw(
                op: FisherOperator,
                sampler: StreamSampler | CounterSampler,
                evaluation: Evaluation = evaluation,
                terms: Terms = terms,
                batch: tuple[int, Tensor] = (batch.size, batch.places),
            ) -> OutputFactor:
                size, places = batch
                return op._output_factor(evaluation, terms, c, size, sampler.batch(places), compressed=True)

            if choosing:
                assert keeper is not None
                with noting(f"batch {batch.number}"):
                    scores = keeper.choose(evaluation, make_factor, batch.size, redraw)
            else:
                with noting(f"batch {batch.number}"):
                    scores = compute(evaluation, make_factor, batch.size)
            yield scores
        if keeper is not None and not choosing and any(scores is not None for scores in keeper.kept):
            return  # not every batch was looked at
        self._check_pass(reached, divisors)

    def _gradients(self, batches: Iterator[Batch], c: Tensor) -> Iterator[Tensor]:
        """Compute each batch's part of the gradient of the loss, by reverse mode alone: Jᵀ Σ (w/c) s."""
        point = self._parameters.point()
        divisors, reached = _Divisors(self._likelihood), frozenset[str]()
        for batch in batches:
            with noting(f"batch {batch.number}"):
                evaluation = self._problem.evaluate(batch.X, point, records=False)
            reached |= evaluation.reached
            terms = self._terms(evaluation.output, batch, needs_targets=True)
            q, f = self._likelihood.bind(evaluation.output), evaluation.outputs
            _check_finite(f, batch)
            divisors.add(terms)
            root = q.scale(f, terms, c)
            factor = q.scores(f, q.observed(terms)).scaled(root).scaled(root)
            summed = factor.apply(f.new_ones(1, factor.blocks, factor.rank))
            yield evaluation.vjp(summed.reshape(1, *f.shape))[:, 0]
        self._check_pass(reached, divisors)

    def _output_factor(
        self, evaluation: Evaluation, terms: Terms, c: Tensor, size: int, draws: Draws | None, compressed: bool
    ) -> OutputFactor:
        """Return S of a batch, with weights, normalization and the sums over the terms of a datum."""
        q, f = self._likelihood.bind(evaluation.output), evaluation.outputs
        factor = self._factor(q, f, terms, draws).scaled(q.scale(f, terms, c * self._samples))
        if self._rows == "datum":
            factor = factor.summed(factor.blocks // size)
        return factor.compressed() if compressed else factor

    @contextmanager
    def _batches(self, description: str) -> Iterator[Iterator[Batch]]:
        with closing(self._data.batches(f"{type(self).__name__} {description}")) as batches:
            yield batches

    def _terms(self, output: Any, batch: Batch, needs_targets: bool = False) -> Terms:
        # Whether a distribution depends on the parameters shows in its graph.
        with prefixing(f"batch {batch.number}"), torch.enable_grad():
            if batch.y is None and needs_targets:
                raise ValueError("the targets y must be given for the gradient of the loss, got None. Pass (X, y).")
            if batch.y is None and self._needs_targets:
                raise ValueError(
                    f"the targets y must be given for {type(self).__name__}, got None. Pass (X, y), or use "
                    "FisherMCLinearOperator or FisherLinearOperator, which most losses need no targets for."
                )
            return self._likelihood.terms(output, batch.y)

    def _read(self) -> None:
        """Read the data once."""
        with self._problem.isolated(), self._batches("first pass") as batches:
            counts = self._ranks.share(sum(1 for _ in batches))
        if self._sharding is not None and len(set(counts)) > 1:
            raise ValueError(
                f"a sharded model is evaluated by all ranks together, and they have {', '.join(map(str, counts))} "
                "batches: give them equally many."
            )

    def _sum_divisors(self) -> None:
        """Find c by a pass over the data that only evaluates the model."""
        divisors = _Divisors(self._likelihood)
        if divisors.needed:
            point = self._parameters.point()
            # The pass that follows must find the same random numbers: a loader may shuffle by them.
            with _torch.fixed_randomness(self.device, 0), self._batches("normalization") as batches:
                for batch in batches:
                    # With a graph, because models may differentiate inside.
                    with noting(f"batch {batch.number}"), torch.enable_grad():
                        output = self._problem.call(point, batch.X)
                    divisors.add(self._terms(output, batch))
        self._divisors, self._c = divisors, divisors.total(self._ranks)

    # ---- Checks -------------------------------------------------------------------------------

    def _follow_changes(self) -> bool:
        """Repeat the checks if modules, modes or hooks have changed; say whether the loss has."""
        version = self._problem.version
        loss = self._loss_version
        if self._structure != version.structure:
            if self._checked:
                self._check_deterministic()
            self._structure = version.structure
        self._loss_version = version.loss
        return loss != version.loss

    def _check_deterministic(self) -> None:
        """Evaluate the model twice and read the data twice, with other random numbers each time."""
        problem = self._problem
        writes, problem.clones_inputs = False, True
        divisors = _Divisors(self._likelihood)
        with problem.isolated(), torch.no_grad(), problem.model.refuse_faults():
            with self._batches("check") as batches:
                for batch in batches:
                    with noting(f"batch {batch.number}"):
                        output, f, same, wrote = problem.evaluate_twice(batch.X)
                    writes = writes or wrote
                    divisors.add(self._terms(output, batch))
                    _check_finite(f, batch)
                    if not same:
                        raise RuntimeError(
                            f"the model is not deterministic: two evaluations of batch {batch.number} differ. Switch "
                            "the randomness off (`model.eval()`, no functional dropout in training mode), or pass "
                            "check_deterministic=False to take it with fixed random numbers."
                        )
            with _torch.fixed_randomness(self.device, 2), self._batches("check") as batches:
                for _ in batches:
                    pass
        problem.clones_inputs = writes
        self._divisors, self._c = divisors, divisors.total(self._ranks)

    def _check_pass(self, reached: frozenset[str], divisors: _Divisors) -> None:
        """Compare what a pass over all data found with what earlier passes did."""
        if self._data.num_data:
            self._check_reached(reached)
        if not torch.allclose(divisors.sum, self._divisors.sum, rtol=1e-6):
            raise RuntimeError(
                "what reduction='mean' divides by changed from one pass to the next: the weights of the loss were "
                "changed. Make a new operator."
            )

    def _check_reached(self, reached: frozenset[str]) -> None:
        """Compare the parameters that the outputs depend on with those of earlier passes."""
        lost = self._reached - reached
        if lost and reached:
            raise RuntimeError(
                f"the model's output no longer depends on the parameters {sorted(lost)}: they were replaced by other "
                "tensors, or the model was changed. Make a new operator."
            )
        self._reached = self._reached | reached
        if not reached:
            raise ValueError(
                "the model's output does not depend on any of `params`, so its Fisher is zero: check that the "
                "parameters are those that the model uses, and that it does not detach them."
            )


class _Divisors:
    """The sum over the data of what ``reduction="mean"`` divides by, for each head of the model."""

    def __init__(self, likelihood: Likelihood) -> None:
        self._likelihood = likelihood
        self.sum = torch.zeros(len(likelihood.reductions), dtype=torch.float64, device="cpu")
        self.needed = bool(self._mean.any())

    @property
    def _mean(self) -> Tensor:
        # Of some losses this is known when the first batch was looked at.
        return torch.tensor([reduction == "mean" for reduction in self._likelihood.reductions], device="cpu")

    def add(self, terms: Terms) -> None:
        """Add those of one batch."""
        self.sum = self.sum + torch.as_tensor(terms.divisor, dtype=torch.float64, device="cpu") * self._mean

    def total(self, ranks: Alone) -> Tensor:
        """Return c for each head, of the data of all ranks: 1 where the reduction is a sum."""
        total = ranks.sum(self.sum.clone())
        if (self._mean & (total == 0)).any():
            raise ValueError(
                "every loss term of the data is ignored or has weight 0, so reduction='mean' divides by zero: "
                "check `ignore_index` and the class weights, or use reduction='sum'."
            )
        return torch.where(self._mean, total, torch.ones_like(total))


def _name_of_loss(loss_func: Any) -> str:
    """Name a loss with its reduction, and each of several losses."""
    if loss_func is None:
        return "None (distributions)"
    if isinstance(loss_func, Mapping):
        return f"{{{', '.join(f'{key!r}: {_name_of_loss(loss)}' for key, loss in loss_func.items())}}}"
    if isinstance(loss_func, tuple | list):
        return f"({', '.join(map(_name_of_loss, loss_func))})"
    name = getattr(loss_func, "__name__", type(loss_func).__name__)
    reduction = getattr(loss_func, "reduction", None)
    return name if reduction is None else f"{name}({reduction!r})"


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item when the next is made."""
    previous: list[Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _rows_or_columns(scores: Scores, D: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """List G of a batch in blocks of rows (r, D): by its D columns if there are fewer of them than rows."""
    if scores.count < D:
        for rows in scores.rows():
            yield from rows.split(_ROWS_PER_SUM)
    else:
        identity = torch.eye(D, dtype=dtype, device=device)
        yield torch.cat([scores.apply(columns) for columns in identity.split(scores.columns, dim=1)], 1)


def _sums_of_products(batches: Iterable[Scores], blocks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Sum GᵀG V over batches for blocks of columns V, one after the other; but data are read once for all blocks."""
    in_memory = isinstance(batches, InOrder) and not batches.in_files
    for group in [[V] for V in blocks] if in_memory else [blocks]:
        totals = deque(CompensatedSum(V) for V in group)
        for scores in batches:
            for total, V in zip(totals, group, strict=True):
                total.add(_product(scores, V))
        while totals:
            yield totals.popleft().value()


def _product(scores: Scores, V: Tensor) -> Tensor:
    """Multiply GᵀG, with as many columns at once as memory allows."""
    products, done = [], 0
    while done < V.shape[1]:
        try:
            # Columns lie one after the other in memory (hence .T), as `Parameters.split` gives and takes them.
            products.append(scores.product(V[:, done : done + scores.columns]).T)
        except (MemoryError, RuntimeError) as error:
            if scores.columns == 1 or not is_memory_error(error):
                raise
            scores.columns //= 2
        else:
            done += scores.columns
    return (torch.cat(products) if len(products) > 1 else products[0]).T


def _check_terms_by_datum(f: Tensor, batch: Batch) -> None:
    if len(f) % batch.size:
        raise ValueError(
            f"batch {batch.number} has {len(f)} loss terms for {batch.size} data, so they do not belong to data in "
            "equal numbers: use rows='term', and sampler='stream' for a Monte-Carlo Fisher."
        )


def _check_finite(f: Tensor, batch: Batch) -> None:
    if not f.isfinite().all():
        kind = "NaN" if f.isnan().any() else "infinity"
        raise FloatingPointError(
            f"the model's output for batch {batch.number} contains {kind}: check the inputs and the parameters. (For "
            "classes that are not allowed, use logits of -1e9 and not -inf.)"
        )
