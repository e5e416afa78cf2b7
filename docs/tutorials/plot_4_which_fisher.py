"""
Which Fisher? Monte Carlo, exact and empirical in pictures
==========================================================

Three matrices go by the name of Fisher. They differ in where the labels
come from: the *exact* Fisher takes the expectation over labels that the
model itself would give, the *Monte-Carlo* Fisher a few draws of such
labels, and the *empirical* Fisher the labels that were observed. The
first two agree in the limit. The third is something else.
"""

# %%
# A model with two parameters
# ---------------------------
# A straight line is fitted to points, by slope and offset, so that
# matrices are 2 × 2 and can be drawn as ellipses vᵀFv = 1. The points
# lie on a parabola: the model is wrong, as models are.

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn

import fisherops as fo

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"

rng = np.random.default_rng(0)
x = np.linspace(-1, 1.6, 60)[:, None]
targets = 1.5 * x**2 + 0.2 * rng.standard_normal(x.shape)
line = nn.Linear(1, 1).double()
slope, offset = np.polyfit(x[:, 0], targets[:, 0], 1)
with torch.no_grad():
    line.weight.fill_(slope)
    line.bias.fill_(offset)

loss = nn.MSELoss()
exact = fo.FisherLinearOperator(line, loss, data=(x, targets))
empirical = fo.EmpiricalFisherLinearOperator(
    line, loss, data=(x, targets)
)


def sampled(samples, seed):
    return fo.FisherMCLinearOperator(
        line, loss, data=(x, targets), mc_samples=samples, seed=seed
    )


print("exact\n", exact.todense().round(3))
print("empirical\n", empirical.todense().round(3))

# %%
# For MSE the exact Fisher does not depend on the labels at all: it is 2
# Jᵀ J / N, which is the Hessian of the loss here.

design = np.hstack([x, np.ones_like(x)])
np.testing.assert_allclose(
    exact.todense(), 2 * design.T @ design / len(x), rtol=1e-10
)


def ellipse(F):
    """Points v with vᵀFv = 1."""
    angle = np.linspace(0, 2 * np.pi, 200)
    values, vectors = np.linalg.eigh(F)
    return vectors @ (
        np.stack([np.cos(angle), np.sin(angle)])
        / np.sqrt(values)[:, None]
    )


figure, axes = plt.subplots(
    1, 3, figsize=(10, 3.9), layout="constrained"
)
axes[0].plot(x, targets, ".", color=GREY)
axes[0].plot(x, line(torch.tensor(x)).detach(), color=BLUE, linewidth=2)
axes[0].set_title("data and model")
axes[0].set_xlabel("x")
axes[0].set_ylabel("y")
for ax, samples, title in zip(
    axes[1:],
    (1, 30),
    ("one draw per example", "thirty draws"),
    strict=True,
):
    ax.set_title(title)
    for seed in range(12):
        ax.plot(
            *ellipse(sampled(samples, seed).todense()),
            color=GREEN,
            linewidth=0.8,
            alpha=0.8,
        )
    ax.plot([], [], color=GREEN, label=f"Monte Carlo, M = {samples}")
    ax.plot(
        *ellipse(exact.todense()),
        color=BLUE,
        linewidth=2.2,
        label="exact",
    )
    ax.plot(
        *ellipse(empirical.todense()),
        color=ORANGE,
        linewidth=2.2,
        linestyle="--",
        label="empirical",
    )
    ax.set(
        xlim=(-1.25, 1.25),
        ylim=(-1.25, 1.95),
        xlabel="slope",
        ylabel="offset",
    )
    ax.legend(frameon=False, loc="upper center", fontsize=9)
    ax.set_aspect("equal")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)

# %%
# Draws scatter around the exact ellipse, the less the more there are.
# The empirical one has another shape: it weights each example by its
# squared residual, and residuals are largest at the ends, where the
# model is most wrong.
#
# How fast draws converge
# -----------------------
# The error of the Monte-Carlo Fisher falls as 1/√M. The distance of the
# empirical Fisher from the exact one is not an error that more draws
# would reduce.

numbers = np.array([1, 3, 10, 30, 100, 300, 1000])
E = exact.todense()
errors = [
    np.mean(
        [
            np.linalg.norm(sampled(M, seed).todense() - E)
            for seed in range(20)
        ]
    )
    / np.linalg.norm(E)
    for M in numbers
]
distance = np.linalg.norm(empirical.todense() - E) / np.linalg.norm(E)
rate = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
print(
    f"the error falls as M to the power of {rate:.2f}; "
    f"the empirical Fisher is off by {distance:.0%}"
)
assert -0.6 < rate < -0.4

figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
ax.loglog(
    numbers,
    errors,
    "o-",
    color=GREEN,
    label="Monte Carlo, mean of 20 seeds",
)
ax.loglog(
    numbers,
    errors[0] / np.sqrt(numbers),
    color=GREY,
    linestyle=":",
    label="first error / √M",
)
ax.axhline(
    distance,
    color=ORANGE,
    linestyle="--",
    linewidth=2,
    label="empirical",
)
ax.set_xlabel("samples M")
ax.set_ylabel("relative distance from the exact Fisher")
ax.grid(alpha=0.25, linewidth=0.6)
ax.spines[["top", "right"]].set_visible(False)
_ = ax.legend(frameon=False)

# %%
# The operator estimates this error by itself, for any direction, from
# the spread of its draws:

op = sampled(100, seed=0)
v = np.array([1.0, 0.0])
print(
    f"vᵀFv = {v @ (op @ v):.4f} ± {op.standard_error(v):.4f}, "
    f"exact {v @ (exact @ v):.4f}"
)
assert abs(v @ (op @ v) - v @ (exact @ v)) < 4 * op.standard_error(v)

# %%
# A classifier
# ------------
# The same for softmax regression with three classes, at parameters that
# fit well and at zero. Each picture is the matrix F itself, 9 × 9: two
# weights and a bias for each class.

torch.manual_seed(0)
centres = torch.tensor([[0.0, 1.2], [1.2, -0.6], [-1.2, -0.6]])
labels = torch.arange(3).repeat_interleave(100)
points = centres[labels] + 0.7 * torch.randn(300, 2)
classifier = nn.Linear(2, 3)
ce = nn.CrossEntropyLoss()

optimizer = torch.optim.LBFGS(
    classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe"
)


def closure():
    optimizer.zero_grad()
    value = ce(classifier(points), labels)
    value.backward()
    return value


def at_zero():
    with torch.no_grad():
        for p in classifier.parameters():
            p.zero_()


def matrices():
    kinds = {
        "exact": fo.FisherLinearOperator(
            classifier, ce, data=(points, labels)
        ),
        "Monte Carlo, M = 10": fo.FisherMCLinearOperator(
            classifier, ce, data=(points, labels), mc_samples=10
        ),
        "empirical": fo.EmpiricalFisherLinearOperator(
            classifier, ce, data=(points, labels)
        ),
    }
    return {name: op.todense() for name, op in kinds.items()}


found = {}
at_zero()
found["at zero"] = matrices()
optimizer.step(closure)
found["at the fit"] = matrices()

figure, axes = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
for row, (place, kinds) in zip(axes, found.items(), strict=True):
    largest = max(np.abs(F).max() for F in kinds.values())
    for ax, (name, F) in zip(row, kinds.items(), strict=True):
        image = ax.imshow(F, cmap="RdBu_r", vmin=-largest, vmax=largest)
        ax.set_title(f"{name}\n{place}", fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(image, ax=row, shrink=0.85)

for place, kinds in found.items():
    for name, F in kinds.items():
        off = np.linalg.norm(F - kinds["exact"]) / np.linalg.norm(
            kinds["exact"]
        )
        print(
            f"{place}, {name}: "
            f"relative distance from the exact Fisher {off:.1%}"
        )

# %%
# At zero, the model gives each class a third, far from the labels that
# the points have, and the empirical Fisher is far from the exact one.
# At the fit this model is nearly right: then the observed labels are
# nearly draws of its own, and the empirical Fisher comes near. That is
# the case in which it is an estimate of the Fisher, with one draw.

away = {
    place: np.linalg.norm(kinds["empirical"] - kinds["exact"])
    / np.linalg.norm(kinds["exact"])
    for place, kinds in found.items()
}
assert away["at zero"] > 2 * away["at the fit"]
