"""
Spectrum of a trained digit classifier
======================================

The eigenvalues of the Fisher matrix say how much the predictions of a
network change when its parameters move: along a unit eigenvector of F
by a small step ε, the Kullback-Leibler divergence between old and new
predictions is ½ ε² λ to second order. A few eigenvalues of a trained
classifier are large, and most are close to zero. Here we compute all of
them.
"""

# %%
# A model and its data
# --------------------
# A small network on scikit-learn's 1,797 handwritten digits of 8 × 8
# pixels. We keep a copy of it early in training, and one late.

import copy

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import nn

import fisherops as fo
from fisherops import linalg, plot

torch.manual_seed(0)
digits = load_digits()
X = torch.tensor(digits.data / 16, dtype=torch.float32)
y = torch.tensor(digits.target)

model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

models = {}
for epoch in range(1, 151):
    for batch in torch.randperm(len(X)).split(64):
        optimizer.zero_grad()
        loss(model(X[batch]), y[batch]).backward()
        optimizer.step()
    if epoch in (5, 150):
        models[epoch] = copy.deepcopy(model)
        accuracy = (model(X).argmax(1) == y).float().mean().item()
        print(f"after {epoch} epochs: training accuracy {accuracy:.3f}")
assert accuracy > 0.99

# %%
# The operator
# ------------
# ``FisherLinearOperator`` is the exact Fisher, here of the early
# network. A product with it needs no matrix of its size: it multiplies
# with the Jacobian, with a small matrix in output space, and with the
# transposed Jacobian. ``trace`` is exact.

op = fo.FisherLinearOperator(
    models[5], loss, data=(X, y), dtype="float64"
)
print(op.shape, op.dtype, f"trace {op.trace():.4f}")

# %%
# Some eigenvalues
# ----------------
# SciPy's ``eigsh`` takes the operator as it is.
# ``fisherops.linalg.eigsh`` gives the same, and chooses between the
# Gram matrix of the scores, F as a dense matrix, and products alone.
# Its residuals ‖F v − λ v‖ are computed, not estimated.

by_scipy = eigsh(op, k=10, return_eigenvectors=False)
found = linalg.eigsh(op, k=10)
print(
    f"by the {found.method} method:", found.eigenvalues[::-1].round(4)
)
print("largest residual", found.residuals.max())
np.testing.assert_allclose(
    np.sort(by_scipy), found.eigenvalues, rtol=1e-6
)

# %%
# The whole spectrum
# ------------------
# ``eigvalsh`` gives every eigenvalue. Their sum is the trace.

values = linalg.eigvalsh(op)
np.testing.assert_allclose(values.sum(), op.trace(), rtol=1e-10)
rows, D = op.scores.shape
threshold = plot.rank_threshold(values, D, op.dtype, rows)
ax = plot.spectrum(values, trace=op.trace(), threshold=threshold)
_ = ax.set_title("All eigenvalues after 5 epochs")

# %%
# Eigenvalues fall over many powers of ten, and a tenth of them has
# nearly all of the trace. The largest nine stand apart. With C = 10
# classes, C − 1 is the number of directions in which the logits of a
# softmax can change the prediction.

ordered = np.sort(values)[::-1]
for k in (9, len(values) // 10):
    print(
        f"the largest {k} of {len(values)} eigenvalues have "
        f"{ordered[:k].sum() / ordered.sum():.1%} of the trace"
    )
ratios = ordered[:30] / ordered[1:31]
print(
    "largest ratio of neighbours among the first 30: after number",
    ratios.argmax() + 1,
)
assert ratios.argmax() + 1 == 9
assert ordered[: len(values) // 10].sum() > 0.9 * ordered.sum()
ax = plot.spectrum(ordered[:30], trace=op.trace())
_ = ax.set_title("The largest 30")

# %%
# Early and late
# --------------
# How many eigenvalues are how large is the *density* of the spectrum.
# On the same grid the pictures can be compared: as predictions become
# certain, p (1 − p) goes to zero, and all of the Fisher with it.

late = fo.FisherLinearOperator(
    models[150], loss, data=(X, y), dtype="float64"
)
grid = np.geomspace(1e-12, 10, 53)
figure, axes = plt.subplots(
    2, 1, figsize=(7.2, 6.4), sharex=True, layout="constrained"
)
for ax, title, each in zip(
    axes,
    ("after 5 epochs", "after 150 epochs"),
    (op, late),
    strict=True,
):
    plot.density(linalg.spectral_density(each, grid), ax=ax)
    ax.set_title(title)
axes[0].set_xlabel("")
print(
    f"trace after 5 epochs {op.trace():.3f}, "
    f"after 150 {late.trace():.3f}"
)
medians = [np.median(linalg.eigvalsh(each)) for each in (op, late)]
print(
    f"median eigenvalue after 5 epochs {medians[0]:.1e}, "
    f"after 150 {medians[1]:.1e}"
)
assert late.trace() < op.trace() / 2
assert medians[1] < medians[0] / 2

# %%
# How many parameters do the data determine?
# ------------------------------------------
# Against a Gaussian prior of precision λ the *effective dimension* tr F
# (F + λI)⁻¹ counts the directions that the data determine better than
# the prior does. This takes the Fisher of the sum over the data.

total = fo.FisherLinearOperator(
    models[5],
    nn.CrossEntropyLoss(reduction="sum"),
    data=(X, y),
    dtype="float64",
)
for damping in (100.0, 1.0, 0.01):
    dimension = linalg.effective_dimension(total, damping)
    print(
        f"λ = {damping:g}: {float(dimension):.0f} "
        f"of {total.shape[0]} directions"
    )
