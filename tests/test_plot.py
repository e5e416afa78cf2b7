"""Pictures: what is drawn is what was given."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt

from fisherops import plot
from fisherops.linalg import Density

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def texts(ax):
    return " ".join(text.get_text() for text in ax.texts)


def test_eigenvalues_are_drawn_by_index_on_a_log_scale():
    ax = plot.spectrum([1.0, 100.0, 10.0, 0.0, -1.0])
    x, y = ax.lines[0].get_data()
    np.testing.assert_array_equal(x, [1, 2, 3])
    np.testing.assert_array_equal(y, [100, 10, 1])
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "index"
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


def test_density():
    grid, counts = np.geomspace(1e-3, 10, 5), np.array([12.0, 0.0, 3.0, 0.5])
    exact = Density(grid, counts, np.zeros(4), 100.0, 0.0, "dual")
    ax = plot.density(exact)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel() == "eigenvalue"
    assert [text.get_text() for text in ax.texts] == ["100 below 1.0e-03"]
    (drawn,) = ax.patches
    np.testing.assert_allclose(drawn.get_data().edges, grid)
    np.testing.assert_allclose(drawn.get_data().values, [12, 0.01, 3, 0.5])
    assert ax.get_legend() is None
    _, given = plt.subplots()
    estimate = Density(np.linspace(-1, 1, 5), counts, np.full(4, 0.2), 0.0, 7.0, "primal")
    ax = plot.density(estimate, ax=given)
    assert ax is given
    assert ax.get_xscale() == "linear"
    assert [text.get_text() for text in ax.texts] == ["0 below -1.0e+00, 7 above"]
    assert len(ax.patches) == 2
    np.testing.assert_allclose(ax.patches[0].get_data().values, [12.4, 0.4, 3.4, 0.9])
    np.testing.assert_allclose(ax.patches[0].get_data().baseline, [11.6, 0.01, 2.6, 0.1])
    assert ax.get_legend() is not None
    # Every bin and its band are within the picture.
    assert ax.get_ylim()[1] > 12.4


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5), (4, 5, 3)])
def test_influential_images_are_those_of_the_largest_and_smallest_scores(shape):
    rng = np.random.default_rng(0)
    scores, train, query = rng.standard_normal((2, 7)), rng.random((7, *shape)), rng.random((2, *shape))
    ax = plot.influence(scores, train, query, labels=(np.arange(7), [8, 9]), top=2)
    assert len(ax.images) == 2 * (1 + 2 + 2)
    order = np.argsort(scores, 1)
    low, high = min(train.min(), query.min()), max(train.max(), query.max())

    def same(drawn, image):
        image = image[0] if shape[0] == 1 else np.moveaxis(image, 0, -1) if shape[0] == 3 else image
        np.testing.assert_allclose(drawn.get_array(), (image - low) / (high - low), atol=1e-12)

    for row in range(2):
        drawn = ax.images[5 * row : 5 * row + 5]
        chosen = [*order[row, ::-1][:2], *order[row, :2]]
        for image, expected in zip(drawn, [query[row], *train[chosen]], strict=True):
            same(image, expected)
        for n in chosen:
            assert f"label {n}\n{scores[row, n]:+.2g}" in [text.get_text() for text in ax.texts]
        assert f"label {8 + row}" in texts(ax)
    ax.figure.canvas.draw()


def test_influential_images_without_labels_and_with_few_examples():
    _, given = plt.subplots()
    ax = plot.influence([[0.5, -1.0]], np.zeros((2, 3, 3)), np.zeros((1, 3, 3)), ax=given)
    assert ax is given
    assert len(ax.images) == 1 + 2 + 2
    assert "label" not in texts(ax)
    ax.figure.canvas.draw()
