"""Exceptions of the user's model and likelihood keep their type and traceback, and name the batch."""

import traceback

import numpy as np
import pytest
import torch
from torch import nn

import fisherops as fo
from fisherops import likelihoods


class TwoArgumentsError(ValueError):
    """Its constructor takes more than a message."""

    def __init__(self, layer, shape):
        super().__init__(layer, shape)
        self.layer, self.shape = layer, shape


class NoMessageError(Exception):
    pass


RAISED = [
    TwoArgumentsError("head", (3,)), NoMessageError(), RuntimeError("mine"), ValueError("mine"), TypeError("mine"), KeyError("x"),
    IndexError("mine"), AssertionError("mine"), ZeroDivisionError("mine"), NotImplementedError("mine"),
]  # fmt: skip
each_kind = pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)


class Raising(nn.Module):
    """Raises for batches whose first number is 7, when `armed`."""

    def __init__(self, error):
        super().__init__()
        self.layer, self.error, self.armed = nn.Linear(2, 3), error, True

    def forward(self, X):
        if self.armed and X[0, 0] == 7:
            self.users_own_line()
        return self.layer(X)

    def users_own_line(self):
        raise self.error


def batches():
    X, y = torch.zeros(3, 2, 2), torch.zeros(3, 2, dtype=torch.long)
    X[1] = 7
    return list(zip(X, y, strict=True))


def check(caught, error, function):
    assert caught.value is error
    assert function in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "batch 1" in " ".join([*getattr(error, "__notes__", []), *map(str, error.args)])


@each_kind
@pytest.mark.parametrize("check_deterministic", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_model_raises(error, check_deterministic, reduction):
    error = type(error)(*error.args)  # notes and tracebacks of other tests are left behind
    with pytest.raises(type(error)) as caught:
        op = fo.FisherLinearOperator(
            Raising(error), nn.CrossEntropyLoss(reduction=reduction), data=batches(),
            check_deterministic=check_deterministic,
        )  # fmt: skip
        op @ np.ones(op.shape[0])
    check(caught, error, "users_own_line")


@each_kind
@pytest.mark.parametrize("cache", ["auto", "linearization", "none"])
def test_the_model_raises_in_a_later_pass(error, cache):
    error = type(error)(*error.args)
    model = Raising(error)
    model.armed = False
    op = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=batches(), cache=cache)
    v = np.ones(op.shape[0])
    op @ v
    model.armed = True
    op.refresh()
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            op @ v
        check(caught, error, "users_own_line")
    model.armed = False
    assert np.isfinite(op @ v).all()


class Own(likelihoods.Likelihood):
    """A Gaussian whose targets raise if they are 7, where they are read or where their density is needed."""

    def __init__(self, error, place):
        super().__init__()
        self.error, self.place = error, place

    def flatten(self, output):
        return output

    def terms(self, output, y):
        if self.place == "terms" and y[0, 0] == 7:
            self.users_own_line()
        return likelihoods.Terms(None, 1.0, y)

    def users_own_line(self):
        raise self.error

    def sample(self, f, samples, draws):
        return f + 0.5**0.5 * draws.normal(f, samples)

    def log_prob(self, f, y):
        if self.place == "log_prob" and (y == 7).all():
            self.users_own_line()
        return -((f - y) ** 2).sum(-1)


@each_kind
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("place", ["terms", "log_prob"])
def test_the_likelihood_raises(error, heads, place):
    error = type(error)(*error.args)
    y = torch.zeros(3, 2, 3)
    y[1] = 7
    data = [(X, (own, own) if heads else own) for (X, _), own in zip(batches(), y, strict=True)]
    layer, own = nn.Linear(2, 3), Own(error, place)
    model, loss = ((lambda X: (layer(X), layer(X))), (nn.MSELoss(), own)) if heads else (layer, own)
    with pytest.raises(type(error)) as caught:
        op = fo.EmpiricalFisherLinearOperator(model, loss, list(layer.parameters()), data=data)
        op @ np.ones(op.shape[0])
    check(caught, error, "users_own_line")
    if heads and place == "terms":
        assert "head 1" in " ".join([*getattr(error, "__notes__", []), *map(str, error.args)])


class Filtering(nn.Module):
    """Keeps the examples with a positive first entry."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, X):
        return self.linear(X[X[:, 0] > 0])


@pytest.mark.parametrize("check", [True, False])
def test_a_batch_without_outputs(check):
    data = [(torch.ones(3, 2), torch.ones(3, 1)), (-torch.ones(3, 2), torch.ones(0, 1))]
    with pytest.raises(ValueError, match="the model must return outputs, got none for batch 1 of 3 examples"):
        fo.FisherMCLinearOperator(
            Filtering(), nn.MSELoss(), data=data, batch_size_fn=len, check_deterministic=check
        ).trace()


def test_a_parameter_without_elements():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.nothing = nn.Linear(2, 1), nn.Parameter(torch.zeros(0))

        def forward(self, X):
            return self.linear(X) + self.nothing.sum()

    data = torch.randn(5, 2), torch.randn(5, 1)
    model = Empty()
    for cache in ("auto", "scores", "factors", "linearization", "none"):
        op = fo.FisherLinearOperator(model, nn.MSELoss(), data=data, cache=cache)
        expected = fo.FisherLinearOperator(model.linear, nn.MSELoss(), data=data).todense()
        np.testing.assert_allclose(op @ np.eye(3, dtype=np.float32), expected, rtol=1e-5, atol=1e-7)
