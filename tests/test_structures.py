"""Distributions by structure: probabilities next to 0 and 1, subclasses, and distributions nested in each other."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributions as td
from families import FAMILIES, make_problem, positive
from tolerances import assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherops as fo

OPERATORS = [fo.FisherMCLinearOperator, fo.FisherLinearOperator, fo.EmpiricalFisherLinearOperator]
N = 12

# ---- Probabilities that torch clamps --------------------------------------------------------------------


def cloglog(t):
    return -torch.expm1(-t.exp())


def ordinal(t):
    """Three ordered classes with cuts at 0 and 1; the first two may be very unlikely."""
    below = [torch.sigmoid(cut - t) for cut in (0.0, 1.0)]
    return torch.stack([below[0], below[1] - below[0], torch.sigmoid(t - 1)], -1)


BINARY = {
    # name: (distribution of probabilities, B in p for one datum)
    "Bernoulli": (lambda p: td.Bernoulli(probs=p), lambda p: 1 / (p * (1 - p))),
    "Independent": (lambda p: td.Independent(td.Bernoulli(probs=p.unsqueeze(-1)), 1), lambda p: 1 / (p * (1 - p))),
    "Binomial": (lambda p: td.Binomial(7, probs=p), lambda p: 7 / (p * (1 - p))),
    "NegativeBinomial": (lambda p: td.NegativeBinomial(3.0, probs=p), lambda p: 3 / (p * (1 - p) ** 2)),
    "Geometric": (lambda p: td.Geometric(probs=p), lambda p: 1 / (p**2 * (1 - p))),
    "Categorical": (lambda p: td.Categorical(probs=torch.stack([p, 1 - p], -1)), lambda p: 1 / (p * (1 - p))),
    "OneHotCategorical": (
        lambda p: td.OneHotCategorical(probs=torch.stack([p, 1 - p], -1)), lambda p: 1 / (p * (1 - p))
    ),
    "Multinomial": (lambda p: td.Multinomial(5, probs=torch.stack([p, 1 - p], -1)), lambda p: 5 / (p * (1 - p))),
    "after expand": (lambda p: td.Bernoulli(probs=p).expand(p.shape), lambda p: 1 / (p * (1 - p))),
}  # fmt: skip
LINKS = {
    "cloglog": (cloglog, -20.0), "sigmoid": (torch.sigmoid, -20.0), "probit": (lambda t: torch.erfc(-t / 2**0.5) / 2, -6.0),
    "linear": (lambda t: (t + 21) * 1e-9, -20.0),
}  # fmt: skip


def of_theta(make, y, value, operator=fo.FisherLinearOperator, dtype=torch.float32, size=N, **options):
    """The trace of F for `size` equal data and one parameter."""
    theta = torch.tensor(value, dtype=dtype)
    data = [(torch.zeros(size, 1), y)]
    return operator(lambda p, X: make(p["t"].expand(size)), None, {"t": theta}, data, **options).trace()


def zeros_for(dist):
    y = torch.zeros(dist.batch_shape + dist.event_shape)
    if isinstance(dist, td.OneHotCategorical | td.Multinomial):
        y[..., -1] = getattr(dist, "total_count", 1)
    return y + 1 if type(dist) is td.Categorical else y


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", BINARY)
def test_probabilities_below_the_smallest_that_torch_computes_with(name, link):
    """p < 1.2e-7 in float32: the Fisher is N B (dp/dθ)², and the empirical one the squared gradient of log q."""
    make, information = BINARY[name]
    function, value = LINKS[link]
    theta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    p = function(theta)
    assert p < 1.2e-7
    slope = float(torch.autograd.grad(p, theta)[0])
    p = p.detach()
    expected = N * float(information(p)) * slope**2
    model = lambda t: make(function(t))
    y = zeros_for(model(torch.full((N,), value)))
    assert of_theta(model, y, value) == pytest.approx(expected, rel=1e-4)
    trials = float(information(p) * p) if name not in ("Geometric",) else 1 / float(p)
    # The observed label is the likely one: −d log q/dθ = trials · dp/dθ / (1 − p), and for Geometric 1/p.
    assert of_theta(model, y, value, fo.EmpiricalFisherLinearOperator) == pytest.approx(
        N * (trials * slope) ** 2, rel=1e-4
    )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (lambda t: td.Bernoulli(probs=cloglog(t)), 3.0, r"the probs of Bernoulli must be above 0 and below 1 - 1.2e-07 in torch.float32, got 1.0: make it with logits="),
        (lambda t: td.Bernoulli(probs=t.sigmoid()), -200.0, "the probs of Bernoulli must be above 0 .*, got 0.0"),
        (lambda t: td.Geometric(probs=t.sigmoid()), 30.0, "the probs of Geometric must be above 0 and below 1"),
        (lambda t: td.Binomial(5, probs=t.sigmoid()), 30.0, "the probs of Binomial must be above 0 and below 1"),
        (lambda t: td.NegativeBinomial(5.0, probs=t.sigmoid()), -200.0, "the probs of NegativeBinomial must be above 0"),
        (lambda t: td.ContinuousBernoulli(probs=t.sigmoid()), -18.0, "the probs of ContinuousBernoulli must be above 1.2e-07 and below"),
        (lambda t: td.ContinuousBernoulli(probs=t.sigmoid()), 18.0, "the probs of ContinuousBernoulli must be above 1.2e-07 and below"),
        (lambda t: td.Categorical(probs=torch.stack([t.sigmoid(), (-t).sigmoid()], -1)), 200.0, r"the probs of Categorical must be above 0 in torch.float32, got 0.0"),
        (lambda t: td.OneHotCategorical(probs=torch.stack([t.sigmoid(), (-t).sigmoid()], -1)), 200.0, "the probs of OneHotCategorical must be above 0"),
        (lambda t: td.Multinomial(2, probs=torch.stack([t.sigmoid(), (-t).sigmoid()], -1)), 200.0, "the probs of Multinomial must be above 0"),
        (lambda t: td.MixtureSameFamily(td.Categorical(probs=torch.stack([t.sigmoid(), (-t).sigmoid()], -1)), td.Normal(torch.zeros(len(t), 2), 1.0)),
         200.0, "the probs of Categorical must be above 0"),
        (lambda t: td.RelaxedBernoulli(torch.tensor(0.5), probs=t.sigmoid()), 30.0, "the probs of LogitRelaxedBernoulli must be above 0 and below"),
    ],
)  # fmt: skip
def test_probabilities_without_digits_are_refused(make, value, message, operator):
    dist = make(torch.full((N,), value))
    y = dist.sample()
    with pytest.raises(ValueError, match=message):
        of_theta(make, y, value, operator)


def test_probabilities_are_clamped_by_a_copy_of_a_mixture():
    """`expand` copies the clamped logits only; then the clamped probabilities are refused."""
    weights = lambda t: td.Categorical(probs=torch.stack([t.sigmoid(), (-t).sigmoid()], -1))
    mixture = lambda t: td.MixtureSameFamily(weights(t), td.Normal(torch.zeros(len(t), 2) + torch.arange(2), 1.0))
    for make in (mixture, lambda t: mixture(t).expand(t.shape)):
        right = of_theta(make, torch.zeros(N), -4.0, fo.EmpiricalFisherLinearOperator)
        p = float(torch.tensor(-4.0).sigmoid())
        ratio = np.exp(-0.0) - np.exp(-0.5)
        q = p * 1 + (1 - p) * np.exp(-0.5)
        assert right == pytest.approx(N * (p * (1 - p) * ratio / q) ** 2, rel=1e-4)
    small = of_theta(mixture, torch.zeros(N), -18.0, fo.EmpiricalFisherLinearOperator)
    p = float(torch.tensor(-18.0).double().sigmoid())
    assert small == pytest.approx(N * (p * (1 - np.exp(-0.5)) / np.exp(-0.5)) ** 2, rel=1e-4)
    with pytest.raises(ValueError, match="the probs of Categorical must be above 0"):
        of_theta(lambda t: mixture(t).expand(t.shape), torch.zeros(N), -18.0, fo.EmpiricalFisherLinearOperator)


def test_ordinal_probabilities():
    """B = Σ_y q'²/q: the first two classes have p ≈ 1e-9 in float32."""
    value = 20.0
    theta = torch.tensor(value, dtype=torch.float64)
    p, slope = ordinal(theta), torch.func.jacfwd(ordinal)(theta)
    make = lambda t: td.Categorical(probs=ordinal(t))
    actual = of_theta(make, torch.full((N,), 2), value)
    assert actual == pytest.approx(N * float((slope.square() / p).sum()), rel=1e-3)


# ---- Subclasses --------------------------------------------------------------------------------------


class Mixin:
    """Methods like those that pyro adds."""

    def to_event(self, n):
        return type("Independent", (Mixin, td.Independent), {})(self, n)

    def mask(self):
        raise AssertionError

    @property
    def _validate_args(self):
        return False

    @_validate_args.setter
    def _validate_args(self, value):
        pass


def derived(kind, first):
    """An unchanged subclass of a distribution class, with a mixin in front or at the end."""
    return type(kind.__name__, (Mixin, kind) if first else (kind, Mixin), {})


SUBCLASSED = [
    "Normal", "LogNormal", "Gamma", "Beta", "Dirichlet", "Poisson", "Bernoulli by probabilities", "Geometric", "Binomial",
    "Categorical", "OneHotCategorical", "Multinomial", "MultivariateNormal", "LowRankMultivariateNormal", "LogisticNormal",
    "Independent Normal", "Independent Categorical", "TransformedDistribution", "MixtureSameFamily", "Kumaraswamy",
    "RelaxedBernoulli", "NegativeBinomial of predicted count", "Pareto of known scale", "Weibull", "StudentT",
]  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", SUBCLASSED)
def test_unchanged_subclasses_are_their_class(name, first, monkeypatch):
    model, _, X, y = make_problem(name)
    expected, exact = {}, FAMILIES[name].exact
    operators = OPERATORS if exact else OPERATORS[::2]
    for operator in operators:
        expected[operator] = operator(model, None, data=(X, y)).todense()
    kinds = {n: k for n, k in vars(td).items() if isinstance(k, type) and issubclass(k, td.Distribution)}
    classes = {name: derived(kind, first) for name, kind in kinds.items()}
    monkeypatch.setattr("families.td", SimpleNamespace(**{**vars(td), **classes}))
    assert type(model(X)) in classes.values()
    for operator in operators:
        assert_same(operator(model, None, data=(X, y)).todense(), expected[operator], torch.float64)
    if not exact:
        with pytest.raises(NotImplementedError, match="the exact Fisher of .* is not known in closed form"):
            fo.FisherLinearOperator(model, None, data=(X, y)).trace()


class UnitNormal(td.Normal):
    """A subclass with another constructor."""

    def __init__(self, mean):
        super().__init__(mean, torch.ones_like(mean), validate_args=False)


class Twice(td.Normal):
    """A subclass with another density, which can be rebuilt."""

    def log_prob(self, value):
        return 2 * super().log_prob(value)


class HalfScale(td.Normal):
    """A subclass with another parameter than it names."""

    @property
    def scale(self):
        return self._scale / 2

    @scale.setter
    def scale(self, value):
        self._scale = value


def from_linear(make, y, operator, size=2, **options):
    torch.manual_seed(0)
    body, X = nn.Linear(2, size).double(), torch.randn(N, 2).double()
    return operator(lambda X: make(body(X)), None, list(body.parameters()), (X, y.double()), **options)


def test_a_subclass_with_another_constructor():
    y = torch.randn(N)
    for operator in OPERATORS:
        expected = from_linear(lambda z: td.Normal(z[:, 0], 1.0), y, operator).todense()
        assert_same(from_linear(lambda z: UnitNormal(z[:, 0]), y, operator).todense(), expected, torch.float64)


def test_a_subclass_with_another_density_is_not_its_class():
    y = torch.randn(N)
    make = lambda kind: lambda z: kind(z[:, 0], positive(z[:, 1]))
    plain = from_linear(make(td.Normal), y, fo.EmpiricalFisherLinearOperator).todense()
    twice = from_linear(make(Twice), y, fo.EmpiricalFisherLinearOperator).todense()
    assert_same(twice, 4 * plain, torch.float64)
    with pytest.raises(NotImplementedError, match="the exact Fisher of Twice is not known in closed form"):
        from_linear(make(Twice), y, fo.FisherLinearOperator).trace()
    with pytest.raises(NotImplementedError, match="HalfScale cannot be rebuilt .*: it depends on more than those"):
        from_linear(make(HalfScale), y, fo.EmpiricalFisherLinearOperator).trace()


# ---- Nested distributions ---------------------------------------------------------------------------------

AFFINE = td.AffineTransform(0.5, 2.0)


def normal(z):
    """(n, 2, 3) of z (n, 12)."""
    return td.Normal(z[:, :6].reshape(-1, 2, 3), positive(z[:, 6:12]).reshape(-1, 2, 3))


def weights(z):
    return td.Categorical(logits=z[:, 12:14])


def transformed(dist):
    return td.TransformedDistribution(dist, [AFFINE, td.ExpTransform()])


NESTED = {
    "transformed independent": lambda z: transformed(td.Independent(normal(z), 2)),
    "independent transformed": lambda z: td.Independent(transformed(normal(z)), 2),
    "independent of independent": lambda z: td.Independent(td.Independent(normal(z), 1), 1),
    "transformed transformed": lambda z: td.Independent(
        td.TransformedDistribution(transformed(normal(z)), [td.PowerTransform(torch.tensor(0.5)), AFFINE]), 2
    ),
    "independent of multivariate": lambda z: td.Independent(td.MultivariateNormal(normal(z).loc, torch.eye(3).double()), 1),
    "mixture of independent": lambda z: td.MixtureSameFamily(weights(z), td.Independent(normal(z), 1)),
    "mixture of transformed": lambda z: td.MixtureSameFamily(weights(z), td.Independent(transformed(normal(z)), 1)),
    "mixture of transformed independent": lambda z: td.MixtureSameFamily(weights(z), transformed(td.Independent(normal(z), 1))),
    "mixture of log-normals": lambda z: td.MixtureSameFamily(
        weights(z), td.LogNormal(normal(z).loc[..., 0], normal(z).scale[..., 0])
    ),
    "mixture of betas": lambda z: td.MixtureSameFamily(
        weights(z), td.Beta(1 + normal(z).scale[..., 0], 1 + normal(z).scale[..., 1])
    ),
    "mixture of multivariate": lambda z: td.MixtureSameFamily(
        weights(z), td.MultivariateNormal(normal(z).loc, scale_tril=torch.diag_embed(normal(z).scale))
    ),
    "mixture of mixtures": lambda z: td.MixtureSameFamily(
        weights(z), td.MixtureSameFamily(td.Categorical(logits=z[:, :6].reshape(-1, 2, 3)), normal(z))
    ),
    "mixture of relaxed": lambda z: td.MixtureSameFamily(weights(z), td.RelaxedBernoulli(torch.tensor(0.5), logits=z[:, :2])),
    "mixture of unequal transforms": lambda z: td.MixtureSameFamily(
        weights(z),
        td.TransformedDistribution(
            td.Normal(z[:, :2], positive(z[:, 2:4])),
            [td.AffineTransform(torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 3.0]).double())],
        ),
    ),
    "transformed mixture": lambda z: transformed(
        td.MixtureSameFamily(weights(z), td.Normal(z[:, :2], positive(z[:, 2:4])))
    ),
    "independent mixtures": lambda z: td.Independent(
        td.MixtureSameFamily(td.Categorical(logits=z[:, :12].reshape(-1, 2, 2, 3)),
                             td.Normal(z[:, :12].reshape(-1, 2, 2, 3), 1.0)), 2
    ),
    "mixture of global components": lambda z: td.MixtureSameFamily(
        weights(z), td.Normal(torch.tensor([0.0, 1.0]).double().expand(len(z), 2), 1.0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_nested_distributions(name):
    """The empirical Fisher by gradients of the density; Monte Carlo by torch's own draws, within 5 standard errors."""
    torch.manual_seed(0)
    body, X = nn.Linear(2, 14).double(), torch.randn(4, 2).double()
    params, make = list(body.parameters()), NESTED[name]
    model = lambda X: make(body(X))
    with torch.no_grad():
        y = model(X).sample()
        drawn = model(X).sample((2000,))
    empirical = fo.EmpiricalFisherLinearOperator(model, None, params, (X, y))
    rows = []
    for n in range(4):
        value = -model(X).log_prob(y)[n]
        parts = torch.autograd.grad(value, params)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    G = torch.stack(rows).numpy()
    assert_same(empirical.todense(), G.T @ G, torch.float64)
    v = np.random.default_rng(0).standard_normal(len(G.T))
    z = body(X).detach().requires_grad_()
    many = z.expand(2000, 4, 14).reshape(-1, 14)
    s = torch.autograd.grad(make(many).log_prob(drawn.flatten(0, 1)).sum(), many)[0].view(2000, 4, 14)
    V = torch.tensor(v)
    Jv = X @ V[:28].view(14, 2).T + V[28:]
    forms = (s * Jv).sum(2).square()
    plain, error = float(forms.mean(0).sum()), float((forms.var(0) / 2000).sum().sqrt())
    for sampler in ("counter", "stream"):
        op = fo.FisherMCLinearOperator(model, None, params, (X, y), mc_samples=2000, sampler=sampler)
        assert abs(v @ (op @ v) - plain) <= 5 * np.hypot(error, op.standard_error(v))
    split = fo.FisherMCLinearOperator(model, None, params, (X, y), mc_samples=3, batch_size=3)
    whole = fo.FisherMCLinearOperator(model, None, params, (X, y), mc_samples=3)
    assert_same(split.todense(), whole.todense(), torch.float64)
    exact = fo.FisherLinearOperator(model, None, params, (X, y))
    if "mixture" in name:
        with pytest.raises(
            NotImplementedError, match="exact Fisher of .*MixtureSameFamily.* is not known in closed form"
        ):
            exact.trace()
    else:
        assert abs(v @ (exact @ v) - plain) <= 5 * error


@pytest.mark.parametrize("outer", [lambda d: d, lambda d: td.Independent(d, 1), lambda d: td.MixtureSameFamily(
    td.Categorical(logits=torch.zeros(N, 2)), d)])  # fmt: skip
def test_transforms_that_depend_on_the_parameters_are_refused_at_any_depth(outer):
    make = lambda z: outer(td.TransformedDistribution(td.Normal(0 * z, 1.0), [td.AffineTransform(z, 1.0)]))
    shape = make(torch.zeros(N, 2)).sample().shape
    for operator in OPERATORS:
        with pytest.raises(
            NotImplementedError, match="whose AffineTransform depends on the parameters is not supported"
        ):
            from_linear(make, torch.ones(shape), operator).trace()


# ---- Distributions of unknown classes -------------------------------------------------------------------------


class Logistic(td.Distribution):
    """A distribution as users write it."""

    arg_constraints = {"loc": td.constraints.real}  # noqa: RUF012
    support = td.constraints.real

    def __init__(self, loc):  # without `validate_args`
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def sample(self, sample_shape=()):
        u = torch.rand(*sample_shape, *self.batch_shape, dtype=self.loc.dtype)
        return self.loc + u.logit()

    def log_prob(self, y):
        z = y - self.loc
        return -z - 2 * nn.functional.softplus(-z)


class Unnamed(Logistic):
    arg_constraints = {}  # noqa: RUF012


class WithoutSupport(Logistic):
    @property
    def support(self):
        raise NotImplementedError


class OfWrongShape(Logistic):
    def sample(self, sample_shape=()):
        return super().sample(sample_shape).unsqueeze(-1)


class MixesTerms(Logistic):
    def log_prob(self, y):
        return super().log_prob(y.unsqueeze(-1)).sum(-1)


class NotFinite(Logistic):
    def log_prob(self, y):
        return super().log_prob(y) + torch.where(y > 1e9, 0.0, torch.inf)


@pytest.mark.parametrize("kind", [Logistic, WithoutSupport])
def test_a_distribution_without_validate_args(kind):
    """The information on a logistic location is 1/3."""
    for joint in (False, True):
        make = lambda z, joint=joint: td.Independent(kind(z), 1) if joint else kind(z)
        y = torch.randn(N, 2)
        op = from_linear(make, y, fo.FisherMCLinearOperator, mc_samples=2000)
        expected = from_linear(lambda z: td.Normal(z, 3**0.5), y, fo.FisherLinearOperator)
        v = np.ones(6)
        assert abs(v @ (op @ v) - v @ (expected @ v)) <= 5 * op.standard_error(v)


@pytest.mark.parametrize(
    ("make", "operator", "error", "message"),
    [
        (Unnamed, fo.FisherMCLinearOperator, NotImplementedError,
         r"Unnamed cannot be rebuilt from the parameters that it names \(`arg_constraints`\): it names none, list them there. Write a"),
        (OfWrongShape, fo.FisherMCLinearOperator, ValueError,
         r"`sample` of OfWrongShape must return shape sample_shape \+ batch_shape \+ event_shape, \(1, 12\), got \(1, 12, 1\)"),
        (MixesTerms, fo.EmpiricalFisherLinearOperator, ValueError, "`log_prob` of MixesTerms mixes loss terms"),
        (NotFinite, fo.EmpiricalFisherLinearOperator, ValueError, "the log_prob of NotFinite, or its gradient, is NaN or infin"),
    ],
)  # fmt: skip
def test_what_is_refused_of_unknown_classes(make, operator, error, message):
    with pytest.raises(error, match=message):
        from_linear(lambda z: make(z[:, 0]), torch.randn(N), operator).trace()


# ---- Memory ------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor):
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("method", ["todense", "trace", "diagonal"])
def test_multivariate_normal_of_two_parameters_is_not_written_out(method):
    """An AR(1) time series of d values, with the information of Slepian and Bangs."""
    d = 40
    t = torch.arange(d, dtype=torch.float64)
    theta = {"phi": torch.tensor(0.6, dtype=torch.float64), "log": torch.tensor(0.1, dtype=torch.float64)}
    covariance = lambda p: p["log"].exp() * p["phi"] ** (t[:, None] - t).abs() / (1 - p["phi"] ** 2)
    model = lambda p, X: td.MultivariateNormal(
        torch.zeros(len(X), d, dtype=torch.float64), covariance_matrix=covariance(p).expand(len(X), d, d)
    )
    data = (torch.zeros(1, 1), torch.zeros(1, d, dtype=torch.float64))
    op = fo.FisherLinearOperator(model, None, theta, data, max_memory="8MiB")
    op @ np.ones(2)
    with Largest() as largest:
        actual = getattr(op, method)()
    values = torch.stack(list(theta.values()))
    dC = torch.func.jacfwd(lambda v: covariance({"phi": v[0], "log": v[1]}))(values).movedim(-1, 0)
    A = torch.linalg.solve(covariance(theta), dC)
    F = 0.5 * torch.einsum("aij,bji->ab", A, A).numpy()
    expected = {"todense": F, "trace": np.trace(F), "diagonal": np.diag(F)}[method]
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-8 * np.abs(F).max())
    assert largest.nbytes <= 2**23
