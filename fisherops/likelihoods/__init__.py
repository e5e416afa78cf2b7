"""Likelihoods in output space: what a loss says about the distribution of the targets.

A likelihood knows tensors only: outputs f, targets y, and draws. Outputs are flattened to (T, C), one row for each loss
term of the batch, so that the rest of the library sees no other shape. Write your own as a subclass of `Likelihood`.
"""

from fisherops.likelihoods.base import Draws, Likelihood, Terms
from fisherops.likelihoods.density import LogDensity
from fisherops.likelihoods.distributions import DistributionLikelihood
from fisherops.likelihoods.factors import DenseFactor, DiagonalFactor, OutputFactor
from fisherops.likelihoods.losses import of_loss

__all__ = [
    "DenseFactor",
    "DiagonalFactor",
    "DistributionLikelihood",
    "Draws",
    "Likelihood",
    "LogDensity",
    "OutputFactor",
    "Terms",
    "of_loss",
]
