"""Convolutions held by their inputs and gradients: the same matrix as loops over examples, in a fraction of the memory."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from tolerances import assert_same
from torch import nn
from torch.nn import functional

import fisherops as fo
from fisherops._sizes import HOST, SIZES

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
N = 4


@dataclass
class Case:
    """A convolution of images, with scores for each example, for each output, or for each term."""

    model: nn.Module
    X: torch.Tensor
    rows: str
    kind: str

    def operator(self, **options):
        parameters = list(self.model.parameters())
        if self.rows == "term":  # several terms for each example
            y = torch.randint(3, (N, *self.model(self.X).shape[2:]), generator=torch.Generator().manual_seed(1))
            data, loss = [(self.X[:3], y[:3]), (self.X[3:], y[3:])], nn.CrossEntropyLoss(reduction="sum")
        else:
            y = torch.zeros(N, 3, dtype=self.X.dtype)
            data, loss = [(self.X[:3], y[:3]), (self.X[3:], y[3:])], nn.MSELoss(reduction="sum")
        if self.kind == "exact":
            return fo.FisherLinearOperator(self.model, loss, parameters, data, **options), loss, y
        return fo.EmpiricalFisherLinearOperator(self.model, loss, parameters, data, rows=self.rows, **options), loss, y

    def scores(self, loss, y):
        """Rows of G by one gradient after the other; those of the exact Fisher of MSELoss are √2 J."""
        model, X = copy.deepcopy(self.model).double(), self.X.double()
        y = y.double() if y.is_floating_point() else y
        rows = []
        for n in range(N):
            f = model(X[n : n + 1])
            if self.kind == "exact":
                terms = 2**0.5 * f[0]
            elif self.rows == "term":
                terms = functional.cross_entropy(f, y[n : n + 1], reduction="none").flatten()
            else:
                terms = loss(f, y[n : n + 1])[None]
            for term in terms:
                gradients = torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
                rows.append(torch.cat([g.flatten() for g in gradients]))
        return torch.stack(rows).numpy()


class Features(nn.Module):
    """A few numbers for each image that depend on all positions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, X):
        h = self.layer(X).flatten(1)
        return torch.stack(
            [h.tanh().sum(1), h.square().mean(1), (h * torch.linspace(0, 1, h.shape[1])).cos().sum(1)], 1
        )


class Pixels(nn.Module):
    """Class scores at each position."""

    def __init__(self, layer, channels):
        super().__init__()
        self.layer, self.mix = layer, nn.Parameter(torch.randn(3, channels))

    def forward(self, X):
        return torch.einsum("nc...,kc->nk...", self.layer(X).tanh(), self.mix)


@st.composite
def convolutions(draw):
    """Draw a convolution and images."""
    d, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    transposed = draw(st.booleans())

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * d))

    kernel, stride, dilation, padding = each(1, 3), each(1, 2), each(1, 2), each(0, 1)
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    size = [draw(st.integers(1, 3)) + t * (k - 1) for k, t in zip(kernel, dilation, strict=True)]
    if transposed:
        size = each(3, 4)
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, t) - 1)) for s, t in zip(stride, dilation, strict=True)
        )
    elif stride == (1,) * d and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
    if not transposed:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = (TRANSPOSED if transposed else PLAIN)[d - 1](inputs, outputs, kernel, padding=padding, **options)
    kind, rows = draw(st.sampled_from([("exact", "datum"), ("empirical", "datum"), ("empirical", "term")]))
    model = Pixels(layer, outputs) if rows == "term" else Features(layer)
    return Case(model.to(dtype), torch.randn(N, inputs, *size, dtype=dtype), rows, kind)


@pytest.fixture(params=["kernels", "unfolded", "small blocks"])
def held_as_factors(request):
    """Hold every convolution as factors, multiplied by PyTorch's kernels or unfolded, also in blocks of odd sizes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("build", "convolutions"):
            patch.setattr(f"fisherops.scores.{module}.rows_are_better", lambda *_: False)
        patch.setattr("fisherops.scores.convolutions._SHORT", 0)
        if request.param != "kernels":
            patch.setattr("fisherops.scores.convolutions._has_kernels", lambda x: False)
        if request.param == "small blocks":
            patch.setitem(SIZES, torch.device("cpu"), HOST._replace(filling=40))
            for name, value in {"_UNFOLDED": 1, "_TERMS": 3, "_PIECE": 2}.items():
                patch.setattr(f"fisherops.scores.convolutions.{name}", value)
        yield request.param


@settings(
    max_examples=settings.default.max_examples // 2,
    suppress_health_check=[*settings.default.suppress_health_check, HealthCheck.function_scoped_fixture],
)
@given(convolutions(), st.integers(1, 3))
def test_convolutions_are_those_of_loops(held_as_factors, case, K):
    op, loss, y = case.operator(cache="factors")
    G = case.scores(loss, y)
    rng = np.random.default_rng(0)
    V, W = (rng.standard_normal((size, K)).astype(op.dtype) for size in G.shape[::-1])
    F, scores = G.T @ G, op.scores
    assert_same(op @ V, F @ V, op.dtype)
    assert all("factors" in entry.form for entry in op.plan.entries)
    assert_same(scores @ V, G @ V, op.dtype)
    assert_same(scores.T @ W, G.T @ W, op.dtype)
    assert_same(op.diagonal(), np.diag(F), op.dtype)
    assert_same(op.trace(), np.trace(F), op.dtype)
    assert_same(scores.gram(), G @ G.T, op.dtype)
    assert_same(scores.todense(), G, op.dtype)
    assert_same(op.todense(), F, op.dtype)


class Residual(nn.Module):
    """Two convolutions of one input, added."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 3, 2, 1, bias=False)

    def forward(self, X):
        return (self.a(X) + self.b(X).tanh()).tanh().flatten(1)[:, :5]


class Shared(nn.Module):
    """One weight applied at two sizes, at one of them twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, X):
        h = self.layer(self.layer(X).tanh()).tanh()
        return h.flatten(1)[:, :4] + self.layer(h[..., ::2]).flatten(1)[:, :4]


class Standardized(nn.Conv2d):
    """A weight without its mean, over its standard deviation."""

    def forward(self, X):
        W = self.weight
        W = (W - W.mean((1, 2, 3), keepdim=True)) / W.std((1, 2, 3), keepdim=True)
        return functional.conv2d(X, W, self.bias, padding=1).tanh().flatten(1)[:, :4]


class Frames(nn.Module):
    """Images that are sequences of frames, the frames first."""

    def __init__(self, frames_first):
        super().__init__()
        self.layer, self.frames_first = nn.Conv1d(1, 4, 2, bias=False), frames_first

    def forward(self, X):
        X = X.flatten(2)[:, :, :6]
        frames = (X.transpose(0, 1) if self.frames_first else X).flatten(0, 1)[:, None]
        h = self.layer(frames).tanh().flatten(1)
        return h.unflatten(0, (3, -1)).sum(0) if self.frames_first else h.unflatten(0, (-1, 3)).sum(1)


class OneByOne(nn.Module):
    """Images without an axis of examples, and one whose weight was transposed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 2)

    def forward(self, X):
        h = torch.stack([self.layer(x) for x in X]).tanh()
        return functional.conv2d(h, self.layer.weight.transpose(0, 1).flip(2)).flatten(1)[:, :4]


MODELS = {
    "residual": Residual,
    "shared": Shared,
    "standardized": lambda: Standardized(3, 4, 3),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 3)), nn.Flatten()),
    "frames last": lambda: Frames(False),
    "frames first": lambda: Frames(True),
    "one by one": OneByOne,
}


def make(name, size=6, **options):
    """Return an operator of a model, a function that gives its rows by loops, and the model."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    X = torch.randn(size, 3, 4, 5, dtype=torch.float64)
    y = torch.randn_like(model(X)).detach()
    loss, parameters = nn.MSELoss(reduction="sum"), list(model.parameters())

    def rows():
        terms = [loss(model(X[n : n + 1]), y[n : n + 1]) for n in range(size)]
        gradients = [torch.autograd.grad(term, parameters) for term in terms]
        return torch.stack([torch.cat([g.flatten() for g in own]) for own in gradients]).numpy()

    data = list(zip(X.split(4), y.split(4), strict=True))
    return fo.EmpiricalFisherLinearOperator(model, loss, parameters, data, **options), rows(), model


@pytest.mark.parametrize("name", MODELS)
def test_ways_to_use_a_weight(held_as_factors, name):
    op, G, _ = make(name, cache="factors")
    D = G.shape[1]
    V = np.random.default_rng(0).standard_normal((D, 2))
    assert_same(op @ V, G.T @ (G @ V), op.dtype)
    assert_same(op.scores.todense(), G, op.dtype)
    assert_same(op.scores.gram(), G @ G.T, op.dtype)
    assert_same(op.diagonal(), (G**2).sum(0), op.dtype)
    assert_same(op.trace(), (G**2).sum(), op.dtype)
    x = fo.linalg.solve(op, V[:, 0], 0.1, method="dual").x
    assert_same(x, np.linalg.solve(G.T @ G + 0.1 * np.eye(D), V[:, 0]), op.dtype, 10**5)
    largest = eigsh(op, 1, v0=np.ones(D), return_eigenvectors=False)
    assert_same(largest, np.linalg.eigvalsh(G @ G.T)[-1:], op.dtype, 10**5)
    assert "datum by datum" not in str(op.plan)
    assert all("factors" in entry.form for entry in op.plan.entries)


def test_convolutions_in_files(held_as_factors, tmp_path):
    op, G, _ = make("residual", cache="factors", spill=tmp_path, max_memory=7500)
    v = np.ones(G.shape[1])
    for _ in range(2):
        assert_same(op @ v, G.T @ (G @ v), op.dtype)
    assert op.plan.file_size > 0


def test_other_draws(held_as_factors):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    data = (torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
    v = np.ones(sum(p.numel() for p in model.parameters()))
    for seed in (0, 1):
        products = [
            fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data, cache=cache, mc_samples=2).resample(seed)
            @ v
            for cache in ("factors", "none", "linearization")
        ]
        for product in products[1:]:
            assert_same(product, products[0], np.float64)


# ---- Which form ---------------------------------------------------------------------------------------------------


def deep(channels=32):
    """A network whose second convolution has many weights and few positions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, 2, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.Flatten(),
        nn.Linear(64 * channels, 3),
    )  # fmt: skip
    X, y = torch.randn(32, 1, 16, 16), torch.randint(3, (32,))
    return model, list(zip(X.split(8), y.split(8), strict=True))


def storages(op):
    """Bytes of the tensors that a cache holds."""
    found = {}
    for batch in op.scores._cache._batches:
        for t in [batch._dense, *(t for _, columns in batch.blocks for t in columns.tensors)]:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("samples", [1, 3])
def test_the_plan_counts_what_is_held(samples):
    model, data = deep()
    v = np.ones(sum(p.numel() for p in model.parameters()), np.float32)
    plans = {}
    for cache in ("scores", "factors", "auto"):
        op = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data, cache=cache, mc_samples=samples)
        op @ v
        plans[cache] = op.plan
        assert op.plan.nbytes == storages(op)
    # The second convolution by 64 positions of 32 inputs and outputs, instead of 9,216 numbers for each row.
    assert plans["factors"].nbytes < 0.5 * plans["scores"].nbytes
    # With one row for each example, rows are multiplied faster.
    assert (plans["auto"].nbytes > plans["factors"].nbytes) == (samples == 1)


def test_inputs_of_two_convolutions_are_counted_once(held_as_factors):
    op, G, _ = make("residual", cache="factors")
    op @ np.ones(G.shape[1])
    assert op.plan.nbytes == storages(op)


def test_fast_rows_leave_memory_for_later_batches():
    model, data = deep()
    v = np.ones(sum(p.numel() for p in model.parameters()), np.float32)

    def operator(**options):
        return fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data, **options)

    fast, small = operator(), operator(cache="factors")
    expected = fast @ v
    assert_same(small @ v, expected, np.float32)
    op = operator(max_memory=(fast.plan.nbytes + 3 * small.plan.nbytes) // 4)
    assert_same(op @ v, expected, np.float32)
    assert "none" not in {entry.form for entry in op.plan.entries}
    sizes = [entry.nbytes for entry in op.plan.entries]
    assert sizes[0] == fast.plan.entries[0].nbytes
    assert sizes[1:] == [small.plan.entries[0].nbytes] * 3
    assert "rows that are multiplied faster would take" in str(op.plan)


# ---- Rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize(("size", "images"), [(32, 64), (128, 1)])
def test_sums_over_positions_keep_their_digits(monkeypatch, size, images, has_kernels):
    """Equal terms round in the same direction, so that errors add up."""
    for module in ("build", "convolutions"):
        monkeypatch.setattr(f"fisherops.scores.{module}.rows_are_better", lambda *_: False)
    monkeypatch.setattr("fisherops.scores.convolutions._has_kernels", lambda x: has_kernels)
    net = nn.Conv2d(1, 2, 3, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.7)
    X = torch.full((images, 1, size, size), 0.3)
    positions = (size - 2) ** 2
    op = fo.EmpiricalFisherLinearOperator(
        lambda x: net(x).mean((1, 2, 3)), nn.L1Loss(reduction="sum"), list(net.parameters()),
        data=(X, torch.zeros(images)), cache="factors",
    )  # fmt: skip
    # Each of the 18 weights is multiplied by 0.3 at all positions of one of two channels.
    row = 0.15
    close = {"rtol": 512 * np.finfo(np.float32).eps}
    np.testing.assert_allclose(op.scores @ np.ones(18), np.full(images, 18 * row), **close)
    np.testing.assert_allclose(op.scores.T @ np.ones(images), np.full(18, images * row), **close)
    np.testing.assert_allclose(op.diagonal(), np.full(18, images * row**2), **close)
    assert "datum by datum" not in str(op.plan)
    assert positions * images > 2**12
