"""Which likelihood a torch loss stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

from torch import nn

from fisherops.likelihoods.base import Likelihood
from fisherops.likelihoods.categorical import Categorical, LogCategorical
from fisherops.likelihoods.distributions import DistributionLikelihood
from fisherops.likelihoods.elementwise import (
    Bernoulli,
    BernoulliProbability,
    Gaussian,
    HeteroscedasticGaussian,
    Huber,
    Laplace,
    Poisson,
)
from fisherops.likelihoods.heads import Heads


def _smooth_l1(loss: nn.SmoothL1Loss) -> Likelihood:
    if loss.beta == 0:
        return Laplace(loss.reduction)
    return Huber(loss.reduction, sqrt(loss.beta), loss.beta)


_LIKELIHOODS: dict[type[nn.Module], Callable[[Any], Likelihood]] = {
    nn.MSELoss: lambda loss: Gaussian(loss.reduction),
    nn.CrossEntropyLoss: lambda loss: Categorical(loss.reduction, loss.weight, loss.ignore_index, loss.label_smoothing),
    nn.BCEWithLogitsLoss: lambda loss: Bernoulli(loss.reduction, loss.weight, loss.pos_weight),
    nn.BCELoss: lambda loss: BernoulliProbability(loss.reduction, loss.weight),
    nn.NLLLoss: lambda loss: LogCategorical(loss.reduction, loss.weight, loss.ignore_index),
    nn.PoissonNLLLoss: lambda loss: Poisson(loss.reduction, loss.log_input, loss.eps),
    nn.GaussianNLLLoss: lambda loss: HeteroscedasticGaussian(loss.reduction, loss.eps),
    nn.L1Loss: lambda loss: Laplace(loss.reduction),
    nn.HuberLoss: lambda loss: Huber(loss.reduction, loss.delta),
    nn.SmoothL1Loss: _smooth_l1,
}

_REASONS: dict[type[nn.Module], str] = {
    nn.KLDivLoss: (
        "its targets are distributions; where the outputs are log-probabilities, CrossEntropyLoss with these targets "
        "has the same gradient"
    ),
    nn.CTCLoss: "it sums over alignments, whose Fisher has no simple form",
}

SUPPORTED = ", ".join(loss.__name__ for loss in _LIKELIHOODS)


def of_loss(loss_func: object) -> Likelihood:
    """Return the likelihood that a loss stands for.

    Parameters
    ----------
    loss_func : nn.Module, Likelihood, mapping, tuple or None
        As of the operators.

    Raises
    ------
    NotImplementedError
        If the loss, or an option of it, is not supported.
    """
    if isinstance(loss_func, Likelihood):
        return loss_func
    if loss_func is None:
        return DistributionLikelihood()
    if isinstance(loss_func, Mapping | tuple | list):
        return _heads(loss_func)
    for known, likelihood in _LIKELIHOODS.items():
        if isinstance(loss_func, known):
            if type(loss_func).forward is not known.forward:
                raise NotImplementedError(
                    f"`loss_func` is {type(loss_func).__name__}, whose `forward` is not that of {known.__name__}: the "
                    f"likelihood that it stands for is not known. {_others()}"
                )
            return likelihood(loss_func)
    name = loss_func.__name__ if isinstance(loss_func, type) else type(loss_func).__name__
    for known, reason in _REASONS.items():
        if isinstance(loss_func, known):
            raise NotImplementedError(f"`loss_func` is {name}, which stands for no likelihood: {reason}. {_others()}")
    hint = " Pass an instance, such as `nn.MSELoss()`." if isinstance(loss_func, type) else ""
    raise NotImplementedError(f"`loss_func` is {name}, which is not supported.{hint} {_others()}")


def _heads(losses: Mapping[Any, object] | tuple[object, ...] | list[object]) -> Heads:
    items = dict(losses) if isinstance(losses, Mapping) else dict(enumerate(losses))
    if not items:
        raise ValueError("`loss_func` is empty: give one loss for each output of the model.")
    heads = {}
    for key, loss in items.items():
        if isinstance(loss, Mapping | tuple | list):
            raise NotImplementedError(f"the loss of head {key!r} is a {type(loss).__name__}: heads cannot be nested.")
        heads[key] = of_loss(loss)
    return Heads(heads, positional=not isinstance(losses, Mapping))


def _others() -> str:
    return (
        f"Supported are {SUPPORTED}; a fisherops.likelihoods.Likelihood of your own; a mapping or tuple of these for a "
        "model with several outputs; and None for a model that returns a torch.distributions.Distribution."
    )
