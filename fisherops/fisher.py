"""The Fisher operators: likelihood × scores × reduction over the data."""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays, likelihoods
from fisherops._checks import integer
from fisherops._data import Batch, Data
from fisherops._draws import CounterDraws, CounterSampler, StreamSampler
from fisherops._linop import TorchLinearOperator
from fisherops._memory import as_bytes, as_folder, is_memory_error
from fisherops._model import ModelFunction, as_function, isolated
from fisherops._params import Parameters, as_dtype, select
from fisherops._randomness import fixed_randomness
from fisherops._ranks import Alone, ranks_of
from fisherops._sharding import Sharding, is_sharded, reshard
from fisherops._sums import CompensatedSum
from fisherops._tree import leaves, map_arrays
from fisherops.distributed import with_indices
from fisherops.likelihoods import Draws, Likelihood, OutputFactor, Terms
from fisherops.score_matrix import ScoreMatrix
from fisherops.scores import (
    CACHES,
    BatchJacobian,
    Differentiation,
    HeldScores,
    Keeper,
    Plan,
    RecomputedScores,
    Scores,
    sharded,
)

# Columns of a product are taken together up to this size, but a few at least.
_CHUNK_BYTES = 2**24
_FEW_COLUMNS = 8

# What the ranks of a process group compare before they sum.
_VECTORS = "the checksum of the vectors (SciPy's solvers draw others on each rank unless v0 or rng is given)"

Item = TypeVar("Item")

# Rows that are summed in the compute precision without compensation.
_ROWS_PER_SUM = 8192


class _Evaluation:
    """The model as a function of parameters and inputs, with fixed random numbers and inputs left as they are."""

    def __init__(self, model: ModelFunction, device: torch.device, deterministic: bool) -> None:
        self._model = model
        self._device = device
        self._deterministic = deterministic
        self.clones_inputs = True
        """Whether inputs are copied, because the model may write into them."""

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        if self.clones_inputs:
            X = map_arrays(Tensor.clone, X)
        if self._deterministic:
            return self._model(point, X)
        with fixed_randomness(self._device, 1):
            return self._model(point, X)


class Kept(NamedTuple):
    """What all ranks of an operator keep, and the memory that is left on the one with the least."""

    nbytes: int
    memory_left: int
    holds_rows: bool


class FisherOperator(TorchLinearOperator):
    """F = (1/c) Σ_b G_bᵀ G_b over the batches b of a data set; subclasses choose the output factor."""

    _ordered = False
    """Whether F depends on the order of the data."""
    _samples = 1
    """M, what sums over draws are divided by."""

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
        self._likelihood = likelihoods.of_loss(loss_func)
        reshard(model_func)
        self._parameters = Parameters(select(model_func, params), as_dtype(dtype))
        self._model = as_function(model_func, self._parameters, functional=isinstance(params, Mapping))
        self._ranks = ranks_of(process_group, self._parameters.device)
        self._evaluate = _Evaluation(self._model, self._parameters.device, check_deterministic)
        self._sharding = None
        if any(map(is_sharded, self._parameters.tensors.values())):
            if cache not in ("auto", "factors"):
                raise NotImplementedError(
                    f"cache={cache!r} cannot be had where the parameters are sharded: use 'auto' or 'factors'."
                )
            self._sharding = Sharding(self._parameters.tensors, self._ranks)
        self._differentiation = Differentiation(
            self._evaluate,
            self._likelihood.flatten,
            self._parameters,
            self._model.leaves,
            self._sharding is not None,
        )
        self._data = Data(
            with_indices(data, self._ranks),
            device=self._parameters.device,
            dtype=self._parameters.dtype,
            convert=self._model.converts,
            batch_size=batch_size,
            batch_size_fn=batch_size_fn,
            num_data=num_data,
            verify=check_deterministic,
            ordered=self._ordered,
            progressbar=progressbar,
            ranks=self._ranks,
        )
        self._cache = cache
        self._max_memory = as_bytes(max_memory, self._parameters.device)
        self._spill = as_folder(spill)
        self._keeper: Keeper | None = None
        self._state: Any = None
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

    # ---- What a subclass says -----------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same on all ranks."""
        if self._ranks.size == 1:
            return {}
        return {
            "the operator": type(self).__name__,
            "the dtype": str(self.torch_dtype),
            "the loss": "/".join(self._likelihood.reductions) + f" of {type(self._likelihood).__name__}",
            "the shapes of the parameters": {name: tuple(shape) for name, shape in self.parameter_shapes.items()},
            "the checksum of the parameters": self.parameter_checksum,
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
        return _check_result(result, V)

    def todense(self) -> np.ndarray[Any, Any]:
        """Return F as a NumPy array of shape (D, D), from the rows of G."""
        if self._sharding is not None:
            raise NotImplementedError("the parameters are sharded, and F as a dense matrix would be on every rank.")
        with self._pass("dense") as batches:
            blocks = (block for scores in batches for rows in scores.rows() for block in rows.split(_ROWS_PER_SUM))
            result = self._sum((block.T @ block for block in blocks), *self.shape)
        return _check_result(result).cpu().numpy()

    def diagonal(self) -> np.ndarray[Any, Any]:
        """Return the diagonal of F as a NumPy array of shape (D,), exactly: the squared norms of the columns of G.

        A DTensor where the parameters are sharded.
        """
        diagonal: Any = self._diagonal()
        return diagonal if self._sharding is not None else diagonal.cpu().numpy()  # type: ignore[no-any-return]

    def trace(self) -> float:
        """Return the trace of F, exactly: the squared Frobenius norm of G."""
        diagonal = self._diagonal()
        if self._sharding is None:
            return float(diagonal.sum(dtype=torch.float64))
        with self._step("trace"):
            return float(self._ranks.sum(self._sharding.local(diagonal).sum(dtype=torch.float64)))

    def _diagonal(self) -> Tensor:
        if self._sharding is not None:
            with self._held_pass("diagonal") as held:
                local = sharded.diagonal(held, self._sharding, self._parameters.spans)
            return self.sharded(_check_result(local))  # type: ignore[no-any-return]
        with self._pass("diagonal") as batches:
            result = self._sum((scores.diagonal() for scores in batches), self.shape[0])
        return _check_result(result)

    def _times(self, V: Tensor) -> Tensor:
        if self._sharding is None:
            return super()._times(V)
        local = self._sharding.local(V).to(self.torch_dtype)
        with self._held_pass("product", local) as batches:
            spans = self._parameters.spans
            products = sharded.apply(batches, self._sharding, spans, local)
            result = sharded.apply_transposed(batches, self._sharding, spans, products)
        return self.sharded(_check_result(result, local))  # type: ignore[no-any-return]

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
    def _held_pass(self, description: str, V: Tensor | None = None) -> Iterator[list[HeldScores]]:
        """Go through G where the parameters are sharded: all batches are held."""
        marks: dict[str, Any] = {} if V is None else {"the number of columns": V.shape[1]}
        with self._pass(description, **marks) as batches:
            held = [scores for scores in batches if isinstance(scores, HeldScores)]
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
        checksum = 0
        for tensor in self._parameters.point().values():
            own: Any = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
            checksum = zlib.crc32(own.cpu().contiguous().numpy().tobytes(), checksum)
        if self._sharding is None:
            return checksum
        with self._step("checksum of the parameters"):
            return zlib.crc32(repr(self._ranks.share(checksum)).encode())

    @property
    def state(self) -> Any:
        """What products depend on and torch counts: it compares equal as long as the operator is the same matrix."""
        return self._model.state()

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
    def plan(self) -> Plan:
        """What is kept between products, its memory and why; made by a pass over the data if there was none."""
        if self._keeper is None or self._state != self._model.state():
            with self._pass("plan") as batches:
                for _ in batches:
                    pass
        assert self._keeper is not None
        return self._keeper.plan

    def refresh(self) -> None:
        """Forget what is kept, and compute it anew in the next product.

        Parameters and buffers that torch changes in place are noticed without it. Changes that torch does not see
        (through ``.data``, through NumPy arrays that share memory, of other objects that the model looks at) need it.
        """
        self._keeper = None

    def __getstate__(self) -> dict[str, Any]:
        # Graphs cannot be copied; what is kept is found again.
        return {**self.__dict__, "_keeper": None, "_state": None}

    # ---- One pass over the data ---------------------------------------------------------------

    def _marks(self, V: Tensor | None) -> dict[str, Any]:
        """Return what the ranks compare of the vectors that they multiply."""
        return {} if V is None else {"the number of columns": V.shape[1], _VECTORS: self._ranks.checksum(V)}

    def _step(self, description: str, **values: Any) -> AbstractContextManager[None]:
        """Do something together with the other ranks, which must pass the same values."""
        return self._ranks.step(f"{description} of operator {self._number}", **values)

    @contextmanager
    def _pass(self, description: str, kept: bool = True, **values: Any) -> Iterator[Iterable[Scores]]:
        """Go through G by batches: those that are kept, as a list if they are all, and the others by reading the data.

        With ``kept=False`` vectors of the output factor are as they were drawn, and nothing is kept. All ranks go
        through their own batches; what they find is summed or gathered inside.
        """
        keeper = self._keeper if kept and self._state == self._model.state() else None
        # What a rank does next must not depend on more than the ranks have compared.
        values["whether the parameters are those of the last product"] = keeper is not None
        with isolated(self.device), torch.no_grad(), self._step(description, **values), ExitStack() as stack:
            if keeper is not None and keeper.complete:
                yield keeper.in_order()
                return
            self._model.check_unchanged()
            if self._checked:
                stack.enter_context(self._model.refuse_faults())
            if self._c is None:
                self._sum_divisors()
            assert self._c is not None
            batches = stack.enter_context(self._batches(description))
            if not kept:
                yield self._scores(batches, self._c, None)
            elif keeper is not None:
                yield self._scores(batches, self._c, keeper)
            else:
                self._keeper = None
                if self._ranks.size > 1:
                    self._ranks.agree("parameters", **{"the checksum of the parameters": self.parameter_checksum})
                keeper = Keeper(self._cache, self._max_memory, self._spill)
                yield self._scores(batches, self._c, keeper)
                if not keeper.complete and (self._data.order_is_free or self._ordered):
                    why = (
                        "a stream of draws reads them all" if self._ordered else "they come in another order each time"
                    )
                    keeper.forget(f"not all batches can be kept, and {why}")
                self._keeper, self._state = keeper, self._model.state()

    def _scores(self, batches: Iterator[Batch], c: Tensor, keeper: Keeper | None) -> Iterator[Scores]:
        """Compute G of each batch that is not kept; a keeper that has nothing yet chooses the forms."""
        sampler = self._start_sampler()
        point = self._parameters.point()
        divisors, reached = _Divisors(self._likelihood), frozenset[str]()
        choosing = keeper is not None and not keeper.kept
        for batch in batches:
            known = keeper.batch(batch.number) if keeper is not None and not choosing else None
            if known is not None:
                yield known
                continue
            # What is kept must not change with the user's arrays.
            X = map_arrays(Tensor.clone, batch.X) if choosing else batch.X
            jacobian = self._differentiation.at(point, X)
            if not choosing:
                jacobian.settle()
            reached |= jacobian.reached
            terms = self._terms(jacobian.output, batch)
            _check_finite(jacobian.outputs, batch)
            divisors.add(terms)
            if self._needs_terms_by_datum:
                _check_terms_by_datum(jacobian.outputs, batch)
            draws = sampler.batch(batch.places) if sampler is not None else None

            def make_factor(
                jacobian: BatchJacobian = jacobian,
                terms: Terms = terms,
                size: int = batch.size,
                draws: StreamSampler | CounterDraws | None = draws,
            ) -> OutputFactor:
                again = draws.again() if draws is not None else None
                return self._output_factor(jacobian, terms, c, size, again, compressed=keeper is not None)

            def redraw(
                op: FisherMCLinearOperator,
                sampler: StreamSampler | CounterSampler,
                jacobian: BatchJacobian = jacobian,
                terms: Terms = terms,
                batch: tuple[int, Tensor] = (batch.size, batch.places),
            ) -> OutputFactor:
                size, places = batch
                return op._output_factor(jacobian, terms, c, size, sampler.batch(places), compressed=True)

            if choosing:
                assert keeper is not None
                yield keeper.choose(jacobian, make_factor, batch.size, redraw)
            elif keeper is not None:
                yield keeper.compute(batch.number, jacobian, make_factor, batch.size)
            else:
                yield RecomputedScores(jacobian, make_factor(), batch.size)
        if keeper is not None and not choosing and any(scores is not None for scores in keeper.kept):
            return  # not every batch was looked at
        if self._data.num_data:
            self._check_reached(reached)
        if not torch.allclose(divisors.sum, self._divisors.sum, rtol=1e-6):
            raise RuntimeError(
                "what reduction='mean' divides by changed from one pass to the next: the weights of the loss were "
                "changed. Make a new operator."
            )

    def _output_factor(
        self, jacobian: BatchJacobian, terms: Terms, c: Tensor, size: int, draws: Draws | None, compressed: bool
    ) -> OutputFactor:
        """Return S of a batch, with weights, normalization and the sums over the terms of a datum."""
        q, f = self._likelihood.bind(jacobian.output), jacobian.outputs
        factor = self._factor(q, f, terms, draws).scaled(q.scale(f, terms, c * self._samples))
        if self._rows == "datum":
            factor = factor.summed(factor.blocks // size)
        return factor.compressed() if compressed else factor

    @contextmanager
    def _batches(self, description: str) -> Iterator[Iterator[Batch]]:
        with closing(self._data.batches(f"{type(self).__name__} {description}")) as batches:
            yield batches

    def _terms(self, output: Any, batch: Batch) -> Terms:
        try:
            with torch.enable_grad():  # whether a distribution depends on the parameters shows in its graph
                return self._likelihood.terms(output, batch.y)
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {batch.number}: {error}") from None

    def _read(self) -> None:
        """Read the data once."""
        with isolated(self.device), self._batches("first pass") as batches:
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
            with torch.no_grad(), fixed_randomness(self.device, 0), self._batches("normalization") as batches:
                for batch in batches:
                    output = self._evaluate(point, batch.X)
                    divisors.add(self._terms(output, batch))
        self._divisors, self._c = divisors, divisors.total(self._ranks)

    # ---- Checks -------------------------------------------------------------------------------

    def _check_deterministic(self) -> None:
        """Evaluate the model twice and read the data twice, with other random numbers each time."""
        point = self._parameters.point()
        self._evaluate.clones_inputs = writes = False
        divisors = _Divisors(self._likelihood)
        flat = self._differentiation.flat
        with isolated(self.device), torch.no_grad(), self._model.refuse_faults():
            with self._batches("check") as batches:
                for batch in batches:
                    X = map_arrays(Tensor.clone, batch.X)
                    output = self._evaluate(point, X)
                    writes = writes or any(t._version > 0 for t in leaves(X))
                    f = self._likelihood.flatten(output)
                    divisors.add(self._terms(output, batch))
                    _check_finite(f, batch)
                    with fixed_randomness(self.device, 2):
                        again = flat(point, map_arrays(Tensor.clone, batch.X))
                    tolerance = torch.finfo(f.dtype).eps ** 0.5 * f.abs().max()
                    if again.shape != f.shape or not (again - f).abs().max() <= tolerance:
                        raise RuntimeError(
                            f"the model is not deterministic: two evaluations of batch {batch.number} differ. Switch "
                            "the randomness off (`model.eval()`, no functional dropout in training mode), or pass "
                            "check_deterministic=False to take it with fixed random numbers."
                        )
            with fixed_randomness(self.device, 2), self._batches("check") as batches:
                for _ in batches:
                    pass
        self._evaluate.clones_inputs = writes
        self._divisors, self._c = divisors, divisors.total(self._ranks)

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
        self._mean = torch.tensor([reduction == "mean" for reduction in likelihood.reductions], device="cpu")
        self.sum = torch.zeros(len(self._mean), dtype=torch.float64, device="cpu")
        self.needed = bool(self._mean.any())

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


class FisherMCLinearOperator(FisherOperator):
    r"""The Monte-Carlo Fisher information matrix of a model as a SciPy ``LinearOperator``.

    .. math::

        F = \frac{1}{c} \sum_{n,t} w_{nt}\, J_{nt}^\top
            \Big[\frac{1}{M} \sum_{m=1}^{M} s(\tilde y_{ntm})\, s(\tilde y_{ntm})^\top\Big] J_{nt},
        \qquad \tilde y_{ntm} \sim q(\cdot \mid f_{nt}),
        \quad s(y) = \nabla_f \big(-\log q(y \mid f)\big)

    for the data n, their loss terms t (one for plain classification; tokens or pixels otherwise), outputs
    :math:`f_{nt} \in \mathbb{R}^C` with Jacobians :math:`J_{nt}` (C × D) and observation weights :math:`w_{nt}`. Its
    expectation over the draws is the type-I (exact) Fisher. F is symmetric and positive semi-definite, and one fixed
    matrix as long as the parameters do not change: every product uses the same draws. It is (1/c) of the Fisher of the
    summed loss, with c = 1 for ``reduction="sum"`` and c what torch divides by, *over the whole data set*, for
    ``reduction="mean"``; splitting the data into other batches does not change c.

    Parameters
    ----------
    model_func : nn.Module or callable
        A module; a callable ``X -> f``; or, with `params` a mapping, a callable ``(params, X) -> f``. X is what `data`
        yields: a tensor, a mapping, a tuple or any object.
    loss_func : nn.Module, Likelihood, mapping, tuple or None
        A loss that stands for a likelihood, with reduction "mean" or "sum": ``MSELoss`` (a Gaussian of variance ½),
        ``GaussianNLLLoss`` (the model returns (mean, var)), ``L1Loss``, ``HuberLoss``, ``SmoothL1Loss`` (the densities
        ∝ exp(−loss)), ``PoissonNLLLoss``, ``BCEWithLogitsLoss``, ``BCELoss``, all for outputs (batch, ..., C); and
        ``CrossEntropyLoss``, ``NLLLoss`` for outputs (batch, C, ...). All with their options: class weights,
        ``ignore_index``, ``weight`` and ``pos_weight`` weight the observations. Or a likelihood of one's own, see
        :class:`fisherops.likelihoods.Likelihood`. Or a mapping or tuple of these, for a model that returns one, with
        targets alike; outputs without a loss are left out. Or None, for a model that returns a
        ``torch.distributions.Distribution``: the Fisher of the sum of its ``log_prob`` over the data, see
        :class:`fisherops.likelihoods.DistributionLikelihood`.
    params : list of Parameter, mapping of str to Tensor, or None
        What to differentiate by; D is the number of their elements, in their order. None takes every parameter of the
        module that requires grad. Those that the model does not use have zero rows and columns in F.
    data : iterable of (X, y) or (X, y, index), or a pair of arrays (X, y)
        Mini-batches, read anew for every product, always in the same order (but see `sampler`): a list, a
        ``DataLoader`` without shuffling, any re-iterable. Or two arrays with one row per datum. Batches are moved to
        the parameters' device; NumPy floats are converted to the compute precision.
    progressbar : bool
        Whether each pass over the data shows a tqdm bar on stderr.
    check_deterministic : bool
        Whether to check, now, that the model is deterministic; and, in every product, that no layer is random
        (Dropout) or couples the data of a batch (BatchNorm in training mode), and that the data are the same as before
        (arrays in mappings, tuples and lists are compared, the contents of other objects are not). With False, random
        layers get the same random numbers in every evaluation.
    seed : int
        Seed of the draws; two operators with the same seed and data are the same matrix.
    mc_samples : int
        M, draws for each loss term.
    num_data : int or None
        Number of data, if known; checked against what `data` yields.
    batch_size_fn : callable or None
        ``X -> int``, the number of data in a batch; None takes the length of y.
    rows : {"term", "datum"}
        Whether each loss term has rows of its own in the score matrix (what other libraries compute), or the would-be
        gradients of a datum's terms are summed into one row for each draw: the score of the datum's joint likelihood.
        Both have the same expectation.
    sampler : {"counter", "stream"}
        "counter": each draw is a function of (seed, datum, term, sample, class) alone, by Philox4x32-10 and inverse
        distribution functions. So F does not depend on how the data are split into batches, nor on the device or the
        precision (up to rounding, which may change a draw near a boundary), and the first m of M samples are those of
        ``mc_samples=m`` (but see `fisherops.likelihoods.DistributionLikelihood`). A datum is known by its place in the
        data, or by `index` where batches are (X, y, index); then their order does not matter either, and a loader may
        shuffle.
        "stream": draws batch after batch from one generator, so the matrix depends on how the data are split and
        ordered, on the device and, for MSE and BCE, on the precision. For the same seed it is the matrix of
        ``FisherMCLinearOperator`` of curvlinops-for-pytorch 3.0.1.
    dtype : {None, "float32", "float64"} or dtype
        Compute precision. None takes that of the parameters (float32 for half precisions). Another one is computed with
        a converted copy of the model's parameters, buffers and floating-point inputs.
    batch_size : int or None
        Rows of a batch where `data` is a pair of arrays; None takes all of them at once.
    cache : {"auto", "scores", "factors", "linearization", "none"}
        What is kept between products: the cheapest for each batch and parameter; rows of the score matrix; rows, with
        the weights of dense layers as factors; the linearized model; or nothing. The matrix is the same to rounding.
        See `plan`, and docs/explanation/performance.
    max_memory : int, str or None
        How much may be kept, in bytes or as "4GiB"; None is half of what is free. Batches that do not fit are computed
        anew in every product, or kept in files.
    spill : path or None
        A folder. Rows of the score matrix that do not fit `max_memory`, dense or as factors, are kept in files there
        and mapped into memory batch by batch; they are removed with the operator. One batch must fit `max_memory`.
    process_group : torch.distributed.ProcessGroup, DeviceMesh or None
        The processes among which the data are divided: each passes its own part as `data`, see
        :func:`fisherops.distributed.shard`, and F is that of all data, on every one of them. Without indices, the data
        of a rank follow those of the ranks before. All ranks make the same calls; those that compute wait for each
        other, at most for the time limit of the group, and a rank that is missing or does something else ends the
        others with :class:`fisherops.distributed.RankError`. Sums are the same bits on every rank.

    Attributes
    ----------
    shape : tuple of int
        (D, D).
    dtype : numpy.dtype
        Compute precision.
    device : torch.device
        Where the parameters live and products are computed.
    plan : Plan
        What is kept between products and why; print it.

    Raises
    ------
    TypeError
        If an argument has the wrong type; if `data` can be read only once (a generator).
    ValueError
        If parameters are missing, doubled, on several devices or of several dtypes; if layers that are random or
        couple the data of a batch are in training mode; if data or targets do not fit the loss.
    NotImplementedError
        If the loss, or an operation of the model, is not supported.
    RuntimeError
        If the data or the model's outputs change from one pass to the next.
    fisherops.distributed.RankError
        If the processes of `process_group` do not do the same, or one of them is gone.
    FloatingPointError
        If an output is NaN or infinite.

    References
    ----------
    J. Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020) 1–76.
    F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation for natural gradient descent,
    NeurIPS 2019.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> from scipy.sparse.linalg import eigsh
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(4, 3)
    >>> X, y = torch.randn(100, 4), torch.randint(3, (100,))
    >>> op = fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> op.shape, op.dtype
    ((15, 15), dtype('float32'))
    >>> eigsh(op, k=2, return_eigenvectors=False).shape
    (2,)
    """

    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Any = None,
        data: Any = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = 2147483647,
        mc_samples: int = 1,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        rows: str = "term",
        sampler: str = "counter",
        dtype: Any = None,
        batch_size: int | None = None,
        cache: str = "auto",
        max_memory: int | str | None = None,
        spill: Any = None,
        process_group: Any = None,
    ) -> None:
        self._seed = _seed(seed)
        self._samples = integer("mc_samples", mc_samples, 1)
        if sampler not in ("counter", "stream"):
            raise ValueError(f"`sampler` must be 'counter' or 'stream', got {sampler!r}.")
        self._ordered = sampler == "stream"
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            rows=rows,
            dtype=dtype,
            batch_size=batch_size,
            cache=cache,
            max_memory=max_memory,
            spill=spill,
            process_group=process_group,
        )
        self._needs_terms_by_datum = rows == "datum" or sampler == "counter"

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "seed": self._seed, "sampler": "stream" if self._ordered else "counter"}

    def _start_sampler(self) -> StreamSampler | CounterSampler:
        if not self._ordered:
            return CounterSampler(self._seed)
        # Ranks must not draw the same numbers; the golden ratio spreads their seeds.
        return StreamSampler((self._seed + 0x9E3779B97F4A7C15 * self._ranks.rank) % 2**64, self.device)

    def resample(self, seed: int) -> FisherMCLinearOperator:
        """Return the operator with other draws for the same model and data; what was learnt about those is shared.

        Parameters
        ----------
        seed : int
            As of the operator.

        Returns
        -------
        FisherMCLinearOperator
            The operator that would have been made with this seed, without checking model and data again. Where the
            linearized model is kept, both share it; rows depend on the draws and are made anew.
        """
        other = copy.copy(self)
        other._seed = _seed(seed)
        other._number = self._ranks.number()
        self._ranks.agree(f"resampling of operator {self._number}", seed=seed)
        if self._keeper is not None and self._state == self._model.state():
            with isolated(self.device), torch.no_grad():
                other._keeper, other._state = self._keeper.redrawn(other, other._start_sampler()), self._state
        return other

    def standard_error(self, v: Any) -> Any:
        r"""Estimate the standard error of vᵀFv that the draws cause, from the spread of the M samples of each row.

        .. math::

            \widehat{\mathrm{se}}^2 = \frac{1}{c^2} \sum_{n,t} \frac{1}{M (M - 1)}
                \sum_{m=1}^{M} \big(x_{ntm} - \bar x_{nt}\big)^2,
            \qquad x_{ntm} = w_{nt} \big(s(\tilde y_{ntm})^\top J_{nt} v\big)^2

        It is the error against the exact Fisher of the same data: vᵀFv is a sum over independent terms, so for many of
        them, and about M ≥ 8 where likelihoods have heavy tails, it lies within 1.96 standard errors of its expectation
        in about 95 % of cases. With ``rows="datum"`` n, t is a datum.

        Parameters
        ----------
        v : array
            (D,) or (D, K), of any library that products take; real.

        Returns
        -------
        float or array
            A number for (D,); for (D, K) an array (K,) of the library of `v`.

        Raises
        ------
        ValueError
            If M = 1, or the shape does not fit.
        """
        if self._samples < 2:
            raise ValueError(
                "the standard error is estimated from the spread of the samples, and mc_samples is 1: use mc_samples=2 "
                "or more."
            )
        x, leave = _arrays.enter(v)
        self._check_shape(x, "standard_error")
        if x.is_complex():
            raise TypeError("the standard error of a quadratic form takes a real vector, got a complex one.")
        V = (x if x.ndim == 2 else x.unsqueeze(1)).to(self.device, self.torch_dtype)
        if V.shape[1] == 0:
            return leave(V[0].clone())
        with self._pass("standard error", kept=False, **self._marks(V)) as batches:
            forms = (scores.apply(V).square().view(-1, self._samples, V.shape[1]).double() for scores in batches)
            terms = (own.var(1).sum(0) * self._samples for own in forms)
            variance = self._sum(terms, V.shape[1], dtype=torch.float64)
        error = _check_result(variance, V).sqrt().to(self.torch_dtype)
        return float(error) if x.ndim == 1 else leave(error)

    def _factor(self, q: Likelihood, f: Tensor, terms: Terms, draws: Draws | None) -> OutputFactor:
        assert draws is not None
        return _checked(q.scores(f, q.sample(f, self._samples, draws)), q, f, self._samples)


class FisherLinearOperator(FisherOperator):
    r"""The exact (type-I) Fisher information matrix of a model as a SciPy ``LinearOperator``.

    .. math::

        F = \frac{1}{c} \sum_{n,t} w_{nt}\, J_{nt}^\top B_{nt} J_{nt},
        \qquad B_{nt} = \mathbb{E}_{y \sim q(\cdot \mid f_{nt})} \big[ s(y)\, s(y)^\top \big],

    with closed-form square roots of B: √2 I for ``MSELoss``, diag √(σ(1 − σ)) for ``BCEWithLogitsLoss`` and
    diag √p − p √pᵀ for ``CrossEntropyLoss``, which is never written out. For these three (and ``NLLLoss``,
    ``PoissonNLLLoss(log_input=True)``) it is the generalized Gauss-Newton matrix of the (weighted) loss over the whole
    data set. It does not depend on how the data are split or ordered, and it is the expectation of
    `FisherMCLinearOperator`. Where no closed form is known (and the targets are not finitely many), products raise
    NotImplementedError.

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, batch_size_fn
        As for `FisherMCLinearOperator`.
    dtype, batch_size, cache, max_memory, spill, process_group
        As for `FisherMCLinearOperator`.

    See Also
    --------
    FisherMCLinearOperator : the Monte-Carlo estimate; its page describes the arguments, attributes and errors.
    EmpiricalFisherLinearOperator : the scores at the observed targets.

    References
    ----------
    J. Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020) 1–76.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> X, y = torch.ones(10, 1), torch.zeros(10, 1)
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(1, 1), torch.nn.MSELoss(), data=(X, y))
    >>> op.todense().round(3)
    array([[2., 2.],
           [2., 2.]], dtype=float32)
    """

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
        dtype: Any = None,
        batch_size: int | None = None,
        cache: str = "auto",
        max_memory: int | str | None = None,
        spill: Any = None,
        process_group: Any = None,
    ) -> None:
        # Without `rows`: the terms of a datum are independent, so its joint likelihood has the same Fisher.
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            dtype=dtype,
            batch_size=batch_size,
            cache=cache,
            max_memory=max_memory,
            spill=spill,
            process_group=process_group,
        )

    def _factor(self, q: Likelihood, f: Tensor, terms: Terms, draws: Draws | None) -> OutputFactor:
        return _checked(q.exact(f), q, f, None)


class EmpiricalFisherLinearOperator(FisherOperator):
    r"""The empirical Fisher matrix of a model as a SciPy ``LinearOperator``.

    .. math::

        F = \frac{1}{c} \sum_{n,t} w_{nt}\, g_{nt}\, g_{nt}^\top,
        \qquad g_{nt} = J_{nt}^\top s(y_{nt}),

    with the scores at the observed targets in place of an expectation over the model's own. It is the second moment of
    the gradients of single loss terms (of single data for ``rows="datum"``), and in general neither the Fisher nor an
    approximation of it. Label smoothing and soft targets change s.

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, batch_size_fn
        As for `FisherMCLinearOperator`.
    dtype, batch_size, cache, max_memory, spill, process_group
        As for `FisherMCLinearOperator`.
    rows : {"term", "datum"}
        Whether each loss term has a row of its own in the score matrix, or the gradients of a datum's terms are summed
        into one.

    See Also
    --------
    FisherMCLinearOperator : its page describes the arguments, attributes and errors.

    References
    ----------
    F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation for natural gradient descent,
    NeurIPS 2019.
    """

    def _factor(self, q: Likelihood, f: Tensor, terms: Terms, draws: Draws | None) -> OutputFactor:
        return _checked(q.scores(f, q.observed(terms)), q, f, 1)


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item when the next is made."""
    previous: list[Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _sums_of_products(batches: Iterable[Scores], blocks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Sum GᵀG V over batches for blocks of columns V, one after the other; but data are read once for all blocks."""
    for group in [[V] for V in blocks] if isinstance(batches, list) else [blocks]:
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


def _seed(seed: int) -> int:
    return integer("seed", seed, -(2**63), 2**64 - 1)


def _checked(factor: OutputFactor, q: Likelihood, f: Tensor, samples: int | None) -> OutputFactor:
    """Return a factor if it is for these outputs and has one vector for each sample."""
    name = type(q).__name__
    if factor.blocks * factor.outputs != f.numel():
        raise ValueError(
            f"{name} returned an output factor of {factor.blocks} blocks of {factor.outputs} for outputs "
            f"{tuple(f.shape)}: it must have one block for each row."
        )
    if samples is not None and len(q.reductions) == 1 and factor.rank != samples:
        raise ValueError(
            f"{name} returned {factor.rank} vectors for each term and there are {samples} samples: `sample` must "
            "return targets with a leading axis of samples, (samples, T, ...)."
        )
    return factor


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


def _check_result(result: Tensor, *inputs: Tensor) -> Tensor:
    # The sum is finite if all entries are, but for overflow, which the second look settles.
    if not result.sum().isfinite() and not result.isfinite().all() and all(x.isfinite().all() for x in inputs):
        raise FloatingPointError(
            "the result contains NaN or infinity although the model's outputs are finite: a derivative of the model "
            "is not finite, or the numbers exceed the precision. Check its operations, or pass dtype='float64'."
        )
    return result
