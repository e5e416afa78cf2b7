"""Distributions returned by models, and likelihoods of one's own: structure, draws, and what is refused."""

import numpy as np
import pytest
import torch
import torch.distributions as td
from families import DISTRIBUTIONS, FAMILIES, Model, make_problem, positive
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tolerances import assert_same
from torch import nn

import fisherops as fo
from fisherops._draws import CounterSampler, StreamSampler, _poisson_quantile
from fisherops.likelihoods import DistributionLikelihood, Likelihood, of_loss

OPERATORS = [fo.FisherMCLinearOperator, fo.FisherLinearOperator, fo.EmpiricalFisherLinearOperator]
# Drawn by torch's own sampler, so that more samples need not begin with those of fewer.
GENERATED = {
    "Gamma", "InverseGamma", "Chi2", "Beta", "Dirichlet", "StudentT", "VonMises", "Binomial", "NegativeBinomial",
    "Multinomial", "MixtureSameFamily", "NegativeBinomial of predicted count", "RelaxedBernoulli",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_split_the_order_and_the_products_agree(name):
    model, loss, X, y = make_problem(name)
    for operator in OPERATORS:
        if operator is fo.FisherLinearOperator and not FAMILIES[name].exact:
            continue
        whole = operator(model, loss, data=(X, y))
        F = whole.todense()
        assert_same(whole @ np.eye(len(F)), F, torch.float64)
        assert_same(whole.diagonal(), np.diag(F), torch.float64)
        assert_same(operator(model, loss, data=(X, y), batch_size=4).todense(), F, torch.float64)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        shuffled = [(X[i], y[i], i) for i in order.split(4)]
        assert_same(operator(model, loss, data=shuffled).todense(), F, torch.float64)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in GENERATED])
def test_samples_are_nested(name):
    model, loss, X, y = make_problem(name)
    F = [M * fo.FisherMCLinearOperator(model, loss, data=(X, y), mc_samples=M).todense() for M in (2, 3)]
    values = np.linalg.eigvalsh(F[1] - F[0])
    assert values.min() >= -1e-9 * values.max()


@pytest.mark.parametrize("name", FAMILIES)
def test_float32(name):
    """The same matrix to rounding: draws are made in float64."""
    model, loss, X, y = make_problem(name)
    single = Model(FAMILIES[name])
    single.load_state_dict(model.state_dict())
    single.float()
    loss = loss if loss is None else loss.float()
    y = y.float() if y.is_floating_point() else y
    for operator in OPERATORS:
        if operator is fo.FisherLinearOperator and not FAMILIES[name].exact:
            continue
        if operator is fo.FisherMCLinearOperator and name in GENERATED:
            continue  # rejection may go another way
        expected = operator(single, loss, data=(X.float(), y), dtype="float64").todense()
        actual = operator(single, loss, data=(X.float(), y)).todense()
        assert actual.dtype == np.float32
        assert_same(actual, expected, torch.float32, operations=5000)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_have_the_distribution(name):
    """Kolmogorov-Smirnov (two samples) with torch's own draws, for each coordinate; false alarm 1e-6."""
    model, _, X, _ = make_problem(name, N=1)
    likelihood = DistributionLikelihood()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dist = model(X)
        bound = likelihood.bind(dist)
        f = likelihood.flatten(dist)
        reference = bound._structure.build(f).sample((20_000,)).reshape(20_000, -1).double()
        for draws in (CounterSampler(3).batch(torch.tensor([7])), StreamSampler(3, torch.device("cpu"))):
            drawn = bound.sample(f, 20_000, draws).reshape(20_000, -1).double()
            assert drawn.shape == reference.shape
            for k in range(drawn.shape[1]):
                a, b = drawn[:, k].numpy(), reference[:, k].numpy()
                assert stats.ks_2samp(a, b).pvalue > 1e-6
            assert stats.ks_2samp(drawn.prod(1).numpy(), reference.prod(1).numpy()).pvalue > 1e-6


@given(st.floats(1e-6, 1e5), st.lists(st.floats(1e-13, 1 - 1e-13), min_size=1, max_size=20))
def test_poisson_draws_invert_the_distribution_function(rate, u):
    expected = stats.poisson.ppf(u, rate)
    actual = _poisson_quantile(torch.tensor(u, dtype=torch.float64), torch.tensor(rate, dtype=torch.float64))
    # where u is a value of the distribution function to rounding, either neighbour is right
    edge = np.abs(stats.poisson.cdf(np.minimum(expected, actual.numpy()), rate) / u - 1) < 1e-9
    assert np.all((actual.numpy() == expected) | edge)


@pytest.mark.parametrize("rate", [2e5, 1e9])
def test_poisson_draws_of_large_rates(rate):
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    k = _poisson_quantile(u, torch.tensor(rate).double()).numpy()
    # by the distribution function: stats.poisson.ppf of SciPy 1.14 is one off in some of these
    wrong = (stats.poisson.cdf(k, rate) < u.numpy()) | (stats.poisson.cdf(k - 1, rate) >= u.numpy())
    assert np.abs(k - stats.poisson.ppf(u.numpy(), rate)).max() <= 1
    assert wrong.mean() < 1e-3


def test_loss_func_none_sums_and_a_likelihood_can_average():
    model, _, X, y = make_problem("Gamma")
    total = fo.FisherLinearOperator(model, None, data=(X, y)).todense()
    mean = fo.FisherLinearOperator(model, DistributionLikelihood("mean"), data=(X, y)).todense()
    assert_same(6 * mean, total, torch.float64)


def test_batch_shapes_beyond_the_data():
    """Each element of batch_shape is a term; Independent joins them, and neither changes the exact Fisher."""
    body = nn.Linear(2, 6).double()
    X, y = torch.randn(5, 2).double(), torch.randn(5, 3).double()
    normal = lambda X: td.Normal(body(X)[:, :3], positive(body(X)[:, 3:]))
    joint = lambda X: td.Independent(normal(X), 1)
    params = list(body.parameters())
    plain = fo.FisherLinearOperator(normal, None, params, (X, y)).todense()
    assert_same(fo.FisherLinearOperator(joint, None, params, (X, y)).todense(), plain, torch.float64)
    rows = [fo.EmpiricalFisherLinearOperator(m, None, params, (X, y)).todense() for m in (normal, joint)]
    datum = fo.EmpiricalFisherLinearOperator(normal, None, params, (X, y), rows="datum").todense()
    assert_same(rows[1], datum, torch.float64)
    assert np.abs(rows[0] - datum).max() > 1e-3


def test_the_known_gaussian_is_mse_up_to_scale():
    """Normal(f, √½) is the likelihood of MSELoss."""
    body = nn.Linear(2, 3).double()
    X, y = torch.randn(5, 2).double(), torch.randn(5, 3).double()
    model = lambda X: td.Independent(td.Normal(body(X), 0.5**0.5), 1)
    params = list(body.parameters())
    for operator in OPERATORS[1:]:  # draws are others
        of_distribution = operator(model, None, params, (X, y)).todense()
        of_loss = operator(body, nn.MSELoss(reduction="sum"), params, (X, y)).todense()
        assert_same(of_distribution, of_loss, torch.float64)


# ---- What is refused ------------------------------------------------------------------------------------


class Shifted(td.Normal):
    """A normal distribution with a parameter that it does not name."""

    def __init__(self, loc, scale, shift=0.0, validate_args=None):
        super().__init__(loc, scale, validate_args)
        self.shift = shift

    def log_prob(self, value):
        return super().log_prob(value - self.shift)


class Triangular(td.Distribution):
    """An unknown class that can be rebuilt from its parameters."""

    arg_constraints = {"scale": td.constraints.positive}  # noqa: RUF012
    support = td.constraints.real

    def __init__(self, scale, validate_args=None):
        self.scale = scale
        super().__init__(scale.shape, validate_args=validate_args)

    def log_prob(self, value):
        return -value.abs() / self.scale - self.scale.log()

    def sample(self, shape=()):
        return td.Laplace(torch.zeros_like(self.scale), self.scale).sample(shape)


class Die(td.Distribution):
    """An unknown class of finite support."""

    arg_constraints = {"bias": td.constraints.real}  # noqa: RUF012
    support = td.constraints.integer_interval(0, 4)
    has_enumerate_support = True

    def __init__(self, bias, validate_args=None):
        self.bias = bias
        super().__init__(bias.shape, validate_args=validate_args)

    @property
    def _categorical(self):
        return td.Categorical(logits=self.bias.unsqueeze(-1) * torch.arange(5.0, dtype=self.bias.dtype))

    def log_prob(self, value):
        return self._categorical.log_prob(value)

    def sample(self, shape=()):
        return self._categorical.sample(shape)

    def enumerate_support(self, expand=True):
        return torch.arange(5).unsqueeze(1).expand(5, *self.batch_shape)


def build(make, y, operator=fo.FisherMCLinearOperator, size=2, **options):
    torch.manual_seed(0)
    body = nn.Linear(2, size).double()
    return operator(lambda X: make(body(X)), None, list(body.parameters()), [(torch.ones(3, 2).double(), y)], **options)


def test_unknown_classes_that_can_be_rebuilt():
    y = torch.tensor([0.3, -1.0, 2.0]).double()
    op = build(lambda z: Triangular(positive(z[:, 0])), y, mc_samples=10_000)
    known = build(lambda z: td.Laplace(0 * z[:, 0], positive(z[:, 0])), y, fo.FisherLinearOperator)
    v = np.ones(6)
    assert abs(v @ (op @ v) - v @ (known @ v)) <= 5 * op.standard_error(v)
    with pytest.raises(NotImplementedError, match="exact Fisher of Triangular is not known in closed form"):
        build(lambda z: Triangular(positive(z[:, 0])), y, fo.FisherLinearOperator).trace()
    # sums over the support
    y = torch.tensor([0, 4, 2])
    op = build(lambda z: Die(z[:, 0]), y, mc_samples=10_000)
    exact = build(lambda z: Die(z[:, 0]), y, fo.FisherLinearOperator)
    assert abs(v @ (op @ v) - v @ (exact @ v)) <= 5 * op.standard_error(v)


@pytest.mark.parametrize(
    ("make", "y", "error", "message"),
    [
        (lambda z: Shifted(z[:, 0], positive(z[:, 1]), 1.0), torch.ones(3), NotImplementedError,
         r"Shifted cannot be rebuilt .*: it depends on more than those. Write a fisherops.likelihoods.Likelihood"),
        (lambda z: Shifted(z[:, 0], 1.0, z[:, 1] - z[:, 1].detach()), torch.ones(3), NotImplementedError,
         r"Shifted cannot be rebuilt .*: it depends on more than those"),
        (lambda z: td.RelaxedBernoulli(positive(z[:, 1]), logits=z[:, 0]), torch.full((3,), 0.5), NotImplementedError,
         r"LogitRelaxedBernoulli cannot be rebuilt .*: its temperature is not one fixed number"),
        (lambda z: td.Uniform(0, positive(z[:, 0])), torch.full((3,), 0.1), NotImplementedError,
         r"the support of Uniform depends on its high, which the model predicts: its Fisher information is not defined"),
        (lambda z: td.Pareto(positive(z[:, 0]), 1.0), torch.full((3,), 9.0), NotImplementedError,
         r"the support of Pareto depends on its scale"),
        (lambda z: td.TransformedDistribution(td.Normal(0 * z[:, 0], 1.0), [td.AffineTransform(z[:, 0], 1.0)]),
         torch.ones(3), NotImplementedError, "whose AffineTransform depends on the parameters is not supported: write a"),
        (lambda z: td.TransformedDistribution(td.Normal(z[:, 0], 1.0), [td.AbsTransform()]),
         torch.ones(3), NotImplementedError, "AbsTransform.*, which is not one-to-one, is not supported: write a"),
        (lambda z: td.Normal(z[:, 0], 0 * z[:, 1] - 0.5), torch.ones(3), ValueError,
         r"batch 0: the scale of Normal must be in GreaterThan\(lower_bound=0.0\), got -0.5: correct the model's output"),
        (lambda z: td.Bernoulli(probs=0 * z[:, 0] + 1.5), torch.ones(3), ValueError,
         r"batch 0: the probs of Bernoulli must be in Interval\(lower_bound=0.0, upper_bound=1.0\), got 1.5"),
        (lambda z: td.Poisson(0 * z[:, 0]), torch.ones(3), ValueError,
         r"batch 0: the rate of Poisson must be positive, got 0.0"),
        (lambda z: td.Gamma(positive(z[:, 0]), 1.0), torch.tensor([1.0, -2.0, 3.0]), ValueError,
         r"batch 0: the targets must be in the support of Gamma, got -2.0: correct them"),
        (lambda z: td.Normal(z[:, 0], 1.0), torch.tensor([1.0, torch.nan, 3.0]), ValueError,
         r"batch 0: the targets must be finite, got nan"),
        (lambda z: td.Normal(z[:, 0], 1.0), torch.ones(3, 1), ValueError,
         r"batch 0: the model's Normal is for targets of shape \(3,\), got \(3, 1\): reshape the targets"),
        (lambda z: z, torch.ones(3), TypeError,
         r"with loss_func=None the model must return a torch.distributions.Distribution, got Tensor: pass the loss"),
    ],
)  # fmt: skip
def test_what_is_refused(make, y, error, message):
    with pytest.raises(error, match=message):
        build(make, y.double()).trace()


def test_validation_is_as_the_user_left_it():
    before = td.Distribution._validate_args
    build(lambda z: td.Normal(z[:, 0], 1.0), torch.ones(3)).trace()
    assert td.Distribution._validate_args is before


@pytest.mark.parametrize(
    ("loss", "output", "y", "message"),
    [
        (nn.GaussianNLLLoss(), lambda z: (z, 0 * z - 1), torch.ones(3, 2), "batch 0: the variance must be positive, got -1.0"),
        (nn.GaussianNLLLoss(), lambda z: (z, z[:, :1].repeat(1, 3).exp()), torch.ones(3, 2),
         r"the variance has shape \(3, 3\) and the mean \(3, 2\): they must be equal, or"),
        (nn.PoissonNLLLoss(), lambda z: z, torch.tensor([[1.0, -2.0]] * 3), "batch 0: Poisson counts must be at least 0, got -2.0"),
        (nn.PoissonNLLLoss(log_input=False), lambda z: 0 * z - 3, torch.ones(3, 2),
         r"batch 0: PoissonNLLLoss\(log_input=False\) takes positive rates as outputs, got -3.0: end the model with exp"),
        (nn.NLLLoss(), lambda z: z, torch.zeros(3).long(), "batch 0: NLLLoss takes log-probabilities as outputs, got some whose pr"),
        (nn.NLLLoss(), lambda z: z.log_softmax(1), torch.ones(3, 2), "batch 0: NLLLoss takes class indices of int64 as targets"),
        (nn.BCELoss(), lambda z: 0 * z + 1.5, torch.ones(3, 2), r"batch 0: BCELoss takes probabilities between 0 and 1 as outputs, got 1.5"),
        (nn.MSELoss(), lambda z: z, torch.full((3, 2), torch.inf), "batch 0: the targets must be finite, got inf"),
        (nn.HuberLoss(), lambda z: z, torch.full((3, 2), torch.nan), "batch 0: the targets must be finite, got nan"),
        (nn.L1Loss(), lambda z: z, torch.ones(3, 1), r"batch 0: the outputs have shape \(3, 2\) and the targets \(3, 1\)"),
    ],
)  # fmt: skip
def test_outputs_and_targets_that_losses_refuse(loss, output, y, message):
    body = nn.Linear(2, 2).double()
    y = y.double() if y.is_floating_point() else y
    for check in (True, False):
        with pytest.raises((ValueError, FloatingPointError), match=message):
            fo.FisherMCLinearOperator(
                lambda X: output(body(X)), loss, list(body.parameters()), [(torch.ones(3, 2).double(), y)],
                check_deterministic=check,
            ).trace()  # fmt: skip


def test_gaussian_outputs_of_the_wrong_kind():
    body = nn.Linear(2, 2)
    for output in (lambda z: z, lambda z: (z,), lambda z: {"mu": z, "var": z}):
        with pytest.raises(TypeError, match=r"must return a pair \(mean, var\), or a mapping with 'mean' and 'var'"):
            fo.FisherMCLinearOperator(
                lambda X, output=output: output(body(X)), nn.GaussianNLLLoss(), list(body.parameters()),
                [(torch.ones(3, 2), torch.ones(3, 2))],
            )  # fmt: skip
    mapping = fo.FisherLinearOperator(
        lambda X: {"mean": body(X), "var": body(X).exp()}, nn.GaussianNLLLoss(), list(body.parameters()),
        (torch.ones(3, 2), torch.ones(3, 2)),
    )  # fmt: skip
    pair = fo.FisherLinearOperator(
        lambda X: (body(X), body(X).exp()), nn.GaussianNLLLoss(), list(body.parameters()),
        (torch.ones(3, 2), torch.ones(3, 2)),
    )  # fmt: skip
    np.testing.assert_array_equal(mapping.todense(), pair.todense())


def test_small_variances_are_those_of_the_loss():
    """Below eps the loss takes eps, and derivatives as if it had not."""
    raw = torch.full((1,), 1e-8, dtype=torch.float64)
    X, y = torch.ones(4, 1).double(), torch.randn(4, 1).double()
    model = lambda p, X: (0 * X, p["v"] * X)
    loss = nn.GaussianNLLLoss(reduction="sum", eps=0.1)
    op = fo.EmpiricalFisherLinearOperator(model, loss, {"v": raw}, (X, y), rows="datum")
    v = raw.clone().requires_grad_()
    gradients = [torch.autograd.grad(loss(0 * X[n], y[n], v * X[n]), v)[0].item() for n in range(4)]
    assert op.trace() == pytest.approx(np.sum(np.square(gradients)), rel=1e-12)
    assert fo.FisherLinearOperator(model, loss, {"v": raw}, (X, y)).trace() == pytest.approx(4 / (2 * 0.1**2))


# ---- One's own likelihood ----------------------------------------------------------------------------------


class Rayleigh(Likelihood):
    """Targets with a Rayleigh distribution whose scale is e^f."""

    def sample(self, f, samples, draws):
        return f.exp() * (-2 * draws.uniform(f, samples).log()).sqrt()

    def log_prob(self, f, y):
        return (y.log() - 2 * f - (y / f.exp()).square() / 2).sum(-1)


def test_a_likelihood_of_ones_own():
    torch.manual_seed(0)
    body = nn.Linear(2, 2).double()
    X, y = torch.randn(6, 2).double(), torch.rand(6, 2).double() + 0.1
    op = fo.FisherMCLinearOperator(body, Rayleigh("sum"), data=(X, y), mc_samples=20_000)
    inputs = torch.cat([X, torch.ones(6, 1)], 1)
    assert abs(op.trace() - 8 * float(inputs.square().sum())) <= 0.03 * op.trace()  # B = 4 for each element
    with pytest.raises(
        NotImplementedError, match="exact Fisher of Rayleigh is not known.*or write the `exact` of a Lik"
    ):
        fo.FisherLinearOperator(body, Rayleigh("sum"), data=(X, y)).trace()
    empirical = fo.EmpiricalFisherLinearOperator(body, Rayleigh("mean"), data=(X, y), rows="datum")
    rows = []
    for n in range(6):
        value = -Rayleigh("sum").log_prob(body(X[n]), y[n])
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(body.parameters()))]))
    G = torch.stack(rows).numpy()
    assert_same(empirical.todense(), G.T @ G / 12, torch.float64)
    split = fo.FisherMCLinearOperator(body, Rayleigh("sum"), data=(X, y), mc_samples=3, batch_size=4)
    whole = fo.FisherMCLinearOperator(body, Rayleigh("sum"), data=(X, y), mc_samples=3)
    assert_same(split.todense(), whole.todense(), torch.float64)


def test_mistakes_in_a_likelihood_of_ones_own():
    class Unsummed(Rayleigh):
        def log_prob(self, f, y):
            return -(y - f).square()

    body = nn.Linear(2, 2)
    data = (torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(
        ValueError, match=r"`log_prob` of Unsummed must return .* shape \(1, 3\), got \(1, 3, 2\): sum over"
    ):
        fo.FisherMCLinearOperator(body, Unsummed(), data=data).trace()
    with pytest.raises(ValueError, match="the loss has reduction='none'"):
        Rayleigh("none")
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Likelihood,), {"sample": lambda *a: None})()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.loss is not None])
def test_scores_are_gradients_of_the_log_density(name):
    """Every likelihood's closed-form scores, at drawn and observed targets, are those of its own `log_prob`."""
    model, loss, X, y = make_problem(name)
    likelihood = of_loss(loss)
    output = model(X)
    f = likelihood.flatten(output).detach()
    drawn = likelihood.sample(f, 4, CounterSampler(0).batch(torch.arange(6)))
    for targets in (drawn, likelihood.observed(likelihood.terms(output, y))):
        expected = Likelihood.scores(likelihood, f, targets).columns()
        torch.testing.assert_close(likelihood.scores(f, targets).columns(), expected)


@pytest.mark.parametrize(
    ("loss", "sample", "terms", "message"),
    [
        (None, lambda f, M, d: f + d.normal(f, M)[0], None, r"returned 3 vectors for each term and there are 2 samples: `sample`"),
        (None, lambda f, M, d: f + d.normal(f, 1), None, r"returned 1 vectors for each term and there are 2 samples: `sample`"),
        (None, None, torch.ones(3), r"the weights of `terms` must have shape \(3, 1\) or \(3, 2\), .* got \(3,\)"),
    ],
)  # fmt: skip
def test_shapes_of_a_likelihood_of_ones_own(loss, sample, terms, message):
    class Own(Likelihood):
        def sample(self, f, samples, draws):
            return f + draws.normal(f, samples) if sample is None else sample(f, samples, draws)

        def log_prob(self, f, y):
            return -(y - f).square().sum(-1) / 2

        def terms(self, output, y):
            read = super().terms(output, y)
            return read if terms is None else read._replace(weights=terms.double())

    with pytest.raises(ValueError, match=message):
        fo.FisherMCLinearOperator(
            nn.Linear(2, 2), Own(), data=(torch.ones(3, 2), torch.ones(3, 2)), mc_samples=2
        ).trace()


def test_a_density_that_does_not_depend_on_the_outputs():
    class Detached(Rayleigh):
        def log_prob(self, f, y):
            return super().log_prob(f.detach(), y)

    with pytest.raises(ValueError, match="`log_prob` of Detached does not depend on the outputs f"):
        fo.FisherMCLinearOperator(nn.Linear(2, 2), Detached(), data=(torch.ones(3, 2), torch.ones(3, 2))).trace()


# ---- Extreme parameters ------------------------------------------------------------------------------------


def one(make, y, value, operator=fo.FisherLinearOperator, N=500, **options):
    """The Fisher of `make` in one number, from N equal data."""
    theta = torch.tensor(value, dtype=torch.float64)
    data = [(torch.zeros(N, 1), torch.full((N,), y, dtype=torch.float64))]
    return operator(lambda p, X: make(p["t"].expand(N)), None, {"t": theta}, data, **options)


@pytest.mark.parametrize("b", [0.03, 0.1, 0.5])
def test_beta_draws_next_to_one_keep_their_digits(b):
    make = lambda t: td.Beta(torch.tensor(2.0).double().expand(500), t)
    op = one(make, 0.5, b, fo.FisherMCLinearOperator, mc_samples=1000)
    exact = one(make, 0.5, b).trace()
    assert abs(op.trace() - exact) <= 5 * op.standard_error(np.ones(1))


@pytest.mark.parametrize("f", [12.0, 15.5, 17.5])
def test_draws_of_float32_logits_are_those_of_their_probabilities(f):
    draws = CounterSampler(0).batch(torch.arange(10**6))
    zeros = 10**6 - int(draws.bernoulli(torch.full((10**6, 1), f), 4).sum()) + 3 * 10**6
    expected = 4e6 / (1 + np.exp(f))
    assert stats.poisson(expected).sf(zeros - 1) > 1e-6
    assert stats.poisson(expected).cdf(zeros) > 1e-6


def test_geometric_with_small_probabilities():
    """The Fisher in the logit is 1 − p for each datum, also where torch clamps probabilities."""
    make = lambda t: td.Geometric(probs=t.float().sigmoid())
    for operator in (fo.FisherLinearOperator, fo.FisherMCLinearOperator):
        options = {} if operator is fo.FisherLinearOperator else {"mc_samples": 200}
        assert one(make, 3.0, -18.0, operator, **options).trace() == pytest.approx(500, rel=0.03)
    assert one(make, 3.0, -18.0, fo.EmpiricalFisherLinearOperator).trace() == pytest.approx(500, rel=1e-3)


@pytest.mark.parametrize("f", [-20.0, -0.3, -1e-3, 0.0, 0.05, 5.0, 29.0])
def test_the_variance_of_the_continuous_bernoulli_is_the_integral(f):
    y, w = np.polynomial.legendre.leggauss(400)
    y, w = (y + 1) / 2, w / 2
    q = w * np.exp(f * y - abs(f) * (f > 0))
    q /= q.sum()
    expected = 500 * (q @ y**2 - (q @ y) ** 2)
    assert one(lambda t: td.ContinuousBernoulli(logits=t), 0.5, f).trace() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("make", "y", "message"),
    [
        (lambda t: td.ContinuousBernoulli(logits=t + 40), 0.5, "accurate for logits up to 30, got 40.0: limit"),
        (lambda t: td.Gamma(0.01 + 0 * t, 1.0), 0.5, "draws of Gamma vanish in float64 unless its concentration is at least 0.02"),
        (lambda t: td.Poisson((t + 40).exp()), 3.0, r"counts can be drawn for Poisson rates above 0 and below 2\*\*53"),
    ],
)  # fmt: skip
def test_parameters_for_which_torch_or_draws_are_wrong(make, y, message):
    with pytest.raises(ValueError, match=message):
        one(make, y, 0.0, fo.FisherMCLinearOperator, N=5).trace()


def test_student_with_many_degrees_of_freedom():
    """The information on df is 3/(2 df⁴) far out; continuous where the expansion takes over."""
    make = lambda t: td.StudentT(t, torch.zeros(500).double(), torch.ones(500).double())
    for df in (1e3, 1e5, 1e8):
        # with location and scale known: 1.5/df⁴ and the square of the mixed entry over that of the scale, 2/df⁴
        assert one(make, 0.5, df).trace() == pytest.approx(500 * 3.5 / df**4, rel=20 / df + 1e-6)
    near = [one(make, 0.5, df).trace() * df**4 for df in (299.9, 300.1)]
    assert near[0] == pytest.approx(near[1], rel=1e-4)


@pytest.mark.parametrize(
    "loss", [nn.BCEWithLogitsLoss(), nn.PoissonNLLLoss(), nn.BCEWithLogitsLoss(pos_weight=torch.ones(2))]
)
def test_bool_targets(loss):
    model, X = nn.Linear(3, 2), torch.randn(4, 3)
    y = torch.rand(4, 2) > 0.5
    for operator in OPERATORS:
        expected = operator(model, loss, data=(X, y.float())).todense()
        assert_same(operator(model, loss, data=(X, y)).todense(), expected, torch.float32)
