"""Products with the Fisher, beside the peer in the same process and beside their limits."""

import statistics
import time

import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisherops as fo
from fisherops._matmul import times_transposed

from .networks import make

try:
    import curvlinops as peer
except ImportError:
    peer = None


def seconds(function):
    """Time a call that follows another of the same function, as in a solver's loop."""
    function()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(slow, fast, pairs):
    """Median over interleaved pairs of the seconds of `slow` over those of `fast`."""
    return statistics.median(seconds(slow) / seconds(fast) for _ in range(pairs))


def multiply(op, V):
    # The peer's forward mode has no rule for fused attention.
    with sdpa_kernel(SDPBackend.MATH):
        return op @ V


class _Suite:
    timeout = 600
    pairs = 7

    def build(self, case, **options):
        """Make our operator and the peer's for a case such as "transformer datum"."""
        name, *kind = case.split()
        net, batch = make(name)
        arguments = net, nn.CrossEntropyLoss(), list(net.parameters()), [batch]
        if "exact" in kind:
            return fo.FisherLinearOperator(*arguments, **options), peer and peer.GGNLinearOperator(
                *arguments, check_deterministic=False
            )
        rows = "datum" if "datum" in kind else "term"
        theirs = peer and peer.FisherMCLinearOperator(*arguments, check_deterministic=False)
        return fo.FisherMCLinearOperator(*arguments, rows=rows, **options), theirs


class Products(_Suite):
    """One vector and 32 columns."""

    params = (["mlp", "mlp exact", "cnn", "resnet", "transformer", "transformer datum"], [1, 32])
    param_names = ("case", "columns")

    def setup(self, case, columns):
        if columns > 1 and case not in ("mlp", "cnn"):
            raise NotImplementedError  # minutes for the peer
        self.op, self.theirs = self.build(case)
        self.V = torch.randn(self.op.shape[1], columns)
        self.op @ self.V

    def time_product(self, case, columns):
        self.op @ self.V

    def peakmem_product(self, case, columns):
        self.op @ self.V

    def track_speedup(self, case, columns):
        if self.theirs is None:
            raise NotImplementedError
        pairs = 1 if columns > 1 and case == "cnn" else self.pairs
        return ratio(lambda: multiply(self.theirs, self.V), lambda: self.op @ self.V, pairs)

    track_speedup.unit = "times"
    track_speedup.pretty_name = "speed-up over curvlinops 3.0.1"


class Caches(_Suite):
    """One vector, in every form."""

    params = (["mlp", "cnn", "transformer"], ["scores", "factors", "linearization", "none"])
    param_names = ("network", "cache")

    def setup(self, network, cache):
        if network == "transformer" and cache in ("scores", "factors"):
            raise NotImplementedError  # 64 backward passes
        self.op, self.theirs = self.build(network, cache=cache)
        self.v = torch.randn(self.op.shape[1])
        self.op @ self.v

    def time_product(self, network, cache):
        self.op @ self.v

    def track_speedup(self, network, cache):
        if self.theirs is None:
            raise NotImplementedError
        return ratio(lambda: multiply(self.theirs, self.v), lambda: self.op @ self.v, self.pairs)

    track_speedup.unit = "times"


class FractionOfLimit(_Suite):
    """Our product beside its limit: reading dense rows once, or the matrix products of the factors alone."""

    params = (["resnet rows", "mlp factors"],)
    param_names = ("limit",)

    def setup(self, limit):
        self.op, _ = self.build(limit.split()[0])
        self.v = torch.randn(self.op.shape[1])
        self.op @ self.v
        net, (X, _) = make(limit.split()[0])
        if limit == "resnet rows":
            rows = torch.randn(len(X), self.op.shape[1])
            self.limit = lambda: rows @ self.v
        else:
            shapes = [layer.weight.shape for layer in net if isinstance(layer, nn.Linear)]
            pairs = [(torch.randn(len(X), i), torch.randn(o, i), torch.randn(o, len(X))) for o, i in shapes]
            self.limit = lambda: [(times_transposed(W, A), times_transposed(B, A.T)) for A, W, B in pairs]

    def track_fraction_of_limit(self, limit):
        return ratio(self.limit, lambda: self.op @ self.v, 3 * self.pairs)

    track_fraction_of_limit.unit = "of the limit's speed"


class Scaling:
    """Seconds of a product as data, samples or columns grow by two decades from 64, 1 and 1; linear, or less."""

    params = (["data", "samples", "columns"], [1, 10, 100], ["auto", "scores", "none"])
    param_names = ("what", "times", "cache")
    timeout = 600
    N = 64

    def setup(self, what, times, cache):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 100))
        X = torch.randn(self.N * (times if what == "data" else 1), 64)
        data, samples = [(X, torch.zeros(len(X), dtype=torch.int64))], times if what == "samples" else 1
        self.op = fo.FisherMCLinearOperator(net, nn.CrossEntropyLoss(), data=data, mc_samples=samples, cache=cache)
        self.V = torch.randn(self.op.shape[1], times if what == "columns" else 1)
        self.op @ self.V

    def time_product(self, what, times, cache):
        self.op @ self.V


class Memory:
    """Peak memory of a process that builds and multiplies with 64 MiB for 170 MB of rows; `none` is what it needs."""

    params = (["none", "auto", "scores", "linearization"], [1, 100])
    param_names = ("cache", "columns")
    N = 2048

    def setup(self, cache, columns):
        net, (X, y) = make("cnn", self.N)
        data = list(zip(X.split(64), y.split(64), strict=True))
        self.arguments = net, nn.CrossEntropyLoss(), list(net.parameters()), data
        self.V = torch.randn(sum(p.numel() for p in net.parameters()), columns)

    def peakmem_construction_and_product(self, cache, columns):
        fo.FisherMCLinearOperator(*self.arguments, cache=cache, max_memory="64MiB") @ self.V


class Convolutions(_Suite):
    """ResNet-18 with group norms on images of 32 × 32, held as factors, in batches of 64."""

    params = ([16, 512],)
    param_names = ("images",)
    timeout = 3600
    pairs = 3

    def setup(self, images):
        self.net, (X, y) = make("resnet18", images)
        self.data = list(zip(X.split(64), y.split(64), strict=True))
        loss = nn.CrossEntropyLoss()
        self.op = fo.FisherMCLinearOperator(self.net, loss, list(self.net.parameters()), self.data, cache="factors")
        self.v = torch.randn(self.op.shape[1])
        self.op @ self.v

    def gradient(self):
        for X, y in self.data:
            torch.autograd.grad(nn.functional.cross_entropy(self.net(X), y), list(self.net.parameters()))

    def time_product(self, images):
        self.op @ self.v

    def track_gradients(self, images):
        """Seconds of a product over those of one gradient of the loss."""
        return ratio(lambda: self.op @ self.v, self.gradient, self.pairs)

    track_gradients.unit = "gradients"

    def track_memory(self, images):
        """Bytes that are cached."""
        return self.op.plan.nbytes

    track_memory.unit = "bytes"


class Construction(_Suite):
    """Everything before the second product: checks, draws, what is kept, and the first product."""

    params = (["mlp", "cnn", "resnet", "transformer"],)
    param_names = ("network",)

    def setup(self, network):
        net, batch = make(network)
        self.arguments = net, nn.CrossEntropyLoss(), list(net.parameters()), [batch]
        self.v = torch.randn(sum(p.numel() for p in net.parameters()))

    def construct(self):
        fo.FisherMCLinearOperator(*self.arguments) @ self.v

    def time_construction(self, network):
        self.construct()

    def track_products_of_the_peer(self, network):
        """Seconds of the construction over those of one product of the peer."""
        if peer is None:
            raise NotImplementedError
        theirs = peer.FisherMCLinearOperator(*self.arguments, check_deterministic=False)
        return ratio(self.construct, lambda: multiply(theirs, self.v), self.pairs)

    track_products_of_the_peer.unit = "products of the peer"


class Eigenvalues(_Suite):
    """SciPy's eigsh for the top ten, everything from construction counted."""

    params = (["mlp"],)
    param_names = ("network",)
    N = 1024
    tolerance = 1e-2

    def setup(self, network):
        net, batch = make(network, self.N)
        self.arguments = net, nn.CrossEntropyLoss(), list(net.parameters()), [batch]

    def ours(self):
        eigsh(fo.FisherMCLinearOperator(*self.arguments), k=10, tol=self.tolerance)

    def time_eigsh(self, network):
        self.ours()

    def track_speedup(self, network):
        if peer is None:
            raise NotImplementedError

        def theirs():
            op = peer.FisherMCLinearOperator(*self.arguments, check_deterministic=False).to_scipy()
            eigsh(op, k=10, tol=self.tolerance)

        return ratio(theirs, self.ours, 1)

    track_speedup.unit = "times"


class Diagonal(_Suite):
    """The exact diagonal, from the rows of the score matrix."""

    params = (["mlp", "cnn"],)
    param_names = ("network",)

    def setup(self, network):
        self.op, _ = self.build(network)
        self.op.diagonal()

    def time_diagonal(self, network):
        self.op.diagonal()


def timeraw_import():
    """Seconds to import fisherops once torch and SciPy are there."""
    return "import fisherops", "import torch, scipy.sparse.linalg"


class Noticing(_Suite):
    """What a product spends on looking whether the model, its tensors or the loss have changed, as a share of it."""

    params = (["mlp", "cnn", "resnet", "transformer datum"],)
    param_names = ("case",)
    looks = 50

    def setup(self, case):
        self.op, _ = self.build(case)
        self.v = torch.ones(self.op.shape[1])
        self.op @ self.v

    def track_share(self, case):
        def look():
            for _ in range(self.looks):
                _ = self.op.version

        return ratio(look, lambda: self.op @ self.v, self.pairs) / self.looks


class SmallBatches:
    """The MLP with many small batches beside one large batch, and beside plain backward passes."""

    timeout = 600
    pairs = 5
    N = 4096
    params = ([1, 8],)
    param_names = ("examples in a batch",)

    def setup(self, size):
        self.net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 5))
        X, y = torch.randn(self.N, 20), torch.randint(5, (self.N,))
        self.batches = [(X[n : n + size], y[n : n + size]) for n in range(0, self.N, size)]
        self.whole = self._operator([(X, y)])
        self.v = torch.randn(self.whole.shape[1])

    def _operator(self, data):
        return fo.FisherMCLinearOperator(self.net, nn.CrossEntropyLoss(), data=data, check_deterministic=False)

    def track_products_beside_one_batch(self, size):
        op = self._operator(self.batches)
        return ratio(lambda: op @ self.v, lambda: self.whole @ self.v, self.pairs)

    def track_first_product_beside_backward_passes(self, size):
        loss, own = nn.CrossEntropyLoss(), self.batches[:256]
        params = list(self.net.parameters())

        def passes():
            for X, y in own:
                torch.autograd.grad(loss(self.net(X), y), params)

        return ratio(lambda: self._operator(own) @ self.v, passes, min(2, self.pairs))


class Steps:
    """Natural-gradient steps of a network 784-512-512-1 with squared loss, in gradients."""

    timeout = 600
    pairs = 5
    params = ([256, 512, 1024],)
    param_names = ("examples",)

    def setup(self, examples):
        net = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 1))
        batch, loss = (torch.randn(examples, 784), torch.randn(examples, 1)), nn.MSELoss()
        optimizer = fo.optim.NaturalGradient(net, loss, lr=0.1, damping=0.1)
        self.step = lambda: optimizer.step(batch)
        self.gradient = lambda: torch.autograd.grad(loss(net(batch[0]), batch[1]), list(net.parameters()))
        self.step()

    def track_gradients(self, examples):
        return ratio(self.step, self.gradient, self.pairs)
