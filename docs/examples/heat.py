"""The heat equation in one dimension, as least squares."""

import math

import torch
from torch import nn

import fisherops as fo


class Residuals(nn.Module):
    """Residuals of u_t = u_xx / 4 inside and of given values."""

    def __init__(self, width):
        super().__init__()
        self.u = nn.Sequential(
            nn.Linear(2, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        )

    def forward(self, X):
        x, weights = X[:, :2].requires_grad_(), X[:, 2:]
        with torch.enable_grad():
            u = self.u(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (dux,) = torch.autograd.grad(
                du[:, 1].sum(), x, create_graph=True
            )
        inside = (du[:, 0] - dux[:, 1] / 4)[:, None]
        return weights[:, :1] * inside + weights[:, 1:] * (
            u - solution(x)
        )


def solution(x):
    t, x = x.T
    decay = torch.exp(-(math.pi**2) * t / 4)
    return (decay * torch.sin(math.pi * x))[:, None]


def problem(width=20, interior=600, boundary=200):
    """Return a model, its loss, the data and the relative error."""
    torch.manual_seed(0)
    x = torch.rand(interior + boundary, 2, dtype=torch.float64)
    first, second, third = x[interior:].tensor_split(3)
    first[:, 0], second[:, 1], third[:, 1] = 0, 0, 1
    weights = torch.zeros(len(x), 2, dtype=torch.float64)
    weights[:interior, 0] = interior**-0.5
    weights[interior:, 1] = boundary**-0.5
    test = torch.rand(4000, 2, dtype=torch.float64)
    model = Residuals(width).double()

    def error():
        with torch.no_grad():
            exact = solution(test)
            return float((model.u(test) - exact).norm() / exact.norm())

    data = torch.cat([x, weights], 1), torch.zeros_like(x[:, :1])
    return model, nn.MSELoss(reduction="sum"), data, error


if __name__ == "__main__":
    model, loss, data, error = problem(10, interior=150, boundary=60)
    optimizer = fo.optim.NaturalGradient(model, loss)
    for _ in range(30):
        optimizer.step(data)
    print(f"relative error {error():.1e}")
    assert error() < 0.05
