"""Draws of linalg.sample, as linear functions of normal numbers and by their moments."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import fisherops as fo
from fisherops import linalg

module = sys.modules["fisherops.linalg.sample"]


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    X = torch.randn(12, 4).to(dtype)  # equal numbers in both precisions
    y = torch.randint(2, (12,))
    return fo.FisherMCLinearOperator(net, nn.CrossEntropyLoss(), data=(X, y))


@pytest.mark.parametrize("is_vector", [False, True])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("method", ["auto", "dual", "dense", "primal"])
def test_the_covariance_is_exact(method, inverse, is_vector, monkeypatch):
    """Draws are linear in the normal numbers, so units in their place give a root B of the covariance, BᵀB."""
    op = problem()
    op = op.damped(np.linspace(0.05, 0.5, op.shape[0])) if is_vector else op
    D, R = op.shape[0], op.scores.shape[0]
    units = torch.eye(D + R, dtype=torch.float64)
    monkeypatch.setattr(
        module, "normal", lambda count, n, seed, stream, op: units[:count, D:] if stream else units[:count, :D]
    )
    count = D if method == "primal" and inverse else D + R  # the former has numbers for the parameters only
    draws = linalg.sample(op, count, damping=0.2, inverse=inverse, method=method, rtol=1e-10)
    assert draws.converged
    A = op.todense() + 0.2 * np.eye(D)
    expected = np.linalg.inv(A) if inverse else A
    np.testing.assert_allclose(draws.value.T @ draws.value, expected, atol=1e-8 * np.abs(expected).max())


def test_moments_are_those_of_the_distribution():
    op, n = problem(), 4000
    A = op.todense() + 0.2 * np.eye(op.shape[0])
    X = linalg.sample(op, n, damping=0.2, method="dual", rng=5).value
    white = X @ np.linalg.cholesky(A)
    assert np.abs(white.mean(0)).max() < 5 / n**0.5
    assert np.abs(white.T @ white / n - np.eye(len(A))).max() < 5 * (2 / n) ** 0.5


def test_draws_are_a_function_of_seed_and_number():
    op = problem()
    many = linalg.sample(op, 5, damping=0.2, rng=3, method="dense").value
    np.testing.assert_allclose(linalg.sample(op, 2, damping=0.2, rng=3, method="dense").value, many[:2], rtol=1e-12)
    single = linalg.sample(op, damping=0.2, rng=3, method="dense", like=torch.empty(0))
    assert isinstance(single.value, torch.Tensor)
    np.testing.assert_allclose(single.value, many[0], rtol=1e-12)
    narrow = linalg.sample(problem(torch.float32), 5, damping=0.2, rng=3, method="dense").value
    np.testing.assert_allclose(narrow, many, atol=1e-4)
    assert np.abs(linalg.sample(op, 5, damping=0.2, rng=4, method="dense").value - many).max() > 0.1
    assert linalg.sample(op, 0, damping=0.2).value.shape == (0, op.shape[0])


def test_few_steps_of_the_square_root_report_their_error():
    draws = linalg.sample(problem(), 2, damping=1e-4, method="primal", maxiter=4)
    assert not draws.converged
    assert draws.error > 1e-5


def test_bad_input():
    op = problem()
    for error, match, options in [
        (ValueError, "`damping` must be positive, because F is singular", {"damping": 0.0}),
        (ValueError, "`damping` must be at least 0 and finite", {"damping": np.nan}),
        (ValueError, "`damping` must be at least 0 and finite", {"damping": -1.0}),
        (ValueError, "`rng` must be below 2..64", {"damping": 0.1, "rng": 2**64}),
        (TypeError, "`rng` must be", {"damping": 0.1, "rng": "seed"}),
        (ValueError, "`size` must be", {"damping": 0.1, "size": -1}),
        (ValueError, "`method` must be one of", {"damping": 0.1, "method": "lanczos"}),
    ]:
        with pytest.raises(error, match=match):
            linalg.sample(op, **options)
