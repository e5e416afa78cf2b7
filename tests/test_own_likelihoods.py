"""Likelihoods that users write: draws, mistakes that broadcasting hides, and exceptions."""

import numpy as np
import pytest
import torch
from scipy import stats
from tolerances import assert_same
from torch import nn
from torch.nn.functional import logsigmoid

import fisherops as fo
from fisherops.likelihoods import Likelihood, Terms

N = 4


class OneNumber(Likelihood):
    """Targets are one number for each row of outputs."""

    def terms(self, output, y):
        return Terms(None, len(y), y)


class ZeroInflatedPoisson(OneNumber):
    """f is the logit of a structural zero and the logarithm of the rate."""

    support, weight = torch.arange(60, dtype=torch.float64), 1.0
    theta = (0.3, 0.5)

    def sample(self, f, samples, draws):
        zero, count = draws.bernoulli(f[:, :1], samples), draws.poisson(f[:, 1:].exp(), samples)
        return torch.where(zero > 0, 0.0, count)[..., 0]

    def log_prob(self, f, y):
        gate, log = f[..., 0], f[..., 1]
        poisson = logsigmoid(-gate) + y * log - log.exp() - torch.lgamma(y + 1)
        return torch.where(y == 0, torch.logaddexp(logsigmoid(gate), logsigmoid(-gate) - log.exp()), poisson)


class TwoNormals(OneNumber):
    """A mixture: f is the logit of the second component, and two means."""

    support, weight = torch.linspace(-9, 10, 4001, dtype=torch.float64), 19 / 4000
    theta = (0.4, -1.0, 1.5)

    def sample(self, f, samples, draws):
        second = draws.bernoulli(f[:, :1], samples)[..., 0]
        return torch.where(second > 0, f[:, 2], f[:, 1]) + draws.normal(f[:, :1], samples)[..., 0]

    def log_prob(self, f, y):
        parts = [logsigmoid(sign * f[..., 0]) - (y - f[..., k]).square() / 2 for sign, k in ((-1, 1), (1, 2))]
        return torch.logaddexp(*parts) - np.log(2 * np.pi) / 2


class TwoNormalsByClass(TwoNormals):
    """The same, drawn by other calls."""

    def sample(self, f, samples, draws):
        logits = torch.stack([torch.zeros_like(f[:, 0]), f[:, 0]], 1)
        second = draws.categorical(logits.softmax(1), samples)
        noise = draws.generated(f, lambda part: torch.randn(samples, len(part), dtype=part.dtype))
        return torch.where(second > 0, f[:, 2], f[:, 1]) + noise


class TwoNormalsByTorch(TwoNormals):
    """The same, with both numbers from torch's generator, in two calls."""

    def sample(self, f, samples, draws):
        randn = lambda part: torch.randn(samples, len(part), dtype=part.dtype)
        second = torch.special.ndtr(draws.generated(f, randn)) < f[:, 0].sigmoid()
        return torch.where(second, f[:, 2], f[:, 1]) + draws.generated(f, randn)


TWICE = [ZeroInflatedPoisson, TwoNormals, TwoNormalsByClass, TwoNormalsByTorch]


def constant_outputs(kind, samples, **options):
    theta = torch.tensor(kind.theta, dtype=torch.float64)
    data = (torch.zeros(N, 1), torch.zeros(N, dtype=torch.float64))
    model = lambda p, X: p["t"].expand(len(X), -1)
    return fo.FisherMCLinearOperator(model, kind("sum"), {"t": theta}, data, mc_samples=samples, **options)


@pytest.mark.parametrize("sampler", ["counter", "stream"])
@pytest.mark.parametrize("kind", TWICE)
def test_two_draws_within_a_sample_are_independent(kind, sampler):
    """The Fisher is the sum (or a fine integral) over all targets; false alarm 1e-6."""
    q, theta = kind("sum"), torch.tensor(kind.theta, dtype=torch.float64)
    log_q = lambda t: q.log_prob(t.expand(len(q.support), len(t)), q.support)
    J = torch.func.jacfwd(log_q)(theta)
    expected = N * ((J.T * log_q(theta).exp() * q.weight) @ J).numpy()
    op = constant_outputs(kind, 4000, sampler=sampler)
    V = np.concatenate([np.eye(len(theta)), np.ones((len(theta), 1))], 1)
    forms, exact = np.einsum("dk,dk->k", V, op @ V), np.einsum("dk,dk->k", V, expected @ V)
    assert np.abs(forms - exact).max() <= stats.norm.isf(1e-7) * op.standard_error(V).max()


@pytest.mark.parametrize("kind", TWICE)
def test_the_split_does_not_matter_for_two_draws(kind):
    whole = constant_outputs(kind, 3)
    for options in ({"batch_size": 1}, {"batch_size": 3, "check_deterministic": False}):
        assert_same(constant_outputs(kind, 3, **options).todense(), whole.todense(), torch.float64)
    assert_same(whole @ np.eye(len(kind.theta)), whole.todense(), torch.float64)
    assert_same(whole.resample(1).resample(2147483647).todense(), whole.todense(), torch.float64)


def test_many_calls_are_independent_and_the_first_is_that_of_a_single_call():
    seen = []

    class Asks(OneNumber):
        calls = 40

        def sample(self, f, samples, draws):
            numbers = [draws.uniform(f, samples) for _ in range(self.calls)]
            numbers.append(draws.generated(f, lambda part: torch.rand(samples, *part.shape, dtype=torch.float64)))
            numbers.append(draws.generated(f, lambda part: torch.rand(samples, *part.shape, dtype=torch.float64)))
            seen.append(torch.stack(numbers))
            return f + draws.normal(f, samples)

        def log_prob(self, f, y):
            return -(y - f).square().sum(-1)

    class AsksOnce(Asks):
        calls = 1

    model, data = nn.Linear(1, 3), (torch.ones(50, 1), torch.zeros(50, 3))
    for kind in (Asks, AsksOnce):
        fo.FisherMCLinearOperator(model, kind("sum"), data=data, mc_samples=20).trace()
    many, one = (next(s for s in seen if len(s) == n + 2 and s.shape[2] == 50) for n in (40, 1))
    assert torch.equal(many[0], one[0])
    assert torch.equal(many[-2:], one[-2:])
    # 42 arrays of 3,000 numbers: the largest correlation of 861 pairs.
    correlations = np.corrcoef(many.reshape(42, -1).numpy()) - np.eye(42)
    assert np.abs(correlations).max() < stats.norm.isf(1e-6 / 861) / np.sqrt(3000)
