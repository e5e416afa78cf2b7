"""The solvers of cupyx itself over the stand-in for CuPy; `bash .ci/cupyx` gets the wheel that they are read from."""

import cupy_stand_in
import cupyx_wheel
import numpy as np
import pytest
import simulated
import torch
from models import make_case
from tolerances import assert_same

import fisherops as fo

pytestmark = pytest.mark.skipif(cupyx_wheel.found() is None, reason="needs a wheel of CuPy: run `bash .ci/cupyx`")

DEVICE = torch.device("sim", 0)
D, SHIFT = 31, 0.5


@pytest.fixture
def cp(monkeypatch):
    simulated.register()
    with cupy_stand_in.installed(monkeypatch) as cupy:
        yield cupy


@pytest.fixture
def theirs(cp):
    with cupyx_wheel.installed(cp) as module:
        assert module.cg is not cupy_stand_in.cg
        yield module


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def op(request):
    case = make_case("dense", "ce", sizes=(9, 8), dtype=request.param)
    return fo.FisherMCLinearOperator(simulated.moved(case.model, DEVICE), case.loss, data=case.data)


@pytest.fixture
def F(op):
    return op.todense().astype(np.float64)


def x_of(op, *shape):
    return np.random.default_rng(0).standard_normal((op.shape[1], *shape)).astype(op.dtype)


SOLVERS = {
    "cg": {"rtol": 1e-6},
    "cgs": {"rtol": 1e-6},
    "bicgstab": {"rtol": 1e-6},
    "gmres": {"rtol": 1e-6},
    "minres": {"tol": 1e-6},
    "lsmr": {"atol": 1e-7, "btol": 1e-7},
}


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_linear_systems(solver, wraps, op, F, cp, theirs):
    A, b = op.damped(SHIFT), x_of(op)
    result = getattr(theirs, solver)(A.to_cupy() if wraps else A, cp.asarray(b), **SOLVERS[solver])
    x, dense = result[0].get(), F + SHIFT * np.eye(D)
    assert np.linalg.norm(dense @ x - b) <= 1e-5 * (np.linalg.norm(dense, 2) * np.linalg.norm(x) + np.linalg.norm(b))
    assert result[1] in ((1, 2) if solver == "lsmr" else (0,))  # converged


@pytest.mark.parametrize("wraps", [False, True])
def test_eigenvalues(wraps, op, F, cp, theirs):
    A = op.to_cupy() if wraps else op
    top = np.linalg.eigvalsh(F)[-3:]
    values, vectors = theirs.eigsh(A, k=3, ncv=12)  # cupyx's method breaks down if F has a smaller rank
    np.testing.assert_allclose(values.get(), top, rtol=1e-4)
    assert_same(F @ vectors.get(), vectors.get() * values.get(), op.dtype, 1000)
    values, _ = theirs.lobpcg(A, cp.asarray(x_of(op, 3)), maxiter=200, largest=True, tol=1e-5)
    np.testing.assert_allclose(np.sort(values.get()), top, rtol=1e-3)
    values = theirs.svds(A, k=3, ncv=12, return_singular_vectors=False).get()
    np.testing.assert_allclose(np.sort(values), top, rtol=1e-3)


def test_operators_combine_with_those_of_cupyx(op, F, cp, theirs):
    view, x, X = op.to_cupy(), x_of(op), x_of(op, 3)
    assert isinstance(view, theirs.LinearOperator)
    combined = 2 * view + theirs.aslinearoperator(cp.asarray(np.eye(D, dtype=op.dtype)))
    for A, dense in ((view, F), (view.T, F), (view.H, F), (view @ view, F @ F), (combined, 2 * F + np.eye(D))):
        assert_same((A @ cp.asarray(x)).get(), dense @ x, op.dtype, 1000)
        assert_same((A @ cp.asarray(X)).get(), dense @ X, op.dtype, 1000)
    G = op.scores.to_cupy()
    assert_same(G.rmatvec(G.matvec(cp.asarray(x))).get(), F @ x, op.dtype, 1000)


def test_a_solver_takes_no_array_of_numpy(op, theirs):
    with pytest.raises((TypeError, AttributeError)):
        theirs.cg(op.damped(SHIFT), x_of(op))
