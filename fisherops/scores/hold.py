"""Building the rows of G for one batch from the graph of its outputs, with every piece checked."""

from __future__ import annotations

from functools import partial
from math import inf

import torch
from torch import Tensor

from fisherops.problem.evaluation import Evaluation, derivative_not_finite
from fisherops.scores.factor import Factor
from fisherops.scores.graph import Use, find_uses
from fisherops.scores.held import HeldScores, Span
from fisherops.scores.parts import LinearPart, Part, RowsPart
from fisherops.scores.rows import rows_by_datum


class CannotHoldError(Exception):
    """Why rows of G cannot be held for a batch."""

    def __init__(self, reason: str, surprising: bool = False) -> None:
        super().__init__(reason)
        self.surprising = surprising
        """Whether the model does something else with its parameters than its operations say."""


class RowsBuilder:
    """The rows of G of one batch, before they are built.

    Parameters
    ----------
    evaluation : Evaluation
    factor : Factor
    size : int
        Number of data in the batch.

    Raises
    ------
    CannotHoldError
        If rows do not belong to data.
    """

    def __init__(self, evaluation: Evaluation, factor: Factor, size: int) -> None:
        if factor.blocks % size:
            raise CannotHoldError(f"{factor.blocks} terms do not belong to {size} data in equal numbers")
        self._evaluation, self._factor, self._N = evaluation, factor, size
        self._q = factor.blocks // size * factor.rank
        self._f, self._leaves = evaluation.graph
        self._positions: dict[str, bool] = {}
        """For each parameter found by its uses whether the data lie on the second axis."""
        with torch.no_grad():
            self._uses = find_uses(self._f, self._leaves)

    @property
    def vectors(self) -> int:
        """Rows for each datum, which is the number of backward passes to build them."""
        return self._q

    @property
    def every_use_is_known(self) -> bool:
        """Whether no parameter has to be differentiated datum by datum."""
        return None not in self._uses.values()

    def nbytes(self, form: str) -> int:
        """Predict the memory of the rows in a form, as of `build`; that of rows differentiated by datum as if dense."""
        total = 0
        for name, uses in self._uses.items():
            leaf = self._leaves[name]
            if uses is None or form == "scores":
                total += self._N * self._q * leaf.nbytes
            else:
                total += sum(use.nbytes(self._N, self._q, leaf, form) for use in uses)
        return total

    def build(self, form: str) -> tuple[HeldScores, list[str]]:
        """Build the rows, with every piece checked.

        Parameters
        ----------
        form : {"auto", "scores", "factors"}
            What to do with weights that are used linearly: the cheaper, dense rows, or factors.

        Returns
        -------
        held : HeldScores
        differentiated : list of str
            Parameters whose rows were differentiated datum by datum, their uses being unknown or not as they seemed.

        Raises
        ------
        CannotHoldError
            If rows cannot be found by datum, or are not those of plain reverse mode.
        """
        columns = self._factor.columns()
        gradients = self._backpropagated(columns)
        parts: dict[str, list[Part]] = {}
        rest: list[str] = []
        self._surprising: list[str] = []
        if self._evaluation.problem.sharded:
            return self._build_sharded(gradients, columns), []
        with torch.no_grad():
            w, truth = self._probe(columns)
            for name, uses in self._uses.items():
                found = None if uses is None else self._checked_parts(uses, gradients, w, truth, name)
                if found is None:
                    rest.append(name)
                    self._surprising += [name] if uses is not None else []
                else:
                    parts[name] = found
            if rest:
                parts |= self._differentiated(columns, rest)
            elif not self._evaluation.custom_functions:
                self._evaluation.facts.positions[self._N, self._q] = self._positions
            return self._assembled(parts, form), rest

    def _build_sharded(self, gradients: dict[Use, Tensor], columns: Tensor) -> HeldScores:
        """Build the rows where no rank has memory for a gradient of all parameters.

        A plain backward pass gives them one after the other, and each is compared when it is there.
        """
        unknown = [name for name, uses in self._uses.items() if uses is None]
        if unknown:
            raise CannotHoldError(f"the operation that uses {', '.join(unknown)} is not known")
        f = self._f
        w = self._weights()
        sizes: dict[str, float] = {}
        found: dict[str, list[tuple[float, list[Part]]]] = {}

        def look(name: str, gradient: Tensor) -> None:
            truth = gradient.reshape(-1)
            sizes[name] = float(truth.norm())
            found[name] = []
            for data_second in (False, True):
                parts = [use.part(gradients[use], self._N, data_second) for use in self._uses[name] or []]
                known = [part for part in parts if part is not None]
                if len(known) == len(parts):
                    found[name].append((self._difference(known, w, truth), known))

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
        self._scale = 1e-3 * sum(size**2 for size in sizes.values()) ** 0.5
        parts = {}
        for name, candidates in found.items():
            difference, parts[name] = min(candidates, key=lambda candidate: candidate[0], default=(inf, []))
            if not difference <= self._evaluation.facts.tolerance * (sizes[name] + self._scale):
                raise CannotHoldError(f"the rows of {name} are not those of plain reverse mode")
        with torch.no_grad():
            return self._assembled(parts, "factors", merge=False)

    def build_again(self) -> HeldScores | None:
        """Build the rows in the form "factors" as they were found, and checked, for a graph of this signature.

        None if there was none, or the rows do not come out of this one.
        """
        positions = self._evaluation.facts.positions.get((self._N, self._q))
        if positions is None or set(positions) != set(self._uses):
            return None
        gradients = self._backpropagated(self._factor.columns())
        parts: dict[str, list[Part]] = {}
        with torch.no_grad():
            for name, uses in self._uses.items():
                own = [use for use in uses or () if use in gradients]
                found = [use.part(gradients[use], self._N, positions[name]) for use in own]
                parts[name] = [part for part in found if part is not None]
                if len(parts[name]) < len(found):
                    return None
            return self._assembled(parts, "factors")

    def _backpropagated(self, columns: Tensor) -> dict[Use, Tensor]:
        """Return b (q, ...) for all uses, by one batched backward pass that stops at them."""
        uses = [use for found in self._uses.values() if found is not None for use in found]
        if not uses:
            return {}
        edges = list({(use.edge.node, use.edge.output_nr): use.edge for use in uses}.values())
        own = self._factor.blocks // self._N
        U = columns.view(self._N, own, self._factor.rank, -1)
        U = torch.einsum("norp,ox->ornxp", U, torch.eye(own, dtype=U.dtype, device=U.device))
        U = U.reshape(self._q, *self._f.shape)
        facts = self._evaluation.facts

        def grad(cotangent: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
            result: tuple[Tensor | None, ...] = torch.autograd.grad(
                [self._f], edges, [cotangent], retain_graph=True, is_grads_batched=batched, allow_unused=True
            )
            return result

        def one_by_one() -> tuple[Tensor | None, ...]:
            passes = zip(*(grad(u, batched=False) for u in U), strict=True)
            return tuple(None if b[0] is None else torch.stack(b) for b in passes)

        found = one_by_one() if self._q == 1 else facts.try_vmap("factors", lambda: grad(U, batched=True), one_by_one)
        known = {(e.node, e.output_nr): b for e, b in zip(edges, found, strict=True)}
        by_use = {use: known[use.edge.node, use.edge.output_nr] for use in uses}
        return {use: b.detach().to(columns.dtype) for use, b in by_use.items() if b is not None}

    def _probe(self, columns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return random weights (1, N, q) of the rows, and their sum for each parameter by plain reverse mode."""
        f, w = self._f, self._weights()
        blocks = w.view(1, self._factor.blocks, self._factor.rank)
        sums = self._evaluation.vjp(self._factor.apply(blocks).reshape(1, *f.shape))[:, 0]
        self._scale = 1e-3 * sums.norm()
        if not sums.isfinite().all() and self._f.isfinite().all() and columns.isfinite().all():
            raise derivative_not_finite()
        spans = self._evaluation.problem.parameters.spans
        return w, {name: sums[slice(*spans[name])] for name in self._uses}

    def _weights(self) -> Tensor:
        """Return random weights of the rows, (1, N, q)."""
        generator = torch.Generator(device=self._f.device).manual_seed(0)
        shape = 1, self._N, self._q
        return torch.randn(shape, dtype=self._f.dtype, device=self._f.device, generator=generator)

    def _checked_parts(
        self, uses: list[Use], gradients: dict[Use, Tensor], w: Tensor, truth: dict[str, Tensor], name: str
    ) -> list[Part] | None:
        """Return the parts of a parameter, with the data on whichever axis gives the right sum, or None."""
        used = [use for use in uses if use in gradients]
        for data_second in (False, True):
            parts = [use.part(gradients[use], self._N, data_second) for use in used]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts) and self._agrees(known, w, truth[name]):
                self._positions[name] = data_second
                return known
        return None

    def _agrees(self, parts: list[Part], w: Tensor, truth: Tensor) -> bool:
        # A parameter may have no effect but rounding, such as a bias before a normalization.
        tolerance = self._evaluation.facts.tolerance * (truth.norm() + self._scale)
        return self._difference(parts, w, truth) <= float(tolerance)

    def _difference(self, parts: list[Part], w: Tensor, truth: Tensor) -> float:
        """Compare the weighted sum of the rows with what plain reverse mode gives."""
        total = torch.zeros_like(truth)
        for part in parts:
            own = torch.empty(1, len(truth), dtype=truth.dtype, device=truth.device)
            part.apply_transposed(w, own)
            total += own[0]
        return float((total - truth).norm())

    def _differentiated(self, columns: Tensor, names: list[str]) -> dict[str, list[Part]]:
        rows = rows_by_datum(self._evaluation, columns, self._N, names)
        if rows is None:
            raise CannotHoldError(
                f"the rows for {', '.join(self._surprising or names)} cannot be differentiated datum by datum",
                surprising=bool(self._surprising),
            )
        pieces = rows.split([self._leaves[name].numel() for name in names], dim=1)
        return {
            name: [RowsPart(piece.reshape(self._N, self._q, -1))] for name, piece in zip(names, pieces, strict=True)
        }

    def _assembled(self, parts: dict[str, list[Part]], form: str, merge: bool = True) -> HeldScores:
        parameters = self._evaluation.problem.parameters
        joined = {name: _joined(parts.pop(name)) for name in parameters.spans if parts.get(name)}

        def is_dense(uses: list[Part]) -> bool:
            cheaper = (isinstance(part, RowsPart) or (form == "auto" and part.dense_is_cheaper) for part in uses)
            return merge and (form == "scores" or all(cheaper))

        spans = [span for name, span in parameters.spans.items() if name in joined and is_dense(joined[name])]
        width = sum(stop - start for start, stop in spans)
        dense = torch.empty(self._N * self._q, width, dtype=self._f.dtype, device=self._f.device)
        factors: list[tuple[Span, Part]] = []
        offset = 0
        for name in list(joined):
            uses, (start, stop) = joined.pop(name), parameters.spans[name]  # so that it is freed when it was copied
            if not is_dense(uses):
                factors += [((start, stop), part) for part in uses]
                continue
            own = dense[:, offset : offset + stop - start].view(self._N, self._q, -1)
            offset += stop - start
            own.copy_(uses[0].dense())
            for part in uses[1:]:
                own += part.dense()
        return HeldScores(dense, _merged(spans), factors, self._N, parameters.numel)


def _joined(parts: list[Part]) -> list[Part]:
    """Join linear uses of the same parameter, such as those of the steps of a recurrent layer."""
    result: list[Part] = []
    for part in parts:
        partner = next(
            (k for k, known in enumerate(result) if isinstance(known, LinearPart) and known.joins(part)), None
        )
        if partner is None:
            result.append(part)
        else:
            result[partner] = result[partner].joined(part)  # type: ignore[attr-defined]
    return result


def _merged(spans: list[Span]) -> list[Span]:
    """Join spans that follow each other."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
