"""Every supported loss and distribution, as a model of two parameters-to-outputs layers, with targets to go with it."""

import copy
from dataclasses import dataclass

import torch
import torch.distributions as td
from torch import nn
from torch.nn.functional import softplus


def positive(z):
    return softplus(z) + 0.3


@dataclass
class Family:
    """A likelihood whose outputs are `make` of (N, size) real numbers; `loss` None if `make` gives distributions."""

    size: int
    make: object
    loss: object = None
    exact: bool = True
    targets: object = None
    """Draws targets for outputs; None draws them from the distributions."""
    log_q: object = None
    """log q(y | z) of a loss, up to a constant, to compare with; y (...)."""


class Model(nn.Module):
    """Outputs of a family from a linear layer."""

    def __init__(self, family, inputs=2, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(inputs, family.size).double()
        self.make = family.make

    def forward(self, X):
        return self.make(self.linear(X))


def covariance(z):
    """2 × 2 covariance matrices of z (N, 3)."""
    a, b, c = positive(z[:, 0]), z[:, 1], positive(z[:, 2])
    L = torch.stack([torch.stack([a, 0 * a], -1), torch.stack([b, c], -1)], -2)
    return L @ L.mT


DISTRIBUTIONS = {
    "Normal": Family(2, lambda z: td.Normal(z[:, 0], positive(z[:, 1]))),
    "Normal of known scale": Family(1, lambda z: td.Normal(z[:, 0], 1.5)),
    "LogNormal": Family(2, lambda z: td.LogNormal(z[:, 0], positive(z[:, 1]))),
    "Laplace": Family(2, lambda z: td.Laplace(z[:, 0], positive(z[:, 1]))),
    "Cauchy": Family(2, lambda z: td.Cauchy(z[:, 0], positive(z[:, 1]))),
    "HalfNormal": Family(1, lambda z: td.HalfNormal(positive(z[:, 0]))),
    "HalfCauchy": Family(1, lambda z: td.HalfCauchy(positive(z[:, 0]))),
    "Gumbel": Family(2, lambda z: td.Gumbel(z[:, 0], positive(z[:, 1]))),
    "Weibull": Family(2, lambda z: td.Weibull(positive(z[:, 0]), 1 + positive(z[:, 1]))),
    "StudentT": Family(3, lambda z: td.StudentT(2 + positive(z[:, 0]), z[:, 1], positive(z[:, 2]))),
    "VonMises": Family(2, lambda z: td.VonMises(z[:, 0].tanh(), positive(z[:, 1]))),
    "Exponential": Family(1, lambda z: td.Exponential(positive(z[:, 0]))),
    "Gamma": Family(2, lambda z: td.Gamma(1 + positive(z[:, 0]), positive(z[:, 1]))),
    "InverseGamma": Family(2, lambda z: td.InverseGamma(1 + positive(z[:, 0]), positive(z[:, 1]))),
    "Chi2": Family(1, lambda z: td.Chi2(2 + positive(z[:, 0]))),
    "Pareto of known scale": Family(1, lambda z: td.Pareto(1.0, 1 + positive(z[:, 0]))),
    "Beta": Family(2, lambda z: td.Beta(1 + positive(z[:, 0]), 1 + positive(z[:, 1]))),
    "Dirichlet": Family(3, lambda z: td.Dirichlet(1 + positive(z))),
    "Poisson": Family(1, lambda z: td.Poisson(positive(z[:, 0]))),
    "Bernoulli": Family(1, lambda z: td.Bernoulli(logits=z[:, 0])),
    "Bernoulli by probabilities": Family(1, lambda z: td.Bernoulli(probs=z[:, 0].sigmoid())),
    "Geometric": Family(1, lambda z: td.Geometric(logits=z[:, 0])),
    "ContinuousBernoulli": Family(1, lambda z: td.ContinuousBernoulli(logits=1 + positive(z[:, 0]))),
    "Binomial": Family(1, lambda z: td.Binomial(5, logits=z[:, 0])),
    "NegativeBinomial": Family(1, lambda z: td.NegativeBinomial(3.0, logits=z[:, 0] - 1)),
    "Categorical": Family(3, lambda z: td.Categorical(logits=z)),
    "Categorical by probabilities": Family(3, lambda z: td.Categorical(probs=positive(z))),
    "OneHotCategorical": Family(3, lambda z: td.OneHotCategorical(logits=z)),
    "Multinomial": Family(3, lambda z: td.Multinomial(3, logits=z)),
    "MultivariateNormal": Family(5, lambda z: td.MultivariateNormal(z[:, :2], covariance(z[:, 2:]))),
    "LowRankMultivariateNormal": Family(
        6, lambda z: td.LowRankMultivariateNormal(z[:, :2], z[:, 2:4, None], positive(z[:, 4:]))
    ),
    "LogisticNormal": Family(4, lambda z: td.LogisticNormal(z[:, :2], positive(z[:, 2:]))),
    "Independent Normal": Family(4, lambda z: td.Independent(td.Normal(z[:, :2], positive(z[:, 2:])), 1)),
    "Independent Categorical": Family(4, lambda z: td.Independent(td.Categorical(logits=z.view(-1, 2, 2)), 1)),
    "TransformedDistribution": Family(
        2, lambda z: td.TransformedDistribution(td.Normal(z[:, 0], positive(z[:, 1])), [td.SigmoidTransform()])
    ),
    "MixtureSameFamily": Family(
        6,
        lambda z: td.MixtureSameFamily(td.Categorical(logits=z[:, :2]), td.Normal(z[:, 2:4], positive(z[:, 4:]))),
        exact=False,
    ),
    "Kumaraswamy": Family(2, lambda z: td.Kumaraswamy(1 + positive(z[:, 0]), 1 + positive(z[:, 1])), exact=False),
    "NegativeBinomial of predicted count": Family(
        2, lambda z: td.NegativeBinomial(positive(z[:, 0]), logits=z[:, 1] - 1), exact=False
    ),
    "RelaxedBernoulli": Family(1, lambda z: td.RelaxedBernoulli(torch.tensor(0.5), logits=z[:, 0]), exact=False),
}


def labels(C):
    return lambda output, g: torch.randint(C, output.shape[:1] + output.shape[2:], generator=g)


def reals(output, g):
    output = output[0] if isinstance(output, tuple) else output
    return output + torch.randn(output.shape, generator=g, dtype=output.dtype)


def bits(output, g):
    return torch.randint(2, output.shape, generator=g).double()


def counts(output, g):
    return torch.randint(5, output.shape, generator=g).double()


WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)

LOSSES = {
    "MSELoss": Family(2, lambda z: z, nn.MSELoss(), targets=reals),
    "CrossEntropyLoss": Family(3, lambda z: z, nn.CrossEntropyLoss(), targets=labels(3)),
    "CrossEntropyLoss with weights": Family(3, lambda z: z, nn.CrossEntropyLoss(WEIGHTS), targets=labels(3)),
    "CrossEntropyLoss of sequences": Family(
        6, lambda z: z.view(-1, 3, 2), nn.CrossEntropyLoss(WEIGHTS, ignore_index=1), targets=labels(3)
    ),
    "BCEWithLogitsLoss": Family(2, lambda z: z, nn.BCEWithLogitsLoss(), targets=bits),
    "BCEWithLogitsLoss with weights": Family(
        2, lambda z: z, nn.BCEWithLogitsLoss(weight=WEIGHTS[:2], pos_weight=WEIGHTS[1:]), targets=bits
    ),
    "BCELoss": Family(2, lambda z: z.sigmoid(), nn.BCELoss(weight=WEIGHTS[:2]), targets=bits),
    "NLLLoss": Family(3, lambda z: z.log_softmax(1), nn.NLLLoss(WEIGHTS, ignore_index=0), targets=labels(3)),
    "PoissonNLLLoss": Family(2, lambda z: z, nn.PoissonNLLLoss(full=True), targets=counts),
    "PoissonNLLLoss of rates": Family(
        2, positive, nn.PoissonNLLLoss(log_input=False, eps=0.1, reduction="sum"), targets=counts
    ),
    "GaussianNLLLoss": Family(4, lambda z: (z[:, :2], positive(z[:, 2:])), nn.GaussianNLLLoss(), targets=reals),
    "GaussianNLLLoss of one variance": Family(
        3, lambda z: (z[:, :2], positive(z[:, 2])), nn.GaussianNLLLoss(full=True), targets=reals
    ),
    "L1Loss": Family(2, lambda z: z, nn.L1Loss(), targets=reals),
    "HuberLoss": Family(2, lambda z: z, nn.HuberLoss(delta=0.7), targets=reals),
    "SmoothL1Loss": Family(2, lambda z: z, nn.SmoothL1Loss(beta=1.7), targets=reals),
}

FAMILIES = LOSSES | DISTRIBUTIONS


def make_problem(name, N=6, seed=0):
    """Build a family's model and N data."""
    family = FAMILIES[name]
    model = Model(family, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    X = torch.randn(N, 2, generator=g, dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model(X)
        y = output.sample() if family.loss is None else family.targets(output, g)
    return model, copy.deepcopy(family.loss), X, y
