"""Backward passes of a batch: from the output factor to the uses of parameters, and plain ones to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherops.likelihoods import OutputFactor
from fisherops.problem.calls import Use
from fisherops.problem.evaluation import Evaluation, derivative_not_finite
from fisherops.scores.positions import Arrangement, ByAxis, best_axis, list_axes, measure, only_axis

# Random sums of rows that are compared with reverse mode: one says enough where each parameter has many elements.
_PROBES, _MANY_ELEMENTS = 2, 3


def edge_of(use: Use) -> tuple[Any, int] | None:
    """Return where b is to be had, in a form that can be compared."""
    return None if use.call.edge is None else (use.call.edge.node, use.call.edge.output_nr)


class Backward:
    """Backward passes from the outputs of a batch, for q vectors of each datum at once.

    Parameters
    ----------
    evaluation : Evaluation
    factor : OutputFactor
    size : int
        N, the number of data.
    """

    def __init__(self, evaluation: Evaluation, factor: OutputFactor, size: int) -> None:
        self.evaluation, self.factor, self.N = evaluation, factor, size
        self.q = factor.blocks // size * factor.rank
        self.f = evaluation.graph[0]

    def at_uses(self, uses: Iterable[Use], vectors: Tensor) -> dict[Any, Tensor]:
        """Return b (q, ...) at the outputs of uses, by one batched backward pass that stops there."""
        edges = list(dict.fromkeys([edge for use in uses if (edge := edge_of(use)) is not None]))
        return self.at(edges, self.cotangents(vectors)) if edges else {}

    def cotangents(self, vectors: Tensor) -> Tensor:
        """Return the vectors of all data as cotangents of the outputs, (q, T, C)."""
        own = self.factor.blocks // self.N
        U = vectors.view(self.N, own, self.factor.rank, -1)
        if own == 1:
            return U[:, 0].transpose(0, 1).reshape(self.q, *self.f.shape)
        U = torch.einsum("norp,ox->ornxp", U, torch.eye(own, dtype=U.dtype, device=U.device))
        return U.reshape(self.q, *self.f.shape)

    def at(self, edges: Sequence[Any], U: Tensor) -> dict[Any, Tensor]:
        """Return the gradients (K, ...) at edges by U (K, T, C), by one batched backward pass."""
        targets = targets_of(edges)

        def grad(cotangent: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
            with self.evaluation.kernels():  # for what is evaluated again in a backward pass
                result: tuple[Tensor | None, ...] = torch.autograd.grad(
                    [self.f], targets, [cotangent], retain_graph=True, is_grads_batched=batched, allow_unused=True
                )
            return result

        def one_by_one() -> tuple[Tensor | None, ...]:
            passes = zip(*(grad(u.clone(), batched=False) for u in U), strict=True)
            return tuple(
                None if b[0] is None else b[0][None] if len(b) == 1 else torch.stack([g for g in b if g is not None])
                for b in passes
            )

        facts = self.evaluation.facts
        found = one_by_one() if len(U) == 1 else facts.try_vmap("factors", lambda: grad(U, batched=True), one_by_one)
        return strided_gradients(edges, found, self.f.dtype)

    def weights(self, K: int) -> Tensor:
        """Return random weights of the rows, (K, N, q)."""
        generator = torch.Generator(device=self.f.device).manual_seed(0)
        shape = K, self.N, self.q
        return torch.randn(shape, dtype=self.f.dtype, device=self.f.device, generator=generator)


class Reverse:
    """Plain reverse mode for random weights of the rows, which is what rows and positions are compared with.

    The pass for the first weights gives both the gradients by the parameters and those at the uses.

    Parameters
    ----------
    backward : Backward
    edges : iterable
        The outputs of uses to which something flows back.
    vectors : torch.Tensor
        Those of the output factor, which the rows are made from.
    is_whole : bool
        Whether there is memory for a gradient of all parameters.
    """

    def __init__(self, backward: Backward, edges: Iterable[Any], vectors: Tensor, is_whole: bool = True) -> None:
        self._backward, self._edges, self._vectors, self._is_whole = backward, list(edges), vectors, is_whole
        f, leaves = backward.evaluation.graph
        self.is_coarse = backward.evaluation.facts.tolerance > torch.finfo(f.dtype).eps ** 0.5
        """Whether the model computes in lower precision inside, so that rounding is to be measured."""
        fewest = min(leaf.numel() for leaf in leaves.values())
        self.probes = _PROBES if self.is_coarse or fewest < _MANY_ELEMENTS else 1
        """Number of random sums that are compared."""
        self._first: Tensor | None = None
        self._weighted_by_number: dict[Any, Tensor] | None = None
        self._measured: dict[Any, Arrangement] = {}
        self._axes: dict[tuple[int, ...], tuple[list[ByAxis], Tensor]] = {}
        self._directions: dict[int, Tensor] = {}
        self.is_asked = False
        """Whether positions are measured even if only one axis has the length of the data."""
        self.has_assumed = False
        """Whether such an axis was taken without a measurement."""

    @cached_property
    def weights(self) -> Tensor:
        """Of the rows, (K, N, q); if rounding is measured, the sum of the others is the last."""
        w = self._backward.weights(self.probes)
        return torch.cat([w, w.sum(0, keepdim=True)]) if self.is_coarse else w

    @cached_property
    def sums(self) -> Tensor:
        """The gradients of the random sums by the parameters, (K, D)."""
        e, f = self._backward.evaluation, self._backward.f
        first = e.vjp(self._cotangents[:1])[0] if self._first is None else self._first
        sums = torch.stack([first, *(e.vjp(u[None])[0] for u in self._cotangents[1:])])
        if not sums.isfinite().all() and f.isfinite().all() and self._vectors.isfinite().all():
            raise derivative_not_finite()
        return sums

    @cached_property
    def _at_uses(self) -> dict[Any, Tensor]:
        """The gradients of the first of them at the uses."""
        e, f = self._backward.evaluation, self._backward.f
        self._first, own = e.vjp_through(self._cotangents[0], targets_of(self._edges))
        return strided_gradients(self._edges, own, f.dtype)

    @cached_property
    def _cotangents(self) -> Tensor:
        """Those of the outputs, (K, T, C)."""
        factor, w = self._backward.factor, self.weights
        U = factor.apply(w.view(len(w), factor.blocks, factor.rank))
        return U.reshape(len(w), *self._backward.f.shape)

    def arrangement(
        self, use: Use, sizes: Sequence[int], by_position: Callable[[Tensor], Tensor], b: Tensor
    ) -> Arrangement:
        """Return how positions belong to data; `by_position` arranges b as (q, P, features)."""
        N = self._backward.N
        only = None if self.is_asked and N > 1 else only_axis(sizes, N)
        if only is not None:
            self.has_assumed = self.has_assumed or N > 1
            return only
        key = edge_of(use), tuple(sizes), use.take  # such as of a weight and its bias
        if key not in self._measured:
            found = self._axis(use, tuple(sizes), by_position, b)
            self._measured[key] = found or self._labelled(use, sizes, by_position, b)
        return self._measured[key]

    def _axis(
        self, use: Use, sizes: tuple[int, ...], by_position: Callable[[Tensor], Tensor], b: Tensor
    ) -> Arrangement | None:
        """Return the axis that explains the gradient of the weighted sum, None if there is none."""
        own = self._at_uses.get(edge_of(use)) if self._is_whole else None
        if own is None:
            return None
        if sizes not in self._axes:
            ways = list_axes(sizes, self._backward.N)
            labels = [way.labels(self._backward.f.device) for way in ways]
            self._axes[sizes] = ways, self.weights[0, torch.stack(labels)] if ways else self.weights
        ways, weights = self._axes[sizes]
        if not ways:
            return None
        # One random combination of the features says enough of which weight a position has.
        b1, b2 = (x.reshape(*x.shape[:2], -1) for x in (by_position(b), by_position(own[None])))
        r = self._direction(b1.shape[2])
        return best_axis(ways, weights, (b1 @ r).T, (b2 @ r)[0])

    def _direction(self, length: int) -> Tensor:
        if length not in self._directions:
            f = self._backward.f
            generator = torch.Generator(f.device).manual_seed(1)
            self._directions[length] = torch.randn(length, dtype=f.dtype, device=f.device, generator=generator)
        return self._directions[length]

    def _labelled(
        self, use: Use, sizes: Sequence[int], by_position: Callable[[Tensor], Tensor], b: Tensor
    ) -> Arrangement:
        """Measure with the data weighted by their number: at a position, the ratio names the datum."""
        N, q, f = self._backward.N, self._backward.q, self._backward.f
        mix = torch.linspace(1, 2, q, dtype=f.dtype, device=f.device)
        if self._weighted_by_number is None:
            weights = 1 + torch.arange(N, dtype=f.dtype, device=f.device) / N
            U = torch.einsum("q...,q->...", self._backward.cotangents(self._vectors), mix)
            U = (U.view(N, -1) * weights[:, None]).view(1, *f.shape)
            self._weighted_by_number = self._backward.at(self._edges, U)
        b1 = torch.einsum("q...,q->...", by_position(b), mix)
        b2 = by_position(self._weighted_by_number[edge_of(use)])[0]
        return measure(sizes, b1.reshape(len(b1), -1), b2.reshape(len(b2), -1), N)


def targets_of(edges: Sequence[Any]) -> list[GradientEdge]:
    """Return edges in the form that backward passes take."""
    return [GradientEdge(*edge) for edge in edges]


def strided_gradients(edges: Sequence[Any], found: Sequence[Tensor | None], dtype: torch.dtype) -> dict[Any, Tensor]:
    """Return the gradients at edges to which something flows back, without those that are sparse."""
    pairs = zip(edges, found, strict=True)
    return {edge: b.detach().to(dtype) for edge, b in pairs if b is not None and b.layout is torch.strided}
