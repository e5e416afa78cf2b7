"""What needs a CUDA device or CuPy itself: memory, streams, graphs and solvers. Skipped elsewhere; see test_devices.py."""

import sys

import numpy as np
import pytest
import torch
from models import make_case
from tolerances import assert_same

import fisherops as fo
from fisherops._linop import TorchLinearOperator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

D = 31
SHIFT = 0.5


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


@pytest.fixture
def linalg():
    return pytest.importorskip("cupyx.scipy.sparse.linalg")


@pytest.fixture(autouse=True)
def _full_precision():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def cuda_operator(dtype=torch.float32, loss="mse", **options):
    case = make_case("dense", loss, "sum", sizes=(9, 8), dtype=dtype)
    return fo.FisherMCLinearOperator(case.model.cuda(), case.loss, data=case.data, **options)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def op(request):
    return cuda_operator(request.param)


@pytest.fixture
def F(op):
    return op.todense().astype(np.float64)


def x_of(op, *shape):
    return np.random.default_rng(0).standard_normal((D, *shape)).astype(op.dtype)


def test_vectors_of_every_kind_come_back_where_they_came_from(op, F, cp):
    x = x_of(op)
    host = op @ x
    assert isinstance(host, np.ndarray)
    on_cuda = op @ torch.from_numpy(x).cuda()
    assert on_cuda.device.type == "cuda"
    on_cpu = op @ torch.from_numpy(x)
    assert on_cpu.device.type == "cpu"
    on_cupy = op @ cp.asarray(x)
    assert isinstance(on_cupy, cp.ndarray)
    assert on_cupy.flags.c_contiguous
    for result in (host, on_cuda.cpu().numpy(), on_cpu.numpy(), on_cupy.get()):
        assert_same(result, F @ x, op.dtype)
    for product in (lambda y: op.rdot(y), lambda y: y @ op, lambda y: op.damped(0.0) @ y, lambda y: (op + 0 * op) @ y):
        assert_same(product(cp.asarray(x)).get(), F @ x, op.dtype)


def test_a_cupy_vector_against_a_model_on_the_cpu(cp):
    case = make_case("dense", "mse", dtype=torch.float32)
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    x = cp.asarray(x_of(op))
    result = op @ x
    assert isinstance(result, cp.ndarray)
    assert_same(result.get(), op @ x_of(op), op.dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128", "int32", "bool"])
def test_dtypes_of_cupy(dtype, cp):
    op = cuda_operator()
    result = op @ cp.ones(D, dtype)
    assert result.dtype == (np.dtype(dtype) if np.dtype(dtype).kind in "fc" else op.dtype)


def test_cupy_and_torch_share_memory_at_the_door(cp):
    class Watch(TorchLinearOperator):
        def __init__(self):
            super().__init__((D, D), torch.float32, torch.device("cuda", torch.cuda.current_device()))

        def _mul(self, V):
            self.address = V.data_ptr()
            return 2 * V

    op, x = Watch(), cp.ones(D, "float32")
    result = op @ x
    assert op.address == x.data.ptr
    assert result.data.ptr != x.data.ptr


@pytest.mark.parametrize("side", ["cupy", "torch"])
def test_streams_other_than_the_default(side, op, F, cp):
    big = cuda_operator(op.torch_dtype)
    for _ in range(20):
        if side == "cupy":
            with cp.cuda.Stream(non_blocking=True) as stream:
                x = cp.asarray(x_of(op))
                x *= 2
                y = (big @ x) / 2
                del x
                scratch = cp.full(D, 7, x_of(op).dtype)
                stream.synchronize()
                assert_same(y.get(), F @ x_of(op), op.dtype)
                del scratch
        else:
            with torch.cuda.stream(torch.cuda.Stream()):
                x = torch.from_numpy(x_of(op)).cuda() * 2
                y = (big @ x) / 2
                torch.cuda.current_stream().synchronize()
            assert_same(y.cpu().numpy(), F @ x_of(op), op.dtype)


def test_cupyx_eigsh_and_svds(op, F, linalg):
    ncv = 12  # cupyx's method breaks down if F has a smaller rank
    values, vectors = linalg.eigsh(op, k=4, ncv=ncv)
    top = np.linalg.eigvalsh(F)[-4:]
    tolerance = 500 * np.finfo(op.dtype).eps * top[-1]
    np.testing.assert_allclose(np.sort(values.get()), top, atol=tolerance)
    assert np.linalg.norm(F @ vectors.get() - vectors.get() * values.get(), axis=0).max() <= tolerance
    singular = linalg.svds(op, k=3, ncv=ncv, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(singular.get()), top[-3:], atol=10 * np.sqrt(np.finfo(op.dtype).eps) * top[-1])


@pytest.mark.parametrize("solver", ["cg", "cgs", "gmres", "minres", "lsmr"])
@pytest.mark.parametrize("view", [False, True])
def test_cupyx_linear_systems(op, F, linalg, cp, solver, view):
    damped = op.damped(SHIFT)
    A = damped.to_cupy() if view else damped
    b = cp.asarray(x_of(op))
    x = getattr(linalg, solver)(A, b)[0].get()
    dense = F + SHIFT * np.eye(D)
    residual = np.linalg.norm(dense @ x - x_of(op))
    assert residual <= 1e-3 * (np.linalg.norm(dense) * np.linalg.norm(x) + np.linalg.norm(x_of(op)))


@pytest.mark.parametrize("view", [False, True])
def test_cupyx_lobpcg(op, F, linalg, cp, view):
    X = cp.asarray(x_of(op, 3))
    values, _ = linalg.lobpcg(op.to_cupy() if view else op, X, maxiter=200, largest=True)
    np.testing.assert_allclose(np.sort(values.get()), np.linalg.eigvalsh(F)[-3:], rtol=1e-3)


def test_to_cupy_combines_with_cupyx_operators(op, F, linalg, cp):
    combined = 2 * op.to_cupy() + linalg.aslinearoperator(cp.eye(D, dtype=op.dtype))
    assert_same((combined @ cp.asarray(x_of(op))).get(), 2 * F @ x_of(op) + x_of(op), op.dtype)


def test_cupy_is_not_imported_by_torch_vectors(op):
    if "cupy" not in sys.modules:
        op @ torch.from_numpy(x_of(op)).cuda()
        assert "cupy" not in sys.modules


@pytest.mark.parametrize("method", ["dual", "dense", "primal"])
def test_linear_algebra(op, F, cp, method):
    tolerance = 100 * np.finfo(op.dtype).eps ** (0.5 if method == "primal" else 1) * np.linalg.norm(F, 2)
    pairs = fo.linalg.eigsh(op, 3, method=method, like=cp.ones(1))
    assert isinstance(pairs.eigenvectors, cp.ndarray)
    np.testing.assert_allclose(pairs.eigenvalues.get(), np.linalg.eigvalsh(F)[-3:], atol=tolerance)
    b = x_of(op)
    result = fo.linalg.solve(op, cp.asarray(b), SHIFT, method=method)
    assert isinstance(result.x, cp.ndarray)
    assert result.converged
    expected = np.linalg.solve(F + SHIFT * np.eye(D), b)
    np.testing.assert_allclose(result.x.get(), expected, atol=1e-3 * np.abs(expected).max())
    log = fo.linalg.slogdet(op, SHIFT, method=method)
    assert abs(log.logabsdet - np.linalg.slogdet(F + SHIFT * np.eye(D))[1]) <= 6 * log.standard_error + 1e-2
    assert fo.linalg.spectral_density(op, method=method).counts.sum() <= D + 1e-6


def test_the_score_matrix(op, F, cp):
    v = cp.asarray(x_of(op))
    Gv = op.scores @ v
    assert isinstance(Gv, cp.ndarray)
    assert_same((op.scores.T @ Gv).get(), F @ v.get(), op.dtype)
    G = op.scores.todense()
    assert_same(op.scores.gram(), G @ G.T, op.dtype)


def test_a_warm_product_is_captured_by_a_graph(op, F):
    x = torch.from_numpy(x_of(op)).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            op @ x
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op @ x
    x.mul_(2)
    graph.replay()
    assert_same(y.cpu().numpy(), 2 * F @ x_of(op), op.dtype)


def test_a_warm_product_does_not_wait(op):
    x = torch.from_numpy(x_of(op)).cuda()
    op @ x
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op @ x
        op @ x
    finally:
        torch.cuda.set_sync_debug_mode(before)
