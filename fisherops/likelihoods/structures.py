"""How distributions are made of their parameters, and nested in each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from fisherops.likelihoods.base import Draws
from fisherops.likelihoods.factors import Combined, OutputFactor
from fisherops.likelihoods.named import Beta, Named, Structure
from fisherops.likelihoods.rebuilding import known, overridden


def structure_of(dist: Any, whole: bool = False) -> Structure:
    """Return how a distribution is made of its parameters.

    Parameters
    ----------
    dist : Distribution
    whole : bool
        Whether `build` must return the distribution of the targets as they are. Otherwise fixed one-to-one
        transformations are undone, which changes no score.

    Raises
    ------
    TypeError
        If it is not a distribution.
    NotImplementedError
        If it cannot be rebuilt from its parameters.
    """
    if not isinstance(dist, td.Distribution):
        raise TypeError(
            f"with loss_func=None the model must return a torch.distributions.Distribution, got {type(dist).__name__}: "
            "pass the loss, such as `nn.CrossEntropyLoss()`, or let the model return the distribution of the targets."
        )
    base = known(dist)
    if base is td.Beta and not whole and not overridden(dist, base):
        return Beta(dist)
    if base is not None:
        return Named(dist)
    for kind, structure in _STRUCTURES.items():
        if isinstance(dist, kind) and not overridden(dist, kind):
            by_name = kind is td.TransformedDistribution and all(
                isinstance(getattr(dist, name, None), Tensor) for name in dist.arg_constraints
            )
            if not (by_name and dist.arg_constraints):
                return structure(dist, whole)
    return Named(dist)


class _Independent(Structure):
    """Several distributions whose joint one is a term."""

    def __init__(self, dist: Any, whole: bool) -> None:
        self._base = structure_of(dist.base_dist, whole)
        self._ndim = dist.reinterpreted_batch_ndims
        batch = dist.base_dist.batch_shape
        self._shape = batch[len(batch) - self._ndim :]
        self.name = f"{type(dist).__name__} of {self._base.name}"
        self.size = self._shape.numel() * self._base.size
        self.event_shape = self._shape + self._base.event_shape

    def coordinates(self, dist: Any) -> Tensor:
        f = self._base.coordinates(dist.base_dist)
        return f.reshape(*dist.batch_shape, self.size)

    def build(self, f: Tensor) -> Any:
        base = self._base.build(f.reshape(*f.shape[:-1], *self._shape, self._base.size))
        return td.Independent(base, self._ndim, validate_args=False)

    def check(self, dist: Any) -> None:
        self._base.check(dist.base_dist)

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        return self._base.pull(dist.base_dist, y)

    def draw(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        drawn = self._base.draw(f.reshape(-1, self._base.size), samples, draws)
        return drawn.reshape(samples, len(f), *self.event_shape)

    def exact(self, f: Tensor) -> OutputFactor:
        return Combined([self._base.exact(f.reshape(-1, self._base.size))], len(f), shared=False)


class _Transformed(Structure):
    """Targets that are a fixed one-to-one function of others: scores do not depend on it."""

    def __init__(self, dist: Any, whole: bool) -> None:
        self._base = structure_of(dist.base_dist, whole)
        self._transforms = list(dist.transforms) if whole else []
        self.name = f"{type(dist).__name__} of {self._base.name}"
        self.size = self._base.size
        self.event_shape = dist.event_shape if whole else self._base.event_shape

    def coordinates(self, dist: Any) -> Tensor:
        return self._base.coordinates(dist.base_dist)

    def build(self, f: Tensor) -> Any:
        base = self._base.build(f)
        if not self._transforms:
            return base
        transforms = [_at(transform, f.device) for transform in self._transforms]  # draws may be made on the host
        return td.TransformedDistribution(base, transforms, validate_args=False)

    def check(self, dist: Any) -> None:
        self._base.check(dist.base_dist)

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        inner = y
        for transform in reversed(dist.transforms):
            if not transform.bijective:
                raise NotImplementedError(
                    f"a TransformedDistribution by {transform}, which is not one-to-one, is not supported: write a "
                    "fisherops.likelihoods.Likelihood."
                )
            inner = transform.inv(inner)
            if inner.requires_grad:
                raise NotImplementedError(
                    f"a TransformedDistribution whose {type(transform).__name__} depends on the parameters is not "
                    "supported: write a fisherops.likelihoods.Likelihood with its `log_prob` and `sample`."
                )
        inner = self._base.pull(dist.base_dist, inner)
        return y if self._transforms else inner

    def draw(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        return self._base.draw(f, samples, draws)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        return super().scores(f, y) if self._transforms else self._base.scores(f, y)

    def exact(self, f: Tensor) -> OutputFactor:
        return self._base.exact(f)


def _at(x: Any, device: torch.device) -> Any:
    """Return a transformation, or what it holds, with its tensors on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, list):
        return [_at(part, device) for part in x]
    if not isinstance(x, td.Transform):
        return x
    if isinstance(x, _INVERSE):
        return _at(x.inv, device).inv
    other = copy.copy(x)
    vars(other).update({name: _at(value, device) for name, value in vars(other).items()})
    return other


# The class of the inverses of transformations, which refer to them.
_INVERSE = type(td.ExpTransform().inv)


class _Mixture(Structure):
    """A mixture: logits of the weights, then the coordinates of the components."""

    def __init__(self, dist: Any, whole: bool) -> None:
        self._weights = Named(dist.mixture_distribution)
        self._component = structure_of(dist.component_distribution, whole=True)
        self.name = type(dist).__name__
        self._count = self._weights.size
        self.size = self._count * (1 + self._component.size)
        self.event_shape = dist.event_shape

    def coordinates(self, dist: Any) -> Tensor:
        components = self._component.coordinates(dist.component_distribution).flatten(-2)
        logits = self._weights.coordinates(dist.mixture_distribution).expand(*dist.batch_shape, self._count)
        return torch.cat([logits, components.expand(*dist.batch_shape, components.shape[-1])], -1)

    def build(self, f: Tensor) -> Any:
        logits, components = f.split([self._count, self._count * self._component.size], dim=-1)
        components = components.reshape(*f.shape[:-1], self._count, self._component.size)
        weights = td.Categorical(logits=logits, validate_args=False)
        return td.MixtureSameFamily(weights, self._component.build(components), validate_args=False)

    def check(self, dist: Any) -> None:
        self._weights.check(dist.mixture_distribution)
        self._component.check(dist.component_distribution)

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        self._component.pull(dist.component_distribution, y.unsqueeze(y.ndim - len(self.event_shape)))
        return y

    def draw(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        return draws.generated(f, lambda part: self.build(part).sample((samples,)))


_STRUCTURES: dict[type, Callable[[Any, bool], Structure]] = {
    td.Independent: _Independent,
    td.LogisticNormal: _Transformed,
    td.RelaxedBernoulli: _Transformed,
    td.RelaxedOneHotCategorical: _Transformed,
    td.TransformedDistribution: _Transformed,
    td.MixtureSameFamily: _Mixture,
}
