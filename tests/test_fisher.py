"""Constructing Fisher operators: models, parameters, precisions, losses; what is refused and what is left alone."""

import copy
import functools
import gc
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracle
import pytest
import torch
from models import LOSSES, Tied, make_case
from tolerances import assert_same
from torch import nn
from torch.func import functional_call

import fisherops as fo


@pytest.fixture
def case():
    return make_case("dense", "ce")


def build(model, loss=None, params=None, data=None, **options):
    return fo.FisherMCLinearOperator(
        model, loss or nn.CrossEntropyLoss(), params, data, **{"sampler": "stream", **options}
    )


# ---- Models and parameters -------------------------------------------------------------------------


def test_every_way_to_give_a_model_gives_the_same_matrix(case):
    model, data = case.model, case.data
    expected = build(model, data=data).todense()
    named = dict(model.named_parameters())
    for op in (
        build(model, params=case.params, data=data),
        build(model, params=tuple(case.params), data=data),
        build(model, params=model.parameters(), data=data),
        build(model, params=named, data=data),
        build(lambda X: model(X), params=case.params, data=data),
        build(model.forward, params=case.params, data=data),
        build(functools.partial(model.__call__), params=case.params, data=data),
        build(lambda params, X: functional_call(model, params, (X,)), params=named, data=data),
        build(model, params={name: p.detach().clone() for name, p in named.items()}, data=data),
    ):
        assert_same(op.todense(), expected, case.dtype)
        assert_same(op @ np.eye(case.D), expected, case.dtype)


def test_a_mapping_gives_the_values_to_linearize_at(case):
    other = make_case("dense", "ce", seed=5).model
    op = build(case.model, params=dict(other.named_parameters()), data=case.data)
    assert_same(op.todense(), build(other, data=case.data).todense(), case.dtype)


@pytest.mark.parametrize("architecture", ["dense", "convolutional", "recurrent", "attention"])
def test_some_of_the_parameters_give_a_block_of_the_matrix(architecture):
    case = make_case(architecture, "ce")
    F = build(case.model, data=case.data).todense()
    params = case.params
    slices = np.split(np.arange(case.D), np.cumsum([p.numel() for p in params])[:-1])
    for chosen in ([0], [len(params) - 1], [2, 0]):
        rows = np.concatenate([slices[i] for i in chosen])
        some = [params[i] for i in chosen]
        for model in (case.model, lambda X: case.model(X)):
            op = build(model, params=some, data=case.data)
            assert_same(op.todense(), F[np.ix_(rows, rows)], case.dtype)
            assert_same(op @ np.eye(len(rows)), F[np.ix_(rows, rows)], case.dtype)


def test_none_means_the_parameters_that_require_grad(case):
    case.model[0].requires_grad_(False)
    expected = build(case.model, params=list(case.model[2].parameters()), data=case.data).todense()
    assert_same(build(case.model, data=case.data).todense(), expected, case.dtype)
    assert not case.model[0].weight.requires_grad


def test_frozen_parameters_may_be_named(case):
    expected = build(case.model, data=case.data).todense()
    params = case.params
    case.model.requires_grad_(False)
    for model in (case.model, lambda X: case.model(X)):
        op = build(model, params=params, data=case.data)
        assert_same(op @ np.eye(case.D), expected, case.dtype)
    assert not any(p.requires_grad for p in params)


@pytest.mark.parametrize("name", ["inner.weight", "again.weight"])
def test_tied_parameters_may_be_given_under_either_name(name):
    case = make_case("tied", "mse")
    model = case.model
    assert isinstance(model, Tied)
    expected = oracle.monte_carlo_fisher(model, case.loss, [model.inner.weight], case.data)
    op = build(model, case.loss, {name: model.inner.weight}, case.data)
    assert_same(op @ np.eye(9), expected, case.dtype)
    assert_same(op.todense(), expected, case.dtype)


def test_parameters_that_the_model_does_not_use_have_zero_rows(case):
    class Extra(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.body = body

        def forward(self, X):
            return self.body(X)

    F = build(case.model, data=case.data).todense()
    op = build(Extra(case.model), data=case.data)
    expected = np.zeros((case.D + 2, case.D + 2))
    expected[2:, 2:] = F
    assert_same(op.todense(), expected, case.dtype)
    assert_same(op @ np.eye(case.D + 2), expected, case.dtype)
    with pytest.raises(ValueError, match="does not depend on any of `params`"):
        build(Extra(case.model), params={"unused": torch.ones(2)}, data=case.data, check_deterministic=False) @ np.ones(
            2
        )


def test_a_batch_that_does_not_reach_the_parameters_adds_nothing():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

        def forward(self, X):
            return self.experts[int(len(X) > 4)](X)

    model, loss = Experts(), nn.MSELoss(reduction="sum")
    small, large = (torch.randn(4, 3), torch.zeros(4, 2)), (torch.randn(6, 3), torch.zeros(6, 2))
    for data in ([small, large], [large, small]):
        F = build(model, loss, data=data).todense()
        for i, expert in enumerate(model.experts):
            op = build(model, loss, list(expert.parameters()), data)
            assert_same(op.todense(), F[8 * i : 8 * i + 8, 8 * i : 8 * i + 8], torch.float32)
            assert_same(op @ np.eye(8, dtype=np.float32), op.todense(), torch.float32)


def test_zero_dimensional_parameters():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.5))
            self.b = nn.Parameter(torch.tensor([[0.1]]))

        def forward(self, X):
            return self.a * X + self.b

    model, data = Scale(), [(torch.randn(5, 2), torch.randn(5, 2))]
    op = build(model, nn.MSELoss(), data=data)
    expected = oracle.monte_carlo_fisher(model, nn.MSELoss(), list(model.parameters()), data)
    assert_same(op @ np.eye(2, dtype=np.float32), expected, torch.float32)
    assert_same(op.todense(), expected, torch.float32)


def test_the_operator_follows_parameters_changed_in_place(case):
    op = build(case.model, data=case.data)
    before = op @ np.ones(case.D)
    with torch.no_grad():
        for p in case.params:
            p.mul_(1.5)
    after = op @ np.ones(case.D)
    assert np.abs(after - before).max() > 1e-3
    assert_same(after, build(case.model, data=case.data) @ np.ones(case.D), case.dtype)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "`params` must have at least one parameter, got none"),
        ({}, ValueError, "`params` must have at least one parameter, got none"),
        (torch.zeros(3), TypeError, "got one tensor of shape"),
        (5, TypeError, "`params` must be a list of parameters, a mapping name → tensor or None, got int"),
        ([1.0], TypeError, r"`params\[0\]` must be a torch tensor, got float"),
        ({"0.weight": np.zeros(2)}, TypeError, r"`params\['0.weight'\]` must be a torch tensor, got ndarray"),
        ({"none": torch.zeros(2)}, ValueError, r"`params` must have names of the model's parameters, .*, got 'none'"),
        (
            {"0.weight": torch.zeros(2)},
            ValueError,
            r"`params\['0.weight'\]` must have the shape of the model's parameter, .*got \(2,\)",
        ),
        (
            [torch.zeros(2)],
            ValueError,
            r"`params\[0\]` must be a parameter of the model, got a tensor of shape \(2,\) that is not",
        ),
        (
            {"0.bias": torch.zeros(4, dtype=torch.int64)},
            TypeError,
            "must be real floating point, got dtype torch.int64",
        ),
        (
            {"0.bias": torch.zeros(4, dtype=torch.complex64)},
            TypeError,
            "must be real floating point, got dtype torch.complex64",
        ),
    ],
)
def test_parameters_that_cannot_be_taken(case, params, error, message):
    with pytest.raises(error, match=message):
        build(case.model, params=params, data=case.data)


def test_other_mistakes_with_parameters(case):
    p = case.params[0]
    with pytest.raises(ValueError, match=r"each tensor once, got the same one as `params\[0\]` and `params\[1\]`"):
        build(case.model, params=[p, p], data=case.data)
    with pytest.raises(ValueError, match="got one under the names 'a' and 'b'"):
        build(lambda params, X: X @ params["a"].T, params={"a": p, "b": p}, data=case.data)
    with pytest.raises(
        TypeError, match=r"`params\[0\]` must be a torch tensor, got a tuple. Pass `dict\(model.named_parameters\(\)\)`"
    ):
        build(case.model, params=list(case.model.named_parameters()), data=case.data)
    with pytest.raises(
        TypeError, match="`params` must be a list of parameters, .*got None, and `model_func` is not an nn.Module"
    ):
        build(lambda X: case.model(X), data=case.data)
    with pytest.raises(TypeError, match="`model_func` must be an nn.Module or a callable, got int"):
        build(3, params=[p], data=case.data)
    case.model.requires_grad_(False)
    with pytest.raises(ValueError, match="`params` must have at least one parameter, got none"):
        build(case.model, data=case.data)
    with pytest.raises(ValueError, match="must have at least one element, got none"):
        build(lambda X: X, params=[torch.zeros(0)], data=case.data)
    with pytest.raises(ValueError, match="must be on one device, got '0' on cpu, '1' on meta"):
        build(lambda X: X, params=[torch.zeros(1), torch.zeros(1, device="meta")], data=case.data)


# ---- Precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_parameters(dtype):
    case = make_case("dense", "ce", dtype=dtype)
    op = build(case.model, data=case.data)
    assert op.dtype == np.dtype(str(dtype).removeprefix("torch."))
    assert (op @ np.ones(case.D, np.int64)).dtype == op.dtype


@pytest.mark.parametrize("architecture", ["dense", "convolutional", "attention"])
@pytest.mark.parametrize("dtype", ["float64", np.float64, torch.float64])
def test_float64_is_computed_in_float64_whatever_the_model_has(architecture, dtype):
    case = make_case(architecture, "bce", dtype=torch.float32)
    op = build(case.model, nn.BCEWithLogitsLoss(), data=case.data, dtype=dtype)
    assert op.dtype == np.float64
    model = copy.deepcopy(case.model).double()
    data = [(X.double() if X.is_floating_point() else X, y) for X, y in case.data]
    expected = build(model, nn.BCEWithLogitsLoss(), data=data).todense()
    assert_same(op.todense(), expected, torch.float64)
    assert_same(op @ np.eye(case.D), expected, torch.float64)
    assert all(p.dtype == torch.float32 for p in case.params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_computed_in_float32(dtype):
    case = make_case("convolutional", "mse", dtype=torch.float32)
    model = case.model.to(dtype)
    data = [(X.to(dtype), y.to(dtype)) for X, y in case.data]
    op = build(model, nn.MSELoss(), data=data)
    assert op.dtype == np.float32
    same = copy.deepcopy(model).float()
    expected = build(same, nn.MSELoss(), data=[(X.float(), y.float()) for X, y in data]).todense()
    assert_same(op @ np.eye(case.D, dtype=np.float32), expected, torch.float32)


def test_precisions_that_cannot_be_taken(case):
    for dtype in ("float16", np.int32, torch.bfloat16, "x", 3):
        with pytest.raises(ValueError, match="`dtype` must be float32 or float64"):
            build(case.model, data=case.data, dtype=dtype)
    with pytest.raises(ValueError, match="to compute in torch.float32 the model must be an nn.Module or a callable"):
        build(lambda X: case.model(X), params=case.params, data=case.data, dtype="float32")
    case.model[0].float()
    with pytest.raises(
        ValueError, match=r"several dtypes, got None, and '0.weight' is torch.float32, '2.weight' is torch.float64"
    ):
        build(case.model, data=case.data)
    assert build(case.model, data=case.data, dtype="float64").dtype == np.float64
    with pytest.raises(ValueError, match="for parameters of dtype torch.float8_e4m3fn, got None. Pass dtype='float32'"):
        build(lambda X: X, params=[torch.zeros(1, dtype=torch.float8_e4m3fn)], data=case.data)


# ---- Losses and targets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (nn.KLDivLoss(), "is KLDivLoss, which stands for no likelihood: its targets are distributions"),
        (nn.CTCLoss(), "is CTCLoss, which stands for no likelihood: it sums over alignments"),
        (nn.HingeEmbeddingLoss(), "is HingeEmbeddingLoss, which is not supported"),
        (
            nn.functional.cross_entropy,
            r"must be a loss module for this operator, got the function cross_entropy. Pass `nn.CrossEntropyLoss\(\)`",
        ),
        ("mse", "is str, which is not supported"),
    ],
)
def test_unsupported_losses(case, loss, reason):
    with pytest.raises(
        NotImplementedError, match=f"`loss_func` {reason}.* Supported are MSELoss, CrossEntropyLoss, BCE"
    ):
        fo.FisherMCLinearOperator(case.model, loss, None, case.data)


def test_a_class_in_place_of_an_instance(case):
    with pytest.raises(NotImplementedError, match=r"is MSELoss, which is not supported. Pass an instance"):
        build(case.model, nn.MSELoss, data=case.data)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_reductions_that_keep_the_terms(case, loss):
    with pytest.raises(ValueError, match="the loss has reduction='none'"):
        build(case.model, LOSSES[loss](reduction="none"), data=case.data)


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (nn.MSELoss(), torch.zeros(4), r"outputs have shape \(4, 3\) and the targets \(4,\): for this loss they must"),
        (nn.MSELoss(), torch.zeros(4, 1), r"outputs have shape \(4, 3\) and the targets \(4, 1\)"),
        (nn.BCEWithLogitsLoss(), torch.zeros(4, 2), r"outputs have shape \(4, 3\) and the targets \(4, 2\)"),
        (nn.BCEWithLogitsLoss(), torch.full((4, 3), 1.5), r"targets in \[0, 1\], got 1.5"),
        (nn.BCEWithLogitsLoss(), torch.full((4, 3), torch.nan), r"the targets must be finite, got nan"),
        (nn.CrossEntropyLoss(), torch.zeros(4, 1).long(), r"targets \(4, 1\) of torch.int64: cross-entropy takes"),
        (nn.CrossEntropyLoss(), torch.zeros(4), r"targets \(4,\) of torch.float32: cross-entropy takes"),
        (nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 3]), r"class index 3 is not in \[0, 3\)"),
        (nn.CrossEntropyLoss(), torch.tensor([0, 1, -1, 2]), r"class index -1 is not in \[0, 3\).*ignore_index=-100"),
        (nn.CrossEntropyLoss(weight=torch.ones(2)), torch.zeros(4).long(), "2 class weights, but the outputs have 3"),
        (nn.CrossEntropyLoss(ignore_index=0), torch.zeros(4).long(), "every loss term of the data is ignored"),
    ],
)
def test_targets_that_do_not_fit(case, loss, y, message):
    X = torch.randn(4, 3, dtype=torch.float64)
    data = [(X, y), (X, y)]
    for check in (True, False):
        with pytest.raises(ValueError, match=message):
            build(case.model, loss, data=data, check_deterministic=check) @ np.ones(case.D)


def test_soft_targets_and_label_smoothing_do_not_change_the_fisher(case):
    expected = build(case.model, data=case.data).todense()
    smooth = build(case.model, nn.CrossEntropyLoss(label_smoothing=0.2), data=case.data)
    np.testing.assert_array_equal(smooth.todense(), expected)
    soft = [(X, nn.functional.one_hot(y, 3).double() * 0.7 + 0.1) for X, y in case.data]
    np.testing.assert_array_equal(build(case.model, data=soft).todense(), expected)
    bce = make_case("dense", "bce")
    expected = build(bce.model, bce.loss, data=bce.data).todense()
    soft = [(X, 0.8 * y + 0.1) for X, y in bce.data]
    np.testing.assert_array_equal(build(bce.model, bce.loss, data=soft).todense(), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [{"ignore_index": 1}, {"weight": torch.tensor([0.5, 2.0, 0.0])}, {"weight": torch.rand(3), "ignore_index": 0}],
)
@pytest.mark.parametrize("architecture", ["dense", "recurrent"])
def test_ignored_and_weighted_terms(architecture, options, reduction):
    case = make_case(architecture, "ce", sizes=(5, 4))
    loss = nn.CrossEntropyLoss(reduction=reduction, **options).double()
    expected = oracle.monte_carlo_fisher(case.model, loss, case.params, case.data, samples=2)
    op = build(case.model, loss, data=case.data, mc_samples=2)
    assert np.abs(expected).max() > 0
    assert_same(op.todense(), expected, case.dtype)
    assert_same(op @ np.eye(case.D), expected, case.dtype)


def test_a_batch_that_is_ignored_entirely_counts_for_nothing(case):
    X, y = case.data[0]
    ignored = (X + 1, torch.full_like(y, -100))
    # last, so that it does not change the draws before it
    op = build(case.model, data=[*case.data, ignored])
    assert_same(op.todense(), build(case.model, data=case.data).todense(), case.dtype)


def test_one_dimensional_outputs_are_single_terms():
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    X = torch.randn(20, 3)
    op = build(model, nn.MSELoss(), data=[(X, torch.zeros(20))])
    column = build(model[0], nn.MSELoss(), data=[(X, torch.zeros(20, 1))])
    assert_same(op.todense(), column.todense(), torch.float32)
    with pytest.raises(ValueError, match=r"cross-entropy takes outputs \(batch, C, ...\), got shape \(20,\)"):
        build(model, data=[(X, torch.zeros(20).long())])


# ---- Arguments of sampling ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": 1.5}, TypeError, "`seed` must be an integer, got 1.5"),
        ({"seed": 2**64}, ValueError, "`seed` must be from"),
        ({"mc_samples": 0}, ValueError, "`mc_samples` must be at least 1, got 0"),
        ({"mc_samples": True}, TypeError, "`mc_samples` must be an integer, got True"),
        ({"sampler": "x"}, ValueError, "`sampler` must be 'counter' or 'stream', got 'x'"),
    ],
)
def test_arguments_of_sampling(case, options, error, message):
    with pytest.raises(error, match=message):
        build(case.model, data=case.data, **options)


# ---- Layers and outputs that have no Fisher -----------------------------------------------------------

RANDOM = {
    "Dropout": lambda: nn.Dropout(0.5),
    "Dropout2d": lambda: nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Dropout2d(0.5), nn.Flatten()),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "RReLU": lambda: nn.RReLU(),
    "MultiheadAttention": lambda: SelfAttention(dropout=0.5),
    "LSTM": lambda: Last(nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
}


class SelfAttention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)

    def forward(self, X):
        return self.attention(X[:, None], X[:, None], X[:, None])[0][:, 0]


class Last(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, X):
        return self.layer(X[:, None])[0][:, -1]


def with_layer(layer):
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 3))


DATA = [(torch.linspace(-1, 1, 15).reshape(5, 3), torch.tensor([0, 1, 2, 0, 1]))]


@pytest.mark.parametrize("name", RANDOM)
def test_layers_in_training_mode_are_named(name):
    model = with_layer(RANDOM[name]())
    message = rf"not defined for this model as it is. 1[\w.]* \({name}\).*model.eval\(\)"
    with pytest.raises(ValueError, match=message):
        build(model, data=DATA)
    with pytest.raises(ValueError, match=rf"a {name} .*model.eval\(\)"):
        build(lambda X: model(X), params=list(model.parameters()), data=DATA)
    op = build(model.eval(), data=DATA)
    eye = np.eye(op.shape[0], dtype=np.float32)
    assert_same(op @ eye, op.todense(), torch.float32)


def test_batch_norm_without_running_statistics():
    model = with_layer(nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(
        ValueError, match=r"1 \(BatchNorm1d\) couples the data of a batch, having no running statistics"
    ):
        build(model, data=DATA)


def test_dropout_that_does_nothing_is_fine():
    build(with_layer(nn.Dropout(0.0)), data=DATA)


def test_functional_dropout_is_found_by_evaluating_twice():
    model = with_layer(nn.Identity())
    model[1].forward = lambda X: nn.functional.dropout(X, 0.5)
    with pytest.raises(RuntimeError, match="two evaluations of batch 0 differ"):
        build(model, data=DATA)


@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning")  # BatchNorm couples the data
@pytest.mark.parametrize("way", ["module", "closure", "functional"])
@pytest.mark.parametrize("name", RANDOM)
def test_without_the_check_random_layers_are_one_fixed_matrix(name, way):
    model = with_layer(RANDOM[name]())
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    named = dict(model.named_parameters())
    model_func, params = {
        "module": (model, None),
        "closure": (lambda X: model(X), list(named.values())),
        "functional": (lambda params, X: functional_call(model, params, (X,)), named),
    }[way]
    op = build(model_func, params=params, data=DATA * 2, check_deterministic=False)
    eye = np.eye(op.shape[0], dtype=np.float32)
    F = op @ eye
    np.testing.assert_array_equal(op @ eye, F)
    assert_same(op.todense(), F, torch.float32)
    assert_same(op @ np.ones(len(F), np.float32), F.sum(1), torch.float32)
    assert_same(F, F.T, torch.float32)
    assert np.linalg.eigvalsh(F.astype(float)).min() >= -1e-5 * np.abs(F).max()
    assert np.abs(F).max() > 0
    for key, value in model.named_buffers():
        torch.testing.assert_close(value, buffers[key], rtol=0, atol=0)


@pytest.mark.parametrize(("value", "kind"), [(torch.nan, "NaN"), (torch.inf, "infinity")])
@pytest.mark.parametrize("check", [True, False])
def test_outputs_that_are_not_finite(case, value, kind, check):
    X, y = case.data[1]
    bad = X.clone()
    bad[1, 0] = value
    model = nn.Linear(3, 3).double()
    with pytest.raises(FloatingPointError, match=f"output for batch 1 contains {kind}"):
        build(model, data=[case.data[0], (bad, y)], check_deterministic=check) @ np.ones(12)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda f: (f, f), TypeError, "must return one tensor for this loss, got tuple"),
        (lambda f: {"logits": f}, TypeError, "must return one tensor for this loss, got dict"),
        (lambda f: f.argmax(1), TypeError, "must return real floating-point outputs, got torch.int64"),
        (lambda f: f.to(torch.complex64), TypeError, "must return real floating-point outputs, got torch.complex64"),
        (lambda f: f.sum(), ValueError, "outputs with a batch axis, got a 0-d tensor"),
    ],
)
def test_outputs_of_the_wrong_kind(case, output, error, message):
    with pytest.raises(error, match=message):
        build(lambda X: output(case.model(X)), params=case.params, data=case.data)


def test_errors_of_the_model_come_through(case):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        build(case.model, data=[(torch.zeros(4, 7, dtype=torch.float64), torch.zeros(4).long())])


# ---- Nothing of the user's is changed ------------------------------------------------------------------


def snapshot(model, data):
    return {
        "parameters": {k: (p.detach().clone(), p.requires_grad, p._version) for k, p in model.named_parameters()},
        "buffers": {k: b.clone() for k, b in model.named_buffers()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "data": [(X.clone(), y.clone(), X.requires_grad) for X, y in data],
        "rng": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "backends": (
            torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
        ),
        "hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
    }  # fmt: skip


def assert_equal_trees(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("architecture", ["dense", "convolutional", "attention", "recurrent"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_side_effects(architecture, fails):
    case = make_case(architecture, "mse", dtype=torch.float32)
    model, data = case.model, case.data
    model.train()  # no layer here is random
    params = case.params
    params[0].grad = torch.ones_like(params[0])
    params[1].requires_grad_(False)
    torch.set_default_dtype(torch.float64)
    try:
        before = snapshot(model, data)
        if fails:
            broken = [*data, (data[0][0], data[0][1][..., :1])]
            with pytest.raises(ValueError, match="batch 2"):
                build(model, nn.MSELoss(), params, broken, check_deterministic=False) @ np.ones(case.D)
        else:
            op = build(model, nn.MSELoss(), params, data)
            with torch.no_grad():
                op @ np.ones((case.D, 3))
            with torch.inference_mode():
                op @ np.ones(case.D)
            op.trace()
            op.todense()
        assert_equal_trees(snapshot(model, data), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_buffers_are_left_alone_whatever_the_model_is():
    model = with_layer(nn.BatchNorm1d(4))
    before = {key: value.clone() for key, value in model.named_buffers()}
    for model_func, params in [(model, None), (lambda X: model(X), list(model.parameters()))]:
        with pytest.raises(ValueError, match="BatchNorm1d"):
            build(model_func, params=params, data=DATA)
        for key, value in model.named_buffers():
            assert torch.equal(value, before[key])

    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, X):
            self.calls += 1
            return super().forward(X)

    counting = Counting().eval()
    for model_func, params in [(counting, None), (lambda X: counting(X), list(counting.parameters()))]:
        build(model_func, params=params, data=DATA) @ np.ones(12)
        assert counting.calls == 0


def test_a_model_that_writes_into_its_inputs_leaves_the_data_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    pure = nn.Sequential(nn.ReLU(), model[1])
    X, y = DATA[0]
    before = X.clone()
    for check in (True, False):
        op = build(model, data=[(X, y)], check_deterministic=check)
        assert_same(op @ np.eye(12, dtype=np.float32), build(pure, data=DATA).todense(), torch.float32)
        assert torch.equal(X, before)


def test_an_embedding_that_rewrites_its_weights_is_refused():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"0 \(Embedding\) rewrites its weights.*set its `max_norm` to None"):
        build(model, data=[(torch.randint(5, (4, 2)), torch.zeros(4).long())])


def test_random_states_of_other_devices_are_not_seeded(case, monkeypatch):
    def fail(*args):
        raise AssertionError("seeds every device")

    op = build(case.model, data=case.data)
    monkeypatch.setattr(torch, "manual_seed", fail)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    op @ np.ones(case.D)


# ---- What happens around the operator ------------------------------------------------------------------


def test_threads_get_the_right_products(case):
    other = make_case("convolutional", "mse")
    ops = [build(case.model, data=case.data * 5), build(other.model, other.loss, data=other.data * 5)]
    expected = [op @ np.ones(op.shape[0]) for op in ops]
    state = torch.get_rng_state()

    def work(i):
        return [ops[i % 2] @ np.ones(ops[i % 2].shape[0]) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for i, products in enumerate(pool.map(work, range(8))):
            for product in products:
                assert_same(product, expected[i % 2], torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in case.params)


def test_autocasting_around_a_product_does_not_change_it(case):
    case.model.float()
    data = [(X.float(), y) for X, y in case.data]
    op = build(case.model, data=data)
    expected = op @ np.ones(case.D, np.float32)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(op @ np.ones(case.D, np.float32), expected)
        np.testing.assert_array_equal(build(case.model, data=data) @ np.ones(case.D, np.float32), expected)


def test_a_default_device_elsewhere_does_not_matter(case):
    with torch.device("meta"):
        op = build(case.model, data=case.data)
        product = op @ np.ones(case.D)
    assert_same(product, op @ np.ones(case.D), torch.float64)


def test_training_mode_switched_on_later_is_found():
    model = with_layer(nn.Dropout(0.5)).eval()
    for model_func, params in [(model, None), (lambda X: model(X), list(model.parameters()))]:
        op = build(model_func, params=params, data=DATA)
        model.train()
        for use in (lambda op=op: op @ np.ones(op.shape[0]), op.trace, op.todense):
            with pytest.raises(ValueError, match="Dropout.* is random"):
                use()
        model.eval()


def test_parameters_that_are_replaced_are_found(case):
    op = build(case.model, data=case.data)
    closure = build(lambda X: case.model(X), params=case.params, data=case.data)
    case.model.load_state_dict({k: 3 * v for k, v in case.model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"parameters \['0.weight'.*were replaced by other tensors"):
        op @ np.ones(case.D)
    with pytest.raises(ValueError, match="does not depend on any of `params`"):
        closure @ np.ones(case.D)


def test_one_replaced_parameter_of_a_closure_is_found(case):
    op = build(lambda X: case.model(X), params=case.params, data=case.data)
    op @ np.ones(case.D)
    case.model[0].weight = nn.Parameter(case.model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"no longer depends on the parameters \['0'\]"):
        op @ np.ones(case.D)


def test_an_operator_is_freed_at_once(case):
    op = build(case.model, data=case.data)
    op @ np.ones(case.D)
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(op)
        del op
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_models_that_cannot_be_evaluated_at_other_values(case):
    for model in (torch.jit.trace(case.model, case.data[0][0]), nn.DataParallel(case.model)):
        with pytest.raises(TypeError, match="pass the module that it was made from"):
            build(model, data=case.data)


def test_frozen_parameters_that_are_replaced_are_followed(case):
    head = list(case.model[2].parameters())
    op = build(case.model, params=head, data=case.data)
    case.model[0].weight = nn.Parameter(2 * case.model[0].weight.detach())
    assert_same(op.todense(), build(case.model, params=head, data=case.data).todense(), case.dtype)


def test_tensors_made_in_inference_mode(case):
    expected = build(case.model, data=case.data).todense()
    with torch.inference_mode():
        data = [(X.clone(), y.clone()) for X, y in case.data]
        params = {name: p.clone() for name, p in case.model.named_parameters()}
        op = build(case.model, params=params, data=data)
        assert_same(op @ np.eye(case.D), expected, case.dtype)
    assert_same(op.todense(), expected, case.dtype)


def test_an_operator_can_be_pickled_and_copied(case):
    op = build(case.model, data=case.data)
    for twin in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        np.testing.assert_array_equal(twin @ np.ones(case.D), op @ np.ones(case.D))
        assert twin.shape == op.shape


def test_derivatives_that_are_not_finite_are_said():
    class Root(nn.Linear):
        def forward(self, X):
            h = super().forward(X)
            return torch.where(h > 0, h.sqrt(), h)

    op = build(Root(3, 3), data=DATA)
    for use in (lambda: op @ np.ones(12, np.float32), op.trace, op.todense):
        with pytest.raises(FloatingPointError, match="a derivative of the model's output is NaN or infinite"):
            use()
    huge = build(nn.Linear(3, 3), nn.MSELoss(), data=[(1e25 * DATA[0][0], torch.zeros(5, 3))])
    for use in (lambda: huge @ np.ones(12, np.float32), huge.diagonal, huge.todense):
        with pytest.raises(FloatingPointError, match="NaN or infini(ty|te).*dtype='float64'"):
            use()
    assert 0 < huge.trace() < np.inf  # summed in float64
    fine = build(nn.Linear(3, 3), data=DATA)
    assert np.isnan(fine @ np.full(12, np.nan, np.float32)).all()  # a vector with NaN is the caller's business


class Focal(nn.CrossEntropyLoss):
    def forward(self, f, y):
        return super().forward(f, y) ** 2


class Renamed(nn.CrossEntropyLoss):
    pass


def test_subclasses_of_losses(case):
    with pytest.raises(NotImplementedError, match="Focal, whose `forward` is not that of CrossEntropyLoss"):
        build(case.model, Focal(), data=case.data)
    expected = build(case.model, data=case.data).todense()
    np.testing.assert_array_equal(build(case.model, Renamed(), data=case.data).todense(), expected)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_class_weights_that_are_no_weights(case, bad):
    with pytest.raises(ValueError, match="the `weight` of the loss must be finite and at least 0, got"):
        build(case.model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, bad, 1.0])), data=case.data)


def test_many_class_weights_of_half_precision_do_not_overflow():
    model = nn.Linear(1, 2)
    data = (torch.ones(70_000, 1), torch.zeros(70_000).long())
    half = build(model, nn.CrossEntropyLoss(weight=torch.ones(2).half()), data=data).trace()
    assert abs(half - build(model, data=data).trace()) <= 1e-5 * half


def test_tied_names_in_a_mapping(case):
    tied = make_case("tied", "mse").model
    params = {"inner.weight": tied.inner.weight, "again.weight": tied.inner.weight.detach()}
    with pytest.raises(ValueError, match="'inner.weight' and 'again.weight' of one tied parameter"):
        build(tied, nn.MSELoss(), params, case.data)


def test_a_mapping_of_another_precision_than_the_module(case):
    case.model.float()
    params = {name: p.detach().double() for name, p in case.model.named_parameters()}
    op = build(case.model, params=params, data=case.data)
    assert op.dtype == np.float64
    assert_same(op @ np.eye(case.D), op.todense(), torch.float64)


def test_products_do_not_keep_memory(case):
    op = build(case.model, data=case.data)
    op @ np.ones(case.D)
    gc.collect()
    count = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(20):
        op @ np.ones(case.D)
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= count


def test_the_first_use_imports_nothing_for_sharded_models():
    """FSDP takes half a second to import."""
    code = (
        "import sys, torch, fisherops as fo\n"
        "data = torch.randn(8, 1), torch.randn(8, 1)\n"
        "fo.FisherMCLinearOperator(torch.nn.Linear(1, 1), torch.nn.MSELoss(), data=data) @ torch.ones(2)\n"
        "print('torch.distributed.fsdp' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
