"""Every likelihood: exact against numerical integration, Monte Carlo against exact, empirical against torch's gradients."""

import copy
import functools

import numpy as np
import oracle
import pytest
import torch
from families import DISTRIBUTIONS, FAMILIES, make_problem
from scipy import stats
from tolerances import assert_same
from torch import nn

import fisherops as fo
from fisherops import likelihoods
from fisherops._draws import CounterDraws
from fisherops.likelihoods.factors import CategoricalFactor

EXACT = [name for name, family in FAMILIES.items() if family.exact]
FALSE_ALARM = 1e-6
"""Probability that a statistical test below fails for a correct library (over fresh seeds; the seeds are fixed)."""

# ---- The exact Fisher, by sums and integrals over the targets ------------------------------------------


SUPPORTS = {
    "LogNormal": "positive", "HalfNormal": "positive", "HalfCauchy": "positive", "Weibull": "positive",
    "Exponential": "positive", "Gamma": "positive", "InverseGamma": "positive", "Chi2": "positive",
    "Pareto of known scale": "above one", "Beta": "unit", "ContinuousBernoulli": "unit",
    "TransformedDistribution": "unit", "VonMises": "circle", "Poisson": "counts", "Geometric": "counts",
    "NegativeBinomial": "counts",
}  # fmt: skip
NORMAL = ("MultivariateNormal", "LowRankMultivariateNormal", "Independent Normal", "LogisticNormal")


def line(support, n=6000):
    """Nodes y and weights for integrals over a support: the trapezoidal rule on a scale where densities are smooth."""
    t = (np.arange(n) + 0.5) / n * 2 - 1
    w = np.full(n, 2 / n)
    if support == "real":
        y, dy = np.sinh(15 * t), 15 * np.cosh(15 * t)
    elif support in ("positive", "above one"):
        y = np.exp(30 * t)
        dy = 30 * y
        y = y + (support == "above one")
    elif support == "unit":
        y = 1 / (1 + np.exp(-30 * t))
        dy = 30 * y / (1 + np.exp(30 * t))
    elif support == "circle":
        y, dy = np.pi * t, np.full(n, np.pi)
    else:
        y, w, dy = np.arange(500.0), np.ones(500), np.ones(500)
    return torch.tensor(y), torch.tensor(w * dy)


def cubature(name, dist):
    """Targets (n, 1, ...) of one datum and weights (n,), so that E[g(y)] = Σ w g(y)."""
    if name in NORMAL:
        t, w = np.polynomial.hermite_e.hermegauss(30)
        eps = torch.tensor(np.stack(np.meshgrid(t, t), -1).reshape(-1, 1, 2))
        base = dist.base_dist if name == "LogisticNormal" else dist
        L = base.scale_tril if "Multivariate" in name else base.stddev.diag_embed()
        y = base.mean + (L @ eps.unsqueeze(-1)).squeeze(-1)
        y = dist.transforms[0](y) if name == "LogisticNormal" else y
        return y.detach(), torch.tensor(np.outer(w, w).reshape(-1) / (2 * np.pi))
    if name == "Multinomial":
        y = torch.cartesian_prod(*[torch.arange(4)] * 3)
        y = y[y.sum(1) == 3].unsqueeze(1).double()
        w = torch.ones(len(y))
    elif name == "Independent Categorical":
        y = torch.cartesian_prod(*[torch.arange(2)] * 2).unsqueeze(1)
        w = torch.ones(len(y))
    elif name == "Dirichlet":
        u, du = line("unit", 200)
        y = torch.stack([u[:, None] + 0 * u, (1 - u[:, None]) * u, (1 - u[:, None]) * (1 - u)], -1)
        y, w = y.reshape(-1, 1, 3), (du[:, None] * du * (1 - u[:, None])).reshape(-1)
    elif dist.has_enumerate_support:
        y = dist.enumerate_support()
        w = torch.ones(len(y))
    else:
        y, w = line(SUPPORTS.get(name, "real"))
        y = y.unsqueeze(1)
    return y, w * dist.log_prob(y).exp()[:, 0].detach()


def integrated_fisher(name, model, X):
    """Σ_n Jᵀ E[s sᵀ] J with scores by autograd in the numbers that the linear layer gives."""
    params = list(model.parameters())
    F = 0.0
    for x in X.split(1):
        y, w = cubature(name, model(x))
        assert abs(w.sum() - 1) < 1e-4  # Laplace's density has a kink
        y, w = y[w > 1e-30], w[w > 1e-30]
        z = model.linear(x)
        many = z.detach().expand(len(y), -1).clone().requires_grad_()
        s = torch.autograd.grad(model.make(many).log_prob(y[:, 0]).sum(), many)[0]
        J = torch.stack([oracle.gradient(entry, params) for entry in z[0]])
        F = F + (J.T @ ((s * w[:, None]).T @ s) @ J).numpy()
    return F


@pytest.mark.parametrize("name", [name for name, family in DISTRIBUTIONS.items() if family.exact])
def test_the_exact_fisher_of_a_distribution_is_the_integral(name):
    model, loss, X, y = make_problem(name)
    op = fo.FisherLinearOperator(model, loss, data=(X, y))
    # the nodes are for smooth integrands; Laplace's has a kink, and the Cauchy's tails are cut
    np.testing.assert_allclose(op.todense(), integrated_fisher(name, model, X), rtol=0, atol=2e-4 * op.todense().max())
    assert_same(op @ np.eye(len(op.todense())), op.todense(), torch.float64)


def with_reduction(loss, reduction):
    loss = copy.copy(loss)
    loss.reduction = reduction
    return loss


@pytest.mark.parametrize(
    ("name", "support"), [("PoissonNLLLoss", "counts"), ("PoissonNLLLoss of rates", "counts"), ("L1Loss", "real"),
                          ("HuberLoss", "real"), ("SmoothL1Loss", "real"), ("GaussianNLLLoss", "real")],
)  # fmt: skip
def test_the_exact_fisher_of_a_loss_is_the_integral(name, support):
    """∫ exp(−loss) s sᵀ dy / ∫ exp(−loss) dy with torch's own loss, element by element."""
    model, loss, X, y = make_problem(name)
    params, targets, w = list(model.parameters()), *line(support)
    F = 0.0
    for x in X.split(1):
        outputs = model(x)
        elements = (
            list(zip(*(part[0] for part in outputs), strict=True))
            if isinstance(outputs, tuple)
            else [(f,) for f in outputs[0]]
        )
        for element in elements:
            many = [part.detach().expand(len(targets)).clone().requires_grad_() for part in element]
            values = with_reduction(loss, "none")(many[0], targets, *many[1:])
            q = (-values.detach() + (values.detach()).min()).exp() * w
            if support == "counts":  # torch leaves log y! out, or approximates it
                rate = many[0].detach().exp() if loss.log_input else many[0].detach() + loss.eps
                q = torch.tensor(stats.poisson.pmf(targets.numpy(), rate.numpy()))
            q = q / q.sum()
            s = torch.stack(torch.autograd.grad(values.sum(), many), -1)
            J = torch.stack([oracle.gradient(part, params) for part in element])
            F = F + (J.T @ ((s * q[:, None]).T @ s) @ J).numpy()
    c = y.numel() if loss.reduction == "mean" else 1
    expected = F / c
    actual = fo.FisherLinearOperator(model, loss, data=(X, y)).todense()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


# ---- Monte Carlo: unbiased, by a test that finds planted faults --------------------------------------


SEEDS = 40
LIMIT = stats.t(SEEDS - 1).isf(FALSE_ALARM / 2)


def quadratic_forms(name, rows="term", operator_loss=None, draws=200_000):
    """Return vᵀFv for each of some seeds, and their expectation."""
    model, loss, X, y = make_problem(name)
    D = sum(p.numel() for p in model.parameters())
    v = np.random.default_rng(0).standard_normal(D)
    exact = fo.FisherLinearOperator(model, loss, data=(X, y))
    samples = draws // (SEEDS * len(X))
    op = fo.FisherMCLinearOperator(model, operator_loss or loss, data=(X, y), mc_samples=samples, rows=rows)
    return np.array([v @ (op.resample(seed) @ v) for seed in range(SEEDS)]), v @ (exact @ v)


forms_of = functools.cache(quadratic_forms)


def z_score(forms, expected):
    """Standard errors between the mean and its expectation; Student's t with one degree of freedom less than seeds."""
    return (np.mean(forms) - expected) / (np.std(forms, ddof=1) / np.sqrt(SEEDS))


@pytest.mark.parametrize("name", EXACT)
def test_the_monte_carlo_fisher_is_unbiased(name):
    assert abs(z_score(*forms_of(name))) <= LIMIT


@pytest.mark.parametrize("name", EXACT)
def test_the_test_finds_a_scale_that_is_ten_percent_off(name):
    """A form has a relative variance of about 2 for each draw and datum, more for heavy tails."""
    forms, expected = forms_of(name)
    assert abs(z_score(1.1 * forms, expected)) > LIMIT


@pytest.mark.parametrize("name", list(EXACT)[::6])
def test_the_test_finds_a_scale_that_is_two_percent_off(name):
    """With more draws, for some of all kinds."""
    forms, expected = quadratic_forms(name, draws=4_000_000)
    assert abs(z_score(forms, expected)) <= LIMIT
    assert abs(z_score(1.02 * forms, expected)) > LIMIT


def test_the_test_finds_a_wrong_class_weight():
    wrong = nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
    assert abs(z_score(*quadratic_forms("CrossEntropyLoss with weights", operator_loss=wrong, draws=2_000_000))) > LIMIT


def test_the_test_finds_a_sign_error_in_one_class(monkeypatch):
    def scores(self, f, y):
        factor = CategoricalFactor(f.softmax(1), y.T)
        dense = factor.columns()
        dense[y.T == 1] *= torch.where(torch.arange(3) == 1, -1, 1)
        return likelihoods.DenseFactor(dense)

    monkeypatch.setattr("fisherops.likelihoods.categorical.Categorical.scores", scores)
    assert abs(z_score(*quadratic_forms("CrossEntropyLoss"))) > LIMIT


def test_the_test_finds_samples_shared_between_terms(monkeypatch):
    assert abs(z_score(*quadratic_forms("CrossEntropyLoss of sequences", rows="datum"))) <= LIMIT
    uniform = CounterDraws.uniform

    def shared(self, like, samples):
        terms = len(like) // len(self._index)
        return uniform(self, like[::terms], samples).repeat_interleave(terms, 1)

    monkeypatch.setattr(CounterDraws, "uniform", shared)
    assert abs(z_score(*quadratic_forms("CrossEntropyLoss of sequences", rows="datum"))) > LIMIT


@pytest.mark.parametrize("sampler", ["counter", "stream"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.exact])
def test_without_an_exact_fisher_both_samplers_agree(name, sampler):
    """The mean over seeds is the integral of scores drawn by torch's own `sample`."""
    model, loss, X, y = make_problem(name)
    with pytest.raises(
        NotImplementedError, match="exact Fisher of .* not known in closed form.*FisherMCLinearOperator"
    ):
        fo.FisherLinearOperator(model, loss, data=(X, y)).trace()
    v = np.random.default_rng(0).standard_normal(sum(p.numel() for p in model.parameters()))
    op = fo.FisherMCLinearOperator(model, loss, data=(X, y), mc_samples=4000, sampler=sampler)
    params = list(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        drawn = model(X).sample((4000,))
    slopes = []
    for x, labels in zip(X.split(1), drawn.unbind(1), strict=True):
        z = model.linear(x)
        many = z.detach().expand(4000, -1).clone().requires_grad_()
        s = torch.autograd.grad(model.make(many).log_prob(labels).sum(), many)[0]
        J = torch.stack([oracle.gradient(entry, params) for entry in z[0]])
        slopes.append((s @ (J @ torch.tensor(v))).square())
    slopes = torch.stack(slopes, 1)
    plain, error = float(slopes.mean(0).sum()), float((slopes.var(0) / 4000).sum().sqrt())
    difference = abs(v @ (op @ v) - plain)
    assert difference <= 5 * np.hypot(error, op.standard_error(v))


# ---- The empirical Fisher, by gradients of torch's own losses ------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_empirical_fisher_has_torchs_gradients(name):
    model, loss, X, y = make_problem(name, N=4)
    params = list(model.parameters())
    op = fo.EmpiricalFisherLinearOperator(model, loss, data=(X, y), rows="datum")
    rows, divisor = [], 0.0
    for n in range(4):
        output, target = model(X[n : n + 1]), y[n : n + 1]
        if loss is None:
            rows.append(oracle.gradient(-output.log_prob(target).sum(), params))
            continue
        summed = with_reduction(loss, "sum")
        value = summed(*output[:1], target, *output[1:]) if isinstance(output, tuple) else summed(output, target)
        rows.append(oracle.gradient(value, params))
        counts = torch.ones_like(target, dtype=torch.float64)
        if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
            counts = (target != loss.ignore_index) * (1.0 if loss.weight is None else loss.weight[target])
        divisor += float(counts.sum())
    G = torch.stack(rows).numpy()
    expected = G.T @ G / (divisor if loss is not None and loss.reduction == "mean" else 1)
    assert_same(op.todense(), expected, torch.float64)
    assert_same(op @ np.eye(len(expected)), expected, torch.float64)


# ---- Probabilities as outputs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator", [fo.FisherMCLinearOperator, fo.FisherLinearOperator, fo.EmpiricalFisherLinearOperator]
)
@pytest.mark.parametrize(
    ("of_logits", "of_probabilities", "transform"),
    [(nn.CrossEntropyLoss(), nn.NLLLoss(), nn.LogSoftmax(1)), (nn.BCEWithLogitsLoss(), nn.BCELoss(), nn.Sigmoid())],
)
def test_probabilities_and_logits_are_one_likelihood(of_logits, of_probabilities, transform, operator):
    torch.manual_seed(0)
    body, X = nn.Linear(2, 3).double(), torch.randn(7, 2).double()
    y = torch.randint(3, (7,)) if isinstance(of_logits, nn.CrossEntropyLoss) else torch.randint(2, (7, 3)).double()
    expected = operator(body, of_logits, data=(X, y)).todense()
    actual = operator(nn.Sequential(body, transform), of_probabilities, data=(X, y)).todense()
    assert_same(actual, expected, torch.float64)
