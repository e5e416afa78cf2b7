"""The routines of fisherops.linalg, against dense linear algebra with the same matrix."""

import contextlib
import math
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import make_case
from rank_jobs import solve_with_checkpoint
from ranks import CONTEXT
from scipy.sparse.linalg import aslinearoperator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherops as fo
from fisherops import linalg

WAYS = ("dual", "dense", "primal")


class Scores(nn.Module):
    """A model whose score matrix is any matrix: f_n = ⟨g_n, θ⟩, with rows √2 g_n for the exact Fisher of MSELoss."""

    def __init__(self, D, dtype):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(D, dtype=dtype))

    def forward(self, X):
        return X @ self.theta[:, None]


def operator(G, dtype=torch.float64, batches=1, **options):
    """Return the operator with score matrix G, as exactly as its precision allows."""
    X = torch.as_tensor(np.array(G)).to(dtype) / 2**0.5
    data = [(x, torch.zeros(len(x), 1, dtype=dtype)) for x in X.tensor_split(min(batches, len(X)))]
    return fo.FisherLinearOperator(Scores(X.shape[1], dtype), nn.MSELoss(reduction="sum"), data=data, **options)


def spectrum(kind, n, rng):
    """Singular values of G."""
    return {
        "random": lambda: rng.uniform(0.1, 2.0, n),
        "clustered": lambda: np.repeat([2.0, 1.0], [n // 2, n - n // 2]) + 1e-6 * rng.standard_normal(n),
        "multiple": lambda: np.repeat([2.0, 1.0], [n // 2, n - n // 2]),
        "badly scaled": lambda: np.geomspace(1e-4, 10.0, n),
        "deficient": lambda: np.where(np.arange(n) < max(1, n // 2), rng.uniform(0.5, 2.0, n), 0.0),
        "zero": lambda: np.zeros(n),
    }[kind]()


@st.composite
def matrices(draw, kinds=("random", "clustered", "multiple", "badly scaled", "deficient", "zero")):
    """G (R, D) with a spectrum of some kind; R > D, R < D, 1 × 1."""
    R, D = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n = min(R, D)
    U, V = (np.linalg.qr(rng.standard_normal((m, n)))[0] for m in (R, D))
    return U * spectrum(draw(st.sampled_from(kinds)), n, rng) @ V.T


def dense(op):
    F = op.todense().astype(np.float64)
    return (F + F.T) / 2


def eps(op):
    return float(np.finfo(op.dtype).eps)


# ---- Eigenvalues -------------------------------------------------------------------------------------------


@given(matrices(), st.sampled_from(WAYS), st.sampled_from(["LM", "LA", "SA", "SM"]), st.integers(1, 9), st.data())
def test_eigsh(G, method, which, k, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    if not np.any(G):
        return  # a model with no effect is refused
    op = operator(G, dtype, batches=data.draw(st.integers(1, 3)))
    F, D = dense(op), G.shape[1]
    k = min(k, D)
    expected = np.linalg.eigvalsh(F)
    expected = expected[-k:] if which in ("LM", "LA") else expected[:k]
    # A space of all dimensions: Lanczos' method alone would miss copies of multiple eigenvalues.
    result = linalg.eigsh(op, k, which, method=method, ncv=D, maxiter=100)
    values, vectors = result
    tolerance = 200 * D * eps(op) * np.linalg.norm(F, 2)
    assert result.method == method
    assert result.converged
    assert values.dtype == vectors.dtype == result.residuals.dtype == op.dtype
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)
    residuals = np.linalg.norm(F @ vectors - vectors * values, axis=0)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=2000 * D * eps(op))
    assert (residuals <= tolerance).all()
    np.testing.assert_allclose(result.residuals, residuals, atol=tolerance)
    alone = linalg.eigsh(op, k, which, method=method, ncv=D, return_eigenvectors=False)
    assert alone.eigenvectors is None
    np.testing.assert_allclose(alone.eigenvalues, expected, rtol=0, atol=tolerance)


@given(matrices(), st.sampled_from(["auto", "dual", "dense"]))
def test_eigvalsh(G, method):
    if not np.any(G):
        return
    op = operator(G)
    expected = np.linalg.eigvalsh(dense(op))
    values = linalg.eigvalsh(op, method=method)
    assert len(values) == (min(G.shape) if method == "dual" else len(values))
    np.testing.assert_allclose(values, expected[len(expected) - len(values) :], atol=1e-13 * expected[-1], rtol=0)
    np.testing.assert_allclose(expected[: len(expected) - len(values)], 0, atol=1e-13 * expected[-1])


def test_restarts_find_what_one_space_cannot():
    rng = np.random.default_rng(0)
    G = np.linalg.qr(rng.standard_normal((300, 300)))[0] * np.linspace(0.1, 1.5, 300)
    op = operator(G, batches=4)
    expected = np.linalg.eigvalsh(dense(op))
    seen = []
    result = linalg.eigsh(op, 4, method="primal", callback=lambda *state: seen.append(state))
    np.testing.assert_allclose(result.eigenvalues, expected[-4:], rtol=1e-12)
    assert len(seen) > 2
    products = [state[0] for state in seen]
    assert products == sorted(products)
    assert result.products == products[-1] + 4
    assert seen[-1][2].max() < 1e-14 < seen[0][2].max()
    short = linalg.eigsh(op, 4, method="primal", maxiter=15)
    assert not short.converged
    assert short.products == 15 + 4
    loose = linalg.eigsh(op, 4, method="primal", tol=1e-3)
    assert loose.products < result.products
    assert loose.residuals.max() <= 1.1e-3 * expected[-1]


def test_other_operators_and_ways_that_are_not_open():
    rng = np.random.default_rng(0)
    op = operator(rng.standard_normal((6, 9)))
    F = dense(op)
    composite = (2 * op).damped(0.5)
    expected = np.linalg.eigvalsh(2 * F + 0.5 * np.eye(9))
    np.testing.assert_allclose(linalg.eigsh(composite, 3).eigenvalues, expected[-3:])
    np.testing.assert_allclose(
        linalg.eigsh(aslinearoperator(F), 3, method="primal").eigenvalues, np.linalg.eigvalsh(F)[-3:]
    )
    with pytest.raises(
        ValueError, match="must be a Fisher operator for method='dual', got an operator without a score matrix"
    ):
        linalg.eigsh(aslinearoperator(F), 3, method="dual")
    for method in ("dual", "dense", "primal"):
        np.testing.assert_allclose(linalg.eigsh(composite, 3, method=method).eigenvalues, expected[-3:])
    with pytest.raises(ValueError, match="`method` must be one of 'auto', 'dual', 'dense', 'primal', got 'gram'"):
        linalg.eigsh(op, method="gram")
    with pytest.raises(ValueError, match="`k` must be from 1 to 9, got 10"):
        linalg.eigsh(op, 10)
    with pytest.raises(ValueError, match="`which` must be 'LM'"):
        linalg.eigsh(op, 1, "BE")
    with pytest.raises(ValueError, match="`tol` must be at least 0 and below 1, got"):
        linalg.eigsh(op, 1, tol=-1)
    with pytest.raises(ValueError, match="`v0` must be 9 finite numbers, not all zero"):
        linalg.eigsh(op, 1, method="primal", v0=np.zeros(9))
    with pytest.raises(TypeError, match="`op` must be a Fisher operator or a SciPy LinearOperator, got ndarray"):
        linalg.eigsh(F, 1)
    with pytest.raises(ValueError, match="`op` must be square, got shape"):
        linalg.eigsh(op.scores, 1)
    with pytest.raises(ValueError, match="`method` must be 'auto', 'dual' or 'dense', which find all eigenvalues"):
        linalg.eigvalsh(op, method="primal")
    small = operator(rng.standard_normal((6, 9)), max_memory=600)
    with pytest.raises(
        ValueError,
        match=r"must leave 1440 bytes for method='dual', which needs a matrix of size 6 and its factors, got \d+",
    ):
        linalg.eigsh(small, 2, method="dual")
    assert linalg.eigsh(small, 2).method == "primal"
    with pytest.raises(ValueError, match="`max_memory` must hold the Gram matrix or F, and neither fits"):
        linalg.eigvalsh(small)


def test_the_way_is_chosen_by_size():
    rng = np.random.default_rng(0)
    assert linalg.eigsh(operator(rng.standard_normal((20, 3000))), 5).method == "dual"
    assert linalg.eigsh(operator(rng.standard_normal((3000, 20))), 5).method == "dense"
    assert linalg.slogdet(operator(rng.standard_normal((3000, 20))), 1.0).method == "dense"
    many = operator(rng.standard_normal((4000, 6000)), torch.float32, cache="scores")
    assert linalg.eigsh(many, 2, tol=1e-2).method == "primal"


# ---- Solving -----------------------------------------------------------------------------------------------


@given(matrices(), st.sampled_from(WAYS), st.sampled_from([1e-2, 1.0]), st.booleans(), st.data())
def test_solve(G, method, damping, single, data):
    if not np.any(G):
        return
    op = operator(G, batches=data.draw(st.integers(1, 2)))
    F, D = dense(op), G.shape[1]
    b = np.random.default_rng(0).standard_normal(D if single else (D, 3))
    result = linalg.solve(op, b, damping, method=method, rtol=1e-9)
    assert result.converged
    assert result.method == method
    A = F + damping * np.eye(D)
    x = np.linalg.solve(A, b)
    condition = np.linalg.cond(A)
    np.testing.assert_allclose(result.x, x, atol=1e-9 * condition * np.abs(x).max(), rtol=0)
    residual = np.linalg.norm(b - A @ result.x, axis=0)
    np.testing.assert_allclose(result.residual, residual, atol=1e-13 * np.linalg.norm(A, 2) * np.abs(x).max() * D)
    assert (residual <= 1.01e-9 * np.linalg.norm(b, axis=0)).all()
    inverse = linalg.inv(op, damping, method=method, rtol=1e-10)
    np.testing.assert_allclose(inverse @ b, x, atol=1e-9 * condition * np.abs(x).max(), rtol=0)
    assert inverse.method == method


@given(matrices(kinds=("random", "deficient", "multiple")), st.sampled_from(["auto", "dual", "dense"]))
def test_least_norm(G, method):
    if not np.any(G):
        return
    op = operator(G)
    b = np.random.default_rng(0).standard_normal(G.shape[1])
    result = linalg.solve(op, b, method=method, least_norm=True)
    F = dense(op)
    expected = np.linalg.pinv(F, hermitian=True, rcond=1e-11) @ b
    np.testing.assert_allclose(result.x, expected, atol=1e-9 * np.abs(expected).max())
    assert result.converged
    np.testing.assert_allclose(result.residual, np.linalg.norm(b - F @ expected), atol=1e-9)


def test_a_singular_matrix_is_not_solved_in_silence():
    rng = np.random.default_rng(0)
    wide, tall = rng.standard_normal((4, 9)), rng.standard_normal((12, 5))
    b = np.ones(9)
    for method in ("auto", "dual", "primal"):
        with pytest.raises(
            ValueError, match="F is singular .its rank is at most 4 of 9.*Pass damping > 0, or least_norm"
        ):
            linalg.solve(operator(wide), b, method=method)
    tall[:, 4] = tall[:, 3]
    with pytest.raises(ValueError, match="zero to rounding"):
        linalg.solve(operator(tall), np.ones(5))
    tall[:, 4] = rng.standard_normal(12)
    op = operator(tall)
    for method in ("auto", "dense", "primal"):
        np.testing.assert_allclose(
            linalg.solve(op, np.ones(5), method=method, rtol=1e-12).x, np.linalg.solve(dense(op), np.ones(5))
        )
    with pytest.raises(ValueError, match="`damping` must be at least 0 and finite in float64, got -1"):
        linalg.solve(op, np.ones(5), -1)
    with pytest.raises(TypeError, match="`damping` must be a real number"):
        linalg.inv(op, "1")
    with pytest.raises(ValueError, match="`method` must be 'dual' or 'dense' for least_norm=True"):
        linalg.solve(op, np.ones(5), method="primal", least_norm=True)
    with pytest.raises(ValueError, match="dimension mismatch in solve"):
        linalg.solve(op, np.ones(4), 1.0)
    with pytest.raises(ValueError, match="`b` must be finite, got NaN"):
        linalg.solve(op, np.full(5, np.nan), 1.0)
    with pytest.raises(TypeError, match="`b` must be real, got a complex array"):
        linalg.solve(op, np.ones(5) * 1j, 1.0)


@pytest.mark.parametrize("scale", np.linspace(0.3, 1.0, 8))
def test_what_rounding_leaves_of_an_eigenvalue_is_zero(scale):
    """The entries of this Gram matrix are sums of 400,000 numbers, whose rounding is more than that of its own size."""
    row = np.random.default_rng(0).random(400_000) + 0.5
    op = operator(np.stack([row, scale * row]), torch.float32)
    result = linalg.eigsh(op, 2, method="dual", return_eigenvectors=False)
    assert result.eigenvalues[0] == 0
    assert result.eigenvalues[1] == pytest.approx((1 + scale**2) * (row @ row), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvectors_of_small_eigenvalues_are_orthogonal(dtype):
    """The images Gᵀu of small ones have a part along large ones, which rounding put there."""
    rng = np.random.default_rng(0)
    R, D = 12, 30
    U, V = (np.linalg.qr(rng.standard_normal((m, R)))[0] for m in (R, D))
    op = operator(U * np.geomspace(10 * np.finfo(str(dtype)[6:]).eps ** 0.5, 1.0, R) @ V.T, dtype)
    for k in (3, R, D):
        values, vectors = result = linalg.eigsh(op, k, method="dual")
        assert np.count_nonzero(values) == min(k, R)
        vectors = vectors.astype(np.float64)
        assert abs(vectors.T @ vectors - np.eye(k)).max() <= 100 * eps(op)
        assert (result.residuals <= 100 * eps(op) * values[-1]).all()


def test_conjugate_gradients():
    rng = np.random.default_rng(0)
    G = rng.standard_normal((30, 40)) * np.geomspace(1e-2, 10, 40)  # parameters of other scales
    op = operator(G)
    A = dense(op) + 0.01 * np.eye(40)
    b = rng.standard_normal(40)
    x = np.linalg.solve(A, b)
    seen = []
    jacobi = linalg.solve(op, b, 0.01, method="primal", rtol=1e-8, callback=lambda *state: seen.append(state))
    plain = linalg.solve(op, b, 0.01, method="primal", rtol=1e-8, M=None)
    other = linalg.solve(op, b, 0.01, method="primal", rtol=1e-8, M=aslinearoperator(np.linalg.inv(A)))
    for result in (jacobi, plain, other):
        assert result.converged
        np.testing.assert_allclose(result.x, x, rtol=1e-5)
    assert other.iterations <= 2 < jacobi.iterations < plain.iterations
    assert [state[0] for state in seen] == list(range(1, jacobi.iterations + 1))
    assert isinstance(seen[0][1], np.floating | np.ndarray | float)
    warm = linalg.solve(op, b, 0.01, method="primal", rtol=1e-8, x0=x)
    assert warm.iterations == 0
    short = linalg.solve(op, b, 0.01, method="primal", maxiter=3, rtol=1e-12)
    assert not short.converged
    assert short.iterations == 3
    assert short.residual == pytest.approx(np.linalg.norm(b - A @ short.x))
    with pytest.raises(RuntimeError, match=r"the system was not solved to its tolerance in 2 iterations \(residual"):
        linalg.inv(op, 0.01, method="primal", maxiter=2) @ b
    with pytest.raises(ValueError, match="`M` must have the shape of the operator"):
        linalg.solve(op, b, 1.0, method="primal", M=aslinearoperator(np.eye(3)))
    zero = linalg.solve(op, 0 * b, 0.01, method="primal")
    assert zero.converged
    np.testing.assert_array_equal(zero.x, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradients_report_the_true_residual(dtype):
    """From a distant start the residual of the recursion falls below the tolerance 100 times before the true one."""
    rng = np.random.default_rng(0)
    G = rng.standard_normal((20, 30))
    op = operator(G / np.linalg.norm(G, 2), dtype)
    A, b = dense(op) + np.eye(30), rng.standard_normal((30, 2)).astype(op.dtype)
    rtol = 100 * eps(op)
    x0 = np.stack([np.zeros(30), 0.1 / eps(op) * rng.standard_normal(30)], 1).astype(op.dtype)
    options = {"x0": x0, "method": "primal", "M": None, "rtol": rtol}
    solved = linalg.solve(op, b, 1.0, **options)
    assert solved.converged
    for maxiter in (*range(solved.iterations), None):
        result = linalg.solve(op, b, 1.0, maxiter=maxiter, **options)
        x = result.x.astype(np.float64)
        residual = np.linalg.norm(b - A @ x, axis=0)
        rounding = 10 * eps(op) * (np.linalg.norm(b, axis=0) + 2 * np.linalg.norm(x, axis=0))
        assert (abs(result.residual - residual) <= rounding).all()
        excess = residual - rtol * np.linalg.norm(b, axis=0)
        assert (excess <= rounding).all() if result.converged else (excess >= -rounding).any()
    assert solved.iterations > 10


def test_natural_gradient():
    case = make_case("dense", "ce", sizes=(6, 5))
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    g = np.random.default_rng(0).standard_normal(case.D)
    expected = np.linalg.solve(dense(op) + 0.1 * np.eye(case.D), g)
    np.testing.assert_allclose(linalg.natural_gradient(op, g, 0.1, rtol=1e-10), expected, atol=1e-8)
    tensors, start = {}, 0
    for name, shape in op.parameter_shapes.items():
        tensors[name] = torch.from_numpy(g[start : start + shape.numel()].reshape(shape))
        start += shape.numel()
    result = linalg.natural_gradient(op, dict(reversed(tensors.items())), 0.1, rtol=1e-10)
    assert {name: t.shape for name, t in result.items()} == op.parameter_shapes
    assert all(isinstance(t, torch.Tensor) for t in result.values())
    np.testing.assert_allclose(torch.cat([result[name].flatten() for name in tensors]), expected, atol=1e-8)
    with pytest.raises(
        ValueError, match="`grad` must have the names of the operator's parameters, .*Pass one gradient for each"
    ):
        linalg.natural_gradient(op, {"w": g}, 0.1)
    name = next(iter(tensors))
    with pytest.raises(ValueError, match="must have the parameter's shape .*, got"):
        linalg.natural_gradient(op, tensors | {name: torch.zeros(1)}, 0.1)
    with pytest.raises(RuntimeError, match="not solved to its tolerance"):
        linalg.natural_gradient(op, g, 1e-6, method="primal", maxiter=1)


# ---- Traces, norms, determinants ---------------------------------------------------------------------------


@given(matrices(), st.sampled_from(["dual", "dense"]), st.sampled_from([1e-3, 1.0]))
def test_exact_functions(G, method, damping):
    if not np.any(G):
        return
    op = operator(G)
    F = dense(op)
    values = np.linalg.eigvalsh(F).clip(0)
    assert float(linalg.trace(op)) == pytest.approx(np.trace(F))
    np.testing.assert_allclose(linalg.diagonal(op).value, np.diag(F), atol=1e-14 * values[-1])
    norm = linalg.frobenius_norm(op, method=method)
    assert norm.value == pytest.approx(np.linalg.norm(F))
    log = linalg.slogdet(op, damping, method=method)
    assert log.sign == 1
    assert log.logabsdet == pytest.approx(np.log(values + damping).sum(), abs=1e-9 * len(F))
    dimension = linalg.effective_dimension(op, damping, method=method)
    assert dimension.value == pytest.approx((values / (values + damping)).sum())
    assert norm.method == log.method == dimension.method == method
    assert norm.standard_error == log.standard_error == dimension.standard_error == 0


def test_the_determinant_without_damping():
    rng = np.random.default_rng(0)
    assert linalg.slogdet(operator(rng.standard_normal((3, 5))))[:2] == (0.0, -math.inf)
    op = operator(rng.standard_normal((9, 5)))
    sign, log = np.linalg.slogdet(dense(op))
    for method in ("auto", "dual", "dense"):
        assert linalg.slogdet(op, method=method)[:2] == (sign, pytest.approx(log))
    with pytest.raises(ValueError, match="`damping` must be positive for method='primal'"):
        linalg.slogdet(op, method="primal")
    with pytest.raises(ValueError, match="`damping` must be positive, got 0"):
        linalg.effective_dimension(op, 0.0)


@pytest.mark.parametrize(
    ("function", "truth"),
    [
        (
            lambda op, seed: linalg.frobenius_norm(op, method="primal", probes=10, seed=seed),
            lambda w, F: np.linalg.norm(F),
        ),
        (
            lambda op, seed: linalg.effective_dimension(op, 3.0, method="primal", probes=10, steps=10, seed=seed),
            lambda w, F: (w / (w + 3.0)).sum(),
        ),
        (
            lambda op, seed: linalg.slogdet(op, 3.0, method="primal", probes=10, steps=10, seed=seed),
            lambda w, F: np.log(w + 3.0).sum(),
        ),
        (lambda op, seed: estimated(linalg.trace, op, seed=seed), lambda w, F: w.sum() + 20.0),
    ],
    ids=["frobenius", "dimension", "determinant", "trace"],
)
def test_standard_errors_cover(function, truth):
    """With ten probes the error is within 2.26 standard errors in 95 % of cases, of 100 at least 87 (99.9 %)."""
    rng = np.random.default_rng(0)
    op = operator(rng.standard_normal((60, 40)) * np.geomspace(0.1, 1, 40))
    F = dense(op)
    expected = truth(np.linalg.eigvalsh(F), F)
    pairs = []
    for seed in range(100):
        result = function(op, 1000 * seed)
        pairs.append((result.logabsdet if hasattr(result, "sign") else result.value, result.standard_error))
    values, errors = np.array(pairs).T
    assert (abs(values - expected) <= 2.26 * errors).sum() >= 87
    assert values.std() == pytest.approx(np.sqrt((errors**2).mean()), rel=0.25)


def estimated(function, op, **options):
    """Return an estimate for op + I/2 as of an operator that is too large to be written out."""
    F = aslinearoperator(dense(op) + 0.5 * np.eye(op.shape[0]))
    with mock.patch("fisherops.linalg.estimates._SMALL", 0):
        return function(F, **options)


def test_the_diagonal_of_other_operators():
    op = operator(np.random.default_rng(0).standard_normal((30, 6)))
    expected = np.diag(dense(op)) + 0.5
    estimate = estimated(linalg.diagonal, op, probes=400)
    assert linalg.diagonal(aslinearoperator(dense(op))).method == "dense"
    assert (abs(estimate.value - expected) <= 5 * estimate.standard_error + 1e-12).all()
    assert estimate.method == "primal"


# ---- Densities ---------------------------------------------------------------------------------------------


@given(matrices(), st.sampled_from(["dual", "dense"]))
def test_densities_count_eigenvalues(G, method):
    if not np.any(G):
        return
    op = operator(G)
    values = np.linalg.eigvalsh(dense(op)).clip(0)
    rng = np.random.default_rng(0)
    edges = np.sort(rng.uniform(0, 1.1 * values[-1], 6))
    if np.min(abs(values[:, None] - edges)) < 1e-10 * values[-1]:
        return  # on an edge, rounding decides
    density = linalg.spectral_density(op, edges, method=method)
    np.testing.assert_array_equal(density.counts, np.histogram(values, edges)[0])
    assert density.below == (values < edges[0]).sum()
    assert density.above == (values > edges[-1]).sum()
    default = linalg.spectral_density(op, method=method)
    assert default.counts.sum() + default.below == len(values)
    assert default.above == 0


def test_densities_by_quadrature():
    rng = np.random.default_rng(0)
    op = operator(rng.standard_normal((50, 80)))
    exact = linalg.spectral_density(op, np.linspace(1e-6, 300, 7))
    estimate = linalg.spectral_density(op, exact.grid, method="primal", probes=60)
    assert estimate.counts.sum() + estimate.below + estimate.above == pytest.approx(80)
    assert (abs(estimate.counts - exact.counts) <= 5 * estimate.standard_error + 1e-9).all()
    assert estimate.standard_error.max() > 0
    default = linalg.spectral_density(op, method="primal")
    assert default.above == pytest.approx(0, abs=1e-6)
    for grid in ([1.0], [2.0, 1.0], [[0.0, 1.0]], [0.0, np.inf]):
        with pytest.raises(ValueError, match="`grid` must be at least two ascending, finite edges"):
            linalg.spectral_density(op, grid)


# ---- Arrays ------------------------------------------------------------------------------------------------


def test_results_are_of_the_library_of_the_input():
    import array_api_strict as xp

    op = operator(np.random.default_rng(0).standard_normal((6, 4)), torch.float32)
    for like, kind in (
        (None, np.ndarray),
        (np.ones(1), np.ndarray),
        (torch.ones(1), torch.Tensor),
        (xp.ones(1), type(xp.ones(1))),
    ):
        values, vectors = linalg.eigsh(op, 2, like=like)
        for result in (values, vectors, linalg.eigvalsh(op, like=like), linalg.diagonal(op, like=like).value):
            assert isinstance(result, kind)
            assert "float32" in str(result.dtype)
    for b in (np.ones(4), torch.ones(4), xp.ones(4)):
        assert isinstance(linalg.solve(op, b, 1.0).x, type(b))
        assert isinstance(linalg.inv(op, 1.0) @ b, type(b))
        assert isinstance(linalg.natural_gradient(op, b, 1.0), type(b))


# ---- Long jobs ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted_after(monkeypatch, products):
    """Raise KeyboardInterrupt at some product of any Fisher."""
    original, count = fo.fisher.FisherOperator._mul, [0]

    def apply(self, V):
        count[0] += 1
        if count[0] > products:
            raise KeyboardInterrupt
        return original(self, V)

    with monkeypatch.context() as patch:
        patch.setattr(fo.fisher.FisherOperator, "_mul", apply)
        yield


def slow_operator():
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((200, 200)))[0] for _ in range(2))
    return operator(U * np.linspace(0.1, 1.5, 200) @ V.T)


@pytest.mark.parametrize("products", [0, 5, 33, 70])
def test_an_interrupt_leaves_the_best_so_far(monkeypatch, tmp_path, products):
    op = slow_operator()
    whole = linalg.eigsh(op, 3, method="primal")
    path = tmp_path / "state.npz"
    with interrupted_after(monkeypatch, products + 1), pytest.raises(linalg.Interrupted) as caught:  # one fingerprint
        linalg.eigsh(op, 3, method="primal", checkpoint=path)
    result = caught.value.result
    assert not result.converged
    assert result.products == products
    assert len(result.eigenvalues) == min(3, products)
    if products:
        assert result.eigenvalues[-1] <= whole.eigenvalues[-1] * (1 + 1e-12)
        vectors = result.eigenvectors
        residuals = np.linalg.norm(op @ vectors - vectors * result.eigenvalues, axis=0)
        np.testing.assert_allclose(result.residuals, residuals, rtol=1e-6, atol=1e-12)
    resumed = linalg.eigsh(op, 3, method="primal", checkpoint=path)
    np.testing.assert_array_equal(resumed.eigenvalues, whole.eigenvalues)
    np.testing.assert_array_equal(resumed.eigenvectors, whole.eigenvectors)
    assert resumed.products == whole.products
    again = linalg.eigsh(op, 3, method="primal", checkpoint=path)  # it is done already
    np.testing.assert_array_equal(again.eigenvectors, whole.eigenvectors)


@pytest.mark.parametrize("products", [2, 7, 30])
def test_an_interrupted_solve_goes_on(monkeypatch, tmp_path, products):
    op, b = slow_operator(), np.random.default_rng(0).standard_normal((200, 2))
    options = {"method": "primal", "rtol": 1e-10}
    whole = linalg.solve(op, b, 1e-4, **options)
    path = tmp_path / "state.npz"
    with interrupted_after(monkeypatch, products + 1), pytest.raises(linalg.Interrupted) as caught:
        linalg.solve(op, b, 1e-4, checkpoint=path, **options)
    result = caught.value.result
    assert result.iterations == products
    assert not result.converged
    A = dense(op) + 1e-4 * np.eye(200)
    np.testing.assert_allclose(result.residual, np.linalg.norm(b - A @ result.x, axis=0), rtol=1e-6)
    resumed = linalg.solve(op, b, 1e-4, checkpoint=path, **options)
    np.testing.assert_array_equal(resumed.x, whole.x)
    assert resumed.iterations == whole.iterations


def test_checkpoints_of_others_are_refused(tmp_path):
    op = slow_operator()
    path = tmp_path / "state.npz"
    linalg.eigsh(op, 3, method="primal", checkpoint=path)
    before = path.read_bytes()
    b = np.ones(200)
    for call, reason in (
        (
            lambda: linalg.eigsh(op, 4, method="primal", checkpoint=path),
            "must belong to this problem, but its k is 3, and here it is 4",
        ),
        (
            lambda: linalg.eigsh(op, 3, "SA", method="primal", checkpoint=path),
            "its largest is True, and here it is False",
        ),
        (lambda: linalg.eigsh(op, 3, method="primal", v0=b, checkpoint=path), "its checksum of v0 is"),
        (lambda: linalg.eigsh(1.01 * op, 3, method="primal", checkpoint=path), "the operator differs"),
        (
            lambda: linalg.solve(op, b, 1.0, method="primal", checkpoint=path),
            "its solver is 'eigsh', and here it is 'solve'",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
        assert path.read_bytes() == before
    for content in (before[: len(before) // 2], before[:1000] + b"xxxx" + before[1004:], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or another file .*Move it away to start again"):
            linalg.eigsh(op, 3, method="primal", checkpoint=path)
        assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError, match="must be in a folder that exists, got .*Make the folder first"):
        linalg.eigsh(op, 3, method="primal", checkpoint=tmp_path / "none" / "state.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]


def test_a_write_that_fails_leaves_the_old_checkpoint(monkeypatch, tmp_path):
    op = slow_operator()
    path = tmp_path / "state.npz"
    with interrupted_after(monkeypatch, 30), pytest.raises(linalg.Interrupted):
        linalg.eigsh(op, 3, method="primal", checkpoint=path)
    before = path.read_bytes()

    def full(*arguments, **content):
        arguments[0].write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            linalg.eigsh(op, 3, method="primal", checkpoint=path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]


@pytest.mark.parametrize("solver", ["eigsh", "solve"])
def test_a_process_that_is_killed(solver, tmp_path):
    """Between any two instructions: what is on disk is a whole state or none, and leads to the same result."""
    path = tmp_path / "state.npz"
    b = np.random.default_rng(0).standard_normal(200)

    def run(**options):
        if solver == "eigsh":
            return linalg.eigsh(slow_operator(), 12, method="primal", ncv=26, **options).eigenvectors
        return linalg.solve(slow_operator(), b, 1e-7, method="primal", rtol=1e-13, **options).x

    whole = run()
    generator = np.random.default_rng(0)
    for _ in range(4):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=solve_with_checkpoint, args=(solver, str(path), theirs))
        process.start()
        assert ours.recv() == "started"
        time.sleep(generator.uniform(0.0, 0.1))
        process.kill()
        process.join()
    leftovers = [p for p in tmp_path.iterdir() if p != path]
    assert all(p.name.startswith(".state.npz-") for p in leftovers)  # of writes that were cut off
    np.testing.assert_array_equal(run(checkpoint=path), whole)


@pytest.mark.parametrize("kind", ["random", "clustered", "multiple", "badly scaled", "deficient", "zero"])
@pytest.mark.parametrize("k", [1, 5])
def test_some_eigenpairs_of_a_large_matrix(kind, k, monkeypatch):
    """None of several equal eigenvalues is missed; random matrices need no dense decomposition."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((120, 120)))[0]
    K = torch.from_numpy((Q * np.sort(spectrum(kind, 120, rng)) ** 2) @ Q.T)
    K = (K + K.T) / 2
    decompositions = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: decompositions.append(1) or eigh(matrix))
    values, vectors = linalg.dense.top_of_matrix(K.clone(), k, 1e-14)
    expected = torch.linalg.eigvalsh(K)
    torch.testing.assert_close(values, expected[-k:], rtol=0, atol=1e-13 * float(expected[-1]) + 1e-300)
    assert (K @ vectors - vectors * values).norm() <= 1e-12 * expected[-1]
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    if kind in ("random", "badly scaled"):
        assert not decompositions


# ---- What a review found ------------------------------------------------------------------------------------


def in_lines_of(module, number):
    """Trace that raises KeyboardInterrupt before the n-th line that is run in a module."""
    count = [0]

    def trace(frame, event, _):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("number", [*range(1, 60, 3), *range(400, 3000, 137)])
def test_an_interrupt_at_any_line(number, tmp_path):
    op = slow_operator()
    whole = linalg.eigsh(op, 3, method="primal")
    path = tmp_path / "state.npz"
    before = sys.gettrace()
    sys.settrace(in_lines_of(linalg.lanczos, number))
    try:
        linalg.eigsh(op, 3, method="primal", checkpoint=path)
    except linalg.Interrupted as interrupt:
        result = interrupt.result
    except KeyboardInterrupt:  # before there was anything
        result = None
    else:
        pytest.fail("no interrupt")
    finally:
        sys.settrace(before)
    if result is not None and len(result.eigenvalues):
        vectors = result.eigenvectors
        residuals = np.linalg.norm(op @ vectors - vectors * result.eigenvalues, axis=0)
        np.testing.assert_allclose(result.residuals, residuals, rtol=1e-6, atol=1e-12)
    resumed = linalg.eigsh(op, 3, method="primal", checkpoint=path)
    np.testing.assert_array_equal(resumed.eigenvectors, whole.eigenvectors)
    assert resumed.products == whole.products


@pytest.mark.parametrize("method", ["dual", "dense", "primal"])
def test_an_inverse_follows_parameters(method):
    case = make_case("dense", "ce", sizes=(6, 5))
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    inverse = linalg.inv(op, 0.1, method=method, rtol=1e-9)
    b = np.random.default_rng(0).standard_normal(case.D)
    first = inverse @ b
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(1.5)
    second = inverse @ b
    assert np.abs(second - first).max() > 1e-3
    np.testing.assert_allclose(second, np.linalg.solve(dense(op) + 0.1 * np.eye(case.D), b), atol=1e-7)


def test_a_checkpoint_in_single_precision_knows_its_parameters(tmp_path):
    case = make_case("dense", "ce", sizes=(30,), dtype=torch.float32)
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    path = tmp_path / "state.npz"
    linalg.eigsh(op, 2, method="primal", checkpoint=path)
    with torch.no_grad():
        next(case.model.parameters()).mul_(1 + 1e-6)
    with pytest.raises(ValueError, match="checksum of the parameters is"):
        linalg.eigsh(op, 2, method="primal", checkpoint=path)


def test_a_regular_system_without_damping():
    G = np.random.default_rng(0).standard_normal((30, 8))
    b = np.ones(8)
    expected = np.linalg.solve(G.T @ G, b)
    op = operator(G)
    for method in ("auto", "dense", "primal"):
        np.testing.assert_allclose(linalg.solve(op, b, method=method, rtol=1e-11).x, expected, rtol=1e-8)
        np.testing.assert_allclose(linalg.inv(op, 0.0, method=method, rtol=1e-11) @ b, expected, rtol=1e-8)
    for routine in (lambda: linalg.solve(op, b, method="dual"), lambda: linalg.inv(op, 0, method="dual")):
        with pytest.raises(ValueError, match="F is singular .or Woodbury's identity has no meaning for it"):
            routine()


@pytest.mark.parametrize("method", ["dual", "dense"])
def test_inverses_are_as_good_as_they_say(method):
    G = np.random.default_rng(0).standard_normal((50, 200))
    op = operator(G, torch.float32)
    F = dense(op)
    largest = np.linalg.norm(F, 2)
    b = F @ np.random.default_rng(1).standard_normal(200)
    for ratio in (1e-2, 1e-4, 1e-5):
        A = F + ratio * largest * np.eye(200)
        x = linalg.inv(op, ratio * largest, method=method) @ b.astype(np.float32)
        assert np.linalg.norm(A @ x - b) <= 1.1e-5 * np.linalg.norm(b) + 1e-6 * largest * np.linalg.norm(x)
    with pytest.raises(
        (RuntimeError, ValueError), match="not solved to its tolerance|must make F . λI positive definite"
    ):
        linalg.inv(op, 1e-12 * largest, method=method) @ np.random.default_rng(2).standard_normal(200).astype("f4")


def test_an_inverse_is_taken_where_rounding_keeps_it_from_its_tolerance():
    X = np.random.default_rng(0).standard_normal((100, 6)) * [1, 1, 1, 1, 1, 1e-2]
    data = X.astype("f4"), X[:, :1].astype("f4")
    op = fo.FisherLinearOperator(nn.Linear(6, 1), nn.MSELoss(), data=data)
    F = op.todense().astype(float)
    damping = 1e-6
    smallest = np.linalg.eigh(F)[1][:, 0]
    x = linalg.inv(op, damping) @ smallest.astype("f4")
    np.testing.assert_allclose(
        x, np.linalg.solve(F + damping * np.eye(7), smallest), rtol=2e-2, atol=2e-2 * abs(x).max()
    )


def test_damping_below_rounding_is_not_an_error_of_solve():
    torch.manual_seed(0)
    X, y = torch.randn(20, 4), torch.randint(3, (20,))
    op = fo.FisherLinearOperator(nn.Linear(4, 3), nn.CrossEntropyLoss(), data=(X, y))
    for method in ("dense", "dual", "primal"):
        solution = linalg.solve(op, np.ones(15, "f4"), 1e-9, method=method)
        assert not solution.converged
        assert np.isfinite(solution.x).all()


@pytest.mark.parametrize("size", [1e-23, 1e-12, 1e12, 1e20, 1e25])
def test_right_hand_sides_of_any_size(size):
    op = operator(np.random.default_rng(0).standard_normal((6, 9)), torch.float32)
    b = np.ones(9, np.float32)
    expected = np.linalg.solve(dense(op) + np.eye(9), b)
    for method in WAYS:
        result = linalg.solve(op, (size * b).astype(np.float32), 1.0, method=method)
        assert result.converged
        np.testing.assert_allclose(result.x / size, expected, atol=1e-4)


@pytest.mark.parametrize("size", [1e-11, 1e11])
def test_matrices_of_any_size(size):
    op = operator(size * np.random.default_rng(0).standard_normal((6, 9)), torch.float32)
    expected = np.linalg.eigvalsh(dense(op) / size**2)
    for method in WAYS:
        values = linalg.eigsh(op, 3, method=method).eigenvalues / size**2
        np.testing.assert_allclose(values, expected[-3:], rtol=1e-4)
        norm = linalg.frobenius_norm(op, method=method, probes=200)
        error = 6 * norm.standard_error / size**2 + 1e-4
        assert norm.value / size**2 == pytest.approx(np.linalg.norm(expected), abs=error)


def test_rounding_is_not_a_dimension():
    """F of rank 10, in single precision, with damping near to the rounding of its eigenvalues."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((n, 10)))[0] for n in (1500, 300))
    op = operator(U @ V.T, torch.float32)
    for method in ("dual", "dense"):
        for damping in (1e-5, 1e-6, 1e-7):
            assert linalg.effective_dimension(op, damping, method=method).value == pytest.approx(10, rel=1e-3)
            log = linalg.slogdet(op, damping, method=method).logabsdet
            assert log == pytest.approx(10 * np.log1p(damping) + 290 * np.log(damping), abs=0.02)


@pytest.mark.parametrize("rows", [10_000, 300_000])
def test_many_equal_rows_keep_their_digits(rows):
    op = operator(np.full((rows, 2), 1.1), torch.float32)
    expected = np.full((2, 2), rows * np.float32(1.1 / 2**0.5).astype(float) ** 2 * 2)
    np.testing.assert_allclose(op.todense(), expected, rtol=1e-4)
    np.testing.assert_allclose(op.diagonal(), np.diag(expected), rtol=1e-5)
    np.testing.assert_allclose(op @ np.ones(2, np.float32), expected.sum(1), rtol=3e-4)


@pytest.mark.parametrize("options", [{"cache": "none"}, {"max_memory": 10}])
def test_data_in_an_order_that_changes(options):
    X, y = torch.randn(24, 3, dtype=torch.float64), torch.randint(3, (24,))
    loader = DataLoader(TensorDataset(X, y, torch.arange(24)), batch_size=8, shuffle=True)
    model = nn.Linear(3, 3).double()
    op = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=loader, **options)
    F = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y)).todense()
    b = np.ones(12)
    for method in ("auto", "primal"):
        np.testing.assert_allclose(linalg.eigsh(op, 2, method=method).eigenvalues, np.linalg.eigvalsh(F)[-2:])
        x = linalg.solve(op, b, 0.1, method=method, rtol=1e-10).x
        np.testing.assert_allclose(x, np.linalg.solve(F + 0.1 * np.eye(12), b), rtol=1e-7)
        assert linalg.spectral_density(op, method=method).counts.sum() <= 12 + 1e-9
    with pytest.raises(ValueError, match="the rows of the score matrix have no order"):
        linalg.eigsh(op, 2, method="dual")


@pytest.mark.parametrize(
    "context", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()]
)
def test_the_callers_contexts_do_not_reach_in(context):
    op = operator(np.random.default_rng(0).standard_normal((6, 9)), torch.float32)

    def results(method):
        pairs = linalg.eigsh(op, 2, method=method), linalg.eigsh(op, 2, "SM", method=method)
        yield from (pair.eigenvalues for pair in pairs)
        yield linalg.solve(op, np.ones(9), 0.1, method=method).x
        yield linalg.slogdet(op, 0.1, method=method).logabsdet
        yield linalg.spectral_density(op, np.linspace(0, 40, 5), method=method).counts
        yield linalg.frobenius_norm(op, method=method).value

    for method in WAYS:
        expected = list(results(method))
        with context:
            for result, other in zip(results(method), expected, strict=True):
                np.testing.assert_array_equal(result, other)


def test_complex_operators_are_refused():
    H = np.eye(3) + 0j
    with pytest.raises(TypeError, match="`op` must be real and symmetric, got an operator of dtype complex"):
        linalg.eigsh(aslinearoperator(H), 1)


def test_small_eigenvalues_of_many_parameters_are_not_zeros():
    """Far above the rounding of the Gram matrix, though below D · eps."""
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.standard_normal((200_000, 3)))[0]
    op = operator(np.diag([1.0, 0.9, 0.1]) @ V.T, torch.float32)
    for method in ("dual", "primal"):
        np.testing.assert_allclose(linalg.eigsh(op, 3, method=method).eigenvalues, [0.01, 0.81, 1.0], rtol=1e-3)
