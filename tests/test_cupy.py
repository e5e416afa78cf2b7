"""Arrays of CuPy, rehearsed with a strict stand-in over the simulated accelerator."""

import cupy_stand_in
import numpy as np
import pytest
import simulated
import torch
from cupy_stand_in import CUPY_STREAM, TORCH_STREAM
from models import make_case
from tolerances import assert_same

import fisherops as fo
from fisherops import linalg
from fisherops._linop import TorchLinearOperator

simulated.register()
DEVICE = torch.device("sim", 0)
D, SHIFT = 31, 0.5


@pytest.fixture
def cp(monkeypatch):
    with cupy_stand_in.installed(monkeypatch) as cupy:
        yield cupy


def operator(dtype=torch.float64, device=DEVICE, **options):
    case = make_case("dense", "ce", dtype=dtype)
    return fo.FisherMCLinearOperator(simulated.moved(case.model, device), case.loss, data=case.data, **options)


def x_of(*shape, dtype=np.float64):
    return np.random.default_rng(0).standard_normal((D, *shape)).astype(dtype)


@pytest.fixture(scope="module")
def F():
    return operator(device="cpu").todense()


def test_the_stand_in_is_strict(cp):
    x = cp.asarray(np.ones(3))
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array"):
        np.asarray(x)
    with pytest.raises(TypeError, match=r"Implicit conversion|Unsupported type|not supported|operand"):
        x + np.ones(3)
    assert x.__cuda_array_interface__["data"][0] == x.data.ptr
    assert isinstance(x.get(), np.ndarray)


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_what_enters_from_cupy_leaves_to_cupy(shape, F, cp):
    op, x = operator(), x_of(*shape)
    products = {
        "op @ x": (lambda y: op @ y, F),
        "rdot": (lambda y: op.rdot(y.T if y.ndim > 1 else y), F),
        "damped": (lambda y: op.damped(SHIFT) @ y, F + SHIFT * np.eye(D)),
        "composite": (lambda y: (op + 0.5 * op @ op) @ y, F + 0.5 * F @ F),
        "x @ op": (lambda y: (y.T if y.ndim > 1 else y) @ op, F),
    }
    for name, (product, matrix) in products.items():
        result = product(cp.asarray(x))
        assert isinstance(result, cp.ndarray), name
        assert result.flags.c_contiguous
        expected = matrix @ x
        assert_same(result.get(), expected.T if name in ("rdot", "x @ op") else expected, torch.float64)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128", "int32", "bool"])
def test_dtypes(dtype, cp):
    op = operator(torch.float32)
    result = op @ cp.asarray(np.ones(D, dtype))
    assert result.dtype == (np.dtype(dtype) if np.dtype(dtype).kind in "fc" else op.dtype)


class Watch(TorchLinearOperator):
    def __init__(self):
        super().__init__((D, D), torch.float32, DEVICE)

    def _mul(self, V):
        self.address = V.data_ptr()
        return 2 * V


def test_memory_is_shared_on_the_way_in_and_out(cp):
    op, x = Watch(), cp.asarray(np.ones(D, np.float32))
    with simulated.watched() as log:
        result = op @ x
    assert op.address == x.data.ptr
    assert result.data.ptr != x.data.ptr
    assert not log.waits
    assert all(nbytes <= 16 for _, nbytes, _ in log.copies)  # flags alone


def test_streams(cp):
    """torch passes its stream to CuPy's array, and the memory of a result is recorded on the stream that reads it."""
    op = Watch()
    result = op @ cp.asarray(np.ones(D, np.float32))
    assert cupy_stand_in.to_torch == [TORCH_STREAM]
    assert cupy_stand_in.to_cupy == [CUPY_STREAM]
    assert cupy_stand_in.recorded == [(result.data.ptr, CUPY_STREAM, DEVICE)]


def test_reversed_arrays_are_copied(F, cp):
    x = x_of()

    class Reversed(cp.ndarray):
        strides = property(lambda self: (-8,))

    y = Reversed(torch.from_numpy(x).to(DEVICE))
    assert_same((operator() @ y).get(), F @ x, torch.float64)


def test_a_model_on_the_host(F, cp):
    """A torch without CUDA imports no array of CuPy, which then goes by the host."""
    op, x = operator(device="cpu"), x_of()
    result = op @ cp.asarray(x)
    assert isinstance(result, cp.ndarray)
    assert_same(result.get(), F @ x, torch.float64)

    class Refusing(cp.ndarray):
        def __dlpack__(self, **_):
            raise RuntimeError("no CUDA")

    assert isinstance(op @ Refusing(torch.from_numpy(x).to(DEVICE)), cp.ndarray)


def test_results_that_are_not_finite(cp):
    op = operator(torch.float32)
    fo._torch._pending.clear()
    with simulated.lag(0):
        op.damped(1e30) @ cp.asarray(np.full(D, 1e30, np.float32))
        with pytest.raises(FloatingPointError, match="must be finite"):
            op @ cp.asarray(np.ones(D, np.float32))
    fo._torch._pending.clear()


def test_numbers_of_cupy_are_scalars(F, cp):
    op = operator()
    alpha = cp.generic(torch.tensor(2.0, dtype=torch.float64).to(DEVICE))
    assert_same((op * alpha) @ x_of(), 2 * F @ x_of(), torch.float64)


def test_data_of_cupy(F, cp):
    case = make_case("dense", "ce")
    data = [(cp.asarray(X.numpy()), cp.asarray(y.numpy())) for X, y in case.data]
    op = fo.FisherMCLinearOperator(simulated.moved(case.model, DEVICE), case.loss, data=data)
    assert_same(op.todense(), F, torch.float64)


def test_to_cupy(F, cp):
    from cupyx.scipy.sparse import linalg as theirs

    op = operator()
    view, x, X = op.to_cupy(), x_of(), x_of(3)
    assert isinstance(view, theirs.LinearOperator)
    assert view.shape == op.shape
    assert view.dtype == op.dtype
    for product in (view.matvec, view.rmatvec):
        assert_same(product(cp.asarray(x)).get(), F @ x, torch.float64)
    for product in (view.matmat, view.rmatmat):
        assert_same(product(cp.asarray(X)).get(), F @ X, torch.float64)
    combined = 2 * view + theirs.aslinearoperator(cp.asarray(np.eye(D)))
    assert_same((combined @ cp.asarray(x)).get(), 2 * F @ x + x, torch.float64)
    G = op.scores
    w = np.ones(G.shape[0])
    assert_same(G.to_cupy().rmatvec(cp.asarray(w)).get(), (G.T @ w), torch.float64)


@pytest.mark.parametrize("wraps", [False, True])
def test_a_solver_of_cupyx(wraps, F, cp):
    from cupyx.scipy.sparse import linalg as theirs

    A = operator().damped(SHIFT)
    x = theirs.cg(A.to_cupy() if wraps else A, cp.asarray(x_of()))
    assert_same(x.get(), np.linalg.solve(F + SHIFT * np.eye(D), x_of()), torch.float32)


@pytest.mark.parametrize("method", ["dual", "dense", "primal"])
def test_linear_algebra(method, F, cp):
    op, b = operator(), x_of()
    pairs = linalg.eigsh(op, 3, method=method, like=cp.asarray(np.ones(1)))
    assert isinstance(pairs.eigenvectors, cp.ndarray)
    np.testing.assert_allclose(pairs.eigenvalues.get(), np.linalg.eigvalsh(F)[-3:], rtol=1e-8)
    solved = linalg.solve(op, cp.asarray(b), SHIFT, method=method, rtol=1e-9)
    assert isinstance(solved.x, cp.ndarray)
    assert_same(solved.x.get(), np.linalg.solve(F + SHIFT * np.eye(D), b), torch.float32)
