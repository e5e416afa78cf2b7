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

from fisherops._memory import is_memory_error
from fisherops.likelihoods import OutputFactor
from fisherops.problem.calls import Call, Use, tensors_in, unchanged
from fisherops.problem.evaluation import Evaluation, derivative_not_finite
from fisherops.problem.separation import keeps_examples_apart
from fisherops.scores.batch import MaterializedBatch, Span
from fisherops.scores.columns import Columns, Factors, Rows, Table, rows_are_cheaper, rows_are_smaller
from fisherops.scores.derived import Composed, Derived, Strided
from fisherops.scores.positions import Arrangement, measure, only_axis
from fisherops.scores.rows import rows_by_datum, rows_one_by_one

# Bytes of the rows of one call that are differentiated at once.
_BLOCK_BYTES = 2**26

# Random sums of rows that are compared with reverse mode: one says enough where each parameter has many elements.
_PROBES, _MANY_ELEMENTS = 2, 3

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


class UnknownUseError(Exception):
    """Why the rows for a use cannot be found by what its operation means."""


Place = tuple[int, int, int]
"""Number of a node in a graph, number of its output, and number of the use among those of this output."""


class _Found(NamedTuple):
    """The rows of one use."""

    derived: Derived
    columns: Columns
    magnitude: float
    """The size of the rows if nothing cancelled in them, by which rounding is measured."""
    arrangement: Arrangement


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
        self._uses = evaluation.uses
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
        for use, names in self._uses:
            if self.unknown.keys() & set(names):
                continue
            factors = None if form == "scores" else self._elements_of_factors(use, form)
            if factors is not None:
                total += factors
            else:
                total += sum(self._N * self._q * self._leaves[name].numel() for name in set(names) - dense)
                dense |= set(names)
        return total * self._f.itemsize

    def _elements_of_factors(self, use: Use, form: str) -> int | None:
        """Predict the elements that a use takes as factors, or None if its rows are held dense."""
        if use.index is not None:
            return use.index().numel() * (self._q * math.prod(use.value.shape[1:]) + 2)
        axes = _axes_of(use)
        if axes is None:
            return None
        g, o, i, positions = axes
        T = max(1, positions // self._N)
        if rows_are_smaller(T, self._q, o, i) or (form == "auto" and rows_are_cheaper(T, self._q, o, i)):
            return None
        return self._N * T * g * (i + self._q * o)

    def build(self, form: str, patient: bool = False) -> tuple[MaterializedBatch, dict[str, str]]:
        """Build the rows, with every piece checked.

        Parameters
        ----------
        form : {"auto", "scores", "factors"}
            What to do with weights that are used linearly: the cheaper, dense rows, or factors.
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
        e, facts = self._evaluation, self._evaluation.facts
        vectors = self._factor.columns()
        if not vectors.isfinite().all():
            raise FloatingPointError(
                "the scores of the likelihood contain NaN or infinity although the outputs are finite: check its "
                "`log_prob` or `exact`, or pass dtype='float64'."
            )
        gradients = self._backpropagated(vectors)
        if e.problem.is_divided:
            return self._build_divided(gradients, vectors), {}
        known = None if e.custom_functions else facts.rows.get((self._N, self._q))
        with torch.no_grad():
            places = self._places()
            second = _Second(self, gradients, vectors)
            is_known = known is not None and not self.unknown and self._holds(known, places)
            own = [known.arrangements.get(place) for place in places] if known is not None and is_known else None
            found, unknown = self._found(gradients, second, own)
            if own is None or unknown.keys() - self.unknown.keys():
                surprising = self._probe(found, unknown, vectors)
                if surprising and second.has_assumed:
                    # An axis that has the length of the data is not theirs.
                    second.is_asked = True
                    found, unknown = self._found(gradients, second, None)
                    surprising = self._probe(found, unknown, vectors)
                is_reusable = all(x is None or x.arrangement.reusable for x in found)
                if not unknown and not e.custom_functions and is_reusable and (known is None or known.keeps_apart):
                    pairs = zip(places, found, strict=True)
                    facts.rows[self._N, self._q] = KnownRows(
                        {place: None if x is None else x.arrangement for place, x in pairs if place is not None}
                    )
            else:
                surprising = []
            dense = self._differentiated(unknown, surprising, patient) if unknown else {}
            return self._assembled(found, dense, form), unknown

    def _places(self) -> list[Place | None]:
        """Return where the gradient of each use is in the graph, None if the outputs do not depend on its call.

        Calls that the outputs do not depend on, and the order of calls, can differ between graphs of one signature.
        """
        number = {node: k for k, node in enumerate(self._evaluation.nodes)}
        counts: Counter[tuple[int, int]] = Counter()
        places: list[Place | None] = []
        for use, _ in self._uses:
            edge = _edge_of(use)
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
            ends = {edge[0] for use, _ in self._uses if (edge := _edge_of(use)) is not None}
            known.keeps_apart = keeps_examples_apart(self._f, self._N, ends)
        return known.keeps_apart and known.arrangements.keys() == set(places) - {None}

    def _backpropagated(self, vectors: Tensor) -> dict[Any, Tensor]:
        """Return b (q, ...) at the outputs of all uses, by one batched backward pass that stops there."""
        edges = list(dict.fromkeys(edge for use, _ in self._uses if (edge := _edge_of(use)) is not None))
        if not edges:
            return {}
        return self._gradients(edges, self._weighted(vectors))

    def _weighted(self, vectors: Tensor) -> Tensor:
        """Return the vectors of all data as cotangents of the outputs, (q, T, C)."""
        own = self._factor.blocks // self._N
        U = vectors.view(self._N, own, self._factor.rank, -1)
        U = torch.einsum("norp,ox->ornxp", U, torch.eye(own, dtype=U.dtype, device=U.device))
        return U.reshape(self._q, *self._f.shape)

    def _gradients(self, edges: Sequence[Any], U: Tensor) -> dict[Any, Tensor]:
        targets = [torch.autograd.graph.GradientEdge(*edge) for edge in edges]

        def grad(cotangent: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
            with self._evaluation.kernels():  # for what is evaluated again in a backward pass
                result: tuple[Tensor | None, ...] = torch.autograd.grad(
                    [self._f], targets, [cotangent], retain_graph=True, is_grads_batched=batched, allow_unused=True
                )
            return result

        def one_by_one() -> tuple[Tensor | None, ...]:
            passes = zip(*(grad(u.clone(), batched=False) for u in U), strict=True)
            return tuple(None if b[0] is None else torch.stack([g for g in b if g is not None]) for b in passes)

        facts = self._evaluation.facts
        found = one_by_one() if len(U) == 1 else facts.try_vmap("factors", lambda: grad(U, batched=True), one_by_one)
        dtype = self._f.dtype
        pairs = zip(edges, found, strict=True)
        return {edge: b.detach().to(dtype) for edge, b in pairs if b is not None and b.layout is torch.strided}

    def _found(
        self, gradients: Mapping[Any, Tensor], second: _Second, known: Sequence[Arrangement | None] | None
    ) -> tuple[list[_Found | None], dict[str, str]]:
        """Return the rows of each use, None where nothing flows back or its parameters are unknown; and these."""
        unknown = dict(self.unknown)
        found: list[_Found | None] = []
        for number, (use, names) in enumerate(self._uses):
            edge = _edge_of(use)
            b = gradients.get(edge) if edge is not None else None
            found.append(None)
            if b is None or not b.numel() or unknown.keys() & set(names):
                continue
            try:
                found[number] = self._rows_of(use, names, b, second, None if known is None else known[number])
            except Exception as error:  # a rule that does not fit this call says less than differentiation
                if is_memory_error(error):
                    raise
                text = str(error) if isinstance(error, UnknownUseError) else f"{type(error).__name__}: {error}"
                reason = f"operation {use.call.name} ({text.splitlines()[0][:80]})" if text else use.call.name
                unknown |= dict.fromkeys(names, reason)
        _drop(found, [names for _, names in self._uses], unknown)
        return found, unknown

    def _rows_of(
        self, use: Use, names: tuple[str, ...], b: Tensor, second: _Second, known: Arrangement | None
    ) -> _Found:
        """Return the rows of one use from b (q, ...)."""
        with torch.enable_grad():
            Z = self._copy_of(use, names).requires_grad_()
            D = use.through(Z)
        if use.is_generic:  # one entry of the leading axis of the call at a time
            M = b.shape[1]
            arrangement = known or second.arrangement(use, (M,), lambda b: b.flatten(2), b)
            rows = arrangement(_rows_of_call(use, b))  # (N, T, q, d)
            rows = rows[:, 0] if rows.shape[1] == 1 else rows.sum(1)
            derived = self._derived(use, names, Z, Z, (0, 0))
            return _Found(derived, Rows(rows[:, :, None, None]), float(rows.norm()), arrangement)
        if use.index is not None:
            index = use.index()
            arrangement = known or second.arrangement(use, index.shape, lambda b: use.take(b).flatten(1, -2), b)
            B = arrangement(use.take(b).flatten(1, -2).transpose(0, 1))
            places = arrangement(index.reshape(-1) % len(D))
            derived = self._derived(use, names, Z, D, (0, 1))
            return _Found(derived, Table(places, B, len(D)), float(b.norm()), arrangement)
        form = _NormalForm(use, D, b, self._N, partial(self._repeats, use, names, Z))
        arrangement = known or second.arrangement(use, form.sizes, form.by_position, b)
        A, B = form.arranged(arrangement, self._N, b)
        derived = self._derived(use, names, Z, form.view, form.split)
        g, o, i = derived.shape
        A, B = A.reshape(*A.shape[:2], g, i), B.reshape(*B.shape[:3], g, o)
        # Before sums over positions, in which b may cancel, such as of biases that a softmax does not see.
        magnitude = float(b.norm()) * float(A.square().sum((2, 3)).max()) ** 0.5
        return _Found(derived, Factors(A, B), magnitude, arrangement)

    def _copy_of(self, use: Use, names: tuple[str, ...]) -> Tensor:
        """Return D without its history; only its place in memory if the parameters are sharded, which is freed."""
        if not self._evaluation.problem.is_divided:
            return use.value.detach()
        leaf = self._leaves[names[0]]
        if len(names) > 1 or (use.value is not leaf and use.value._base is not leaf):
            raise UnknownUseError("it is computed from sharded parameters")
        return use.stand_in(leaf)

    def _derived(self, use: Use, names: tuple[str, ...], Z: Tensor, view: Tensor, split: tuple[int, int]) -> Derived:
        if not names:
            raise UnknownUseError("no parameter is behind its value")
        leaves = [self._leaves[name] for name in names]
        if self._evaluation.problem.is_divided:
            leaves = [torch.empty(leaves[0].shape, dtype=leaves[0].dtype, device="meta")]
        if len(names) == 1 and Strided.fits(leaves[0], view):
            return Strided(names[0], leaves[0].detach(), view.detach(), split)
        if self._evaluation.problem.is_divided:
            raise UnknownUseError("it is no view of a sharded parameter")
        is_leaf = len(names) == 1 and use.value is leaves[0]
        o, i = split
        shape = math.prod(view.shape[:o]), math.prod(view.shape[o:i]), math.prod(view.shape[i:])
        with torch.enable_grad():
            return Composed(names, leaves, None if is_leaf else use.source, Z, view.reshape(shape))

    def _repeats(self, use: Use, names: tuple[str, ...], Z: Tensor, D: Tensor, axis: int) -> bool:
        """Whether D is the same function of the parameters all along an axis, which then came by expansion."""
        if D.shape[axis] == 1 or D.stride(axis) == 0:
            return True
        one = torch.randn_like(D.select(axis, 0)).unsqueeze(axis)
        eye = torch.eye(D.shape[axis], dtype=D.dtype, device=D.device)
        eye = eye.view(-1, *[1] * axis, D.shape[axis], *[1] * (D.ndim - axis - 1))
        pulled = self._derived(use, names, Z, D, (0, 0)).pull((eye * one).reshape(D.shape[axis], 1, 1, -1))
        rows = torch.cat(list(pulled.values()), 1)
        return bool((rows - rows[:1]).norm() <= torch.finfo(D.dtype).eps ** 0.5 * rows.norm())

    def _probe(self, found: list[_Found | None], unknown: dict[str, str], vectors: Tensor) -> list[str]:
        """Compare random sums of the rows with plain reverse mode, and note in `unknown` where they differ.

        Returns the parameters whose operations seemed known.
        """
        e, f = self._evaluation, self._f
        coarse = e.facts.tolerance > torch.finfo(f.dtype).eps ** 0.5
        fewest = min(leaf.numel() for leaf in self._leaves.values())
        probes = _PROBES if coarse or fewest < _MANY_ELEMENTS else 1
        w = self._weights(probes)
        if coarse:  # reverse mode is linear but for rounding, which so is measured
            w = torch.cat([w, w.sum(0, keepdim=True)])
        cotangents = self._factor.apply(w.view(len(w), self._factor.blocks, self._factor.rank))
        sums = torch.cat([e.vjp(u.reshape(1, *f.shape)) for u in cotangents])
        if not sums.isfinite().all() and f.isfinite().all() and vectors.isfinite().all():
            raise derivative_not_finite()
        truth = dict(zip(self._leaves, sums.split([leaf.numel() for leaf in self._leaves.values()], 1), strict=True))
        totals = {name: torch.zeros_like(t[:probes]) for name, t in truth.items()}
        magnitudes = dict.fromkeys(truth, 0.0)
        for x in found:
            if x is not None:
                for name, piece in x.derived.pull(x.columns.apply_t(w[:probes])).items():
                    totals[name] += piece
                    magnitudes[name] += x.magnitude
                if isinstance(x.derived, Composed) and not _is_adjoint(x.derived, f):
                    unknown |= dict.fromkeys(x.derived.names, "the derivative of what was computed from it")
        surprising = []
        for name, own in truth.items():
            if name in unknown or name not in e.reached:
                continue
            difference = (totals[name] - own[:probes]).norm(dim=1)
            tolerance = e.facts.tolerance * own[:probes].norm(dim=1)
            if coarse:
                rounding = (own[-1] - own[-2] - own[-3]).norm()
                own_tolerance = torch.finfo(f.dtype).eps ** 0.5 * own[:probes].norm(dim=1)
                tolerance = torch.minimum(tolerance, 8 * rounding + own_tolerance)
            floor = _CANCELLATION * e.facts.tolerance**2 * magnitudes[name]
            if coarse:  # what cancels leaves the rounding that was measured
                floor = max(floor, min(8 * float(rounding), _CANCELLATION * e.facts.tolerance * magnitudes[name]))
            if not bool((difference <= tolerance + floor).all()):
                surprising.append(name)
                unknown[name] = "its rows are not those of reverse mode by its operations"
        _drop(found, [names for _, names in self._uses], unknown)
        return surprising

    def _weights(self, K: int) -> Tensor:
        """Return random weights of the rows, (K, N, q)."""
        generator = torch.Generator(device=self._f.device).manual_seed(0)
        shape = K, self._N, self._q
        return torch.randn(shape, dtype=self._f.dtype, device=self._f.device, generator=generator)

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
        own = _joined([x for x in found if x is not None])

        def is_dense(x: _Found) -> bool:
            if isinstance(x.columns, Rows) or form == "scores":
                return True
            return isinstance(x.columns, Factors) and x.columns.is_better_dense(form)

        rows: dict[str, Tensor] = dict(dense)
        blocks: list[tuple[Derived, Columns]] = []
        for x in own:
            if not merge or not is_dense(x):
                blocks.append((x.derived, x.columns))
                continue
            pulled = x.derived.pull(x.columns.rows(0, self._N).flatten(0, 1))
            for name, piece in pulled.items():
                rows[name] = rows[name].add_(piece) if name in rows else piece
        spans = [(name, span) for name, span in parameters.spans.items() if name in rows]
        width = sum(stop - start for _, (start, stop) in spans)
        matrix = torch.empty(self._N * self._q, width, dtype=self._f.dtype, device=self._f.device)
        offset = 0
        for name, (start, stop) in spans:
            matrix[:, offset : offset + stop - start] = rows.pop(name)
            offset += stop - start
        layers = self._layers(found, {name for derived, _ in blocks for name in derived.names})
        return MaterializedBatch(matrix, [span for _, span in spans], blocks, self._N, parameters.spans, layers)

    def _layers(self, found: Sequence[_Found | None], weights: set[str]) -> dict[str, str]:
        """Name the weights among these, and the biases, that are used in one call together and nowhere else."""
        counts = Counter(name for _, names in self._uses for name in names)
        alone = [
            (use, names[0], x)
            for (use, names), x in zip(self._uses, found, strict=True)
            if x is not None and len(names) == 1 == counts[names[0]] and use.take is unchanged
            and isinstance(x.derived, Strided) and x.derived.is_injective and isinstance(x.columns, Factors)
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
            found, unknown = self._found(gradients, _Second(self, gradients, vectors), None)
        if unknown:
            name, reason = next(iter(unknown.items()))
            raise CannotHoldError(f"the use of {name} is not known: {reason}")
        f, w = self._f, self._weights(1)
        sizes: dict[str, float] = {}
        differences: dict[str, float] = {}

        def look(name: str, gradient: Tensor) -> None:
            truth = gradient.reshape(1, -1)
            total = torch.zeros_like(truth)
            with torch.no_grad():
                for x in found:
                    if x is not None and name in x.derived.names:
                        total += x.derived.pull(x.columns.apply_t(w))[name]
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


def _edge_of(use: Use) -> tuple[Any, int] | None:
    """Return where b is to be had, in a form that can be compared."""
    return None if use.call.edge is None else (use.call.edge.node, use.call.edge.output_nr)


class _Second:
    """The same combination of vectors, with the data weighted: at a position, the ratio names the datum."""

    def __init__(self, builder: RowsBuilder, gradients: Mapping[Any, Tensor], vectors: Tensor) -> None:
        self._builder, self._edges, self._vectors = builder, list(gradients), vectors
        self._gradients: dict[Any, Tensor] | None = None
        self._measured: dict[Any, Arrangement] = {}
        self.is_asked = False
        """Whether positions are measured even if only one axis has the length of the data."""
        self.has_assumed = False
        """Whether such an axis was taken without a measurement."""

    def arrangement(
        self, use: Use, sizes: Sequence[int], by_position: Callable[[Tensor], Tensor], b: Tensor
    ) -> Arrangement:
        """Return how positions belong to data; `by_position` arranges b as (q, P, features)."""
        N = self._builder._N
        only = None if self.is_asked and N > 1 else only_axis(sizes, N)
        if only is not None:
            self.has_assumed = self.has_assumed or N > 1
            return only
        q, f = self._builder._q, self._builder._f
        mix = torch.linspace(1, 2, q, dtype=f.dtype, device=f.device)
        if self._gradients is None:
            weights = 1 + torch.arange(N, dtype=f.dtype, device=f.device) / N
            U = torch.einsum("q...,q->...", self._builder._weighted(self._vectors), mix)
            U = (U.view(N, -1) * weights[:, None]).view(1, *f.shape)
            self._gradients = self._builder._gradients(self._edges, U)
        key = _edge_of(use), tuple(sizes), use.take  # such as of a weight and its bias
        if key not in self._measured:
            b1 = torch.einsum("q...,q->...", by_position(b), mix)
            b2 = by_position(self._gradients[_edge_of(use)])[0]
            self._measured[key] = measure(sizes, b1.reshape(len(b1), -1), b2.reshape(len(b2), -1), N)
        return self._measured[key]


class _NormalForm:
    """A contraction with the axes of D, a and b sorted: groups g, outputs o, inputs i, and positions."""

    def __init__(self, use: Use, D: Tensor, b: Tensor, N: int, repeats: Any) -> None:
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
    sizes = dict(zip(of_D, use.through(use.stand_in()).shape, strict=True))
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

    options = _options_of_convolution(call) if call.get(1, "weight") is use.value and len(data) == 1 else None
    if options is not None:
        one = partial(_rows_of_convolution, D.detach(), options)
    step = max(1, _BLOCK_BYTES // (len(b) * D.numel() * b.itemsize))
    xs = tuple(t.detach() for t in data)
    blocks = [
        vmap(one, in_dims=(0, 1))(tuple(x[m : m + step] for x in xs), b[:, m : m + step]) for m in range(0, M, step)
    ]
    return torch.cat(blocks).flatten(2).to(b.dtype)


def _rows_of_convolution(D: Tensor, options: tuple[Any, ...], xs: tuple[Tensor, ...], own: Tensor) -> Tensor:
    """Return the rows (q, ...) of one datum, by the kernel of the backward pass alone: no forward pass is needed."""

    def pull(y: Tensor) -> Tensor:
        args = y[None].to(D.dtype), xs[0][None], D, None, *options, [False, True, False]
        gradient: Tensor = torch.ops.aten.convolution_backward.default(*args)[1]
        return gradient

    result: Tensor = vmap(pull)(own)
    return result


def _options_of_convolution(call: Call) -> tuple[Any, ...] | None:
    """Return stride, padding, dilation, whether it is transposed, output padding and groups; None if not known."""
    n = {"conv1d": 1, "conv2d": 2, "conv3d": 3}.get(call.name)
    padding = call.get(4, "padding", 0)
    if n is None or isinstance(padding, str):
        return None

    def each(x: Any) -> list[int]:
        return [x] * n if isinstance(x, int) else [*x] * (n if len(x) == 1 else 1)

    stride, dilation = call.get(3, "stride", 1), call.get(5, "dilation", 1)
    return each(stride), each(padding), each(dilation), False, [0] * n, call.get(6, "groups", 1)


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


def _joined(found: Sequence[_Found]) -> list[_Found]:
    """Join uses of the same elements as factors, such as those of the steps of a recurrent layer."""
    result: list[_Found] = []
    for x in found:
        for k, known in enumerate(result):
            if (
                isinstance(x.columns, Factors)
                and isinstance(known.columns, Factors)
                and isinstance(known.derived, Strided)
                and known.derived.same(x.derived)
            ):
                result[k] = known._replace(columns=known.columns.joined(x.columns))
                break
        else:
            result.append(x)
    return result


__all__ = ["CannotHoldError", "KnownRows", "PlanWarning", "RowsBuilder", "Span"]
