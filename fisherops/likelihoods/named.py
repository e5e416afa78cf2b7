"""Distributions that are made by naming their parameters, and what all structures have in common."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import constraints

from fisherops._checks import first_line
from fisherops.likelihoods.base import Draws, refuse, score_columns
from fisherops.likelihoods.factors import CategoricalFactor, DenseFactor, DiagonalFactor, OutputFactor
from fisherops.likelihoods.families import FAMILIES, Family
from fisherops.likelihoods.rebuilding import (
    cannot_rebuild,
    check_probabilities,
    check_rebuilt,
    constant,
    holds,
    is_given_by_probs,
    known,
    no_exact,
    overridden,
    parameter,
    rules,
)

# Of several ways to name the same parameter, the first is taken.
_PREFERRED = {"logits": {"probs"}, "scale_tril": {"covariance_matrix", "precision_matrix"}}


class Structure:
    """How a distribution is made of coordinates f (..., C): everything about it but their values."""

    name: str
    """The name of the class, for errors."""
    size: int
    """C."""
    event_shape: torch.Size
    """The shape of one target, as `build` takes it."""

    def coordinates(self, dist: Any) -> Tensor:
        """Return f of a distribution, batch_shape + (C,)."""
        raise NotImplementedError

    def build(self, f: Tensor) -> Any:
        """Return the distribution with coordinates f (..., C), of batch_shape (...)."""
        raise NotImplementedError

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log q(y | f), (..., T) for f (..., T, C)."""
        value: Tensor = self.build(f).log_prob(y)
        return value

    def check(self, dist: Any) -> None:
        """Raise ValueError if a parameter has a value that it must not have."""

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        """Return targets of `dist` as targets of what `build` returns."""
        return y

    def draw(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        """Draw targets (samples, T, ...) for f (T, C) in float64."""
        if not self.event_shape:
            # An inverse takes numbers in float64: near 1, float32 would round them to 1.
            try:
                drawn: Tensor = self.build(f).icdf(draws.uniform(f[:, :1], samples)[..., 0])
                return drawn
            except NotImplementedError:
                pass
        drawn = draws.generated(f, lambda part: self.build(part).sample(torch.Size([samples])))
        if drawn.shape != (samples, len(f), *self.event_shape):
            raise ValueError(
                f"`sample` of {self.name} must return shape sample_shape + batch_shape + event_shape, "
                f"{(samples, len(f), *self.event_shape)}, got {tuple(drawn.shape)}. Correct its shape."
            )
        return drawn

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        """Return ∇_f(−log q(y | f)) for f (T, C) and targets (R, T, ...)."""
        return DenseFactor(score_columns(self, f.double(), y).to(f.dtype))

    def exact(self, f: Tensor) -> OutputFactor:
        """Return a root of E[s sᵀ] for f (T, C); here by enumeration of a finite support."""
        dist: Any = self.build(f.double())
        if not getattr(dist, "has_enumerate_support", False):
            raise NotImplementedError(no_exact(self.name))
        try:
            values = dist.enumerate_support()
        except NotImplementedError:
            raise NotImplementedError(no_exact(self.name)) from None
        columns = score_columns(self, f.double(), values)
        columns = columns * (dist.log_prob(values).T / 2).exp().unsqueeze(2)
        return DenseFactor(columns.to(f.dtype)).compressed()


class Named(Structure):
    """A distribution that is made by naming its parameters."""

    def __init__(self, dist: Any) -> None:
        base = known(dist)
        own = self._own = base is None or overridden(dist, base)
        family = FAMILIES[base] if base is not None else Family()
        if own:  # its density is not that of the family
            family = replace(family, root=None, factor=None, draw=None, rebuilt_as=None)
        kind: Any = family.rebuilt_as or (type(dist) if own else base)
        self._kind = kind
        self._family = FAMILIES[family.rebuilt_as] if family.rebuilt_as is not None else family
        self.name = type(dist).__name__
        named = rules(dist, self._kind)
        replaced = {other for name, others in _PREFERRED.items() if name in named for other in others}
        if self._family.has_probs and "probs" in vars(dist):
            replaced = {"logits"}
        values = {name: self._read(dist, name) for name in named if name not in replaced}
        if not values:
            raise NotImplementedError(cannot_rebuild(type(dist), "it names none, list them there"))
        self._shapes = {name: value.shape[value.ndim - named[name].event_dim :] for name, value in values.items()}
        self._sizes = [prod(shape) for shape in self._shapes.values()]
        self._constants = {name: constant(dist, name) for name in self._family.constants}
        self._learned = {name for name, value in values.items() if value.requires_grad}
        self.size = sum(self._sizes)
        self.event_shape = dist.event_shape

    def _read(self, dist: Any, name: str) -> Tensor:
        if name == "logits" and self._family.link is not None and is_given_by_probs(dist):
            return self._family.link(parameter(dist, "probs"))
        return parameter(dist, name)

    def coordinates(self, dist: Any) -> Tensor:
        batch = dist.batch_shape
        parts = [self._read(dist, name).expand(batch + shape) for name, shape in self._shapes.items()]
        return torch.cat([part.reshape(*batch, -1) for part in parts], -1)

    def build(self, f: Tensor) -> Any:
        arguments = self._arguments(f)
        try:
            try:
                return self._kind(**arguments, validate_args=False)
            except TypeError:
                if self._kind in FAMILIES:
                    raise
                return self._kind(**arguments)  # some classes have no such argument
        except TypeError as error:
            raise NotImplementedError(cannot_rebuild(self._kind, first_line(error))) from None

    def check(self, dist: Any) -> None:
        for name, rule in rules(dist, type(dist)).items():
            if name not in vars(dist) and name not in self._shapes:
                continue
            value = parameter(dist, name).detach()
            wrong = ~constraints.positive.check(value) if name == "rate" else ~holds(rule, value)
            if wrong.any():
                text = "positive" if name == "rate" else f"in {rule}"
                what = f"the {name} of {type(dist).__name__} must be {text}"
                refuse(what, value, wrong, "correct the model's output")
        if self._family.link is not None:
            check_probabilities(dist, binary=self._family.link is not torch.log)
        moving = self._learned.intersection(self._family.moves_support)
        if moving:
            raise NotImplementedError(
                f"the support of {self.name} depends on its {min(moving)}, which the model predicts: its "
                "Fisher information is not defined. Use a distribution whose support is fixed."
            )

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        if self._own:
            check_rebuilt(dist, self, y)
        return y

    def draw(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        values = self._values(f)
        name, least = self._family.least or ("", 0.0)
        if name and (small := values[name] < least).any():
            refuse(
                f"draws of {self.name} vanish in float64 unless its {name} is at least {least}",
                values[name], small, "take the exact Fisher",
            )  # fmt: skip
        if self._family.draw is None:
            return super().draw(f, samples, draws)
        return self._family.draw(values, samples, draws)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        if self._kind is td.Categorical:
            return CategoricalFactor(f.softmax(-1), y.long().T)
        return super().scores(f, y)

    def exact(self, f: Tensor) -> OutputFactor:
        unknown = self._learned.intersection(self._family.given)
        if unknown:
            raise NotImplementedError(no_exact(f"a {self.name} with predicted {min(unknown)}"))
        if self._family.factor is not None:
            return self._family.factor(self._arguments(f))
        if self._family.root is None:
            return super().exact(f)
        S = self._family.root(self._arguments(f.double())).to(f.dtype)
        return DiagonalFactor(S) if S.ndim == 2 else DenseFactor(S)

    def _arguments(self, f: Tensor) -> dict[str, Any]:
        constants = {name: x.to(f.device) if isinstance(x, Tensor) else x for name, x in self._constants.items()}
        return {**self._values(f), **constants}

    def _values(self, f: Tensor) -> dict[str, Tensor]:
        parts = zip(self._shapes.items(), f.split(self._sizes, dim=-1), strict=True)
        return {name: part.reshape(*f.shape[:-1], *shape) for (name, shape), part in parts}


class Beta(Named):
    """A beta distribution as that of (y, 1 − y), so that draws near 1 keep the digits of 1 − y."""

    def __init__(self, dist: Any) -> None:
        super().__init__(td.Dirichlet(self.coordinates(dist), validate_args=False))
        self.name = type(dist).__name__

    def coordinates(self, dist: Any) -> Tensor:
        return torch.stack([dist.concentration1, dist.concentration0], -1)

    def check(self, dist: Any) -> None:
        super().check(td.Dirichlet(self.coordinates(dist), validate_args=False))

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        return torch.stack([y, 1 - y], -1)
