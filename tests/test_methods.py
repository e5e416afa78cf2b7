"""What methods read, and operators F + diag(d) with a damping of its own for each parameter."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherops as fo
from fisherops import linalg
from fisherops.score_matrix import ScoreMatrix

READS = ("gram_tensor", "_mul", "_mul_t", "product", "col_squares", "dense", "square_root", "square_norm")


class Counted(list):
    """Batches that count how often they are read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


def network(**options):
    """Return an operator of 66 parameters whose 12 examples come in 3 batches, and the batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    data = Counted((torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(3))
    return fo.FisherLinearOperator(net, nn.CrossEntropyLoss(reduction="sum"), data=data, **options), data


# ---- Reads -------------------------------------------------------------------------------------------


def test_eigsh_reads_cached_rows_three_times(monkeypatch):
    """The Gram matrix, the images of its eigenvectors, and the product for the residuals."""
    op, data = network()
    linalg.eigsh(op, 3)
    calls = []

    def counting(name, original):
        def counted(self, *arguments, **options):
            calls.append(name)
            return original(self, *arguments, **options)

        return counted

    for name in READS:
        monkeypatch.setattr(ScoreMatrix, name, counting(name, getattr(ScoreMatrix, name)))
    data.reads = 0
    pairs = linalg.eigsh(op, 3)
    assert pairs.method == "dual"
    assert calls == ["gram_tensor", "_mul_t", "product"]
    assert data.reads == 0


@pytest.mark.parametrize("method", ["auto", "dual", "dense"])
@pytest.mark.parametrize("is_first", [True, False])
def test_eigsh_reads_data_that_are_not_cached_at_most_three_times(method, is_first):
    """To count the rows if nothing is known yet, to find all rows or F, and for the residuals."""
    op, data = network(cache="none")
    if not is_first:
        op @ np.ones(op.shape[0])
    data.reads = 0
    pairs = linalg.eigsh(op, 3, method=method)
    assert data.reads == (3 if is_first else 2)
    F = network()[0].todense()
    np.testing.assert_allclose(pairs.eigenvalues, np.linalg.eigvalsh(F)[-3:], rtol=1e-10)
    np.testing.assert_allclose(F @ pairs.eigenvectors, pairs.eigenvectors * pairs.eigenvalues, atol=1e-10)


@pytest.mark.parametrize("which", ["LM", "SM"])
@pytest.mark.parametrize("k", [2, 40, 66])
def test_pairs_from_one_pass_are_those_from_cached_rows(which, k):
    expected = linalg.eigsh(network()[0], k, which, method="dual")
    found = linalg.eigsh(network(cache="none")[0], k, which, method="dual")
    assert found.converged
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.eigenvectors.T @ found.eigenvectors, np.eye(k), atol=1e-9)
    assert found.residuals.max() <= 1e-10 * linalg.eigsh(network()[0], 1).eigenvalues[0]


# ---- A damping for each parameter --------------------------------------------------------------------


class Scaled:
    """G S for a diagonal matrix S."""

    def __init__(self, G, s):
        self.G, self.s, self.shape = G, s, G.shape

    def _mul(self, V):
        return self.G._mul(V * self.s)

    def _mul_t(self, W):
        return self.G._mul_t(W) * self.s

    def gram_tensor(self):
        rows = self.G._mul_t(torch.eye(self.G.shape[0], dtype=self.s.dtype)) * self.s
        return rows @ rows.T


@pytest.fixture(params=["positive", "with zeros"])
def damped(request, monkeypatch):
    """Return F + diag(d), its matrix, and whether all of d are positive."""
    monkeypatch.setattr(ScoreMatrix, "scaled", lambda G, s: Scaled(G, s), raising=False)
    op, _ = network()
    d = torch.logspace(-3, 1, op.shape[0], dtype=torch.float64)
    if request.param == "with zeros":
        d[::3] = 0
    return op.damped(d), op.todense() + np.diag(d.numpy()), request.param == "positive"


@pytest.mark.parametrize("damping", [0.0, 0.2])
@pytest.mark.parametrize("method", ["auto", "dual", "dense", "primal"])
def test_systems_with_a_damping_for_each_parameter(damped, method, damping):
    op, A, is_positive = damped
    A = A + damping * np.eye(len(A))
    b = np.random.default_rng(0).standard_normal((len(A), 2))
    if damping == 0 and not is_positive:
        if method == "dual":
            with pytest.raises(ValueError, match="a damping of its own for each parameter"):
                linalg.solve(op, b, method=method)
        return  # such a matrix may be singular
    solution = linalg.solve(op, b, damping, method=method, rtol=1e-10, maxiter=10_000)
    assert solution.converged
    assert method in ("auto", solution.method)
    np.testing.assert_allclose(solution.x, np.linalg.solve(A, b), rtol=1e-6, atol=1e-8 * np.abs(solution.x).max())
    assert (np.linalg.norm(b - A @ solution.x, axis=0) <= 1.01e-10 * np.linalg.norm(b, axis=0)).all()
    inverse = linalg.inv(op, damping, method=method, rtol=1e-10)
    np.testing.assert_allclose(inverse @ b, np.linalg.solve(A, b), rtol=1e-6, atol=1e-8 * np.abs(solution.x).max())
    np.testing.assert_allclose(inverse.damping, op.shift + damping)
    if method != "primal":
        expected = np.diag(np.linalg.inv(A))
        np.testing.assert_allclose(linalg.diagonal(inverse).value, expected, rtol=1e-8)
        assert float(linalg.trace(inverse)) == pytest.approx(expected.sum(), rel=1e-9)
        determinant = linalg.slogdet(op, damping, method=method)
        assert determinant.logabsdet == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-9)
        assert determinant.standard_error == 0
    gradients = {name: torch.ones(shape, dtype=torch.float64) for name, shape in op.parameter_shapes.items()}
    step = linalg.natural_gradient(op, gradients, damping, method=method, rtol=1e-9, maxiter=10_000)
    found = torch.cat([t.flatten() for t in step.values()])
    np.testing.assert_allclose(found, np.linalg.solve(A, np.ones(len(A))), atol=1e-6 * found.abs().max())


def test_a_rank_that_is_too_small_for_the_zeros_of_a_damping():
    op, _ = network()
    d = torch.zeros(op.shape[0], dtype=torch.float64)
    d[:5] = 1.0
    with pytest.raises(ValueError, match="F is singular .its rank is at most 41 of 66"):
        linalg.solve(op.damped(d), np.ones(op.shape[0]))


@pytest.mark.parametrize("method", ["auto", "dual", "dense"])
@pytest.mark.parametrize("damping", [1e-18, 1e-2])
def test_equal_dampings_are_one_number(damping, method, monkeypatch):
    """Also if they are below the rounding of F, where F + diag(d) as a matrix would be singular."""
    monkeypatch.setattr(ScoreMatrix, "scaled", lambda G, s: Scaled(G, s), raising=False)
    op, _ = network()
    each = op.damped(np.full(op.shape[0], damping))
    expected = linalg.slogdet(op, damping, method=method)
    assert linalg.slogdet(each, method=method).logabsdet == pytest.approx(expected.logabsdet, rel=1e-9)


@pytest.mark.parametrize("method", ["auto", "dual", "dense"])
def test_dimensions_with_a_damping_for_each_parameter(damped, method):
    op, A, _ = damped
    expected = np.trace(A @ np.linalg.inv(A + 0.3 * np.eye(len(A))))
    estimate = linalg.effective_dimension(op, 0.3, method=method)
    assert estimate.value == pytest.approx(expected, rel=1e-10)
    assert estimate.standard_error == 0


def test_estimates_with_a_damping_for_each_parameter(damped):
    op, A, _ = damped
    dimension = linalg.effective_dimension(op, 0.3, method="primal", probes=10, steps=30)
    determinant = linalg.slogdet(op, 0.3, method="primal", probes=10, steps=30)
    B = A + 0.3 * np.eye(len(A))
    assert abs(dimension.value - np.trace(A @ np.linalg.inv(B))) <= 5 * dimension.standard_error
    assert abs(determinant.logabsdet - np.linalg.slogdet(B)[1]) <= 5 * determinant.standard_error


@pytest.mark.parametrize("method", ["auto", "dense", "primal"])
def test_spectra_with_a_damping_for_each_parameter(damped, method):
    op, A, _ = damped
    values = np.linalg.eigvalsh(A)
    pairs = linalg.eigsh(op, 4, method=method, maxiter=1000)
    assert pairs.converged
    assert pairs.method != "dual"
    np.testing.assert_allclose(pairs.eigenvalues, values[-4:], rtol=1e-8)
    np.testing.assert_allclose(A @ pairs.eigenvectors, pairs.eigenvectors * pairs.eigenvalues, atol=1e-8 * values[-1])
    norm = linalg.frobenius_norm(op, method=method, probes=300)
    assert abs(norm.value - np.linalg.norm(A)) <= 1e-9 + 5 * norm.standard_error
    if method != "primal":
        np.testing.assert_allclose(linalg.eigvalsh(op, method=method), values, atol=1e-10 * values[-1])
        edges = [-1.0, 0.05, values[-3] * 0.999, values[-1] * 1.001]
        counts = linalg.spectral_density(op, edges, method=method).counts
        np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])
    for routine in (
        linalg.eigvalsh,
        linalg.spectral_density,
        linalg.frobenius_norm,
        lambda A, method: linalg.eigsh(A, 1, method=method),
    ):
        with pytest.raises(
            ValueError, match="must be 'auto', 'dense' or 'primal' for an operator with a damping of its"
        ):
            routine(op, method="dual")


def test_traces_and_bounds_with_a_damping_for_each_parameter(damped):
    op, A, is_positive = damped
    assert float(linalg.trace(op)) == pytest.approx(np.trace(A), rel=1e-12)
    np.testing.assert_allclose(linalg.diagonal(op).value, np.diag(A), rtol=1e-12)
    if is_positive:
        np.testing.assert_allclose(linalg.crlb(op).covariance, np.linalg.inv(A), rtol=1e-7, atol=1e-9)


# ---- Methods that are exact and others ---------------------------------------------------------------


def test_the_diagonal_of_an_inverse_by_products_is_refused():
    op, _ = network()
    inverse = linalg.inv(op, 0.1, method="primal")
    for routine in (inverse.diagonal, inverse.trace):
        with pytest.raises(ValueError, match="must be 'dual' or 'dense' for the diagonal and the trace of an inverse"):
            routine()
    expected = np.diag(np.linalg.inv(op.todense() + 0.1 * np.eye(op.shape[0])))
    np.testing.assert_allclose(linalg.diagonal(inverse).value, expected, rtol=1e-3)
