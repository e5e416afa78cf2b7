"""The SciPy contract: every way to multiply, and the algebra, against dense matrices."""

import operator as python_operator
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import make_case
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from tolerances import assert_same

import fisherops as fo
from fisherops._linop import TorchLinearOperator, Transposed


class Matrix(TorchLinearOperator):
    """A rectangular operator given by a torch matrix."""

    def __init__(self, A):
        super().__init__(tuple(A.shape), A.dtype, A.device)
        self.A = A

    def _mul(self, V):
        return V @ self.A.T

    def _mul_t(self, V):
        return V @ self.A

    def _transpose(self):
        return Transposed(self)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def op(request):
    case = make_case("dense", "mse", dtype=request.param)
    return fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)


@pytest.fixture
def F(op):
    return op.todense()


def x_of(op, *shape, seed=0):
    return np.random.default_rng(seed).standard_normal((op.shape[1], *shape)).astype(op.dtype)


def test_it_is_a_scipy_linear_operator(op):
    assert isinstance(op, LinearOperator)
    assert aslinearoperator(op) is op
    assert op.ndim == 2
    assert op.shape == (31, 31)
    assert "D=31" in repr(op)


def test_a_fisher_is_its_own_transpose_and_adjoint(op):
    assert op.T is op
    assert op.H is op
    assert op.transpose() is op
    assert op.adjoint() is op
    assert op.damped(0.1).T.shape == op.shape


VECTOR_PRODUCTS = {
    "matvec": lambda op, x: op.matvec(x),
    "rmatvec": lambda op, x: op.rmatvec(x),
    "dot": lambda op, x: op.dot(x),
    "@": lambda op, x: op @ x,
    "*": lambda op, x: op * x,
    "()": lambda op, x: op(x),
    "rdot": lambda op, x: op.rdot(x),
    "x @": lambda op, x: x @ op,
    "x *": lambda op, x: x * op,
}
MATRIX_PRODUCTS = {
    "matmat": lambda op, X: op.matmat(X),
    "rmatmat": lambda op, X: op.rmatmat(X),
    "dot": lambda op, X: op.dot(X),
    "@": lambda op, X: op @ X,
    "*": lambda op, X: op * X,
    "()": lambda op, X: op(X),
    "rdot": lambda op, X: op.rdot(X.T).T,
    "x @": lambda op, X: (X.T @ op).T,
}


def dense_product(name, A, x):
    """What the product called `name` is for a dense matrix A."""
    if name.startswith("rmat"):
        return A.conj().T @ x
    return A.T @ x if name in ("rdot", "x @", "x *") else A @ x


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", VECTOR_PRODUCTS)
def test_every_product_with_a_vector(op, F, name, library):
    x = x_of(op)
    result = VECTOR_PRODUCTS[name](op, torch.from_numpy(x) if library == "torch" else x)
    assert isinstance(result, np.ndarray if library == "numpy" else torch.Tensor)
    assert result.shape == (31,)
    assert_same(result, dense_product(name, F, x), op.dtype)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("K", [0, 1, 2, 33, 70])
@pytest.mark.parametrize("name", MATRIX_PRODUCTS)
def test_every_product_with_a_matrix(op, F, name, K, library):
    X = x_of(op, K)
    result = MATRIX_PRODUCTS[name](op, torch.from_numpy(X) if library == "torch" else X)
    assert isinstance(result, np.ndarray if library == "numpy" else torch.Tensor)
    assert_same(result, dense_product(name, F, X), op.dtype)


@pytest.mark.parametrize("name", ["matvec", "rmatvec", "dot", "@"])
def test_a_column_comes_back_as_a_column(op, F, name):
    assert VECTOR_PRODUCTS[name](op, x_of(op, 1)).shape == (31, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", {**VECTOR_PRODUCTS, **MATRIX_PRODUCTS})
def test_rectangular_operators_multiply_from_both_sides(name, dtype):
    A = torch.randn(3, 5, dtype=dtype)
    op, dense = Matrix(A), A.numpy()
    adjoint = name in ("rmatvec", "rmatmat", "rdot", "x @", "x *")
    shape = (3 if adjoint else 5,) if name in VECTOR_PRODUCTS else (3 if adjoint else 5, 4)
    x = np.random.default_rng(0).standard_normal(shape).astype(dense.dtype)
    products = VECTOR_PRODUCTS if name in VECTOR_PRODUCTS else MATRIX_PRODUCTS
    assert_same(products[name](op, x), dense_product(name, dense, x), dense.dtype, 20)
    assert op.T.T is op
    assert op.T.shape == op.H.shape == (5, 3)


# Pairs of the same expression for operators and for dense matrices.
EXPRESSIONS = {
    "2 * A": (lambda A, B, eye: 2 * A, lambda A, B, eye: 2 * A),
    "A * 2.5": (lambda A, B, eye: A * 2.5, lambda A, B, eye: 2.5 * A),
    "-A": (lambda A, B, eye: -A, lambda A, B, eye: -A),
    "A / 3": (lambda A, B, eye: A / 3, lambda A, B, eye: A / 3),
    "A + B": (lambda A, B, eye: A + B, lambda A, B, eye: A + B),
    "A - B": (lambda A, B, eye: A - B, lambda A, B, eye: A - B),
    "A @ B": (lambda A, B, eye: A @ B, lambda A, B, eye: A @ B),
    "A * B": (lambda A, B, eye: A * B, lambda A, B, eye: A @ B),
    "A(B)": (lambda A, B, eye: A(B), lambda A, B, eye: A @ B),
    "A.dot(B)": (lambda A, B, eye: A.dot(B), lambda A, B, eye: A @ B),
    "A.rdot(B)": (lambda A, B, eye: A.rdot(B), lambda A, B, eye: B @ A),
    "A ** 0": (lambda A, B, eye: A**0, lambda A, B, eye: eye),
    "A ** 1": (lambda A, B, eye: A**1, lambda A, B, eye: A),
    "A ** 3": (lambda A, B, eye: A**3, lambda A, B, eye: A @ A @ A),
    "A.damped": (lambda A, B, eye: A.damped(0.25), lambda A, B, eye: A + 0.25 * eye),
    "(A + 0.1 Bᵀ).damped @ A": (
        lambda A, B, eye: (A + 0.1 * B.T).damped(0.5) @ A,
        lambda A, B, eye: (A + 0.1 * B.T + 0.5 * eye) @ A,
    ),
    "(A @ B).T": (lambda A, B, eye: (A @ B).T, lambda A, B, eye: (A @ B).T),
    "(A - 2 B).H ** 2": (
        lambda A, B, eye: (A - 2 * B).H ** 2,
        lambda A, B, eye: (A - 2 * B).T @ (A - 2 * B).T,
    ),
    "(A ** 2).T": (lambda A, B, eye: (A**2).T, lambda A, B, eye: (A @ A).T),
    "A.damped(.).T": (lambda A, B, eye: A.damped(0.3).T, lambda A, B, eye: A.T + 0.3 * eye),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_algebra_agrees_with_dense_matrices_and_keeps_the_precision(name, dtype):
    A, B = torch.randn(4, 4, dtype=dtype), torch.randn(4, 4, dtype=dtype)
    ours, dense = EXPRESSIONS[name]
    op = ours(Matrix(A), Matrix(B), None)
    expected = dense(A.numpy(), B.numpy(), np.eye(4))
    assert isinstance(op, TorchLinearOperator)
    assert op.dtype == A.numpy().dtype
    assert_same(op.todense(), expected, op.dtype, 100)
    x = np.random.default_rng(0).standard_normal(4).astype(op.dtype)
    for product in VECTOR_PRODUCTS:
        result = VECTOR_PRODUCTS[product](op, x)
        assert result.dtype == op.dtype
        assert_same(result, dense_product(product, expected.astype(op.dtype), x), op.dtype, 100)


@pytest.mark.parametrize(
    "alpha",
    [
        2,
        2.5,
        Fraction(5, 2),
        Decimal("2.5"),
        10**30,
        np.float64(2.5),
        np.int8(3),
        np.array(2.5),
        torch.tensor(2.5),
        True,
    ],
)
def test_any_scalar_leaves_float32_alone(alpha):
    A = torch.randn(3, 3)
    for scaled in (alpha * Matrix(A), Matrix(A) * alpha, Matrix(A).dot(alpha), Matrix(A).rdot(alpha)):
        assert scaled.dtype == np.float32
        assert_same(scaled.todense(), A.numpy() * float(alpha), np.float32, 4)
    assert_same((Matrix(A) / alpha).todense(), A.numpy() / float(alpha), np.float32, 4)


@pytest.mark.parametrize("alpha", [2j, 1.5 - 0.5j, np.complex64(1j)])
def test_a_complex_scalar_makes_a_complex_operator(alpha):
    A = torch.randn(3, 3)
    op, dense = alpha * Matrix(A), complex(alpha) * A.numpy()
    assert op.dtype == np.complex64
    x = np.arange(3, dtype=np.float32)
    for name in VECTOR_PRODUCTS:
        assert_same(VECTOR_PRODUCTS[name](op, x), dense_product(name, dense, x), np.float32, 20)
    assert_same(op.H.todense(), dense.conj().T, np.float32, 10)
    assert_same((op + Matrix(A)).H.todense(), (dense + A.numpy()).conj().T, np.float32, 10)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_vectors_are_multiplied_by_parts(op, F, dtype):
    x = (x_of(op, 2) + 1j * x_of(op, 2, seed=1)).astype(dtype)
    result = op @ x
    assert result.dtype == dtype
    assert_same(result, F @ x, op.dtype if dtype == np.complex128 else np.float32)
    assert_same((op @ torch.from_numpy(x)).numpy(), F @ x, op.dtype if dtype == np.complex128 else np.float32)
    assert_same(op @ x[:, 0].conj(), F @ x[:, 0].conj(), op.dtype if dtype == np.complex128 else np.float32)
    assert_same(op @ torch.from_numpy(x).conj(), F @ x.conj(), op.dtype if dtype == np.complex128 else np.float32)


DTYPES = [np.bool_, np.int8, np.uint8, np.int64, np.uint32, np.float16, np.float32, np.float64, np.longdouble]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_has_the_dtype_of_an_inexact_input_and_else_that_of_the_operator(op, F, dtype):
    x = np.arange(31).astype(dtype) % 5 if dtype != np.bool_ else np.arange(31) % 2 == 0
    result = op @ x
    assert result.dtype == (dtype if np.issubdtype(dtype, np.inexact) else op.dtype)
    coarser = max([result.dtype, op.dtype], key=lambda dtype: np.finfo(dtype).eps)
    assert_same(result.astype(np.float64), F @ x.astype(op.dtype), coarser)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_the_same_holds_for_torch(op, F, dtype):
    x = (torch.arange(31) % 2).to(dtype)
    result = op @ x
    own = torch.from_numpy(np.zeros(1, op.dtype)).dtype
    assert result.dtype == (dtype if dtype.is_floating_point else own)
    coarser = max([result.dtype, own], key=lambda dtype: torch.finfo(dtype).eps)
    assert_same(result.double().numpy(), F @ x.double().numpy(), coarser)


LAYOUTS = {
    "read-only": lambda X: _read_only(X),
    "Fortran order": np.asfortranarray,
    "strided": lambda X: np.repeat(X, 2, axis=0)[::2],
    "negative strides": lambda X: X[::-1][::-1].copy()[::-1],
    "byte-swapped": lambda X: X.astype(X.dtype.newbyteorder()),
    "broadcast": lambda X: np.broadcast_to(X[:, :1], X.shape),
    "list": lambda X: X.tolist(),
    "matrix": np.asmatrix,
    "unaligned": lambda X: _unaligned(X),
}


def _read_only(X):
    X = X.copy()
    X.flags.writeable = False
    return X


def _unaligned(X):
    raw = np.zeros(X.nbytes + 1, np.uint8)
    view = raw[1:].view(X.dtype).reshape(X.shape)
    view[:] = X
    return view


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_numpy_arrays(op, F, layout):
    X = LAYOUTS[layout](x_of(op, 3))
    before = np.array(X)
    result = op @ X
    assert_same(np.asarray(result), F @ before.astype(op.dtype), op.dtype)
    assert isinstance(result, np.matrix) == (layout == "matrix")
    assert result.flags.c_contiguous
    assert result.flags.writeable
    np.testing.assert_array_equal(np.array(X), before)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("K", [None, 1, 3])
def test_results_are_fresh_contiguous_and_writable(op, K, order):
    X = np.asarray(x_of(op) if K is None else x_of(op, K), order=order)
    for A in (op, op**0, op.damped(0.0), 1 * op, op + op, op @ op, op.T):
        first, second = A @ X, A @ X
        assert not np.shares_memory(first, X)
        assert not np.shares_memory(first, second)
        assert first.flags.c_contiguous
        assert first.flags.writeable
        tensor = A @ torch.from_numpy(X)
        assert tensor.is_contiguous()
        first[...] = np.nan  # changing a result changes nothing else
        np.testing.assert_array_equal(A @ X, second)


def test_torch_vectors_that_require_grad_or_carry_bits(op, F):
    x = torch.from_numpy(x_of(op)).requires_grad_()
    result = op @ x
    assert not result.requires_grad
    assert_same(result, F @ x.detach().numpy(), op.dtype)
    negated = torch.complex(torch.zeros(31), -torch.from_numpy(x_of(op)).float()).conj().imag
    assert negated.is_neg()
    assert_same(op @ negated, F @ negated.resolve_neg().numpy(), np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_products_of_rectangular_operators(seed, m, n, k):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(m, n, generator=g), torch.randn(n, k, generator=g)
    op = Matrix(A) @ Matrix(B)
    assert op.shape == (m, k)
    assert_same(op.todense(), (A @ B).numpy(), np.float32, 100)
    assert_same(op.H.todense(), (A @ B).T.numpy(), np.float32, 100)


def test_scipy_operators_and_ours_combine(op, F):
    D = 31
    S = np.random.default_rng(1).standard_normal((D, D))
    eye = scipy.sparse.linalg.aslinearoperator(scipy.sparse.eye(D, format="csr"))
    foreign = aslinearoperator(S)
    x = x_of(op)
    for ours, dense in [
        (op + eye, F + np.eye(D)),
        (op - foreign, F - S),
        (op @ foreign, F @ S),
        (foreign @ op, S @ F),
        (eye + op, F + np.eye(D)),
        ((op @ foreign).T, S.T @ F),
        ((op - foreign).H, (F - S).T),
        (op.rdot(foreign), S @ F),
    ]:
        assert isinstance(ours, LinearOperator)
        assert_same(ours @ x, dense @ x, op.dtype)


@pytest.mark.parametrize("name", ["A @ B", "A ** 3", "A.damped", "A + B", "foreign"])
def test_adjoints_of_complex_composites(name):
    A, B = (1 + 2j) * Matrix(torch.randn(4, 4)), (2 - 1j) * Matrix(torch.randn(4, 4))
    dense_A, dense_B = A.todense(), B.todense()
    if name == "foreign":
        op, expected = A @ aslinearoperator(dense_B), dense_A @ dense_B
    else:
        ours, dense = EXPRESSIONS[name]
        op, expected = ours(A, B, None), dense(dense_A, dense_B, np.eye(4))
    x = np.random.default_rng(0).standard_normal(4).astype(np.complex64)
    assert_same(op @ x, expected @ x, np.float32, 100)
    assert_same(op.H @ x, expected.conj().T @ x, np.float32, 100)
    assert_same(op.T @ x, expected.T @ x, np.float32, 100)


def test_the_dense_matrix_of_a_composite_with_many_columns():
    A = torch.randn(3, 700)
    assert_same((2 * Matrix(A)).todense(), 2 * A.numpy(), np.float32, 2)


def test_arrays_of_conjugates_reach_foreign_operators(op, F):
    x = torch.from_numpy(x_of(op)).to(torch.complex128).conj()
    foreign = aslinearoperator(np.eye(31))
    assert_same((op @ foreign) @ x, F @ x.resolve_conj().numpy(), op.dtype)


def test_dense_matrices_of_composites(op, F):
    assert_same((op @ op).todense(), F @ F, op.dtype)
    assert op.todense().flags.c_contiguous
    assert op.todense().dtype == op.dtype


BAD_SHAPES = [(30,), (32,), (1, 31), (30, 2), (), (31, 1, 1), (0,)]


@pytest.mark.parametrize("shape", BAD_SHAPES)
@pytest.mark.parametrize("name", ["@", "matvec", "rmatvec", "matmat", "rmatmat"])
def test_a_wrong_shape_is_an_error_that_names_both_shapes(op, shape, name):
    if name == "@" and shape == ():
        with pytest.raises(ValueError, match="operand of `@` must be an array or an operator, got a scalar"):
            op @ np.zeros(shape)
        return
    if name.endswith("vec") and shape == (1, 31):
        return  # a batch of one vector, see test_batches
    products = {**VECTOR_PRODUCTS, **MATRIX_PRODUCTS}
    with pytest.raises(ValueError, match=r"an operator of shape \(31, 31\) the array must have shape .*, got \(.*\)"):
        products[name](op, np.zeros(shape))


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (0,), (2, 0)])
def test_batches(op, batch):
    """Those that SciPy's own operators take from 1.18 on; `matvec` those of vectors, the others those of matrices."""
    A = op @ op.damped(0.1) @ aslinearoperator(np.tri(31, 5).astype(op.dtype))  # (31, 5)
    dense = A @ np.eye(5, dtype=op.dtype)
    x, X = (np.random.default_rng(0).standard_normal((*batch, 5, *k)).astype(op.dtype) for k in ((), (2,)))
    y, Y = (np.random.default_rng(1).standard_normal((*batch, *k, 31)).astype(op.dtype) for k in ((), (2,)))
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for got, expected in [
        (A.matvec(x), x @ dense.T),
        (A.rmatvec(y), y @ dense),
        (A.matmat(X), dense @ X),
        (A @ X, dense @ X),
        (A.dot(torch.as_tensor(X)), dense @ X),
        (A.rmatmat(np.swapaxes(Y, -1, -2)), dense.T @ np.swapaxes(Y, -1, -2)),
        (Y @ A, Y @ dense),
        (A.T.matvec(y), y @ dense),
    ]:
        np.testing.assert_allclose(got, expected, **tolerance)
        assert got.shape == expected.shape
        assert got.dtype == (torch.as_tensor(X).dtype if isinstance(got, torch.Tensor) else op.dtype)
        contiguous = got.is_contiguous() if isinstance(got, torch.Tensor) else got.flags.c_contiguous
        assert contiguous
    assert A.matvec(np.ones((5, 1), op.dtype)).shape == (31, 1)  # a column, as up to SciPy 1.19
    assert A.matvec(np.ones((1, 5), op.dtype)).shape == (1, 31)


def test_matvec_and_matmat_keep_vectors_and_matrices_apart(op):
    with pytest.raises(ValueError, match=r"must have shape \(31,\) or \(31, 1\), got"):
        op.matvec(np.zeros((31, 2)))
    with pytest.raises(ValueError, match=r"must have shape \(31, K\), got"):
        op.matmat(np.zeros(31))
    with pytest.raises(ValueError, match=r"dimension mismatch in rdot: .* must have shape \(31,\) or \(K, 31\), got"):
        np.zeros((31, 2)) @ op


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ma.masked_array(np.zeros(31), np.zeros(31, bool)), "masked array"),
        (np.array(["a"] * 31), "must be of numbers .*of dtype <U1"),
        (np.array([None] * 31), "must be of numbers .*of dtype object"),
        (np.zeros(31, "M8[s]"), "of dtype datetime64"),
        (torch.zeros(31).to_sparse(), "got a torch.sparse_coo tensor"),
        (torch.zeros(31, device="meta"), "got a meta tensor"),
        (scipy.sparse.eye(31, format="csr"), r"sparse matrix of shape \(31, 31\).*toarray"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "got a nested tensor"),
        ({1: 2}, "must be an array of NumPy, CuPy.*got builtins.dict"),
        ("abc", "got builtins.str"),
        (None, "got builtins.NoneType"),
    ],
)
def test_arrays_that_cannot_be_taken(op, x, message):
    with pytest.raises(TypeError, match=message):
        op.dot(x)


def test_what_the_algebra_refuses(op):
    A, B = Matrix(torch.randn(2, 3)), Matrix(torch.randn(2, 3))
    with pytest.raises(ValueError, match="operand of `@` must be an array or an operator, got a scalar"):
        op @ 2.0
    with pytest.raises(ValueError, match="operand of `@` must be an array or an operator, got a scalar"):
        2.0 @ op
    with pytest.raises(ValueError, match=r"must have equal shapes to be added, got \(31, 31\) and \(2, 3\)"):
        op + A
    with pytest.raises(ValueError, match=r"to be multiplied, got \(2, 3\) and \(2, 3\)"):
        A @ B
    with pytest.raises(ValueError, match=r"must be square to be damped, got shape \(2, 3\)"):
        A.damped(1.0)
    with pytest.raises(ValueError, match=r"must be square to be raised to a power, got shape \(2, 3\)"):
        A**2
    for exponent in (-1, 0.5, None):
        with pytest.raises(ValueError, match="must be an integer of at least 0, got"):
            op**exponent
    for damping in ("1", None, 1j, [0.1]):
        with pytest.raises(TypeError, match="`damping` must be a real number"):
            op.damped(damping)
    for damping in (np.nan, -np.inf, np.inf if op.dtype == np.float64 else 1e60):
        with pytest.raises(ValueError, match="`damping` must be at least 0 and finite"):
            op.damped(damping)
    with pytest.raises(ValueError, match="divisor of an operator must be a scalar, got"):
        op / op
    for function in (python_operator.add, python_operator.sub):
        for other in (np.eye(31), 0.1, torch.eye(31), scipy.sparse.eye(31)):
            with pytest.raises(TypeError, match=r"added to an operator, got .*aslinearoperator.*damped"):
                function(op, other)
        with pytest.raises(TypeError, match="unsupported operand"):
            function(op, "x")


def test_operators_on_different_devices_are_not_combined():
    A, B = Matrix(torch.randn(2, 2)), Matrix(torch.randn(2, 2))
    B.device = torch.device("cuda:0")
    with pytest.raises(ValueError, match="must be on one device to be combined, got cpu and cuda:0"):
        A + B
