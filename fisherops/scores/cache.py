"""Which form of G each batch is cached in: chosen by cost, within a bound on memory."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from fisherops._memory import is_memory_error
from fisherops._sizes import SIZES
from fisherops.problem.evaluation import ELEMENTARY_ATTENTION, Evaluation, ModesError
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.build import CannotHoldError, PlanWarning, RowsBuilder
from fisherops.scores.kinds import FactorOf, Kind, Sampler
from fisherops.scores.lazy import LazyBatch
from fisherops.scores.plan import Entry, Plan, readable
from fisherops.scores.store import InOrder, Store, StoredBatch, loaded

BatchScores = MaterializedBatch | LazyBatch

CACHES = ("auto", "scores", "factors", "linearization", "none")

# Rows of G for each datum, and so backward passes to build them, that "auto" takes; and where nothing is cached.
_MANY_VECTORS = 16
_FEW_VECTORS = 2

# Memory of rows that are used once, in units of what the graph has saved.
_WORTH = 4


class Cache:
    """The batches of G of one version: the form of each is chosen while the first pass goes on.

    Parameters
    ----------
    cache : str
        One of `CACHES`.
    max_memory : int
        Bytes that may be kept.
    spill : path or None
        A folder for files with the rows that do not fit.
    num_batches : int or None
        Number of batches, if it is known.
    """

    def __init__(self, cache: str, max_memory: int, spill: Any = None, num_batches: int | None = None) -> None:
        self.plan = Plan(cache, max_memory)
        self._num_batches = num_batches
        self._batches: list[BatchScores | StoredBatch | None] = []
        self._spill = None if spill is None else Store(spill)

    @property
    def is_complete(self) -> bool:
        """Whether every batch is cached, so that products need no data."""
        return None not in self._batches

    def in_order(self) -> list[Any] | None:
        """Return the batches if all are cached; those in files are read while they are used."""
        if None in self._batches:
            return None
        return self._batches if self._spill is None else InOrder(self._batches)

    def __contains__(self, number: int) -> bool:
        return self._batches[number] is not None

    def batch(self, number: int) -> BatchScores:
        """Return a batch that is cached."""
        batch: BatchScores = loaded(self._batches[number])
        return batch

    def add(self, evaluation: Evaluation, factor_of: FactorOf) -> BatchScores:
        """Return G of the next batch in the form chosen for it, and cache it if it fits."""
        size = factor_of.size
        cache, reason = self.plan.cache, "asked for"
        left = self.plan.max_memory - self.plan.nbytes
        if cache in ("auto", "scores", "factors") and evaluation.reached:
            try:
                return self._rows(evaluation, factor_of, left, patient=cache != "auto")
            except CannotHoldError as error:
                if evaluation.problem.is_divided:
                    raise NotImplementedError(
                        f"the parameters are sharded, and their rows cannot be held as factors: {error}. There is no "
                        "other form for them."
                    ) from None
                if cache != "auto":
                    raise NotImplementedError(
                        f"cache={cache!r} is not supported for this model: {error}. Use cache='auto'."
                    ) from None
                reason = str(error)
        form, nbytes = "none", 0
        if cache in ("auto", "linearization") and evaluation.reached:
            nbytes = 2 * evaluation.saved_bytes()
            if nbytes <= left:
                form = "linearization"
                if evaluation.has_fused_attention():
                    evaluation.build_graph(ELEMENTARY_ATTENTION)
                    nbytes = 2 * evaluation.saved_bytes()
            else:
                self._check_fits(nbytes, size)
                reason = f"{reason}; a linearization would take {readable(nbytes)}, and {readable(left)} are left"
        if form == "none":
            return self._computed(evaluation, factor_of, reason)
        if evaluation.linearize():
            nbytes = evaluation.linear_bytes()
        else:
            try:
                evaluation.choose_mode()
            except ModesError as error:
                if cache == "linearization" and not error.disagrees:
                    raise NotImplementedError(f"{error} Or use cache='auto', which keeps rows.") from None
                if cache != "auto" or error.disagrees:
                    raise
                # Neither rows by datum nor products with J: what is left is right, and slow.
                return self._rows(evaluation, factor_of, left, patient=True)
        return self._note(LazyBatch(evaluation, factor_of), size, form, nbytes, reason)

    def redrawn(self, kind: Kind, sampler: Sampler | None) -> Cache | None:
        """Return what is cached for other draws, or None where rows must be made anew."""
        linearized = [batch for batch in self._batches if isinstance(batch, LazyBatch)]
        if len(linearized) < len(self._batches):
            return None
        other = Cache(self.plan.cache, self.plan.max_memory)
        other.plan, other._batches = self.plan, [batch.redrawn(kind, sampler) for batch in linearized]
        return other

    def divide(self, c: Tensor) -> None:
        """Divide what was cached for c = 1, where the loss has one head only."""
        for batch in self._batches:
            if isinstance(batch, LazyBatch):
                batch.divide(c)
            elif isinstance(batch, MaterializedBatch):
                batch.scale(float(c) ** -0.5)

    def merge(self) -> None:
        """Merge successive small batches that are cached alike if all are cached, so that products take few steps."""
        if len(self._batches) < 2 or not self.is_complete:
            return
        waiting, self._batches = self._batches[::-1], []
        while waiting:
            first = waiting.pop()
            if isinstance(first, MaterializedBatch) and (key := first.key) is not None:
                others, nbytes = [], first.nbytes
                while waiting and isinstance(other := waiting[-1], MaterializedBatch):
                    nbytes += other.nbytes
                    if nbytes > SIZES[first.device].merged or other.key != key:
                        break
                    others.append(other)
                    waiting.pop()
                first = first.merged(others) if others else first
            self._batches.append(first)

    def forget(self, reason: str) -> None:
        """Keep nothing."""
        self.plan.forget(reason)
        self._batches = [None] * len(self._batches)
        if self._spill is not None:
            self._spill.close()

    def _rows(self, evaluation: Evaluation, factor_of: FactorOf, left: int, patient: bool) -> BatchScores:
        size = factor_of.size
        evaluation.check_custom_functions()
        builder = RowsBuilder(evaluation, factor_of(evaluation), size)
        if self.plan.cache == "auto" and builder.vectors > _MANY_VECTORS:
            raise CannotHoldError(f"{builder.vectors} rows for each datum would cost as many backward passes")
        held, fast = None, 0
        try:
            # If the fastest form does not fit, factors may, which are smaller.
            forms = ("auto", "factors") if self.plan.cache == "auto" else (self.plan.cache,)
            for form in ("factors",) if evaluation.problem.is_divided else forms:
                nbytes = builder.nbytes(form)
                if form == "auto" and self._spill is None:
                    # A fast batch must not take the memory of later ones: without a cache, they are slowest.
                    later = max(0, (self._num_batches or 1) - len(self._batches) - 1)
                    fits = nbytes * (1 + later) <= left
                    fast, limit = nbytes, left if fits else left - later * builder.nbytes("factors")
                else:  # what goes to a file must be in memory while it is built
                    limit = left if self._spill is None else self.plan.max_memory
                if nbytes <= limit:
                    held, differentiated = builder.build(form, patient)
                    nbytes = held.nbytes
                if nbytes <= limit:
                    break
                held = None
        except (MemoryError, RuntimeError) as error:
            if self.plan.cache != "auto" or not is_memory_error(error):
                raise
            raise CannotHoldError("memory ran out while rows were built") from error
        except CannotHoldError as error:
            if error.surprising:
                warnings.warn(
                    f"{error}: the data of a batch depend on each other, or lie on no axis that was found. Products "
                    "are right, but slower than they might be.",
                    PlanWarning,
                    stacklevel=2,
                )
            raise
        if held is None:
            reason = f"rows would take {readable(nbytes)}, and {readable(left)} are left"
            if self.plan.cache == "auto":
                raise CannotHoldError(reason)
            self._check_fits(nbytes, size)
            return self._computed(evaluation, factor_of, reason)
        reason = "every parameter's rows by the operation that uses it"
        if differentiated:
            listed = ", ".join(f"{name} ({why})" for name, why in differentiated.items())
            reason = f"rows of {listed} differentiated datum by datum, the others by their operations"
        if self.plan.cache == "auto" and form == "factors" and held.nbytes < fast:
            reason = f"{reason}; rows that are multiplied faster would take {readable(fast)} for a batch"
        if held.nbytes <= left or self._spill is None:
            return self._note(held, size, held.description, held.nbytes, reason)
        file = self._spill.write(held)
        self.plan.add(Entry(size, f"{held.description} in a file", 0, reason, file.size))
        self._batches.append(file)
        return held

    def _check_fits(self, nbytes: int, size: int) -> None:
        """Refuse a bound within which a form that was asked for can never be had."""
        plan = self.plan
        if plan.cache != "auto" and nbytes > plan.max_memory:
            raise ValueError(
                f"cache={plan.cache!r} takes {nbytes} bytes for a batch of {size} data, and max_memory is "
                f"{plan.max_memory}: pass max_memory={nbytes} or more, smaller batches, or cache='auto', which keeps "
                "what fits."
            )

    def _computed(self, evaluation: Evaluation, factor_of: FactorOf, reason: str) -> BatchScores:
        """Return G of a batch that will not be kept, and note it."""
        scores = compute(evaluation, factor_of)
        if isinstance(scores, MaterializedBatch):
            reason = f"{reason}; rows are built anew in every product"
        return self._note(scores, factor_of.size, "none", 0, reason)

    def _note(self, scores: BatchScores, size: int, form: str, nbytes: int, reason: str) -> BatchScores:
        self.plan.add(Entry(size, form, nbytes, reason))
        self._batches.append(scores if form != "none" else None)
        return scores


def compute(evaluation: Evaluation, factor_of: FactorOf, compressed: bool = True) -> BatchScores:
    """Return G of a batch that will not be cached: by its rows, for one vector or two, where all uses are known.

    They take one pass backward and 4 flops for each weight and datum, and J v and Jᵀu about 8.
    """
    try:
        evaluation.choose_mode()
    except ModesError as error:
        if error.disagrees:
            raise
        factor = factor_of(evaluation, compressed)
        return RowsBuilder(evaluation, factor, factor_of.size).build("factors", patient=True)[0]
    lazy = LazyBatch(evaluation, factor_of, compressed)
    if evaluation.reached and not evaluation.custom_functions:
        try:
            builder = RowsBuilder(evaluation, lazy.factor, factor_of.size)
            cheap = builder.vectors <= _FEW_VECTORS and builder.every_use_is_known
            if cheap and builder.nbytes("factors") <= _WORTH * evaluation.saved_bytes():
                batch, differentiated = builder.build("factors")
                if not differentiated:
                    return batch
        except CannotHoldError:
            pass
    return lazy


def uses_of(evaluation: Evaluation, factor_of: FactorOf) -> MaterializedBatch:
    """Return G of a batch with the factors of every contraction, whatever memory they take.

    Raises
    ------
    NotImplementedError
        If rows do not belong to data.
    """
    evaluation.check_custom_functions()
    try:
        builder = RowsBuilder(evaluation, factor_of(evaluation), factor_of.size)
        return builder.build("uses", patient=True)[0]
    except CannotHoldError as error:
        raise NotImplementedError(
            f"layers cannot be told apart for this model: {error}. Use `approximate.diagonal` or `approximate.nystrom`."
        ) from None
