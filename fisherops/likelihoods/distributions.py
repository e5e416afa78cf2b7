"""Models that return a ``torch.distributions.Distribution``: the targets' distribution itself.

Its parameters, taken from whatever object the model returns, are the coordinates f: (T, C), one row for each element of
its ``batch_shape``. Everything here computes in float64; outputs are small beside models.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, prod, sqrt
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.special import i0e, i1e, polygamma

from fisherops._checks import first_line
from fisherops.likelihoods.base import Draws, Likelihood, Terms, checked_targets, refuse, score_columns
from fisherops.likelihoods.factors import (
    CategoricalFactor,
    CategoricalRoot,
    Combined,
    DenseFactor,
    DiagonalFactor,
    OutputFactor,
)

_EULER = 0.5772156649015329


class DistributionLikelihood(Likelihood):
    """q(y | f) where the model returns q; what ``loss_func=None`` stands for.

    Each element of the distribution's ``batch_shape`` is a loss term; ``Independent`` joins several to one. The terms
    are of weight 1, and ``reduction="mean"`` divides by their number.

    Draws invert the distribution function where there is an inverse (Normal, LogNormal, Laplace, Cauchy, Exponential,
    Gumbel, Weibull, Poisson, Geometric, Bernoulli, Categorical, ..., and multivariate normals by their Cholesky
    factor). The others (Gamma, Beta, Dirichlet, StudentT, Binomial, NegativeBinomial, mixtures, ...) are drawn by the
    distribution's own ``sample``. With ``sampler="counter"`` that is done datum by datum, each with a seed of its own:
    such draws depend on nothing but the datum either, but they may differ between devices and precisions, and those of
    M samples need not be the first of more.

    Parameters
    ----------
    reduction : {"sum", "mean"}
    """

    def __init__(self, reduction: str = "sum", _structure: _Structure | None = None) -> None:
        super().__init__(reduction)
        self._structure = _structure

    def bind(self, output: Any) -> DistributionLikelihood:
        return DistributionLikelihood(self.reduction, _structure_of(output))

    def flatten(self, output: Any) -> Tensor:
        structure = _structure_of(output)
        return structure.coordinates(output).reshape(-1, structure.size)

    def terms(self, output: Any, y: Any) -> Terms:
        structure = _structure_of(output)
        if y is None:
            structure.check(output)
            return Terms(None, output.batch_shape.numel(), None)
        y = checked_targets(y)
        expected = output.batch_shape + output.event_shape
        if y.shape != expected:
            raise ValueError(
                f"the model's {type(output).__name__} is for targets of shape {tuple(expected)}, got {tuple(y.shape)}: "
                "reshape the targets."
            )
        structure.check(output)
        inside = output.support.check(y)
        if not inside.all():
            refuse(f"the targets must be in the support of {type(output).__name__}", y, ~inside, "correct them")
        value = structure.pull(output, y.double())
        return Terms(None, output.batch_shape.numel(), value.detach().reshape(-1, *structure.event_shape))

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        return self._bound().draw(f.double(), samples, draws)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return self._bound().log_prob(f, y)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        return self._bound().scores(f, y)

    def exact(self, f: Tensor) -> OutputFactor:
        return self._bound().exact(f)

    def _bound(self) -> _Structure:
        assert self._structure is not None
        return self._structure


class _Structure:
    """How a distribution is made of coordinates f (..., C): everything about it but their values."""

    size: int
    """C."""
    event_shape: torch.Size
    """Of one target, as `build` takes it."""

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
        """Return targets of `dist` as those of what `build` makes."""
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
        return draws.generated(f, lambda part: self.build(part).sample((samples,)))

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        """Return ∇_f(−log q(y | f)) for f (T, C) and targets (R, T, ...)."""
        return DenseFactor(score_columns(self, f.double(), y).to(f.dtype))

    def exact(self, f: Tensor) -> OutputFactor:
        """Return a root of E[s sᵀ] for f (T, C); here by enumeration of a finite support."""
        dist: Any = self.build(f.double())
        if not getattr(dist, "has_enumerate_support", False):
            raise NotImplementedError(_no_exact(type(dist).__name__))
        try:
            values = dist.enumerate_support()
        except NotImplementedError:
            raise NotImplementedError(_no_exact(type(dist).__name__)) from None
        columns = score_columns(self, f.double(), values)
        columns = columns * (dist.log_prob(values).T / 2).exp().unsqueeze(2)
        return DenseFactor(columns.to(f.dtype)).compressed()


def _structure_of(dist: Any) -> _Structure:
    """Take a distribution apart.

    Raises
    ------
    TypeError
        If it is none.
    NotImplementedError
        If it cannot be rebuilt from its parameters.
    """
    if not isinstance(dist, td.Distribution):
        raise TypeError(
            f"with loss_func=None the model must return a torch.distributions.Distribution, got {type(dist).__name__}: "
            "pass the loss, such as `nn.CrossEntropyLoss()`, or let the model return the distribution of the targets."
        )
    if type(dist) is td.Independent:
        return _Independent(dist)
    if type(dist) in _BY_TRANSFORMATION:
        return _Transformed(dist)
    if type(dist) is td.MixtureSameFamily:
        return _Mixture(dist)
    return _Beta(dist) if type(dist) is td.Beta else _Named(dist)


class _Named(_Structure):
    """A distribution that is made by naming its parameters."""

    def __init__(self, dist: Any) -> None:
        self._kind = _SAME_AS.get(type(dist), type(dist))
        rules = _rules(dist, self._kind)
        replaced = {other for name, others in _PREFERRED.items() if name in rules for other in others}
        if self._kind is td.Geometric and "logits" not in vars(dist):
            replaced = {"logits"}  # torch computes with the probability itself
        values = {name: _parameter(dist, name) for name in rules if name not in replaced}
        self._shapes = {name: value.shape[value.ndim - rules[name].event_dim :] for name, value in values.items()}
        self._sizes = [prod(shape) for shape in self._shapes.values()]
        self._constants = {name: _constant(dist, name) for name in _CONSTANTS.get(self._kind, ())}
        self._learned = {name for name, value in values.items() if value.requires_grad}
        self.size = sum(self._sizes)
        self.event_shape = dist.event_shape

    def coordinates(self, dist: Any) -> Tensor:
        batch = dist.batch_shape
        parts = [_parameter(dist, name).expand(batch + shape) for name, shape in self._shapes.items()]
        return torch.cat([part.reshape(*batch, -1) for part in parts], -1)

    def build(self, f: Tensor) -> Any:
        try:
            return self._kind(**self._values(f), **self._constants, validate_args=False)
        except TypeError as error:
            raise NotImplementedError(_cannot_rebuild(self._kind, first_line(error))) from None

    def check(self, dist: Any) -> None:
        for name, rule in _rules(dist, type(dist)).items():
            if name not in vars(dist) and name not in self._shapes:
                continue
            value = _parameter(dist, name).detach()
            wrong = ~constraints.positive.check(value) if name == "rate" else ~_holds(rule, value)
            if wrong.any():
                text = "positive" if name == "rate" else f"in {rule}"
                what = f"the {name} of {type(dist).__name__} must be {text}"
                refuse(what, value, wrong, "correct the model's output")
        _check_probabilities(dist)
        moving = _SUPPORT_OF.get(self._kind, set()) & self._learned
        if moving:
            raise NotImplementedError(
                f"the support of {self._kind.__name__} depends on its {min(moving)}, which the model predicts: its "
                "Fisher information is not defined. Use a distribution whose support is fixed."
            )

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        if self._kind not in _ROOTS and self._kind not in _FACTORS:
            _check_rebuilt(dist, self, y)
        return y

    def draw(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        own = _DRAWS.get(self._kind)
        name, least = _LEAST.get(self._kind, ("", 0.0))
        if name and (small := self._values(f)[name] < least).any():
            refuse(
                f"draws of {self._kind.__name__} vanish in float64 unless its {name} is at least {least}",
                self._values(f)[name], small, "take the exact Fisher",
            )  # fmt: skip
        return super().draw(f, samples, draws) if own is None else own(self._values(f), samples, draws)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        if self._kind is td.Categorical:
            return CategoricalFactor(f.softmax(-1), y.long().T)
        return super().scores(f, y)

    def exact(self, f: Tensor) -> OutputFactor:
        unknown = _WITHOUT_ROOT.get(self._kind, set()) & self._learned
        if unknown:
            raise NotImplementedError(_no_exact(f"a {self._kind.__name__} with predicted {min(unknown)}"))
        if self._kind in _FACTORS:
            return _FACTORS[self._kind](self._values(f), self._constants)
        if self._kind not in _ROOTS:
            return super().exact(f)
        S = _ROOTS[self._kind](self._values(f.double())).to(f.dtype)
        return DiagonalFactor(S) if S.ndim == 2 else DenseFactor(S)

    def _values(self, f: Tensor) -> dict[str, Tensor]:
        parts = zip(self._shapes.items(), f.split(self._sizes, dim=-1), strict=True)
        return {name: part.reshape(*f.shape[:-1], *shape) for (name, shape), part in parts}


class _Beta(_Named):
    """A beta distribution as that of (y, 1 − y), so that draws near 1 keep the digits of 1 − y."""

    def __init__(self, dist: Any) -> None:
        concentrations = torch.stack([dist.concentration1, dist.concentration0], -1)
        super().__init__(td.Dirichlet(concentrations, validate_args=False))

    def coordinates(self, dist: Any) -> Tensor:
        return torch.stack([dist.concentration1, dist.concentration0], -1)

    def check(self, dist: Any) -> None:
        super().check(td.Dirichlet(self.coordinates(dist), validate_args=False))

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        return torch.stack([y, 1 - y], -1)


class _Independent(_Structure):
    """Several distributions whose joint one is a term."""

    def __init__(self, dist: Any) -> None:
        self._base = _structure_of(dist.base_dist)
        self._ndim = dist.reinterpreted_batch_ndims
        batch = dist.base_dist.batch_shape
        self._shape = batch[len(batch) - self._ndim :]
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


class _Transformed(_Structure):
    """Targets that are a fixed one-to-one function of others: scores do not see it."""

    def __init__(self, dist: Any) -> None:
        self._base = _structure_of(dist.base_dist)
        self.size = self._base.size
        self.event_shape = self._base.event_shape

    def coordinates(self, dist: Any) -> Tensor:
        return self._base.coordinates(dist.base_dist)

    def build(self, f: Tensor) -> Any:
        return self._base.build(f)

    def check(self, dist: Any) -> None:
        self._base.check(dist.base_dist)

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        for transform in reversed(dist.transforms):
            if not transform.bijective:
                raise NotImplementedError(
                    f"a TransformedDistribution by {transform}, which is not one-to-one, is not supported: write a "
                    "fisherops.likelihoods.Likelihood."
                )
            y = transform.inv(y)
            if y.requires_grad:
                raise NotImplementedError(
                    f"a TransformedDistribution whose {type(transform).__name__} depends on the parameters is not "
                    "supported: write a fisherops.likelihoods.Likelihood with its `log_prob` and `sample`."
                )
        return self._base.pull(dist.base_dist, y)

    def draw(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        return self._base.draw(f, samples, draws)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        return self._base.scores(f, y)

    def exact(self, f: Tensor) -> OutputFactor:
        return self._base.exact(f)


class _Mixture(_Structure):
    """A mixture of distributions of one family: logits of the weights, then the components."""

    def __init__(self, dist: Any) -> None:
        self._component = _Named(dist.component_distribution)
        self._count = dist.mixture_distribution.logits.shape[-1]
        self.size = self._count * (1 + self._component.size)
        self.event_shape = dist.event_shape

    def coordinates(self, dist: Any) -> Tensor:
        components = self._component.coordinates(dist.component_distribution).flatten(-2)
        logits = dist.mixture_distribution.logits.expand(*dist.batch_shape, self._count)
        return torch.cat([logits, components.expand(*dist.batch_shape, components.shape[-1])], -1)

    def build(self, f: Tensor) -> Any:
        logits, components = f.split([self._count, self._count * self._component.size], dim=-1)
        components = components.reshape(*f.shape[:-1], self._count, self._component.size)
        weights = td.Categorical(logits=logits, validate_args=False)
        return td.MixtureSameFamily(weights, self._component.build(components), validate_args=False)

    def check(self, dist: Any) -> None:
        self._component.check(dist.component_distribution)

    def pull(self, dist: Any, y: Tensor) -> Tensor:
        _check_rebuilt(dist, self, y)
        return y

    def draw(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        return draws.generated(f, lambda part: self.build(part).sample((samples,)))


class _NormalRoot(OutputFactor):
    """The root of the Fisher of a multivariate normal in its mean and its Cholesky factor L (T, d, d).

    With A = L⁻¹ dL, lower triangular, the metric is ‖L⁻¹ dμ‖² + 2 Σ_i A_ii² + Σ_{i>j} A_ij².
    """

    def __init__(self, L: Tensor, scale: Tensor | None = None) -> None:
        self._L = L
        self._scale = L.new_ones(1, 1) if scale is None else scale
        d = L.shape[-1]
        self._weights = torch.ones_like(L[0]).tril().fill_diagonal_(sqrt(2))
        self.blocks, self.outputs = len(L), d + d * d
        self.rank = self.outputs

    def apply(self, W: Tensor) -> Tensor:
        mean, rest = self._split(W)
        U = torch.linalg.solve_triangular(self._L.mT, torch.cat([mean, self._weights * rest], -1), upper=True)
        return self._join(U[..., :1], U[..., 1:].tril()) * self._scale

    def adjoint(self, U: Tensor) -> Tensor:
        mean, rest = self._split(U * self._scale)
        W = torch.linalg.solve_triangular(self._L, torch.cat([mean, rest.tril()], -1), upper=False)
        return self._join(W[..., :1], self._weights * W[..., 1:])

    def columns(self) -> Tensor:
        eye = torch.eye(self.rank, dtype=self._L.dtype, device=self._L.device)
        return self.apply(eye.unsqueeze(1).expand(self.rank, self.blocks, self.rank)).transpose(0, 1)

    def scaled(self, scale: Tensor) -> _NormalRoot:
        return _NormalRoot(self._L, self._scale * scale)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        d = self._L.shape[-1]
        return x[..., :d].unsqueeze(-1), x[..., d:].unflatten(-1, (d, d))

    def _join(self, mean: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([mean.squeeze(-1), rest.flatten(-2)], -1)


# ---- Reading distributions --------------------------------------------------------------------


def _rules(dist: Any, kind: type) -> dict[str, Any]:
    """Return the constraints on the parameters of a class, which some classes know from the instance only."""
    rules = dist.arg_constraints if kind is type(dist) else kind.arg_constraints  # type: ignore[attr-defined]
    return dict(rules)


def _holds(rule: Any, value: Tensor) -> Tensor:
    if constraints.is_dependent(rule):
        return torch.ones_like(value, dtype=torch.bool)
    holds: Tensor = rule.check(value)
    return holds


def _parameter(dist: Any, name: str) -> Tensor:
    value = getattr(dist, name, None)
    if not isinstance(value, Tensor):
        raise NotImplementedError(_cannot_rebuild(type(dist), f"it has no tensor `{name}`"))
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _check_probabilities(dist: Any) -> None:
    """Refuse what torch itself computes wrongly: clamped probabilities, and a density that loses its digits."""
    kind = type(dist)
    if kind in (td.Binomial, td.NegativeBinomial, td.Multinomial) and "probs" in vars(dist):
        p = dist.probs.detach()
        eps = torch.finfo(p.dtype).eps
        if (clamped := (p < eps) | (p > 1 - eps)).any():
            refuse(
                f"torch computes {kind.__name__} with probabilities of at least {eps:.2g}", p, clamped,
                "make it with logits=",
            )  # fmt: skip
    if kind is td.ContinuousBernoulli and (large := dist.logits.detach().abs() > 30).any():
        refuse(
            "torch's density of ContinuousBernoulli is accurate for logits up to 30", dist.logits, large,
            "limit the model's output",
        )  # fmt: skip


def _constant(dist: Any, name: str) -> Any:
    """Return an argument of the class that is no parameter: one number."""
    value = getattr(dist, name)
    if isinstance(value, Tensor):
        if value.requires_grad or value.numel() != 1:
            raise NotImplementedError(_cannot_rebuild(type(dist), f"its {name} is not one fixed number"))
        return value.detach().reshape(())
    return value


def _check_rebuilt(dist: Any, structure: _Structure, y: Tensor) -> None:
    """Make sure that the coordinates say everything about a distribution of an unknown class.

    Its density, and the gradient of that by all parameters, must be those of the distribution built from them.
    """
    f = structure.coordinates(dist)
    with torch.no_grad():
        drawn = dist.sample()
    # Observed targets may miss where the two differ.
    for targets in (y.to(f.dtype), drawn):
        values = [each.log_prob(targets).sum() for each in (dist, structure.build(f))]
        parameters = _leaves(values)
        gradients = [_gradient(value, parameters) for value in values]
        for a, b in (values, gradients):
            if not (a - b).detach().norm() <= 1e-3 * a.detach().norm():
                raise NotImplementedError(_cannot_rebuild(type(dist), "it depends on more than those"))


def _leaves(values: list[Tensor]) -> list[Tensor]:
    """List the parameters that values depend on."""
    found, seen, waiting = [], set(), [value.grad_fn for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
            if hasattr(node, "variable"):
                found.append(node.variable)
    return found


def _gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    if not parameters or not value.requires_grad:
        return value.new_zeros(sum(p.numel() for p in parameters))
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def _no_exact(what: str) -> str:
    return (
        f"the exact Fisher of {what} is not known in closed form: take its Monte-Carlo estimate, "
        "FisherMCLinearOperator."
    )


def _cannot_rebuild(kind: type, reason: str) -> str:
    return (
        f"{kind.__name__} cannot be rebuilt from the parameters that it names (`arg_constraints`): {reason}. Write a "
        "fisherops.likelihoods.Likelihood with its `log_prob` and `sample`."
    )


# ---- What is known of torch's distributions ----------------------------------------------------

Values = dict[str, Tensor]

# Classes whose parameters are read as those of another class.
_SAME_AS: dict[type, type] = {
    td.LowRankMultivariateNormal: td.MultivariateNormal,
    td.OneHotCategoricalStraightThrough: td.OneHotCategorical,
}

# Classes that are a transformed distribution, made of their base.
_BY_TRANSFORMATION = (
    td.TransformedDistribution,
    td.LogisticNormal,
    td.RelaxedBernoulli,
    td.RelaxedOneHotCategorical,
)

# Arguments that are no parameters.
_CONSTANTS: dict[type, tuple[str, ...]] = {
    td.Multinomial: ("total_count",),
    td.LKJCholesky: ("dim",),
    LogitRelaxedBernoulli: ("temperature",),
    ExpRelaxedCategorical: ("temperature",),
}

# Of several ways to name the same parameter, the first is taken.
_PREFERRED = {"logits": {"probs"}, "scale_tril": {"covariance_matrix", "precision_matrix"}}

# Parameters that move the support, so that differentiating under the integral is not allowed.
_SUPPORT_OF: dict[type, set[str]] = {
    td.Uniform: {"low", "high"},
    td.Pareto: {"scale"},
    td.GeneralizedPareto: {"loc", "scale", "concentration"},
}

# Below this, draws of a gamma variable are often smaller than any number.
_LEAST: dict[type, tuple[str, float]] = {
    td.Gamma: ("concentration", 0.02),
    td.InverseGamma: ("concentration", 0.02),
    td.Dirichlet: ("concentration", 0.02),
    td.Chi2: ("df", 0.04),
    td.StudentT: ("df", 0.04),
}

# Parameters that the closed forms below take as given.
_WITHOUT_ROOT: dict[type, set[str]] = {
    td.Binomial: {"total_count"},
    td.NegativeBinomial: {"total_count"},
}


def _diagonal(*entries: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*entries), -1)


def _lower(*rows: tuple[Tensor, ...]) -> Tensor:
    """Return the columns of lower triangular matrices given by their rows."""
    zero = torch.zeros_like(rows[0][0])
    full = [torch.stack([*row, *[zero] * (len(rows) - len(row))], -1) for row in rows]
    return torch.stack(full, -1)


def _trigamma(x: Tensor) -> Tensor:
    value: Tensor = polygamma(1, x)
    return value


def _location_scale(location: float, scale: float) -> Callable[[Values], Tensor]:
    """Return the root of diag(location, scale) / σ²."""
    return lambda v: _diagonal(sqrt(location) / v["scale"], sqrt(scale) / v["scale"])


def _gamma(v: Values) -> Tensor:
    a, b = v["concentration"], v["rate"]
    first = _trigamma(a).sqrt()
    return _lower((first,), (-1 / (first * b), (a - 1 / _trigamma(a)).clamp(min=0).sqrt() / b))


def _dirichlet(concentration: Tensor) -> Tensor:
    """Return the root of diag d − c 1 1ᵀ, with d and c trigammas: diag √d − a 1 (1/√d)ᵀ."""
    d = _trigamma(concentration)
    c = _trigamma(concentration.sum(-1, keepdim=True))
    total = (1 / d).sum(-1, keepdim=True)
    a = c / (1 + (1 - c * total).clamp(min=0).sqrt())
    return torch.diag_embed(d.sqrt()) - (a / d.sqrt()).unsqueeze(-1)


def _student(v: Values) -> Tensor:
    """Return the root for (df, loc, scale); K. L. Lange, R. J. A. Little, J. M. G. Taylor, JASA 84 (1989) 881–896."""
    n, s = v["df"], v["scale"]
    scale = (2 * n / (n + 3)).sqrt() / s
    mixed = -2 / ((n + 1) * (n + 3) * s) / scale
    difference = (_trigamma(n / 2) - _trigamma((n + 1) / 2)) / 4 - (n + 5) / (2 * n * (n + 1) * (n + 3))
    # Far out the terms cancel; the expansion is that of what remains.
    far = (1.5 - 3 / n + 3.5 / n**2 - 3 / n**3) / n**4
    freedom = torch.where(n < 300, difference - mixed.square(), far)
    zero = torch.zeros_like(n)
    columns = [
        torch.stack([freedom.clamp(min=0).sqrt(), zero, zero], -1),
        torch.stack([zero, ((n + 1) / (n + 3)).sqrt() / s, zero], -1),
        torch.stack([mixed, zero, scale], -1),
    ]
    return torch.stack(columns, -2)


def _weibull(v: Values) -> Tensor:
    k = v["concentration"]
    return _lower((k / v["scale"],), ((_EULER - 1) / k, pi / sqrt(6) / k))


def _gumbel(v: Values) -> Tensor:
    s = v["scale"]
    return _lower((1 / s,), ((_EULER - 1) / s, pi / sqrt(6) / s))


def _continuous_bernoulli_variance(logits: Tensor) -> Tensor:
    """Return 1/η² − 1/(2 sinh(η/2))²."""
    square = logits.square()
    decay = (-logits.abs()).exp()
    far = 1 / square - decay / (1 - decay).square()
    return torch.where(logits.abs() > 0.1, far, 1 / 12 - square / 240 + square**2 / 6048 - square**3 / 172800)


def _von_mises(v: Values) -> Tensor:
    k = v["concentration"]
    ratio = i1e(k) / i0e(k)
    # Far out the terms cancel.
    spread = torch.where(k < 1e3, 1 - ratio / k - ratio.square(), (0.5 + 0.25 / k + 0.375 / k**2) / k**2)
    return _diagonal((k * ratio).sqrt(), spread.clamp(min=0).sqrt())


# Square roots of the Fisher information in the parameters as named, (T, C) if diagonal, else vectors (T, R, C).
_ROOTS: dict[type, Callable[[Values], Tensor]] = {
    td.Normal: _location_scale(1, 2),
    td.LogNormal: _location_scale(1, 2),
    td.Laplace: _location_scale(1, 1),
    td.Cauchy: _location_scale(0.5, 0.5),
    td.HalfNormal: lambda v: _diagonal(sqrt(2) / v["scale"]),
    td.HalfCauchy: lambda v: _diagonal(sqrt(0.5) / v["scale"]),
    td.Gumbel: _gumbel,
    td.Weibull: _weibull,
    td.StudentT: _student,
    td.VonMises: _von_mises,
    td.Exponential: lambda v: _diagonal(1 / v["rate"]),
    td.Gamma: _gamma,
    td.InverseGamma: _gamma,
    td.Chi2: lambda v: _diagonal(_trigamma(v["df"] / 2).sqrt() / 2),
    td.Pareto: lambda v: _diagonal(*(1 / v["alpha"] if name == "alpha" else 0 * v["alpha"] for name in v)),
    td.Dirichlet: lambda v: _dirichlet(v["concentration"]),
    td.Poisson: lambda v: _diagonal(v["rate"].rsqrt()),
    td.Bernoulli: lambda v: _diagonal((v["logits"].sigmoid() * (-v["logits"]).sigmoid()).sqrt()),
    td.Geometric: lambda v: _diagonal(
        (-v["logits"]).sigmoid().sqrt() if "logits" in v else (1 - v["probs"]).rsqrt() / v["probs"]
    ),
    td.ContinuousBernoulli: lambda v: _diagonal(_continuous_bernoulli_variance(v["logits"]).sqrt()),
    td.Binomial: lambda v: _diagonal(
        0 * v["logits"], (v["total_count"] * v["logits"].sigmoid() * (-v["logits"]).sigmoid()).sqrt()
    ),
    td.NegativeBinomial: lambda v: _diagonal(0 * v["logits"], (v["total_count"] * v["logits"].sigmoid()).sqrt()),
}


def _multinomial(v: Values, constants: dict[str, Any]) -> OutputFactor:
    p = v["logits"].softmax(-1)
    return CategoricalRoot(p, p.new_full((1, 1), sqrt(constants["total_count"])))


# The same where the root is better not written out.
_FACTORS: dict[type, Callable[[Values, dict[str, Any]], OutputFactor]] = {
    td.Categorical: lambda v, _: CategoricalRoot(v["logits"].softmax(-1)),
    td.OneHotCategorical: lambda v, _: CategoricalRoot(v["logits"].softmax(-1)),
    td.Multinomial: _multinomial,
    td.MultivariateNormal: lambda v, _: _NormalRoot(v["scale_tril"]),
}


def _draw_normal(v: Values, samples: int, draws: Draws) -> Tensor:
    loc = v["loc"].unsqueeze(-1)
    return (loc + v["scale"].unsqueeze(-1) * draws.normal(loc, samples)).squeeze(-1)


def _draw_categorical(v: Values, samples: int, draws: Draws) -> Tensor:
    return draws.categorical(v["logits"].softmax(-1), samples)


def _draw_multivariate_normal(v: Values, samples: int, draws: Draws) -> Tensor:
    return v["loc"] + (v["scale_tril"].tril() @ draws.normal(v["loc"], samples).unsqueeze(-1)).squeeze(-1)


def _draw_geometric(v: Values, samples: int, draws: Draws) -> Tensor:
    failure = torch.nn.functional.logsigmoid(-v["logits"]) if "logits" in v else (-v["probs"]).log1p()
    failure = failure.unsqueeze(-1)
    return (draws.uniform(failure, samples).log() / failure).floor().squeeze(-1)


# Draws by inversion that torch has not as `icdf`.
_DRAWS: dict[type, Callable[[Values, int, Draws], Tensor]] = {
    td.Normal: _draw_normal,
    td.LogNormal: lambda v, samples, draws: _draw_normal(v, samples, draws).exp(),
    td.Bernoulli: lambda v, M, draws: draws.bernoulli(v["logits"].unsqueeze(-1), M).squeeze(-1),
    td.Categorical: _draw_categorical,
    td.OneHotCategorical: lambda v, M, draws: torch.nn.functional.one_hot(
        _draw_categorical(v, M, draws), v["logits"].shape[-1]
    ).double(),
    td.Poisson: lambda v, M, draws: draws.poisson(v["rate"].unsqueeze(-1), M).squeeze(-1),
    td.Geometric: _draw_geometric,
    td.MultivariateNormal: _draw_multivariate_normal,
}
