"""Cramér-Rao bounds against textbook formulas, and what they say where the data do not determine the parameters."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

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
    with pytest.raises(TypeError, match="the Cramér-Rao bound is of a Fisher operator, got _Damped"):
        crlb(op.damped(1.0))
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
