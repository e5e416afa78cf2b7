"""Natural-gradient steps on fresh batches by the public parts: what the first batch taught is used for all others."""

import numpy as np
import torch
from test_facts import Counts, counted
from torch import nn

import fisherops as fo

DAMPING, RATE, STEPS = 0.1, 0.3, 12


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, X):
        self.calls += 1
        return self.layers(X)


def direction_of(model, loss, G, batch, seed):
    """Return the loss of a batch, its gradient g, and (F + λI)⁻¹ g by the Gram matrix of the batch's own scores."""
    value = loss(model(batch[0]), batch[1])
    g = torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))])
    Q = G.on(batch, reduction="mean", seed=seed)
    K = torch.from_numpy(Q.gram())
    w = torch.linalg.solve(K + DAMPING * torch.eye(len(K), dtype=K.dtype), Q @ g)
    return float(value.detach()), g, (g - Q.T @ w) / DAMPING


def test_a_loop_learns_once():
    torch.manual_seed(0)
    model, loss = Model().double(), nn.CrossEntropyLoss()
    teacher = nn.Linear(6, 3).double()
    batches = [(X, teacher(X).argmax(1)) for X in torch.randn(STEPS, 32, 6, dtype=torch.float64)]
    G = fo.FisherMCLinearOperator(model, loss, data=batches[0], check_deterministic=False).scores
    losses, counts = [], Counts()
    for k, batch in enumerate(batches):
        model.calls = 0
        with counted(counts):
            value, g, direction = direction_of(model, loss, G, batch, seed=k)
        # One call for the gradient, one for the rows, and one that the outputs of the latter are compared with.
        assert model.calls <= 3
        losses.append(value)
        if k in (0, STEPS - 1):
            fresh = fo.FisherMCLinearOperator(model, loss, data=batch, seed=k)
            np.testing.assert_allclose(fresh.damped(DAMPING) @ direction.numpy(), g, rtol=1e-7, atol=1e-10)
        with torch.no_grad():
            sizes = [p.numel() for p in model.parameters()]
            for p, part in zip(model.parameters(), direction.split(sizes), strict=True):
                p -= RATE * part.view_as(p)
    assert (counts.builds, counts.known_builds) == (STEPS, STEPS)  # the scores of the first batch taught all
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
