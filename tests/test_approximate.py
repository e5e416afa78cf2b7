"""Structured approximations against plain loops over the uses of each layer."""

import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, make_case
from scipy.sparse.linalg import aslinearoperator, cg, lobpcg
from tolerances import assert_same
from torch import nn

import fisherops as fo
from fisherops import approximate, linalg
from fisherops.approximate import sites, structured
from fisherops.approximate.inner import inner_product
from fisherops.approximate.structured import taken

KINDS = [fo.FisherMCLinearOperator, fo.FisherLinearOperator, fo.EmpiricalFisherLinearOperator]
BUILDERS = [
    approximate.kfac, approximate.ekfac, approximate.kronecker, approximate.layers, approximate.diagonal,
    approximate.nystrom,
]  # fmt: skip
CE = nn.CrossEntropyLoss()
F64 = torch.float64


def network(kind=fo.FisherLinearOperator, dtype=F64, n=9, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)
    data = [
        (torch.randn(n - 4, 4, dtype=dtype), torch.randint(3, (n - 4,))),
        (torch.randn(4, 4, dtype=dtype), torch.randint(3, (4,))),
    ]
    return kind(model, CE, data=data, **options)


@pytest.fixture
def op():
    return network()


def distance(F, K):
    return np.linalg.norm(F - K) / np.linalg.norm(F)


# ---- Against plain loops ------------------------------------------------------------------------------


class Recorded(nn.Module):
    """A layer that notes its inputs, and lets gradients at its outputs be had."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.inputs, self.outputs = layer, [], []

    def forward(self, x):
        y = self.layer(x)
        self.inputs.append(x)
        self.outputs.append(y)
        return y


def moments(model, layers, X, y, sharing):
    """Return E[a aᵀ], E[b bᵀ] and the exact squares of each layer by a loop over examples, for the empirical Fisher.

    The inputs have a one at their end.
    """
    found = {name: [0.0, 0.0, 0] for name in layers}
    for n in range(len(X)):
        for layer in layers.values():
            layer.inputs.clear()
            layer.outputs.clear()
        loss = nn.functional.cross_entropy(model(X[n : n + 1]), y[n : n + 1])
        for name, layer in layers.items():
            a, b = [], []
            for x, out in zip(layer.inputs, layer.outputs, strict=True):
                (gradient,) = torch.autograd.grad(loss, out, retain_graph=True)
                if isinstance(layer.layer, nn.Conv2d):
                    own = nn.functional.unfold(x, layer.layer.kernel_size, padding=layer.layer.padding)[0].T
                    gradient = gradient[0].flatten(1).T
                else:
                    own, gradient = x[0].reshape(-1, x.shape[-1]), gradient[0].reshape(-1, out.shape[-1])
                a.append(torch.cat([own, torch.ones(len(own), 1, dtype=own.dtype)], 1).detach())
                b.append(gradient)
            a, b = torch.cat(a), torch.cat(b)
            if sharing == "reduce":
                a, b = a.mean(0, keepdim=True), b.sum(0, keepdim=True)
            for t in range(len(a)):
                found[name][0] = found[name][0] + torch.outer(a[t], a[t])
                found[name][1] = found[name][1] + torch.outer(b[t], b[t]) / len(X)
                found[name][2] += 1
    return {name: (B.numpy(), (A / count).numpy()) for name, (A, B, count) in found.items()}


def block_of(K, op, names):
    spans = op.parameter_spans
    index = np.concatenate([np.arange(*spans[name]) for name in names])
    return K.todense()[np.ix_(index, index)]


def joint(B, A):
    """B ⊗ A in the order of all weights and then all biases."""
    o, i = len(B), len(A) - 1
    K = np.kron(B, A)
    places = np.arange(o * (i + 1)).reshape(o, i + 1)
    order = np.concatenate([places[:, :i].ravel(), places[:, i]])
    return K[np.ix_(order, order)]


class Sequence(nn.Module):
    """An embedding, a layer norm, and dense layers that see every position of a sequence."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.inner = Recorded(nn.Linear(4, 5))
        self.head = Recorded(nn.Linear(5, 3))

    def forward(self, X):
        return self.head(torch.tanh(self.inner(self.norm(self.tokens(X)))).mean(1))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Recorded(nn.Conv2d(2, 3, 3, padding=1))
        self.norm = nn.GroupNorm(1, 3)
        self.head = Recorded(nn.Linear(48, 3))

    def forward(self, X):
        return self.head(torch.relu(self.norm(self.inner(X))).flatten(1))


def recorded(name):
    torch.manual_seed(0)
    model = (Sequence() if name == "sequence" else Images()).to(F64)
    X = torch.randint(6, (7, 4)) if name == "sequence" else torch.randn(7, 2, 4, 4, dtype=F64)
    y = torch.randint(3, (7,))
    return model, X, y


@pytest.mark.parametrize("cache", ["auto", "scores", "factors", "linearization", "none"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["sequence", "images"])
def test_factors_are_those_of_a_loop(name, sharing, cache):
    model, X, y = recorded(name)
    expected = moments(model, {"inner": model.inner, "head": model.head}, X, y, sharing)
    op = fo.EmpiricalFisherLinearOperator(model, CE, data=[(X[:4], y[:4]), (X[4:], y[4:])], cache=cache)
    _ = op.plan
    K = approximate.kfac(op, sharing)
    for layer, (B, A) in expected.items():
        own = block_of(K, op, [f"{layer}.layer.weight", f"{layer}.layer.bias"])
        assert_same(own, joint(B, A), F64)
    F = op.todense()
    start, stop = op.parameter_spans["norm.weight"][0], op.parameter_spans["norm.bias"][1]
    assert_same(K.todense()[start:stop, start:stop], F[start:stop, start:stop], F64)
    assert K.plan["norm.weight, norm.bias"] == "exact block"


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_embeddings_have_counts_and_a_covariance(sharing):
    model, X, y = recorded("sequence")
    op = fo.EmpiricalFisherLinearOperator(model, CE, data=(X, y))
    K = approximate.kfac(op, sharing)
    left, right = np.zeros((6, 6)), np.zeros((4, 4))
    for n in range(7):
        h = model.tokens(X[n : n + 1]).detach().requires_grad_()
        loss = CE(model.head(torch.tanh(model.inner(model.norm(h))).mean(1)), y[n : n + 1])
        (b,) = torch.autograd.grad(loss, h)
        a, b = np.eye(6)[X[n].numpy()], b[0].numpy()
        if sharing == "reduce":
            a, b = a.mean(0, keepdims=True), b.sum(0, keepdims=True)
        left, right = left + a.T @ a / (7 * len(a)), right + b.T @ b / 7
    assert_same(block_of(K, op, ["tokens.weight"]), np.kron(left, right), F64)
    assert "counts" in K.plan["tokens.weight"]


@pytest.mark.parametrize("separate_bias", [True, False])
def test_the_diagonal_in_the_basis_of_ekfac_is_that_of_F(separate_bias):
    model, X, y = recorded("images")
    op = fo.FisherLinearOperator(model, CE, data=(X, y))
    E = approximate.ekfac(op, separate_bias=separate_bias)
    F = op.todense()
    for place, block in E.blocks:
        if not isinstance(block, approximate.Eigen):
            continue
        index = taken(torch.arange(op.shape[0])[None], place)[0].numpy()
        Q = np.kron(
            *(
                np.eye(n) if x is None else x[0].numpy()
                for x, n in zip((block.left, block.right), block.values.shape[1:], strict=True)
            )
        )
        assert_same(block.values.numpy().ravel(), np.diag(Q.T @ F[np.ix_(index, index)] @ Q), F64)
        assert_same(Q @ Q.T, np.eye(len(Q)), F64)


class Adapted(nn.Module):
    """A frozen dense layer with a low-rank adapter (LoRA)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = Recorded(nn.Linear(inputs, 2, bias=False))
        self.up = Recorded(nn.Linear(2, outputs, bias=False))

    def forward(self, X):
        return self.base(X) + self.up(self.down(X))


def test_adapters_of_low_rank_have_factors():
    torch.manual_seed(0)
    first, second = Adapted(4, 5), Adapted(5, 3)
    model = nn.Sequential(first, nn.Tanh(), second).to(F64)
    X, y = torch.randn(7, 4, dtype=F64), torch.randint(3, (7,))
    params = [p for p in model.parameters() if p.requires_grad]
    op = fo.EmpiricalFisherLinearOperator(model, CE, params, data=(X, y))
    layers = {"0.down": first.down, "0.up": first.up, "2.down": second.down, "2.up": second.up}
    expected = moments(model, layers, X, y, "expand")
    K = approximate.kfac(op)
    assert len(K.plan) == 4
    for name, (B, A) in expected.items():
        assert_same(block_of(K, op, [f"{name}.layer.weight"]), np.kron(B, A[:-1, :-1]), F64)


@pytest.mark.parametrize("cache", ["none", "auto"])
def test_kfac_keeps_no_batches(cache, monkeypatch):
    """Of batches that are read for it, one is there at a time."""
    alive, most = weakref.WeakSet(), []
    found = sites.sites_of

    def counted(batch, names):
        alive.add(batch)
        most.append(len(alive))
        return found(batch, names)

    monkeypatch.setattr(sites, "sites_of", counted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(6)]
    approximate.kfac(fo.FisherLinearOperator(model, CE, data=data, cache=cache))
    assert len(most) == 6
    assert max(most) <= 2


def test_shared_weights_add_their_factors():
    """W is used twice by the same layer: its factors are those of both uses."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Recorded(nn.Linear(4, 4)), Recorded(nn.Linear(4, 3))

        def forward(self, X):
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(X)))))

    torch.manual_seed(0)
    model = Twice().to(F64)
    X, y = torch.randn(7, 4, dtype=F64), torch.randint(3, (7,))
    op = fo.EmpiricalFisherLinearOperator(model, CE, data=(X, y))
    B, A = moments(model, {"inner": model.inner}, X, y, "expand")["inner"]
    K = approximate.kfac(op)
    assert_same(block_of(K, op, ["inner.layer.weight"]), np.kron(B, A[:4, :4]), F64)
    bias = slice(*op.parameter_spans["inner.layer.bias"])
    assert_same(K.todense()[bias, bias], op.todense()[bias, bias], F64)


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.inner = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, X):
        return torch.tanh(self.inner(self.tokens(X))).mean(1) @ self.tokens.weight.T


def test_tied_embeddings_have_the_nearest_product_to_the_sum_of_both_uses():
    torch.manual_seed(0)
    model = TiedEmbedding().to(F64)
    X, y = torch.randint(6, (7, 4)), torch.randint(6, (7,))
    op = fo.EmpiricalFisherLinearOperator(model, CE, data=(X, y))
    total = 0.0
    left, right = np.zeros((6, 6)), np.zeros((4, 4))
    head = [np.zeros((6, 6)), np.zeros((4, 4))]
    for n in range(7):
        h = model.tokens(X[n : n + 1]).detach().requires_grad_()
        a = torch.tanh(model.inner(h)).mean(1)
        out = a @ model.tokens.weight.T
        loss = CE(out, y[n : n + 1])
        b, c = (x[0].numpy() for x in torch.autograd.grad(loss, [h, out]))
        one_hot, a = np.eye(6)[X[n].numpy()], a[0].detach().numpy()
        left, right = left + one_hot.T @ one_hot / 28, right + b.T @ b / 7
        head = [head[0] + np.outer(c, c) / 7, head[1] + np.outer(a, a) / 7]
    terms = [(left, right), tuple(head)]
    total = sum(np.kron(*term) for term in terms)
    rearranged = sum(np.outer(x.ravel(), z.ravel()) for x, z in terms)
    U, s, Vt = np.linalg.svd(rearranged)
    nearest = s[0] * np.kron(U[:, 0].reshape(6, 6), Vt[0].reshape(4, 4))
    K = approximate.kfac(op)
    assert_same(block_of(K, op, ["tokens.weight"]), nearest, F64, operations=10**5)
    assert np.linalg.eigvalsh(nearest).min() > -1e-12
    assert distance(total, nearest) < 1
    assert "nearest to the sum of its uses" in K.plan["tokens.weight"]


# ---- What holds for every model -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, kind):
    """PSD, not further from F than KFAC, and blocks that are exact where they say so."""
    case = make_case(architecture, "ce", sizes=(6, 5))
    op = kind(case.model, case.loss, case.params, case.data)
    F = op.todense()
    K, E, N, L = (f(op) for f in (approximate.kfac, approximate.ekfac, approximate.kronecker, approximate.layers))
    for A in (K, E, N, L):
        values = np.linalg.eigvalsh(A.todense())
        assert values[0] >= -1e-12 * values[-1]
        assert_same(A.eigvalsh(), values, F64, operations=10**4)
        assert float(approximate.error(op, A)) == pytest.approx(distance(F, A.todense()), abs=1e-7)
    assert distance(F, E.todense()) <= distance(F, K.todense()) + 1e-12
    assert distance(F, N.todense()) <= distance(F, K.todense()) + 1e-12
    assert distance(F, L.todense()) <= min(distance(F, E.todense()), distance(F, N.todense())) + 1e-12
    spans = op.parameter_spans
    for names in L.plan:
        index = np.concatenate([np.arange(*spans[name]) for name in names.split(", ")])
        assert_same(L.todense()[np.ix_(index, index)], F[np.ix_(index, index)], F64)
        F[np.ix_(index, index)] = 0
    assert {name for names in L.plan for name in names.split(", ")} == set(spans)
    assert {name for names in K.plan for name in names.split(", ")} == set(spans)


@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 6), inputs=st.integers(1, 6), outputs=st.integers(1, 5),
    kind=st.sampled_from(KINDS), bias=st.booleans(), loss=st.sampled_from([nn.MSELoss, nn.CrossEntropyLoss]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_properties_of_one_layer(seed, n, inputs, outputs, kind, bias, loss):
    """Of one linear layer and one example, KFAC is exact; EKFAC and the nearest product are never further."""
    torch.manual_seed(seed)
    model = nn.Linear(inputs, outputs, bias=bias).double()
    X = torch.randn(n, inputs, dtype=F64)
    y = torch.randint(outputs, (n,)) if loss is nn.CrossEntropyLoss else torch.randn(n, outputs, dtype=F64)
    op = kind(model, loss(), data=(X, y))
    F = op.todense()
    K, E, N = (f(op).todense() for f in (approximate.kfac, approximate.ekfac, approximate.kronecker))
    scale = np.linalg.norm(F)
    if n == 1:
        assert np.linalg.norm(F - K) <= 1e-12 * scale + 1e-300
    assert np.linalg.norm(F - E) <= np.linalg.norm(F - K) + 1e-12 * scale
    assert np.linalg.norm(F - N) <= np.linalg.norm(F - K) + 1e-12 * scale
    assert np.linalg.norm(F - approximate.layers(op).todense()) <= 1e-12 * scale


def test_the_nearest_kronecker_product_is_that_of_the_singular_vectors():
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    op = fo.EmpiricalFisherLinearOperator(model, CE, data=(torch.randn(9, 4, dtype=F64), torch.randint(3, (9,))))
    rearranged = op.todense().reshape(3, 4, 3, 4).transpose(0, 2, 1, 3).reshape(9, 16)
    U, s, Vt = np.linalg.svd(rearranged)
    expected = s[0] * np.kron(U[:, 0].reshape(3, 3), Vt[0].reshape(4, 4))
    # The gain of the norm is of second order in the change of the vectors.
    assert_same(approximate.kronecker(op).todense(), expected, F64, operations=1 / 2.0**-26)


@pytest.mark.parametrize("build", BUILDERS)
def test_batches_do_not_matter(build):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    X, y = torch.randn(8, 2, 6, dtype=F64), torch.randint(3, (8,))
    whole, split = (
        build(fo.FisherMCLinearOperator(model, CE, data=data)).todense()
        for data in ([(X, y)], [(X[:5], y[:5]), (X[5:], y[5:])])
    )
    assert_same(split, whole, F64, operations=10**6)


@pytest.mark.parametrize("build", BUILDERS)
def test_multiples_sums_dampings_and_submatrices(op, build):
    other = network(fo.EmpiricalFisherLinearOperator)
    assert_same(build(3 * op).todense(), 3 * build(op).todense(), F64, operations=10**6)
    assert_same(build(op.damped(0.5)).todense(), build(op).todense() + 0.5 * np.eye(op.shape[0]), F64, operations=10**6)
    both = build(op + other).todense()
    assert np.isfinite(both).all()
    assert distance((op + other).todense(), both) < 1
    part = op.submatrix(["3.weight", "3.bias"])
    assert build(part).shape == part.shape
    if build in (approximate.kfac, approximate.ekfac, approximate.layers, approximate.diagonal):
        start = op.parameter_spans["3.weight"][0]
        assert_same(build(part).todense(), build(op).todense()[start:, start:], F64, operations=10**6)


def test_layers_of_sums_and_multiples_with_few_rows_are_theirs():
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3).double(), nn.CrossEntropyLoss(reduction="sum")
    data = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (4, 4, 3)]
    A, B, C = (fo.EmpiricalFisherLinearOperator(model, loss, data=own) for own in data)
    for op in (2 * A, A + B, A + C, A + A, 2 * A.damped(0.1) + 3 * C):
        K = approximate.layers(op)
        assert set(K.plan.values()) == {"exact block, by its Gram matrix"}
        np.testing.assert_allclose(K.todense(), op.todense(), atol=1e-12 * op.trace())


def test_layers_take_the_smaller_form():
    few, many = network(n=5, kind=fo.EmpiricalFisherLinearOperator), network(n=60)
    assert "exact block, by its Gram matrix" in set(approximate.layers(few).plan.values())
    assert set(approximate.layers(many).plan.values()) == {"exact block"}
    for op in (few, many):
        K, F = approximate.layers(op), op.todense()
        for names in K.plan:
            index = np.concatenate([np.arange(*op.parameter_spans[name]) for name in names.split(", ")])
            assert_same(K.todense()[np.ix_(index, index)], F[np.ix_(index, index)], F64, operations=10**4)


def test_unused_and_unknown_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Parameter(torch.ones(2))
            self.b = nn.Linear(5, 3)

        def forward(self, X):
            return self.b(torch.tanh(self.a(X)))

    torch.manual_seed(0)
    model = Odd().double()
    op = fo.FisherLinearOperator(model, CE, data=(torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))))
    K, F = approximate.kfac(op), op.todense()
    spans = op.parameter_spans
    index = slice(*spans["unused"])
    assert (K.todense()[index] == 0).all()
    assert "zero" in K.plan["unused"]
    derived = next(names for names in K.plan if "original0" in names)
    assert K.plan[derived] == "exact block"
    index = np.concatenate([np.arange(*spans[name]) for name in derived.split(", ")])
    assert_same(K.todense()[np.ix_(index, index)], F[np.ix_(index, index)], F64)


def test_large_blocks_and_factors_are_diagonals(monkeypatch):
    monkeypatch.setattr("fisherops.approximate.model.LARGEST_BLOCK", 3)
    monkeypatch.setattr("fisherops.approximate.sites.LARGEST_FACTOR", 4)
    op = network()
    K = approximate.kfac(op)
    assert "exact diagonal" in K.plan["2.weight"]
    assert "by their diagonals" in K.plan["0.weight, 0.bias"]
    index = slice(*op.parameter_spans["2.weight"])
    assert_same(K.diagonal()[index], op.diagonal()[index], F64)
    for build in (approximate.kfac, approximate.ekfac, approximate.kronecker):
        found = build(op)
        assert_same(found.todense(), found.T.todense(), F64)
        assert_same(
            found.inv(0.1).todense(), np.linalg.inv(found.todense() + 0.1 * np.eye(op.shape[0])), F64, operations=10**4
        )
    assert distance(op.todense(), approximate.ekfac(op).todense()) <= distance(op.todense(), K.todense())


# ---- What an approximation can do ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("build", BUILDERS)
def test_functions_are_those_of_the_dense_matrix(build, dtype):
    op = network(dtype=dtype)
    K = build(op)
    A, n = K.todense().astype(float), op.shape[0]
    assert K.dtype == op.dtype
    assert_same(K.diagonal(), np.diag(A), dtype)
    assert K.trace() == pytest.approx(np.trace(A), rel=1e3 * float(np.finfo(op.dtype).eps))
    assert_same(K.eigvalsh(), np.linalg.eigvalsh(A), dtype)
    B = A + 0.1 * np.eye(n)
    assert_same(K.inv(0.1).todense(), np.linalg.inv(B), dtype)
    root = K.root(0.1).todense()
    assert_same(root @ root, B, dtype)
    sample = K.inv(0.1).root().todense()
    assert_same(sample @ sample.T, np.linalg.inv(B), dtype)
    assert K.slogdet(0.1).logabsdet == pytest.approx(
        np.linalg.slogdet(B)[1], abs=1e3 * float(np.finfo(op.dtype).eps) * n
    )
    assert_same((2 * K).todense(), 2 * A, dtype)
    assert_same(K.damped(0.1).todense(), B, dtype)
    assert_same(K.damped(0.1).inv().todense(), np.linalg.inv(B), dtype)
    assert_same((2 * K.damped(0.1)).inv(0.3).todense(), np.linalg.inv(2 * B + 0.3 * np.eye(n)), dtype)
    d = np.linspace(0.1, 1, n).astype(op.dtype)
    assert_same(K.damped(d).todense(), A + np.diag(d), dtype)
    assert isinstance(2 * K, approximate.StructuredOperator)
    assert isinstance(K.damped(1), approximate.StructuredOperator)
    for x in (np.ones((n, 2), op.dtype), torch.ones(n, dtype=dtype), torch.ones(n, 3, dtype=torch.float32)):
        y = K @ x
        assert type(y) is type(x)
        assert y.dtype == x.dtype
        assert y.shape == x.shape


@given(
    seed=st.integers(0, 2**31), rank=st.integers(1, 40), decay=st.floats(0, 8), dtype=st.sampled_from([torch.float32, F64])
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_eigenvectors_of_large_factors_of_low_rank(seed, rank, decay, dtype):
    """They are as good as those of the general routine: orthogonal, and the product is the matrix, to rounding."""
    torch.manual_seed(seed)
    n = structured._LARGE
    X = torch.randn(n, rank, dtype=dtype) * torch.logspace(0, -decay, rank, dtype=dtype)
    A = X @ X.T
    with pytest.MonkeyPatch.context() as patch:
        sizes = []
        eigh = torch.linalg.eigh
        patch.setattr(torch.linalg, "eigh", lambda x: (sizes.append(x.shape[-1]), eigh(x))[1])
        values, V = structured.eigenvectors_of(A[None])
    assert max(sizes) <= n // 2
    assert values.min() >= -1e2 * torch.finfo(dtype).eps * values.max()
    assert_same((V[0] * values[0] @ V[0].T).numpy(), A.numpy(), dtype)
    assert_same((V[0].T @ V[0]).numpy(), np.eye(n), dtype)
    full = torch.randn(n, n, dtype=dtype)
    values, V = structured.eigenvectors_of((full @ full.T)[None])
    assert_same((V[0] * values[0] @ V[0].T).numpy(), (full @ full.T).numpy(), dtype)


@pytest.mark.parametrize("build", BUILDERS)
def test_pickles_and_files_keep_every_bit(build, op, tmp_path):
    K = build(op)
    expected, inverse = K.todense(), K.inv(0.1).todense()
    K.save(tmp_path / "K.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["K.pt"]
    for other in (pickle.loads(pickle.dumps(K)), approximate.load(tmp_path / "K.pt")):
        np.testing.assert_array_equal(other.todense(), expected)
        np.testing.assert_array_equal(other.inv(0.1).todense(), inverse)
        assert other.plan == K.plan


def test_a_file_is_written_whole_or_not_at_all(op, tmp_path, monkeypatch):
    K = approximate.kfac(op)
    K.save(tmp_path / "K.pt")
    before = (tmp_path / "K.pt").read_bytes()

    def fail(value, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        approximate.diagonal(op).save(tmp_path / "K.pt")
    assert (tmp_path / "K.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["K.pt"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "K.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match="`path` must be a file that `K.save.path.` wrote, got"):
        approximate.load(tmp_path / "K.pt")
    torch.save({"format": "other"}, tmp_path / "K.pt")
    with pytest.raises(ValueError, match="Save the approximation again"):
        approximate.load(tmp_path / "K.pt")
    with pytest.raises(FileNotFoundError):
        approximate.load(tmp_path / "none.pt")


# ---- Nyström's method ---------------------------------------------------------------------------------


def large(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    X, y = torch.randn(40, 6, dtype=F64), torch.randint(4, (40,))
    return fo.FisherLinearOperator(model, CE, data=(X, y), **options)


@pytest.mark.parametrize("path", ["pivots", "vectors"])
@pytest.mark.parametrize("rank", [1, 5, 20, 60])
def test_nystrom_is_within_its_bound(rank, path, monkeypatch):
    """E tr (F − K) ≤ (1 + k / (r − k − 1)) Σ_{j>k} λ_j for normal vectors, of which pivots are no worse here; K ≤ F."""
    if path == "vectors":
        monkeypatch.setattr("fisherops.approximate.lowrank._MANY_ROWS", 0)
    op = large()
    F = op.todense()
    values = np.linalg.eigvalsh(F)[::-1]
    lost = []
    for seed in range(10):
        K = approximate.nystrom(op, rank=rank, seed=seed)
        assert K.plan["0.weight"].startswith(f"eigenvectors of a matrix of rank {rank}")
        difference = np.linalg.eigvalsh(F - K.todense())
        assert difference[0] >= -1e-12 * values[0]
        lost.append(difference.sum())
    least = values[rank:].sum()
    bound = (
        min((1 + k / (rank - k - 1)) * values[k:].sum() for k in range(max(1, rank - 1)) if rank - k - 1 > 0 or k == 0)
        if rank > 1
        else values.sum()
    )
    assert least - 1e-12 <= np.mean(lost) <= bound + 3 * np.std(lost) / 10**0.5 + 1e-12


@pytest.mark.parametrize("path", ["pivots", "vectors"])
@pytest.mark.parametrize("tol", [0.3, 0.05, 1e-3])
def test_nystrom_meets_the_error(tol, path, monkeypatch):
    if path == "vectors":
        monkeypatch.setattr("fisherops.approximate.lowrank._MANY_ROWS", 0)
    op = large()
    K = approximate.nystrom(op, tol=tol)
    assert distance(op.todense(), K.todense()) <= tol
    assert float(approximate.error(op, K)) <= tol
    if path == "pivots":
        smaller = approximate.nystrom(op, rank=len(K.values) - 1)
        assert distance(op.todense(), smaller.todense()) > tol * 0.5


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_nystrom_for_a_damping_has_the_rank_of_the_effective_dimension(damping):
    op = large()
    K = approximate.nystrom(op, damping=damping)
    needed = float(linalg.effective_dimension(op, damping).value)
    assert len(K.values) >= min(2 * needed, np.linalg.matrix_rank(op.todense()) - 1)


def test_nystrom_of_zero_and_of_full_rank():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    zero = fo.EmpiricalFisherLinearOperator(
        model,
        nn.CrossEntropyLoss(ignore_index=0, reduction="sum"),
        data=(torch.randn(4, 3, dtype=F64), torch.zeros(4, dtype=torch.int64)),
    )
    for build in BUILDERS:
        K = build(zero)
        assert (K.todense() == 0).all()
        assert float(approximate.error(zero, K)) == 0
        with pytest.raises(
            ValueError, match="`damping` must be positive, got 0, because the approximation is singular"
        ):
            K.inv()


# ---- Errors, and comparisons --------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
def test_estimated_errors_cover_the_exact_ones(build, op):
    K = build(op)
    exact = approximate.error(op, K)
    assert exact.standard_error == 0
    assert exact.value == pytest.approx(distance(op.todense(), K.todense()), abs=1e-7)
    estimates = [approximate.error(op, K, probes=200, seed=seed) for seed in range(5)]
    assert all(abs(x.value - exact.value) <= 5 * x.standard_error + 1e-7 for x in estimates)


def test_errors_of_layers(op):
    K, F = approximate.kfac(op), op.todense()
    found = approximate.error(op, K, per_layer=True)
    assert list(found) == list(K.plan)
    for names, error in found.items():
        index = np.concatenate([np.arange(*op.parameter_spans[name]) for name in names.split(", ")])
        block = F[np.ix_(index, index)]
        assert error.value == pytest.approx(distance(block, K.todense()[np.ix_(index, index)]), abs=1e-7)
    foreign = approximate.error(op, aslinearoperator(K.todense()), per_layer=True)
    assert list(foreign) == list(op.parameter_spans)


@pytest.mark.parametrize("by_terms", [True, False])
@pytest.mark.parametrize("architecture", ["sequence", "images", "tied", "network"])
def test_inner_products_with_F_are_those_of_dense_matrices(architecture, by_terms, monkeypatch):
    """Of factors by pairs of positions, and of rows; functions of an approximation included."""
    monkeypatch.setattr("fisherops.approximate.sites.pairs_are_cheaper", lambda *_: by_terms)
    if architecture == "network":
        op = network()
    elif architecture == "tied":
        model = TiedEmbedding().to(F64)
        op = fo.FisherLinearOperator(model, CE, data=(torch.randint(6, (7, 4)), torch.randint(6, (7,))))
    else:
        model, X, y = recorded(architecture)
        op = fo.FisherLinearOperator(model, CE, data=[(X[:4], y[:4]), (X[4:], y[4:])])
    F = op.todense()
    for build in (approximate.kfac, approximate.ekfac, approximate.kronecker):
        for separate_bias in (True, False):
            K = build(op, separate_bias=separate_bias)
            for own in (K, 2 * K, K.damped(0.1), K.inv(0.1)):
                expected = np.trace(F @ own.todense())
                assert inner_product(op.score_matrix, own) == pytest.approx(expected, rel=1e-10)
    for K in (approximate.nystrom(op), approximate.layers(op).inv(0.1), aslinearoperator(F)):
        assert inner_product(op.score_matrix, K) is None


def test_errors_of_other_operators(op):
    F = op.todense()
    assert float(approximate.error(op, aslinearoperator(np.zeros_like(F)))) == pytest.approx(1)
    assert float(approximate.error(op.damped(0.1), op)) == pytest.approx(distance(F + 0.1 * np.eye(len(F)), F))
    assert float(approximate.error(op, op)) < 1e-7


def test_compare_prints_one_line_for_each(op, capsys):
    table = approximate.compare(op, damping=[1e-2, 1e-3])
    assert [x.name for x in table] == ["none", "diagonal", "layers", "kfac", "ekfac", "kronecker", "nystrom"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert "λ = 0.01" in lines[0]
    for line in table:
        assert list(line.iterations) == [1e-2, 1e-3]
        counts = [x if x is None else str(x) for x in line.iterations.values()]
        assert lines[1 + table.index(line)].split()[-2:] == counts
    errors = {x.name: x.error.value for x in table}
    assert errors["layers"] <= errors["ekfac"] <= errors["kfac"]
    assert all(x.nbytes > 0 and x.seconds > 0 for x in table[1:])
    few = approximate.compare(op, ["diagonal"], damping=1e-4, maxiter=2, prints=False)
    assert few[1].iterations == {1e-4: None}
    mapping = approximate.compare(op, {"mine": approximate.kfac(op)}, prints=False)
    assert len(mapping[0].iterations) == 3
    largest = np.linalg.eigvalsh(op.todense())[-1]
    np.testing.assert_allclose(list(mapping[0].iterations), [1e-4 * largest, 1e-6 * largest, 1e-8 * largest], rtol=0.05)
    assert mapping[1].name == "mine"
    assert np.isnan(mapping[1].seconds)


# ---- Preconditioners ----------------------------------------------------------------------------------


@pytest.mark.parametrize("M", ["kfac", "ekfac", "nystrom", "auto", "operator", "jacobi"])
def test_preconditioned_solves(M):
    op = large()
    b = np.random.default_rng(0).standard_normal(op.shape[0])
    expected = np.linalg.solve(op.todense() + 1e-3 * np.eye(op.shape[0]), b)
    given_M = approximate.ekfac(op).inv(1e-3) if M == "operator" else M
    solution = linalg.solve(op, b, 1e-3, method="primal", M=given_M, rtol=1e-10)
    assert solution.converged
    np.testing.assert_allclose(solution.x, expected, rtol=1e-7)
    shifted = linalg.solve(op.damped(5e-4), b, 5e-4, method="primal", M=given_M, rtol=1e-10)
    np.testing.assert_allclose(shifted.x, expected, rtol=1e-7)


def test_the_automatic_preconditioner_is_the_one_of_fewer_products(monkeypatch):
    """Products are those with G or its transpose, a vector each."""
    op = large()
    G, b = op.score_matrix, np.random.default_rng(0).standard_normal(op.shape[0])
    top = np.linalg.eigvalsh(op.todense())[-1]
    count = []
    for name in ("product", "_mul", "_mul_t"):
        method = getattr(type(G), name)
        monkeypatch.setattr(type(G), name, lambda self, V, own=method: (count.append(len(V)), own(self, V))[1])
    for ratio, best in ((0.3, "jacobi"), (1e-7, "nystrom")):
        products = {}
        for M in ("jacobi", "nystrom", "auto"):
            count.clear()
            linalg.solve(op, b, ratio * top, method="primal", M=M, rtol=1e-6)
            products[M] = sum(count)
        assert min(products, key=products.__getitem__) == best
        assert products["auto"] == products[best]


def test_nystrom_preconditions_best():
    op = large()
    b = np.random.default_rng(0).standard_normal(op.shape[0])
    iterations = {M: linalg.solve(op, b, 1e-4, method="primal", M=M, rtol=1e-8).iterations for M in (None, "nystrom")}
    assert iterations["nystrom"] < iterations[None] / 2


@pytest.mark.parametrize("build", BUILDERS)
def test_scipys_solvers_take_the_inverse(build, op):
    M = build(op).inv(1e-2)
    b = np.ones(op.shape[0])
    x, info = cg(op.damped(1e-2), b, M=M, rtol=1e-10)
    assert info == 0
    np.testing.assert_allclose(x, np.linalg.solve(op.todense() + 1e-2 * np.eye(len(b)), b), rtol=1e-6)
    X = np.random.default_rng(0).standard_normal((op.shape[0], 2))
    values, _ = lobpcg(op.damped(1e-2), X, M=M, largest=True, tol=1e-4, maxiter=200)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(op.todense())[-2:] + 1e-2, rtol=1e-5)


# ---- Bad input ----------------------------------------------------------------------------------------


def test_operators_without_scores_are_refused(op):
    for other in (op - op, aslinearoperator(op.todense()), op.T @ op):
        for build in BUILDERS:
            with pytest.raises(TypeError, match="`op` must be a Fisher operator, got"):
                build(other)
    with pytest.raises(ValueError, match="`op` must have the same damping for all parameters"):
        approximate.kfac(op.damped(np.ones(op.shape[0])))
    with pytest.raises(ValueError, match="`op` must have whole parameters for this approximation"):
        approximate.kfac(op.submatrix(slice(0, 7)))


def test_options_out_of_range(op):
    with pytest.raises(ValueError, match="`sharing` must be 'expand' or 'reduce', got 'both'"):
        approximate.kfac(op, "both")
    with pytest.raises(
        ValueError, match="`sharing` must be 'expand' for a model without shared positions, got 'reduce'"
    ):
        approximate.ekfac(op, "reduce")
    with pytest.raises(ValueError, match=r"`rank` must be at most the 27 rows of the score matrix, got 28"):
        approximate.nystrom(op, rank=28)
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        approximate.nystrom(op, rank=0)
    with pytest.raises(ValueError, match="`tol` must be above 0 and below 1, got 2"):
        approximate.nystrom(op, tol=2)
    with pytest.raises(ValueError, match="`rank`, `tol` and `damping` must not be passed together"):
        approximate.nystrom(op, rank=2, tol=0.1)
    with pytest.raises(ValueError, match="`damping` must be positive, got 0. Pass the damping of the system"):
        approximate.nystrom(op, damping=0)
    with pytest.raises(ValueError, match="`tol` must be at least 0 and below 1, got 1"):
        approximate.kronecker(op, tol=1)
    with pytest.raises(ValueError, match="`max_memory` must be at least .* for the exact blocks of all layers"):
        approximate.layers(network(max_memory=100))
    for build in (approximate.nystrom, approximate.kronecker):
        with pytest.raises(TypeError, match="`tol` must be a real number, got str"):
            build(op, tol="a")
    with pytest.raises(TypeError, match="`seed` must be an integer, got 'a'"):
        approximate.nystrom(op, seed="a")
    K = approximate.kfac(op)
    with pytest.raises(TypeError, match="`seed` must be an integer, got 'a'"):
        approximate.error(op, K, seed="a")
    with pytest.raises(ValueError, match="`damping` must be at least 0 and finite"):
        K.inv(-1)
    with pytest.raises(ValueError, match="`split` must be 'exact' or 'factored', got 'half'"):
        K.inv(1, split="half")
    with pytest.raises(ValueError, match="`split` must be 'exact' for an approximation without Kronecker factors"):
        approximate.ekfac(op).inv(1, split="factored")
    with pytest.raises(TypeError, match="`K` must be a SciPy LinearOperator, got ndarray"):
        approximate.error(op, K.todense())
    with pytest.raises(ValueError, match="`K` must have the shape of `op`"):
        approximate.error(op, aslinearoperator(np.eye(3)))
    with pytest.raises(ValueError, match="`approximations` must be among 'diagonal', .* got 'shampoo'"):
        approximate.compare(op, ["shampoo"])
    with pytest.raises(ValueError, match="`damping` must be positive, got 0"):
        approximate.compare(op, damping=0)
    with pytest.raises(ValueError, match="`damping` must have at least one value, got none"):
        approximate.compare(op, damping=[])
    with pytest.raises(ValueError, match="`rtol` must be above 0 and below 1, got 0"):
        approximate.compare(op, rtol=0)
    with pytest.raises(ValueError, match="`maxiter` must be at least 1, got 0"):
        approximate.compare(op, maxiter=0)
    with pytest.raises(TypeError, match="`approximations` must be names or what the functions .* got int for 'int'"):
        approximate.compare(op, [3])
    assert len(approximate.compare(op, "kfac", damping=np.array([0.1, 0.2]), prints=False)[1].iterations) == 2
    with pytest.raises(
        ValueError, match="`M` must be 'jacobi', 'kfac', 'ekfac', 'nystrom', 'auto', None or a LinearOperator"
    ):
        linalg.solve(op, np.ones(op.shape[0]), 1.0, method="primal", M="shampoo")
    with pytest.raises(TypeError, match="`op` must be a Fisher operator, got"):
        linalg.solve(aslinearoperator(op.todense()), np.ones(op.shape[0]), 1.0, method="primal", M="kfac")


def test_terms_that_do_not_belong_to_examples():
    """Of a model that pools the examples of a batch there is no layer-wise structure; the diagonal stays."""
    model = nn.Linear(3, 2).double()

    def pooled(X):
        return model(X).mean(0, keepdim=True)

    op = fo.EmpiricalFisherLinearOperator(
        pooled,
        CE,
        list(model.parameters()),
        data=[(torch.randn(4, 3, dtype=F64), torch.tensor([0]))],
        check_deterministic=False,
        batch_size_fn=len,
    )
    with pytest.raises(
        NotImplementedError, match="layers cannot be told apart for this model: .* Use `approximate.diagonal`"
    ):
        approximate.kfac(op)


def test_overflow_raises():
    """The rows are finite, and their squares are not."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    op = fo.EmpiricalFisherLinearOperator(model, nn.L1Loss(), data=(1e25 * torch.randn(6, 3), torch.randn(6, 2)))
    for build in BUILDERS:
        with pytest.raises(FloatingPointError, match="must be finite"):
            build(op)
