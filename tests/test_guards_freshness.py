"""An operator stays one matrix, that of the present model, and the model stays the user's own."""

import numpy as np
import pytest
import torch
from oracle import empirical_fisher, exact_fisher
from tolerances import assert_same
from torch import nn

import fisherops as fo

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
