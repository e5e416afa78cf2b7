"""Every model that `loss.backward()` can train has a Fisher, whatever its operations and the form that is cached.

The truth is one plain backward pass of the whole batch for each loss term. First-order reverse mode is all it needs.
"""

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fisherops as fo

CACHES = ("auto", "scores", "linearization", "none")


def rows_by_backward(model, loss, X, y):
    """Scores of single terms (terms, D) by `.backward()` on the user's own parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for t in range(y.numel()):
        for p in params:
            p.grad = None
        type(loss)(reduction="none")(model(X), y).flatten()[t].backward()
        rows.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).flatten() for p in params])
        )
    for p in params:
        p.grad = None
    return torch.stack(rows).double().numpy()


class Body(nn.Module):
    """Modules and parameters by name, and a function of them and the inputs."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, X):
        return self.function(self, X)


def vector(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64) / 2)


class Once(torch.autograd.Function):
    """A linear map whose backward pass cannot be differentiated, and that vmap cannot take."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def packed(layer):
    def forward(net, X):
        lengths = torch.tensor([4, 3, 1])[: len(X)]
        states = net.layer(nn.utils.rnn.pack_padded_sequence(X, lengths, batch_first=True))[0]
        return net.head(nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0].sum(1))

    return Body(forward, layer=layer(5, 3, batch_first=True), head=nn.Linear(3, 3))


def attention(save):
    def attend(net, X):
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in net.qkv(X).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(net, X):
        h = checkpoint(attend, net, X, use_reentrant=False) if save else attend(net, X)
        return net.head(h.sum(1))

    return Body(forward, qkv=nn.Linear(5, 12), head=nn.Linear(4, 3))


def gain(shape, norm=True):
    def forward(net, X):
        X = X * torch.rsqrt(X.square().mean(-1, keepdim=True)) if norm else torch.tanh(net.stem(X))
        g = (torch.tensor(0.5, dtype=X.dtype) * net.gain).squeeze(1).exp() if net.gain.ndim == 2 else 1 + net.gain
        return net.head(X * g)

    return Body(forward, stem=nn.Linear(6, 6), gain=vector(*shape), head=nn.Linear(6, 3))


def sparse(layout):
    A = (torch.eye(3) + torch.eye(3).roll(1, 0)).to_sparse() / 2
    A = A.to_sparse_csr() if layout == "csr" else A

    def forward(net, X):
        return torch.sparse.mm(net.A, net.two(torch.tanh(torch.sparse.mm(net.A, net.one(X)))))

    net = Body(forward, one=nn.Linear(5, 4), two=nn.Linear(4, 3))
    net.register_buffer("A", A)
    return net


def physics(second):
    """A derivative of a network by its input, as physics-informed networks and force fields have."""

    def forward(net, X):
        X = X.detach().requires_grad_()
        (g,) = torch.autograd.grad(net.body(X).sum(), X, create_graph=True)
        if second:
            (g,) = torch.autograd.grad(g[:, 0].sum(), X, create_graph=True)
        return g[:, :3]

    return Body(forward, body=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))


def func_inside(net, X):
    return torch.func.jvp(net.body, (X,), (torch.ones_like(X),))[1]


def func_grad_inside(net, X):
    return torch.vmap(torch.func.grad(lambda x: net.body(x).square().sum()))(X)[:, :3]


def complex_product(net, X):
    z = torch.view_as_complex(X[:, :4].reshape(-1, 2, 2).contiguous()) * torch.view_as_complex(net.turn)
    return net.head(torch.view_as_real(z).flatten(1))


def polar(net, X):
    z = torch.polar(torch.ones_like(net.angle), net.angle) * torch.view_as_complex(
        X[:, :4].reshape(-1, 2, 2).contiguous()
    )
    return net.head(torch.view_as_real(z).flatten(1))


def renamed(net, X):
    # A hook on a node, and a function whose saved tensors were packed, as offloading does.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        return net.head(torch.tanh(net.body(X)))


def layer(**more):
    return {"body": nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), **more}


SEQUENCE, VECTOR, TOKENS = (3, 4, 5), (3, 5), "tokens"
MODELS = {
    **{f"EmbeddingBag {mode}": (lambda mode=mode: nn.Sequential(nn.EmbeddingBag(7, 4, mode=mode), nn.Linear(4, 3)), TOKENS)
       for mode in ("sum", "mean", "max")},
    "EmbeddingBag padding": (lambda: nn.Sequential(nn.EmbeddingBag(7, 4, padding_idx=2), nn.Linear(4, 3)), TOKENS),
    "EmbeddingBag sparse": (lambda: nn.Sequential(nn.EmbeddingBag(7, 4, sparse=True), nn.Linear(4, 3)), TOKENS),
    "EmbeddingBag weighted": (lambda: Body(
        lambda net, X: net.head(functional.embedding_bag(X, net.table, mode="sum", per_sample_weights=net.own[X])),
        table=vector(7, 4), own=vector(7), head=nn.Linear(4, 3)), TOKENS),
    "once differentiable": (lambda: Body(
        lambda net, X: net.head(torch.tanh(Once.apply(X, net.w))), w=vector(4, 5), head=nn.Linear(4, 3)), VECTOR),
    "packed LSTM": (lambda: packed(nn.LSTM), SEQUENCE),
    "packed GRU": (lambda: packed(nn.GRU), SEQUENCE),
    "packed RNN": (lambda: packed(nn.RNN), SEQUENCE),
    "PReLU": (lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3)), VECTOR),
    "PReLU alone": (lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 3)), VECTOR),
    "Bilinear": (lambda: Body(lambda net, X: net.two(X, X.sin()), two=nn.Bilinear(5, 5, 3)), VECTOR),
    "weight_norm": (lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)), VECTOR),
    "orthogonal": (lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 3)), VECTOR),
    "1 + gain, 3 examples": (lambda: gain((6,)), (3, 6)),
    "1 + gain, 5 examples": (lambda: gain((6,)), (5, 6)),
    "1 + gain, 1 example": (lambda: gain((6,)), (1, 6)),
    "1 + gain, positions": (lambda: Body(
        lambda net, X: net.head(X * (1 + net.gain)).sum(1), gain=vector(5), head=nn.Linear(5, 3)), (5, 4, 5)),
    "tanh(a(X)) * (1 + scale), 2 examples": (lambda: gain((6,), norm=False), (2, 6)),
    "column times a constant": (lambda: gain((6, 1)), (3, 6)),
    "sum of two biases": (lambda: Body(
        lambda net, X: net.head(torch.tanh(X + (net.one + net.two))), one=vector(5), two=vector(5),
        head=nn.Linear(5, 3)), (5, 5)),
    "sparse COO": (lambda: sparse("coo"), VECTOR),
    "sparse CSR": (lambda: sparse("csr"), VECTOR),
    "sparse X": (lambda: Body(
        lambda net, X: torch.tanh(torch.sparse.mm(X, net.w)) @ net.u, w=vector(5, 4), u=vector(4, 3)), "sparse"),
    "torch.func.jvp": (lambda: Body(func_inside, **layer()), VECTOR),
    "torch.func.jvp, 40 outputs": (lambda: Body(
        func_inside, body=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 40))), VECTOR),
    "vmap of torch.func.grad": (lambda: Body(func_grad_inside, **layer()), VECTOR),
    "view_as_complex": (lambda: Body(complex_product, turn=vector(2, 2), head=nn.Linear(4, 3)), VECTOR),
    "polar": (lambda: Body(polar, angle=vector(2), head=nn.Linear(4, 3)), VECTOR),
    "checkpointed attention": (lambda: attention(True), SEQUENCE),
    "attention": (lambda: attention(False), SEQUENCE),
    "autograd.grad": (lambda: physics(False), VECTOR),
    "second derivative": (lambda: physics(True), VECTOR),
    "saved tensors packed": (lambda: Body(renamed, body=nn.Linear(5, 4), head=nn.Linear(4, 3)), VECTOR),
}  # fmt: skip


def draw(shape):
    generator = torch.Generator().manual_seed(1)
    if shape == TOKENS:
        return torch.randint(7, (3, 4), generator=generator)
    if shape == "sparse":
        X = torch.randn(3, 5, generator=generator).double()
        return X.relu().to_sparse()
    return torch.randn(*shape, generator=generator).double()


# Torch has neither a forward-mode rule nor a double-backward one for them, so no linearization either.
FIRST_ORDER = {"once differentiable", *(name for name in MODELS if name.startswith("EmbeddingBag"))}


def cases():
    for name in MODELS:
        for cache in CACHES:
            if name in FIRST_ORDER and cache == "linearization":
                continue
            yield pytest.param(name, cache, id=f"{name}-{cache}")


@pytest.mark.filterwarnings(
    "ignore::fisherops.scores.PlanWarning", "ignore:There is a performance drop", "ignore:Sparse CSR"
)
@pytest.mark.parametrize(("name", "cache"), list(cases()))
def test_models(name, cache):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, X = make().double(), draw(shape)
    y = torch.arange(len(X)) % model(X).shape[1]
    loss = nn.CrossEntropyLoss(reduction="sum")
    G = rows_by_backward(model, loss, X, y)
    op = fo.EmpiricalFisherLinearOperator(model, loss, data=[(X, y)], cache=cache)
    close = {"rtol": 1e-9, "atol": 1e-10 * np.abs(G).max() ** 2}
    np.testing.assert_allclose(op @ np.eye(len(G.T)), G.T @ G, **close)
    np.testing.assert_allclose(op.diagonal(), (G**2).sum(0), **close)
    np.testing.assert_allclose(op.todense(), G.T @ G, **close)
    np.testing.assert_allclose(op.scores @ np.eye(len(G.T)), G, **close)
    np.testing.assert_allclose(op.scores.gram(), G @ G.T, **close)


class Net(nn.Module):
    """A layer between a frozen stem and a head, computed again in the backward pass by checkpointing."""

    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.a, self.head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 4), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, X):
        h = self.stem(X).requires_grad_()  # as enable_input_require_grads of PEFT does
        return self.head(checkpoint(lambda h: torch.tanh(self.a(h)), h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("cache", CACHES)
def test_checkpointing_that_is_not_reentrant(cache):
    model, X, y = Net(False).double(), torch.randn(6, 3).double(), torch.arange(6) % 3
    loss = nn.CrossEntropyLoss(reduction="sum")
    G = rows_by_backward(model, loss, X, y)
    op = fo.EmpiricalFisherLinearOperator(model, loss, data=(X, y), cache=cache)
    np.testing.assert_allclose(op.todense(), G.T @ G, atol=1e-12)
    np.testing.assert_allclose(op @ np.eye(len(G.T)), G.T @ G, atol=1e-12)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "operator", [fo.FisherMCLinearOperator, fo.FisherLinearOperator, fo.EmpiricalFisherLinearOperator]
)
def test_reentrant_checkpointing_is_refused(operator, cache):
    """It hides its parameters from the graph: plain `.backward()` reaches them, `torch.autograd.grad` does not."""
    model, X, y = Net(True).double(), torch.randn(6, 3).double(), torch.arange(6) % 3
    with pytest.raises((ValueError, NotImplementedError), match="use_reentrant=False"):
        operator(model, nn.CrossEntropyLoss(), data=(X, y), cache=cache) @ np.ones(31)


class OnTheHost(torch.autograd.Function):
    """A square by NumPy: neither its calls nor its kernels are seen, and vmap cannot take it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.square(x.detach().numpy()))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, b):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * b.numpy())


@pytest.mark.parametrize("cache", ["auto", "scores"])
def test_rows_that_are_differentiated_one_by_one_are_said(cache):
    torch.manual_seed(0)
    model = Body(lambda net, X: net.head(X * OnTheHost.apply(net.w)), w=vector(5), head=nn.Linear(5, 3)).double()
    X, y, loss = draw(VECTOR), torch.arange(3), nn.CrossEntropyLoss(reduction="sum")
    G = rows_by_backward(model, loss, X, y)
    op = fo.EmpiricalFisherLinearOperator(model, loss, data=(X, y), cache=cache)
    with pytest.warns(fo.PlanWarning, match="one by one.* w: used past the calls of torch"):
        F = op @ np.eye(op.shape[0])
    np.testing.assert_allclose(F, G.T @ G, atol=1e-12)
    assert "w (used past the calls of torch that are seen)" in str(op.plan)


class Adapter(nn.Module):
    """Float32 adapters on a base of lower precision, as PEFT has them."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x):
        h = x.to(self.base.weight.dtype)
        return (self.base(h) + self.B(self.A(x)).to(h.dtype)).to(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_dtype_is_the_precision_of_frozen_parameters_too(low, dtype):
    def make(precision):
        torch.manual_seed(0)
        net = nn.Sequential(Adapter(nn.Linear(16, 16)), nn.Tanh(), Adapter(nn.Linear(16, 16)))
        for part in (net[0].base, net[2].base):
            part.to(low).to(precision)
        return net

    X, y, loss = torch.randn(9, 16), torch.arange(9), nn.CrossEntropyLoss()
    op = fo.FisherLinearOperator(make(low), loss, data=(X, y), dtype=dtype)
    truth = oracle.exact_fisher(net := make(low).double(), loss, [p for p in net.parameters() if p.requires_grad],
                                [(X.double(), y)])  # fmt: skip
    assert op.dtype == dtype
    assert np.abs(op.todense() - truth).max() <= 1000 * np.finfo(dtype).eps * np.abs(truth).max()
