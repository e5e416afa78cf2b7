"""F + diag(d): damping with a number for each parameter."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator, cg
from torch import nn

import fisherops as fo


def make(kind="mc", seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = (torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,)))
    kinds = {"mc": fo.FisherMCLinearOperator, "exact": fo.FisherLinearOperator}
    return kinds[kind](model, nn.CrossEntropyLoss(), data=data, **options)


def vector(D, zeros=False):
    d = np.linspace(0.1, 2, D)
    return np.where(np.arange(D) % 3 == 0, 0, d) if zeros else d


def composites(op, other, d):
    yield op.damped(d), (F := op.todense()) + np.diag(d)
    yield op.damped(0.5).damped(d), F + np.diag(d + 0.5)
    yield op.damped(d).damped(d), F + np.diag(2 * d)
    yield 2 * op.damped(d) + other.damped(0.1), 2 * (F + np.diag(d)) + other.todense() + 0.1 * np.eye(len(d))
    yield (op @ other).damped(d), F @ other.todense() + np.diag(d)
    yield (op - other).damped(torch.as_tensor(d)), F - other.todense() + np.diag(d)
    yield (op + aslinearoperator(np.eye(len(d)))).damped(d), F + np.eye(len(d)) + np.diag(d)


@pytest.mark.parametrize("zeros", [False, True])
def test_products(zeros):
    op, other = make(), make("exact", 1)
    d = vector(op.shape[0], zeros)
    V = np.random.default_rng(0).standard_normal((len(d), 3))
    for A, dense in composites(op, other, d):
        np.testing.assert_allclose(A @ V, dense @ V, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(A @ V[:, 0], dense @ V[:, 0], rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(A.todense(), dense, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(V.T @ A, V.T @ dense, rtol=1e-10, atol=1e-13)
    A, dense = next(composites(op, other, d))
    np.testing.assert_allclose(A.diagonal(), np.diag(dense), rtol=1e-12)
    np.testing.assert_allclose(A.trace(), np.trace(dense), rtol=1e-12)
    assert A.scores is op.scores


def test_the_vector_is_copied():
    op = make()
    d = vector(op.shape[0])
    A = op.damped(d)
    before = A.todense()
    d[:] = 7
    np.testing.assert_array_equal(A.todense(), before)


def test_a_solver_of_scipy():
    op = make(dtype="float32")
    d = vector(op.shape[0]).astype(np.float32)
    b = np.ones(len(d), np.float32)
    x, info = cg(op.damped(d), b, rtol=1e-6)
    assert info == 0
    np.testing.assert_allclose(x, np.linalg.solve(op.todense() + np.diag(d), b), rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda d: d[:-1], ValueError, r"a real number or have shape \(31,\), got \(30,\)"),
        (lambda d: d[:, None], ValueError, r"a real number or have shape \(31,\), got \(31, 1\)"),
        (lambda d: -d, ValueError, "at least 0 and finite in float32, got -0.1 for entry 0"),
        (lambda d: d * np.inf, ValueError, "at least 0 and finite in float32, got inf for entry 0"),
        (lambda d: d * 1e300, ValueError, "at least 0 and finite in float32, got 1e.299 for entry 0"),
        (lambda d: d * 1e-50, ValueError, "at least 0 and finite in float32, got 1e-51 for entry 0"),
        (lambda d: d * 1j, TypeError, "real numbers, got torch.complex128"),
        (list, TypeError, "must be a real number"),
    ],
)
def test_vectors_that_do_not_fit(change, error, text):
    op = make(dtype="float32")
    with pytest.raises(error, match=text):
        op.damped(change(vector(31)))
    with pytest.raises(error, match=text):
        (op @ op).damped(change(vector(31)))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("composite", range(4))
def test_linear_algebra(composite, zeros):
    """By the dual of the scaled score matrix if every entry is positive, by the dense matrix otherwise."""
    op, other = make(), make("exact", 1)
    d = vector(op.shape[0], zeros)
    A, F = list(composites(op, other, d))[composite]
    D, b = len(d), np.random.default_rng(0).standard_normal(len(d))
    damped = F + 0.1 * np.eye(D)
    regular = np.linalg.eigvalsh(F)[0] > 1e-9
    for method in ("auto", "dense", "primal", *(["dual"] if regular else [])):
        solution = fo.linalg.solve(A, b, 0.1, method=method, rtol=1e-10)
        np.testing.assert_allclose(solution.x, np.linalg.solve(damped, b), rtol=1e-7)
        assert solution.converged
    if regular:
        solution = fo.linalg.solve(A, b, method="dual", rtol=1e-10)
        np.testing.assert_allclose(solution.x, np.linalg.solve(F, b), rtol=1e-7)
        np.testing.assert_allclose(fo.linalg.inv(A, 0.0) @ b, np.linalg.solve(F, b), rtol=1e-4)
        np.testing.assert_allclose(fo.linalg.slogdet(A).logabsdet, np.linalg.slogdet(F)[1], rtol=1e-9)
    np.testing.assert_allclose(fo.linalg.eigsh(A, 3).eigenvalues, np.linalg.eigvalsh(F)[-3:], rtol=1e-8)
    np.testing.assert_allclose(fo.linalg.eigvalsh(A, method="dense"), np.linalg.eigvalsh(F), rtol=1e-7, atol=1e-9)
    inverse = fo.linalg.inv(A, 0.1)
    np.testing.assert_allclose(inverse.diagonal(), np.diag(np.linalg.inv(damped)), rtol=1e-7)
    np.testing.assert_allclose(inverse.trace(), np.trace(np.linalg.inv(damped)), rtol=1e-7)
    np.testing.assert_allclose(fo.linalg.slogdet(A, 0.1).logabsdet, np.linalg.slogdet(damped)[1], rtol=1e-9)
    np.testing.assert_allclose(fo.linalg.trace(A).value, np.trace(F), rtol=1e-10)
    np.testing.assert_allclose(fo.linalg.diagonal(A).value, np.diag(F), rtol=1e-10)
    np.testing.assert_allclose(fo.linalg.frobenius_norm(A).value, np.linalg.norm(F), rtol=1e-7)
    dimension = np.trace(np.linalg.solve(damped, F))
    np.testing.assert_allclose(fo.linalg.effective_dimension(A, 0.1).value, dimension, rtol=1e-7)
