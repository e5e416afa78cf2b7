"""The simulated accelerator refuses, counts and delays what a GPU does."""

import numpy as np
import pytest
import simulated
import torch
from torch import nn
from torch.func import jacrev, jvp, vmap

simulated.register()
DEVICE = torch.device("sim", 0)


@pytest.fixture
def x():
    return torch.randn(3, 4).to(DEVICE)


def test_tensors_are_plain_and_share_memory_with_their_views(x):
    assert type(x) is torch.Tensor
    assert x.device == DEVICE
    view = x.T[1:]
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    before = x._version
    view.zero_()
    assert x._version > before
    assert x.cpu()[:, 1:].abs().max() == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y.T,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: x.add_(y),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: nn.functional.linear(x, y),
        lambda x, y: torch.add(x, x, out=y),
    ],
    ids=["sum", "product", "cat", "in place", "where", "linear", "out"],
)
def test_tensors_of_two_devices_do_not_mix(function, x):
    for other in (x.cpu(), x.to("sim:1")):
        with pytest.raises(RuntimeError, match=f"same device, but found .*{other.device}"):
            function(x, other)


def test_numbers_of_the_host_mix(x):
    with simulated.watched() as log:
        y = torch.tensor(2.0) * x + 1
    assert torch.equal(y.cpu(), 2 * x.cpu() + 1)
    assert not log.waits
    assert [name for name, *_ in log.operations] == ["aten::mul", "aten::add"]


def test_no_tensor_becomes_an_array_by_itself(x):
    with pytest.raises(TypeError, match="can't convert sim:0 device type tensor to numpy"):
        np.asarray(x)
    with pytest.raises((BufferError, RuntimeError, ValueError), match="device"):
        np.from_dlpack(x)


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.__setitem__((x > 0).nonzero(as_tuple=True), 1.0),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.abs().long().view(-1).bincount(),
    "repeat": lambda x: x.repeat_interleave(x[:, 0].abs().long(), 0),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(3, device=x.device)),
    "eigh": lambda x: torch.linalg.eigh(x @ x.T),
    "from a list": lambda x: torch.tensor([1.0], device=x.device),
    "to the device": lambda x: torch.ones(3).to(x.device),
    "synchronize": lambda x: torch.get_device_module(x.device).synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted_with_their_lines(name, x):
    with simulated.watched() as log:
        WAITS[name](x)
    assert log.waits
    assert all(line.startswith("test_simulated.py:") for _, line in log.waits)


FREE = {
    "elementwise": lambda x: x.exp().mul_(2).add(x, alpha=3),
    "products": lambda x: torch.einsum("ij,kj->ik", x, x) @ x,
    "sums": lambda x: x.sum(0).cumsum(0).norm(),
    "shapes": lambda x: torch.cat([x.view(-1)[2:], x.T.reshape(-1)]).unflatten(0, (2, -1)).contiguous(),
    "repeat": lambda x: x.repeat_interleave(2, 0),
    "indices": lambda x: x.index_add_(0, torch.arange(3, device=x.device), x.clone())[:, torch.arange(2, device=x.device)],
    "fill": lambda x: torch.zeros(3, device=x.device).fill_(2.0).clamp_(max=1),
    "where": lambda x: torch.where(x > 0, x, 0.0).isfinite().all(),
    "cholesky": lambda x: torch.linalg.cholesky_ex(x @ x.T),
    "without waiting": lambda x: torch.empty(3, 4).copy_(x, non_blocking=True),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_nothing_else_waits(name, x):
    with simulated.watched() as log:
        FREE[name](x)
    assert not log.waits
    assert log.operations


def test_copies_are_counted_with_their_bytes(x):
    with simulated.watched() as log:
        torch.zeros(5, dtype=torch.float64).to(DEVICE)
        x[0].cpu()
        x.clone().copy_(x)
        x[torch.tensor([0, 2])]
        x[torch.tensor([0, 2])] = x[:2].clone()
    assert [copy[:2] for copy in log.copies] == [
        ("to device", 40),
        ("to host", 16),
        ("to device", 16),
        ("to device", 16),
    ]
    assert len(log.waits) == 4


def test_copies_without_waiting_are_poison_until_their_event_has_passed(x):
    arrived = torch.get_device_module(DEVICE).Event()
    with simulated.lag(10):
        host = torch.zeros(3, 4).copy_(x, non_blocking=True)
        flag = torch.zeros((), dtype=torch.bool).copy_((x > 9).any(), non_blocking=True)
        arrived.record()
        assert host.isnan().all()
        assert bool(flag)  # which is wrong
        assert not arrived.query()
        before = x.clone()
        x.zero_()  # what was copied was what was there
        for _ in range(10):
            before = before + 0
        assert arrived.query()
        assert torch.equal(host, before.cpu())
        assert not bool(flag)


def test_waiting_for_an_event_brings_what_was_copied(x):
    arrived = torch.get_device_module(DEVICE).Event()
    with simulated.lag(10**9), simulated.watched() as log:
        host = torch.zeros(3, 4).copy_(x, non_blocking=True)
        arrived.record()
        assert host.isnan().all()
        arrived.synchronize()
        arrived.synchronize()
    assert not host.isnan().any()
    assert [name for name, _ in log.waits] == ["event"]  # the second time there was nothing to wait for


def test_generators_belong_to_the_device():
    def draw(**options):
        return torch.randn(3, **options)

    own = torch.Generator(device=DEVICE).manual_seed(3)
    assert own.device == DEVICE
    assert isinstance(own, torch.Generator)
    numbers = draw(generator=own, device=DEVICE).cpu()
    assert not torch.equal(numbers, draw(generator=torch.Generator().manual_seed(3)))
    assert torch.equal(numbers, draw(generator=own.manual_seed(3), device=DEVICE).cpu())
    with pytest.raises(RuntimeError, match="generator"):
        draw(generator=torch.Generator(), device=DEVICE)
    state = torch.get_rng_state()
    draw(device=DEVICE)
    assert torch.equal(torch.get_rng_state(), state)


def test_there_is_no_pinned_memory():
    with pytest.raises(RuntimeError, match="[pP]inned"):
        torch.zeros(3, pin_memory=True)


def test_derivatives_and_transforms(x):
    w = torch.randn(4, 2)
    for device in ("cpu", DEVICE):
        own = w.to(device).detach().requires_grad_()
        (x.to(device) @ own).tanh().sum().backward()
        assert own.grad.device == torch.device(device)
        if device == "cpu":
            expected = own.grad
    torch.testing.assert_close(own.grad.cpu(), expected)
    host = x.cpu()
    torch.testing.assert_close(vmap(lambda a: a.sin().sum())(x).cpu(), host.sin().sum(1))
    torch.testing.assert_close(jvp(torch.exp, (x,), (x,))[1].cpu(), host.exp() * host)
    torch.testing.assert_close(jacrev(torch.sin)(x[0]).cpu(), host[0].cos().diag())


MODELS = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.Flatten()), (5, 1, 5, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(2, 3, 3), (5, 2, 4)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), (2, 3, 4)),
    "lstm": (lambda: nn.LSTM(2, 3, batch_first=True, num_layers=2, bidirectional=True), (2, 3, 2)),
    "lstm without biases": (lambda: nn.LSTM(2, 3, bias=False), (2, 3, 2)),
    "gru": (lambda: nn.GRU(2, 3, batch_first=True), (2, 3, 2)),
    "rnn": (lambda: nn.RNN(2, 3), (2, 3, 2)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers(name):
    make, shape = MODELS[name]
    model, X = make().double(), torch.randn(shape, dtype=torch.float64)

    def evaluate(X):
        model.zero_grad()
        f = model(X)
        f = f[0] if isinstance(f, tuple) else f
        (f.sin() * f).sum().backward()
        return [f.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]

    expected = evaluate(X)
    simulated.moved(model, DEVICE)
    for own, theirs in zip(evaluate(X.to(DEVICE)), expected, strict=True):
        torch.testing.assert_close(own, theirs)


def test_models_move_with_their_ties():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    simulated.moved(model, DEVICE)
    assert model[1].weight is model[0].weight
    assert {p.device for p in model.parameters()} == {DEVICE}


def test_autocast(x):
    with torch.autocast("sim", torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32
    assert (x @ x.T).dtype == torch.float32
