"""Any array in, the same kind out."""

import os
import subprocess
import sys
import textwrap

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from libraries import JAX, LIBRARIES, NUMPY, STRICT, TORCH
from models import make_case
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from test_linop import EXPRESSIONS, MATRIX_PRODUCTS, VECTOR_PRODUCTS, Matrix, dense_product
from tolerances import assert_same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fisherops as fo
from fisherops import _arrays
from fisherops._linop import TorchLinearOperator

D = 31


def operator(dtype=torch.float32):
    case = make_case("dense", "mse", dtype=dtype)
    return fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)


OPERATORS = {dtype: operator(dtype) for dtype in (torch.float32, torch.float64)}
MATRICES = {dtype: op.todense() for dtype, op in OPERATORS.items()}


@pytest.fixture(params=list(OPERATORS), ids=["float32", "float64"])
def op(request):
    return OPERATORS[request.param]


@pytest.fixture
def F(op):
    return MATRICES[op.torch_dtype]


def x_of(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((D, *shape)).astype(dtype)


def check_result(result, library, expected, dtype):
    """Library, dtype and numbers; the caller's own, contiguous and writable."""
    assert isinstance(result, library.array_type)
    numbers = library.read(result)
    assert numbers.dtype == dtype
    assert_same(numbers, expected, np.float32 if dtype.itemsize < 8 or dtype == np.complex64 else dtype, 10_000)
    if library is TORCH:
        assert result.is_contiguous()
        assert not result.requires_grad
    else:
        assert numbers.flags.c_contiguous
    if library is NUMPY:
        assert result.flags.writeable


# ---- Every library, every product ------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
@pytest.mark.parametrize("name", VECTOR_PRODUCTS)
def test_products_with_vectors(op, F, name, library):
    if name.startswith("x ") and not library.left_product:
        with pytest.raises(TypeError):  # array-api-strict does not let others answer; op.rdot(x) does
            VECTOR_PRODUCTS[name](op, library.make(x_of()))
        return
    result = VECTOR_PRODUCTS[name](op, library.make(x_of()))
    check_result(result, library, dense_product(name, F, x_of()), np.dtype(np.float32))
    assert result.shape == (D,)


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
@pytest.mark.parametrize("K", [0, 1, 3])
@pytest.mark.parametrize("name", MATRIX_PRODUCTS)
def test_products_with_matrices(op, F, name, K, library):
    X = library.make(x_of(K))
    if name in ("rdot", "x @"):
        if name == "x @" and not library.left_product:
            return
        result = op.rdot(X.T) if name == "rdot" else X.T @ op
        check_result(result, library, (F.T @ x_of(K)).T, np.dtype(np.float32))
    else:
        result = MATRIX_PRODUCTS[name](op, X)
        check_result(result, library, dense_product(name, F, x_of(K)), np.dtype(np.float32))


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_algebra(name, library):
    A, B = (np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32) for seed in (0, 1))
    ours, dense = EXPRESSIONS[name]
    composite = ours(Matrix(torch.from_numpy(A)), Matrix(torch.from_numpy(B)), None)
    expected = dense(A, B, np.eye(4, dtype=np.float32))
    X = np.random.default_rng(2).standard_normal((4, 2)).astype(np.float32)
    check_result(composite @ library.make(X), library, expected @ X, np.dtype(np.float32))
    check_result(composite.rdot(library.make(X.T)), library, X.T @ expected, np.dtype(np.float32))
    check_result(composite.H @ library.make(X), library, expected.T @ X, np.dtype(np.float32))


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
@pytest.mark.parametrize("number", [2, 2.5, True, 1.5 - 0.5j])
def test_scalars_may_be_arrays_without_axes(library, number):
    A = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    op, alpha = Matrix(torch.from_numpy(A)), library.make(np.asarray(number))
    dtype = np.complex64 if isinstance(number, complex) else np.float32
    for scaled in (op * alpha, op.rdot(alpha), op.dot(alpha)):
        assert scaled.dtype == dtype
        assert_same(scaled.todense(), A * number, np.float32, 10)
    assert_same((op / alpha).todense(), A / number, np.float32, 10)
    if library.left_product:
        assert_same((alpha * op).todense(), A * number, np.float32, 10)
    if not isinstance(number, complex):
        assert_same(op.damped(alpha).todense(), A + number * np.eye(4), np.float32, 10)


DTYPES = {
    NUMPY: ["bool", "int8", "uint16", "uint64", "int64", "float16", "float32", "float64", "longdouble", "complex64",
            "complex128", "clongdouble"],
    TORCH: ["bool", "int8", "uint8", "int64", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"],
    STRICT: ["bool", "int8", "uint16", "uint64", "int64", "float32", "float64", "complex64", "complex128"],
    JAX: ["bool", "int8", "uint16", "int32", "float16", "bfloat16", "float32", "complex64"],
}  # fmt: skip
NAMESPACES = {NUMPY: np, TORCH: torch, STRICT: array_api_strict, JAX: jnp}


@pytest.mark.parametrize(("library", "name"), [(lib, name) for lib in LIBRARIES for name in DTYPES[lib]], ids=str)
def test_the_result_has_the_dtype_of_an_inexact_input_and_else_that_of_the_operator(op, F, library, name):
    dtype = getattr(NAMESPACES[library], name)
    ones = NAMESPACES[library].ones(D, dtype=dtype)
    result = op @ ones
    assert isinstance(result, library.array_type)
    inexact = "float" in name or "complex" in name or "double" in name
    if inexact:
        assert result.dtype == dtype
    else:  # JAX has no float64 unless it is switched on
        assert str(result.dtype).split(".")[-1] == ("float32" if library is JAX else str(op.dtype))
    numbers = np.asarray(result.float() if name == "bfloat16" and library is TORCH else library.read(result))
    eps = {"float16": np.float16, "bfloat16": 2.0**-8}.get(name, np.float32)
    eps = eps if isinstance(eps, float) else float(np.finfo(eps).eps)
    assert np.abs(numbers.astype(complex) - F.sum(1)).max() <= 100 * eps * np.abs(F).max() * 5


def test_float64_input_to_a_float32_operator_is_accurate_to_float32():
    op, F = OPERATORS[torch.float32], MATRICES[torch.float32]
    x = x_of(dtype=np.float64)
    error = np.abs(op @ x - F.astype(float) @ x).max() / np.abs(F @ x).max()
    assert (op @ x).dtype == np.float64
    assert 1e-12 < error < 1e-5


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
def test_a_real_vector_on_a_complex_operator_keeps_its_precision(op, F, library):
    for dtype in ("float32", "float64"):
        if library is JAX and dtype == "float64":
            continue
        result = (1j * op) @ library.make(x_of(dtype=np.dtype(dtype)))
        assert library.read(result).dtype == (np.complex128 if dtype == "float64" else np.complex64)
        assert_same(library.read(result), 1j * (F @ x_of(dtype=np.dtype(dtype))), np.float32)


def test_integers_take_the_dtype_of_a_product_of_mixed_precisions():
    low, high = Matrix(torch.randn(4, 4)), Matrix(torch.randn(4, 4).double())
    for product in (low @ high, high @ low, (low @ high).T, low @ ((1 + 1j) * high)):
        assert (product @ np.ones(4, int)).dtype == product.dtype
        assert (product @ np.ones((4, 0), int)).dtype == product.dtype


def test_arrays_with_negative_strides_of_any_library():
    op = Watch(torch.float32)
    for x in (STRICT.make(x_of())[::-1], array_api_strict.flip(STRICT.make(x_of(2))), JAX.make(x_of())[::-1]):
        result = op @ x
        library = STRICT if isinstance(x, STRICT.array_type) else JAX
        np.testing.assert_array_equal(library.read(result), 2 * np.asarray(library.read(x)))


def test_a_foreign_operator_that_writes_into_its_input_reaches_nobody_else(op, F):
    class Doubling(LinearOperator):
        def __init__(self):
            super().__init__(np.float32, (D, D))

        def _matmat(self, X):
            X *= 2
            return X

    x = x_of()
    x.flags.writeable = False
    assert_same((op + Doubling() + op) @ x, 2 * F @ x + 2 * x, np.float32)
    np.testing.assert_array_equal(x, x_of())
    assert_same((op @ aslinearoperator(np.eye(D, dtype="g"))) @ x, F @ x, np.float32)


def test_extended_precision_scalars(op):
    assert (op * np.longdouble(2)).dtype == op.dtype
    assert_same((op * np.clongdouble(2j)).todense(), 2j * op.todense(), np.float32)
    with pytest.raises(TypeError, match="`damping` must be a real number"):
        op.damped(np.clongdouble(1 + 1j))
    assert (op * nn.Parameter(torch.tensor(2.0))).dtype == op.dtype


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
def test_the_input_is_only_read_and_never_kept(op, library):
    x = library.make(x_of())
    first = op @ x
    np.testing.assert_array_equal(library.read(x), x_of())
    if library.writable:
        x[:] = float("nan")
        np.testing.assert_array_equal(library.read(first), library.read(op @ library.make(x_of())))
        first[:] = float("nan")
    np.testing.assert_array_equal(library.read(op @ library.make(x_of())), op @ x_of())


# ---- No copy at the door -----------------------------------------------------------------------------


class Watch(TorchLinearOperator):
    """Notes the address of what it is to multiply."""

    def __init__(self, dtype):
        super().__init__((D, D), dtype, torch.device("cpu"))
        self.addresses = []

    def _mul(self, V):
        self.addresses.append(V.data_ptr())
        return 2 * V


@pytest.mark.parametrize("K", [None, 1, 4])
@pytest.mark.parametrize("library", LIBRARIES, ids=str)
def test_vectors_of_the_right_dtype_share_memory_with_what_is_computed(library, K):
    op = Watch(torch.float32)
    x = library.make(x_of() if K is None else x_of(K))
    result = op @ x
    assert op.addresses == [library.pointer(x)]
    assert library.pointer(result) != library.pointer(x)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[::-1], lambda x: x.astype(">f4"), lambda x: x.astype(np.float64)],
    ids=["reversed", "swapped", "f8"],
)
def test_layouts_that_cannot_be_shared_are_copied(change):
    op = Watch(torch.float32)
    x = change(x_of())
    np.testing.assert_allclose(op @ x, 2 * x)
    assert op.addresses != [NUMPY.pointer(x)]


def test_read_only_strided_and_transposed_arrays_are_shared():
    op = Watch(torch.float32)
    read_only = x_of()
    read_only.flags.writeable = False
    for x in (
        read_only,
        np.zeros((D, 2), np.float32)[:, 1],
        np.zeros((2, D), np.float32).T,
        np.broadcast_to(x_of(1), (D, 3)),
    ):
        op @ x
        assert op.addresses.pop() == NUMPY.pointer(x)


# ---- What is refused ---------------------------------------------------------------------------------


def test_a_tracer_of_jax_gets_an_error_with_the_mend(op):
    for use in (lambda v: op @ v, lambda v: op.rdot(v), lambda v: op * v[0], lambda v: op.damped(v[0])):
        with pytest.raises(TypeError, match=r"got a JAX tracer.*jax.pure_callback"):
            jax.jit(use)(jnp.ones(D))
    result = jax.jit(
        lambda v: jax.pure_callback(
            lambda w: np.asarray(op @ np.asarray(w)), jax.ShapeDtypeStruct((D,), jnp.float32), v
        )
    )(jnp.ones(D))
    assert_same(np.asarray(result), op @ np.ones(D, np.float32), np.float32)


def test_a_dask_array_gets_an_error_with_the_mend(op):
    import dask.array

    with pytest.raises(TypeError, match=r"got a dask array.*`x.compute\(\)`"):
        op @ dask.array.ones(D)
    assert isinstance(op @ dask.array.ones(D).compute(), np.ndarray)


def test_a_tensor_without_values_is_refused(op):
    with FakeTensorMode():
        fake = torch.ones(D)
    with pytest.raises(TypeError, match="got a FakeTensor tensor. Pass a dense tensor with values"):
        op @ fake
    assert_same(op @ nn.Parameter(torch.ones(D)), op @ np.ones(D), np.float32)


def test_sequences_of_unequal_lengths_are_refused(op):
    with pytest.raises(ValueError, match="must be rectangular, got builtins.list .*sequences of equal lengths"):
        op @ [[1, 2], [3]]


def test_int4_of_jax_is_refused_with_its_dtype(op):
    with pytest.raises(TypeError, match="of dtype int4, which torch cannot import"):
        op @ jnp.ones(D, jnp.int4)


def test_data_may_be_arrays_of_any_library():
    case = make_case("dense", "ce", sizes=(6,), dtype=torch.float32)
    X, y = (t.numpy() for t in case.data[0])
    expected = fo.FisherMCLinearOperator(case.model, case.loss, data=(X, y), batch_size=4).todense()
    for library in LIBRARIES:
        data = (library.make(X), library.make(y))
        np.testing.assert_array_equal(
            fo.FisherMCLinearOperator(case.model, case.loss, data=data, batch_size=4).todense(), expected
        )


@given(
    st.sampled_from(LIBRARIES),
    hnp.arrays(
        dtype=st.one_of(hnp.scalar_dtypes(), hnp.unicode_string_dtypes(max_len=3), hnp.byte_string_dtypes(max_len=3)),
        shape=st.one_of(
            hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
            st.sampled_from([(D,), (D, 1), (D, 2), (D, 0), (2, D)]),
        ),
        fill=st.nothing(),
    ),
    st.sampled_from(["@", "matvec", "matmat", "rdot", "rmatvec"]),
)
def test_any_array_gets_the_right_answer_or_an_error_that_says_why(library, array, name):
    op, F = OPERATORS[torch.float64], MATRICES[torch.float64]
    try:
        x = library.make(array)
    except Exception:
        return  # the library itself does not have such arrays
    products = {**VECTOR_PRODUCTS, **MATRIX_PRODUCTS}
    try:
        with np.errstate(all="ignore"):
            result = op.rdot(x) if name == "rdot" else products[name](op, x)
    except (TypeError, ValueError) as error:
        fits = (x.shape == (D,) or (len(x.shape) == 2 and x.shape[-1 if name == "rdot" else 0] == D)) and x.ndim in (
            1,
            2,
        )
        vector = name in ("matvec", "rmatvec") and x.ndim == 2 and x.shape[1] != 1
        matrix = name == "matmat" and x.ndim == 1
        numbers = np.asarray(array).dtype.kind in "biufc"
        assert not (fits and numbers and not vector and not matrix), error
        received = [str(tuple(x.shape)), str(x.dtype), str(array.dtype)]
        assert any(text in str(error) for text in received) or (x.ndim == 0 and "got a scalar" in str(error))
        return
    if isinstance(result, TorchLinearOperator):
        assert x.ndim == 0
        return
    assert isinstance(result, library.array_type)
    reads = library.read(x)
    with np.errstate(all="ignore"):
        expected = reads.astype(complex) @ F if name == "rdot" else F @ reads.astype(complex)
    largest = np.abs(reads.astype(complex)).max(initial=0)
    if np.isfinite(largest) and largest < 1e30 and np.abs(expected).max(initial=0) < 1e4:
        eps = max(np.finfo(library.read(result).dtype).eps, np.finfo(np.float64).eps)
        assert (
            np.abs(library.read(result) - expected).max(initial=0) <= 100 * eps * max(largest, 1e-300) * np.abs(F).sum()
        )


# ---- SciPy's versions and flags ------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [None, "0", "1"])
def test_the_array_api_flag_of_scipy_makes_no_difference(flag):
    code = """
        import sys
        sys.path.insert(0, {tests!r})
        import numpy as np, torch
        from scipy.sparse.linalg import cg, eigsh, svds
        from libraries import LIBRARIES
        from test_arrays import OPERATORS, MATRICES, x_of
        op, F = OPERATORS[torch.float64], MATRICES[torch.float64]
        for library in LIBRARIES:
            x = library.make(x_of())
            for A, dense in ((op, F), (op.damped(0.5), F + 0.5 * np.eye(31)), (2 * op @ op, 2 * F @ F)):
                for y in (A @ x, A.matvec(x), A.rmatvec(x), A.rdot(x), A(x)):
                    assert type(y) is type(x), (type(y), type(x))
                    assert np.allclose(library.read(y), dense @ x_of(), rtol=1e-4, atol=1e-4)
        top = np.linalg.eigvalsh(F)[-2:]
        assert np.allclose(eigsh(op, k=2, return_eigenvectors=False), top)
        assert np.allclose(np.sort(svds(op, k=2)[1]), top)
        x, info = cg(op.damped(0.5), np.ones(31), rtol=1e-10)
        assert info == 0 and np.allclose(F @ x + 0.5 * x, 1)
    """
    environment = {key: value for key, value in os.environ.items() if key != "SCIPY_ARRAY_API"}
    if flag is not None:
        environment["SCIPY_ARRAY_API"] = flag
    code = textwrap.dedent(code.format(tests=os.path.dirname(__file__)))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr


# ---- The way to CuPy ------------------------------------------------------------------------------------


def test_to_cupy_gives_cupyx_all_four_products(op, monkeypatch):
    """With a stand-in for cupyx, which needs a GPU to be more than imported; the real one is in test_gpu.py."""
    made = {}

    class Linalg:
        @staticmethod
        def LinearOperator(shape, **products):
            made.update(products, shape=shape)
            return "view"

    for name in ("cupyx", "cupyx.scipy"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sparse = type(sys)("cupyx.scipy.sparse")
    sparse.linalg = Linalg
    monkeypatch.setitem(sys.modules, "cupyx.scipy.sparse", sparse)
    assert op.to_cupy() == "view"
    assert made["shape"] == op.shape
    assert made["dtype"] == op.dtype
    x = x_of(2)
    for name in ("matvec", "rmatvec"):
        np.testing.assert_array_equal(made[name](x[:, 0]), op @ x[:, 0])
    for name in ("matmat", "rmatmat"):
        np.testing.assert_array_equal(made[name](x), op @ x)


def test_to_cupy_without_cupy_says_what_to_install(op, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupyx", None)
    with pytest.raises(ImportError, match=r"to_cupy\(\) needs CuPy.*pip install cupy-cuda12x"):
        op.to_cupy()


def test_the_door_knows_which_arrays_are_arrays():
    for library in LIBRARIES:
        assert _arrays.is_array(library.make(np.ones(2)))
    for other in (1.0, np.float32(1), [1.0], "x", None, {1: 2}):
        assert not _arrays.is_array(other)
