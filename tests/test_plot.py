"""Pictures: what is drawn is what was given."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt

from fisherops import plot

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def texts(ax):
    return " ".join(text.get_text() for text in ax.texts)


def test_eigenvalues_are_drawn_by_rank_on_a_log_scale():
    ax = plot.spectrum([1.0, 100.0, 10.0, 0.0, -1.0])
    x, y = ax.lines[0].get_data()
    np.testing.assert_array_equal(x, [1, 2, 3])
    np.testing.assert_array_equal(y, [100, 10, 1])
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "rank"
    assert ax.get_ylabel() == "eigenvalue"


def test_the_share_of_the_trace_has_its_own_axis():
    _, given = plt.subplots()
    ax = plot.spectrum([3.0, 1.0], trace=8.0, ax=given)
    assert ax is given
    (share,) = [other for other in ax.figure.axes if other is not ax]
    np.testing.assert_allclose(share.lines[0].get_ydata(), [3 / 8, 4 / 8])
    assert share.get_ylabel() == "cumulative share of the trace"


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, "numerical rank 2"), (0.01, "numerical rank at least 3")])
def test_the_numerical_rank_is_marked(threshold, expected):
    ax = plot.spectrum([100.0, 1.0, 0.1], threshold=threshold)
    assert expected in texts(ax)
    low, high = ax.get_ylim()
    assert low < min(threshold, 0.1)
    assert high > 100


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [-1.0], [5.0]])
def test_degenerate_spectra_can_be_drawn(values):
    ax = plot.spectrum(values, trace=float(np.sum(values)), threshold=plot.rank_threshold(values, 3, np.float32))
    ax.figure.canvas.draw()


def test_the_threshold_is_that_of_matrix_rank():
    eigenvalues = np.array([4.0, 1.0, 1e-6])
    assert plot.rank_threshold(eigenvalues, 3, np.float32) == 4.0 * 3 * np.finfo(np.float32).eps
    A = np.diag(eigenvalues.astype(np.float32))
    above = np.sum(eigenvalues > plot.rank_threshold(eigenvalues, 3, np.float32))
    assert above == np.linalg.matrix_rank(A)
