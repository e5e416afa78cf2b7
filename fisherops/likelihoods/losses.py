"""Which likelihood a torch loss stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import sqrt
from typing import Any

from torch import nn
from torch.nn import functional

from fisherops.likelihoods.base import Likelihood
from fisherops.likelihoods.callables import ExampleLoss, loss_name
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

_FUNCTIONS: dict[Callable[..., Any], type[nn.Module]] = {
    functional.mse_loss: nn.MSELoss,
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.nll_loss: nn.NLLLoss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
    functional.gaussian_nll_loss: nn.GaussianNLLLoss,
    functional.l1_loss: nn.L1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
}

SUPPORTED = ", ".join(loss.__name__ for loss in _LIKELIHOODS)


def of_loss(loss_func: object, any_loss: bool = False) -> Likelihood:
    """Return the likelihood that a loss stands for.

    Parameters
    ----------
    loss_func : nn.Module, Likelihood, mapping, tuple or None
        As of the operators.
    any_loss : bool
        Whether other losses of single examples are accepted: any callable of outputs and targets. Default: False.

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
        return _heads(loss_func, any_loss)
    for known, likelihood in _LIKELIHOODS.items():
        if isinstance(loss_func, known):
            if type(loss_func).forward is not known.forward:
                if any_loss:
                    return ExampleLoss(loss_func)
                raise NotImplementedError(
                    f"`loss_func` is {type(loss_func).__name__}, whose `forward` is not that of {known.__name__}: the "
                    f"likelihood that it stands for is not known. {_others()}"
                )
            return likelihood(loss_func)
    if any_loss and callable(loss_func) and not isinstance(loss_func, type):
        return ExampleLoss(loss_func)
    name = loss_name(loss_func)
    function: Any = loss_func.func if isinstance(loss_func, partial) else loss_func
    module = next((module for known, module in _FUNCTIONS.items() if known is function), None)
    if module is not None:
        raise NotImplementedError(
            f"`loss_func` must be a loss module for this operator, got the function {name}. Pass "
            f"`nn.{module.__name__}()` with the same options. {_others()}"
        )
    for known, reason in _REASONS.items():
        if isinstance(loss_func, known):
            raise NotImplementedError(f"`loss_func` is {name}, which stands for no likelihood: {reason}. {_others()}")
    hint = " Pass an instance, such as `nn.MSELoss()`." if isinstance(loss_func, type) else ""
    raise NotImplementedError(f"`loss_func` is {name}, which is not supported.{hint} {_others()}")


def _heads(losses: Mapping[Any, object] | tuple[object, ...] | list[object], any_loss: bool) -> Heads:
    items = dict(losses) if isinstance(losses, Mapping) else dict(enumerate(losses))
    if not items:
        raise ValueError("`loss_func` is empty: give one loss for each output of the model.")
    heads = {}
    for key, loss in items.items():
        if isinstance(loss, Mapping | tuple | list):
            raise NotImplementedError(f"the loss of head {key!r} is a {type(loss).__name__}: heads cannot be nested.")
        heads[key] = of_loss(loss, any_loss)
    return Heads(heads, positional=not isinstance(losses, Mapping))


def _others() -> str:
    return (
        f"Supported are {SUPPORTED}; a fisherops.likelihoods.Likelihood of your own; a mapping or tuple of these for a "
        "model with several outputs; and None for a model that returns a torch.distributions.Distribution. The "
        "empirical Fisher also accepts any function of outputs and targets that is a mean or sum over examples."
    )
