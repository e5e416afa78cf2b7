"""Poisson's equation in five dimensions, as least squares."""

import math

import torch
from torch import nn

import fisherops as fo


class Residuals(nn.Module):
    """Residuals of Δu = f inside and of u = g on the boundary."""

    def __init__(self, width):
        super().__init__()
        self.u = nn.Sequential(
            nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, X):
        x, weights = X[:, :5].requires_grad_(), X[:, 5:]
        with torch.enable_grad():
            u = self.u(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            laplacian = sum(
                torch.autograd.grad(d.sum(), x, create_graph=True)[0][
                    :, i
                ]
                for i, d in enumerate(du.T)
            )
        f = -(math.pi**2) * solution(x)
        inside, outside = laplacian[:, None] - f, u - solution(x)
        return weights[:, :1] * inside + weights[:, 1:] * outside


def solution(x):
    return torch.cos(math.pi * x).sum(1, keepdim=True)


def problem(width=32, interior=800, boundary=200):
    """Return a model, its loss, the data and the relative error."""
    torch.manual_seed(0)
    x = torch.rand(interior + boundary, 5, dtype=torch.float64)
    faces = torch.arange(interior, len(x))
    x[faces, torch.randint(5, (boundary,))] = torch.randint(
        2, (boundary,)
    ).double()
    weights = torch.zeros(len(x), 2, dtype=torch.float64)
    weights[:interior, 0] = interior**-0.5
    weights[interior:, 1] = 3 * boundary**-0.5
    test = torch.rand(4000, 5, dtype=torch.float64)
    model = Residuals(width).double()

    def error():
        with torch.no_grad():
            exact = solution(test)
            return float((model.u(test) - exact).norm() / exact.norm())

    data = torch.cat([x, weights], 1), torch.zeros_like(x[:, :1])
    return model, nn.MSELoss(reduction="sum"), data, error


if __name__ == "__main__":
    model, loss, data, error = problem(12, interior=150, boundary=60)
    optimizer = fo.optim.NaturalGradient(model, loss)
    for _ in range(30):
        optimizer.step(data)
    print(f"relative error {error():.1e}")
    assert error() < 0.3
