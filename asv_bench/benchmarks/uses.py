"""Uses of parameters: spellings of a layer against `functional.linear`, tied weights, and what recording costs.

Seconds are those of the processor, in interleaved pairs, so that what else runs on the machine changes little.
"""

import statistics
import time
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

import fisherops as fo
from fisherops.problem.calls import Recorder
from fisherops.problem.problem import Problem

from .networks import Transformer


def seconds(function, calls=1):
    """Time a function, per call, by the clock of the processor."""
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def ratio(slow, fast, pairs, calls=None):
    """Median over interleaved pairs of the seconds of `slow` over those of `fast`, after a call of each."""
    slow()
    own = seconds(fast)
    calls = calls or max(1, round(0.02 / max(own, 1e-6)))
    return statistics.median(seconds(slow, calls) / seconds(fast, calls) for _ in range(pairs))


def peak_bytes(function):
    """Return the largest number of bytes that torch allocated at once during a call."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


# ---- Models -----------------------------------------------------------------------------------


class Heads(nn.Module):
    """A block of a transformer; heads are an axis of its weights, which are used by einsum or by `linear`."""

    def __init__(self, by_einsum, d=128, heads=4):
        super().__init__()
        k, self.by_einsum = d // heads, by_einsum
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.randn(heads, d, k) / d**0.5) for _ in range(3))
        self.b_Q, self.b_K, self.b_V = (nn.Parameter(torch.zeros(heads, k)) for _ in range(3))
        self.W_O, self.b_O = nn.Parameter(torch.randn(heads, k, d) / d**0.5), nn.Parameter(torch.zeros(d))
        self.W_in, self.b_in = nn.Parameter(torch.randn(d, 4 * d) / d**0.5), nn.Parameter(torch.zeros(4 * d))
        self.W_out, self.b_out = nn.Parameter(torch.randn(4 * d, d) / d**0.5), nn.Parameter(torch.zeros(d))
        if not by_einsum:
            for name in ("W_Q", "W_K", "W_V"):
                setattr(self, name, nn.Parameter(getattr(self, name).detach().movedim(1, 2).flatten(0, 1).clone()))
            self.W_O = nn.Parameter(self.W_O.detach().flatten(0, 1).T.contiguous())
            for name in ("b_Q", "b_K", "b_V"):
                setattr(self, name, nn.Parameter(getattr(self, name).detach().flatten()))
            for name in ("W_in", "W_out"):
                setattr(self, name, nn.Parameter(getattr(self, name).detach().T.contiguous()))
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)
        self.head, self.heads = nn.Linear(d, 10), heads

    def _projected(self, x, W, b):
        if self.by_einsum:
            return torch.einsum("bpd,hdk->bphk", x, W) + b
        return functional.linear(x, W, b).unflatten(-1, (self.heads, -1))

    def _dense(self, x, W, b):
        return torch.einsum("bpd,df->bpf", x, W) + b if self.by_einsum else functional.linear(x, W, b)

    def forward(self, X):
        h = self.first(X)
        q, k, v = (
            self._projected(h, W, b) for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K), (self.W_V, self.b_V))
        )
        scores = torch.einsum("bphk,bqhk->bhpq", q, k) / q.shape[-1] ** 0.5
        mask = torch.ones(X.shape[1], X.shape[1], dtype=torch.bool).triu(1)
        z = torch.einsum("bhpq,bqhk->bphk", scores.masked_fill(mask, -torch.inf).softmax(-1), v)
        if self.by_einsum:
            X = X + torch.einsum("bphk,hkd->bpd", z, self.W_O) + self.b_O
        else:
            X = X + functional.linear(z.flatten(2), self.W_O, self.b_O)
        h = functional.gelu(self._dense(self.second(X), self.W_in, self.b_in))
        return self.head((X + self._dense(h, self.W_out, self.b_out)).mean(1))


class Dense(nn.Module):
    """Three layers of width 256 on 8 positions, in some spelling."""

    def __init__(self, spelling, width=256):
        super().__init__()
        self.spelling = spelling
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        if spelling == "weight_norm":
            self.layers = nn.ModuleList(map(weight_norm, self.layers))
        if spelling == "bmm":
            for layer in self.layers:
                layer.weight = nn.Parameter(layer.weight.detach().T.contiguous())
        self.head = nn.Linear(width, 10)

    def _layer(self, x, layer):
        W, b = layer.weight, layer.bias
        if self.spelling == "x @ W.T + b":
            return x @ W.T + b
        if self.spelling == "einsum":
            return torch.einsum("npi,oi->npo", x, W) + b
        if self.spelling == "bmm":
            return torch.bmm(x, W.expand(len(x), *W.shape)) + b
        return layer(x) if self.spelling == "weight_norm" else functional.linear(x, W, b)

    def forward(self, X):
        for layer in self.layers:
            X = self._layer(X, layer).tanh()
        return self.head(X.mean(1))


class Tied(Transformer):
    """The transformer of the other suites; its head is the table of its tokens, or has a weight of its own."""

    def __init__(self, tied):
        super().__init__()
        if tied:
            self.head.weight = self.tokens.weight


def _operator(model, X, classes=10, **options):
    y = torch.randint(classes, (len(X), *X.shape[1:]) if classes > 10 else (len(X),))
    return fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=[(X, y)], rows="datum", **options)


# ---- Benchmarks -------------------------------------------------------------------------------


class HeadsByEinsum:
    """A block of width 128 on 32 positions, 16 examples, whose weights have an axis of heads."""

    params = (["auto", "factors"],)
    param_names = ("cache",)
    timeout = 600
    pairs = 9
    examples = 16

    def setup(self, cache):
        torch.manual_seed(0)
        self.X = torch.randn(self.examples, 32, 128)
        self.models = [Heads(True), Heads(False)]
        self.operators = [_operator(model, self.X, cache=cache) for model in self.models]
        self.v = torch.randn(self.operators[0].shape[1])
        for op in self.operators:
            op @ self.v

    def track_first_product(self, cache):
        times = []
        for _ in range(self.pairs):
            op = _operator(self.models[0], self.X, cache=cache)
            times.append(seconds(lambda op=op: op @ self.v))
        return 1000 * statistics.median(times)

    track_first_product.unit = "ms"

    def track_first_product_in_passes(self, cache):
        """Against a forward and a backward pass of the model."""
        model, ratios = self.models[0], []
        for _ in range(self.pairs):
            op = _operator(model, self.X, cache=cache)
            first = seconds(lambda op=op: op @ self.v)
            ratios.append(first / seconds(lambda: torch.autograd.grad(model(self.X).sum(), list(model.parameters()))))
        return statistics.median(ratios)

    track_first_product_in_passes.unit = "forward and backward passes"

    def track_bytes_held(self, cache):
        return self.operators[0].plan.nbytes / 1e6

    track_bytes_held.unit = "MB"

    def track_product(self, cache):
        einsum, linear = self.operators
        return ratio(lambda: einsum @ self.v, lambda: linear @ self.v, self.pairs)

    track_product.unit = "times functional.linear"


class Spellings:
    """Warm products of a network of dense layers in some spelling, against `functional.linear`."""

    params = (["x @ W.T + b", "einsum", "bmm", "weight_norm"], [1, 32])
    param_names = ("spelling", "columns")
    timeout = 600
    pairs = 9
    examples = 64

    def setup(self, spelling, columns):
        torch.manual_seed(0)
        X = torch.randn(self.examples, 8, 256)
        self.products, self.held = [], []
        for model in (Dense(spelling), Dense("linear")):
            op = _operator(model, X)
            V = torch.randn(op.shape[1], columns)
            op @ V
            self.products.append(lambda op=op, V=V: op @ V)
            self.held.append(op.plan.nbytes)

    def track_product(self, spelling, columns):
        return ratio(*self.products, self.pairs)

    track_product.unit = "times functional.linear"

    def track_memory(self, spelling, columns):
        """What is cached and what a product allocates at most."""
        own, linear = (held + peak_bytes(f) for held, f in zip(self.held, self.products, strict=True))
        return own / linear

    track_memory.unit = "times functional.linear"


class TiedWeights:
    """A transformer whose table of tokens is its head too, against one with both."""

    params = (["product", "gram", "diagonal"],)
    param_names = ("what",)
    timeout = 600
    pairs = 5
    examples = 16

    def setup(self, what):
        torch.manual_seed(0)
        X = torch.randint(256, (self.examples, 64))
        self.functions = []
        for tied in (True, False):
            op = _operator(Tied(tied), X, classes=256)
            v = torch.randn(op.shape[1])
            scores = op.scores
            op @ v
            if what == "product":
                self.functions.append(lambda op=op, v=v: op @ v)
            else:
                self.functions.append(scores.gram if what == "gram" else op.diagonal)

    def track_tied(self, what):
        return ratio(*self.functions, self.pairs)

    track_tied.unit = "times untied"


class FirstProduct:
    """A transformer of six layers of width 64."""

    params = (["transformer"],)
    param_names = ("network",)
    timeout = 600
    pairs = 9
    examples = 16

    def setup(self, network):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        body = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.model = nn.Sequential(nn.Embedding(256, 64), body, nn.Linear(64, 256))
        self.X = torch.randint(256, (self.examples, 32))
        self.y = torch.randint(256, self.X.shape)
        self.model_func = lambda X: self.model(X).movedim(-1, 1)
        self.loss = nn.CrossEntropyLoss()
        self.v = torch.randn(sum(p.numel() for p in self.model.parameters()))

    def make(self):
        return fo.FisherMCLinearOperator(
            self.model_func, self.loss, list(self.model.parameters()), [(self.X, self.y)], rows="datum",
            check_deterministic=False,
        )  # fmt: skip

    def backward(self):
        loss = self.loss(self.model_func(self.X), self.y)
        torch.autograd.grad(loss, list(self.model.parameters()))

    def track_first_product(self, network):
        ratios = []
        self.make() @ self.v
        for _ in range(self.pairs):
            op = self.make()
            ratios.append(seconds(lambda op=op: op @ self.v) / seconds(self.backward))
        return statistics.median(ratios)

    track_first_product.unit = "forward and backward passes"

    def track_recording(self, network):
        """Microseconds that recording adds to a call of torch."""
        problem = Problem(self.model, self.loss)
        difference = []
        for _ in range(2 * self.pairs + 3):
            recorded = seconds(lambda: problem.evaluate(self.X))
            difference.append(recorded - seconds(lambda: problem.evaluate(self.X, records=False)))
        with mock.patch.object(Recorder, "record", autospec=True, side_effect=Recorder.record) as record:
            problem.evaluate(self.X)
        return 1e6 * statistics.median(difference[2:]) / record.call_count

    track_recording.unit = "µs per call"
