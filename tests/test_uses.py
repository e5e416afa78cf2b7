"""Ways to use a parameter: spellings of dense layers, convolutions, look-ups, norms, recurrence, attention.

G v, Gᵀ w, the diagonal and the Gram matrix are those of plain loops over examples in float64, for rows that are cached
in any form. Whether a use is known, so that its rows are cheap, is another matter.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fisherops as fo
from fisherops.problem.calls import Recorder
from fisherops.problem.problem import Problem
from fisherops.scores.backward import Reverse

N, T, I, O = 3, 4, 5, 6  # noqa: E741 (examples, positions, inputs, outputs)


def weight(*shape):
    return torch.randn(shape, dtype=torch.float64) / 2


def sequence(*shape):
    return torch.randn(N, *shape, dtype=torch.float64)


def tokens():
    return torch.randint(7, (N, T))


def of_module(make, X=lambda: sequence(T, I), after=lambda y: y.tanh().sum(1)):
    """A case that calls a module."""

    def case():
        module = make().double()
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return parameters, X(), lambda p, x: after(torch.func.functional_call(module, p, (x,)))

    return case


def of_function(shapes, function, X=lambda: sequence(T, I)):
    """A case that calls torch's functions on parameters of these shapes."""
    return lambda: ({name: weight(*shape) for name, shape in shapes.items()}, X(), function)


def dense(call, shape=(O, I)):
    """A dense layer before a nonlinearity and a head."""
    shapes = {"W": shape, "b": (O,), "H": (2, O)}
    return of_function(shapes, lambda p, x: functional.linear(torch.tanh(call(p, x)), p["H"]).sum(1))


DENSE = {
    "linear": dense(lambda p, x: functional.linear(x, p["W"], p["b"])),
    "x @ W.T": dense(lambda p, x: x @ p["W"].T + p["b"]),
    "x.matmul(W.t())": dense(lambda p, x: x.matmul(p["W"].t()).add(p["b"])),
    "W @ x.mT": dense(lambda p, x: (p["W"] @ x.mT).mT + p["b"]),
    "x @ W": dense(lambda p, x: x @ p["W"] + p["b"], (I, O)),
    "addmm": dense(lambda p, x: torch.addmm(p["b"], x.reshape(-1, I), p["W"]).view(-1, T, O), (I, O)),
    "mm": dense(lambda p, x: torch.mm(x.reshape(-1, I), p["W"].transpose(0, 1)).view(-1, T, O)),
    "tensordot": dense(lambda p, x: torch.tensordot(x, p["W"], dims=([2], [1])) + p["b"]),
    "einsum": dense(lambda p, x: torch.einsum("...i,oi->...o", x, p["W"]) + p["b"]),
    "inner": dense(lambda p, x: torch.inner(x, p["W"]) + p["b"]),
    "bmm": dense(lambda p, x: torch.bmm(x, p["W"].expand(len(x), I, O)) + p["b"], (I, O)),
    "baddbmm": dense(lambda p, x: torch.baddbmm(p["b"], x, p["W"].unsqueeze(0).expand(len(x), -1, -1)), (I, O)),
    "multiply and sum": dense(lambda p, x: (x[..., None, :] * p["W"]).sum(-1) + p["b"]),
    "mv of rows": dense(lambda p, x: torch.stack([p["W"].mv(r) for r in x.reshape(-1, I)]).view(-1, T, O) + p["b"]),
    "in place": dense(lambda p, x: functional.linear(x, p["W"]).add_(p["b"]).relu_()),
    "slice": dense(lambda p, x: x[..., :3] @ p["W"][:, :3].T + p["b"]),
    "vmap": dense(lambda p, x: torch.vmap(lambda r: functional.linear(r, p["W"], p["b"]))(x)),
    "1 + W": dense(lambda p, x: functional.linear(x, 1 + p["W"], p["b"])),
    "masked W": dense(lambda p, x: functional.linear(x, p["W"] * torch.ones(O, I).double().tril(), p["b"])),
}


def routed(p, x):
    """Each position goes to one of three experts."""
    flat = x.reshape(-1, I)
    gates = functional.linear(flat, p["gate"]).softmax(-1)
    choice = gates.argmax(-1)
    out = torch.zeros(len(flat), O, dtype=x.dtype)
    for e in range(3):
        at = (choice == e).nonzero()[:, 0]
        out = out.index_add(0, at, torch.tanh(flat[at] @ p["W"][e]) * gates[at, e, None])
    return out.view(-1, T, O).sum(1)


def ragged(p, x):
    """Rows of examples in no order, as packed sequences and graphs have them; each example has its own number."""
    numbers = torch.tensor([n for n in (0, 2, 2, 1, 0, 2, 1) if n < len(x)])
    rows = functional.linear(x[numbers, torch.arange(len(numbers)) % T], p["W"], p["b"]).tanh()
    return torch.zeros(len(x), O, dtype=x.dtype).index_add(0, numbers, rows * (1 + x[numbers, 0, :1]))


def qkv(p, x):
    return functional.scaled_dot_product_attention(*(functional.linear(x, w) for w in p["W"].chunk(3))).sum(1)


def heads(p, x):
    h = torch.einsum("bsd,hdk->bshk", x, p["W"]) + p["b"]
    return functional.linear(torch.tanh(torch.einsum("bshk,hkd->bsd", h, p["O"])), p["H"]).sum(1)


def recurrent(p, x):
    h = torch.zeros(len(x), O, dtype=x.dtype)
    for t in range(T):
        h = torch.tanh(x[:, t] @ p["W"] + h @ p["U"] + p["b"])
    return h


def tied(p, x):
    h = torch.tanh(functional.embedding(x, p["E"], padding_idx=2) + p["pos"][:T])
    return functional.linear(h, p["E"]).sum(1)


def tied_square(p, x):
    """One weight as W and as its transpose."""
    return (torch.tanh(x @ p["W"]) @ p["W"].T).sum(1)


def class_token(p, x):
    rows = torch.cat([p["c"].expand(len(x), -1, -1), p["r"].repeat(len(x), 1, 1), x], 1) + p["pos"]
    return functional.linear(rows.tanh(), p["W"]).tanh().sum(1)


def elementwise(p, x):
    return torch.where(x > 0, 3 - p["m"], (p["s"] * x - p["g"]) / (2 + p["d"])).exp().sum(1)


def merged(p, x):
    return functional.linear(x, p["W"] + 2 * p["B"] @ p["A"]).tanh().sum(1)


def adapter(p, x):
    return (functional.linear(x, p["W"]) + 2 * functional.linear(functional.linear(x, p["A"]), p["B"])).tanh().sum(1)


CALLS = {
    "heads by einsum": of_function({"W": (2, I, 3), "b": (2, 3), "O": (2, 3, O), "H": (2, O)}, heads),
    "experts, all": of_function(
        {"W": (3, I, O), "gate": (3, I)},
        lambda p, x: torch.einsum(
            "nte,nteo->no", functional.linear(x, p["gate"]).softmax(-1), torch.einsum("nti,eio->nteo", x, p["W"])
        ),
    ),
    "experts, routed": of_function({"W": (3, I, O), "gate": (3, I)}, routed),
    "experts, by numbers": of_function(
        {"W": (3, I, O), "e": (3,)},
        lambda p, x: torch.stack([(x @ p["W"][e]).tanh() * p["e"][e] for e in x[0, :2, 0].argsort()]).sum((0, 2)),
    ),
    "torch.cond": of_function(
        {"W": (O, I), "V": (O, I)},
        lambda p, x: torch.cond(
            torch.ones(()) > 0, lambda y, w: functional.linear(y, w).tanh(), lambda y, w: functional.linear(y, 2 * w),
            (x, p["W"])).sum(1) + functional.linear(x, p["V"]).sin().sum(1),
    ),
    "grouped bmm": of_function(
        {"W": (2, 3, O)},
        lambda p, x: torch.bmm(x.reshape(-1, 2, 3).transpose(0, 1), p["W"]).transpose(0, 1).reshape(len(x), T, -1)
        .tanh().sum(1),
        lambda: sequence(T, 6),
    ),
    "fused qkv": of_function({"W": (12, I)}, qkv),
    "concatenated": of_function(
        {"Q": (3, I), "K": (2, I)}, lambda p, x: functional.linear(x, torch.cat([p["Q"], p["K"]])).tanh().sum(1)
    ),
    "LoRA": of_function({"W": (O, I), "A": (2, I), "B": (O, 2)}, adapter),
    "LoRA, merged": of_function({"W": (O, I), "A": (2, I), "B": (O, 2)}, merged),
    "tied embedding": of_function({"E": (7, I), "pos": (9, I)}, tied, tokens),
    "tied square": of_function({"W": (I, I)}, tied_square),
    "look-up by index": of_function(
        {"E": (7, I), "pos": (9, I)},
        lambda p, x: torch.tanh(p["E"][x] + functional.embedding(torch.arange(T), p["pos"])).sum(1), tokens,
    ),
    "class token": of_function({"c": (1, 1, I), "r": (1, 1, I), "pos": (1, T + 2, I), "W": (O, I)}, class_token),
    "bilinear": of_function(
        {"W": (O, I, I), "b": (O,)}, lambda p, x: functional.bilinear(x, x.sin(), p["W"], p["b"]).tanh().sum(1)
    ),
    "elementwise": of_function({"g": (I,), "s": (), "d": (I,), "m": (I,)}, elementwise),
    "recurrence by hand": of_function({"W": (I, O), "U": (O, O), "b": (O,)}, recurrent),
    "learned queries": of_function(
        {"q": (1, 2, I), "W": (I, I)},
        lambda p, x: functional.scaled_dot_product_attention(
            p["q"].expand(len(x), -1, -1), functional.linear(x, p["W"]), x).sum(1),
    ),
    "no rule": of_function(
        {"w": (I,), "e": (I,)}, lambda p, x: (torch.atan2(x, p["w"]) + torch.pow(x.abs(), p["e"])).sum(1)
    ),
    "checkpoint": of_function(
        {"W": (O, I), "b": (O,)},
        lambda p, x: checkpoint(
            lambda r: functional.linear(r, p["W"], p["b"]).tanh().sum(1), x, use_reentrant=False),
    ),
    "ragged": of_function({"W": (O, I), "b": (O,)}, ragged),
}  # fmt: skip


def images(d, size, layer, **options):
    return of_module(
        lambda: layer(4, 4, 3, **options), lambda: sequence(4, *[size] * d),
        lambda y: y.tanh().flatten(1)[:, :4] + y.square().flatten(1).sum(1, keepdim=True),
    )  # fmt: skip


class CellSteps(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(I, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = c = torch.zeros(len(x), 4, dtype=x.dtype)
        for t in range(T):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=5, vdim=6, batch_first=True)

    def forward(self, x):
        return self.attention(x, x[..., :5], x[..., 2:])[0].sum(1)


class PositionsFirst(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1))[0].tanh().sum(0)


def states(y):
    return y[0].tanh().sum(1)


def trained_norm():
    norm = nn.BatchNorm2d(4)
    norm(torch.randn(9, 4, 3, 3))
    return norm.eval()


MODULES = {
    "weight_norm": of_module(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(I, O))),
    "spectral_norm": of_module(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(I, O)).eval()),
    "conv1d, stride": images(1, 6, nn.Conv1d, stride=2, padding=1),
    "conv1d, groups": images(1, 6, nn.Conv1d, groups=2, dilation=2),
    "conv2d, groups": images(2, 6, nn.Conv2d, stride=2, padding=1, groups=2),
    "conv2d, same": images(2, 6, nn.Conv2d, padding="same", dilation=2),
    "conv2d, depthwise": images(2, 6, nn.Conv2d, groups=4),
    "conv3d": images(3, 5, nn.Conv3d, padding=1, stride=2),
    "transposed conv1d": images(1, 4, nn.ConvTranspose1d, stride=2),
    "transposed conv2d": images(2, 4, nn.ConvTranspose2d, stride=2, padding=1, output_padding=1),
    "transposed conv2d, groups": images(2, 4, nn.ConvTranspose2d, groups=2, dilation=2),
    "transposed conv3d": images(3, 3, nn.ConvTranspose3d, stride=2, padding=1),
    "EmbeddingBag": of_module(lambda: nn.EmbeddingBag(7, O, mode="mean"), tokens, torch.tanh),
    "LayerNorm": of_module(lambda: nn.LayerNorm([T, I])),
    "RMSNorm": of_module(lambda: nn.RMSNorm(I)),
    "GroupNorm": of_module(lambda: nn.GroupNorm(2, 4), lambda: sequence(4, 5), lambda y: y.tanh().sum(2)),
    "BatchNorm": of_module(trained_norm, lambda: sequence(4, 5, 5), lambda y: y.tanh().sum((2, 3))),
    "PReLU": of_module(lambda: nn.PReLU(4), lambda: sequence(4, 5), lambda y: y.tanh().sum(2)),
    "PReLU, one": of_module(lambda: nn.PReLU(), lambda: sequence(4, 5), lambda y: y.tanh().sum(2)),
    "LSTMCell": of_module(CellSteps, after=lambda y: y),
    **{
        f"{layer.__name__}, deep": of_module(
            lambda layer=layer: layer(I, 4, batch_first=True, bidirectional=True, num_layers=2), after=states
        )
        for layer in (nn.LSTM, nn.GRU, nn.RNN)
    },
    **{
        f"{layer.__name__}, positions first": of_module(
            lambda layer=layer: PositionsFirst(layer(I, 4)), after=lambda y: y
        )
        for layer in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "encoder layer, training": of_module(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), lambda: sequence(T, 8), lambda y: y.sum(1)
    ),
    "encoder layer": of_module(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval(),
        lambda: sequence(T, 8), lambda y: y.sum(1),
    ),
    "cross-attention": of_module(Cross, lambda: sequence(T, 8), lambda y: y),
}  # fmt: skip

CASES = DENSE | CALLS | MODULES
# Uses whose rows need a loop over examples today, where neither vmap nor, for EmbeddingBag, J v is possible.


def rows_by_loops(model, parameters, X, y):
    """Gradients of the loss of one example after the other, (N, D)."""
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    rows = []
    for n in range(N):
        f = model(leaves, X)[n]
        gradients = torch.autograd.grad(((f - y[n]) ** 2).sum(), list(leaves.values()), allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel()) if g is None else g.flatten()
                    for g, p in zip(gradients, leaves.values(), strict=True)
                ]
            )
        )
    return torch.stack(rows).numpy()


def cases():
    for name in CASES:
        for cache in ("auto", "factors", "scores"):
            yield pytest.param(name, cache, id=f"{name}-{cache}")


@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize(("name", "cache"), list(cases()))
def test_uses(name, cache):
    torch.manual_seed(0)
    parameters, X, model = CASES[name]()
    y = torch.randn(model(parameters, X).shape, dtype=torch.float64)
    rows = rows_by_loops(model, parameters, X, y)
    D = rows.shape[1]
    op = fo.EmpiricalFisherLinearOperator(
        model, nn.MSELoss(reduction="sum"), parameters, data=(X, y), rows="datum", cache=cache
    )
    G = op.scores
    V, W = np.random.default_rng(0).standard_normal((D, 2)), np.random.default_rng(1).standard_normal((N, 2))

    def close(actual, expected):
        assert np.linalg.norm(actual - expected) <= 1e-12 * np.linalg.norm(expected)

    close(G @ V, rows @ V)
    close(G.T @ W, rows.T @ W)
    close(G.gram(), rows @ rows.T)
    close(op.diagonal(), (rows**2).sum(0))
    close(op @ V, rows.T @ (rows @ V))


@pytest.mark.filterwarnings("ignore::fisherops.PlanWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize("name", list(CASES))
def test_calls_that_see_data_only_need_no_note(name, monkeypatch):
    """The same uses are found where each call is looked at in full."""
    torch.manual_seed(0)
    parameters, X, model = CASES[name]()

    def uses():
        e = Problem(model, nn.MSELoss(), parameters).evaluate(X)
        return [(use.call.name, names, use.letters) for use, names in e.uses], e.missed

    found = uses()
    monkeypatch.setattr(Recorder, "sees_data_only", lambda *_: False)
    assert uses() == found


@pytest.mark.parametrize("shape", [(5, 5), (5, 10), (10, 5)])
@pytest.mark.parametrize("vectors", [1, 3])
def test_positions_are_measured_by_the_pass_that_rows_are_compared_with(shape, vectors, monkeypatch):
    """Where the shape leaves a choice, the axis of the data is that which a pass of its own finds."""
    torch.manual_seed(0)
    N = 5

    class Swapped(nn.Module):
        """Positions first, or last within the axis of the data."""

        def __init__(self):
            super().__init__()
            self.a, self.gain, self.b = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, vectors)

        def forward(self, X):
            h = X.transpose(0, 1).reshape(*shape, 3)
            h = torch.tanh(self.a(h) * self.gain).reshape(-1, N, 4).transpose(0, 1)
            return self.b((h * torch.arange(1.0, h.shape[1] + 1, dtype=h.dtype)[:, None]).sum(1))

    model, X = Swapped().double(), torch.randn(N, shape[0] * shape[1] // N, 3).double()
    data = (X, torch.zeros(N, vectors).double())
    op = fo.FisherLinearOperator(model, nn.MSELoss(), data=data, cache="factors")
    F = op.todense()
    assert op.plan.holds_rows
    assert "differentiated" not in str(op.plan)
    monkeypatch.setattr(Reverse, "_axis", lambda *_: None)
    np.testing.assert_allclose(F, fo.FisherLinearOperator(model, nn.MSELoss(), data=data).todense(), atol=1e-12)
    np.testing.assert_allclose(
        F, fo.FisherLinearOperator(model, nn.MSELoss(), data=data, cache="none") @ np.eye(len(F)), atol=1e-12
    )
