"""Small models of every architecture that the tests use, with inputs and targets to go with them."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn

import fisherops as fo

KINDS = {
    "mc": fo.FisherMCLinearOperator,
    "exact": fo.FisherLinearOperator,
    "empirical": fo.EmpiricalFisherLinearOperator,
}
LOSSES = {"mse": nn.MSELoss, "ce": nn.CrossEntropyLoss, "bce": nn.BCEWithLogitsLoss}


class ClassesSecond(nn.Module):
    """Moves the last axis of the output to the second place, where cross-entropy has its classes."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, X):
        return self.body(X).movedim(-1, 1)


class Recurrent(nn.Module):
    def __init__(self, C, layer=nn.GRU):
        super().__init__()
        self.layer = layer(2, 3, batch_first=True)
        self.head = nn.Linear(3, C)

    def forward(self, X):
        return self.head(self.layer(X)[0])


class Attention(nn.Module):
    """Token and position embeddings, one encoder layer with fused attention, a head."""

    def __init__(self, C, length=3):
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.position = nn.Parameter(torch.randn(length, 4) * 0.1)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, C)

    def forward(self, X):
        return self.head(self.encoder(self.tokens(X) + self.position))


class Tied(nn.Module):
    """One weight used three times: twice by the same parameter, once by a second name."""

    def __init__(self, C):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(3, C)

    def forward(self, X):
        h = torch.tanh(self.inner(X))
        return self.head(torch.tanh(self.again(h)) @ self.inner.weight)


def _dense(C):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C))


def _convolutional(C):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, C))


def _image(C):
    """A convolutional model with one output for each pixel, classes second."""
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, C, 1))


_ARCHITECTURES = {
    # name: (make, draw inputs, whether an output has positions)
    "dense": (_dense, lambda n, g: torch.randn(n, 3, generator=g), False),
    "convolutional": (_convolutional, lambda n, g: torch.randn(n, 1, 4, 4, generator=g), False),
    "recurrent": (Recurrent, lambda n, g: torch.randn(n, 3, 2, generator=g), True),
    "attention": (Attention, lambda n, g: torch.randint(5, (n, 3), generator=g), True),
    "tied": (Tied, lambda n, g: torch.randn(n, 3, generator=g), False),
    "image": (_image, lambda n, g: torch.randn(n, 1, 2, 3, generator=g), True),
}
ARCHITECTURES = sorted(_ARCHITECTURES)


@dataclass
class Case:
    model: nn.Module
    loss: nn.Module
    data: list
    dtype: torch.dtype

    @property
    def params(self):
        return list(self.model.parameters())

    @property
    def D(self):
        return sum(p.numel() for p in self.params)


def make_case(architecture="dense", loss="ce", reduction="mean", sizes=(4, 3), dtype=torch.float64, C=3, seed=0):
    """Build a model, a loss and batches of the given sizes that fit each other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make, draw, positions = _ARCHITECTURES[architecture]
        model = make(C)
        if architecture == "image":
            model = model if loss == "ce" else ClassesLast(model)
        elif positions and loss == "ce":
            model = ClassesSecond(model)
        model = model.eval().to(dtype)
        g = torch.Generator().manual_seed(seed + 1)
        data = []
        for n in sizes:
            X = draw(n, g)
            X = X.to(dtype) if X.is_floating_point() else X
            data.append((X, targets(model, X, loss, g)))
    return Case(model, LOSSES[loss](reduction=reduction), data, dtype)


class ClassesLast(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, X):
        return self.body(X).movedim(1, -1)


def targets(model, X, loss, generator):
    """Draw targets that the loss takes for the model's outputs."""
    with torch.no_grad():
        f = model(X)
    if loss == "ce":
        return torch.randint(f.shape[1], f.shape[:1] + f.shape[2:], generator=generator)
    if loss == "bce":
        return torch.randint(2, f.shape, generator=generator).to(f.dtype)
    return torch.randn(f.shape, generator=generator, dtype=f.dtype)


def cases(fewest=1):
    """Draw a case of any architecture and loss, with batches of at most four data, at least some of them."""
    return st.builds(
        make_case,
        architecture=st.sampled_from(ARCHITECTURES),
        loss=st.sampled_from(sorted(LOSSES)),
        sizes=st.lists(st.integers(1, 4), min_size=fewest, max_size=3),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        seed=st.integers(0, 10**6),
    )
