"""SciPy's solvers run on the operator as on any other and agree with the dense matrix."""

import inspect

import numpy as np
import pytest
import torch
from models import make_case
from scipy.linalg import expm
from scipy.sparse.linalg import (
    LinearOperator,
    bicgstab,
    cg,
    eigs,
    eigsh,
    expm_multiply,
    gmres,
    lgmres,
    lobpcg,
    lsmr,
    lsqr,
    minres,
    onenormest,
    svds,
)

import fisherops as fo

DTYPES = [torch.float32, torch.float64]
LAMBDA = 0.3


COMPOSITES = {
    # as an operator, and as a dense matrix; all symmetric and positive semi-definite
    "plain": (lambda op: op, lambda F, eye: F),
    "damped": (lambda op: op.damped(LAMBDA), lambda F, eye: F + LAMBDA * eye),
    "sum": (lambda op: 0.5 * op + op.T / 4, lambda F, eye: 0.75 * F),
    "product": (lambda op: (op @ op) / 50, lambda F, eye: F @ F / 50),
}


@pytest.fixture(params=DTYPES, ids=["float32", "float64"], scope="module")
def fisher(request):
    case = make_case("dense", "mse", "sum", sizes=(9, 8), dtype=request.param)
    return fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, mc_samples=4)


@pytest.fixture(params=COMPOSITES, scope="module")
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def op(fisher, kind):
    return COMPOSITES[kind][0](fisher)


@pytest.fixture(scope="module")
def F(fisher, kind):
    return COMPOSITES[kind][1](fisher.todense().astype(np.float64), np.eye(fisher.shape[0]))


@pytest.fixture(scope="module")
def b(op, F):
    """A right-hand side in the range of F, so that systems with a singular F have solutions."""
    return (F @ np.random.default_rng(0).standard_normal(op.shape[0])).astype(op.dtype)


def root_eps(op):
    """Accuracy that iterative solvers are asked for."""
    return float(np.sqrt(np.finfo(op.dtype).eps))


def check_eigenpairs(op, F, values, vectors):
    """Residuals ‖Fv − λv‖ and values are as good as the precision allows."""
    expected = np.sort(np.linalg.eigvalsh(F))[::-1][: len(values)]
    tolerance = 500 * np.finfo(op.dtype).eps * expected[0]
    np.testing.assert_allclose(np.sort(values.real)[::-1], expected, atol=tolerance, rtol=0)
    residuals = np.linalg.norm(F @ vectors - vectors * values, axis=0)
    assert residuals.max() <= tolerance


def test_eigsh(op, F):
    values, vectors = eigsh(op, k=4)
    assert vectors.dtype == op.dtype
    check_eigenpairs(op, F, values, vectors)


def test_eigsh_of_the_other_end(op, F):
    values = eigsh(LAMBDA * (-op), k=2, which="SA", return_eigenvectors=False)
    expected = -LAMBDA * np.linalg.eigvalsh(F)[-1:-3:-1]
    np.testing.assert_allclose(np.sort(values), expected, atol=500 * np.finfo(op.dtype).eps * abs(expected[0]))


def test_eigs(op, F):
    values, vectors = eigs(op, k=4)
    check_eigenpairs(op, F, values, vectors)


def test_lobpcg(op, F):
    X = np.random.default_rng(0).standard_normal((op.shape[0], 4)).astype(op.dtype)
    values, vectors = lobpcg(op, X, largest=True, maxiter=200, tol=300 * np.finfo(op.dtype).eps * np.linalg.norm(F, 2))
    check_eigenpairs(op, F, values, vectors)


@pytest.mark.parametrize("solver", ["arpack", "lobpcg", "propack"])
def test_svds(op, F, solver):
    expected = np.sort(np.linalg.svd(F, compute_uv=False))[::-1][:4]
    # lobpcg takes an absolute tolerance, for FᵀF
    tol = root_eps(op) * expected[0] ** 2 if solver == "lobpcg" else 0
    seed = "rng" if "rng" in inspect.signature(svds).parameters else "random_state"  # before SciPy 1.15
    U, S, Vt = svds(op, k=4, solver=solver, tol=tol, maxiter=100, **{seed: np.random.default_rng(0)})
    np.testing.assert_allclose(np.sort(S)[::-1], expected, atol=4 * root_eps(op) * expected[0])
    np.testing.assert_allclose(U * S @ Vt @ Vt.T, F @ Vt.T, atol=4 * root_eps(op) * expected[0])


SOLVERS = {
    "cg": lambda A, b, tol: cg(A, b, rtol=tol, atol=0, maxiter=500),
    "minres": lambda A, b, tol: minres(A, b, rtol=tol, maxiter=500),
    "gmres": lambda A, b, tol: gmres(A, b, rtol=tol, atol=0, restart=40, maxiter=50),
    "lgmres": lambda A, b, tol: lgmres(A, b, rtol=tol, atol=0, maxiter=200),
    # Its residuals stagnate just above a tenth of the tolerance for F² as a dense matrix too (condition number 6e8).
    "bicgstab": lambda A, b, tol: bicgstab(A, b, rtol=10 * tol, atol=0, maxiter=500),
    "lsmr": lambda A, b, tol: (lsmr(A, b, atol=tol, btol=tol, maxiter=500)[0], 0),
    "lsqr": lambda A, b, tol: (lsqr(A, b, atol=tol, btol=tol, iter_lim=500)[0], 0),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # SciPy's lsmr, any float32 operator
@pytest.mark.parametrize("solver", SOLVERS)
def test_linear_systems(op, F, b, solver):
    tolerance = root_eps(op)
    x, info = SOLVERS[solver](op, b, tolerance / 10)
    assert info == 0
    residual = np.linalg.norm(F @ x - b)
    # What the stopping rules that ask least (minres, lsmr, lsqr) promise is a small backward error, by estimates of ‖F‖
    # that may be several times too large; hence the tenth above.
    scale = np.linalg.norm(F) * np.linalg.norm(x) + np.linalg.norm(b)
    assert residual <= (2 * tolerance + 100 * np.finfo(op.dtype).eps) * scale


def test_expm_multiply(op, F, b):
    scaled = op * (-1 / np.linalg.norm(F, 2))
    dense = expm(-F / np.linalg.norm(F, 2))
    trace = -np.trace(F) / np.linalg.norm(F, 2)
    for B in (b, np.stack([b, -b], axis=1)):
        result = expm_multiply(scaled, B, traceA=trace)
        np.testing.assert_allclose(result, dense @ B, atol=500 * np.finfo(op.dtype).eps * np.abs(B).max())


def test_onenormest(op, F):
    # t = D makes the estimate exact
    estimate = onenormest(op, t=op.shape[0])
    expected = np.abs(F).sum(axis=0).max()
    assert abs(estimate - expected) <= 500 * np.finfo(op.dtype).eps * expected


def test_arpack_runs_in_the_precision_of_the_operator(op):
    """SciPy picks ARPACK's precision from op.dtype; a wrong one costs products or fails to converge."""
    seen = set()

    class Watch(LinearOperator):
        def __init__(self):
            super().__init__(op.dtype, op.shape)

        def _matvec(self, x):
            seen.add(x.dtype)
            return op @ x

    eigsh(Watch(), k=2)
    assert seen == {op.dtype}
