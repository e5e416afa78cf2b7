"""What is known of torch's distributions: roots of their Fisher information, and draws by inversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.special import i0e, i1e, polygamma

from fisherops.likelihoods.base import Draws
from fisherops.likelihoods.factors import CategoricalRoot, NormalRoot, OutputFactor

_EULER = 0.5772156649015329

Values = dict[str, Tensor]
"""Parameters (..., *shape) and constants of a distribution by name."""


@dataclass(frozen=True)
class Family:
    """One class of distributions; what is not given is not known."""

    root: Callable[[Values], Tensor] | None = None
    """A square root of the Fisher information in the parameters, (T, C) if diagonal, else vectors (T, R, C)."""
    draw: Callable[[Values, int, Draws], Tensor] | None = None
    """Draws targets (M, T, ...) by inversion; if None, torch's `icdf` or `sample` does."""
    factor: Callable[[Values], OutputFactor] | None = None
    """The same if the root is better not written out."""
    constants: tuple[str, ...] = ()
    """Arguments that are not parameters."""
    given: tuple[str, ...] = ()
    """Parameters that the root takes as constants."""
    moves_support: tuple[str, ...] = ()
    """Parameters on which the support depends, so that differentiating under the integral is not allowed."""
    least: tuple[str, float] | None = None
    """A parameter, and the value below which draws are often smaller than any number."""
    link: Callable[[Tensor], Tensor] | None = None
    """The logits of probabilities, for classes that take either. (Those of torch are clamped.)"""
    has_probs: bool = False
    """Whether torch computes with probabilities themselves if they are given."""
    rebuilt_as: type | None = None
    """The class of the same distributions whose parameters are read."""


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


def _draw_one_hot(v: Values, samples: int, draws: Draws) -> Tensor:
    return torch.nn.functional.one_hot(_draw_categorical(v, samples, draws), v["logits"].shape[-1]).double()


def _binary(p: Tensor) -> Tensor:
    return p.log() - (-p).log1p()


def _bernoulli(v: Values) -> Tensor:
    """Return the standard deviation of a Bernoulli variable, with its digits for large logits."""
    return (v["logits"].sigmoid() * (-v["logits"]).sigmoid()).sqrt()


def _geometric(v: Values) -> Tensor:
    return _diagonal((-v["logits"]).sigmoid().sqrt() if "logits" in v else (1 - v["probs"]).rsqrt() / v["probs"])


def _categorical(v: Values) -> OutputFactor:
    p = v["logits"].softmax(-1)
    return CategoricalRoot(p, p.new_full((1, 1), sqrt(v.get("total_count", 1))))


_NORMAL = _location_scale(1, 2)

FAMILIES: dict[type, Family] = {
    # Location and scale
    td.Normal: Family(_NORMAL, _draw_normal),
    td.LogNormal: Family(_NORMAL, lambda v, M, draws: _draw_normal(v, M, draws).exp()),
    td.Laplace: Family(_location_scale(1, 1)),
    td.Cauchy: Family(_location_scale(0.5, 0.5)),
    td.HalfNormal: Family(lambda v: _diagonal(sqrt(2) / v["scale"])),
    td.HalfCauchy: Family(lambda v: _diagonal(sqrt(0.5) / v["scale"])),
    td.Gumbel: Family(_gumbel),
    td.Weibull: Family(_weibull),
    td.StudentT: Family(_student, least=("df", 0.04)),
    td.VonMises: Family(_von_mises),
    td.MultivariateNormal: Family(
        None, _draw_multivariate_normal, lambda v: NormalRoot(v["scale_tril"])
    ),
    td.LowRankMultivariateNormal: Family(rebuilt_as=td.MultivariateNormal),
    # Positive numbers, and parts of one
    td.Exponential: Family(lambda v: _diagonal(1 / v["rate"])),
    td.Gamma: Family(_gamma, least=("concentration", 0.02)),
    td.InverseGamma: Family(_gamma, least=("concentration", 0.02)),
    td.Chi2: Family(lambda v: _diagonal(_trigamma(v["df"] / 2).sqrt() / 2), least=("df", 0.04)),
    td.Pareto: Family(
        lambda v: _diagonal(*(1 / v["alpha"] if name == "alpha" else 0 * v["alpha"] for name in v)),
        moves_support=("scale",),
    ),
    td.GeneralizedPareto: Family(moves_support=("loc", "scale", "concentration")),
    td.Uniform: Family(moves_support=("low", "high")),
    td.Beta: Family(),
    td.Dirichlet: Family(lambda v: _dirichlet(v["concentration"]), least=("concentration", 0.02)),
    td.Kumaraswamy: Family(),
    td.ContinuousBernoulli: Family(
        lambda v: _diagonal(_continuous_bernoulli_variance(v["logits"]).sqrt()), link=_binary
    ),
    # Counts and labels
    td.Poisson: Family(
        lambda v: _diagonal(v["rate"].rsqrt()),
        lambda v, M, draws: draws.poisson(v["rate"].unsqueeze(-1), M).squeeze(-1),
    ),
    td.Bernoulli: Family(
        lambda v: _diagonal(_bernoulli(v)),
        lambda v, M, draws: draws.bernoulli(v["logits"].unsqueeze(-1), M).squeeze(-1),
        link=_binary,
    ),
    td.Geometric: Family(_geometric, _draw_geometric, link=_binary, has_probs=True),
    td.Binomial: Family(
        lambda v: _diagonal(0 * v["logits"], v["total_count"].sqrt() * _bernoulli(v)),
        given=("total_count",), link=_binary,
    ),
    td.NegativeBinomial: Family(
        lambda v: _diagonal(0 * v["logits"], (v["total_count"] * v["logits"].sigmoid()).sqrt()),
        given=("total_count",), link=_binary,
    ),
    td.Categorical: Family(None, _draw_categorical, _categorical, link=torch.log),
    td.OneHotCategorical: Family(None, _draw_one_hot, _categorical, link=torch.log),
    td.OneHotCategoricalStraightThrough: Family(rebuilt_as=td.OneHotCategorical),
    td.Multinomial: Family(factor=_categorical, constants=("total_count",), link=torch.log),
    # Without a root
    td.LKJCholesky: Family(constants=("dim",)),
    LogitRelaxedBernoulli: Family(constants=("temperature",), link=_binary),
    ExpRelaxedCategorical: Family(constants=("temperature",), link=torch.log),
}  # fmt: skip
