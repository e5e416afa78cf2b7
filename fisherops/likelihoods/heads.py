"""Models with several outputs, each with a loss of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fisherops._checks import prefixing
from fisherops.likelihoods.base import Draws, Likelihood, Terms
from fisherops.likelihoods.factors import Combined, OutputFactor


class Heads(Likelihood):
    """Independent targets, one for each head: the sum of their losses.

    The outputs of all heads are one row of numbers for each block: the smallest number of successive terms of every
    head that belong together, in most cases those of a datum. The heads' scores are rows of their own unless
    ``rows="datum"``.

    Parameters
    ----------
    heads : dict
        From the keys (or positions) of the model's outputs to the heads' likelihoods.
    positional : bool
        Whether outputs and targets are tuples, and not mappings.
    """

    def __init__(self, heads: dict[Any, Likelihood], positional: bool) -> None:
        super().__init__("sum")  # each head has its own
        self._heads, self._positional = heads, positional
        self._shapes: list[torch.Size] = []

    @property
    def reductions(self) -> tuple[str, ...]:
        return tuple(head.reduction for head in self._heads.values())

    def bind(self, output: Any) -> Heads:
        parts = self._parts(output)
        heads = {key: head.bind(part) for (key, head), part in zip(self._heads.items(), parts, strict=True)}
        bound = Heads(heads, self._positional)
        bound._shapes = [head.flatten(part).shape for head, part in zip(heads.values(), parts, strict=True)]
        return bound

    def flatten(self, output: Any) -> Tensor:
        rows = [head.flatten(part) for head, part in zip(self._heads.values(), self._parts(output), strict=True)]
        blocks = gcd(*(len(part) for part in rows))
        return torch.cat([part.reshape(blocks, -1) for part in rows], 1)

    def terms(self, output: Any, y: Any) -> Terms:
        targets = [None] * len(self._heads) if y is None else self._parts(y, "targets y")
        terms = []
        for (key, head), part, target in zip(self._heads.items(), self._parts(output), targets, strict=True):
            with prefixing(f"head {key!r}"):
                terms.append(head.terms(part, target))
        return Terms(None, [float(own.divisor) for own in terms], terms)

    def weighted(self, terms: Terms, output: Any, weights: Tensor) -> Terms:
        heads = zip(self._heads.values(), self._parts(output), terms.observed, strict=True)
        own = [head.weighted(part_terms, part, weights) for head, part, part_terms in heads]
        return Terms(None, [float(part.divisor) for part in own], own)

    def scale(self, f: Tensor, terms: Terms, c: Tensor) -> Tensor:
        scales = [
            head.scale(part, own, c[i : i + 1]).expand(part.shape).reshape(len(f), -1)
            for i, (head, part, own) in enumerate(
                zip(self._heads.values(), self._split(f), terms.observed, strict=True)
            )
        ]
        return torch.cat(scales, 1)

    def sample(self, f: Tensor, samples: int, draws: Draws) -> list[Any]:
        parts = zip(self._heads.values(), self._split(f), strict=True)
        return [head.sample(part, samples, draws.head(number)) for number, (head, part) in enumerate(parts)]

    def check_sample(self, f: Tensor, samples: int, draws_of: Callable[[Tensor], Draws]) -> None:
        for head, part in zip(self._heads.values(), self._split(f), strict=True):
            head.check_sample(part, samples, draws_of)

    def log_prob(self, f: Tensor, y: Any) -> Tensor:
        raise NotImplementedError("heads have terms of different kinds")

    def observed(self, terms: Terms) -> list[Any]:
        return [head.observed(own) for head, own in zip(self._heads.values(), terms.observed, strict=True)]

    def scores(self, f: Tensor, y: Any) -> OutputFactor:
        factors = [head.scores(*args) for head, *args in zip(self._heads.values(), self._split(f), y, strict=True)]
        return Combined(factors, len(f), shared=False)

    def exact(self, f: Tensor) -> OutputFactor:
        factors = [head.exact(part) for head, part in zip(self._heads.values(), self._split(f), strict=True)]
        return Combined(factors, len(f), shared=False)

    def _split(self, f: Tensor) -> list[Tensor]:
        """Return the outputs of each head, (T, C)."""
        pieces = f.split([T * C // len(f) for T, C in self._shapes], dim=1)
        return [piece.reshape(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def _parts(self, x: Any, what: str = "outputs") -> list[Any]:
        """Return what belongs to each head."""
        kind = "a tuple or list" if self._positional else "a mapping"
        if not isinstance(x, tuple | list if self._positional else Mapping):
            raise TypeError(f"with {kind} of losses the {what} must be {kind} too, got {type(x).__name__}.")
        if self._positional and len(x) != len(self._heads):
            raise ValueError(f"there are {len(self._heads)} losses and {len(x)} {what}: give one loss for each.")
        missing = [] if self._positional else [key for key in self._heads if key not in x]
        if missing:
            raise ValueError(f"there is a loss for {missing[0]!r}, but the {what} have {sorted(map(str, x))} only.")
        return [x[key] for key in self._heads]
