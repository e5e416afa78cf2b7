"""An operator stays one matrix, that of the present model, and the model stays the user's own."""

import copy
import pickle
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from oracle import empirical_fisher, exact_fisher
from tolerances import assert_same
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

import fisherops as fo
from fisherops import linalg

# ---- The user's tensors ---------------------------------------------------------------------------


class SecondName(nn.Module):
    """Its last layer is also an attribute of the model, as wrappers of a body and a head have it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = self.body[2]

    def forward(self, X):
        return self.head(self.body[1](self.body[0](X)))


class DeepSecondName(nn.Module):
    """A whole encoder has a second name, and one of its parameters has a third one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Tanh(), nn.Linear(4, 4))
        self.encoder = self.net[0]
        self.net[2].weight = self.encoder[0].weight

    def forward(self, X):
        return self.net[2](self.net[1](self.encoder(X)))


class SharedBuffer(nn.Module):
    """Two modules have the same buffer, and one has it under two names; forward reads all of them and writes to one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 1.5))
        self.register_buffer("again", self.scale)
        self.first.register_buffer("scale", self.scale)

    def forward(self, X):
        self.scale.mul_(2)
        return self.second(torch.tanh(self.first(X) * self.first.scale)) * self.again


def _layer_twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def _norm_twice():
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh(), norm, nn.Linear(4, 4))


def _parametrized_twice():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    return nn.Sequential(layer, nn.Tanh(), layer)


def _scripted_part():
    return nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Tanh(), nn.Linear(4, 4))))


SHARED = {
    "second name": (SecondName, None),
    "second name, head alone": (SecondName, lambda model: list(model.head.parameters())),
    "second name, head frozen": (SecondName, lambda model: list(model.body[0].parameters())),
    "second name, by a mapping": (SecondName, lambda model: {"head.weight": model.head.weight}),
    "deep second name": (DeepSecondName, None),
    "deep second name, encoder frozen": (DeepSecondName, lambda model: [model.net[2].bias]),
    "layer twice": (_layer_twice, None),
    "normalization twice": (_norm_twice, None),
    "parametrized layer twice": (_parametrized_twice, None),
    "buffer with three names": (SharedBuffer, None),
    "scripted part": pytest.param(_scripted_part, None, marks=pytest.mark.filterwarnings("ignore::DeprecationWarning")),
}


def _cases(table):
    return [v if hasattr(v, "marks") else pytest.param(*v, id=name) for name, v in table.items()]


def _tensors(model):
    """List every parameter and buffer under each of its names, with what belongs to the user."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (t, t.requires_grad, t.detach().clone()) for name, t in named}


def _assert_untouched(model, before):
    after = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    assert after.keys() == before.keys()
    assert [name for name, (t, _, _) in before.items() if after[name] is not t] == []
    assert [name for name, (t, grad, _) in before.items() if t.requires_grad != grad] == []
    assert [name for name, (t, _, value) in before.items() if not torch.equal(t, value)] == []
    assert [name for name, (t, _, _) in before.items() if t.grad is not None] == []


@pytest.mark.parametrize("cache", ["auto", "linearization"])
@pytest.mark.parametrize(("make", "choose"), _cases(SHARED))
def test_tensors_with_several_names_stay_the_users(make, choose, cache):
    model = make().double().eval()
    params = choose(model) if choose else None
    X, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    before = _tensors(model)
    chosen = list(params.values()) if isinstance(params, dict) else params or list(model.parameters())
    op = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), params, [(X[:4], y[:4]), (X[4:], y[4:])], cache=cache)
    _assert_untouched(model, before)
    product = op @ np.eye(op.shape[0])
    _assert_untouched(model, before)
    truth_model = make().double().eval()
    truth_model.load_state_dict(model.state_dict())
    by_name = dict(truth_model.named_parameters(remove_duplicate=False))
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    truth_params = [by_name[names[id(p)]] for p in chosen]
    if isinstance(truth_model, SharedBuffer):
        truth_model = _Fresh(truth_model)
    truth = exact_fisher(truth_model, nn.CrossEntropyLoss(), truth_params, [(X, y)])
    assert_same(product, truth, torch.float64)


class _Fresh(nn.Module):
    """A model whose buffers are as at first in every evaluation."""

    def __init__(self, model):
        super().__init__()
        self.model, self.values = model, {name: b.clone() for name, b in model.named_buffers()}

    def forward(self, X):
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.values[name])
        return self.model(X)


class _Failing(nn.Module):
    """Fails in the evaluation of that number."""

    def __init__(self, model):
        super().__init__()
        self.model, self.fails_at, self.evaluations = model, None, 0

    def forward(self, X):
        f = self.model(X)
        self.evaluations += 1
        if self.fails_at is not None and self.evaluations >= self.fails_at:
            raise ZeroDivisionError("planted")
        return f


@pytest.mark.parametrize("make", [SecondName, DeepSecondName, _layer_twice, _norm_twice, SharedBuffer])
def test_tensors_with_several_names_stay_the_users_when_the_model_fails(make):
    model = _Failing(make()).double().eval()
    data = [(torch.randn(3, 4, dtype=torch.float64), torch.randint(4, (3,)))]
    before = _tensors(model)
    model.fails_at = 1
    with pytest.raises(ZeroDivisionError, match="planted"):
        fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=data)
    _assert_untouched(model, before)
    model.fails_at = None
    op = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=data, cache="none")
    model.fails_at = 1
    with pytest.raises(ZeroDivisionError, match="planted"):
        op @ np.ones(op.shape[0])
    _assert_untouched(model, before)


def test_training_goes_on_after_an_operator_of_tensors_with_several_names():
    model = SecondName().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = [(torch.randn(5, 4, dtype=torch.float64), torch.randint(4, (5,)))]
    op = fo.EmpiricalFisherLinearOperator(model, nn.CrossEntropyLoss(), data=data)
    op @ np.ones(op.shape[0])
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    optimizer.step()
    truth = empirical_fisher(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    assert_same(op @ np.eye(op.shape[0]), truth, torch.float64)


# ---- Changes of the model -------------------------------------------------------------------------


class Net(nn.Module):
    """Has parameters, buffers, modules without either, and numbers of its own, all of which its output depends on."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.norm = nn.Linear(3, 4), nn.Softplus(), nn.LayerNorm(4)
        self.batch_norm, self.groups, self.head = nn.BatchNorm1d(4), nn.GroupNorm(1, 4), nn.Linear(4, 3)
        self.slope = nn.LeakyReLU(0.3)
        self.register_buffer("scale", torch.tensor([0.5, -1.0, 2.0, 1.5]))
        self.register_buffer("shift", torch.tensor([0.1, -0.2, 0.3, 0.0]), persistent=False)
        self.temperature, self.power, self.squares = 0.7, 1, False
        self.mask = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)

    def forward(self, X):
        h = self.groups(self.norm(self.batch_norm(self.act(self.first(X))))) * self.scale + self.shift
        h = self.slope(h) * self.mask
        h = h.square() if self.squares else h
        return self.head(h) ** self.power / self.temperature


def make_net(seed=0):
    torch.manual_seed(seed)
    net = Net().double().eval()
    with torch.no_grad():
        for t in (*net.parameters(), net.batch_norm.running_mean):
            t.add_(torch.randn_like(t), alpha=0.3)
    return net


def make_data():
    g = torch.Generator().manual_seed(5)
    return [(torch.randn(n, 3, dtype=torch.float64, generator=g), torch.randint(3, (n,), generator=g)) for n in (4, 3)]


SUM = nn.CrossEntropyLoss(reduction="sum")

# "partly" keeps the rows of the first batch of `make_data` alone, see `make_operator`.
FORMS = {
    "auto": {"cache": "auto"},
    "linearization": {"cache": "linearization"},
    "partly": {"cache": "scores"},
    "none": {"cache": "none"},
}
MODELS = {
    "module": lambda net, params: (net, params),
    "closure": lambda net, params: (lambda X: net(X), params),
}


def make_operator(net, form="auto", way="module", params=None, loss=SUM):
    own = list(net.parameters()) if params is None else params
    model_func, params = MODELS[way](net, own)
    options = dict(FORMS[form])
    if form == "partly":  # memory for rows of 5.5 of the 4 + 3 examples
        options["max_memory"] = int(5.5 * sum(p.numel() for p in own) * 8)
    op = fo.EmpiricalFisherLinearOperator(model_func, loss, params, make_data(), **options)
    if form == "partly":
        assert [entry.form != "none" for entry in op.plan.entries] == [True, False]
    return op


REFUSED = r"[Mm]ake a new operator|`op\.refresh\(\)`"


def rows_of(net, params, loss=SUM):
    """Return the gradients of all terms, by torch's own loss; the definition of the empirical Fisher's rows."""
    X, y = (torch.cat(parts) for parts in zip(*make_data(), strict=True))
    grads = [
        torch.autograd.grad(loss(net(x[None]), t[None]), params, allow_unused=True) for x, t in zip(X, y, strict=True)
    ]
    return torch.stack(
        [
            torch.cat([(p.detach() * 0 if g is None else g).flatten() for g, p in zip(gs, params, strict=True)])
            for gs in grads
        ]
    ).numpy()


def fisher_of(net, params=None, loss=SUM):
    G = rows_of(net, list(net.parameters()) if params is None else params, loss)
    return G.T @ G


def assert_followed(compute, truth):
    assert_same(compute(), truth, torch.float64, operations=10**5)


def assert_followed_or_refused(compute, truth):
    """Assert that the result is that of the present model, or that an error says that there is none."""
    try:
        result = compute()
    except (RuntimeError, ValueError) as error:
        if not re.search(REFUSED, str(error)):
            raise
    else:
        assert_followed(lambda: result, truth)


def check_change(net, op, change, params=None, check=assert_followed_or_refused):
    eye = np.eye(op.shape[0])
    before = fisher_of(net, params)
    assert_followed(lambda: op @ eye, before)
    change(net)
    with torch.no_grad():
        own = list(net.parameters()) if params is None else params
    truth = fisher_of(net, own)
    assert np.abs(truth - before).max() > 1e-3 * np.abs(before).max(), "the change must be visible"
    check(lambda: op @ eye, truth)
    check(lambda: op @ eye, truth)


def _step(make):
    def change(net):
        optimizer = make([p for p in net.parameters() if p.requires_grad])
        X, y = make_data()[0]
        SUM(net(X), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return change


def _each(function):
    """Apply a function to every parameter and other values for it, without a graph."""

    def change(net):
        other = make_net(1)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            function(p, q.detach())

    return change


def _inference(net):
    with torch.inference_mode():
        for p in net.parameters():
            p.mul_(1.5)


def _inference_detached(net):
    with torch.inference_mode():
        for p in net.parameters():
            p.detach().mul_(1.5)


def _set_data(p, q):
    p.data = q.clone()


def _swap(net):
    # Both have the same history, so their version counters are equal too.
    for p, q in zip(net.parameters(), make_net(1).parameters(), strict=True):
        torch.utils.swap_tensors(p, q)


@torch.no_grad()
def _add(p, q):
    p.add_(q)


def _numpy(p, q):
    p.detach().numpy()[...] = q.numpy()


optim = torch.optim
OPTIMIZERS = {
    f"{name}({option})": _step(lambda ps, make=make, options=options: make(ps, **options))
    for name, make in {
        "SGD": lambda ps, **o: optim.SGD(ps, lr=0.5, **o),
        "SGD with momentum": lambda ps, **o: optim.SGD(ps, lr=0.5, momentum=0.9, **o),
        "Adam": lambda ps, **o: optim.Adam(ps, lr=0.2, **o),
        "AdamW": lambda ps, **o: optim.AdamW(ps, lr=0.2, weight_decay=0.1, **o),
        "Adagrad": lambda ps, **o: optim.Adagrad(ps, lr=0.2, **o),
    }.items()
    for option, options in {"foreach": {"foreach": True}, "fused": {"fused": True}}.items()
    if option == "fused" or name in ("SGD", "AdamW")
}
CHANGES = {
    **OPTIMIZERS,
    "LBFGS": lambda net: optim.LBFGS(net.parameters(), lr=0.5, max_iter=1).step(lambda: _closure_loss(net)),
    "vector_to_parameters": lambda net: nn.utils.vector_to_parameters(
        2 * nn.utils.parameters_to_vector(net.parameters()).detach(), net.parameters()
    ),
    "in place": _each(_add),
    "p.data = new": _each(_set_data),
    "p.data.copy_": _each(lambda p, q: p.data.copy_(q)),
    "p.data.mul_": _each(lambda p, q: p.data.mul_(1.5)),
    "storage": _each(lambda p, q: p.untyped_storage().copy_(q.clone().untyped_storage())),
    "NumPy": _each(_numpy),
    "DLPack": _each(lambda p, q: torch.from_dlpack(p.detach()).copy_(q)),
    "inference mode": _inference,
    "swap_tensors": _swap,
    "load_state_dict": lambda net: net.load_state_dict(make_net(1).state_dict()),
    "load_state_dict(assign)": lambda net: net.load_state_dict(make_net(1).state_dict(), assign=True),
    "foreach": lambda net: torch._foreach_mul_([p.data for p in net.parameters()], 1.5),
    "one entry": lambda net: net.head.weight.data[2, 1].add_(3),
    "p.detach() in inference mode": _inference_detached,
}


def _closure_loss(net):
    net.zero_grad()
    X, y = make_data()[0]
    loss = SUM(net(X), y)
    loss.backward()
    return loss


def _in_forms(changes, everywhere=()):
    """List every change with what "auto" keeps, and some of them with each form."""
    return [
        pytest.param(change, form, id=f"{name}-{form}")
        for name, change in changes.items()
        for form in (FORMS if name in everywhere else ["auto"])
    ]


EVERYWHERE = {"in place", "AdamW(fused)", "p.data = new", "NumPy", "swap_tensors", "vector_to_parameters"}


@pytest.mark.parametrize(("change", "form"), _in_forms(CHANGES, EVERYWHERE))
def test_changed_parameters(change, form):
    net = make_net()
    check_change(net, make_operator(net, form), change)


@pytest.mark.parametrize("way", ["closure", "mapping"])
@pytest.mark.parametrize(
    ("change", "form"),
    _in_forms(
        {name: CHANGES[name] for name in ("in place", "AdamW(fused)", "p.data = new", "NumPy")},
        {"AdamW(fused)"},
    ),
)
def test_changed_parameters_of_callables(change, form, way):
    net = make_net()
    if way == "closure":
        op = make_operator(net, form, "closure")
    else:
        op = fo.EmpiricalFisherLinearOperator(
            lambda params, X: functional_call(net, params, (X,)), SUM, dict(net.named_parameters()), make_data(),
            **FORMS[form],
        )  # fmt: skip
    check_change(net, op, change)


def _frozen(net):
    return list(net.head.parameters())


def _data_of_frozen(net):
    net.first.weight.data.mul_(-2)


def _numpy_of_frozen(net):
    net.norm.bias.detach().numpy()[...] += [1, -2, 0.5, 3]


def _replace_frozen(net):
    net.first.weight = nn.Parameter(2 - net.first.weight.detach())


FROZEN = {
    "in place": lambda net: _add(net.first.weight, torch.ones(4, 3)),
    "p.data.mul_": _data_of_frozen,
    "p.data = new": lambda net: _set_data(net.norm.weight, torch.tensor([2.0, -1, 1, 0.5], dtype=torch.float64)),
    "NumPy": _numpy_of_frozen,
    "replaced": _replace_frozen,
    "buffer in place": lambda net: net.scale.mul_(-2),
    "buffer of a normalization": lambda net: net.batch_norm.running_mean.add_(1),
    "buffer replaced": lambda net: setattr(net, "scale", net.scale + 1),
    "buffer, .data": lambda net: net.scale.data.add_(1),
    "buffer, NumPy": lambda net: net.scale.numpy().__iadd__(1),
    "buffer, DLPack": lambda net: torch.from_dlpack(net.shift).add_(1),
    "buffer, storage": lambda net: net.scale.untyped_storage().copy_((net.scale + 1).untyped_storage()),
    "buffer, set_": lambda net: net.scale.set_(net.scale + 1),
}


@pytest.mark.parametrize(
    ("change", "form"),
    _in_forms(
        FROZEN,
        {"NumPy", "buffer, NumPy"},
    ),
)
def test_changed_frozen_parameters_and_buffers(change, form):
    net = make_net()
    check_change(net, make_operator(net, form, params=_frozen(net)), change, _frozen(net))


@pytest.mark.parametrize("form", ["auto", "linearization", "none"])
def test_changed_tensors_of_inference_mode(form):
    """They have no version counter."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()

    def change(net):
        net[3].weight.mul_(2)
        net[1].running_mean.add_(1)

    with torch.inference_mode():
        net = make()
    same = make()
    op = fo.EmpiricalFisherLinearOperator(net, SUM, dict(net.named_parameters()), make_data(), **FORMS[form])
    assert_followed(lambda: op @ np.eye(op.shape[0]), fisher_of(same))
    with torch.inference_mode():
        change(net)
    with torch.no_grad():
        change(same)
    assert_followed_or_refused(lambda: op @ np.eye(op.shape[0]), fisher_of(same))


@pytest.mark.parametrize("form", ["auto", "linearization", "none"])
def test_a_model_converted_to_another_precision(form):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    op = make_operator(net, form)
    op @ np.ones(op.shape[0])
    truth = fisher_of(copy.deepcopy(net).float().double())  # its numbers are rounded; F is computed in op.dtype
    net.float()
    assert_followed_or_refused(lambda: op @ np.eye(op.shape[0]), truth)


# ---- Modules and what they hold -------------------------------------------------------------------


def _set(part, name, value):
    return lambda net: setattr(net.get_submodule(part), name, value)


ATTRIBUTES = {
    "float": _set("", "temperature", 2),
    "integer": _set("", "power", 2),
    "boolean": _set("", "squares", True),
    "tensor replaced": lambda net: setattr(net, "mask", net.mask.flip(0)),
    "tensor in place": lambda net: net.mask.mul_(torch.tensor([1.0, -1, 2, 1])),
    "tensor, .data": lambda net: net.mask.data.mul_(torch.tensor([1.0, -1, 2, 1])),
    "LayerNorm.eps": _set("norm", "eps", 0.5),
    "BatchNorm1d.eps": _set("batch_norm", "eps", 3.0),
    "GroupNorm.eps": _set("groups", "eps", 0.5),
    "Softplus.beta": _set("act", "beta", 3),
    "LeakyReLU.negative_slope": _set("slope", "negative_slope", -0.5),
}


@pytest.mark.parametrize(("change", "form"), _in_forms(ATTRIBUTES, {"float", "LayerNorm.eps", "tensor in place"}))
def test_changed_numbers_of_modules(change, form):
    net = make_net()
    check_change(net, make_operator(net, form), change, check=assert_followed)


@pytest.mark.parametrize("way", ["module", "closure"])
@pytest.mark.parametrize("form", ["auto", "linearization", "partly", "none"])
def test_a_mode_that_the_model_reads(form, way):
    class Moody(Net):
        def forward(self, X):
            return super().forward(X) * (2 if self.training else 1)

    torch.manual_seed(0)
    net = Moody().double().eval()
    op = make_operator(net, form, way)

    def train(net):
        net.training = True  # of this module alone: a BatchNorm1d that trains is refused

    check_change(net, op, train, check=assert_followed)
    check_change(net, op, lambda net: net.eval(), check=assert_followed)


def _hook(net):
    net.norm.register_forward_hook(lambda module, inputs, output: output.square())


def _pre_hook(net):
    net.head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def _whole_hook(net):
    net.register_forward_hook(lambda module, inputs, output: 2 * output)


def _parametrize(net):
    nn.utils.parametrize.register_parametrization(net.head, "weight", nn.Softplus())


STRUCTURE = {
    "forward hook": _hook,
    "forward pre-hook": _pre_hook,
    "forward hook of the model": _whole_hook,
    "parametrization": _parametrize,
    "pruning": lambda net: prune.l1_unstructured(net.head, "weight", 6),
    "module without parameters replaced": lambda net: setattr(net, "act", nn.ReLU()),
    "module with parameters replaced": lambda net: setattr(net, "head", nn.Linear(4, 3).double()),
}


@pytest.mark.parametrize(
    ("change", "form"),
    _in_forms(
        STRUCTURE,
        {"forward hook"},
    ),
)
def test_changed_structure(change, form):
    net = make_net()
    params = list(net.parameters())
    op = make_operator(net, form)
    eye = np.eye(op.shape[0])
    before = op @ eye
    change(net)
    now = list(net.parameters())
    same = len(now) == len(params) and all(p is q for p, q in zip(now, params, strict=True))
    # Where parameters were replaced, the operator has none to differentiate by: only an error is right.
    truth = fisher_of(net) if same else np.full_like(before, np.nan)
    assert_followed_or_refused(lambda: op @ eye, truth)


def test_a_hook_that_is_removed_is_followed():
    net = make_net()
    handle = net.norm.register_forward_hook(lambda module, inputs, output: output.square())
    op = make_operator(net)
    check_change(net, op, lambda net: handle.remove())


class _Power(nn.Module):
    def __init__(self, power):
        super().__init__()
        self.power = power

    def forward(self, X):
        return nn.functional.softplus(X) ** self.power


def _replace_at_the_same_address(net, name, make):
    """Replace something by a new object at its address, as allocators reuse memory, if one of many comes to lie there."""
    others = []
    address = id(getattr(net, name))
    setattr(net, name, None)
    for _ in range(1000):
        made = make()
        if id(made) == address:
            break
        others.append(made)
    setattr(net, name, made)


REUSED = {
    "module": ("act", lambda: _Power(1), lambda: _Power(2)),
    "buffer": ("scale", lambda: torch.ones(4).double(), lambda: torch.full((4,), 2.0, dtype=torch.float64)),
}


@pytest.mark.parametrize("form", ["auto", "linearization"])
@pytest.mark.parametrize("what", REUSED)
def test_what_has_the_address_of_the_one_that_it_replaces(what, form):
    name, make_first, make_second = REUSED[what]
    net = make_net()
    setattr(net, name, make_first())
    op = make_operator(net, form)
    eye = np.eye(op.shape[0])
    for _ in range(10):  # something else may take the place of the first, so one attempt is not enough
        setattr(net, name, make_first())
        op.refresh()
        assert_followed(lambda: op @ eye, fisher_of(net))
        _replace_at_the_same_address(net, name, make_second)
        assert_followed(lambda: op @ eye, fisher_of(net))


# ---- Changes of the loss --------------------------------------------------------------------------


def _weighted(reduction):
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), reduction=reduction)


NEW_WEIGHTS = torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64)
LOSS_CHANGES = {
    "weights in place": lambda loss: loss.weight.copy_(NEW_WEIGHTS),
    "weights, .data": lambda loss: loss.weight.data.copy_(NEW_WEIGHTS),
    "weights, NumPy": lambda loss: np.copyto(loss.weight.numpy(), NEW_WEIGHTS.numpy()),
    "weights replaced": lambda loss: setattr(loss, "weight", NEW_WEIGHTS.clone()),
    "ignore_index": lambda loss: setattr(loss, "ignore_index", 1),
    "reduction": lambda loss: setattr(loss, "reduction", "mean" if loss.reduction == "sum" else "sum"),
}


def exact_of(net, loss):
    return exact_fisher(net, loss, list(net.parameters()), make_data())


LOSS_FORMS = ["auto", "linearization", "partly", "none"]


def _loss_cases():
    for name, change in LOSS_CHANGES.items():
        for reduction in ("sum", "mean"):
            for form in LOSS_FORMS if name == "weights in place" else ["auto", "none"]:
                yield pytest.param(change, reduction, form, id=f"{name}-{reduction}-{form}")


@pytest.mark.parametrize(("change", "reduction", "form"), list(_loss_cases()))
def test_changed_losses(change, reduction, form):
    net, loss = make_net(), _weighted(reduction)
    op = fo.FisherLinearOperator(
        net, loss, data=make_data(), **(FORMS[form] | ({"max_memory": 8000} if form == "partly" else {}))
    )
    eye = np.eye(op.shape[0])
    assert_followed(lambda: op @ eye, exact_of(net, loss))
    if form == "partly":
        assert {entry.form == "none" for entry in op.plan.entries} == {True, False}
    change(loss)
    assert_followed_or_refused(lambda: op @ eye, exact_of(net, loss))


def test_changed_label_smoothing_of_the_empirical_fisher():
    net, loss = make_net(), nn.CrossEntropyLoss(reduction="sum")
    op = make_operator(net, loss=loss)
    eye = np.eye(op.shape[0])
    assert_followed(lambda: op @ eye, fisher_of(net, loss=loss))
    loss.label_smoothing = 0.5
    assert_followed_or_refused(lambda: op @ eye, fisher_of(net, loss=loss))


def test_changed_weights_change_what_a_mean_divides_by():
    net, loss = make_net(), _weighted("mean")
    op = fo.FisherLinearOperator(net, loss, data=make_data(), cache="none")
    op @ np.ones(op.shape[0])
    loss.weight.copy_(NEW_WEIGHTS)
    assert_same(op @ np.eye(op.shape[0]), exact_of(net, loss), torch.float64)


# ---- What is made of an operator ------------------------------------------------------------------


def _inverse(F, damping=0.1):
    return np.linalg.inv(F + damping * np.eye(len(F)))


DERIVED = {
    "2 * op": (lambda op: 2 * op, lambda F: 2 * F),
    "op + op": (lambda op: op + 0.5 * op, lambda F: 1.5 * F),
    "op @ op": (lambda op: op @ op, lambda F: F @ F),
    "damped": (lambda op: op.damped(0.1), lambda F: F + 0.1 * np.eye(len(F))),
    "transposed": (lambda op: op.T, lambda F: F),
    "scores.T @ scores": (lambda op: op.scores.T @ op.scores, lambda F: F),
    "inv(op), dual": (lambda op: linalg.inv(op, 0.1, method="dual"), _inverse),
    "inv(op), dense": (lambda op: linalg.inv(op, 0.1, method="dense"), _inverse),
    "inv(op), primal": (lambda op: linalg.inv(op, 0.1, method="primal"), _inverse),
    "inv(2 * op)": (lambda op: linalg.inv(2 * op, 0.1), lambda F: _inverse(2 * F)),
    "inv(2 * op), dense": (lambda op: linalg.inv(2 * op, 0.1, method="dense"), lambda F: _inverse(2 * F)),
    "inv(op + op), dense": (lambda op: linalg.inv(op + op, 0.1, method="dense"), lambda F: _inverse(2 * F)),
    "inv(damped), dense": (lambda op: linalg.inv(op.damped(0.2), 0.1, method="dense"), lambda F: _inverse(F, 0.3)),
    "3 * inv(op)": (lambda op: 3 * linalg.inv(op, 0.1), lambda F: 3 * _inverse(F)),
}


def assert_close(result, truth):
    """Assert what solvers promise: rtol=1e-5 of the residual, of matrices whose condition is at most about 1e3."""
    assert np.abs(result - truth).max() <= 1e-2 * np.abs(truth).max()


def mild_net():
    """Return a model whose Fisher has eigenvalues of order 1, so that inverses with damping 0.1 are well-conditioned."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _grow(net):
    with torch.no_grad():
        net[2].weight.mul_(-4)
        net[0].weight.add_(1)


def _grow_unseen(net):
    net[2].weight.data.mul_(-4)
    net[0].weight.data.add_(1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(
            name,
            change,
            id=f"{name}-{what}",
        )
        for name in DERIVED
        for what, change in {"seen": _grow, "unseen": _grow_unseen}.items()
        if what == "seen" or name in ("2 * op", "scores.T @ scores", "inv(op), dual", "inv(op), dense", "inv(2 * op)")
    ],
)
def test_what_is_made_of_an_operator_follows(name, change):
    make, of_truth = DERIVED[name]
    net = mild_net()
    op = fo.EmpiricalFisherLinearOperator(net, SUM, data=make_data())
    derived = make(op)
    eye = np.eye(op.shape[0])
    assert_close(derived @ eye, of_truth(fisher_of(net)))
    change(net)
    result = derived @ eye
    assert_close(result, of_truth(fisher_of(net)))


HIDDEN = {"factor": 1.0}


class Hiding(nn.Module):
    """Reads a number that lies where nobody can look."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, X):
        return HIDDEN["factor"] * self.net(X)


@pytest.mark.parametrize("name", DERIVED)
def test_refresh_reaches_what_is_made_of_an_operator(name, monkeypatch):
    make, of_truth = DERIVED[name]
    net = Hiding(mild_net())
    op = fo.EmpiricalFisherLinearOperator(net, SUM, data=make_data())
    derived = make(op)
    eye = np.eye(op.shape[0])
    assert_close(derived @ eye, of_truth(fisher_of(net)))
    monkeypatch.setitem(HIDDEN, "factor", -3.0)
    op.refresh()
    assert_close(derived @ eye, of_truth(fisher_of(net)))


def _solved(op, b):
    solution = linalg.solve(op, b, 0.1)
    assert solution.converged
    return solution.x


RESULTS = {
    "scores @ v": (lambda op, v: op.scores @ v, lambda G, v: G @ v),
    "scores.T @ w": (lambda op, v: op.scores.T @ v[: op.scores.shape[0]], lambda G, v: G.T @ v[: len(G)]),
    "gram": (lambda op, v: op.scores.gram(), lambda G, v: G @ G.T),
    "diagonal": (lambda op, v: op.diagonal(), lambda G, v: (G**2).sum(0)),
    "trace": (lambda op, v: op.trace(), lambda G, v: (G**2).sum()),
    "todense": (lambda op, v: op.todense(), lambda G, v: G.T @ G),
    "solve": (_solved, lambda G, v: _inverse(G.T @ G) @ v),
    "eigvalsh": (lambda op, v: linalg.eigvalsh(op), lambda G, v: np.linalg.eigvalsh(G @ G.T)),
    "slogdet": (
        lambda op, v: float(linalg.slogdet(op, 0.1)[1]),
        lambda G, v: np.linalg.slogdet(G.T @ G + 0.1 * np.eye(len(v)))[1],
    ),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(name, change, id=f"{name}-{what}")
        for name in RESULTS
        for what, change in {"seen": _grow, "unseen": _grow_unseen}.items()
    ],
)
def test_every_method_follows(name, change):
    compute, of_truth = RESULTS[name]
    net = mild_net()
    op = fo.EmpiricalFisherLinearOperator(net, SUM, data=make_data())
    scores = op.scores
    v = np.linspace(-1, 1, op.shape[0])

    def check():
        G = rows_of(net, list(net.parameters()))
        assert_close(compute(op, v), of_truth(G, v))
        assert_close(scores @ v, G @ v)

    check()
    change(net)
    check()


@pytest.mark.parametrize("form", ["auto", "linearization"])
@pytest.mark.parametrize("change", [pytest.param(_grow, id="seen"), pytest.param(_grow_unseen, id="unseen")])
def test_resampled_operators_follow(form, change):
    net = mild_net()
    options = {"data": make_data(), **FORMS[form]}
    op = fo.FisherMCLinearOperator(net, SUM, seed=1, **options)
    eye = np.eye(op.shape[0])
    op @ eye
    early = op.resample(2)
    early @ eye
    change(net)
    late = op.resample(2)
    truth = fo.FisherMCLinearOperator(net, SUM, seed=2, data=make_data(), cache="none").todense()
    assert_followed(lambda: early @ eye, truth)
    assert_followed(lambda: late @ eye, truth)


# ---- Copies ---------------------------------------------------------------------------------------


class Logits:
    """A callable X -> f that holds a model, as the documentation has it for the models of other libraries."""

    def __init__(self, model):
        self.model = model

    def __call__(self, X):
        return self.model(X)


def call(net, params, X):
    return functional_call(net, params, (X,))


CALLABLES = {
    "object": lambda net: (Logits(net), list(net.parameters())),
    "bound method": lambda net: (net.forward, list(net.parameters())),
    "partial": lambda net: (partial(_call_plainly, net), list(net.parameters())),
    "part of the parameters": lambda net: (Logits(net), [net[2].bias, net[0].weight]),
    "mapping": lambda net: (partial(call, net), dict(net.named_parameters())),
    "module": lambda net: (net, None),
}


def _call_plainly(net, X):
    return net(X)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda op: pickle.loads(pickle.dumps(op))}


@pytest.mark.parametrize(
    ("way", "again"),
    [(way, again) for way in CALLABLES for again in COPIES],
)
def test_copies_of_operators(way, again):
    net = mild_net()
    model_func, params = CALLABLES[way](net)
    op = fo.EmpiricalFisherLinearOperator(model_func, SUM, params, make_data())
    chosen = list(params.values()) if isinstance(params, dict) else params or list(net.parameters())
    truth = fisher_of(net, chosen)
    eye = np.eye(op.shape[0])
    if again == "pickle":
        op @ eye  # something is kept; a fresh operator has nothing
    twin = COPIES[again](op)
    assert_followed(lambda: twin @ eye, truth)
    _grow(net)  # the copy has parameters of its own
    assert_followed(lambda: twin @ eye, truth)
    assert_followed(lambda: op @ eye, fisher_of(net, chosen))


# ---- What models keep -----------------------------------------------------------------------------


def _in_a_dict(model, make):
    if "bias" not in model.kept:
        model.kept["bias"] = make()
    return model.kept["bias"]


def _in_a_list(model, make):
    if not model.list:
        model.list.append(make())
    return model.list[0]


def _in_an_attribute(model, make):
    if model.bias is None:
        model.bias = make()
    return model.bias


def _in_a_new_attribute(model, make):
    if not hasattr(model, "lazy"):
        model.lazy = make()
    return model.lazy


def _in_a_buffer(model, make):
    if "late" not in model._buffers:
        model.register_buffer("late", make(), persistent=False)
    return model.late


STORES = {
    "dict": _in_a_dict,
    "list": _in_a_list,
    "attribute": _in_an_attribute,
    "new attribute": _in_a_new_attribute,
    "new buffer": _in_a_buffer,
}


class Biased(nn.Module):
    """Attention with a bias for each offset, which is looked up once in evaluation mode and kept."""

    def __init__(self, store):
        super().__init__()
        self.qk, self.head, self.offsets = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(3))
        self.register_buffer("index", (torch.arange(3)[:, None] - torch.arange(3)).abs(), persistent=False)
        self.store, self.kept, self.list, self.bias = store, {}, [], None

    def forward(self, X):
        bias = self.store(self, lambda: self.offsets[self.index])
        return self.head(((self.qk(X) @ X.mT + bias).softmax(-1) @ X).mean(1))


def _make_biased(name):
    torch.manual_seed(0)
    return Biased(STORES[name]).eval()


def _without_store(model, make):
    return make()


def _biased_data(dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(n, 3, 4, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)) for n in (4, 2)]


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "auto") for name in STORES), ("dict", "linearization"), ("attribute", "none")]
)
def test_models_that_keep_tensors_have_all_rows(name, form):
    model = _make_biased(name).double()
    data = _biased_data()
    op = fo.EmpiricalFisherLinearOperator(model, SUM, data=data, **FORMS[form])
    product = op @ np.eye(op.shape[0])
    truth_model = _make_biased(name).double()
    truth_model.store = _without_store
    truth = empirical_fisher(truth_model, SUM, list(truth_model.parameters()), data)
    assert_same(product, truth, torch.float64, operations=10**5)


@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning")
@pytest.mark.parametrize("name", STORES)
def test_what_a_model_keeps_is_the_users(name):
    model = _make_biased(name)
    data = _biased_data(torch.float32)
    before = {key: copy.copy(value) for key, value in vars(model).items()}
    fo.EmpiricalFisherLinearOperator(model, SUM, data=data, dtype="float64").trace()
    after = vars(model)
    assert after.keys() == before.keys()
    assert all(after[key] == before[key] for key in ("kept", "list", "bias", "_buffers"))
    f = model(data[0][0])  # in float32, as before
    assert f.dtype == torch.float32
    (gradient,) = torch.autograd.grad(f.logsumexp(1).sum(), model.offsets, allow_unused=True)
    assert gradient is not None


class Remembering(nn.Module):
    """Shows its last hidden state, as many models do."""

    def __init__(self):
        super().__init__()
        self.first, self.head, self.last, self.calls = nn.Linear(3, 4), nn.Linear(4, 3), None, 0

    def forward(self, X):
        self.last, self.calls = torch.tanh(self.first(X)), self.calls + 1
        return self.head(self.last)


@pytest.mark.parametrize("way", ["module", "closure"])
@pytest.mark.parametrize("form", ["auto", "linearization", "none"])
def test_what_a_model_stored_is_what_the_users_evaluation_stored(way, form):
    torch.manual_seed(0)
    model = Remembering().double()
    model(torch.ones(2, 3, dtype=torch.float64))
    last, calls = model.last, model.calls
    op = make_operator(model, form, way)
    op @ np.eye(op.shape[0])
    op.todense()
    assert model.last is last
    assert model.calls == calls


@pytest.mark.parametrize(("layer", "form"), [(nn.LSTM, "auto"), (nn.GRU, "linearization"), (nn.RNN, "none")])
def test_recurrent_layers_stay_the_users(layer, form):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer(3, 2, batch_first=True), nn.Linear(2, 3)

        def forward(self, X):
            return self.head(self.layer(X)[0][:, -1])

    torch.manual_seed(0)
    model = Recurrent().double()
    g = torch.Generator().manual_seed(2)
    data = [(torch.randn(3, 2, 3, generator=g, dtype=torch.float64), torch.randint(3, (3,), generator=g))]
    op = fo.EmpiricalFisherLinearOperator(model, SUM, data=data, **FORMS[form])
    op @ np.ones(op.shape[0])
    own = {id(p) for p in model.parameters()}
    held = [t for part in model.modules() for v in vars(part).values() if isinstance(v, list) for t in v]
    assert [t for t in held if isinstance(t, torch.Tensor) and id(t) not in own] == []


# ---- Memory that is shared with the user ------------------------------------------------------------


class Graph:
    """A batch with a `to` of its own, which returns itself where there is nothing to do, as those of graphs do."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        self.x = self.x.to(device)
        return self


class OnGraphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, graph):
        return self.head(torch.tanh(self.first(graph.x)))


@pytest.mark.parametrize(
    "form",
    [
        "auto",
        "factors",
        "linearization",
        "scores",
    ],
)
def test_what_is_kept_shares_no_memory_with_inputs_that_move_themselves(form):
    torch.manual_seed(0)
    model = OnGraphs().double()
    data = [(Graph(X), y) for X, y in make_data()]
    op = fo.EmpiricalFisherLinearOperator(model, SUM, data=data, cache=form)
    eye = np.eye(op.shape[0])
    before = op @ eye
    for graph, _ in data:
        graph.x.mul_(-3)
    # What is kept stays the same matrix, as for arrays; reading the data anew finds the change.
    np.testing.assert_array_equal(op @ eye, before)


# ---- Threads --------------------------------------------------------------------------------------


class Meeting(nn.Module):
    """Calls a function in each evaluation."""

    def __init__(self, meet):
        super().__init__()
        self.net, self.meet = mild_net(), meet

    def forward(self, X):
        self.meet()
        return self.net(X)


def test_evaluations_of_two_threads_do_not_overlap():
    barriers, met = [], []

    def meet():
        """Wait for another thread that evaluates at the same time; the first to come waits for a second at most."""
        if barriers:
            try:
                barriers[0].wait(timeout=1)
                met.append(True)
            except threading.BrokenBarrierError:
                barriers.clear()

    model = Meeting(meet)
    ops = [fo.EmpiricalFisherLinearOperator(model, SUM, data=make_data(), cache="none") for _ in range(2)]
    v = np.ones(ops[0].shape[0])
    expected = ops[0] @ v
    barriers.append(threading.Barrier(2))
    with ThreadPoolExecutor(2) as pool:
        products = list(pool.map(lambda op: op @ v, ops))
    assert not met
    assert not barriers, "the evaluations must have waited"
    for product in products:
        np.testing.assert_array_equal(product, expected)


# ---- What a model reads that is no tensor ---------------------------------------------------------


SETTINGS = {"gain": 1.0, "terms": [1.0, 0.5]}


class Configured(nn.Module):
    """It reads a configuration, an array of NumPy, and global mappings."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.config = types.SimpleNamespace(gain=1.0, inner={"gain": 1.0})
        self.table = np.ones(4)

    def forward(self, X):
        gain = self.config.gain * self.config.inner["gain"] * float(self.table[2]) * SETTINGS["gain"]
        return self.layer(X) * gain * sum(term for term in SETTINGS["terms"])


class Doubled(Configured):
    """The same with twice the outputs."""

    def forward(self, X):
        return 2 * super().forward(X)

    def plain(self, X):
        return 2 * self.layer(X) * sum(SETTINGS["terms"])


CHANGES = {
    "attribute of an object": lambda model, patch: setattr(model.config, "gain", 2.0),
    "mapping of an object": lambda model, patch: model.config.inner.update(gain=2.0),
    "array": lambda model, patch: model.table.__setitem__(2, 2.0),
    "global mapping": lambda model, patch: patch.setitem(SETTINGS, "gain", 2.0),
    "list in a global mapping": lambda model, patch: patch.setitem(SETTINGS, "terms", [2.0, 1.0]),
    "class": lambda model, patch: setattr(model, "__class__", Doubled),
    "method of the class": lambda model, patch: patch.setattr(Configured, "forward", Doubled.plain),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("as_callable", [False, True])
def test_settings_are_followed(monkeypatch, change, as_callable):
    torch.manual_seed(0)
    model, data = Configured(), (torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,)))

    def make():
        if as_callable:
            return fo.FisherLinearOperator(lambda X: model(X), nn.CrossEntropyLoss(), list(model.parameters()), data)
        return fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=data)

    op = make()
    before = op.trace()
    CHANGES[change](model, monkeypatch)
    assert op.trace() == pytest.approx(make().trace(), rel=1e-12)
    assert op.trace() != pytest.approx(before, rel=1e-2)


def test_threads_share_a_linearization():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    batches = list(zip(X.split(3), y.split(3), strict=True))
    op = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=batches, cache="linearization")
    v = np.ones(op.shape[1])
    product, rows, parameters = op @ v, op.scores.rows(), list(model.parameters())

    def work(number):
        for _ in range(5):
            if number % 2:
                np.testing.assert_allclose(op @ v, product, rtol=1e-10)
            else:
                np.testing.assert_allclose(op.scores.rows(), rows, rtol=1e-10, atol=1e-14)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
