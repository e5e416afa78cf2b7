"""What was learned about a batch is used for that batch only."""

import numpy as np
import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherops as fo

SUM = nn.CrossEntropyLoss(reduction="sum")


def inputs(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(*shape, C=3, seed=2):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed))


def rows_of(model, X, y, loss=SUM, rows="term"):
    """Return the gradients of the terms, or of the examples, of a batch that is evaluated as a whole."""
    f = model(X)
    terms, params = f.reshape(len(X), -1, f.shape[-1]), list(model.parameters())
    targets = y.reshape(len(X), -1)
    result = []
    for n in range(len(X)):
        scalars = [loss(terms[n, t][None], targets[n, t][None]) for t in range(terms.shape[1])]
        for scalar in scalars if rows == "term" else [sum(scalars)]:
            grads = torch.autograd.grad(scalar, params, retain_graph=True)
            result.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(result).double().numpy()


def empirical(model, data, rows="term"):
    G = np.concatenate([rows_of(model, X, y, rows=rows) for X, y, *_ in data])
    return G.T @ G


def exact(model, data):
    """Return Σ Jᵀ (diag p − p pᵀ) J by one backward pass for each output."""
    F, params = 0.0, list(model.parameters())
    for X, _, *_ in data:
        f = model(X)
        for row in f.reshape(-1, f.shape[-1]):
            grads = [torch.autograd.grad(z, params, retain_graph=True) for z in row]
            J = torch.stack([torch.cat([g.flatten() for g in gs]) for gs in grads]).double()
            p = row.detach().double().softmax(0)
            F = F + (J.T @ (p.diag() - p.outer(p)) @ J).numpy()
    return F


class Orders:
    """Batches that come in another order in every pass: first as they are given, then reversed, and so on."""

    def __init__(self, batches, change=True):
        self.batches, self.passes, self.change = batches, 0, change

    def __iter__(self):
        self.passes += 1
        return iter(self.batches[::-1] if self.change and self.passes % 2 == 0 else self.batches)


# ---- Axes -----------------------------------------------------------------------------------------


class PositionsFirst(nn.Module):
    """Works on (positions, data, features), as recurrent layers and transformers do without `batch_first`."""

    def __init__(self, bias=True):
        super().__init__()
        self.first, self.head = nn.Linear(2, 3, bias=bias), nn.Linear(3, 3, bias=bias)

    def forward(self, X):
        return self.head(torch.tanh(self.first(X.transpose(0, 1)))).transpose(0, 1)


class Classes(nn.Module):
    """Moves the classes to the second place, where cross-entropy has them."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, X):
        return self.body(X).movedim(-1, 1)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        ("datum", (1, 4)),
        ("datum", (4, 1)),
        ("datum", (4, 1, 2)),  # the middle batch has the same number in both orders
        ("datum", (2, 4)),
        ("term", (1, 4)),
        ("term", (4, 1)),
    ],
)
def test_the_axis_of_the_data_is_that_of_the_batch(rows, sizes):
    torch.manual_seed(0)
    model, T = PositionsFirst().double(), 4
    starts = np.cumsum([0, *sizes])
    batches = [
        (inputs(n, T, 2, seed=n), classes(n, T, seed=n), torch.arange(start, start + n))
        for n, start in zip(sizes, starts, strict=False)
    ]
    truth = empirical(model, batches, rows=rows)
    op = fo.EmpiricalFisherLinearOperator(Classes(model), SUM, data=Orders(batches), cache="none", rows=rows)
    for _ in range(4):
        assert_same(op @ np.eye(op.shape[0]), truth, torch.float64)


# ---- Agreed once ----------------------------------------------------------------------------------


class Branches(nn.Module):
    """Goes another way for batches whose first entry is positive."""

    def __init__(self, other):
        super().__init__()
        self.first, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 3), other

    def forward(self, X):
        h = torch.tanh(self.first(X))
        return self.head(self.other(h) if X[0, 0] > 0 else h)


def _reversed_gradient(h):
    """Reverse mode has a rule of its own here, which forward mode does not see."""
    h = h.clone()
    if h.requires_grad:
        h.register_hook(lambda g: -2 * g)
    return h


def _in_half_precision(h):
    return h.to(torch.bfloat16).square().to(h.dtype)


def branching_data(dtype=torch.float64, positive=(False, True)):
    data = []
    for k, sign in enumerate(positive):
        X = inputs(4, 3, seed=k).to(dtype)
        X[0, 0] = 1.0 if sign else -1.0
        data.append((X, classes(4, seed=k)))
    return data


@pytest.mark.parametrize(
    ("cache", "positive"),
    [
        ("none", (False, True)),
        ("none", (True, False)),
        ("scores", (False, True)),
        ("linearization", (False, True)),
        ("auto", (False, True)),
    ],
)
def test_a_mode_of_differentiation_is_agreed_on_for_a_branch(cache, positive):
    torch.manual_seed(0)
    model, data = Branches(_reversed_gradient).double(), branching_data(positive=positive)
    op = fo.FisherLinearOperator(model, SUM, data=data, cache=cache)
    truth = exact(model, data)
    for _ in range(2):
        assert_same(op @ np.eye(op.shape[0]), truth, torch.float64)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("cache", "positive"),
    [(cache, (False, True)) for cache in ("scores", "auto")] + [("scores", (True, False)), ("auto", (True, False))],
)
def test_the_tolerance_is_that_of_the_precision_in_the_batch(cache, positive):
    """A branch in half precision is no wrong derivative, whether it comes first or second."""
    torch.manual_seed(0)
    model = Branches(_in_half_precision)
    data = branching_data(torch.float32, positive)
    op = fo.EmpiricalFisherLinearOperator(model, SUM, data=data, cache=cache)
    F, truth = op @ np.eye(op.shape[0], dtype=np.float32), empirical(model, data)
    assert all(entry.form not in ("none", "linearization") for entry in op.plan.entries)
    assert np.abs(F - truth).max() <= 4 * torch.finfo(torch.bfloat16).eps * np.abs(truth).max()


class _WrongByAFewPercent(torch.autograd.Function):
    """Its backward pass is not that of its jvp."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 1.05 * g

    @staticmethod
    def jvp(ctx, t):
        return t.clone()


class HalfOrWrong(nn.Module):
    """Computes in half precision if the first entry is positive; otherwise a derivative is 5 % off."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, X):
        h = self.first(X)
        return self.head(_in_half_precision(h) if X[0, 0] > 0 else _WrongByAFewPercent.apply(h))


@pytest.mark.parametrize(
    "positive",
    [
        (True, False),
        (False, True),
    ],
)
def test_a_wrong_derivative_is_found_beside_a_batch_in_half_precision(positive):
    torch.manual_seed(0)
    model, data = HalfOrWrong(), branching_data(torch.float32, positive)
    op = fo.FisherLinearOperator(model, SUM, data=data, cache="none")
    with pytest.raises(NotImplementedError, match="it differs from reverse mode by"):
        op @ np.ones(op.shape[0], np.float32)


class Scale(torch.autograd.Function):
    """x · gain, by a function that nothing is known of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, gain):
        return x * gain

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, b):
        x, gain = ctx.saved_tensors
        return b * gain, (b * x).sum(0)


class Alone(nn.Module):
    """Cannot evaluate examples one by one; its gain has no use that the calls show, so its rows come by example."""

    def __init__(self, error, note):
        super().__init__()
        self.first, self.gain, self.head = nn.Linear(3, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)
        self.error, self.note = error, note

    def forward(self, X):
        if len(X) == 1 and self.error is not None:
            self.note(self.error)
            raise self.error
        return self.head(Scale.apply(torch.tanh(self.first(X)), self.gain))


class OwnError(Exception):
    pass


ERRORS = [RuntimeError("r"), ValueError("v"), AssertionError("a"), KeyError("k"), TypeError("t"), ZeroDivisionError("z"), AttributeError("b"), OwnError("o")]  # fmt: skip


@pytest.mark.parametrize("use", ["todense", "product"])
@pytest.mark.parametrize(
    "error",
    [pytest.param(error, id=type(error).__name__) for error in ERRORS],
)
@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning")
def test_a_model_that_takes_whole_batches_only(error, use):
    torch.manual_seed(0)
    raised = []
    model, data = Alone(error, raised.append).double(), [(inputs(4, 3), classes(4)), (inputs(3, 3), classes(3))]
    truth = empirical(model, data)
    op = fo.EmpiricalFisherLinearOperator(model, SUM, data=data, cache="none" if use == "todense" else "auto")
    F = op.todense() if use == "todense" else op @ np.eye(op.shape[0])
    assert raised or use == "product", "the trial must have been made"
    assert_same(F, truth, torch.float64)


def test_memory_that_runs_out_in_a_trial_is_no_missing_rule():
    torch.manual_seed(0)
    message = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    raised = []
    model, data = Alone(RuntimeError(message), raised.append).double(), [(inputs(4, 3), classes(4))]
    truth = empirical(model, data)
    op = fo.EmpiricalFisherLinearOperator(model, SUM, data=data, cache="none")
    assert_same(op.todense(), truth, torch.float64)
    before = len(raised)
    assert before > 0
    assert_same(op.todense(), truth, torch.float64)
    assert len(raised) > before, "it must be tried again"


# ---- Passes ---------------------------------------------------------------------------------------


class Interrupting:
    """Batches; in one pass the reading ends early by an error."""

    def __init__(self, batches, error):
        self.batches, self.error, self.armed = batches, error, False

    def __iter__(self):
        for k, batch in enumerate(self.batches):
            if self.armed and k == len(self.batches) - 1:
                self.armed = False
                raise self.error
            yield batch


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def small_data(sizes=(4, 3, 2), index=False):
    starts = np.cumsum([0, *sizes])
    return [
        (inputs(n, 3, seed=n), classes(n, seed=n), *([torch.arange(start, start + n)] if index else []))
        for n, start in zip(sizes, starts, strict=False)
    ]


USES = {
    "product": lambda op: op @ np.eye(op.shape[0]),
    "todense": lambda op: op.todense(),
    "plan": lambda op: op.plan,
    "scores": lambda op: op.scores,
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is gone")], ids=["interrupt", "error"])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("cache", ["auto", "linearization", "none"])
@pytest.mark.parametrize("use", USES)
def test_a_pass_that_was_left_early_is_not_complete(use, cache, check, error):
    model, batches = small_model(), small_data()
    data = Interrupting(batches, error)
    op = fo.EmpiricalFisherLinearOperator(
        model, nn.CrossEntropyLoss(), data=data, cache=cache, check_deterministic=check
    )
    data.armed = True
    with pytest.raises(type(error)):
        USES[use](op)
    truth = empirical(model, batches) / sum(len(X) for X, _ in batches)
    for _ in range(2):
        assert_same(op @ np.eye(op.shape[0]), truth, torch.float64)
    assert len(op.plan.entries) == len(batches)


# ---- Order ----------------------------------------------------------------------------------------


class Epochs:
    """Examples with their indices in batches that depend on the epoch, as DistributedSampler's `set_epoch` has it."""

    def __init__(self, batches, size):
        self.X, self.y, self.index = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.arange(len(self.X))
        if self.epoch:
            order = torch.randperm(len(self.X), generator=torch.Generator().manual_seed(self.epoch))
        for own in order.split(self.size):
            yield self.X[own], self.y[own], self.index[own]


KINDS = {
    "exact": lambda *args, **o: fo.FisherLinearOperator(*args, **o),
    "empirical": lambda *args, **o: fo.EmpiricalFisherLinearOperator(*args, **o),
    "mc": lambda *args, **o: fo.FisherMCLinearOperator(*args, **o),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["auto", "linearization", "none"])
def test_data_with_indices_may_come_in_another_order_in_any_pass(kind, cache):
    model, data = small_model(), Epochs(small_data(index=True), 4)
    op = KINDS[kind](model, nn.CrossEntropyLoss(), data=data, cache=cache)
    first = op @ np.eye(op.shape[0])
    for epoch in (1, 2, 0, 3):
        data.set_epoch(epoch)
        op.refresh()
        assert_same(op @ np.eye(op.shape[0]), first, torch.float64)
        assert_same(op.todense(), first, torch.float64)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("cache", ["auto", "linearization", "none"])
def test_a_shuffled_loader_is_fine_where_nothing_depends_on_the_order(kind, cache):
    model, batches = small_model(), small_data()
    X, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = DataLoader(TensorDataset(X, y), batch_size=4, shuffle=True)
    truth = KINDS[kind](model, nn.CrossEntropyLoss(), data=batches).todense()
    op = KINDS[kind](model, nn.CrossEntropyLoss(), data=loader, cache=cache)
    for _ in range(3):
        assert_same(op @ np.eye(op.shape[0]), truth, torch.float64)
        op.refresh()


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("work", ["gradient", "product"])
def test_an_order_that_changes_while_some_batches_are_cached(work, index):
    """Batches are cached by number: once the order has changed, a number is another batch."""
    model, whole = small_model(), small_data((8,), index)[0]
    batches = [tuple(t[k : k + 4] for t in whole) for k in (0, 4)]
    data = Orders(batches, change=False)
    first = fo.FisherLinearOperator(model, SUM, data=batches[:1], cache="scores").plan.nbytes
    op = fo.FisherLinearOperator(model, SUM, data=data, cache="scores", max_memory=int(1.5 * first))
    truth, eye = exact(model, batches), np.eye(31)
    assert_same(op @ eye, truth, torch.float64)
    assert [entry.form == "none" for entry in op.plan.entries] == [False, True]
    data.batches = batches[::-1]
    if work == "gradient":
        op.gradient()
    for _ in range(2):
        assert_same(op @ eye, truth, torch.float64)


def test_data_that_change_are_found_although_any_order_is_fine():
    """Order may change; contents may not."""
    model, batches = small_model(), small_data(index=True)
    data = Orders([tuple(t.clone() for t in batch) for batch in batches])
    op = fo.FisherLinearOperator(model, SUM, data=data, cache="none")
    assert_same(op @ np.eye(op.shape[0]), exact(model, batches), torch.float64)
    data.batches[1] = (2 * data.batches[1][0], *data.batches[1][1:])
    with pytest.raises(RuntimeError, match="changed between two passes: it read other examples"):
        op @ np.ones(op.shape[0])
    with pytest.raises(RuntimeError, match="changed between two passes: it read other examples"):
        op @ np.ones(op.shape[0])
