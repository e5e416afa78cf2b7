"""Cramér-Rao bounds against textbook formulas, and what they say where the data do not determine the parameters."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, Poisson
from torch.utils.data import DataLoader, TensorDataset

import fisherops as fo
from fisherops.linalg import crlb

SIGMA = 0.1


class Curve(nn.Module):
    """A curve with named parameters, observed with Gaussian noise."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.as_tensor(value, dtype=torch.float64)))

    def forward(self, t):
        return Normal(self.function(t, **dict(self.named_parameters())), SIGMA)


def information(model, t, **options):
    data = (torch.from_numpy(t)[:, None], torch.zeros(len(t), 1, dtype=torch.float64))
    return fo.FisherLinearOperator(model, None, data=data, **options)


@pytest.mark.parametrize("method", ["auto", "dual", "dense"])
def test_a_nonlinear_regression_with_two_parameters(method):
    """Decay a exp(−b t) in Gaussian noise: F = Σ ∇f ∇fᵀ / σ² (S. Kay, Estimation Theory, section 3.9)."""
    t, a, b = np.linspace(0, 3, 40), 2.0, 0.7
    model = Curve(lambda t, a, b: a * torch.exp(-b * t), a=a, b=b)
    gradients = np.stack([np.exp(-b * t), -a * t * np.exp(-b * t)], 1)
    expected = np.linalg.inv(gradients.T @ gradients / SIGMA**2)
    bounds = crlb(information(model, t), method=method)
    np.testing.assert_allclose(bounds.covariance, expected, rtol=1e-8)
    np.testing.assert_allclose(bounds.standard_deviation, np.sqrt(np.diag(expected)), rtol=1e-8)
    assert bounds.names == ("a", "b")
    assert bounds.nullity == 0
    assert bounds.unidentifiable == ()
    # The half-life log(2) / b, a function that is not linear, by its gradient.
    half_life = crlb(information(model, t), of={"half-life": {"b": -np.log(2) / b**2}})
    np.testing.assert_allclose(half_life.covariance, [[expected[1, 1] * np.log(2) ** 2 / b**4]], rtol=1e-8)
    assert half_life.names == ("half-life",)
    assert crlb(information(model, t), of="b").covariance == pytest.approx(expected[1:, 1:])
    np.testing.assert_allclose(
        crlb(information(model, t), of=np.array([1.0, 2.0])).covariance, [[np.array([1, 2]) @ expected @ [1, 2]]]
    )


@pytest.mark.parametrize("method", ["dual", "dense"])
def test_a_sum_of_exponentials(method):
    t = np.linspace(0, 5, 60)
    a, b = np.array([1.0, 0.5]), np.array([0.4, 2.0])
    model = Curve(lambda t, a, b: (a * torch.exp(-b * t)).sum(1, keepdim=True), a=a, b=b)
    decay = np.exp(-b * t[:, None])
    gradients = np.concatenate([decay, -a * t[:, None] * decay], 1)
    expected = np.linalg.inv(gradients.T @ gradients / SIGMA**2)
    bounds = crlb(information(model, t, batch_size=7), method=method)
    np.testing.assert_allclose(bounds.covariance, expected, rtol=1e-8)
    assert bounds.names == ("a[0]", "a[1]", "b[0]", "b[1]")
    assert bounds.method == method


def test_an_efficient_estimate_attains_the_bound():
    """Least squares for a line: its covariance is the bound."""
    t = np.linspace(-1, 2, 30)
    model = Curve(lambda t, intercept, slope: intercept + slope * t, intercept=0.3, slope=-1.0)
    design = np.stack([np.ones(30), t], 1)
    noise = SIGMA * np.random.default_rng(0).standard_normal((20_000, 30))
    estimates = noise @ np.linalg.pinv(design).T
    np.testing.assert_allclose(np.cov(estimates.T), crlb(information(model, t)).covariance, rtol=0.05, atol=2e-5)


@pytest.mark.parametrize("method", ["dual", "dense"])
def test_directions_without_information(method):
    """Of a and b only the product matters, and c not at all."""
    t, a, b = np.linspace(0, 3, 5), 2.0, 0.5
    model = Curve(lambda t, a, b, c: a * b * t + 0 * c, a=a, b=b, c=1.0)
    op = information(model, t)
    bounds = crlb(op, of={"product": {"a": b, "b": a}, "a": {"a": 1.0}, "c": {"c": 1.0}}, method=method)
    assert bounds.covariance[0, 0] == pytest.approx(SIGMA**2 / (t**2).sum())
    assert np.isinf(bounds.covariance[1:]).all()
    assert np.isinf(bounds.standard_deviation[1:]).all()
    assert bounds.nullity == 2
    assert sorted(bounds.unidentifiable) == ["0.97 a -0.243 b", "1 c"]


def test_what_has_no_bound():
    t = np.linspace(0, 3, 5)
    model = Curve(lambda t, a: a * t, a=1.0)
    data = (torch.from_numpy(t)[:, None], torch.zeros(5, 1, dtype=torch.float64))
    mean = fo.FisherLinearOperator(nn.Linear(1, 1).double(), nn.MSELoss(), data=data)
    with pytest.raises(ValueError, match="this operator is of a mean: use a loss with reduction='sum'"):
        crlb(mean)
    op = information(model, t)
    with pytest.raises(TypeError, match="`op` must be a Fisher operator or a sum of operators with one, got _Product"):
        crlb(op @ op)
    with pytest.raises(ValueError, match="`of` names 'z', which is no parameter"):
        crlb(op, of="z")
    with pytest.raises(ValueError, match="a singular F is told from a regular one by its eigenvalues"):
        crlb(op, method="primal")
    with pytest.raises(ValueError, match="dimension mismatch in crlb"):
        crlb(op, of=np.ones(3))


def test_parameters_of_other_scales():
    """Information of 1 and 1e-12 is not a singular matrix, but units."""
    t = np.random.default_rng(0).standard_normal(50)
    model = Curve(lambda t, a, b: a + 1e-6 * b * t, a=1.0, b=1.0)
    design = np.stack([np.ones(50), 1e-6 * t], 1)
    expected = np.linalg.inv(design.T @ design / SIGMA**2)
    for dtype, rtol in (("float64", 1e-8), ("float32", 1e-4)):
        bounds = crlb(information(model, t, dtype=dtype))
        assert bounds.nullity == 0
        np.testing.assert_allclose(np.diag(bounds.covariance), np.diag(expected), rtol=rtol)


def test_some_parameters_of_a_large_model():
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 2))
    data = (torch.randn(3, 300), torch.zeros(3, 2))
    op = fo.FisherLinearOperator(model, nn.MSELoss(reduction="sum"), data=data, max_memory="100MB")
    bounds = crlb(op, of="1.bias")
    assert bounds.covariance.shape == (2, 2)
    assert bounds.method == "dual"
    with pytest.raises(ValueError, match="90602 functions of 90602 parameters take 131339558464 bytes: pass fewer"):
        crlb(op)


@pytest.mark.parametrize(
    ("of", "error", "message"),
    [
        ({}, ValueError, "`of` names no function"),
        ({"f": {"a": torch.ones(3)}}, ValueError, r"the coefficients of 'a' have shape \(3,\), the parameter \(\)"),
        ({"f": 3}, TypeError, "`of` maps the name of a function to a mapping of coefficients by parameter, got 3"),
        (np.array([np.nan]), ValueError, "`of` contains NaN or infinity"),
        (np.array([1j]), TypeError, "real functions are taken"),
    ],
)
def test_functions_that_are_none(of, error, message):
    op = information(Curve(lambda t, a: a * t, a=1.0), np.linspace(0, 1, 5))
    with pytest.raises(error, match=message):
        crlb(op, of=of)
    assert np.isfinite(crlb(op, of={"f": {"a": torch.tensor(2.0, requires_grad=True)}}).covariance).all()


# ---- Digits ------------------------------------------------------------------------------------------


def linear(design, dtype=torch.float64, **options):
    """Return the operator of a linear model in noise of variance 1, whose score matrix is the design."""
    X = torch.as_tensor(design).to(dtype)
    data = (X, torch.zeros(len(X), dtype=dtype))
    parameters = {"b": torch.zeros(X.shape[1], dtype=dtype)}
    return fo.FisherLinearOperator(lambda p, X: Normal(X @ p["b"], 1.0), None, parameters, data=data, **options)


def exact_deviations(design):
    """Return the square roots of the diagonal of (AᵀA)⁻¹ by Gauss and Jordan's elimination of fractions."""
    A = [[Fraction(float(x)) for x in row] for row in design]
    D = len(A[0])
    rows = [
        [sum(row[i] * row[j] for row in A) for j in range(D)] + [Fraction(i == j) for j in range(D)] for i in range(D)
    ]
    for i in range(D):
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(D):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    # Integers of any size divide to a float, and its square root has all digits.
    return np.array([float(rows[i][D + i]) ** 0.5 for i in range(D)])


def polynomials(degree):
    return np.vander(np.linspace(0, 1, 24), degree + 1, increasing=True)


def nearly_equal(distance):
    design = np.random.default_rng(3).standard_normal((12, 5))
    design[:, 4] = design[:, 0] + distance * design[:, 4]
    return design


DESIGNS = {
    "parabola": polynomials(2),
    "degree 6": polynomials(6),
    "degree 12": polynomials(12),
    "degree 15": polynomials(15),
    "1e-5 apart": nearly_equal(1e-5),
    "1e-9 apart": nearly_equal(1e-9),
    "units": np.random.default_rng(4).standard_normal((12, 5)) * 10.0 ** np.array([-14, 0, 9, -5, 14]),
    "units and equal": nearly_equal(1e-6) * 10.0 ** np.array([-14, 0, 9, -5, 14]),
}


@pytest.mark.parametrize("name", DESIGNS)
def test_as_many_digits_are_right_as_the_bounds_say(name):
    """Condition numbers are up to 1e13, and squared up to 1e26."""
    expected = exact_deviations(DESIGNS[name])
    bounds = crlb(linear(DESIGNS[name]))
    assert (bounds.nullity, bounds.lost) == (0, 0)
    error = np.abs(bounds.standard_deviation / expected - 1)
    assert (error <= 10.0**-bounds.digits).all()
    assert (bounds.digits > 3).all()
    # and they are not kept back: a matrix of this condition number has about as many
    singular = np.linalg.svd(DESIGNS[name] / np.linalg.norm(DESIGNS[name], axis=0), compute_uv=False)
    assert (bounds.digits > 13.5 - np.log10(singular[0] / singular[-1])).all()


@pytest.mark.parametrize("rates", [(1.0, 3.0), (1.0, 1.5), (1.0, 1.2), (1.0, 1.05), (1.0, 1.01)])
def test_digits_in_float32(rates):
    """Decays of nearly the same rate: scores are rounded, so that bounds have fewer digits, or none."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor(rates)

    def op(dtype):
        parameters = {"a": a.to(dtype), "b": b.to(dtype)}
        t = torch.linspace(0, 3, 30)[:, None].to(dtype)
        return fo.FisherLinearOperator(
            lambda p, t: Normal((p["a"] * torch.exp(-p["b"] * t)).sum(1), 0.1), None, parameters, data=(t, t[:, 0])
        )

    exact = crlb(op(torch.float64))
    assert exact.lost == 0
    if rates[1] < 1.1:
        with pytest.warns(UserWarning, match=r"lost to rounding, .*Pass dtype='float64' to the operator"):
            bounds = crlb(op(torch.float32))
        assert bounds.lost > 0
        assert np.isnan(bounds.standard_deviation).all()
        assert np.isnan(bounds.covariance).all()
        assert (bounds.digits == 0).all()
        # Lost is not unidentifiable.
        assert (bounds.nullity, bounds.unidentifiable) == (0, ())
    else:
        bounds = crlb(op(torch.float32))
        error = np.abs(bounds.standard_deviation / exact.standard_deviation - 1)
        assert (error <= 10.0**-bounds.digits).all()
        assert (bounds.digits > 0.9).all()


def test_the_longley_problem():
    """The certified values of https://www.itl.nist.gov/div898/strd/lls/data/Longley.shtml."""
    X = np.array(
        [
            [83.0, 234289, 2356, 1590, 107608, 1947], [88.5, 259426, 2325, 1456, 108632, 1948],
            [88.2, 258054, 3682, 1616, 109773, 1949], [89.5, 284599, 3351, 1650, 110929, 1950],
            [96.2, 328975, 2099, 3099, 112075, 1951], [98.1, 346999, 1932, 3594, 113270, 1952],
            [99.0, 365385, 1870, 3547, 115094, 1953], [100.0, 363112, 3578, 3350, 116219, 1954],
            [101.2, 397469, 2904, 3048, 117388, 1955], [104.6, 419180, 2822, 2857, 118734, 1956],
            [108.4, 442769, 2936, 2798, 120445, 1957], [110.8, 444546, 4681, 2637, 121950, 1958],
            [112.6, 482704, 3813, 2552, 123366, 1959], [114.2, 502601, 3931, 2514, 125368, 1960],
            [115.7, 518173, 4806, 2572, 127852, 1961], [116.9, 554894, 4007, 2827, 130081, 1962],
        ]
    )  # fmt: skip
    certified = [
        84.9149257747669, 0.0334910077722432, 0.488399681651699, 0.214274163161675, 0.226073200069370, 455.478499142212,
        890420.383607373,
    ]  # fmt: skip
    for dtype in (torch.float64, torch.float32):
        line = nn.Linear(6, 1).to(dtype)
        data = (torch.tensor(X, dtype=dtype), torch.zeros(16, dtype=dtype))
        op = fo.FisherLinearOperator(
            lambda X, line=line: Normal(line(X)[:, 0], 304.854073561965), None, list(line.parameters()), data
        )
        bounds = crlb(op)
        np.testing.assert_array_less(np.abs(bounds.standard_deviation / certified - 1), 10.0**-bounds.digits)
        assert (bounds.digits > (10 if dtype == torch.float64 else 1)).all()


def test_more_information_than_digits():
    """In float64 polynomials of degree 22 decay into rounding without a gap: none of their bounds is known."""
    with pytest.warns(UserWarning, match="lost to rounding, so no bound is known. Use parameters that are less corr"):
        bounds = crlb(linear(polynomials(22)))
    assert bounds.lost >= 2
    assert np.isnan(bounds.covariance).all()
    assert (bounds.nullity, bounds.unidentifiable) == (0, ())
    # Beside directions that are lost, one without information is still told.
    design = np.concatenate([polynomials(22), np.zeros((24, 1))], 1)
    with pytest.warns(UserWarning, match="lost to rounding"):
        bounds = crlb(linear(design))
    assert (bounds.nullity, bounds.unidentifiable) == (1, ("1 b[23]",))
    assert np.isnan(bounds.standard_deviation).all()


@pytest.mark.parametrize("power", [12, 3])
def test_no_information_and_other_units(power):
    """Of two parameters only a combination matters, whatever the units."""
    rng = np.random.default_rng(0)
    design = rng.integers(-8, 9, (20, 3)) * 10.0 ** np.array([-power, 0, power])
    design = np.concatenate([design, 2.0**power * design[:, :1]], 1)
    of = {"sum": {"b": [1, 0, 0, 2.0**power]}, "b[2]": {"b": [0, 0, 1, 0]}, "b[0]": {"b": [1, 0, 0, 0]}}
    of = {name: {"b": np.array(coefficients["b"])} for name, coefficients in of.items()}
    bounds = crlb(linear(design), of=of)
    assert (bounds.nullity, bounds.lost) == (1, 0)
    expected = np.sqrt(np.diag(np.linalg.inv(design[:, :3].T @ design[:, :3])))
    np.testing.assert_allclose(bounds.standard_deviation[:2], expected[[0, 2]], rtol=1e-12)
    assert bounds.standard_deviation[2] == np.inf
    assert bounds.digits[2] == np.inf
    assert (bounds.digits[:2] > 12).all()
    # In float32 a small difference may have been rounded off, so that no bound is known.
    with pytest.warns(UserWarning, match="about 1 of 4 directions is lost to rounding"):
        bounds = crlb(linear(design, torch.float32), of=of)
    assert (bounds.nullity, bounds.lost) == (0, 1)
    assert np.isnan(bounds.standard_deviation).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_information_at_all(dtype):
    """Parameters without effect, and more parameters than rows, are unidentifiable in every precision."""
    design = np.random.default_rng(0).standard_normal((5, 4))
    design[:, 1] = 0
    bounds = crlb(linear(design, dtype))
    assert (bounds.nullity, bounds.lost, bounds.unidentifiable) == (1, 0, ("1 b[1]",))
    expected = np.sqrt(np.diag(np.linalg.inv(np.delete(design, 1, 1).T @ np.delete(design, 1, 1))))
    np.testing.assert_allclose(bounds.standard_deviation[[0, 2, 3]], expected, rtol=1e-5)
    bounds = crlb(linear(design[:2], dtype), of={"known": {"b": design[0]}, "unknown": {"b": np.ones(4)}})
    assert (bounds.nullity, bounds.lost) == (2, 0)
    np.testing.assert_allclose(bounds.standard_deviation, [1, np.inf], rtol=1e-5)


# ---- Sums of information -----------------------------------------------------------------------------


def experiments():
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((9, 4)), rng.standard_normal((3, 4))
    return first, second, linear(first), linear(second)


PRIOR = np.diag([4.0, 0.0, 0.01, 1e6])
CORRELATED = np.array([[2.0, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1e4, -50], [0, 0, -50, 3]])
SUMS = {
    "damped": (lambda op, other: op.damped(0.3), lambda F, H: F + 0.3 * np.eye(4)),
    "joint": (lambda op, other: op + other, lambda F, H: F + H),
    "several times": (lambda op, other: 3 * op + other / 2, lambda F, H: 3 * F + H / 2),
    "nested": (lambda op, other: 2 * (op + 3 * other.damped(0.1)), lambda F, H: 2 * F + 6 * H + 0.6 * np.eye(4)),
    "prior": (lambda op, other: op + sla.aslinearoperator(PRIOR), lambda F, H: F + PRIOR),
    "correlated prior": (lambda op, other: op + sla.aslinearoperator(CORRELATED), lambda F, H: F + CORRELATED),
    "few data": (lambda op, other: other.damped(1e-8), lambda F, H: H + 1e-8 * np.eye(4)),
    "few data and a prior": (
        lambda op, other: other + sla.aslinearoperator(1e-6 * PRIOR), lambda F, H: H + 1e-6 * PRIOR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["auto", "dual", "dense"])
@pytest.mark.parametrize("name", SUMS)
def test_the_bound_of_a_sum_of_information(name, method):
    first, second, op, other = experiments()
    make, matrix = SUMS[name]
    F = matrix(first.T @ first, second.T @ second)
    bounds = crlb(make(op, other), method=method)
    assert (bounds.nullity, bounds.lost) == (0, 0)
    np.testing.assert_allclose(bounds.covariance, np.linalg.inv(F), rtol=1e-6, atol=1e-12)
    assert bounds.names == ("b[0]", "b[1]", "b[2]", "b[3]")
    assert (bounds.digits > 9).all()


def test_a_prior_of_rank_one_leaves_directions_without_information():
    _, second, *_ = experiments()
    second[:, 3] = 0
    v = np.array([1.0, 2, -1, 0])
    bounds = crlb(linear(second) + sla.aslinearoperator(np.outer(v, v)))
    assert bounds.nullity == 1
    assert bounds.unidentifiable == ("1 b[3]",)
    F = second.T @ second + np.outer(v, v)
    np.testing.assert_allclose(bounds.covariance[:3, :3], np.linalg.inv(F[:3, :3]), rtol=1e-8)
    assert np.isinf(bounds.standard_deviation[3])


def test_a_strong_prior_keeps_the_digits_of_the_data():
    """Of two parameters the prior knows the sum 1e8 times better than the data know the difference."""
    rng = np.random.default_rng(2)
    design = rng.standard_normal((10, 2))
    strong = 1e8 * np.array([[1.0, 1.0]])
    for op in (linear(design) + linear(strong), linear(strong) + linear(design), linear(np.r_[strong, design])):
        bounds = crlb(op)
        error = np.abs(bounds.standard_deviation / exact_deviations(np.r_[design, strong]) - 1)
        assert (error <= 10.0**-bounds.digits).all()
        assert (bounds.digits > 5).all()


def test_what_is_no_sum_of_information():
    *_, op, other = experiments()
    with pytest.raises(ValueError, match="must be a sum of information with positive factors, got a negative factor"):
        crlb(op - other)
    with pytest.raises(
        ValueError, match=r"a sum of positive semi-definite operators, got one with the eigenvalue -1\."
    ):
        crlb(op + sla.aslinearoperator(np.diag([1.0, -1, 1, 1])))
    for wrong in (
        sla.aslinearoperator(np.eye(4)) + op,
        op**2,
        1j * op,
        fo.linalg.inv(op, 1.0),
        sla.aslinearoperator(np.eye(4)),
        np.eye(4),
    ):
        with pytest.raises(TypeError, match="must be a Fisher operator or a sum of operators with one"):
            crlb(wrong)
    with pytest.raises(ValueError, match="`method` must be 'auto', 'dual' or 'dense', got 'lu'"):
        crlb(op, method="lu")
    small = linear(np.ones((40, 30)), max_memory="20KB")
    with pytest.raises(ValueError, match=r"the square root of F takes a matrix of shape \(30, 30\), 28800 bytes"):
        crlb(small)


def test_a_monte_carlo_fisher_has_no_bound():
    X, y = torch.randn(50, 2), torch.zeros(50, 1)
    op = fo.FisherMCLinearOperator(nn.Linear(2, 1), nn.MSELoss(reduction="sum"), data=(X, y), mc_samples=5)
    for monte_carlo in (op, 2 * op.damped(1.0)):
        with pytest.warns(UserWarning, match="inverse of a Monte-Carlo Fisher is not a Cramér-Rao bound") as caught:
            crlb(monte_carlo)
        assert caught[0].filename == __file__


@pytest.mark.parametrize("cache", ["auto", "factors", "linearization", "none"])
def test_every_form_and_batches_in_any_order(cache):
    """More rows than parameters and fewer, in batches of several sizes, in another order in each pass."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    X = torch.randn(30, 3, dtype=torch.float64)
    rows = []
    for x in X:
        for f in net(x):
            rows.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(f, list(net.parameters()), retain_graph=True)])
            )
    G = 2**0.5 * torch.stack(rows).numpy()
    loader = DataLoader(TensorDataset(X, torch.zeros(30, 2)), batch_size=7, shuffle=True)
    op = fo.FisherLinearOperator(net, nn.MSELoss(reduction="sum"), data=loader, cache=cache, check_deterministic=False)
    bounds = crlb(op)
    assert bounds.method == "dense"
    np.testing.assert_allclose(bounds.covariance, np.linalg.inv(G.T @ G), rtol=1e-8)


# ---- Published answers -------------------------------------------------------------------------------


def test_misra1a():
    """Certified standard deviations of https://www.itl.nist.gov/div898/strd/nls/data/misra1a.shtml."""
    x = np.array(
        [77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0]
    )  # fmt: skip
    y = np.array([10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78])
    b1, b2 = 2.3894212918e02, 5.5015643181e-04
    params = {"b1": torch.tensor(b1, dtype=torch.float64), "b2": torch.tensor(b2, dtype=torch.float64)}
    residuals = y - b1 * -np.expm1(-b2 * x)
    assert np.square(residuals).sum() == pytest.approx(1.2455138894e-01, rel=1e-8)
    noise = np.sqrt(np.square(residuals).sum() / 12)
    op = fo.FisherLinearOperator(lambda p, x: Normal(-p["b1"] * torch.expm1(-p["b2"] * x), noise), None, params, (x, y))
    bounds = crlb(op)
    np.testing.assert_allclose(bounds.standard_deviation, [2.7070075241e00, 7.2668688436e-06], rtol=1e-8)
    assert bounds.digits.min() > 10
    # The standard deviation of the noise as a parameter: n observations have the information 2n/σ², and none about b.
    params["noise"] = torch.tensor(noise)
    op = fo.FisherLinearOperator(
        lambda p, x: Normal(-p["b1"] * torch.expm1(-p["b2"] * x), p["noise"]), None, params, (x, y)
    )
    expected = [2.7070075241e00, 7.2668688436e-06, noise / 28**0.5]
    np.testing.assert_allclose(crlb(op).standard_deviation, expected, rtol=1e-8)


def test_the_warfarin_design():
    """Relative standard errors, in percent, that PopED reports for the reduced information matrix of 32 subjects."""
    values = np.array([0.15, 8.0, 1.0, 0.07, 0.02, 0.6, 0.01])
    t = torch.tensor([0.5, 1, 2, 6, 24, 36, 72, 120], dtype=torch.float64)

    def curve(p):
        k = p[0] / p[1]
        return 70 * p[2] / (p[1] * (p[2] - k)) * (torch.exp(-k * t) - torch.exp(-p[2] * t))

    typical = torch.tensor(values[:3])
    f, J = curve(typical), torch.func.jacfwd(curve)(typical)
    Z = J * typical

    def covariance(variances):
        return (Z * variances[:3]) @ Z.T + variances[3] * torch.diag(f**2)

    def model(p, X):
        mean, matrix = curve(p["typical"]), covariance(p["variances"])
        return MultivariateNormal(mean.expand(len(X), 8), matrix.expand(len(X), 8, 8))

    params = {"typical": typical, "variances": torch.tensor(values[3:])}
    op = fo.FisherLinearOperator(model, None, params, data=(np.zeros((32, 1)), np.zeros((32, 8))), batch_size=10)
    bounds = crlb(op)
    poped = [4.738266, 2.756206, 13.925829, 25.627205, 30.344316, 25.777327, 11.170784]
    np.testing.assert_allclose(100 * bounds.standard_deviation / values, poped, atol=1e-6)
    # By the textbook: Jᵀ V⁻¹ J for the typical values, and ½ tr(V⁻¹ V_i V⁻¹ V_j) for the variances.
    inverse = np.linalg.inv(covariance(torch.tensor(values[3:])).numpy())
    changes = [inverse @ covariance(torch.eye(4, dtype=torch.float64)[i]).numpy() for i in range(4)]
    F = np.zeros((7, 7))
    F[:3, :3] = J.numpy().T @ inverse @ J.numpy()
    F[3:, 3:] = [[np.trace(a @ b) / 2 for b in changes] for a in changes]
    np.testing.assert_allclose(op.todense(), 32 * F, rtol=1e-9, atol=1e-9 * np.abs(F).max())


def test_a_poisson_regression_by_fisher_scoring():
    """The example of R's help(glm), with its printed estimates and standard errors."""
    counts = np.array([18.0, 17, 15, 20, 10, 20, 25, 13, 12])
    outcome, treatment = np.tile(np.arange(3), 3), np.repeat(np.arange(3), 3)
    X = np.stack([np.ones(9), outcome == 1, outcome == 2, treatment == 1, treatment == 2], 1).astype(float)
    params = {"beta": torch.tensor([np.log(counts.mean()), 0, 0, 0, 0])}
    options = {"params": params, "data": (X, counts)}
    fisher = fo.FisherLinearOperator(lambda p, X: Poisson((X @ p["beta"]).exp()), None, **options)
    observed = fo.EmpiricalFisherLinearOperator(lambda p, X: Poisson((X @ p["beta"]).exp()), None, **options)
    for _ in range(6):
        step = fo.linalg.solve(fisher, observed.scores.T @ np.ones(9), rtol=1e-10).x
        params["beta"] -= torch.from_numpy(step)
    np.testing.assert_allclose(params["beta"], [3.045, -0.4543, -0.2930, 0, 0], atol=5e-4)
    deviation = crlb(fisher).standard_deviation
    np.testing.assert_allclose(deviation, [0.1709, 0.2022, 0.1927, 0.2000, 0.2000], atol=5e-5)
