"""The networks of the benchmarks, each with one batch of data; no benchmarks."""

import torch
from torch import nn


class Block(nn.Module):
    """A residual block of two 3×3 convolutions with group norms."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, outputs) for _ in range(2))
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, X):
        h = torch.relu(self.norms[0](self.first(X)))
        return torch.relu(self.norms[1](self.second(h)) + self.skip(X))


class Transformer(nn.Module):
    """Four encoder layers of width 128 on 64 tokens of 256 kinds; classes second in the output."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.tokens, self.position = nn.Embedding(256, 128), nn.Parameter(0.02 * torch.randn(64, 128))
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 256)

    def forward(self, X):
        return self.head(self.body(self.tokens(X) + self.position)).movedim(-1, 1)


def _mlp(N):
    net = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return net, torch.randn(N, 784), torch.randint(10, (N,))


def _cnn(N):
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    return net, torch.randn(N, 1, 28, 28), torch.randint(10, (N,))


def _resnet(N):
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return net, torch.randn(N, 3, 32, 32), torch.randint(10, (N,))


def _resnet18(N):
    layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
    for inputs, outputs, stride in [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]:
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return net, torch.randn(N, 3, 32, 32), torch.randint(10, (N,))


def _transformer(N):
    return Transformer(), torch.randint(256, (N, 64)), torch.randint(256, (N, 64))


_MAKERS = {
    "mlp": (_mlp, 512), "cnn": (_cnn, 256), "resnet": (_resnet, 128), "resnet18": (_resnet18, 512),
    "transformer": (_transformer, 16),
}  # fmt: skip


def make(name, N=None):
    """Return a model and one batch for it."""
    torch.manual_seed(0)
    maker, usual = _MAKERS[name]
    net, X, y = maker(N or usual)
    # In training mode, for in eval mode encoder layers have a fused kernel that the peer cannot differentiate.
    return net, (X, y)
