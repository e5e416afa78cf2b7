"""What is kept of G between products: chosen for each batch by cost, within a bound on memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fisherops._memory import is_memory_error
from fisherops.problem.evaluation import ELEMENTARY_ATTENTION, Evaluation, ModesError
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.build import CannotHoldError, PlanWarning, RowsBuilder
from fisherops.scores.factor import Factor
from fisherops.scores.recompute import RecomputedScores
from fisherops.scores.spill import InOrder, Spill, SpilledScores, loaded

Scores = MaterializedBatch | RecomputedScores

CACHES = ("auto", "scores", "factors", "linearization", "none")

# Rows of G for each datum, and so backward passes to build them, that "auto" takes; and where nothing is kept.
_MANY_VECTORS = 16
_FEW_VECTORS = 2

# Memory of rows that are used once, in units of what the graph has saved.
_WORTH = 4


@dataclass(frozen=True)
class Entry:
    """What was chosen for one batch."""

    size: int
    form: str
    nbytes: int
    reason: str
    file_size: int = 0


@dataclass
class Plan:
    """What an operator keeps between products; print it.

    Attributes
    ----------
    cache : str
        What was asked for.
    max_memory : int
        Bytes that may be kept.
    entries : list of Entry
        The choice for each batch, its memory and reason.
    """

    cache: str
    max_memory: int
    entries: list[Entry] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def file_size(self) -> int:
        """Bytes kept in files."""
        return sum(entry.file_size for entry in self.entries)

    @property
    def holds_rows(self) -> bool:
        """Whether rows of G are kept, dense or as factors, for every batch."""
        return all(entry.form not in ("none", "linearization") for entry in self.entries)

    def __str__(self) -> str:
        lines = [
            f"cache={self.cache!r}: {_bytes(self.nbytes)} of at most {_bytes(self.max_memory)} kept "
            f"for {sum(entry.size for entry in self.entries)} data in {len(self.entries)} batches"
            + (f", {_bytes(self.file_size)} in files" if self.file_size else "")
        ]
        groups: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.form, entry.reason), []).append(entry)
        for (form, reason), entries in groups.items():
            lines.append(f"  {len(entries)} × {form}, {_bytes(sum(e.nbytes + e.file_size for e in entries))}: {reason}")
        return "\n".join(lines)


class Keeper:
    """Chooses the form of each batch while a pass goes on, and keeps what fits.

    Parameters
    ----------
    cache : str
        One of `CACHES`.
    max_memory : int
        Bytes that may be kept.
    spill : path or None
        A folder for files with the rows that do not fit.
    """

    def __init__(self, cache: str, max_memory: int, spill: Any = None) -> None:
        self.plan = Plan(cache, max_memory)
        self.kept: list[Scores | SpilledScores | None] = []
        self._spill = None if spill is None else Spill(spill)
        # Of linearizations only: each holds the graph of its batch.
        self._redraws: list[Callable[..., Factor]] = []

    @property
    def complete(self) -> bool:
        """Whether every batch is kept, so that products need no data."""
        return all(scores is not None for scores in self.kept)

    def in_order(self) -> InOrder:
        """Return the batches, all of which are kept."""
        return InOrder(self.kept)

    def batch(self, number: int) -> Scores | None:
        """Return a batch if it is kept."""
        scores: Scores | None = loaded(self.kept[number])
        return scores

    def choose(
        self, evaluation: Evaluation, make_factor: Callable[[], Factor], size: int, redraw: Callable[..., Factor]
    ) -> Scores:
        """Return G of the next batch in the form chosen for it.

        Parameters
        ----------
        evaluation : Evaluation
        make_factor : callable
            Returns the output factor for the present outputs of `evaluation`.
        size : int
            Number of data in the batch.
        redraw : callable
            ``(op, sampler) -> factor``, the output factor for another operator with other draws.
        """
        cache, reason = self.plan.cache, "asked for"
        left = self.plan.max_memory - self.plan.nbytes
        if cache in ("auto", "scores", "factors") and evaluation.reached:
            try:
                return self._rows(evaluation, make_factor, size, left, patient=cache != "auto")
            except CannotHoldError as error:
                if evaluation.problem.sharded:
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
                reason = f"{reason}; a linearization would take {_bytes(nbytes)}, and {_bytes(left)} are left"
        if form == "none":
            return self._computed(evaluation, make_factor, size, reason)
        if not evaluation.linearize():
            try:
                evaluation.choose_mode()
            except ModesError as error:
                if cache != "auto" or error.disagrees:
                    raise
                # Neither rows by datum nor products with J: what is left is right, and slow.
                return self._rows(evaluation, make_factor, size, left, patient=True)
        self._redraws.append(redraw)
        return self._note(RecomputedScores(evaluation, make_factor(), size), size, form, nbytes, reason)

    def redrawn(self, op: Any, sampler: Any) -> Keeper | None:
        """Return what is kept for an operator with other draws, or None where rows must be made anew."""
        linearized = [scores for scores in self.kept if isinstance(scores, RecomputedScores)]
        if len(linearized) < len(self.kept):
            return None
        other = Keeper(self.plan.cache, self.plan.max_memory)
        other.plan, other._redraws = self.plan, self._redraws
        other.kept = [s.with_factor(redraw(op, sampler)) for s, redraw in zip(linearized, self._redraws, strict=True)]
        return other

    def forget(self, reason: str) -> None:
        """Keep nothing."""
        self.plan.entries = [Entry(entry.size, "none", 0, reason) for entry in self.plan.entries]
        self.kept = [None] * len(self.kept)
        self._redraws = []
        if self._spill is not None:
            self._spill.close()

    def _rows(
        self, evaluation: Evaluation, make_factor: Callable[[], Factor], size: int, left: int, patient: bool
    ) -> Scores:
        evaluation.check_custom_functions()
        builder = RowsBuilder(evaluation, make_factor(), size)
        if self.plan.cache == "auto" and builder.vectors > _MANY_VECTORS:
            raise CannotHoldError(f"{builder.vectors} rows for each datum would cost as many backward passes")
        held = None
        # What goes to a file must be in memory while it is built.
        limit = left if self._spill is None else self.plan.max_memory
        try:
            # Where the cheapest form does not fit, factors may, which are smaller for long sequences.
            forms = ("auto", "factors") if self.plan.cache == "auto" else (self.plan.cache,)
            for form in ("factors",) if evaluation.problem.sharded else forms:
                nbytes = builder.nbytes(form)
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
            reason = f"rows would take {_bytes(nbytes)}, and {_bytes(left)} are left"
            if self.plan.cache == "auto":
                raise CannotHoldError(reason)
            self._check_fits(nbytes, size)
            return self._computed(evaluation, make_factor, size, reason)
        reason = "every parameter's rows by the operation that uses it"
        if differentiated:
            listed = ", ".join(f"{name} ({why})" for name, why in differentiated.items())
            reason = f"rows of {listed} differentiated datum by datum, the others by their operations"
        if held.nbytes <= left or self._spill is None:
            return self._note(held, size, held.description, held.nbytes, reason)
        file = self._spill.write(held)
        self.plan.entries.append(Entry(size, f"{held.description} in a file", 0, reason, file.size))
        self.kept.append(file)
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

    def _computed(self, evaluation: Evaluation, make_factor: Callable[[], Factor], size: int, reason: str) -> Scores:
        """Return G of a batch that will not be kept, and note it."""
        scores = compute(evaluation, make_factor, size)
        if isinstance(scores, MaterializedBatch):
            reason = f"{reason}; rows are built anew in every product"
        return self._note(scores, size, "none", 0, reason)

    def _note(self, scores: Scores, size: int, form: str, nbytes: int, reason: str) -> Scores:
        self.plan.entries.append(Entry(size, form, nbytes, reason))
        self.kept.append(scores if form != "none" else None)
        return scores


def compute(evaluation: Evaluation, make_factor: Callable[[], Factor], size: int) -> Scores:
    """Return G of a batch that will not be kept: by its rows, for one vector or two, where all uses are known.

    They take one pass backward and 4 flops for each weight and datum, and J v and Jᵀu about 8.
    """
    try:
        evaluation.choose_mode()
    except ModesError as error:
        if error.disagrees:
            raise
        return RowsBuilder(evaluation, make_factor(), size).build("factors", patient=True)[0]
    factor = make_factor()
    if evaluation.reached and not evaluation.custom_functions:
        try:
            builder = RowsBuilder(evaluation, factor, size)
            cheap = builder.vectors <= _FEW_VECTORS and builder.every_use_is_known
            if cheap and builder.nbytes("factors") <= _WORTH * evaluation.saved_bytes():
                batch, differentiated = builder.build("factors")
                if not differentiated:
                    return batch
        except CannotHoldError:
            pass
    return RecomputedScores(evaluation, factor, size)


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024  # type: ignore[assignment]
    return f"{n:.3g} GiB"
