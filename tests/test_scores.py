"""G for one batch: which mode of differentiation is chosen, and that every way gives the same rows."""

import copy
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES, Recurrent, make_case
from tolerances import assert_same
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

import fisherops as fo
from fisherops._sizes import HOST, SIZES
from fisherops.problem.calls import Window
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.columns import Factors, Rows, Table
from fisherops.scores.convolutions import Convolution
from fisherops.scores.derived import Strided


def operator(model, data, loss=None, **options):
    return fo.FisherMCLinearOperator(
        model, loss or nn.MSELoss(), data=data, **{"sampler": "stream", "cache": "none", **options}
    )


def check_against_the_definition(model, data, loss=None, caches=("auto", "linearization", "none")):
    loss = loss or nn.MSELoss()
    params = list(model.parameters())
    expected = oracle.monte_carlo_fisher(model, loss, params, data)
    for cache in caches:
        op = operator(model, data, loss, cache=cache)
        assert_same(op @ np.eye(op.shape[0], dtype=op.dtype), expected, op.dtype)
        assert_same(op @ np.ones(op.shape[0], op.dtype), expected.sum(1), op.dtype)
        assert_same(op.todense(), expected, op.dtype)
    return op


def data_for(model, *shape, n=4):
    dtype = next(model.parameters()).dtype
    X = torch.randn(n, *shape, dtype=dtype)
    return [(X, torch.zeros_like(model(X).detach()))]


def mode(op):
    return op.score_matrix.problem.mode.name


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("dense", "forward mode"),
        ("convolutional", "forward mode"),
        ("tied", "forward mode"),
        ("attention", "forward mode with elementary kernels"),
    ],
)
def test_forward_mode_is_taken_where_it_works(architecture, expected):
    case = make_case(architecture, "mse", dtype=torch.float32)
    op = check_against_the_definition(case.model, case.data)
    assert mode(op) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_work_in_some_mode(layer, dtype):
    model = Recurrent(2, layer).to(dtype)
    check_against_the_definition(model, data_for(model, 3, 2))


class Square(torch.autograd.Function):
    """x², with a derivative rule for reverse mode that can itself be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class SquareOnce(Square):
    """The same, but its backward pass is not differentiable."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class SquareWrongJvp(torch.autograd.Function):
    """x² whose forward-mode rule forgets the factor 2."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, t):
        return ctx.saved_tensors[0] * t


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.function = function

    def forward(self, X):
        return self.outer(self.function(self.inner(X)))


def test_a_function_without_forward_mode_is_differentiated_backward_twice():
    model = Custom(Square.apply)
    assert mode(check_against_the_definition(model, data_for(model, 3))) == "double-backward"


def test_a_wrong_forward_rule_is_not_believed():
    model = Custom(SquareWrongJvp.apply)
    assert mode(check_against_the_definition(model, data_for(model, 3))) == "double-backward"


class OpaqueRound(torch.autograd.Function):
    """An operation that raises in forward mode and in a second backward pass."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return Refusing.apply(2 * ctx.saved_tensors[0] * g)


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("no second derivative of Refusing")


@pytest.mark.parametrize("function", [SquareOnce, OpaqueRound])
@pytest.mark.filterwarnings("ignore:.*:fisherops.PlanWarning")
def test_first_order_reverse_mode_is_enough(function):
    # torch reports nothing when a once_differentiable function is differentiated twice here: the result is just wrong
    model = Custom(function.apply)
    check_against_the_definition(model, data_for(model, 3), caches=("auto", "factors", "scores", "none"))


@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("n", [1, 16])
def test_half_precision_inside_the_model_is_not_taken_for_a_wrong_rule(depth, n):
    class Autocast(nn.Sequential):
        def forward(self, X):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(X)

    model = Autocast(*[layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.GELU())], nn.Linear(8, 2))
    data = [(torch.randn(n, 8), torch.zeros(n, 2))]
    op = operator(model, data)
    expected = oracle.monte_carlo_fisher(model, nn.MSELoss(), list(model.parameters()), data)
    v = np.ones(op.shape[0], np.float32)
    error = np.linalg.norm(op @ v - expected @ v) / np.linalg.norm(expected @ v)
    assert error <= 10 * torch.finfo(torch.bfloat16).eps
    assert abs(op.trace() - np.trace(expected)) <= 10 * torch.finfo(torch.bfloat16).eps * np.trace(expected)


class Gated(nn.Module):
    """A plain path beside one through a function with a faulty rule, of any strength."""

    def __init__(self, function, gate, C):
        super().__init__()
        self.plain, self.odd = nn.Linear(5, 8).double(), nn.Linear(5, 8).double()
        self.outer = nn.Linear(8, C).double()
        self.function, self.gate = function, gate

    def forward(self, X):
        return self.outer(self.plain(X) + self.gate * self.function(self.odd(X)))


@pytest.mark.parametrize("gate", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("N", [4, 500])
def test_a_wrong_rule_is_found_in_large_batches_and_where_it_weighs_little(N, gate):
    X = torch.randn(N, 5, dtype=torch.float64)
    data = [(X, torch.zeros(N, 20, dtype=torch.float64))]
    once = Gated(SquareOnce.apply, gate, 20)  # whose double-backward is wrong: first order is enough
    plain = copy.deepcopy(once)
    plain.function = torch.square
    assert_same(operator(once, data) @ np.ones(276), operator(plain, data) @ np.ones(276), torch.float64)
    model = Gated(SquareWrongJvp.apply, gate, 20)
    op = operator(model, data)
    product = op @ np.ones(276)
    assert mode(op) == "double-backward"
    assert_same(product, op.todense().sum(1), torch.float64)


def test_a_wrong_rule_that_appears_in_a_later_batch_is_found():
    class Later(Custom):
        def forward(self, X):
            h = self.inner(X)
            return self.outer(h * h if len(X) == 4 else self.function(h))

    model = Later(SquareWrongJvp.apply)
    check_against_the_definition(model, data_for(model, 3, n=4) + data_for(model, 3, n=5))


class LegacySquare(torch.autograd.Function):
    """x² in the old style, without setup_context, which forward mode refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_a_function_without_forward_mode_may_appear_in_a_later_batch():
    class Later(Custom):
        def forward(self, X):
            h = self.inner(X)
            return self.outer(h * h if len(X) == 4 else self.function(h))

    model = Later(LegacySquare.apply)
    op = check_against_the_definition(model, data_for(model, 3, n=4) + data_for(model, 3, n=5))
    assert mode(op) == "double-backward"


class DataDependentJvp(torch.autograd.Function):
    """The identity, with a jvp that is wrong for large inputs."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = 3.0 if inputs[0].abs().max() > 50 else 1.0

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def jvp(ctx, t):
        return t * ctx.factor


def test_a_rule_that_is_wrong_for_some_data_is_found():
    model = Custom(DataDependentJvp.apply)
    X = torch.randn(12, 3, dtype=torch.float64)
    X[7] = 1000.0
    check_against_the_definition(model, [(x, torch.zeros(4, 2, dtype=torch.float64)) for x in X.split(4)])


class Product(torch.autograd.Function):
    @staticmethod
    def forward(x, w):
        return x @ w.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


def closures_that_hide_a_parameter():
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    doubled, script = 2 * w, torch.jit.trace(lambda X, w: X @ w.T, (torch.randn(4, 3).double(), w.detach()))
    return {
        "custom function": (w, lambda X: Product.apply(X, w)),
        "computed beforehand": (w, lambda X: X @ doubled.T),
        "partly": (w, lambda X: X @ w.T + Product.apply(X, w)),
        "scripted": (w, lambda X: script(X, w)),
    }


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["custom function", "computed beforehand", "partly", "scripted"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_closure_whose_parameter_cannot_be_substituted_is_refused(name, frozen):
    w, closure = closures_that_hide_a_parameter()[name]
    if frozen and name == "computed beforehand":
        return  # nothing connects it to w, so it is a constant to torch as well
    if frozen:
        w.requires_grad_(False)
    data = [(torch.randn(4, 3).double(), torch.zeros(4, 2).double())]
    op = fo.FisherMCLinearOperator(closure, nn.MSELoss(), [w], data)
    with pytest.raises(ValueError, match=r"parameter '0' reaches the output where .*callable \(params, X\) -> f"):
        op @ np.ones(6)
    assert w.requires_grad != frozen
    if name == "custom function":
        functional = fo.FisherMCLinearOperator(lambda p, X: Product.apply(X, p["w"]), nn.MSELoss(), {"w": w}, data)
        assert functional.trace() > 0


def test_sparse_gradients_of_embeddings():
    dense, sparse = nn.Embedding(6, 2).double(), nn.Embedding(6, 2, sparse=True).double()
    sparse.load_state_dict(dense.state_dict())
    data = [(torch.randint(6, (5,)), torch.zeros(5, 2).double())]
    expected = operator(dense, data).todense()
    assert_same(operator(sparse, data).todense(), expected, torch.float64)
    assert_same(operator(sparse, data) @ np.eye(12), expected, torch.float64)


def test_an_operation_that_vmap_cannot_take_is_done_one_by_one():
    class DataDependent(Custom):
        def forward(self, X):
            h = self.inner(X)
            return self.outer(h * 2 if h.sum().item() > 0 else h.tanh())

    model = DataDependent(None)
    check_against_the_definition(model, data_for(model, 3, n=1))
    model = DataDependent(None)
    check_against_the_definition(model, data_for(model, 3))


def test_a_model_that_couples_its_batch_has_its_rows_taken_from_the_whole_batch():
    class Centred(Custom):
        def forward(self, X):
            h = self.inner(X)
            return self.outer((h - h.mean(0)).tanh())

    model = Centred(None)
    op = fo.FisherMCLinearOperator(model, nn.MSELoss(), data=data_for(model, 3))
    with pytest.warns(fo.PlanWarning, match="rows for inner.weight, inner.bias cannot .*: the data of a batch depend"):
        plan = str(op.plan)
    assert "linearization" in plan
    with pytest.warns(fo.PlanWarning):
        check_against_the_definition(model, data_for(model, 3))


def test_a_model_whose_terms_do_not_come_in_data():
    """Outputs for pairs of data: 6 terms for a batch of 4."""

    class Pairs(Custom):
        def forward(self, X):
            i, j = torch.triu_indices(len(X), len(X), 1)
            return self.outer(self.inner(X[i]) * self.inner(X[j]))

    model = Pairs(None)
    check_against_the_definition(model, data_for(model, 3))


@given(
    st.sampled_from(ARCHITECTURES),
    st.sampled_from(["ce", "mse"]),
    st.integers(1, 3),
    st.integers(0, 20_000),
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
)
def test_rows_do_not_depend_on_the_size_of_blocks(architecture, loss, samples, block_bytes, sizes):
    case = make_case(architecture, loss, sizes=sizes)
    op = operator(case.model, case.data, case.loss, mc_samples=samples)
    expected = op.todense()
    with mock.patch.dict(SIZES, {torch.device("cpu"): HOST._replace(block=block_bytes)}):
        assert_same(op.todense(), expected, case.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "length"), [(6, 2**17 + 5), (300, 2**12 + 3), (70, 33_000)])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("gap", [0, 7])
def test_products_with_dense_rows_by_every_kernel(monkeypatch, dtype, count, length, K, gap):
    """Few long rows, blocks of rows, and all at once; with parameters between that have no rows."""
    monkeypatch.setitem(SIZES, torch.device("cpu"), HOST._replace(cached=2**19))
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(count, length, dtype=dtype, generator=generator)
    spans = [(0, 1000), (1000 + gap, length + gap)] if gap else [(0, length)]
    places = {"first": (0, 1000), "none": (1000, 1000 + gap), "last": (1000 + gap, length + gap)}
    held = MaterializedBatch(G, spans, [], count, places if gap else {"all": (0, length)})
    whole = torch.cat([G[:, :1000], G.new_zeros(count, gap), G[:, 1000:]], 1).double()
    V = torch.randn(K, length + gap, dtype=dtype, generator=generator)
    W = torch.randn(K, count, dtype=dtype, generator=generator)
    for result, factors in (
        (held.apply(V).T, (whole, V.T)),
        (held.apply_t(W).T, (whole.T, W.T)),
        (held.product(V).T, (whole.T, whole, V.T)),
    ):
        expected, bound = factors[-1].double(), factors[-1].double().abs()
        for factor in reversed(factors[:-1]):
            expected, bound = factor @ expected, factor.abs() @ bound
        assert ((result - expected).abs() <= 4 * torch.finfo(dtype).eps * max(count, length) ** 0.5 * bound).all()


# ---- Squared norms of rows and columns --------------------------------------------------------------------


@given(
    st.sampled_from(["factors", "table", "convolution", "rows"]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_squares_of_columns(form, N, T, q, g, seed):
    """They are those of the rows, whether these are listed or not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    if form == "factors":
        columns = Factors(normal(N, T, g, 3), normal(N, T, q, g, 2))
    elif form == "table":
        index = torch.randint(4, (N, T), generator=generator)
        columns = Table(index, normal(N, T, q, 2), 6)
    elif form == "convolution":
        window = Window((1,), (1,), (1,), False, (0,), g)
        columns = Convolution(normal(N, T, 2 * g, 5), normal(N, T, q, g, 5), window, (g, 2, 3))
    else:
        columns = Rows(normal(N, q, g, 2, 3))
    rows = columns.rows(0, N)
    assert_same(columns.col_squares(), rows.square().sum((0, 1)), torch.float64)
    assert_same(columns.row_squares(), rows.square().sum((2, 3, 4)), torch.float64)


def test_the_diagonal_of_a_table_lists_no_dense_rows():
    """Each row of this table's gradient would take 100 MB."""
    Q = Table(torch.randint(10**5, (64, 8)), torch.randn(64, 8, 1, 250), 10**5)
    with mock.patch.object(Table, "rows", side_effect=AssertionError):
        total, squares = Q.row_squares().sum(), Q.col_squares()
    assert_same(float(squares.sum(dtype=torch.float64)), float(total), torch.float32)


@pytest.mark.parametrize("cache", ["auto", "factors"])
def test_the_trace_of_dense_layers_takes_no_matrix_product(cache):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    data = torch.randn(9, 5), torch.arange(9) % 3
    op = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data, cache=cache)
    expected = np.trace(op.todense())
    with mock.patch.object(Factors, "rows", side_effect=AssertionError):
        assert op.trace() == pytest.approx(expected, rel=1e-5)


def test_a_parameter_with_dense_rows_and_a_block_is_listed_in_linear_time(monkeypatch):
    """Each block of rows copies its own part of what is held, and norms do not depend on how many there are."""
    monkeypatch.setitem(SIZES, torch.device("cpu"), HOST._replace(block=64, cached=64))
    N, d = 50, 6
    generator = torch.Generator().manual_seed(0)
    dense, rows = torch.randn(N, d + 1, generator=generator), torch.randn(N, 1, 1, 2, 3, generator=generator)
    leaf = torch.zeros(2, 3)
    derived = Strided("weight", leaf, leaf[None], (1, 2))
    spans = {"weight": (0, d), "bias": (d, d + 1)}
    batch = MaterializedBatch(dense, list(spans.values()), [(derived, Rows(rows))], N, spans)
    whole = dense.clone()
    whole[:, :d] += rows.view(N, d)
    copied = 0

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal copied
            result = func(*args, **kwargs or {})
            copied += result.numel() if func is torch.ops.aten.cat.default else 0
            return result

    with Copies():
        squares = batch.row_squares()
    torch.testing.assert_close(squares, whole.double().square().sum(1), rtol=1e-6, atol=0)
    assert copied <= 2 * dense.numel()


@pytest.mark.parametrize(("T", "has_rows"), [(2, False), (40, True)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(5,), (3, 4)])
def test_gram_matrices_of_sequences_go_by_pairs_or_rows(T, has_rows, bias, sizes):
    """Whichever takes fewer operations, with the bias of a layer, within one batch and between two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=bias), nn.Tanh(), nn.Linear(16, 12, bias=bias)).double()

    def call(X):
        return model(X).transpose(1, 2)

    data = [(torch.randn(n, T + k, 12, dtype=torch.float64), torch.zeros(n, T + k).long()) for k, n in enumerate(sizes)]
    op = fo.FisherMCLinearOperator(
        call, nn.CrossEntropyLoss(), list(model.parameters()), data, rows="datum", cache="factors", max_memory="1GiB"
    )
    with mock.patch("fisherops.scores.build.rows_are_better", return_value=False):
        batches = op.scores.materialized()
    found = [c for batch in batches for _, c in batch.blocks if isinstance(c, Factors) and c.shape[2] > 1]
    assert {left.prefers_rows(right) for left in found for right in found if left.shape == right.shape} == {has_rows}
    G = op.scores.rows()
    assert_same(op.scores.gram(), G @ G.T, torch.float64)
    scale = torch.rand(G.shape[1], dtype=torch.float64)
    assert_same(op.scores.gram_tensor(scale=scale), G * scale.numpy() @ G.T, torch.float64)
