"""Models whose output is the log-density of the data themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherops.likelihoods.base import Draws, Likelihood, Terms, checked_tensor
from fisherops.likelihoods.factors import DenseFactor, OutputFactor


class LogDensity(Likelihood):
    """Models that return log p(x) for each example x, such as normalizing flows and autoregressive models.

    The score of an example is −∇ log p(x), so the *empirical* Fisher is defined: the second moment of the scores at the
    data. There are no outputs from which other data could be drawn, so Monte-Carlo and exact Fisher are refused. Draw
    samples from the model and pass them as `data` instead: the empirical Fisher of samples of the model is its
    Monte-Carlo Fisher.

    Each element of the output is a loss term. Targets are not read; pass the inputs again, ``data=(X, X)``.

    Parameters
    ----------
    reduction : {"sum", "mean"}
        Whether the Fisher is that of the sum of log-densities over the whole data set, or is divided by their number.
        Default: "sum".

    Notes
    -----
    The density must be normalized for all parameters. If the model returns an energy, or the logarithm of a density up
    to a constant that depends on the parameters, the scores lack the gradient of the constant: subtract their mean over
    samples of the model, see docs/how-to/likelihood.

    Examples
    --------
    A normal density of learned mean, whose Fisher of N samples is about N:

    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> params = {"mean": torch.tensor(2.0)}
    >>> def log_density(p, X):
    ...     return -((X - p["mean"]) ** 2) / 2
    >>> X = 2.0 + torch.randn(10_000)
    >>> loss = fo.likelihoods.LogDensity()
    >>> op = fo.EmpiricalFisherLinearOperator(log_density, loss, params, data=(X, X))
    >>> round(op.trace() / 10_000, 1)
    1.0
    """

    def __init__(self, reduction: str = "sum") -> None:
        super().__init__(reduction)

    def flatten(self, output: Any) -> Tensor:
        return checked_tensor(output).reshape(-1, 1)

    def terms(self, output: Any, y: Any) -> Terms:
        f = self.flatten(output)
        return Terms(None, len(f), f.detach().new_zeros(len(f)))

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return f.squeeze(-1)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        return DenseFactor(-torch.ones_like(f).unsqueeze(1).expand(len(f), len(y), 1))

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        raise NotImplementedError(
            "the Monte-Carlo Fisher is not defined for LogDensity: the model returns log p(x) of the data, and nothing "
            f"that targets can be drawn from. {_CURE}"
        )

    def exact(self, f: Tensor) -> OutputFactor:
        raise NotImplementedError(
            "the exact Fisher is not defined for LogDensity: the model returns log p(x) of the data, and not a "
            f"distribution to take the expectation over. {_CURE}"
        )


_CURE = (
    "Draw samples from the model and pass them as `data` to EmpiricalFisherLinearOperator: the empirical Fisher of "
    "samples of the model is its Monte-Carlo Fisher."
)
