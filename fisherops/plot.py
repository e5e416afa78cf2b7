"""Pictures of Fisher matrices, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fisherops.approximate import Comparison
    from fisherops.linalg import Density

# Okabe and Ito's colors, which color-blind people can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#767676"
_COLORS = (_GREY, _BLUE, _ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def spectrum(
    eigenvalues: npt.ArrayLike, *, trace: float | None = None, threshold: float | None = None, ax: Axes | None = None
) -> Axes:
    """Plot eigenvalues by index on a logarithmic scale.

    Parameters
    ----------
    eigenvalues : array_like
        Eigenvalues of F, in any order; those that are not positive have no place on the scale and are left out.
    trace : float, optional
        Trace of F; with it, the cumulative share of the trace is drawn on a second axis.
    threshold : float, optional
        Eigenvalues below count as zero, see :func:`rank_threshold`; that region is shaded, and the numerical rank, the
        number of eigenvalues above, is marked.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
    """
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if ax is None:
        _, ax = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    values = np.sort(np.asarray(eigenvalues, dtype=float))[::-1]
    ranks = np.arange(1, len(values) + 1)
    positive = values > 0
    ax.set_yscale("log")
    ax.plot(
        ranks[positive],
        values[positive],
        "o-",
        color=_BLUE,
        markersize=4.5,
        linewidth=0.8,
        label="eigenvalue",
        zorder=3,
    )
    ax.set_xlabel("index")
    ax.set_ylabel("eigenvalue", color=_BLUE)
    ax.tick_params(axis="y", colors=_BLUE)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(axis="y", alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if threshold is not None and threshold > 0:
        _mark_rank(ax, values, threshold)
    if trace is not None and trace > 0:
        share: Any = ax.twinx()
        share.plot(
            ranks, np.cumsum(values) / trace, color=_ORANGE, linewidth=1.6, label="cumulative share of the trace"
        )
        share.set_ylim(0, 1.02)
        share.set_ylabel("cumulative share of the trace", color=_ORANGE)
        share.tick_params(axis="y", colors=_ORANGE)
        share.yaxis.set_major_formatter(PercentFormatter(1.0))
        share.spines[["top", "left"]].set_visible(False)
    return ax


def density(density: Density, *, ax: Axes | None = None) -> Axes:
    """Draw the expected numbers of eigenvalues in the bins of a grid, with a band of two standard errors.

    Parameters
    ----------
    density : fisherops.linalg.Density
        As of `fisherops.linalg.spectral_density`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Both axes are logarithmic where the grid is positive; counts go down to a tenth of an eigenvalue.
    """
    from matplotlib import pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    grid, counts, errors = (np.asarray(x, dtype=float) for x in (density.grid, density.counts, density.standard_error))
    least = 0.1
    if grid[0] > 0:
        ax.set_xscale("log")
    ax.set_yscale("log")
    if errors.any():
        low, high = np.maximum(counts - 2 * errors, least / 10), np.maximum(counts + 2 * errors, least / 10)
        ax.stairs(high, grid, baseline=low, fill=True, color=_BLUE, alpha=0.3, linewidth=0, label="± 2 standard errors")
    ax.stairs(
        np.maximum(counts, least / 10), grid, baseline=least / 10, color=_BLUE, linewidth=1.3, label="eigenvalues"
    )
    ax.set_xlim(grid[0], 1.2 * grid[-1])
    ax.set_ylim(least, 3 * max(1.0, (counts + 2 * errors).max()))
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("eigenvalues in the bin")
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    outside = f"{density.below:,.0f} below {grid[0]:.1e}"
    if density.above > 0.5:
        outside += f", {density.above:,.0f} above"
    ax.annotate(outside, (0.015, 0.975), xycoords="axes fraction", va="top", ha="left", fontsize=9, color="#404040")
    if errors.any():
        ax.legend(frameon=False, fontsize=9, loc="upper right")
    return ax


def approximations(table: Sequence[Comparison], *, ax: Axes | None = None) -> Axes:
    """Plot the iterations of conjugate gradients with each approximation by damping; the legend lists their errors.

    Parameters
    ----------
    table : list of fisherops.approximate.Comparison
        As of `fisherops.approximate.compare`. Systems that took too many iterations have no mark.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
    """
    from matplotlib import pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    ax.set_xscale("log")
    ax.set_yscale("log")
    for number, line in enumerate(table):
        points = [(damping, count) for damping, count in line.iterations.items() if count is not None]
        label = line.name if number == 0 and line.name == "none" else f"{line.name}, error {line.error.value:.2g}"
        color, mark = _COLORS[number % len(_COLORS)], "osD^vP*X"[number % 8]
        ax.plot(
            [x for x, _ in points], [max(y, 1) for _, y in points], f"{mark}-", color=color, label=label, linewidth=1
        )
    ax.invert_xaxis()
    ax.set_xlabel("damping λ")
    ax.set_ylabel("iterations of conjugate gradients")
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    return ax


def influence(
    scores: npt.ArrayLike,
    train: npt.ArrayLike,
    query: npt.ArrayLike,
    *,
    labels: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    top: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """Draw images with the most helpful and the most harmful training images for each.

    Parameters
    ----------
    scores : array_like
        (queries, examples), how much the loss of a query grows without a training example, as of
        `fisherops.linalg.inv_quad`. The largest are of the most helpful examples, the smallest of the most harmful.
    train, query : array_like
        Images (examples, ...) and (queries, ...): (height, width), (1 or 3, height, width) or with channels last.
        Their values are scaled to the range of all images.
    labels : (array_like, array_like), optional
        The labels of the training examples and of the queries. Default: none are shown.
    top : int
        Number of helpful, and of harmful, examples for each query. Default: 5.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
    """
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    values, images, asked = np.asarray(scores, dtype=float), np.asarray(train), np.asarray(query)
    top = min(top, values.shape[1])
    # In units of an image: its width with a margin, its height with two lines of text, and gaps between groups.
    width, height, gap = 1.12, 1.45, 0.35
    starts = [0.0, width + gap, width + 2 * gap + top * width]
    right, bottom = starts[2] + top * width, len(values) * height
    if ax is None:
        _, ax = plt.subplots(figsize=(1.0 * right, 1.0 * bottom + 0.9), layout="constrained")
    low, high = min(images.min(), asked.min()), max(images.max(), asked.max())
    scale = high - low or 1.0

    def draw(image: Any, label: Any, text: str, x: float, y: float, color: str) -> None:
        ax.imshow(_as_picture(image, low, scale), cmap="gray", vmin=0, vmax=1, extent=(x, x + 1, y + 1, y))
        ax.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linewidth=1.8))
        parts = [*([] if label is None else [f"label {label}"]), *([text] if text else [])]
        ax.text(x + 0.5, y + 1.03, "\n".join(parts), ha="center", va="top", fontsize=7.5, color="#404040")

    of_train, of_query = (None, None) if labels is None else map(np.asarray, labels)
    for row, own in enumerate(values):
        y, order = row * height, np.argsort(own)
        draw(asked[row], None if of_query is None else of_query[row], "", 0.0, y, _GREY)
        for start, chosen, color in ((starts[1], order[::-1][:top], _BLUE), (starts[2], order[:top], _ORANGE)):
            for k, n in enumerate(chosen):
                label = None if of_train is None else of_train[n]
                draw(images[n], label, f"{own[n]:+.2g}", start + k * width, y, color)
    for x, text, color in zip(
        starts, ("query", "most helpful", "most harmful"), ("#404040", _BLUE, _ORANGE), strict=True
    ):
        ax.text(x, -0.08, text, ha="left", va="bottom", fontsize=10, color=color)
    ax.set_xlim(-0.05, right)
    ax.set_ylim(bottom, -0.35)
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def _as_picture(image: Any, low: float, scale: float) -> Any:
    """Return an image as matplotlib takes it, with values from 0 to 1: (height, width) or (height, width, 3)."""
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = np.moveaxis(image, 0, -1)
    scaled = (image - low) / scale
    return scaled[..., 0] if scaled.ndim == 3 and scaled.shape[2] == 1 else scaled


def rank_threshold(eigenvalues: npt.ArrayLike, dim: int, dtype: npt.DTypeLike, rows: int | None = None) -> float:
    """Return the size below which eigenvalues of F count as zero, as in `fisherops.linalg`: λ_max · eps · max(n, √m).

    Parameters
    ----------
    eigenvalues : array
        The largest among them is λ_max.
    dim : int
        D, of F (D, D).
    dtype : dtype
        The compute precision.
    rows : int, optional
        Rows of the score matrix, ``op.scores.shape[0]``; n and m are the smaller and the larger of both. Default: D,
        with which the threshold is the convention of ``numpy.linalg.matrix_rank``.
    """
    from fisherops.linalg.dense import rank_threshold as threshold

    largest = float(np.max(np.asarray(eigenvalues, dtype=float), initial=0.0))
    return threshold(largest, dim, dim if rows is None else rows, dtype)


def _mark_rank(ax: Axes, values: npt.NDArray[Any], threshold: float) -> None:
    rank = int(np.sum(values > threshold))
    # The shaded region gets a sixth of the height, for its text, or down to the smallest eigenvalue.
    highest = max(values.max(initial=0), 10 * threshold)
    lowest = min(threshold * (threshold / highest) ** 0.2, values[values > 0].min(initial=threshold) / 2)
    bottom, top = lowest, 2 * highest
    ax.set_ylim(bottom, top)
    ax.axhspan(bottom, threshold, color=_GREY, alpha=0.16, linewidth=0)
    ax.axhline(threshold, color=_GREY, linewidth=0.9, linestyle="--")
    if rank < len(values):
        ax.axvline(rank + 0.5, color=_GREY, linewidth=0.9, linestyle=":")
    least = "" if rank < len(values) else "at least "
    ax.annotate(
        f"numerical rank {least}{rank}\n(eigenvalues above rounding)", (0.015, 0.02), xycoords="axes fraction",
        va="bottom", ha="left", fontsize=9, color="#404040",
    )  # fmt: skip
