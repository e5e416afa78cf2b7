"""A sum of three exponentials, whose rates are hard to tell apart."""

import torch
from torch import nn

import fisherops as fo


class Exponentials(nn.Module):
    """Σ a_k exp(−b_k t), with positive rates b."""

    def __init__(self, amplitudes, rates):
        super().__init__()
        self.amplitudes = nn.Parameter(torch.tensor(amplitudes))
        self.log_rates = nn.Parameter(torch.tensor(rates).log())

    def forward(self, t):
        return torch.exp(-t * self.log_rates.exp()) @ self.amplitudes


def problem():
    """Return a model, its loss, the data and the error of rates."""
    true = Exponentials([1.0, 2.0, 1.0], [0.3, 1.0, 4.0]).double()
    t = torch.linspace(0, 8, 200, dtype=torch.float64)[:, None]
    model = Exponentials([1.0, 1.0, 1.0], [0.5, 1.5, 2.0]).double()

    def error():
        difference = model.log_rates - true.log_rates
        return float(difference.detach().abs().max())

    return model, nn.MSELoss(), (t, true(t).detach()), error


if __name__ == "__main__":
    model, loss, data, error = problem()
    optimizer = fo.optim.NaturalGradient(model, loss)
    for _ in range(40):
        optimizer.step(data)
    print(f"relative error of the rates {error():.1e}")
    assert error() < 1e-5
