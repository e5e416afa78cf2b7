"""The ground state of a spin chain, by a sampled wave function."""

import itertools
import math

import torch
from torch import nn

import fisherops as fo

SITES = 10


class WaveFunction(nn.Module):
    """log ψ(s), the same for all translations of the spins s = ±1."""

    def __init__(self, width):
        super().__init__()
        self.hidden = nn.Linear(SITES, width).double()
        nn.init.normal_(self.hidden.weight, std=0.02)
        self.constant = nn.Parameter(torch.zeros(1).double())

    def forward(self, s):
        shifted = torch.stack([s.roll(k, 1) for k in range(SITES)], 1)
        features = torch.log(torch.cosh(self.hidden(shifted)))
        return features.sum((1, 2))[:, None] + self.constant


def flipped(s):
    """Return s with each of its spins flipped, (..., SITES, SITES)."""
    return s[..., None, :] * (1 - 2 * torch.eye(SITES).double())


@torch.no_grad()
def local_energy(psi, s):
    """Return (Hψ)(s)/ψ(s) for H = −Σ σᶻᵢ σᶻᵢ₊₁ − Σ σˣᵢ."""
    neighbors = psi(flipped(s).flatten(0, 1)).view(len(s), SITES)
    ratios = torch.exp(neighbors - psi(s))
    return -(s * s.roll(-1, 1)).sum(1) - ratios.sum(1)


@torch.no_grad()
def metropolis(psi, s, sweeps):
    """Continue Markov chains s of the distribution ψ² by flips."""
    log_psi = psi(s)
    for _ in range(sweeps * SITES):
        site = torch.randint(SITES, (len(s),))
        proposed = flipped(s)[torch.arange(len(s)), site]
        new = psi(proposed)
        accepted = torch.rand_like(new).log() < 2 * (new - log_psi)
        s = torch.where(accepted, proposed, s)
        log_psi = torch.where(accepted, new, log_psi)
    return s


def batch(psi, s):
    """Return a batch with the gradient of the energy as residuals."""
    energy = local_energy(psi, s)
    with torch.no_grad():
        return s, psi(s) - (energy - energy.mean())[:, None]


def all_states():
    signs = itertools.product([-1.0, 1.0], repeat=SITES)
    return torch.tensor(list(signs), dtype=torch.float64)


def true_energy(psi):
    """Return the energy of ψ, by all states."""
    s = all_states()
    with torch.no_grad():
        weights = (2 * psi(s)[:, 0]).softmax(0)
    return float(weights @ local_energy(psi, s))


# Of the transverse-field Ising chain at the critical field.
GROUND = -2 / math.sin(math.pi / (2 * SITES))


def natural(psi):
    return fo.optim.NaturalGradient(
        psi,
        nn.MSELoss(),
        lr=0.1,
        damping=lambda k: max(0.1 * 0.95**k, 1e-3),
    ).step


def train(steps, width=8, chains=500, step_of=natural):
    """Yield the wave function after each step."""
    torch.manual_seed(0)
    psi = WaveFunction(width)
    step = step_of(psi)
    s = torch.randint(2, (chains, SITES)).double() * 2 - 1
    for k in range(steps):
        s = metropolis(psi, s, sweeps=3 if k else 20)
        step(batch(psi, s))
        yield psi


if __name__ == "__main__":
    *_, psi = train(30, width=6, chains=300)
    error = (true_energy(psi) - GROUND) / abs(GROUND)
    print(f"relative error of the energy {error:.1e}")
    assert 0 < error < 1e-3
