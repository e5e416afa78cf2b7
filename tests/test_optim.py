"""Natural-gradient steps: those of dense algebra, for every kind and loss; nothing learned twice, nothing half done."""

import copy
import gc
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import LOSSES, make_case
from test_facts import Counts, counted
from torch import nn

import fisherops as fo
from fisherops.optim import NaturalGradient

OPERATORS = {
    "exact": fo.FisherLinearOperator,
    "mc": fo.FisherMCLinearOperator,
    "empirical": fo.EmpiricalFisherLinearOperator,
}


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def gradient_of(model, loss, batch):
    value = loss(model(batch[0]), batch[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def regression(seed=0, N=24, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    X = torch.randn(N, 2, dtype=dtype)
    return model, (X, torch.sin(X.sum(1, keepdim=True)))


@given(
    st.builds(
        make_case,
        architecture=st.sampled_from(["dense", "convolutional"]),
        loss=st.sampled_from(sorted(LOSSES)),
        reduction=st.sampled_from(["mean", "sum"]),
        sizes=st.lists(st.integers(2, 5), min_size=2, max_size=3),
        seed=st.integers(0, 10**6),
    ),
    st.sampled_from(sorted(OPERATORS)),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from(["auto", "dual", "dense"]),
)
def test_steps_are_those_of_dense_algebra(case, kind, momentum, method):
    """Batches of other sizes, and momentum by the previous step."""
    model, lr, damping = copy.deepcopy(case.model), 0.1, 0.3
    optimizer = NaturalGradient(
        model, case.loss, lr=lr, damping=damping, kind=kind, momentum=momentum, seed=5, method=method
    )
    previous = torch.zeros(case.D, dtype=torch.float64)
    for k, batch in enumerate(case.data):
        options = {"seed": 5 + k} if kind == "mc" else {}
        F = torch.from_numpy(OPERATORS[kind](model, case.loss, data=[batch], **options).todense())
        before, value = flat(model), case.loss(model(batch[0]), batch[1])
        g = gradient_of(model, case.loss, batch)
        b = lr * g + momentum * damping * previous
        expected = torch.linalg.solve(F + damping * torch.eye(len(F), dtype=F.dtype), b)
        loss = optimizer.step(batch)
        previous = before - flat(model)
        torch.testing.assert_close(loss, value.detach())
        torch.testing.assert_close(previous, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_groups_have_their_own_rates():
    model, batch = regression()
    first, second = model[0].parameters(), model[2].parameters()
    groups = [{"params": list(second), "lr": 0.2}, {"params": list(first), "lr": 0.05}]
    optimizer = NaturalGradient(groups, nn.MSELoss(), model_func=model, damping=0.1)
    F = torch.from_numpy(fo.FisherLinearOperator(model, nn.MSELoss(), data=[batch]).todense())
    x = torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=F.dtype), gradient_of(model, nn.MSELoss(), batch))
    before = flat(model)
    optimizer.step(lambda: batch)
    rates = torch.cat([torch.full((24,), 0.05), torch.full((9,), 0.2)])
    torch.testing.assert_close(before - flat(model), rates * x, rtol=1e-6, atol=1e-9)


def test_adaptive_damping_is_that_of_levenberg_and_marquardt():
    model, batch = regression(N=40)
    optimizer = NaturalGradient(model, nn.MSELoss(), lr=1.0)
    losses, dampings, rejected = [], [], 0
    for _ in range(40):
        before, damping = flat(model), optimizer.param_groups[0]["damping"]
        losses.append(float(optimizer.step(batch)))
        dampings.append(damping)
        if torch.equal(before, flat(model)):
            rejected += 1
            assert optimizer.param_groups[0]["damping"] == 4 * damping
    assert all(b <= a for a, b in itertools.pairwise(losses))  # no step increases the loss
    assert losses[-1] < 1e-4 * losses[0]
    assert len(set(dampings)) > 3


def test_a_step_that_increases_the_loss_is_taken_back():
    model, batch = regression()
    optimizer = NaturalGradient(model, nn.MSELoss(), lr=50.0)
    before, damping = flat(model), optimizer.param_groups[0]["damping"]
    optimizer.step(batch)
    assert torch.equal(before, flat(model))
    assert optimizer.param_groups[0]["damping"] == 4 * damping


def test_a_step_that_is_taken_back_ends_the_momentum():
    """Otherwise a previous step that increases the loss would be repeated with every damping."""
    model, batch = regression()
    optimizer = NaturalGradient(model, nn.MSELoss(), momentum=0.9)
    losses = [float(optimizer.step(batch)) for _ in range(5)]
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p]["previous"] = torch.full_like(p, -10.0)
    losses += [float(optimizer.step(batch)) for _ in range(10)]
    assert losses[-1] < losses[4]
    assert optimizer.param_groups[0]["damping"] < 1e3


@pytest.mark.parametrize("trust", [1e-3, 1e6])
def test_steps_are_bounded_in_the_norm_of_the_fisher_matrix(trust):
    model, batch = regression()
    F = fo.FisherLinearOperator(model, nn.MSELoss(), data=[batch]).todense()
    before = flat(model)
    NaturalGradient(model, nn.MSELoss(), lr=1.0, damping=1e-3, trust=trust).step(batch)
    step = (before - flat(model)).numpy()
    length = np.sqrt(step @ F @ step)
    if trust < 1:
        assert length == pytest.approx(trust, rel=1e-6)
    else:
        assert length < trust


def test_schedules_of_rates_and_dampings():
    model, batch = regression()
    seen = []

    def damping(k):
        seen.append(k)
        return 0.1 / (1 + k)

    optimizer = NaturalGradient(model, nn.MSELoss(), lr=1.0, damping=damping)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        optimizer.step(batch)
        scheduler.step()
    assert seen == [0, 1, 2]
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.1 / 3)


@pytest.mark.parametrize("damping", [0.05, "auto"])
def test_a_run_resumes_from_its_state(damping):
    options = {"lr": 0.3, "damping": damping, "kind": "mc", "momentum": 0.5, "seed": 3}
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    batches = [(torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2) for _ in range(6)]
    twin = copy.deepcopy(model)
    optimizer = NaturalGradient(model, nn.CrossEntropyLoss(), **options)
    for batch in batches:
        optimizer.step(batch)
    first = NaturalGradient(twin, nn.CrossEntropyLoss(), **options)
    for batch in batches[:3]:
        first.step(batch)
    second = NaturalGradient(twin, nn.CrossEntropyLoss(), **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in batches[3:]:
        second.step(batch)
    torch.testing.assert_close(flat(twin), flat(model), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_make_the_same_steps(way):
    model, batch = regression()
    optimizer = NaturalGradient(model, nn.MSELoss(), lr=0.3, damping=0.1, momentum=0.5, trust=1.0)
    optimizer.step(batch)
    twin = way(optimizer)
    for own in (optimizer, twin):
        own.step(batch)
    steps = [[p.detach() for p in own.param_groups[0]["params"]] for own in (optimizer, twin)]
    for p, q in zip(*steps, strict=True):
        assert p is not q
        torch.testing.assert_close(p, q)


def test_groups_may_be_added_between_steps():
    model, batch = regression()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    optimizer = NaturalGradient(second, nn.MSELoss(), model_func=model, lr=0.1, damping=0.1)
    before = flat(model)
    optimizer.step(batch)
    assert torch.equal(before[:24], flat(model)[:24])
    optimizer.add_param_group({"params": first})
    F = torch.from_numpy(fo.FisherLinearOperator(model, nn.MSELoss(), data=[batch]).todense())
    x = torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=F.dtype), gradient_of(model, nn.MSELoss(), batch))
    before = flat(model)
    optimizer.step(batch)
    torch.testing.assert_close(before - flat(model), 0.1 * x, rtol=1e-6, atol=1e-9)


def test_what_is_learned_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = NaturalGradient(model, nn.CrossEntropyLoss(), lr=0.1, damping=0.1, kind="mc")
    counts, calls = Counts(), []
    with counted(counts), model.register_forward_hook(lambda *_: calls.append(1)):
        for k in range(8):
            optimizer.step((torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3))
            if k == 1:
                calls.clear()
    assert counts.builds == 8
    assert counts.known_builds >= 6
    assert len(calls) <= 2 * 6  # the rows with the loss, and the comparison with the model's own gradient


def test_layers_that_are_random_are_refused():
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    batch = torch.randn(8, 2, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError), match="Dropout"):
        NaturalGradient(model, nn.MSELoss(), lr=0.1).step(batch)
    optimizer = NaturalGradient(model.eval(), nn.MSELoss(), lr=0.1)
    optimizer.step(batch)
    model.train()
    before = flat(model)
    with pytest.raises((ValueError, RuntimeError), match="Dropout"):
        optimizer.step(batch)
    assert torch.equal(before, flat(model))


def test_an_interrupt_while_the_step_is_judged_takes_it_back():
    model, batch = regression()
    optimizer = NaturalGradient(model, nn.MSELoss())
    optimizer.step(batch)
    before, calls = flat(model), []

    def interrupt(*_):
        if not torch.equal(before, flat(model)):
            calls.append(1)
            raise KeyboardInterrupt

    with model.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        optimizer.step(batch)
    assert calls == [1]
    assert torch.equal(before, flat(model))


@pytest.mark.parametrize("fault", ["data", "interrupt"])
def test_a_step_that_fails_leaves_the_parameters(fault):
    model, (X, y) = regression()
    optimizer = NaturalGradient(model, nn.MSELoss(), lr=0.1, damping=0.1, momentum=0.5)
    optimizer.step((X, y))
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    if fault == "data":
        with pytest.raises(
            FloatingPointError, match="the loss and its gradient must be finite, and the loss .* is inf"
        ):
            optimizer.step((X, 1e200 * y))
        with pytest.raises(FloatingPointError, match="the model's output for batch 0 contains NaN"):
            optimizer.step((float("nan") * X, y))
    else:

        def interrupt(*_):
            raise KeyboardInterrupt

        with model.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
            optimizer.step((X, y))
    assert torch.equal(before, flat(model))
    assert str(optimizer.state_dict()) == str(state)
    optimizer.step((X, y))
    assert not torch.equal(before, flat(model))


def test_the_gradients_of_the_user_are_left_alone():
    model, batch = regression()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = NaturalGradient(model, nn.MSELoss(), lr=0.1)
    optimizer.step(batch)
    assert all((p.grad == 1).all() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_hooks_of_steps_are_called():
    model, batch = regression()
    optimizer = NaturalGradient(model, nn.MSELoss(), lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(batch)
    assert calls == ["before", "after"]


def test_distributions_and_several_heads():
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, X):
            h = self.body(X).tanh()
            return {"class": self.a(h), "value": self.b(h)}

    X = torch.randn(10, 3)
    y = {"class": torch.arange(10) % 2, "value": torch.randn(10, 1)}
    losses = {"class": nn.CrossEntropyLoss(), "value": nn.MSELoss()}
    optimizer = NaturalGradient(Heads(), losses, lr=0.5)
    values = [float(optimizer.step((X, y))) for _ in range(10)]
    assert values[-1] < 0.7 * values[0]

    layer = nn.Linear(3, 1)
    rates = torch.poisson(torch.full((10, 1), 3.0))
    optimizer = NaturalGradient(layer, None, model_func=lambda X: torch.distributions.Poisson(layer(X).exp()), lr=0.5)
    values = [float(optimizer.step((X, rates))) for _ in range(10)]
    assert values[-1] < values[0]


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_own_likelihoods(kind, reduction):
    """Rayleigh-distributed targets, whose scale is predicted by its logarithm."""

    class Rayleigh(fo.likelihoods.Likelihood):
        def sample(self, f, samples, draws):
            return f.exp() * (-2 * draws.uniform(f, samples).log()).sqrt()

        def log_prob(self, f, y):
            return (y.log() - 2 * f - (y / f.exp()) ** 2 / 2).sum(-1)

        def exact(self, f):
            return fo.likelihoods.DiagonalFactor(torch.full_like(f, 2))

    torch.manual_seed(0)
    model, X, y = nn.Linear(2, 1).double(), torch.randn(9, 2).double(), torch.rand(9, 1).double() + 0.5
    options = {"seed": 4} if kind == "mc" else {}
    op = OPERATORS[kind](model, Rayleigh(reduction), data=(X, y), **options)
    f = model(X).detach()
    value = -(y.log() - 2 * f - (y / f.exp()) ** 2 / 2).sum() / (9 if reduction == "mean" else 1)
    x = np.linalg.solve(op.todense() + 0.1 * np.eye(3), op.gradient())
    before = flat(model)
    loss = NaturalGradient(model, Rayleigh(reduction), kind=kind, lr=0.5, damping=0.1, **options).step((X, y))
    torch.testing.assert_close(loss, value)
    np.testing.assert_allclose((before - flat(model)).numpy(), 0.5 * x, rtol=1e-6, atol=1e-9)


def test_a_long_run_does_not_grow():
    model, batch = regression()
    optimizer = NaturalGradient(model, nn.MSELoss(), lr=0.1, damping=0.1, momentum=0.5)

    def count():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    for _ in range(5):
        optimizer.step(batch)
    before = count()
    for _ in range(50):
        optimizer.step(batch)
    assert count() <= before + 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "`lr` must be positive and finite, got 0.0."),
        ({"lr": "fast"}, TypeError, "`lr` must be a real number, got str."),
        ({"damping": -1.0}, ValueError, "`damping` must be positive and finite, got -1.0."),
        ({"damping": "much"}, ValueError, "`damping` must be a positive number, a function of the step or 'auto'"),
        ({"kind": "fisher"}, ValueError, "`kind` must be one of 'exact', 'mc', 'empirical', got 'fisher'."),
        ({"momentum": 1.0}, ValueError, "`momentum` must be at least 0 and below 1, got 1.0."),
        ({"trust": 0}, ValueError, "`trust` must be positive and finite, got 0."),
        ({"method": "cg"}, ValueError, "`method` must be 'auto', 'dual', 'dense' or 'primal', got 'cg'."),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    model, _ = regression()
    with pytest.raises(error, match=re.escape(message)):
        NaturalGradient(model, nn.MSELoss(), **options)


def test_what_is_no_batch_or_no_model():
    model, batch = regression()
    with pytest.raises(TypeError, match=re.escape("`closure` must be a batch (X, y) or a function that returns one")):
        NaturalGradient(model, nn.MSELoss()).step(batch[0])
    with pytest.raises(TypeError, match="`params_or_model` must be an nn.Module, or parameters with a `model_func`"):
        NaturalGradient(model.parameters(), nn.MSELoss())
    with pytest.raises(ValueError, match=re.escape("`damping(k)` must be positive and finite, got 0.0.")):
        NaturalGradient(model, nn.MSELoss(), damping=lambda _: 0.0).step(batch)
