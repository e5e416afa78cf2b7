"""`op.gradient()` is what plain `loss.backward()` over the whole data set gives, and `repr(op)` describes the operator."""

import copy
import pickle

import numpy as np
import pytest
import torch
from families import FAMILIES, make_problem
from tolerances import assert_same
from torch import nn

import fisherops as fo

OPERATORS = {
    "mc": fo.FisherMCLinearOperator,
    "exact": fo.FisherLinearOperator,
    "empirical": fo.EmpiricalFisherLinearOperator,
}


def plain(model, value, params=None):
    """Differentiate a loss over all data by plain reverse mode."""
    params = list(model.parameters()) if params is None else params
    gradients = torch.autograd.grad(value, params, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(gradients, params, strict=True)]
    )


def uneven(X, y):
    return [(X[:1], y[:1]), (X[1:4], y[1:4]), (X[4:], y[4:])]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_loss_and_distribution(name):
    model, loss, X, y = make_problem(name, N=9)
    output = model(X)
    if loss is None:
        value = -output.log_prob(y).sum()
    else:
        value = loss(output[0], y, output[1]) if name.startswith("Gaussian") else loss(output, y)
    expected = plain(model, value)
    for kind, batches in (("empirical", uneven(X, y)), ("mc", (X, y))):
        found = OPERATORS[kind](model, loss, data=batches).gradient()
        assert type(found) is np.ndarray
        assert_same(found, expected, np.float64)


class Tagger(nn.Module):
    """Classes second, one term per position; a parameter that the outputs do not depend on."""

    def __init__(self):
        super().__init__()
        self.embed, self.unused, self.head = nn.Embedding(7, 4), nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, X):
        return self.head(self.embed(X)).movedim(-1, 1)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ignored_and_weighted_tokens(kind, reduction, smoothing):
    model = Tagger().double()
    X, y = torch.randint(7, (8, 5)), torch.randint(3, (8, 5))
    y[:, 3:], y[:1] = -100, -100  # the first batch has no term at all
    weight = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=smoothing)
    op = OPERATORS[kind](model, loss, data=uneven(X, y))
    expected = plain(model, loss(model(X), y))
    assert_same(op.gradient(), expected, np.float64)
    start, stop = op.parameter_spans["unused.weight"]
    assert not op.gradient()[start:stop].any()


@pytest.mark.parametrize("rows", ["term", "datum"])
def test_rows_do_not_change_it(rows):
    model, X, y = Tagger().double(), torch.randint(7, (6, 5)), torch.randint(3, (6, 5))
    op = fo.EmpiricalFisherLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y), rows=rows)
    assert_same(op.gradient(), plain(model, nn.CrossEntropyLoss()(model(X), y)), np.float64)


def test_probabilities_as_targets():
    model, X = nn.Linear(4, 3).double(), torch.randn(7, 4, dtype=torch.float64)
    y = torch.rand(7, 3, dtype=torch.float64)
    y /= y.sum(1, keepdim=True)
    loss = nn.CrossEntropyLoss(torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64), label_smoothing=0.1)
    op = fo.FisherLinearOperator(model, loss, data=uneven(X, y))
    assert_same(op.gradient(), plain(model, loss(model(X), y)), np.float64)


def test_several_outputs_each_with_its_own_divisor():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.label, self.size = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, X):
            h = self.body(X).tanh()
            return {"label": self.label(h), "size": self.size(h)}

    model, X = Both().double(), torch.randn(9, 3, dtype=torch.float64)
    y = {"label": torch.randint(3, (9,)), "size": torch.randn(9, 2, dtype=torch.float64)}
    y["label"][::2] = -100
    losses = {"label": nn.CrossEntropyLoss(), "size": nn.MSELoss(reduction="sum")}
    f = model(X)
    expected = plain(model, losses["label"](f["label"], y["label"]) + losses["size"](f["size"], y["size"]))
    for operator in OPERATORS.values():
        assert_same(operator(model, losses, data=(X, y), batch_size=4).gradient(), expected, np.float64)


def test_float64_data_keep_their_digits():
    """Times in seconds since 1970 are the same number in float32."""

    class Times(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, X):
            return self.layer((X - 1.7e9) / 100)

    model = Times()
    X = 1.7e9 + np.linspace(0, 400, 12)[:, None]
    y = np.sin(np.linspace(0, 1, 24)).reshape(12, 2)
    op = fo.FisherMCLinearOperator(model, nn.MSELoss(), data=(X, y), dtype="float64", batch_size=5)
    assert op.gradient().dtype == np.float64
    model.double()
    assert_same(op.gradient(), plain(model, nn.MSELoss()(model(torch.tensor(X)), torch.tensor(y))), np.float64)


def test_chosen_parameters_in_their_order():
    model, X, y = (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(),
        torch.randn(6, 4).double(),
        torch.randn(6, 2).double(),
    )
    params = [model[2].bias, model[0].weight]
    op = fo.FisherLinearOperator(model, nn.MSELoss(), params, (X, y))
    assert_same(op.gradient(), plain(model, nn.MSELoss()(model(X), y), params), np.float64)


def test_operations_without_a_second_derivative():
    """Reverse mode is enough for a gradient."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    layer = nn.Linear(3, 2).double()
    X, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    op = fo.FisherLinearOperator(lambda X: Once.apply(layer(X)), nn.MSELoss(), list(layer.parameters()), (X, y))
    assert_same(op.gradient(), plain(layer, nn.MSELoss()(layer(X).square(), y)), np.float64)


def test_it_follows_the_parameters_and_leaves_no_trace():
    model, X, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    op = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y))
    F, state = op.todense(), torch.get_rng_state()
    first = op.gradient()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(op.todense(), F)
    with torch.no_grad():
        model.weight.mul_(2)
    second = op.gradient()
    assert not np.allclose(first, second)
    assert_same(second, plain(model, nn.CrossEntropyLoss()(model(X), y)), np.float32)


def test_it_is_what_the_natural_gradient_takes():
    model, X, y = nn.Linear(4, 3).double(), torch.randn(20, 4).double(), torch.randint(3, (20,))
    op = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y))
    step = fo.linalg.natural_gradient(op, op.gradient(), 0.1, rtol=1e-12)
    assert_same(step, np.linalg.solve(op.todense() + 0.1 * np.eye(15), op.gradient()), np.float64, 10**5)


def test_a_derivative_that_is_not_finite():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, X):
            return X * self.scale.sqrt()

    op = fo.FisherMCLinearOperator(Root(), nn.MSELoss(), data=(torch.ones(3, 1), torch.zeros(3, 1) + 2))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        op.gradient()


def test_weights_of_the_loss_that_changed():
    loss, model, data = nn.CrossEntropyLoss(torch.ones(3)), nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3)
    op = fo.FisherLinearOperator(model, loss, data=data)
    before = op.gradient()
    loss.weight[1] = 3
    np.testing.assert_array_equal(op.gradient(), fo.FisherLinearOperator(model, loss, data=data).gradient())
    assert not np.allclose(op.gradient(), before)


def test_the_gradient_needs_targets():
    op = fo.FisherLinearOperator(nn.Linear(4, 3), nn.CrossEntropyLoss(), data=(torch.randn(6, 4), None))
    with pytest.raises(ValueError, match="targets y must be given for the gradient of the loss, got None"):
        op.gradient()


# ---- repr ------------------------------------------------------------------------------------------------


class Custom(fo.likelihoods.Likelihood):
    def sample(self, f, samples, draws):
        return draws.normal(f, samples)

    def log_prob(self, f, y):
        return -(y - f).square().sum(-1)


@pytest.mark.parametrize(
    ("kind", "loss", "options", "expected"),
    [
        ("mc", nn.MSELoss(), {}, "D=15, kind='mc', mc_samples=1, loss=MSELoss('mean'), 8 examples, cpu, float32, cache='auto'"),
        (
            "mc", nn.MSELoss(reduction="sum"), {"mc_samples": 3, "dtype": "float64", "cache": "none"},
            "D=15, kind='mc', mc_samples=3, loss=MSELoss('sum'), 8 examples, cpu, float64, cache='none'",
        ),
        ("exact", nn.MSELoss(), {}, "D=15, kind='exact', loss=MSELoss('mean'), 8 examples, cpu, float32, cache='auto'"),
        ("empirical", nn.L1Loss(), {}, "D=15, kind='empirical', loss=L1Loss('mean'), 8 examples, cpu, float32, cache='auto'"),
        ("mc", Custom("sum"), {}, "D=15, kind='mc', mc_samples=1, loss=Custom('sum'), 8 examples, cpu, float32, cache='auto'"),
        (
            "mc", nn.MSELoss(), {"check_deterministic": False},
            "D=15, kind='mc', mc_samples=1, loss=MSELoss('mean'), number of examples unknown before the first pass, cpu, "
            "float32, cache='auto'",
        ),
    ],
)  # fmt: skip
def test_repr_is_one_line(kind, loss, options, expected):
    op = OPERATORS[kind](nn.Linear(4, 3), loss, data=(torch.randn(8, 4), torch.randn(8, 3)), **options)
    assert repr(op) == str(op) == f"<{type(op).__name__}: {expected}>"
    assert repr(pickle.loads(pickle.dumps(op))) == repr(copy.copy(op)) == repr(op)


def test_repr_reads_no_data():
    class Data:
        reads = 0

        def __iter__(self):
            Data.reads += 1
            yield torch.randn(4, 4), torch.randn(4, 3)

    op = fo.FisherMCLinearOperator(nn.Linear(4, 3), nn.MSELoss(), data=Data(), check_deterministic=False, num_data=4)
    assert "4 examples" in repr(op)
    assert Data.reads == 0


def test_repr_of_several_losses_and_of_distributions():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, X):
            return self.layer(X), self.layer(X)

    y = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2)
    losses = nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")
    op = fo.FisherLinearOperator(Two(), losses, data=[(torch.ones(3, 2), y)])
    assert "loss=(CrossEntropyLoss('mean'), MSELoss('sum'))" in repr(op)
    model, loss, X, y = make_problem("Gamma")
    assert "loss=None (distributions)" in repr(fo.FisherLinearOperator(model, loss, data=(X, y)))
