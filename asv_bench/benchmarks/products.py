"""Products with the Monte-Carlo Fisher, beside the peer in the same process."""

import statistics
import time

import torch
from torch import nn

import fisherops as fo

try:
    from curvlinops import FisherMCLinearOperator as Peer
except ImportError:
    Peer = None


def make(model):
    """Return a model and one batch for it."""
    torch.manual_seed(0)
    if model == "mlp":
        net = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        return net, (torch.randn(512, 784), torch.randint(10, (512,)))
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    return net, (torch.randn(256, 1, 28, 28), torch.randint(10, (256,)))


class Products:
    """One vector and 32 columns."""

    params = (["mlp", "cnn"], [1, 32])
    param_names = ("model", "columns")
    timeout = 300
    pairs = 7

    def setup(self, model, columns):
        net, batch = make(model)
        self.arguments = net, nn.CrossEntropyLoss(), list(net.parameters()), [batch]
        self.op = fo.FisherMCLinearOperator(*self.arguments)
        self.V = torch.randn(self.op.shape[1], columns)
        self.op @ self.V

    def time_product(self, model, columns):
        self.op @ self.V

    def peakmem_product(self, model, columns):
        self.op @ self.V

    def track_speedup(self, model, columns):
        """Median of interleaved pairs: seconds of the peer over seconds of ours."""
        if Peer is None:
            raise NotImplementedError
        peer = Peer(*self.arguments, check_deterministic=False)
        peer @ self.V
        ratios = []
        for _ in range(self.pairs):
            times = []
            for op in (self.op, peer):
                start = time.perf_counter()
                op @ self.V
                times.append(time.perf_counter() - start)
            ratios.append(times[1] / times[0])
        return statistics.median(ratios)

    track_speedup.unit = "times"
    track_speedup.pretty_name = "speed-up over curvlinops 3.0.1"


class Construction:
    """Everything before the first product: two evaluations of the model and two readings of the data."""

    params = (("mlp", "cnn"),)
    param_names = ("model",)

    def setup(self, model):
        net, batch = make(model)
        self.arguments = net, nn.CrossEntropyLoss(), None, [batch]

    def time_construction(self, model):
        fo.FisherMCLinearOperator(*self.arguments)


class Diagonal:
    """The exact diagonal, from the rows of the score matrix."""

    params = (("mlp", "cnn"),)
    param_names = ("model",)

    def setup(self, model):
        net, batch = make(model)
        self.op = fo.FisherMCLinearOperator(net, nn.CrossEntropyLoss(), None, [batch])

    def time_diagonal(self, model):
        self.op.diagonal()


def timeraw_import():
    """Seconds to import fisherops once torch and SciPy are there."""
    return "import fisherops", "import torch, scipy.sparse.linalg"
