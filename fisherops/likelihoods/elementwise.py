"""Likelihoods of real, binary and count targets: the elements of a term are independent given its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from math import erf, exp, pi, sqrt
from typing import Any

import torch
from torch import Tensor

from fisherops.likelihoods.base import (
    Draws,
    Likelihood,
    Terms,
    as_rows,
    checked_targets,
    checked_tensor,
    checked_weights,
    refuse,
    require_targets,
)
from fisherops.likelihoods.factors import DenseFactor, DiagonalFactor, OutputFactor


def _dense(scores: Tensor, f: Tensor) -> DenseFactor:
    """Make a factor of scores (R, T, C), computed in whatever precision, in that of f."""
    return DenseFactor(scores.to(f.dtype).transpose(0, 1))


class _Location(Likelihood):
    """A likelihood of residuals y − f, which stand for targets: y would lose their digits where f is large."""

    def terms(self, output: Any, y: Any) -> Terms:
        terms = super().terms(output, y)
        if y is None:
            return terms
        return terms._replace(observed=terms.observed.double() - as_rows(output.detach()).double())

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return self._log_density(y - (f - f.detach()))

    def _log_density(self, residuals: Tensor) -> Tensor:
        """Return log q up to a constant, (..., T) for residuals (..., T, C)."""
        raise NotImplementedError


class Gaussian(_Location):
    """``MSELoss``: ‖f − y‖² is −log of a normal density with variance ½, up to a constant.

    The score is 2(f − y), so with ỹ = f + √½ ε, ε ~ N(0, 1), would-be gradients are −√2 ε and B = 2I.
    """

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        return sqrt(0.5) * draws.normal(f, samples).double()

    def _log_density(self, residuals: Tensor) -> Tensor:
        return -residuals.square().sum(-1)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        return _dense(-2 * y, f)

    def exact(self, f: Tensor) -> OutputFactor:
        return DiagonalFactor(torch.full_like(f, sqrt(2)))


class HeteroscedasticGaussian(Likelihood):
    """``GaussianNLLLoss``: the model returns (mean, var) or a mapping with both, y ~ N(mean, var).

    With f = (μ, v), s = ((μ − y)/v, (1/v − (μ − y)²/v²)/2) and B = diag(1/v, 1/(2v²)).

    Parameters
    ----------
    reduction : {"mean", "sum"}
    eps : float
        Smaller variances are taken as `eps`, without changing derivatives, as the loss does.
    """

    def __init__(self, reduction: str = "mean", eps: float = 1e-6) -> None:
        super().__init__(reduction)
        self._eps = eps

    def flatten(self, output: Any) -> Tensor:
        mean, var = _mean_and_variance(output)
        var = var + (var.clamp(min=self._eps) - var).detach()
        return torch.cat([as_rows(mean), as_rows(var)], 1)

    def terms(self, output: Any, y: Any) -> Terms:
        mean, var = _mean_and_variance(output)
        if (var <= 0).any():
            refuse("the variance must be positive", var, var <= 0, "let the model return exp or softplus of a number")
        terms = super().terms(mean, y)
        if y is None:
            return terms
        return terms._replace(observed=terms.observed.double() - as_rows(mean.detach()).double())

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        var = f.double().chunk(2, -1)[1]
        return var.sqrt() * draws.normal(var, samples)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log q for residuals y − μ, as of `sample`."""
        mean, var = f.chunk(2, -1)
        return -((y - (mean - mean.detach())).square() / var + var.log()).sum(-1) / 2

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        var = f.double().chunk(2, -1)[1]
        standard = -y / var
        return _dense(torch.cat([standard, (1 / var - standard.square()) / 2], -1), f)

    def exact(self, f: Tensor) -> OutputFactor:
        var = f.chunk(2, -1)[1]
        return DiagonalFactor(torch.cat([var.rsqrt(), sqrt(0.5) / var], -1))


def _mean_and_variance(output: Any) -> tuple[Tensor, Tensor]:
    """Return the two outputs in the same shape (batch, ..., C)."""
    if isinstance(output, Mapping) and {"mean", "var"} <= set(output):
        output = (output["mean"], output["var"])
    if not isinstance(output, tuple | list) or len(output) != 2:
        raise TypeError(
            "for GaussianNLLLoss the model must return a pair (mean, var), or a mapping with 'mean' and 'var', got "
            f"{type(output).__name__}: return both from the model."
        )
    mean, var = (checked_tensor(part) for part in output)
    if var.shape == mean.shape[:-1]:
        var = var.unsqueeze(-1)
    if var.shape not in (mean.shape, (*mean.shape[:-1], 1)):
        raise ValueError(
            f"the variance has shape {tuple(var.shape)} and the mean {tuple(mean.shape)}: they must be equal, or the "
            "variance may have 1 in place of the last axis."
        )
    return mean, var.expand(mean.shape)


class Huber(_Location):
    """``HuberLoss`` and ``SmoothL1Loss``: q ∝ exp(−loss), normal in the middle with exponential tails.

    With z = (f − y)/√τ the loss is z²/2 for |z| ≤ d and d|z| − d²/2 beyond. The score is clamp(z, −d, d)/√τ, and
    B = P(|z| ≤ d)/τ, the same as the expected curvature of the loss.

    Parameters
    ----------
    reduction : {"mean", "sum"}
    threshold : float
        d > 0.
    temperature : float
        τ > 0.

    References
    ----------
    P. J. Huber, Robust estimation of a location parameter, Ann. Math. Statist. 35 (1964) 73–101.
    """

    mean_counts_weights = False

    def __init__(self, reduction: str, threshold: float, temperature: float = 1.0) -> None:
        super().__init__(reduction)
        self._threshold, self._temperature = threshold, temperature
        self._middle = sqrt(2 * pi) * erf(threshold / sqrt(2))
        self._mass = self._middle + 2 * exp(-(threshold**2) / 2) / threshold

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        d = self._threshold
        uniform = draws.uniform(f, samples)
        outside = 2 * torch.minimum(uniform, 1 - uniform)  # P(|z| > x) for the x to be found
        middle = sqrt(2) * torch.special.erfinv(((1 - outside) * self._mass / sqrt(2 * pi)).clamp(max=1))
        tail = d / 2 - (outside * self._mass * d / 2).log() / d
        z = torch.where((1 - outside) * self._mass <= self._middle, middle, tail)
        return sqrt(self._temperature) * z * (uniform - 0.5).sign()

    def _log_density(self, residuals: Tensor) -> Tensor:
        z, d = residuals.abs() / sqrt(self._temperature), self._threshold
        return -torch.where(z <= d, z.square() / 2, d * z - d**2 / 2).sum(-1)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        z = -y / sqrt(self._temperature)
        return _dense(z.clamp(-self._threshold, self._threshold) / sqrt(self._temperature), f)

    def exact(self, f: Tensor) -> OutputFactor:
        return DiagonalFactor(torch.full_like(f, sqrt(self._middle / self._mass / self._temperature)))


class Laplace(_Location):
    """``L1Loss``: |f − y| is −log of a Laplace density of scale 1. The score is sign(f − y) and B = I."""

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        uniform = draws.uniform(f, samples)
        magnitude = -(2 * torch.minimum(uniform, 1 - uniform)).log()
        return magnitude * (uniform - 0.5).sign()

    def _log_density(self, residuals: Tensor) -> Tensor:
        return -residuals.abs().sum(-1)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        return _dense(-y.sign(), f)

    def exact(self, f: Tensor) -> OutputFactor:
        return DiagonalFactor(torch.ones_like(f))


class Bernoulli(Likelihood):
    """``BCEWithLogitsLoss``: each output element is the logit of an independent Bernoulli variable.

    The score is σ(f) − y, so B = diag σ(f)(1 − σ(f)). Targets may lie anywhere in [0, 1]. With ``weight`` v and
    ``pos_weight`` a the loss of an element is −v (a y log σ + (1 − y) log(1 − σ)): an observation of weight
    w = v (a y + 1 − y) whose label is a y / (a y + 1 − y).

    Parameters
    ----------
    reduction : {"mean", "sum"}
    weight, pos_weight : torch.Tensor or None
        As of the loss; broadcast to the outputs.
    """

    mean_counts_weights = False

    def __init__(self, reduction: str, weight: Tensor | None = None, pos_weight: Tensor | None = None) -> None:
        super().__init__(reduction)
        self._weight = checked_weights("weight", weight)
        self._pos_weight = checked_weights("pos_weight", pos_weight)

    def terms(self, output: Any, y: Any) -> Terms:
        if y is None:
            if self._pos_weight is not None:
                require_targets(y, "pos_weight")
            terms = super().terms(output, y)
            if self._weight is None:
                return terms
            ones = torch.ones(output.shape, dtype=torch.float64, device=output.device)
            return terms._replace(weights=as_rows(_broadcast("weight", self._weight, ones)))
        y = checked_targets(y)
        terms = super().terms(output, y)
        outside = ~((y >= 0) & (y <= 1))
        if outside.any():
            refuse("binary cross-entropy takes targets in [0, 1]", y, outside, "use 0/1 labels or probabilities")
        if self._weight is None and self._pos_weight is None:
            return terms
        ones = torch.ones(output.shape, dtype=torch.float64, device=y.device)
        positive = y * _broadcast("pos_weight", self._pos_weight, ones)
        weights = positive + (1 - y)
        label = torch.where(weights > 0, positive / weights, 0)
        weights = weights * _broadcast("weight", self._weight, ones)
        return Terms(as_rows(weights), terms.divisor, as_rows(label))

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        return draws.bernoulli(f, samples)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return -(torch.nn.functional.softplus(f) - y * f).sum(-1)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        return _dense(f.double().sigmoid() - y, f)

    def exact(self, f: Tensor) -> OutputFactor:
        # σ(f) σ(−f) keeps its digits where σ is close to 1.
        return DiagonalFactor((f.sigmoid() * (-f).sigmoid()).sqrt_())


class BernoulliProbability(Bernoulli):
    """``BCELoss``: outputs are probabilities; their logits are taken in the model's place."""

    def flatten(self, output: Any) -> Tensor:
        return super().flatten(checked_tensor(output).logit())

    def terms(self, output: Any, y: Any) -> Terms:
        outside = (output <= 0) | (output >= 1)
        if outside.any():
            refuse(
                "BCELoss takes probabilities between 0 and 1 as outputs", output, outside,
                "end the model with a sigmoid, or for logits and values next to 0 or 1 use BCEWithLogitsLoss",
            )  # fmt: skip
        return super().terms(output, y)


class Poisson(Likelihood):
    """``PoissonNLLLoss``: each output element is the logarithm of the rate λ = e^f of a Poisson count.

    The score is λ − y, so B = diag λ. Where the loss takes rates (``log_input=False``), f = log(output + eps).

    Parameters
    ----------
    reduction : {"mean", "sum"}
    log_input : bool
    eps : float
        Added to outputs that are rates.
    """

    def __init__(self, reduction: str, log_input: bool = True, eps: float = 1e-8) -> None:
        super().__init__(reduction)
        self._log_input, self._eps = log_input, eps

    def flatten(self, output: Any) -> Tensor:
        output = checked_tensor(output)
        return super().flatten(output if self._log_input else (output + self._eps).log())

    def terms(self, output: Any, y: Any) -> Terms:
        terms = super().terms(output, y)
        if y is not None and (y < 0).any():
            refuse("Poisson counts must be at least 0", y, y < 0, "correct the targets")
        if not self._log_input and (wrong := output + self._eps <= 0).any():
            refuse(
                "PoissonNLLLoss(log_input=False) takes positive rates as outputs", output, wrong,
                "end the model with exp or softplus, or use log_input=True",
            )  # fmt: skip
        return terms

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        return draws.poisson(f.double().exp(), samples)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return (y * f - f.exp()).sum(-1)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        return _dense(f.double().exp() - y, f)

    def exact(self, f: Tensor) -> OutputFactor:
        return DiagonalFactor((f / 2).exp())


def _broadcast(name: str, weights: Tensor | None, ones: Tensor) -> Tensor:
    """Return weights in the shape of the outputs."""
    if weights is None:
        return ones
    try:
        return weights.to(ones).broadcast_to(ones.shape)
    except RuntimeError:
        raise ValueError(
            f"the `{name}` of the loss has shape {tuple(weights.shape)}, which does not broadcast to the outputs "
            f"{tuple(ones.shape)}."
        ) from None
