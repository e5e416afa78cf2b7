"""Models that return a ``torch.distributions.Distribution``: the targets' distribution itself.

Its parameters, taken from whatever object the model returns, are the coordinates f: (T, C), one row for each element of
its ``batch_shape``. Everything here computes in float64; outputs are small beside models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fisherops.likelihoods.base import Draws, Likelihood, Terms, checked_targets, refuse
from fisherops.likelihoods.factors import OutputFactor
from fisherops.likelihoods.named import Structure
from fisherops.likelihoods.rebuilding import in_support
from fisherops.likelihoods.structures import structure_of


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

    def __init__(self, reduction: str = "sum", _structure: Structure | None = None) -> None:
        super().__init__(reduction)
        self._structure = _structure

    def bind(self, output: Any) -> DistributionLikelihood:
        return DistributionLikelihood(self.reduction, structure_of(output))

    def flatten(self, output: Any) -> Tensor:
        structure = structure_of(output)
        return structure.coordinates(output).reshape(-1, structure.size)

    def terms(self, output: Any, y: Any) -> Terms:
        structure = structure_of(output)
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
        inside = in_support(output, y)
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

    def _bound(self) -> Structure:
        assert self._structure is not None
        return self._structure
