"""A classifier of handwritten digits, trained on mini-batches."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fisherops as fo


def problem():
    """Return a model, its loss, and data to train and to test."""
    torch.manual_seed(0)
    X, y = load_digits(return_X_y=True)
    X = torch.tensor(X / 16, dtype=torch.float32)
    y, order = torch.tensor(y), torch.randperm(len(X))
    train, test = order[:1437], order[1437:]
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )
    loss = nn.CrossEntropyLoss()
    return model, loss, (X[train], y[train]), (X[test], y[test])


def epoch(X, y, size=128):
    """List the mini-batches of an epoch in random order."""
    for batch in torch.randperm(len(X)).split(size):
        yield X[batch], y[batch]


def accuracy(model, X, y):
    with torch.no_grad():
        return float((model(X).argmax(1) == y).double().mean())


def natural(model, loss):
    return fo.optim.NaturalGradient(
        model, loss, lr=0.5, damping=0.1, momentum=0.9
    )


if __name__ == "__main__":
    model, loss, train, test = problem()
    optimizer = natural(model, loss)
    for batch in epoch(*train):
        optimizer.step(batch)
    print(f"accuracy {accuracy(model, *test):.3f} after one epoch")
    assert accuracy(model, *test) > 0.9
