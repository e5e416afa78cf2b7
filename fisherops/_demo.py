"""The default of the command line: a small convolutional network trained on scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_HELD_OUT = 360
_EPOCHS = 20
_SEED = 0


class Demo(NamedTuple):
    """A trained model, the data it was trained on, and how well it does on the rest."""

    model: nn.Module
    X: Tensor
    y: Tensor
    held_out_accuracy: float


def train() -> Demo:
    """Train the network with fixed random numbers, leaving torch's global generator as it was.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(_SEED).permutation(len(digits.target))
    X = torch.from_numpy(digits.images[order] / 16).float().unsqueeze(1)
    y = torch.from_numpy(digits.target[order])
    X, y, X_test, y_test = X[_HELD_OUT:], y[_HELD_OUT:], X[:_HELD_OUT], y[:_HELD_OUT]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(_SEED)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
        for _ in range(_EPOCHS):
            for batch in torch.split(torch.randperm(len(X)), 64):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(model(X[batch]), y[batch]))
                optimizer.step()
    model.eval()
    model.zero_grad()
    with torch.no_grad():
        accuracy = (model(X_test).argmax(1) == y_test).float().mean().item()
    return Demo(model, X, y, accuracy)
