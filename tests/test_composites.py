"""Positive multiples, sums and damped versions of Fisher operators are Fisher operators: nothing about them is estimated."""

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from models import make_case
from torch import nn

import fisherops as fo
from fisherops import linalg


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def pair(other, cache):
    """Return two operators with the same parameters' number: of one network, or of two whose parameters differ."""
    net, generator = network(), torch.Generator().manual_seed(1)
    X = torch.randn(14, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (14,), generator=generator)
    loss = nn.CrossEntropyLoss(reduction="sum")
    first = fo.FisherLinearOperator(net, loss, data=(X[:6], y[:6]), cache=cache)
    if other == "same network":
        second = fo.EmpiricalFisherLinearOperator(net, nn.CrossEntropyLoss(), data=(X[4:], y[4:]), cache=cache)
    else:
        table = nn.Linear(42, 1).double()
        Z = torch.randn(9, 42, generator=generator, dtype=torch.float64)
        second = fo.FisherMCLinearOperator(table, nn.MSELoss(reduction="sum"), data=(Z, torch.zeros(9, 1).double()))
    return first, second


MADE = {
    "multiple": lambda F, H: 2.5 * F,
    "damped": lambda F, H: F.damped(0.3),
    "sum": lambda F, H: F + H,
    "all": lambda F, H: 0.5 * (2 * F.damped(0.1) + H / 4 + F).damped(0.05),
}


def matrix(name, F, H):
    eye = np.eye(len(F))
    return {
        "multiple": 2.5 * F,
        "damped": F + 0.3 * eye,
        "sum": F + H,
        "all": 0.5 * (2 * (F + 0.1 * eye) + H / 4 + F) + 0.025 * eye,
    }[name]


@pytest.mark.parametrize("cache", ["auto", "none", "linearization"])
@pytest.mark.parametrize("other", ["same network", "another"])
@pytest.mark.parametrize("name", MADE)
def test_the_parts_of_a_sum_are_one_matrix(name, other, cache):
    F, H = pair(other, cache)
    op = MADE[name](F, H)
    A = matrix(name, F.todense(), H.todense())
    D = len(A)
    close = {"rtol": 1e-9, "atol": 1e-9 * np.abs(A).max()}
    assert isinstance(op, fo.fisher.FisherOperator)
    V = np.random.default_rng(0).standard_normal((D, 3))
    np.testing.assert_allclose(op @ V, A @ V, **close)
    np.testing.assert_allclose(op.todense(), A, **close)
    np.testing.assert_allclose(op.diagonal(), A.diagonal(), **close)
    assert op.trace() == pytest.approx(A.trace(), rel=1e-10)
    shift = {"damped": 0.3, "all": 0.125}.get(name, 0.0)
    G = op.scores.todense()
    np.testing.assert_allclose(G.T @ G, A - shift * np.eye(D), **close)
    np.testing.assert_allclose(op.scores.gram(), G @ G.T, **close)


@pytest.mark.parametrize("method", ["dual", "dense", "primal"])
@pytest.mark.parametrize("other", ["same network", "another"])
@pytest.mark.parametrize("name", MADE)
def test_linear_algebra_of_sums(name, other, method):
    F, H = pair(other, "auto")
    op = MADE[name](F, H)
    A = op @ np.eye(op.shape[0])
    A = (A + A.T) / 2
    D, values = len(A), np.linalg.eigvalsh(A)
    pairs = linalg.eigsh(op, 4, method=method, ncv=D)
    np.testing.assert_allclose(pairs.eigenvalues, values[-4:], rtol=1e-8)
    assert pairs.converged
    b = np.linspace(-1, 1, D)
    solution = linalg.solve(op, b, 0.2, method=method, rtol=1e-10)
    np.testing.assert_allclose(solution.x, np.linalg.solve(A + 0.2 * np.eye(D), b), rtol=1e-6, atol=1e-8)
    inverse = linalg.inv(op, 0.2, method=method)
    np.testing.assert_allclose(inverse @ b, np.linalg.solve(A + 0.2 * np.eye(D), b), rtol=1e-3, atol=1e-4)
    if method == "primal":
        return
    expected = np.linalg.inv(A + 0.2 * np.eye(D))
    np.testing.assert_allclose(linalg.diagonal(inverse).value, expected.diagonal(), rtol=1e-8)
    assert float(linalg.trace(inverse)) == pytest.approx(expected.trace(), rel=1e-9)
    assert linalg.slogdet(op, 0.2, method=method).logabsdet == pytest.approx(np.log(values + 0.2).sum(), rel=1e-9)
    dimension = linalg.effective_dimension(op, 0.2, method=method)
    assert float(dimension) == pytest.approx((values / (values + 0.2)).sum(), rel=1e-8)
    assert float(linalg.frobenius_norm(op, method=method)) == pytest.approx(np.linalg.norm(A), rel=1e-10)
    edges = [-1.0, 0.01, values[-3] * 0.999, values[-1] * 1.001]
    counts = linalg.spectral_density(op, edges, method=method).counts
    np.testing.assert_allclose(counts, np.histogram(values, edges)[0])


def test_the_largest_eigenvalues_by_scipy():
    F, H = pair("another", "auto")
    op = (F + 2 * H).damped(0.5)
    np.testing.assert_allclose(sla.eigsh(op, 2)[0], linalg.eigsh(op, 2).eigenvalues, rtol=1e-9)


def test_what_does_not_fit_is_a_general_composite():
    F, H = pair("same network", "auto")
    single = make_case("dense", "mse", dtype=torch.float32)
    other = fo.FisherMCLinearOperator(single.model, single.loss, data=single.data)
    for op in (F - H, -F, 0 * F, 1j * F, F + sla.aslinearoperator(np.eye(43)), F @ H):
        assert not isinstance(op, fo.fisher.FisherOperator)
    with pytest.raises(ValueError, match="operators must have equal shapes to be added"):
        F + other


def test_sums_follow_changes_and_are_refreshed():
    F, H = pair("same network", "auto")
    op = (F + 2 * H).damped(0.1)
    before, version = op.todense(), op.version
    with torch.no_grad():
        F.scores.parameters.tensors["0.weight"].mul_(2)
    expected = F.todense() + 2 * H.todense() + 0.1 * np.eye(43)
    np.testing.assert_allclose(op.todense(), expected, rtol=1e-10, atol=1e-12)
    assert np.abs(op.todense() - before).max() > 1e-3
    assert op.version > version
    op.refresh()
    np.testing.assert_allclose(op.todense(), expected, rtol=1e-10, atol=1e-12)


def test_the_score_matrix_is_one_object():
    F, _ = pair("same network", "auto")
    assert F.scores is F.scores
    assert F.damped(1.0).scores is F.scores
