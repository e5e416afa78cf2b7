"""The demonstration: a small convolutional network trained on scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_HELD_OUT, _HARDEST = 360, 6
_EPOCHS = 20
_SEED = 0


class Demo(NamedTuple):
    """A trained model, its training data, the held-out data, and the accuracy on these."""

    model: nn.Module
    X: Tensor
    y: Tensor
    held_out: tuple[Tensor, Tensor]
    held_out_accuracy: float


def train(report: Callable[[str], None]) -> Demo:
    """Train the network with fixed random numbers and one thread.

    The global random state and the number of threads are restored afterwards.

    Parameters
    ----------
    report : callable
        ``report(text)`` is called before the import of scikit-learn and at the beginning of each epoch.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    report("importing scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(_SEED).permutation(len(digits.target))
    X = torch.from_numpy(digits.images[order] / 16).float().unsqueeze(1)
    y = torch.from_numpy(digits.target[order])
    X, y, X_test, y_test = X[_HELD_OUT:], y[_HELD_OUT:], X[:_HELD_OUT], y[:_HELD_OUT]
    threads = torch.get_num_threads()
    # The batches are so small that several threads mostly wait for each other, above all on a busy machine.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(_SEED)
            model = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(128, 10),
            )  # fmt: skip
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
            for epoch in range(_EPOCHS):
                report(f"epoch {epoch + 1} of {_EPOCHS}")
                for batch in torch.split(torch.randperm(len(X)), 64):
                    optimizer.zero_grad()
                    torch.autograd.backward(nn.functional.cross_entropy(model(X[batch]), y[batch]))
                    optimizer.step()
        model.eval()
        model.zero_grad()
        with torch.no_grad():
            accuracy = (model(X_test).argmax(1) == y_test).float().mean().item()
    finally:
        torch.set_num_threads(threads)
    return Demo(model, X, y, (X_test, y_test), accuracy)


def hardest(model: nn.Module, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the examples with the largest losses, in their order."""
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(X), y, reduction="none")
    chosen = losses.topk(_HARDEST).indices
    return X[chosen], y[chosen]
