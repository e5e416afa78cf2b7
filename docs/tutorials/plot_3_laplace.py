"""
Uncertainty of predictions by Laplace's approximation
=====================================================

A trained network gives one prediction. How sure are we of it? Laplace's
approximation takes the posterior of the parameters for a Gaussian
around the trained ones. With the Fisher in place of the Hessian (here
it is the generalized Gauss-Newton matrix, so positive semi-definite)
its covariance is

.. math:: \\Sigma = (F + \\tau I)^{-1},

with F the Fisher of the *sum* over the data and τ the precision of a
Gaussian prior. The variance of an output with the Jacobian J is then J
Σ Jᵀ (MacKay, 1992).
"""

# %%
# Data with a gap
# ---------------
# The noise has a standard deviation of 0.1, which we take as known, so
# the model returns a distribution.

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.distributions import Normal

import fisherops as fo
from fisherops import linalg

torch.manual_seed(0)
NOISE, PRIOR = 0.1, 1.0
truth = torch.sin
X = torch.cat(
    [torch.rand(60) * 2 - 3, torch.rand(60) * 2 + 1]
).double()[:, None]
y = truth(2 * X) + NOISE * torch.randn(X.shape, dtype=torch.float64)

net = nn.Sequential(
    nn.Linear(1, 20),
    nn.Tanh(),
    nn.Linear(20, 20),
    nn.Tanh(),
    nn.Linear(20, 1),
).double()


class WithNoise(nn.Module):
    """The distribution of the targets."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, X):
        return Normal(self.net(X), NOISE)


model = WithNoise(net)

# %%
# Train to the mode of the posterior
# ----------------------------------
# −log posterior = −Σ log q(y | f) + ½ τ ‖θ‖² + const.

optimizer = torch.optim.LBFGS(
    model.parameters(),
    max_iter=2000,
    line_search_fn="strong_wolfe",
    tolerance_change=1e-12,
)


def objective():
    optimizer.zero_grad()
    value = -model(X).log_prob(y).sum() + 0.5 * PRIOR * sum(
        p.square().sum() for p in model.parameters()
    )
    value.backward()
    return value


optimizer.step(objective)
residual = (net(X) - y).square().mean().sqrt().item()
print(f"root mean square residual {residual:.3f}, noise {NOISE}")
assert residual < 1.3 * NOISE

# %%
# The covariance as an operator
# -----------------------------
# ``inv`` is (F + τI)⁻¹ as a SciPy operator whose factorization is kept.
# It is never written out as a matrix.

op = fo.FisherLinearOperator(model, None, data=(X, y))
covariance = linalg.inv(op, damping=PRIOR)
print(covariance.shape, "by", covariance.method)

# %%
# The Jacobian of the predictions on a grid, one row for each point, by
# ``torch.func``. The names of the operator's parameters are in the
# order of its flat vector.

grid = torch.linspace(-4.5, 4.5, 181, dtype=torch.float64)[:, None]
parameters = {name: p.detach() for name, p in net.named_parameters()}


def predict(parameters):
    return torch.func.functional_call(net, parameters, (grid,))[:, 0]


jacobians = torch.func.jacrev(predict)(parameters)
J = torch.cat(
    [
        jacobians[name.removeprefix("net.")].reshape(len(grid), -1)
        for name in op.parameter_shapes
    ],
    1,
)
variance = (J * (covariance @ J.T).T).sum(1)

# %%
# Check it against dense linear algebra:

dense = np.linalg.inv(op.todense() + PRIOR * np.eye(op.shape[0]))
np.testing.assert_allclose(
    variance, np.einsum("nd,de,ne->n", J, dense, J), rtol=1e-6
)

# %%
# The picture
# -----------
# The band is two standard deviations of the function. It is narrow
# where there are data and wide where there are none.

mean, deviation = (
    net(grid).detach().numpy()[:, 0],
    variance.sqrt().numpy(),
)
x = grid.numpy()[:, 0]
figure, ax = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
ax.fill_between(
    x,
    mean - 2 * deviation,
    mean + 2 * deviation,
    color="#56B4E9",
    alpha=0.45,
    label="± 2 standard deviations",
)
ax.plot(x, mean, color="#0072B2", linewidth=2, label="prediction")
ax.plot(
    x,
    np.sin(2 * x),
    color="#404040",
    linestyle="--",
    linewidth=1.2,
    label="truth",
)
ax.plot(
    X.numpy(),
    y.numpy(),
    ".",
    color="#D55E00",
    markersize=5,
    label="data",
)
ax.set_ylim(-4, 4)
ax.set_xlabel("x")
ax.set_ylabel("y")
ax.grid(alpha=0.25, linewidth=0.6)
ax.spines[["top", "right"]].set_visible(False)
_ = ax.legend(frameon=False, ncols=2, loc="upper center")

inside = ((x > -3) & (x < -1)) | ((x > 1) & (x < 3))
gap = np.abs(x) < 0.5
medians = np.median(deviation[inside]), np.median(deviation[gap])
print(
    f"median standard deviation: among the data {medians[0]:.3f}, "
    f"in the gap {medians[1]:.3f}"
)
assert medians[1] > 3 * medians[0]

# %%
# The approximation is linear in the parameters, so it is good close to
# the data and a guess far away from them.
#
# The evidence
# ------------
# The same factorization gives the log-determinant that the evidence of
# the model needs, to compare priors or architectures: log p(y) ≈ Σ log
# q(y | f) − ½ τ ‖θ‖² + ½ D log τ − ½ log det(F + τI).

log_det = linalg.slogdet(op, damping=PRIOR)
fit = (
    model(X).log_prob(y).sum().item()
    - 0.5
    * PRIOR
    * sum(p.square().sum() for p in model.parameters()).item()
)
evidence = (
    fit + 0.5 * op.shape[0] * np.log(PRIOR) - 0.5 * log_det.logabsdet
)
print(
    f"log det {log_det.logabsdet:.2f} ({log_det.method}), "
    f"log evidence {evidence:.1f}"
)
dense = op.todense() + PRIOR * np.eye(op.shape[0])
np.testing.assert_allclose(
    log_det.logabsdet, np.linalg.slogdet(dense)[1], rtol=1e-8
)
dimension = float(linalg.effective_dimension(op, PRIOR))
print(f"effective dimension {dimension:.1f} of {op.shape[0]}")
