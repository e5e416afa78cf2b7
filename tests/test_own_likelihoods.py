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


# ---- Shapes that broadcast over terms -----------------------------------------------------------------


class Unit(Likelihood):
    """A normal likelihood of variance 1."""

    def sample(self, f, samples, draws):
        return f + draws.normal(f, samples)

    def log_prob(self, f, y):
        return -(y - f).square().sum(-1) / 2


class LosesAxisOfOutputs(Unit):
    def log_prob(self, f, y):
        return -(y - f[..., 0]).square().sum(-1) / 2


class LosesAxisOfTargets(Unit):
    def log_prob(self, f, y):
        return -(y[..., 0] - f).square().sum(-1) / 2


class LosesAxisAndAverages(Unit):
    def log_prob(self, f, y):
        return -(y[..., 0] - f).square().mean(-1) / 2


class CentersTheBatch(Unit):
    def log_prob(self, f, y):
        return super().log_prob(f - f.mean(-2, keepdim=True), y)


class CentersTargets(Unit):
    def log_prob(self, f, y):
        return super().log_prob(f, y - y.mean(-2, keepdim=True))


class MixesSamples(Unit):
    def log_prob(self, f, y):
        return super().log_prob(f, y.flip(0))


class DrawsForOtherOutputs(Unit):
    def sample(self, f, samples, draws):
        return (f.exp() * draws.uniform(f, samples)[..., 0]).unsqueeze(-1)


class DrawsAroundTheMean(Unit):
    def sample(self, f, samples, draws):
        return f.mean(0) + draws.normal(f, samples)


class DrawsOneForAll(Unit):
    def sample(self, f, samples, draws):
        return f + draws.normal(f, samples)[:, :1]


class DrawsByTorch(Unit):
    def sample(self, f, samples, draws):
        return f + torch.randn(samples, *f.shape, dtype=f.dtype)


LOG_PROBS = [
    LosesAxisOfOutputs, LosesAxisOfTargets, LosesAxisAndAverages, CentersTheBatch, CentersTargets, MixesSamples,
]  # fmt: skip
SAMPLES = [DrawsForOtherOutputs, DrawsAroundTheMean, DrawsOneForAll, DrawsByTorch]


def mixing(kind, operator, terms=5, **options):
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    data = (torch.randn(terms, 2).double(), torch.randn(terms, 1).double())
    return operator(model, kind("sum"), data=data, **options)


@pytest.mark.parametrize("terms", [2, 5])
@pytest.mark.parametrize("kind", LOG_PROBS)
def test_a_log_prob_that_mixes_terms_is_refused(kind, terms):
    rule = f"`log_prob` of {kind.__name__} mixes loss terms: .*Keep the last axis of f and y"
    for samples in (1, terms):  # some broadcast in one of these only
        if kind is MixesSamples and samples == 1:
            continue
        with pytest.raises(ValueError, match=rule if samples == 1 or kind not in LOG_PROBS[:3] else "log_prob"):
            mixing(kind, fo.FisherMCLinearOperator, terms, mc_samples=samples).trace()
    if kind is not MixesSamples:
        with pytest.raises(ValueError, match=rule):
            mixing(kind, fo.EmpiricalFisherLinearOperator, terms).trace()


@pytest.mark.parametrize("sampler", ["counter", "stream"])
@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_that_mixes_terms_is_refused(kind, sampler):
    with pytest.raises(ValueError, match=f"`sample` of {kind.__name__} mixes loss terms: .*from `draws` alone"):
        mixing(kind, fo.FisherMCLinearOperator, mc_samples=5, sampler=sampler).trace()
    model = nn.Linear(2, 1).double()
    data = [(torch.randn(5, 2).double(), (torch.randn(5, 1).double(),) * 2)]
    pair = lambda X: (model(X), model(X))
    with pytest.raises(ValueError, match=f"`sample` of {kind.__name__} mixes"):
        fo.FisherMCLinearOperator(
            pair, (nn.MSELoss(), kind("sum")), list(model.parameters()), data, mc_samples=5, sampler=sampler
        ).trace()


def test_a_mistake_that_shows_in_later_batches_only_is_found():
    """A batch of one term cannot mix terms."""
    model = nn.Linear(2, 1).double()
    data = [(torch.randn(n, 2).double(), torch.randn(n, 1).double()) for n in (1, 4)]
    with pytest.raises(ValueError, match="`log_prob` of LosesAxisOfOutputs mixes"):
        fo.EmpiricalFisherLinearOperator(model, LosesAxisOfOutputs("sum"), data=data).trace()


@pytest.mark.parametrize("samples", [1, 5])
def test_likelihoods_that_do_not_mix_terms_are_accepted(samples):
    for operator in (fo.FisherMCLinearOperator, fo.EmpiricalFisherLinearOperator):
        options = {"mc_samples": samples} if operator is fo.FisherMCLinearOperator else {}
        whole = mixing(Unit, operator, **options).todense()
        assert_same(mixing(Unit, operator, batch_size=2, **options).todense(), whole, torch.float64)


# ---- Exceptions ---------------------------------------------------------------------------------------


class UnusualError(ValueError):
    """An error that cannot be made of a message alone."""

    def __init__(self, code, where):
        super().__init__(code, where)
        self.code = code


@pytest.mark.parametrize("as_head", [False, True])
@pytest.mark.parametrize(
    "error", [UnusualError(7, "here"), KeyError("field"), RuntimeError("shape"), AssertionError(), TypeError("x"),
              NotImplementedError("later"), IndexError("range")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("method", ["flatten", "terms", "sample", "log_prob", "exact"])
def test_exceptions_of_a_likelihood_keep_type_traceback_and_cause(method, error, as_head):
    cause = OSError("file")

    def raises(*_):
        error.__notes__ = []
        raise error from cause

    q = type("Raises", (Unit,), {method: raises})("sum")
    model = nn.Linear(2, 1).double()
    X, y = torch.randn(5, 2).double(), torch.randn(5, 1).double()
    operator = fo.FisherLinearOperator if method == "exact" else fo.FisherMCLinearOperator
    with pytest.raises(type(error)) as raised:
        if as_head:
            params = list(model.parameters())
            operator(lambda X: {"a": model(X)}, {"a": q}, params, [(X, {"a": y})]).trace()
        else:
            operator(model, q, data=(X, y)).trace()
    assert raised.value is error
    assert raised.value.__cause__ is cause
    assert raised.traceback[-1].name == "raises"
    if method == "terms":
        notes = "\n".join(error.__notes__)
        assert "batch 0" in notes
        assert ("head 'a'" in notes) is as_head
