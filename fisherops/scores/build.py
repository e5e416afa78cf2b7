"""Building the rows of G for one batch from the uses of parameters: the only place where rows are made and checked."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fisherops import _torch
from fisherops._memory import is_memory_error
from fisherops._sizes import SIZES
from fisherops.likelihoods import OutputFactor
from fisherops.problem.calls import Use, tensors_in, unchanged
from fisherops.problem.evaluation import Evaluation
from fisherops.problem.separation import keeps_examples_apart
from fisherops.scores.backward import Backward, Reverse, edge_of
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.columns import Columns, Factors, Rows, Table, rows_are_better, rows_of_contraction
from fisherops.scores.convolutions import Convolution
from fisherops.scores.derived import Composed, Derived, Strided, UnknownUseError, UsedValue
from fisherops.scores.positions import Arrangement
from fisherops.scores.rows import rows_by_datum, rows_one_by_one

# Rounding of a sum without cancellation, in units of the squared tolerance.
_CANCELLATION = 64.0


class CannotHoldError(Exception):
    """Why rows of G cannot be held for a batch."""

    def __init__(self, reason: str, surprising: bool = False) -> None:
        super().__init__(reason)
        self.surprising = surprising
        """Whether the model does something else with its parameters than its operations say."""


class PlanWarning(UserWarning):
    """The rows of G cannot be kept for this model, or only slowly, so that products take longer."""


Place = tuple[int, int, int]
"""Number of a node in a graph, number of its output, and number of the use among those of this output."""


@dataclass(eq=False)
class _Pair:
    """The inputs A (N, T, g, i) of a contraction, and the gradients B (N, T, q, g, o) at its outputs."""

    A: Tensor
    B: Tensor
    is_plain: bool = False
    """Whether D is added to data, as a bias is, so that A is ones."""

    def is_better_dense(self, form: str) -> bool:
        """Whether its rows should be held instead, to be small ("factors") or fast ("auto")."""
        if form == "uses":
            return self.is_plain
        (N, T, g, i), (q, _, o) = self.A.shape, self.B.shape[2:]
        return rows_are_better(form, N * q * g * o * i, self.A.numel() + self.B.numel(), T, q)

    def joined(self, other: _Pair) -> _Pair:
        """Return the sum of two uses of the same parameters: the positions of one after those of the other."""
        return _Pair(torch.cat([self.A, other.A], 1), torch.cat([self.B, other.B], 1), self.is_plain and other.is_plain)


class _Found(NamedTuple):
    """The rows of one use."""

    derived: Derived
    columns: Columns | _Pair
    magnitude: Callable[[], float]
    """Returns the size of the rows if nothing cancelled in them, by which rounding is measured."""
    arrangement: Arrangement

    def rows(self, N: int) -> Tensor:
        """Return the rows, (N, q, g, o, i)."""
        x = self.columns
        return rows_of_contraction(x.A, x.B) if isinstance(x, _Pair) else x.rows(0, N)

    def as_columns(self) -> Columns:
        """Return the columns as they are held."""
        x = self.columns
        return Factors(x.A, x.B) if isinstance(x, _Pair) else x


class RowsBuilder:
    """The rows of G of one batch, before they are built.

    Parameters
    ----------
    evaluation : Evaluation
    factor : OutputFactor
    size : int
        Number of data in the batch.

    Raises
    ------
    CannotHoldError
        If rows do not belong to data.
    """

    def __init__(self, evaluation: Evaluation, factor: OutputFactor, size: int) -> None:
        if factor.blocks % size:
            raise CannotHoldError(f"{factor.blocks} terms do not belong to {size} data in equal numbers")
        self._evaluation, self._factor, self._N = evaluation, factor, size
        self._q = factor.blocks // size * factor.rank
        self._f, self._leaves = evaluation.graph
        self._backward = Backward(evaluation, factor, size)
        self._uses = evaluation.uses
        self._form = "factors"
        self.unknown = dict(evaluation.missed)
        """Parameters whose rows must be differentiated datum by datum, with the reason."""

    @property
    def vectors(self) -> int:
        """Rows for each datum, which is the number of backward passes to build them."""
        return self._q

    @property
    def every_use_is_known(self) -> bool:
        """Whether no parameter has to be differentiated datum by datum."""
        return not self.unknown

    def nbytes(self, form: str) -> int:
        """Predict the memory of the rows in a form, as of `build`."""
        total = sum(self._N * self._q * self._leaves[name].numel() for name in self.unknown)
        dense: set[str] = set()
        inputs: set[int] = set()
        for use, names in self._uses:
            if self.unknown.keys() & set(names):
                continue
            factors = None if form == "scores" else self._elements_of_factors(use, form)
            if factors is not None:
                total += factors
                if use.window is not None and isinstance(use.a, Tensor):  # held once for all that share it
                    total -= use.a.numel() if id(use.a) in inputs else 0
                    inputs.add(id(use.a))
            else:
                total += sum(self._N * self._q * self._leaves[name].numel() for name in set(names) - dense)
                dense |= set(names)
        return total * self._f.itemsize

    def _elements_of_factors(self, use: Use, form: str) -> int | None:
        """Predict the elements that a use takes as factors, or None if its rows are held dense."""
        if use.index is not None:
            return use.index().numel() * (self._q * math.prod(use.value.shape[1:]) + 2)
        if use.window is not None:
            return self._elements_of_convolution(use, form)
        axes = _axes_of(use)
        if axes is None:
            return None
        g, o, i, positions = axes
        T = max(1, positions // self._N)
        rows, factors = self._N * self._q * g * o * i, self._N * T * g * (i + self._q * o)
        return None if rows_are_better(form, rows, factors, T, self._q) else factors

    def _elements_of_convolution(self, use: Use, form: str) -> int | None:
        """Predict the elements of input and gradients, or None if dense rows are held."""
        x, out = use.call.get(0, "input"), use.call.shape
        assert use.window is not None
        if out is None:
            return None
        elements = x.numel() + self._q * math.prod(out)
        moved = x.shape if use.window.is_transposed else out
        T = max(1, moved[0] // self._N) * math.prod(moved[2:])
        rows = self._N * self._q * use.value.numel()
        return None if rows_are_better(form, rows, elements, T, self._q) else elements

    def build(self, form: str, patient: bool = False) -> tuple[MaterializedBatch, dict[str, str]]:
        """Build the rows, with every piece checked.

        Parameters
        ----------
        form : {"auto", "scores", "factors", "uses"}
            What to do with weights that are used linearly: the cheaper, dense rows, factors, or factors whatever they
            take.
        patient : bool
            Whether rows may be differentiated one by one, which is always right, where nothing faster works.

        Returns
        -------
        batch : MaterializedBatch
        differentiated : dict
            Parameters whose rows were differentiated datum by datum, and why.

        Raises
        ------
        CannotHoldError
            If rows cannot be found by datum, or are not those of plain reverse mode.
        """
        e, facts, self._form = self._evaluation, self._evaluation.facts, form
        vectors = self._factor.columns()
        if not vectors.isfinite().all():
            raise FloatingPointError(
                "the scores of the likelihood contain NaN or infinity although the outputs are finite: check its "
                "`log_prob` or `exact`, or pass dtype='float64'."
            )
        gradients = self._backward.at_uses([use for use, _ in self._uses], vectors)
        if e.problem.is_divided:
            return self._build_divided(gradients, vectors), {}
        known = None if e.custom_functions else facts.rows.get((self._N, self._q))
        with torch.no_grad():
            places = self._places()
            reverse = Reverse(self._backward, gradients, vectors)
            is_known = known is not None and not self.unknown and self._holds(known, places)
            own = [known.arrangements.get(place) for place in places] if known is not None and is_known else None
            found, unknown = self._found(gradients, reverse, own)
            held = self._assembled(found, {}, form)
            surprising: list[str] = []
            if own is None or unknown.keys() - self.unknown.keys():
                surprising = self._probe(held, found, unknown, reverse)
                if surprising and reverse.has_assumed:
                    # An axis that has the length of the data is not theirs.
                    reverse.is_asked = True
                    found, unknown = self._found(gradients, reverse, None)
                    held = self._assembled(found, {}, form)
                    surprising = self._probe(held, found, unknown, reverse)
                is_reusable = all(x is None or x.arrangement.reusable for x in found)
                if not unknown and not e.custom_functions and is_reusable and (known is None or known.keeps_apart):
                    pairs = zip(places, found, strict=True)
                    facts.rows[self._N, self._q] = KnownRows(
                        {place: None if x is None else x.arrangement for place, x in pairs if place is not None}
                    )
            if unknown:
                del held  # before the rows of other parameters take memory
                held = self._assembled(found, self._differentiated(unknown, surprising, patient), form)
            return held, unknown

    def _places(self) -> list[Place | None]:
        """Return where the gradient of each use is in the graph, None if the outputs do not depend on its call.

        Calls that the outputs do not depend on, and the order of calls, can differ between graphs of one signature.
        """
        number = {node: k for k, node in enumerate(self._evaluation.nodes)}
        counts: Counter[tuple[int, int]] = Counter()
        places: list[Place | None] = []
        for use, _ in self._uses:
            edge = edge_of(use)
            if edge is None or edge[0] not in number:
                places.append(None)
                continue
            at = number[edge[0]], edge[1]
            places.append((*at, counts[at]))
            counts[at] += 1
        return places

    def _holds(self, known: KnownRows, places: Sequence[Place | None]) -> bool:
        """Return whether what is known of a graph holds for this batch, whatever the values of its data are.

        Otherwise which example a position belongs to, or whether it belongs to one, can depend on the values of the
        data: by sorting, gates or routing.
        """
        if known.keeps_apart is None:
            ends = {edge[0] for use, _ in self._uses if (edge := edge_of(use)) is not None}
            known.keeps_apart = keeps_examples_apart(self._f, self._N, ends)
        return known.keeps_apart and known.arrangements.keys() == set(places) - {None}

    def _found(
        self, gradients: Mapping[Any, Tensor], reverse: Reverse, known: Sequence[Arrangement | None] | None
    ) -> tuple[list[_Found | None], dict[str, str]]:
        """Return the rows of each use, None where nothing flows back or its parameters are unknown; and these."""
        unknown = dict(self.unknown)
        found: list[_Found | None] = []
        for number, (use, names) in enumerate(self._uses):
            edge = edge_of(use)
            b = gradients.get(edge) if edge is not None else None
            found.append(None)
            if b is None or not b.numel() or unknown.keys() & set(names):
                continue
            try:
                found[number] = self._rows_of(use, names, b, reverse, None if known is None else known[number])
            except Exception as error:  # a rule that does not fit this call says less than differentiation
                if is_memory_error(error):
                    raise
                text = str(error) if isinstance(error, UnknownUseError) else f"{type(error).__name__}: {error}"
                reason = f"operation {use.call.name} ({text.splitlines()[0][:80]})" if text else use.call.name
                unknown |= dict.fromkeys(names, reason)
        _drop(found, [names for _, names in self._uses], unknown)
        return found, unknown

    def _rows_of(
        self, use: Use, names: tuple[str, ...], b: Tensor, reverse: Reverse, known: Arrangement | None
    ) -> _Found:
        """Return the rows of one use from b (q, ...)."""
        value = UsedValue(use, names, self._leaves, self._evaluation.problem.is_divided)
        if use.is_generic:  # one entry of the leading axis of the call at a time
            M = b.shape[1]
            arrangement = known or reverse.arrangement(use, (M,), lambda b: b.flatten(2), b)
            rows = arrangement(_rows_of_call(use, b))  # (N, T, q, d)
            rows = rows[:, 0] if rows.shape[1] == 1 else rows.sum(1)
            derived = value.derived(value.Z, (0, 0))
            return _Found(derived, Rows(rows[:, :, None, None]), lambda: float(rows.norm()), arrangement)
        if use.index is not None:
            index = use.index()
            arrangement = known or reverse.arrangement(use, index.shape, lambda b: use.take(b).flatten(1, -2), b)
            B = arrangement(use.take(b).flatten(1, -2).transpose(0, 1))
            places = arrangement(index.reshape(-1) % len(value.D))
            derived = value.derived(value.D, (0, 1))
            return _Found(derived, Table(places, B, len(value.D)), lambda: float(b.norm()), arrangement)
        if use.window is not None:
            a = (use.a() if callable(use.a) else use.call.get(0, "input")).detach().to(b.dtype)
            arrangement = known or reverse.arrangement(use, (len(a),), lambda b: b.flatten(2), b)
            with torch.enable_grad():
                derived = value.derived(*use.window.of_weight(value.D))
            columns = Convolution(arrangement(a), arrangement(b.transpose(0, 1)), use.window, value.D.shape)
            if self._form == "scores" or columns.is_better_dense(self._form):
                # Rows that are held dense anyway are quicker to compare than made again.
                dense = Rows(columns.rows(0, self._N))
                return _Found(derived, dense, lambda: float(dense.tensors[0].norm()), arrangement)
            return _Found(derived, columns, lambda: columns.magnitude, arrangement)
        form = _NormalForm(use, value.D, b, self._N, value.repeats)
        arrangement = known or reverse.arrangement(use, form.sizes, form.by_position, b)
        A, B = form.arranged(arrangement, self._N, b)
        derived = value.derived(form.view, form.split)
        g, o, i = derived.shape
        A, B = A.reshape(*A.shape[:2], g, i), B.reshape(*B.shape[:3], g, o)

        def magnitude() -> float:
            # Before sums over positions, in which b may cancel, such as of biases that a softmax does not see.
            return float(b.norm()) * math.sqrt(float(A.square().sum((2, 3)).max()))

        return _Found(derived, _Pair(A, B, use.a is None), magnitude, arrangement)

    def _probe(
        self, held: MaterializedBatch, found: list[_Found | None], unknown: dict[str, str], reverse: Reverse
    ) -> list[str]:
        """Compare random sums of the rows with plain reverse mode, and note in `unknown` where they differ.

        Returns the parameters whose operations seemed known, and whose rows differ nevertheless.
        """
        e, f = self._evaluation, self._f
        for x in found:
            if x is not None and isinstance(x.derived, Composed) and not _is_adjoint(x.derived, f):
                unknown |= dict.fromkeys(x.derived.names, "the derivative of what was computed from it")
        truth, probes = reverse.sums, reverse.probes
        fine, tolerance = torch.finfo(f.dtype).eps ** 0.5, e.facts.tolerance
        differences = self._norms(held.apply_t(reverse.weights[:probes].flatten(1)) - truth[:probes])
        sizes = self._norms(truth[:probes])
        if reverse.is_coarse:  # reverse mode is linear but for rounding, which so is measured
            (rounding,) = self._norms(truth[-1:] - truth[-2:-1] - truth[-3:-2])
        surprising = []
        for k, name in enumerate(self._leaves):
            if name in unknown or name not in e.reached:
                continue
            for difference, size in zip(differences, sizes, strict=True):
                allowed = tolerance * size[k]
                if reverse.is_coarse:
                    allowed = min(allowed, 8 * rounding[k] + fine * size[k])
                if difference[k] <= allowed:
                    continue
                magnitude = sum(x.magnitude() for x in found if x is not None and name in x.derived.names)
                floor = _CANCELLATION * tolerance**2 * magnitude
                if reverse.is_coarse:  # what cancels leaves the rounding that was measured
                    floor = max(floor, min(8 * rounding[k], _CANCELLATION * tolerance * magnitude))
                if not difference[k] <= allowed + floor:
                    surprising.append(name)
                    unknown[name] = "its rows are not those of reverse mode by its operations"
                    break
        _drop(found, [names for _, names in self._uses], unknown)
        return surprising

    def _norms(self, V: Tensor) -> list[list[float]]:
        """Return the norms of the pieces of vectors (K, D) that belong to each parameter."""
        lengths = [leaf.numel() for leaf in self._leaves.values()]
        norms: list[list[float]] = [torch.stack(_torch.norms(v.split(lengths))).tolist() for v in V]
        return norms

    def _differentiated(
        self, unknown: Mapping[str, str], surprising: Sequence[str], patient: bool
    ) -> dict[str, Tensor]:
        """Return the rows (N · q, n) of parameters whose uses are not known, differentiated datum by datum."""
        names = [name for name in self._leaves if name in unknown and name in self._evaluation.reached]
        if not names:
            return {}
        rows = rows_by_datum(self._evaluation, self._factor, self._N, names)
        if rows is None and not patient:
            reasons = "; ".join(dict.fromkeys(unknown[name] for name in names))
            raise CannotHoldError(
                f"the rows for {', '.join(names)} cannot be differentiated datum by datum ({reasons})",
                surprising=bool(surprising),
            )
        if rows is None:
            listed = "; ".join(f"{name}: {unknown[name]}" for name in names[:5])
            warnings.warn(
                f"rows of the score matrix are differentiated one by one, which is slow, for {listed}. Products are "
                "right.",
                PlanWarning,
                stacklevel=2,
            )
            rows = rows_one_by_one(self._evaluation, self._factor, self._N, names)
        pieces = rows.split([self._leaves[name].numel() for name in names], dim=1)
        return dict(zip(names, pieces, strict=True))

    def _assembled(
        self, found: Sequence[_Found | None], dense: Mapping[str, Tensor], form: str, merge: bool = True
    ) -> MaterializedBatch:
        """Put the rows of all uses together: dense if every use of a parameter is, else as columns of their own."""
        parameters = self._evaluation.problem.parameters

        def is_dense(x: _Found) -> bool:
            if form == "scores" or isinstance(x.columns, Rows):
                return merge
            return merge and isinstance(x.columns, _Pair | Convolution) and x.columns.is_better_dense(form)

        as_rows: list[_Found] = []
        blocks: list[tuple[Derived, Columns]] = []
        for x in _joined([x for x in found if x is not None]):
            if is_dense(x):
                as_rows.append(x)
            else:
                blocks.append((x.derived, x.as_columns()))
        names = {*dense, *(name for x in as_rows for name in x.derived.names)}
        spans = [(name, span) for name, span in parameters.spans.items() if name in names]
        lengths = [stop - start for _, (start, stop) in spans]
        matrix = torch.empty(self._N * self._q, sum(lengths), dtype=self._f.dtype, device=self._f.device)
        targets = dict(zip((name for name, _ in spans), matrix.split(lengths, 1), strict=True))
        fresh = set(targets)

        def put(pieces: Mapping[str, Tensor]) -> None:
            for name, piece in pieces.items():
                (targets[name].copy_ if name in fresh else targets[name].add_)(piece)
                fresh.discard(name)

        put(dense)
        for x in as_rows:
            put(x.derived.pull(x.rows(self._N).flatten(0, 1)))
        layers = self._layers(found, {name for derived, _ in blocks for name in derived.names})
        batch = MaterializedBatch(matrix, [span for _, span in spans], blocks, self._N, parameters.spans, layers)
        batch.describe(self._uses, [x and x.derived for x in found])
        return batch

    def _layers(self, found: Sequence[_Found | None], weights: set[str]) -> dict[str, str]:
        """Name the weights among these, and the biases, that are used in one call together and nowhere else."""
        counts = Counter(name for _, names in self._uses for name in names)
        alone = [
            (use, names[0], x)
            for (use, names), x in zip(self._uses, found, strict=True)
            if x is not None and len(names) == 1 == counts[names[0]] and use.take is unchanged
            and isinstance(x.derived, Strided) and x.derived.is_injective and isinstance(x.columns, _Pair)
        ]  # fmt: skip
        biases = {
            id(use.call): (name, x.derived.shape) for use, name, x in alone if use.a is None and name not in weights
        }
        return {
            name: biases[id(use.call)][0]
            for use, name, x in alone
            if name in weights and id(use.call) in biases and biases[id(use.call)][1] == (1, x.derived.shape[1], 1)
        }

    # ---- Sharded parameters -------------------------------------------------------------------

    def _build_divided(self, gradients: Mapping[Any, Tensor], vectors: Tensor) -> MaterializedBatch:
        """Build the rows where no rank has memory for a gradient of all parameters.

        A plain backward pass gives them one after the other, and each is compared when it is there.
        """
        with torch.no_grad():
            reverse = Reverse(self._backward, gradients, vectors, is_whole=False)
            found, unknown = self._found(gradients, reverse, None)
            found = [x and x._replace(columns=x.as_columns()) for x in found]
        if unknown:
            name, reason = next(iter(unknown.items()))
            raise CannotHoldError(f"the use of {name} is not known: {reason}")
        f, w = self._f, self._backward.weights(1)
        sizes: dict[str, float] = {}
        differences: dict[str, float] = {}

        def look(name: str, gradient: Tensor) -> None:
            truth = gradient.reshape(1, -1)
            total = torch.zeros_like(truth)
            with torch.no_grad():
                for x in found:
                    if x is not None and name in x.derived.names:
                        total += x.derived.pull(x.as_columns().apply_t(w))[name]
            sizes[name], differences[name] = float(truth.norm()), float((total - truth).norm())

        tensors = self._evaluation.problem.parameters.tensors.values()
        users = [p.grad for p in tensors]
        hooks = [leaf.register_hook(partial(look, name)) for name, leaf in self._leaves.items()]
        try:
            for p in tensors:
                p.grad = None  # or the user's would be added to
            U = self._factor.apply(w.view(1, self._factor.blocks, self._factor.rank)).reshape(f.shape)
            torch.autograd.backward([f], [U], retain_graph=True)
        finally:
            for hook in hooks:
                hook.remove()
            for p, gradient in zip(tensors, users, strict=True):
                p.grad = gradient
        scale = 1e-3 * sum(size**2 for size in sizes.values()) ** 0.5
        for name, size in sizes.items():
            if not differences.get(name, inf) <= self._evaluation.facts.tolerance * (size + scale):
                raise CannotHoldError(f"the rows of {name} are not those of plain reverse mode")
        with torch.no_grad():
            return self._assembled(found, {}, "factors", merge=False)


def _drop(found: list[_Found | None], owners: Sequence[tuple[str, ...]], unknown: dict[str, str]) -> None:
    """Drop the rows of unknown parameters, and of those that some value was computed from together with these."""
    for names in owners:
        if unknown.keys() & set(names):
            unknown |= {name: unknown.get(name, "used together with others") for name in names}
    for number, names in enumerate(owners):
        if unknown.keys() & set(names):
            found[number] = None


@dataclass
class KnownRows:
    """What is known of the rows of graphs of one signature, which have agreed with reverse mode."""

    arrangements: dict[Place, Arrangement | None]
    keeps_apart: bool | None = None
    """Whether the graph keeps the examples apart for any data; None as long as no second batch has asked."""


class _NormalForm:
    """A contraction with the axes of D, a and b sorted: groups g, outputs o, inputs i, and positions."""

    def __init__(self, use: Use, D: Tensor, b: Tensor, N: int, repeats: Callable[[Tensor, int], bool]) -> None:
        assert use.letters is not None
        self._take, self._N = use.take, N
        self._splits: list[int] = []
        b = use.take(b)
        of_a, of_D, out = (list(letters) for letters in use.letters)
        a = use.a() if callable(use.a) else use.a
        A = b.new_ones(()) if a is None else a.detach().to(b.dtype)
        of_a = of_a if A.ndim else []
        with torch.enable_grad():
            if not use.value.is_leaf and N > 1:
                for k in reversed(range(D.ndim)):  # an axis of data and something else
                    letter, size = of_D[k], D.shape[k]
                    if letter not in out or size % N or size == N:
                        continue
                    split = D.unflatten(k, (N, -1))
                    if not repeats(split, k):
                        continue
                    D = split
                    j = out.index(letter)
                    b = b.unflatten(1 + j, (N, -1))
                    self._splits.append(1 + j)
                    if letter in of_a:
                        A = A.unflatten(of_a.index(letter), (N, -1) if A.shape[of_a.index(letter)] > 1 else (1, 1))
                    for letters in (of_a, of_D, out):
                        if letter in letters:
                            letters.insert(letters.index(letter), "data")
            for k in reversed(range(D.ndim)):
                is_data = D.shape[k] == N and of_D[k] in out and not use.value.is_leaf
                if D.shape[k] == 1 or (is_data and repeats(D, k)):
                    D = D.select(k, 0)
                    del of_D[k]
            for k in reversed(range(A.ndim)):
                if A.shape[k] == 1:
                    A = A.select(k, 0)
                    del of_a[k]
            self._positions = [c for c in out if c not in of_D]
            g = [c for c in of_D if c in of_a and c in out]
            o = [c for c in of_D if c in out and c not in of_a]
            i = [c for c in of_D if c in of_a and c not in out]
            if len(g) + len(o) + len(i) < len(of_D):
                raise UnknownUseError("an axis of the parameter alone")
            self.view = D.permute([of_D.index(c) for c in g + o + i])
        self.split = len(g), len(g) + len(o)
        summed = [c for c in of_a if c not in out and c not in of_D]
        if summed:
            A = A.sum([of_a.index(c) for c in summed])
            of_a = [c for c in of_a if c not in summed]
        sizes = dict(zip(out, b.shape[1:], strict=True))
        self.sizes = tuple(sizes[c] for c in self._positions)
        self._order = [0, *(1 + out.index(c) for c in self._positions + g + o)]
        self._A, self._of_a, self._gi = A, of_a, g + i
        self._has_positions = any(c in of_a for c in self._positions)

    def by_position(self, b: Tensor) -> Tensor:
        """Arrange b (q, ...) as (q, P, ...) with axes g, o."""
        b = self._take(b)
        for axis in self._splits:
            b = b.unflatten(axis, (self._N, -1))
        b = b.permute(self._order)
        return b.flatten(1, len(self._positions)) if self._positions else b.unsqueeze(1)

    def arranged(self, arrangement: Arrangement, N: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return a as (N, T, ...) with axes g, i and b as (N, T, q, ...) with axes g, o."""
        B = arrangement(self.by_position(b).transpose(0, 1))
        if not self._has_positions:
            A = self._A.permute([self._of_a.index(c) for c in self._gi])
            return A.expand(N, 1, *A.shape), B.sum(1, keepdim=True)
        own = [c for c in self._positions if c in self._of_a]
        A = self._A.permute([self._of_a.index(c) for c in own + self._gi])
        for k, c in enumerate(self._positions):
            A = A if c in own else A.unsqueeze(k)
        rest = A.shape[len(self._positions) :]
        A = A.expand(*self.sizes, *rest).reshape(math.prod(self.sizes), *rest)
        return arrangement(A), B


def _axes_of(use: Use) -> tuple[int, int, int, int] | None:
    """Predict (g, o, i) and the number of positions on which a depends; None for uses that are no contraction."""
    if use.letters is None or use.call.shape is None:
        return None
    of_a, of_D, out = use.letters
    if use.a is None or (isinstance(use.a, Tensor) and use.a.ndim == 0):
        of_a = ()
    value = use.value if use.through is unchanged else use.through(use.stand_in())
    sizes = dict(zip(of_D, value.shape, strict=True))
    shape = dict(zip(out, use.call.shape, strict=True)) if len(out) == len(use.call.shape) else {}
    g = math.prod(n for c, n in sizes.items() if c in of_a and c in out)
    o = math.prod(n for c, n in sizes.items() if c in out and c not in of_a)
    i = math.prod(n for c, n in sizes.items() if c not in out)
    positions = [c for c in out if c not in sizes]
    has_positions = any(c in of_a for c in positions)
    return g, o, i, math.prod(shape.get(c, 1) for c in positions) if has_positions else 0


def _rows_of_call(use: Use, b: Tensor) -> Tensor:
    """Return the rows (M, q, d) of a use known by its derivative only, for the M entries of the leading axis."""
    call, D, M = use.call, use.value, b.shape[1]
    if not D.untyped_storage().nbytes():  # sharded, and freed: enough for what is linear in it, which is compared
        D = torch.zeros(D.shape, dtype=D.dtype, device=D.device)
    data = [t for t in tensors_in((call.args, call.kwargs)) if id(t) not in call.derived and t.ndim and len(t) == M]
    if not data:
        raise UnknownUseError("no argument has its leading axis")

    def put(x: Any, table: Mapping[int, Tensor]) -> Any:
        if isinstance(x, Tensor):
            freed = x.numel() and x.layout is torch.strided and not x.untyped_storage().nbytes()
            return table.get(id(x), x.new_zeros(x.shape) if freed else x)
        if isinstance(x, tuple | list):
            return [put(y, table) for y in x]
        return x

    def one(xs: tuple[Tensor, ...], own: Tensor) -> Tensor:
        def h(d: Tensor) -> Tensor:
            table = {id(t): x[None] for t, x in zip(data, xs, strict=True)} | {id(use.value): d}
            out = call.func(*put(call.args, table), **{k: put(v, table) for k, v in call.kwargs.items()})
            return out if isinstance(out, Tensor) else out[0]

        pull = vjp(h, D.detach())[1]
        result: Tensor = vmap(lambda y: pull(y[None].to(D.dtype))[0])(own)
        return result

    step = max(1, SIZES[b.device].block // (len(b) * D.numel() * b.itemsize))
    xs = tuple(t.detach() for t in data)
    blocks = [
        vmap(one, in_dims=(0, 1))(tuple(x[m : m + step] for x in xs), b[:, m : m + step]) for m in range(0, M, step)
    ]
    return torch.cat(blocks).flatten(2).to(b.dtype)


def _is_adjoint(derived: Composed, like: Tensor) -> bool:
    """Whether the derivative of a derived value and its transpose belong together: ⟨u, J v⟩ = ⟨Jᵀu, v⟩."""
    generator = torch.Generator(like.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

    u = random(1, *derived.shape)
    pulled = derived.pull(u)
    v = {name: random(*piece.shape) for name, piece in pulled.items()}
    forward = float((derived.push(v) * u).sum())
    reverse = float(sum((piece * v[name]).sum() for name, piece in pulled.items()))
    scale = sum(float(piece.norm()) for piece in pulled.values())
    return bool(abs(forward - reverse) <= 10 * torch.finfo(derived.dtype).eps ** 0.5 * scale)


def _sum_of_uses(first: Columns | _Pair, second: Columns | _Pair) -> Columns | _Pair | None:
    """Return the rows of two uses of the same elements together, or None if they stay apart."""
    if isinstance(first, _Pair) and isinstance(second, _Pair):
        return first.joined(second)
    if isinstance(first, Convolution) and isinstance(second, Convolution):
        return first.joined(second)
    return None


def _joined(found: Sequence[_Found]) -> list[_Found]:
    """Join uses of the same elements, such as those of the steps of a recurrent layer."""
    result: list[_Found] = []
    place: dict[Any, int] = {}
    for x in found:
        if isinstance(x.columns, _Pair | Convolution) and isinstance(x.derived, Strided):
            k = place.setdefault(x.derived.key, len(result))
            if k < len(result):
                joined = _sum_of_uses(result[k].columns, x.columns)
                if joined is not None:
                    result[k] = result[k]._replace(columns=joined)
                    continue
        result.append(x)
    return result


__all__ = ["CannotHoldError", "KnownRows", "PlanWarning", "RowsBuilder"]
