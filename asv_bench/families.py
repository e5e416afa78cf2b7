"""Which parameters of many families of models have known uses: python asv_bench/families.py [--only TEXT].

Each model is tiny, with random weights in float64. The rows of G are compared with loops over the examples by
torch.autograd, parameter by parameter. Families whose package is missing are listed as not run.
"""

import argparse
import importlib
import re
import threading
import time
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import fisherops as fo

N, T, WIDTH, VOCABULARY = 3, 6, 16, 23


class Pooled(nn.Module):
    """A body, its outputs in the shape (N, 4), and what the body needs beside the inputs."""

    def __init__(self, body, call=None):
        super().__init__()
        self.body, self._call = body, call

    def forward(self, X):
        out = self.body(X) if self._call is None else self._call(self.body, X)
        if isinstance(out, dict):
            out = out["last_hidden_state"]
        out = out[0] if isinstance(out, tuple) else out
        # Smooth and different everywhere, so that no parameter cancels.
        weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view(1, -1)
        flat = (out.flatten(1) * weights).sin()
        return torch.stack([part.sum(1) for part in flat.tensor_split(4, 1)], 1)


def tokens():
    return torch.randint(1, VOCABULARY, (N, T))


def sequences(*shape):
    return torch.randn(N, *(shape or (T, WIDTH)), dtype=torch.float64)


# ---- Transformers -----------------------------------------------------------------------------

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip


def hugging_face(name, X=tokens, call=None, model=None, common=True, **options):
    """A model of transformers by the prefix of its classes, its sizes under the usual names unless others are given."""

    def make():
        library = importlib.import_module("transformers")
        config = getattr(library, f"{name}Config")(**(SIZES if common else {}) | options)
        for dropout in [key for key in vars(config) if "dropout" in key or "dropconnect" in key]:
            if isinstance(getattr(config, dropout), float):
                setattr(config, dropout, 0.0)
        return Pooled(getattr(library, model or f"{name}Model")(config).double().eval(), call), X()

    return make


def without_cache(body, X):
    return body(X, use_cache=False)


def encoder_and_decoder(body, X):
    return body(input_ids=X, decoder_input_ids=X.flip(1), use_cache=False)


def of_encoder(body, X):
    return body.encoder(X)


def adapted(kind, **options):
    """GPT-2 with adapters of PEFT, of which the adapters are trained."""

    def make():
        model, X = hugging_face("GPT2", n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, n_inner=24)()
        peft = importlib.import_module("peft")
        body = peft.get_peft_model(model.body, getattr(peft, kind)(**options)).double().eval()
        for name, p in body.named_parameters():
            if "lora" in name or "ia3" in name:
                p.data = p.data + 0.3 * torch.randn_like(p)  # B starts at zero
        return Pooled(body, without_cache), X

    return make


def images(size=8):
    return lambda: sequences(3, size, size)


TRANSFORMERS = {
    "BERT": hugging_face("Bert"),
    "GPT-2": hugging_face("GPT2", call=without_cache, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, n_inner=24),
    "Llama": hugging_face("Llama", call=without_cache, num_key_value_heads=1),
    "Mistral": hugging_face("Mistral", call=without_cache, num_key_value_heads=1, sliding_window=4),
    "Mixtral": hugging_face(
        "Mixtral", call=without_cache, num_key_value_heads=1, num_local_experts=3, experts_implementation="eager"
    ),
    "Falcon": hugging_face("Falcon", call=without_cache, ffn_hidden_size=24),
    "T5": hugging_face("T5", call=encoder_and_decoder, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
    "XLNet": hugging_face("XLNet", common=False, vocab_size=VOCABULARY, d_model=WIDTH, n_layer=2, n_head=2, d_inner=24),
    "ViT": hugging_face("ViT", images(), image_size=8, patch_size=4),
    "Mamba": hugging_face("Mamba", call=without_cache, state_size=4, expand=2, conv_kernel=3, time_step_rank=2),
    "OPT": hugging_face("OPT", call=without_cache, ffn_dim=24, word_embed_proj_dim=WIDTH),
    "GPT-NeoX": hugging_face("GPTNeoX", call=without_cache),
    "Qwen2": hugging_face("Qwen2", call=without_cache, num_key_value_heads=1),
    "Gemma": hugging_face("Gemma", call=without_cache, num_key_value_heads=1, head_dim=8),
    "Phi": hugging_face("Phi", call=without_cache),
    "DeBERTa-v2": hugging_face(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, conv_kernel_size=3
    ),
    "ALBERT": hugging_face("Albert", embedding_size=8),
    "DistilBERT": hugging_face("DistilBert", dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=24),
    "ELECTRA": hugging_face("Electra", embedding_size=8),
    "BLOOM": hugging_face("Bloom", call=without_cache, n_layer=2, n_head=2),
    "MPT": hugging_face(
        "Mpt", call=without_cache, d_model=WIDTH, n_layers=2, n_heads=2, max_seq_len=32, expansion_ratio=2
    ),
    "Whisper encoder": hugging_face(
        "Whisper", lambda: sequences(8, 12), of_encoder, d_model=WIDTH, encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_layers=1, decoder_attention_heads=2, num_mel_bins=8, max_source_positions=6,
        pad_token_id=0,
    ),
    "CLIP vision": hugging_face("CLIPVision", images(), image_size=8, patch_size=4),
    "Swin": hugging_face(
        "Swin", images(16), common=False, image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2],
        window_size=2,
    ),
    "ConvNeXt": hugging_face("ConvNext", images(16), common=False, hidden_sizes=[8, 12], depths=[1, 2], num_stages=2,
                             patch_size=2),
    "ResNet": hugging_face("ResNet", images(16), common=False, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2],
                           layer_type="basic"),
    "Wav2Vec2": hugging_face(
        "Wav2Vec2", lambda: sequences(160), conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(6, 4),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    ),
    "BART": hugging_face(
        "Bart", call=encoder_and_decoder, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
    ),
    "Longformer": hugging_face("Longformer", attention_window=4, pad_token_id=0),
    "BigBird": hugging_face(
        "BigBird", lambda: torch.randint(1, VOCABULARY, (N, 24)), attention_type="block_sparse", block_size=2,
        num_random_blocks=1,
    ),
    "Funnel": hugging_face("Funnel", common=False, vocab_size=VOCABULARY, d_model=WIDTH, block_sizes=[1, 1],
                           n_head=2, d_head=8, d_inner=24,
                           num_decoder_layers=1),
    "RWKV": hugging_face("Rwkv", call=without_cache, attention_hidden_size=WIDTH, context_length=32),
}  # fmt: skip

PEFT = {
    "GPT-2 with LoRA": adapted("LoraConfig", r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "GPT-2 with DoRA": adapted("LoraConfig", r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
    "GPT-2 with IA3": adapted(
        "IA3Config", target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True
    ),
}


# ---- Graphs -----------------------------------------------------------------------------------


class Graphs(nn.Module):
    """Two layers of torch_geometric on a ring with chords; the graphs of a batch are one graph of many parts."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList([make(WIDTH, 8), make(8, 8)])

    def forward(self, X):
        ring = torch.arange(T)
        edges = torch.stack([torch.cat([ring, ring[:4]]), torch.cat([(ring + 1) % T, ring[:4] + 2])])
        edges = torch.cat([edges, edges.flip(0)], 1)
        edges = (edges[:, None] + T * torch.arange(len(X))[:, None]).flatten(1)
        h = X.flatten(0, 1)
        for layer in self.layers:
            h = layer(h, edges).tanh()
        return h.unflatten(0, (len(X), T))


def graph(name, options):
    def make():
        library = importlib.import_module("torch_geometric.nn")
        return Pooled(Graphs(lambda i, o: getattr(library, name)(*options(i, o))).double().eval()), sequences()

    return make


GRAPHS = {
    "GCN": graph("GCNConv", lambda i, o: (i, o)),
    "GAT": graph("GATConv", lambda i, o: (i, o // 2, 2)),
    "GraphSAGE": graph("SAGEConv", lambda i, o: (i, o)),
    "GIN": graph("GINConv", lambda i, o: (nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o)), 0.1, True)),
}


# ---- PyTorch alone ----------------------------------------------------------------------------


def of(make, X=sequences, call=None):
    return lambda: (Pooled(make().double(), call), X())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.GRU(WIDTH, 5, batch_first=True, bidirectional=True)
        self.second = nn.RNN(10, 4, num_layers=2)

    def forward(self, X):
        return self.second(self.first(X)[0].transpose(0, 1))[0].transpose(0, 1)


class Experts(nn.Module):
    """Three experts; each position goes to its best two (routed), or to all."""

    def __init__(self, routed):
        super().__init__()
        self.gate, self.routed = nn.Linear(WIDTH, 3, bias=False), routed
        self.up, self.down = (nn.Parameter(torch.randn(3, *s) / 3) for s in ((WIDTH, 8), (8, WIDTH)))

    def forward(self, X):
        h = X.flatten(0, 1)
        share = self.gate(h).softmax(-1)
        if not self.routed:
            inner = torch.einsum("td,edf->tef", h, self.up).tanh()
            return torch.einsum("te,tef,efd->td", share, inner, self.down).view_as(X)
        best, choice = share.topk(2)
        out = torch.zeros_like(h)
        for e in range(3):
            at, slot = (choice == e).nonzero(as_tuple=True)
            out = out.index_add(0, at, (h[at] @ self.up[e]).tanh() @ self.down[e] * best[at, slot, None])
        return out.view_as(X)


class Attention(nn.Module):
    """Heads as an axis of the weights, by einsum, as in TransformerLens."""

    def __init__(self, d=WIDTH, heads=2):
        super().__init__()
        k = d // heads
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.randn(heads, d, k) / d**0.5) for _ in range(3))
        self.W_O = nn.Parameter(torch.randn(heads, k, d) / d**0.5)
        self.b_Q, self.b_K, self.b_V = (nn.Parameter(torch.zeros(heads, k)) for _ in range(3))
        self.b_O = nn.Parameter(torch.zeros(d))

    def forward(self, X):
        q, k, v = (
            torch.einsum("bpd,hdk->bphk", X, W) + b
            for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K), (self.W_V, self.b_V))
        )
        scores = torch.einsum("bphk,bqhk->bhpq", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(X.shape[1], X.shape[1]).triu(1).bool(), -torch.inf)
        z = torch.einsum("bhpq,bqhk->bphk", scores.softmax(-1), v)
        return X + torch.einsum("bphk,hkd->bpd", z, self.W_O) + self.b_O


class Hypernetwork(nn.Module):
    """Weights of layers are computed from parameters of another network, and for each example from its data."""

    def __init__(self):
        super().__init__()
        self.code, self.net = nn.Parameter(torch.randn(5)), nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 128))
        self.own = nn.Linear(WIDTH, 64)

    def forward(self, X):
        h = functional.linear(X, self.net(self.code).view(8, WIDTH)).tanh()
        return torch.bmm(h, self.own(X.mean(1)).view(-1, 8, 8))


class Equilibrium(nn.Module):
    """The state after a fixed number of steps of one layer."""

    def __init__(self):
        super().__init__()
        self.state, self.input, self.norm = nn.Linear(8, 8), nn.Linear(WIDTH, 8), nn.LayerNorm(8)

    def forward(self, X):
        z = torch.zeros(*X.shape[:2], 8, dtype=X.dtype)
        for _ in range(5):
            z = self.norm(torch.tanh(0.5 * self.state(z) + self.input(X)))
        return z


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.middle, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.GroupNorm(2, 8)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2, groups=2), nn.Conv2d(7, 2, 1)

    def forward(self, X):
        h = functional.silu(self.down(X))
        h = functional.silu(self.norm(self.middle(h))) + h
        return self.out(torch.cat([self.up(h).tanh(), X], 1))


class Lines(nn.Module):
    """Convolutions over one axis and over three."""

    def __init__(self):
        super().__init__()
        self.line, self.space = nn.Conv1d(4, 8, 3, 2, padding_mode="circular", padding=1), nn.Conv3d(2, 4, 3, 2, 1)

    def forward(self, X):
        return self.space(self.line(X).tanh().view(-1, 2, 4, 2, 2))


class Physics(nn.Module):
    """The residual of a differential equation: the network is differentiated by its inputs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.rate = nn.Parameter(torch.ones(()))

    def forward(self, X):
        X = X.clone().requires_grad_()
        u = self.net(X)
        (slope,) = torch.autograd.grad(u.sum(), X, create_graph=True)
        (second,) = torch.autograd.grad(slope[..., 1].sum(), X, create_graph=True)
        return slope[..., :1] - self.rate * second[..., 1:] + u**2


class Laplacian(nn.Module):
    """The same network differentiated by torch.func, under vmap."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, X):
        slopes = torch.func.vmap(torch.func.grad(lambda x: self.net(x)[0]))(X.flatten(0, 1))
        return torch.cat([slopes, self.net(X.flatten(0, 1))], 1).view(len(X), T, 3)


@torch.jit.script
def scripted_layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(torch.matmul(x, w.t()) + b)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, 8)

    def forward(self, X):
        return self.second(scripted_layer(X, self.first.weight, self.first.bias))


class Threaded(nn.Module):
    """One of two layers is evaluated in another thread."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

    def forward(self, X):
        results = []
        thread = threading.Thread(target=lambda w=self.second.weight, b=self.second.bias: results.append(
            functional.linear(X, w, b)))  # fmt: skip
        thread.start()
        thread.join()
        return self.first(X).tanh() * results[0]


class Scale(torch.autograd.Function):
    """w * x, with its derivative."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum_to_size(w.shape)


class StraightThrough(torch.autograd.Function):
    """round(w * x) with the derivative of w * x, which is none of its own."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (4 * x * w).round() / 4

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum_to_size(w.shape)


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.scale, self.function = nn.Linear(WIDTH, 8), nn.Parameter(torch.rand(8) + 1), function

    def forward(self, X):
        return self.function.apply(self.linear(X).tanh(), self.scale)


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

    def forward(self, X):
        return torch.cond(torch.ones(()) > 0, lambda x: self.first(x).tanh(), lambda x: self.second(x).sin(), (X,))


def parametrized(name, make=lambda: nn.Linear(WIDTH, 8)):
    def build():
        module = getattr(nn.utils.parametrizations, name)(make())
        return nn.Sequential(module, nn.Tanh(), nn.Linear(8, 4)).double().eval()

    return of(build)


def sequence_to_sequence():
    return nn.Transformer(WIDTH, 2, 1, 1, 24, 0.0, batch_first=True)


PLAIN = {
    "LSTM, two layers, bidirectional": of(lambda: nn.LSTM(WIDTH, 5, 2, batch_first=True, bidirectional=True)),
    "GRU and RNN": of(Recurrent),
    "nn.Transformer": of(sequence_to_sequence, call=lambda body, X: body(X, X.flip(1))),
    "experts, routed": of(lambda: Experts(True)),
    "experts, dense": of(lambda: Experts(False)),
    "weight_norm": parametrized("weight_norm"),
    "spectral_norm": parametrized("spectral_norm"),
    "orthogonal": parametrized("orthogonal"),
    "attention by einsum": of(Attention),
    "hypernetwork": of(Hypernetwork),
    "equilibrium by a loop": of(Equilibrium),
    "U-Net": of(UNet, images()),
    "convolutions 1d and 3d": of(Lines, lambda: sequences(4, 8)),
    "derivatives by inputs (PINN)": of(Physics, lambda: sequences(T, 2)),
    "torch.func inside": of(Laplacian, lambda: sequences(T, 2)),
    "scripted function": of(Scripted),
    "another thread": of(Threaded),
    "custom function": of(lambda: Custom(Scale)),
    "custom function, other derivative": of(lambda: Custom(StraightThrough)),
    "torch.cond": of(Conditional),
}

PACKAGES = {"transformers": TRANSFORMERS, "peft": PEFT, "torch_geometric": GRAPHS, "": PLAIN}
FAMILIES = {name: make for cases in PACKAGES.values() for name, make in cases.items()}


def missing_package(name):
    """Return the package that a family needs and that is not installed, or None."""
    package = next(package for package, cases in PACKAGES.items() if name in cases)
    return package if package and importlib.util.find_spec(package) is None else None


# ---- Comparison -------------------------------------------------------------------------------


@dataclass
class Result:
    """What was found for a family."""

    parameters: int
    """Parameters that the outputs depend on."""
    unknown: dict = field(default_factory=dict)
    """Those whose rows are not found by their operations, with the reason."""
    form: str = ""
    error: float = 0.0
    """Largest relative error of G v, F v and the rows of any one parameter."""
    zero: list = field(default_factory=list)
    """Parameters whose rows are zero and should not be."""
    warned: list = field(default_factory=list)
    seconds: float = 0.0

    @property
    def share(self):
        return 1 - len(self.unknown) / max(1, self.parameters)


def rows_by_loops(model, parameters, X, y):
    """Return gradients of the loss of one example after the other, (N, D) in pieces."""
    f = model(X)
    rows = [torch.autograd.grad(((f[n] - y[n]) ** 2).sum(), list(parameters.values()), retain_graph=True,
                                allow_unused=True, materialize_grads=True) for n in range(len(f))]  # fmt: skip
    return {name: torch.stack(r).reshape(len(f), -1).numpy() for name, *r in zip(parameters, *rows, strict=True)}


def unknown_uses(plan, names):
    """Return the parameters whose rows were differentiated datum by datum, and why, as the plan lists them."""
    (entry,) = plan.entries
    if entry.form in ("none", "linearization"):
        return dict.fromkeys(names, f"{entry.form}: {entry.reason}")
    if not entry.reason.startswith("rows of "):
        assert entry.reason.startswith("every parameter"), entry.reason
        return {}
    listed = entry.reason.removeprefix("rows of ").rsplit(" differentiated ", 1)[0]
    found = {}
    for name in names:
        match = re.search(rf"(?:^|, ){re.escape(name)} \((.*?)\)(?:, \S+ \(|$)", listed)
        if match:
            found[name] = match[1]
    assert found, entry.reason
    return found


def distance(actual, expected):
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / (size or 1.0)


def examine(name):
    """Compare a family with loops."""
    torch.manual_seed(0)
    model, X = FAMILIES[name]()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in parameters.values():  # biases and gains are no longer all alike
            if p.ndim < 2:
                p += 0.1 * torch.randn_like(p)
    y = model(X).detach() + torch.randn(N, 4, dtype=torch.float64)
    truth = rows_by_loops(model, parameters, X, y)
    rows = np.concatenate(list(truth.values()), 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        op = fo.EmpiricalFisherLinearOperator(model, nn.MSELoss(reduction="sum"), parameters, data=(X, y), rows="datum")
        v = np.random.default_rng(0).standard_normal(op.shape[1])
        Fv = op @ v
        seconds = time.perf_counter() - start
    G = op.scores
    found = np.asarray(G.T @ np.eye(N)).T
    result = Result(sum(bool(r.any()) for r in truth.values()), seconds=seconds, form=op.plan.entries[0].form)
    result.unknown = unknown_uses(op.plan, [name for name, r in truth.items() if r.any()])
    largest = max(float(np.linalg.norm(r)) for r in truth.values())
    result.error = max(distance(G @ v, rows @ v), distance(Fv, rows.T @ (rows @ v)))
    start = 0
    for parameter, r in truth.items():
        own = found[:, start : start + r.shape[1]]
        start += r.shape[1]
        size = float(np.linalg.norm(r))
        if size > 1e-12 * largest:
            result.error = max(result.error, distance(own, r))
            if not own.any():
                result.zero.append(parameter)
        else:  # such as of the bias of keys, which a softmax does not see
            result.error = max(result.error, float(np.linalg.norm(own - r)) / largest)
    result.warned = [f"{w.category.__name__}: {w.message}" for w in caught if w.category is fo.PlanWarning]
    return result


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="families whose name contains this text")
    only = parser.parse_args().only.lower()
    print(
        "| family | parameters | known uses | form | error | ms | others |\n|---|---|---|---|---|---|---|", flush=True
    )
    full = ran = 0
    for name in FAMILIES:
        if only not in name.lower():
            continue
        package = missing_package(name)
        if package:
            print(f"| {name} | not run: {package} is not installed | | | | | |", flush=True)
            continue
        try:
            r = examine(name)
        except Exception as error:
            print(f"| {name} | failed: {type(error).__name__}: {str(error).splitlines()[0]} | | | | | |", flush=True)
            continue
        ran += 1
        full += not r.unknown
        reasons = {}
        for parameter, why in r.unknown.items():
            reasons.setdefault(why, []).append(parameter)
        listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        if r.zero:
            listed = f"ZERO: {', '.join(r.zero)}; {listed}"
        if r.warned:
            listed += f" (warned: {r.warned[0][:120]})"
        print(f"| {name} | {r.parameters} | {100 * r.share:.0f} % | {r.form} | {r.error:.0e} | {1000 * r.seconds:.0f} "
              f"| {listed} |", flush=True)  # fmt: skip
    print(f"\nAll parameters have known uses in {full} of {ran} families.")


if __name__ == "__main__":
    main()
