"""Models whose output is the log-density of the data: flows, energies, autoregressive models."""

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from torch import nn
from torch.distributions import Normal

import fisherops as fo
from fisherops.likelihoods import LogDensity


class Flow(nn.Module):
    """A normalizing flow of two dimensions: an affine coupling, and a scale."""

    def __init__(self):
        super().__init__()
        self.coupling = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.log_scale = nn.Parameter(torch.tensor([0.2, -0.3], dtype=torch.float64))

    def forward(self, X):
        shift, log_scale = self.coupling(X[:, :1]).T
        z = torch.stack([X[:, 0], X[:, 1] * log_scale.exp() + shift], 1) * self.log_scale.exp()
        normal = Normal(torch.zeros((), dtype=X.dtype), 1.0)
        return normal.log_prob(z).sum(1) + log_scale + self.log_scale.sum()

    @torch.no_grad()
    def sample(self, count):
        z = torch.randn(count, 2, dtype=torch.float64) / self.log_scale.exp()
        shift, log_scale = self.coupling(z[:, :1]).T
        return torch.stack([z[:, 0], (z[:, 1] - shift) / log_scale.exp()], 1)


def scores_of(model, X):
    """Return the gradients of log p(x) by a plain loop, (N, D)."""
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(model(x[None]).sum(), parameters) for x in X]
    return torch.stack([torch.cat([g.flatten() for g in own]) for own in gradients]).numpy()


@pytest.mark.parametrize("cache", ["auto", "scores", "linearization", "none"])
@pytest.mark.parametrize("rows", ["term", "datum"])
def test_the_empirical_fisher_of_a_flow(rows, cache):
    flow = Flow()
    X = torch.randn(11, 2, dtype=torch.float64)
    G = scores_of(flow, X)
    options = {"rows": rows, "cache": cache, "batch_size": 4}
    op = fo.EmpiricalFisherLinearOperator(flow, LogDensity(), data=(X, X), **options)
    np.testing.assert_allclose(op.todense(), G.T @ G, atol=1e-12)
    np.testing.assert_allclose(op.scores @ np.eye(len(G.T)), -G, atol=1e-12)
    mean = fo.EmpiricalFisherLinearOperator(flow, LogDensity("mean"), data=(X, X), **options)
    np.testing.assert_allclose(mean @ np.ones(len(G.T)), G.T @ G.sum(1) / 11, atol=1e-12)


def test_it_is_the_empirical_fisher_of_the_distribution():
    """A model may return a distribution of targets, or their log-density."""
    net = nn.Linear(3, 2).double()
    X, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, dtype=torch.float64)

    def distribution(X):
        loc, scale = net(X).unbind(1)
        return Normal(loc, scale.exp())

    parameters = list(net.parameters())
    expected = fo.EmpiricalFisherLinearOperator(distribution, None, parameters, data=(X, y)).todense()
    op = fo.EmpiricalFisherLinearOperator(
        lambda b: distribution(b["X"]).log_prob(b["y"]), LogDensity(), parameters, data=[({"X": X, "y": y}, y)]
    )
    np.testing.assert_allclose(op.todense(), expected, rtol=1e-10, atol=1e-12)


def test_samples_of_the_model_give_its_fisher():
    """The flow's Fisher by many samples is that by others, and Kullback-Leibler divergences have its curvature."""
    torch.manual_seed(3)
    flow, N = Flow(), 4000
    X = flow.sample(N)
    op = fo.EmpiricalFisherLinearOperator(flow, LogDensity("mean"), data=(X, X))
    # The scale of the first dimension is that of a normal variable: its information is E[(1 − z²)²] = 2.
    place = [name for name, _ in flow.named_parameters()].index("log_scale")
    assert place == 0
    spread = np.std((scores_of(flow, X[:200])[:, 0]) ** 2)
    assert abs(op.diagonal()[0] - 2) < 5 * spread / N**0.5
    # Scores have zero mean at samples of the model.
    G = op.scores @ np.eye(op.shape[0]) * N**0.5
    z = G.mean(0) / (G.std(0) / N**0.5)
    assert np.abs(z).max() < 5
    # ½ δᵀFδ is the divergence of a model whose parameters are δ apart.
    delta = 0.005 * np.random.default_rng(0).standard_normal(op.shape[0])
    with torch.no_grad():
        before = flow(X)
        for p, d in zip(
            flow.parameters(), np.split(delta, np.cumsum([p.numel() for p in flow.parameters()])[:-1]), strict=True
        ):
            p.add_(torch.from_numpy(d).view(p.shape))
        difference = (before - flow(X)).numpy()
    curvature = (G @ delta) ** 2 / 2
    # The first order of the divergence is zero in expectation and noise in the mean over samples.
    difference = difference - G @ delta
    error = (difference - curvature).std() / N**0.5
    assert abs(difference.mean() - curvature.mean()) < 5 * error
    assert error < 0.1 * curvature.mean()


def test_one_term_for_each_element():
    """Log-probabilities of tokens: rows by token, or summed over the tokens of a sequence."""
    net = nn.Embedding(5, 5).double()
    X = torch.randint(5, (4, 6))

    def log_density(X):
        return net(X[:, :-1]).log_softmax(-1).gather(-1, X[:, 1:, None])[..., 0]

    parameters = [net.weight]
    rows = [
        torch.autograd.grad(value, net.weight, retain_graph=True)[0].flatten() for value in log_density(X).flatten()
    ]
    G = torch.stack(rows).numpy()
    for name, expected in (("term", G), ("datum", G.reshape(4, 5, -1).sum(1))):
        op = fo.EmpiricalFisherLinearOperator(log_density, LogDensity(), parameters, data=(X, X), rows=name)
        assert op.scores.shape[0] == len(expected)
        np.testing.assert_allclose(op.todense(), expected.T @ expected, atol=1e-12)
    loss = nn.CrossEntropyLoss(reduction="sum")
    same = fo.EmpiricalFisherLinearOperator(
        lambda X: net(X).movedim(-1, 1), loss, parameters, data=(X[:, :-1], X[:, 1:]), rows="datum"
    )
    np.testing.assert_allclose(same.todense(), op.todense(), atol=1e-12)


def test_an_energy_needs_centered_scores():
    """For f = log p + log Z the Fisher is the covariance of ∇f over samples of the model."""
    precision = torch.tensor([2.0, 0.5], dtype=torch.float64)
    X = torch.randn(20_000, 2, dtype=torch.float64) / precision.sqrt()
    op = fo.EmpiricalFisherLinearOperator(
        lambda p, X: -(p["precision"] * X**2).sum(1) / 2, LogDensity("mean"), {"precision": precision}, data=(X, X)
    )
    mean = op.scores.T @ np.ones(len(X)) / len(X) ** 0.5
    centered = op - sla.aslinearoperator(np.outer(mean, mean))
    # That of the normalized density: ½ / precision², and three times as much is uncentered.
    exact = 0.5 / precision.numpy() ** 2
    np.testing.assert_allclose(np.diag(centered @ np.eye(2)), exact, rtol=0.1)
    assert op.diagonal()[0] > 1.4 * exact[0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            fo.FisherMCLinearOperator,
            "the Monte-Carlo Fisher is not defined for LogDensity: .* nothing that targets can",
        ),
        (
            fo.FisherLinearOperator,
            "the exact Fisher is not defined for LogDensity: .* distribution to take the expecta",
        ),
    ],
)
def test_other_fishers_are_refused_with_the_cure(kind, reason):
    X = torch.randn(5, 2, dtype=torch.float64)
    op = kind(Flow(), LogDensity(), data=(X, X))
    with pytest.raises(NotImplementedError, match=reason + ".*the empirical Fisher of samples of the model is its Mon"):
        op.trace()


def test_what_is_no_log_density():
    X = torch.randn(5, 2, dtype=torch.float64)
    flow = Flow()
    parameters = list(flow.parameters())
    with pytest.raises(ValueError, match="the model must return outputs with a batch axis, got a 0-d tensor"):
        fo.EmpiricalFisherLinearOperator(lambda X: flow(X).sum(), LogDensity(), parameters, data=(X, X))
    with pytest.raises(TypeError, match="the model must return one tensor for this loss, got Normal"):
        fo.EmpiricalFisherLinearOperator(lambda X: Normal(flow(X), 1.0), LogDensity(), parameters, data=(X, X))
    with pytest.raises(ValueError, match="reduction='none'"):
        LogDensity("none")
