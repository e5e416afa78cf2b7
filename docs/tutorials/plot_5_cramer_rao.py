"""
A Cramér-Rao bound
==================

How precisely can the parameters of a model be estimated from data with
noise? No unbiased estimate has a smaller covariance than F⁻¹, the
inverse of the Fisher information of all data. Here we compute the bound
for a decay, compare it with a simulation, and use it to choose when to
measure.
"""

# %%
# A decay in noise
# ----------------
# y = a exp(−b t) + noise of standard deviation 0.1, at forty times.
# With ``params`` a mapping the model may be any function of parameters
# and inputs, and it returns the distribution of the targets.

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy.optimize import curve_fit
from torch.distributions import Normal

import fisherops as fo
from fisherops.linalg import crlb

A, B, NOISE = 2.0, 0.7, 0.1
params = {
    "a": torch.tensor(A, dtype=torch.float64),
    "b": torch.tensor(B, dtype=torch.float64),
}


def decay(p, t):
    return Normal(p["a"] * torch.exp(-p["b"] * t), NOISE)


def information(t):
    # The targets do not matter for the exact Fisher.
    return fo.FisherLinearOperator(
        decay, None, params, data=(t[:, None], np.zeros((len(t), 1)))
    )


t = np.linspace(0, 3, 40)
bounds = crlb(information(t))
for name, deviation in zip(
    bounds.names, bounds.standard_deviation, strict=True
):
    print(f"{name}: standard deviation of at least {deviation:.4f}")

# %%
# The textbook's formula is the same: the information is JᵀJ / σ² with J
# the derivatives of the mean.

J = np.stack([np.exp(-B * t), -A * t * np.exp(-B * t)], 1)
np.testing.assert_allclose(
    bounds.covariance, np.linalg.inv(J.T @ J / NOISE**2), rtol=1e-8
)

# %%
# A simulation
# ------------
# Two thousand data sets are drawn and fitted by least squares, the
# maximum-likelihood estimate here. Their spread should come close to
# the bound, as there are many data for two parameters.

rng = np.random.default_rng(0)
means = A * np.exp(-B * t)
estimates = np.array(
    [
        curve_fit(
            lambda t, a, b: a * np.exp(-b * t),
            t,
            means + NOISE * rng.standard_normal(len(t)),
            p0=(1, 1),
        )[0]
        for _ in range(2000)
    ]
)
spread = np.cov(estimates.T)
ratio = np.sqrt(np.diag(spread)) / bounds.standard_deviation
print("standard deviations of the estimates / bounds:", ratio.round(3))
# The standard error of 2,000 estimates is 1.6 %; five times that.
assert np.abs(ratio - 1).max() < 0.08

values, vectors = np.linalg.eigh(bounds.covariance)
angle = np.linspace(0, 2 * np.pi, 200)
circle = np.stack([np.cos(angle), np.sin(angle)])
ellipse = vectors @ (np.sqrt(values)[:, None] * circle)
figure, ax = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
ax.plot(
    *estimates.T,
    ".",
    color="#767676",
    markersize=2.5,
    alpha=0.5,
    label="2,000 estimates",
)
for radius, style in ((1, "-"), (2, "--")):
    label = (
        f"bound, {radius} standard deviation{'s' if radius > 1 else ''}"
    )
    a, b = A + radius * ellipse[0], B + radius * ellipse[1]
    ax.plot(
        a, b, color="#D55E00", linestyle=style, linewidth=2, label=label
    )
ax.plot(
    A,
    B,
    "+",
    color="#0072B2",
    markersize=14,
    markeredgewidth=2.5,
    label="truth",
)
ax.set_xlabel("a")
ax.set_ylabel("b")
ax.grid(alpha=0.25, linewidth=0.6)
ax.spines[["top", "right"]].set_visible(False)
_ = ax.legend(frameon=True, loc="upper left")

# %%
# Functions of the parameters
# ---------------------------
# The half-life log 2 / b is not linear in b; its bound follows from its
# gradient.

half_life = crlb(
    information(t), of={"half-life": {"b": -np.log(2) / B**2}}
)
simulated = np.std(np.log(2) / estimates[:, 1])
print(
    f"half-life: bound {half_life.standard_deviation[0]:.4f}, "
    f"simulated {simulated:.4f}"
)
assert abs(simulated / half_life.standard_deviation[0] - 1) < 0.08

# %%
# When to measure
# ---------------
# The bound needs no data, so an experiment can be planned with it.
# Forty measurements are made half at time zero and half at one later
# time: which?

later = np.linspace(0.1, 6, 60)
deviations = np.array(
    [
        crlb(
            information(np.r_[np.zeros(20), np.full(20, s)])
        ).standard_deviation
        for s in later
    ]
)
best = later[deviations[:, 1].argmin()]
print(
    f"b is known best, to {deviations[:, 1].min():.4f}, "
    f"with the later time {best:.1f}; 1/b is {1 / B:.2f}"
)
figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
ax.plot(
    later, deviations[:, 0], color="#0072B2", linewidth=2, label="a"
)
ax.plot(
    later,
    deviations[:, 1],
    color="#D55E00",
    linewidth=2,
    linestyle="--",
    label="b",
)
ax.axhline(
    bounds.standard_deviation[1],
    color="#767676",
    linewidth=1.2,
    linestyle=":",
)
ax.annotate(
    "b, with 40 times from 0 to 3",
    (6, bounds.standard_deviation[1]),
    ha="right",
    va="bottom",
)
ax.set_yscale("log")
ax.set_xlabel("the later time")
ax.set_ylabel("least standard deviation")
ax.grid(alpha=0.25, linewidth=0.6)
ax.spines[["top", "right"]].set_visible(False)
_ = ax.legend(frameon=False)
assert deviations[:, 1].min() < bounds.standard_deviation[1]

# %%
# What cannot be estimated
# ------------------------
# If all measurements are made at one time, a and b cannot be told
# apart. The bound is then infinite, and the result names the direction
# in which the parameters can move without a trace.

same = crlb(information(np.full(40, 1.0)))
print(same.standard_deviation, same.unidentifiable)
assert np.isinf(same.standard_deviation).all()
assert same.nullity == 1
