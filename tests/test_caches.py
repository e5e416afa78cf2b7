"""What is kept between products: always the same matrix, whatever the form, within its memory, and never stale."""

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import re
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import ARCHITECTURES, KINDS, LOSSES, make_case
from tolerances import assert_same
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fisherops as fo
from fisherops._sizes import HOST, SIZES
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.build import RowsBuilder

CACHES = ("auto", "scores", "factors", "linearization", "none")


def differentiated():
    """Let operators that keep nothing, and are used the first time within, always go by J v and Jᵀu."""
    return mock.patch("fisherops.scores.cache._FEW_VECTORS", 0)


def check(model, loss, data, kind="mc", caches=CACHES, dtype=torch.float64, **options):
    """Every form gives the matrix of J v and Jᵀu; returns the plan of "auto"."""
    plain = KINDS[kind](model, loss, data=data, cache="none", **options)
    V = np.random.default_rng(0).standard_normal((plain.shape[0], 3)).astype(plain.dtype)
    with differentiated():
        expected, F = plain @ V, plain.todense()
    plan = None
    for cache in caches:
        op = KINDS[kind](model, loss, data=data, cache=cache, **options)
        first = op @ V
        assert_same(first, expected, dtype)
        np.testing.assert_array_equal(op @ V, first)
        assert_same(op @ V[:, 0], expected[:, 0], dtype)
        assert_same(op.todense(), F, dtype)
        assert_same(op.diagonal(), np.diag(F), dtype)
        plan = plan or op.plan
    return plan


@given(
    st.builds(
        make_case,
        architecture=st.sampled_from(ARCHITECTURES),
        loss=st.sampled_from(sorted(LOSSES)),
        reduction=st.sampled_from(["mean", "sum"]),
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        C=st.integers(2, 4),
        seed=st.integers(0, 10**6),
    ),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["term", "datum"]),
    st.integers(1, 5),
)
def test_every_form_is_the_same_matrix(case, kind, rows, samples):
    options = {"mc": {"rows": rows, "mc_samples": samples}, "exact": {}, "empirical": {"rows": rows}}[kind]
    check(case.model, case.loss, case.data, kind, dtype=case.dtype, **options)


class Lambda(nn.Module):
    def __init__(self, function, *modules, **parameters):
        super().__init__()
        self.parts = nn.ModuleList(modules)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.function = function

    def forward(self, X):
        return self.function(self, X)


def transformer(batch_first):
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(self, X):
        h = self.parts[0](X) + self.position
        h = self.parts[1](h) if batch_first else self.parts[1](h.transpose(0, 1)).transpose(0, 1)
        return self.parts[2](h)

    return Lambda(run, nn.Embedding(7, 4, padding_idx=0), body, nn.Linear(4, 3), position=torch.randn(5, 4))


def tokens(n=3, length=5, count=7):
    return torch.randint(count, (n, length))


def vectors(*shape):
    return torch.randn(*shape).double()


MODELS = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), lambda: vectors(3, 4, 4)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(2, 3, (3, 2), dilation=(1, 2), bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)), lambda: vectors(3, 2, 5, 4)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)), lambda: vectors(3, 1, 3, 3, 3)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(144, 2)), lambda: vectors(3, 2, 2, 2)),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3)), lambda: vectors(4, 1, 3, 3)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), lambda: vectors(3, 5, 3)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2)), lambda: vectors(3, 1, 3, 3)),
    "rms norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2, bias=False)), lambda: vectors(3, 5, 3)),
    "bilinear": (lambda: Lambda(lambda s, X: s.parts[0](X, X), nn.Bilinear(3, 3, 2)), lambda: vectors(4, 3)),
    "functions of parameters": (lambda: Lambda(lambda s, X: (X @ s.a.exp()).tanh() @ s.b.softmax(0), a=vectors(3, 4), b=vectors(4, 2)), lambda: vectors(4, 3)),
    "transformer": (lambda: transformer(True), tokens),
    "transformer, positions first": (lambda: transformer(False), tokens),
    "lstm": (lambda: Lambda(lambda s, X: s.parts[1](s.parts[0](X)[0]), nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)), lambda: vectors(3, 4, 3)),
    "gru, positions first": (lambda: Lambda(lambda s, X: s.parts[1](s.parts[0](X.transpose(0, 1))[0]).transpose(0, 1), nn.GRU(3, 4), nn.Linear(4, 2)), lambda: vectors(3, 4, 3)),
    "tied embedding": (lambda: Lambda(lambda s, X: functional.linear(s.parts[0](X).cumsum(1).tanh(), s.parts[0].weight), nn.Embedding(7, 4)), tokens),
    "positions looked up once": (lambda: Lambda(lambda s, X: s.parts[2]((s.parts[0](X) + s.parts[1](torch.arange(5)[None])).cumsum(1).tanh()), nn.Embedding(7, 4), nn.Embedding(6, 4), nn.Linear(4, 3)), tokens),
    "positions looked up once, as many as data": (lambda: Lambda(lambda s, X: s.parts[2]((s.parts[1](torch.arange(3)) + s.parts[0](X)).cumsum(1).tanh()), nn.Embedding(7, 4), nn.Embedding(3, 4), nn.Linear(4, 3)), lambda: tokens(3, 3)),
    "positions used twice": (lambda: Lambda(lambda s, X: s.parts[2]((e := s.parts[1](torch.arange(5)[None])) + (s.parts[0](X) + e).cumsum(1).tanh()), nn.Embedding(7, 4), nn.Embedding(6, 4, padding_idx=1), nn.Linear(4, 3)), tokens),
    "positions of one feature": (lambda: Lambda(lambda s, X: s.parts[2]((s.parts[0](X) + s.parts[1](torch.arange(5)[None])).cumsum(1).tanh()), nn.Embedding(7, 4), nn.Embedding(6, 1), nn.Linear(4, 3)), tokens),
    "positions scaled": (lambda: Lambda(lambda s, X: s.parts[2](torch.add(s.parts[0](X), s.parts[1](torch.arange(5)[None]), alpha=2).cumsum(1).tanh()), nn.Embedding(7, 4), nn.Embedding(6, 4), nn.Linear(4, 3)), tokens),
    "functions by hand": (lambda: Lambda(lambda s, X: functional.linear(X @ s.a, s.b, s.c) * s.d + s.e, a=vectors(3, 4), b=vectors(2, 4), c=vectors(2), d=vectors(1, 2), e=vectors(())), lambda: vectors(4, 3)),
    "checkpoint": (lambda: Lambda(lambda s, X: checkpoint(lambda x: s.parts[1](s.parts[0](x).tanh()), X, use_reentrant=False), nn.Linear(3, 4), nn.Linear(4, 2)), lambda: vectors(4, 3)),
    "positions equal to the data": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4)), lambda: vectors(4, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("rows", ["term", "datum"])
@pytest.mark.parametrize("name", MODELS)
def test_layers(name, rows):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, X = make().double().eval(), inputs()
    with torch.no_grad():
        y = torch.randn_like(model(X))
    unknown = {"lstm", "checkpoint", "bilinear"}  # fused, hidden, or unknown to vmap
    caches = ("auto", "linearization") if name in unknown else ("auto", "scores", "factors", "linearization")
    plan = check(model, nn.MSELoss(), [(X, y), (X[:2], y[:2])], caches=caches, rows=rows, mc_samples=2)
    if name not in unknown:
        assert {entry.form for entry in plan.entries} <= {"dense rows", "factors", "factors and dense rows"}
    if name not in {*unknown, "functions of parameters", "positions of one feature", "positions scaled"}:
        assert all(entry.reason.startswith("every parameter's rows by") for entry in plan.entries), plan


def test_autocast_inside_the_model():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def run(self, X):
        with torch.autocast("cpu", torch.bfloat16):
            return self.parts[0](X).float()

    model, X = Lambda(run, body), torch.randn(6, 8)
    plain, kept = (
        fo.FisherMCLinearOperator(model, nn.MSELoss(), data=(X, torch.zeros(6, 3)), cache=cache)
        for cache in ("none", "auto")
    )
    v = np.ones(plain.shape[0], np.float32)
    np.testing.assert_allclose(kept @ v, plain @ v, atol=0.05 * np.abs(plain @ v).max())
    assert "rows" in str(kept.plan)


class Once(torch.autograd.Function):
    """x², which can be differentiated in reverse mode and once only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_custom_functions_need_first_order_reverse_mode_only():
    torch.manual_seed(0)
    own = Lambda(lambda s, X: s.parts[1](Once.apply(s.parts[0](X))), nn.Linear(3, 4).double(), nn.Linear(4, 2).double())
    plain = copy.deepcopy(own)
    plain.function = lambda s, X: s.parts[1](s.parts[0](X).square())
    data = [(vectors(5, 3), vectors(5, 2))]
    expected = fo.FisherLinearOperator(plain, nn.MSELoss(), data=data).todense()
    op = fo.FisherLinearOperator(own, nn.MSELoss(), data=data)
    assert_same(op @ np.eye(len(expected)), expected, torch.float64)
    assert_same(
        fo.FisherLinearOperator(own, nn.MSELoss(), data=data, cache="none").diagonal(),
        expected.diagonal(),
        torch.float64,
    )


class WrongBackward(torch.autograd.Function):
    """x² with a wrong reverse mode and a right forward mode."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 1.9 * g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx, t):
        return 2 * t * ctx.saved_tensors[0]


def test_a_reverse_mode_that_disagrees_with_its_forward_mode_is_found():
    model = Lambda(
        lambda s, X: s.parts[1](WrongBackward.apply(s.parts[0](X))), nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    )
    with pytest.raises(NotImplementedError, match="forward mode: it differs from reverse mode by"):
        fo.FisherLinearOperator(
            model, nn.MSELoss(), data=[(vectors(5, 3), vectors(5, 2))]
        ).trace() or fo.FisherLinearOperator(model, nn.MSELoss(), data=[(vectors(5, 3), vectors(5, 2))]) @ np.ones(26)


# ---- Never stale -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["module", "closure", "functional"])
@pytest.mark.parametrize("cache", ["auto", "scores", "linearization"])
def test_changes_in_place_are_followed(way, cache):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    named = dict(model.named_parameters())
    model_func, params = {
        "module": (model, None),
        "closure": (lambda X: model(X), list(named.values())),
        "functional": (lambda p, X: torch.func.functional_call(model, p, (X,)), named),
    }[way]
    data = [(vectors(5, 3), vectors(5, 2))]
    op = fo.FisherMCLinearOperator(model_func, nn.MSELoss(), params, data, cache=cache)

    def fresh():
        return fo.FisherMCLinearOperator(model, nn.MSELoss(), None, data, cache="none").todense()

    eye = np.eye(op.shape[0])
    before = op @ eye
    assert_same(before, fresh(), torch.float64)
    for change in (
        lambda: model[0].weight.add_(0.5),
        lambda: model[1].running_var.mul_(2),
        lambda: torch.optim.SGD(model.parameters(), 0.1).step(),
    ):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with torch.no_grad():
            change()
        now = op @ eye
        assert np.abs(now - before).max() > 1e-3 * np.abs(before).max()
        assert_same(now, fresh(), torch.float64)
        before = now
    model[0].weight.data.mul_(2)  # torch does not count this
    op.refresh()
    assert_same(op @ eye, fresh(), torch.float64)


def test_copies_keep_nothing_of_each_other():
    case = make_case("dense", "ce", sizes=(4, 3))
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    F = op @ np.eye(case.D)
    for twin in (copy.deepcopy(op), pickle.loads(pickle.dumps(op)), copy.copy(op)):
        np.testing.assert_allclose(twin @ np.eye(case.D), F, rtol=1e-12, atol=1e-14)
    other = op.resample(5)
    assert np.abs(other @ np.eye(case.D) - F).max() > 1e-3
    np.testing.assert_array_equal(op @ np.eye(case.D), F)


@pytest.mark.parametrize("cache", ["auto", "linearization"])
def test_a_pass_that_was_left_early_keeps_nothing(cache):
    case = make_case("dense", "ce", sizes=(4, 3))
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache=cache, check_deterministic=False)
    v = np.ones(case.D)
    expected = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache="none") @ v

    def interrupt(module, inputs):
        if len(inputs[0]) == 3:  # the second batch
            raise KeyboardInterrupt

    with case.model.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        op @ v
    assert_same(op @ v, expected, case.dtype)
    assert op.plan.nbytes > 0


# ---- Many small batches -----------------------------------------------------------------------------------


@given(
    st.builds(
        make_case,
        architecture=st.sampled_from(ARCHITECTURES),
        loss=st.sampled_from(sorted(LOSSES)),
        sizes=st.lists(st.integers(1, 3), min_size=2, max_size=6),
        seed=st.integers(0, 10**6),
    ),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["auto", "scores", "factors"]),
)
def test_small_batches_are_merged(case, kind, cache):
    """G of merged batches is G by batches, row by row."""

    def of(batches):
        op = KINDS[kind](case.model, case.loss, data=case.data, cache=cache)
        with batches:
            first = op @ np.ones(case.D)
        np.testing.assert_array_equal(op @ np.ones(case.D), first)
        return op, op.scores

    by_batch = mock.patch("fisherops.scores.cache.Cache.merge", return_value=None)
    (op, G), (expected, H) = of(contextlib.nullcontext()), of(by_batch)
    batches = H.materialized() if H.plan.holds_rows else []
    if batches:
        # A recurrent layer makes other calls for one sequence.
        alike = len(list(itertools.groupby(batch.key for batch in batches)))
        assert len(G.materialized()) == alike
        assert alike == 1 or min(len(X) for X, _ in case.data) == 1
        assert len(batches) == len(op.plan.entries) == len(case.data)
        assert sum(batch.nbytes for batch in G.materialized()) <= sum(batch.nbytes for batch in batches)
    V, W = (np.random.default_rng(0).standard_normal((n, 3)) for n in (case.D, G.shape[0]))
    assert_same(op @ V, expected @ V, case.dtype)
    assert_same(G @ V, H @ V, case.dtype)
    assert_same(G.T @ W, H.T @ W, case.dtype)
    assert_same(G.rows(), H.rows(), case.dtype)
    assert_same(G.gram(), H.gram(), case.dtype)
    assert_same(G.row_norms(), H.row_norms(), case.dtype)
    assert_same(op.diagonal(), expected.diagonal(), case.dtype)
    np.testing.assert_array_equal(G.datum, H.datum)


def test_batches_that_differ_are_not_merged():
    """Sequences of other lengths, and what is computed from parameters by a graph of its batch."""
    model = Lambda(lambda self, X: self.parts[0](X).tanh().sum(1), nn.Linear(3, 2))
    X = [torch.randn(2, length, 3, generator=torch.Generator().manual_seed(length)) for length in (4, 4, 5, 5, 4)]
    data = [(x, torch.zeros(2, dtype=torch.int64)) for x in X]
    op = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data, cache="factors")
    assert [batch.count for batch in op.scores.materialized()] in ([4, 4, 2], [10])
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    data = [(x[:, 0], y) for x, y in data]
    op = fo.FisherMCLinearOperator(normed, nn.CrossEntropyLoss(), data=data, cache="factors")
    plain = fo.FisherMCLinearOperator(normed, nn.CrossEntropyLoss(), data=data, cache="none")
    assert len(op.scores.materialized()) == 5
    assert_same(op.todense(), plain.todense(), torch.float32)


def test_merged_batches_share_inputs_as_batches_do():
    """Two convolutions of one input hold it once."""
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 1)
    call = Lambda(lambda self, X: (self.parts[0](X).tanh() + self.parts[1](X)).mean((2, 3)), *layers)
    X = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 3
    data = [(X[n : n + 2], y[n : n + 2]) for n in (0, 2, 4)]
    op = fo.FisherMCLinearOperator(call, nn.CrossEntropyLoss(), data=data, cache="factors")
    whole = fo.FisherMCLinearOperator(call, nn.CrossEntropyLoss(), data=[(X, y)], cache="factors")
    (merged,), (one,) = op.scores.materialized(), whole.scores.materialized()
    assert merged.nbytes == one.nbytes
    assert_same(op.todense(), whole.todense(), torch.float32)


@pytest.mark.parametrize("part", [0.4, 0.7, 1])
def test_batches_are_merged_only_if_all_are_cached(part):
    """Data that come in another order from some batch on replace single batches."""
    case = make_case("dense", "ce", sizes=(2,) * 6)
    free = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    memory = int(part * free.plan.nbytes)
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, max_memory=memory)
    v = np.ones(case.D)
    first = op @ v
    np.testing.assert_array_equal(op @ v, first)
    assert_same(first, free @ v, case.dtype)
    assert (len({*map(id, op.scores._cache._batches)}) == 1) == (part == 1)


# ---- Within memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["auto", "scores", "factors", "linearization"])
def test_what_does_not_fit_is_computed_anew(cache):
    case = make_case("dense", "ce", sizes=(4,) * 6)
    free = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache=cache)
    V = np.random.default_rng(0).standard_normal((case.D, 2))
    whole = free.plan.nbytes
    for part in (0, 0.4, 0.7) if cache == "auto" else (0.4, 0.7):
        op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache=cache, max_memory=int(part * whole))
        assert_same(op @ V, free @ V, case.dtype)
        assert_same(op @ V, free @ V, case.dtype)
        assert_same(op.todense(), free.todense(), case.dtype)
        assert op.plan.nbytes <= part * whole
        forms = [entry.form for entry in op.plan.entries]
        assert "none" in forms
        assert (part == 0) == all(form == "none" for form in forms)
        assert "are left" in str(op.plan)


@pytest.mark.parametrize("cache", ["scores", "factors", "linearization"])
def test_a_bound_within_which_no_batch_can_be_kept(cache):
    case = make_case("dense", "ce", sizes=(4, 3))
    build = functools.partial(fo.FisherMCLinearOperator, case.model, case.loss, data=case.data, cache=cache)
    with pytest.raises(
        ValueError, match=rf"cache='{cache}' takes \d+ bytes for a batch of 4 data, and .* is 10: pass"
    ) as e:
        build(max_memory=10) @ np.ones(case.D)
    smallest = int(re.search(r"pass max_memory=(\d+) or more", str(e.value))[1])
    assert build(max_memory=smallest).plan.nbytes > 0
    with pytest.raises(ValueError, match="or cache='auto', which keeps what fits"):
        build(max_memory=smallest - 1).plan


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_few_vectors_are_multiplied_by_rows_that_are_not_kept(cache):
    case = make_case("dense", "ce", sizes=(4, 3))
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache=cache, max_memory=0)
    first = op @ np.eye(case.D)
    np.testing.assert_array_equal(op @ np.eye(case.D), first)
    assert "rows are built anew in every product" in str(op.plan)
    assert op.plan.nbytes == 0
    many = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, mc_samples=3, cache=cache, max_memory=0)
    assert "anew in every product" not in str(many.plan)


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("message", ["CUDA out of memory", "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
def test_fewer_columns_where_memory_is_short(monkeypatch, cache, message):
    case = make_case("dense", "ce", sizes=(4, 3))
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache=cache)
    V = np.random.default_rng(0).standard_normal((case.D, 40))
    expected = op @ V
    error = torch.OutOfMemoryError if "CUDA" in message else RuntimeError
    widths = []

    def short(self, V, product=MaterializedBatch.product):
        widths.append(len(V))
        if len(V) > limit:
            raise error(message)
        return product(self, V)

    monkeypatch.setattr(MaterializedBatch, "product", short)
    limit = 7
    assert_same(op @ V, expected, case.dtype)
    assert max(widths) == 40
    assert set(widths[-3:]) <= set(range(1, 8))
    limit = 0
    with pytest.raises(error, match="memory"):
        op @ V
    error = RuntimeError
    message = "something else"
    widths.clear()
    with pytest.raises(RuntimeError, match="something else"):
        op @ V
    assert len(widths) == 1


def test_memory_that_runs_out_while_rows_are_built(monkeypatch):
    case = make_case("dense", "ce", sizes=(4, 3))
    expected = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data).todense()

    def short(self, form, patient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fisherops.scores.build.RowsBuilder.build", short)
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    assert_same(op @ np.eye(case.D), expected, case.dtype)
    assert "linearization" in str(op.plan)
    assert "memory ran out while rows were built" in str(op.plan)
    with pytest.raises(torch.OutOfMemoryError):
        fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache="scores").todense()


def test_batches_that_come_in_any_order_are_kept_all_or_none():
    case = make_case("dense", "ce", sizes=(12,))
    X, y = case.data[0]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, y, torch.arange(12)), batch_size=5, shuffle=True
    )
    expected = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data).todense()
    whole = fo.FisherMCLinearOperator(case.model, case.loss, data=loader)
    assert_same(whole @ np.eye(case.D), expected, case.dtype)
    part = fo.FisherMCLinearOperator(case.model, case.loss, data=loader, max_memory=int(0.7 * whole.plan.nbytes))
    for _ in range(3):
        assert_same(part @ np.eye(case.D), expected, case.dtype)
    assert part.plan.nbytes == 0
    assert "not all batches can be kept, and they come in another order each time" in str(part.plan)


def test_a_stream_of_draws_is_kept_all_or_none():
    """A batch that is not computed would not take its numbers from the stream."""
    case = make_case("dense", "ce", sizes=(4,) * 6)
    expected = fo.FisherMCLinearOperator(
        case.model, case.loss, data=case.data, sampler="stream", cache="none"
    ).todense()
    whole = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, sampler="stream")
    assert_same(whole @ np.eye(case.D), expected, case.dtype)
    for share in (0.4, 0.7):
        part = fo.FisherMCLinearOperator(
            case.model, case.loss, data=case.data, sampler="stream", max_memory=int(share * whole.plan.nbytes)
        )
        for _ in range(3):
            assert_same(part @ np.eye(case.D), expected, case.dtype)
        assert "a stream of draws reads them all" in str(part.plan)


def test_an_embedding_is_never_a_dense_table_for_each_datum():
    """200,000 × 16 numbers for each of 64 data would be 820 MB."""
    model = Lambda(lambda s, X: s.parts[1](s.parts[0](X).mean(1)), nn.Embedding(200_000, 16), nn.Linear(16, 2))
    op = fo.FisherMCLinearOperator(model, nn.MSELoss(), data=(torch.randint(200_000, (64, 5)), torch.zeros(64, 2)))
    op @ np.ones(op.shape[0], np.float32)
    assert op.plan.nbytes < 2**20
    assert "factors" in str(op.plan)


def test_factors_are_kept_where_rows_do_not_fit():
    """Of 24 positions with 64 × 64 weights, rows are faster (16 KiB a datum) and factors smaller (12 KiB)."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    data = (torch.randn(8, 24, 64), torch.zeros(8, 24, 64))
    free, tight, plain = (
        fo.FisherMCLinearOperator(model, nn.MSELoss(), data=data, rows="datum", **options)
        for options in ({}, {"max_memory": "220KiB"}, {"cache": "none"})
    )
    v = np.ones(plain.shape[0], np.float32)
    assert_same(tight @ v, plain @ v, torch.float32)
    assert free.plan.nbytes == 8 * 2 * 64 * 64 * 4
    assert [entry.form for entry in free.plan.entries] == ["dense rows"]
    assert [entry.form for entry in tight.plan.entries] == ["factors"]
    assert tight.plan.nbytes == 8 * 2 * 24 * 128 * 4


@pytest.mark.parametrize(
    ("positions", "width", "is_dense"),
    [(4, 16, False), (12, 64, False), (24, 64, True), (64, 640, True), (64, 1280, False)],
)
def test_rows_are_held_as_far_as_they_are_worth_their_memory(positions, width, is_dense):
    """Up to 1.5 times the memory of the factors, or as many times as they are faster: T / 8 times."""
    model, X = nn.Linear(width, width, bias=False), torch.randn(3, positions, width)
    op = fo.FisherMCLinearOperator(model, nn.MSELoss(), data=(X, torch.zeros_like(X)), rows="datum")
    rows, factors = width * width, positions * 2 * width
    assert is_dense == (positions > 8 and rows <= max(1.5, positions / 8) * factors)
    assert op.plan.nbytes == 3 * 4 * (rows if is_dense else factors)


class Groups(nn.Module):
    """One dense layer for each of the groups of the inputs (N, T, g, i)."""

    def __init__(self, g, o, i):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(g, o, i))

    def forward(self, X):
        return torch.einsum("ntgi,goi->ntgo", X, self.weight)


@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 7, 12, 24, 64]),
    st.integers(1, 3),
    st.sampled_from([1, 5, 24, 64, 160]),
    st.sampled_from([1, 5, 24, 64, 160]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(CACHES[:3]),
)
@example(2, 12, 1, 64, 64, 1, False, "auto")
@example(2, 24, 1, 160, 5, 1, False, "auto")
def test_the_memory_of_dense_layers_is_predicted(N, T, g, o, i, samples, has_bias, cache):
    """To the byte, so that no form is left out that fits, and none is built in vain."""
    model = nn.Linear(i, o, bias=has_bias) if g == 1 else Groups(g, o, i)
    X = torch.randn(N, T, i) if g == 1 else torch.randn(N, T, g, i)
    pairs = []

    def noted(builder, form, patient=False):
        result = build(builder, form, patient)
        pairs.append((builder.nbytes(form), result[0].nbytes))
        return result

    build = RowsBuilder.build
    with mock.patch.object(RowsBuilder, "build", noted):
        op = fo.FisherMCLinearOperator(
            model, nn.MSELoss(), data=(X, torch.zeros_like(model(X))), rows="datum", mc_samples=samples, cache=cache
        )
        assert op.plan.nbytes == pairs[-1][1]
    assert all(predicted == taken for predicted, taken in pairs)


@pytest.mark.parametrize("cache", ["scores", "factors", "auto"])
def test_no_form_takes_more_than_its_memory(cache):
    """Dense rows of linear layers are larger than their factors, and are to be bounded all the same."""
    case = make_case("recurrent", "ce", sizes=(4,) * 4)
    whole = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache=cache).plan.nbytes
    for share in np.linspace(0 if cache == "auto" else 0.3, 1, 12):
        plan = fo.FisherMCLinearOperator(
            case.model, case.loss, data=case.data, cache=cache, max_memory=int(share * whole)
        ).plan
        assert plan.nbytes <= share * whole


@pytest.mark.parametrize(("cache", "kept"), [("auto", False), ("none", False), ("linearization", True)])
def test_graphs_are_not_kept_with_rows(cache, kept):
    def graphs():
        gc.collect()
        return sum(type(thing) is torch.Tensor and thing.grad_fn is not None for thing in gc.get_objects())

    case = make_case("dense", "ce", sizes=(4, 3))
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache=cache)
    before = graphs()
    op @ np.ones(case.D)
    assert (graphs() > before) == kept


@pytest.mark.parametrize("kind", [fo.FisherLinearOperator, fo.FisherMCLinearOperator])
@pytest.mark.parametrize("cache", ["auto", "linearization"])
def test_many_vectors_of_each_datum_never_list_dense_rows(monkeypatch, kind, cache):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 20)).double()
    data = [(torch.randn(n, 6, dtype=torch.float64), torch.randint(20, (n,))) for n in (5, 3)]
    options = {"mc_samples": 40} if kind is fo.FisherMCLinearOperator else {}
    op, known = (kind(model, nn.CrossEntropyLoss(), data=data, cache=cache, **options) for cache in (cache, "factors"))
    assert "linearization" in str(op.plan)
    monkeypatch.setattr("fisherops.scores.lazy.list_rows", mock.Mock(side_effect=AssertionError("dense rows")))
    monkeypatch.setitem(SIZES, torch.device("cpu"), HOST._replace(block=2**15))  # some vectors at a time
    v = np.ones(op.shape[1])
    for own, expected in zip(
        (op.trace(), op.diagonal(), op.scores.row_norms(), op.scores.gram(), op @ v),
        (known.trace(), known.diagonal(), known.scores.row_norms(), known.scores.gram(), known @ v),
        strict=True,
    ):
        assert_same(own, expected, dtype="float64")


def test_products_with_many_columns():
    case = make_case("dense", "ce", sizes=(40, 20))
    plain = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache="none")
    V = np.random.default_rng(0).standard_normal((case.D, 1000))
    with differentiated(), mock.patch.dict(SIZES, {torch.device("cpu"): HOST._replace(columns=2**16)}):
        expected = plain @ V
    for cache in ("auto", "none"):
        op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache=cache)
        assert_same(op @ V, expected, case.dtype)
        with mock.patch.dict(SIZES, {torch.device("cpu"): HOST._replace(columns=2**16)}):
            assert_same(op @ V, expected, case.dtype)


def test_the_plan_says_what_is_kept():
    case = make_case("attention", "ce", sizes=(4, 3), dtype=torch.float32)
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, max_memory="1GiB")
    text = str(op.plan)
    assert text.startswith("cache='auto': ")
    assert "of at most 1 GiB kept for 7 data in 2 batches" in text
    assert "every parameter's rows by the operation that uses it" in text
    many = make_case("attention", "ce", sizes=(4,), dtype=torch.float32)
    op = fo.FisherMCLinearOperator(many.model, many.loss, data=many.data, mc_samples=7, cache="auto")
    assert "rows" in str(op.plan)


@pytest.mark.parametrize("bad", ["4 GX", "lots", -1, True, None.__class__, "-3"])
def test_memory_that_is_no_memory(bad):
    case = make_case("dense", "ce")
    with pytest.raises(ValueError, match="`max_memory` must be a number of bytes or a text such as '4GiB' or '500MB'"):
        fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, max_memory=bad)


def test_caches_that_cannot_be_had():
    case = make_case("dense", "ce")
    with pytest.raises(
        ValueError, match="`cache` must be one of 'auto', 'scores', 'factors', 'linearization', 'none', got"
    ):
        fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache="rows")
    model = nn.Linear(3, 1)
    for cache in ("scores", "factors"):
        op = fo.FisherLinearOperator(
            lambda X: model(X).repeat(2, 1)[:3], nn.MSELoss(), list(model.parameters()), [(torch.randn(2, 3), torch.zeros(3, 1))],
            cache=cache, batch_size_fn=len,
        )  # fmt: skip
        with pytest.raises(
            NotImplementedError, match=f"cache='{cache}' is not supported for this model: 3 terms do not"
        ):
            op @ np.ones(op.shape[0], np.float32)


@pytest.mark.parametrize("cache", ["scores", "factors"])
def test_fused_recurrent_layers_are_seen_step_by_step(cache):
    model = nn.LSTM(3, 2, batch_first=True)
    data = [(torch.randn(2, 3, 3), torch.zeros(2, 3, 2))]

    def build(cache):
        return fo.FisherMCLinearOperator(
            lambda X: model(X)[0], nn.MSELoss(), list(model.parameters()), data, cache=cache
        )

    assert "every parameter's rows by the operation that uses it" in str(build(cache).plan)
    assert_same(build(cache).todense(), build("linearization").todense(), torch.float32)
