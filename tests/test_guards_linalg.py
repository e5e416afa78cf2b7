"""Known faults of linear algebra and of what score matrices return: the right values, each marked by what will fix it."""

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from torch import nn

import fisherops as fo
from fisherops import linalg, plot
from fisherops.likelihoods import DiagonalFactor, Likelihood

NOT_FINITE = "NaN or infini(ty|te)"


def network():
    """Return a network of 43 parameters and its data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return net, torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))


def rows_of(net, X, y):
    """Return the gradients of single loss terms by a plain loop, (N, D)."""
    parameters = list(net.parameters())
    losses = [nn.functional.cross_entropy(net(x[None]), t[None]) for x, t in zip(X, y, strict=True)]
    return torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses]
    ).numpy()


class UnitGaussian(Likelihood):
    """Targets with noise of variance 1, so that the score matrix is the Jacobian of the outputs."""

    def sample(self, f, samples, draws):
        return f + draws.normal(f, samples)

    def log_prob(self, f, y):
        return -(f - y).square().sum(-1) / 2

    def exact(self, f):
        return DiagonalFactor(torch.ones_like(f))


def linear(G, **options):
    """Return the operator of a linear model whose score matrix is G."""
    X = torch.as_tensor(G)
    parameters = {"b": torch.zeros(X.shape[1], dtype=X.dtype)}
    data = (X, torch.zeros(len(X), dtype=X.dtype))
    return fo.FisherLinearOperator(lambda p, X: X @ p["b"], UnitGaussian("sum"), parameters, data=data, **options)


# ---- Composites and inverses -------------------------------------------------------------------------

COMPOSITES = {
    "scaled and damped": lambda op, other: ((2 * op).damped(0.3), lambda F, H: 2 * F + 0.3 * np.eye(len(F))),
    "damped": lambda op, other: (op.damped(1e-3), lambda F, H: F + 1e-3 * np.eye(len(F))),
    "sum": lambda op, other: (op + other, lambda F, H: F + H),
    "nested": lambda op, other: (
        (0.5 * (op.damped(0.1) + 3 * other)).damped(0.2),
        lambda F, H: 0.5 * (F + 0.1 * np.eye(len(F)) + 3 * H) + 0.2 * np.eye(len(F)),
    ),
    "prior": lambda op, other: (
        op + sla.aslinearoperator(np.diag(np.arange(1.0, 44))),
        lambda F, H: F + np.diag(np.arange(1.0, 44)),
    ),
    "difference": lambda op, other: (op - 0.5 * other, lambda F, H: F - 0.5 * H),
}


def composite(name):
    """Return a composite of two operators and its matrix by plain loops."""
    net, X, y = network()
    operators = [
        fo.EmpiricalFisherLinearOperator(net, nn.CrossEntropyLoss(reduction="sum"), data=(X[part], y[part]))
        for part in (slice(8), slice(6, None))
    ]
    rows = rows_of(net, X, y)
    made, matrix = COMPOSITES[name](*operators)
    return made, matrix(rows[:8].T @ rows[:8], rows[6:].T @ rows[6:])


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_trace_of_a_composite_is_exact(name):
    op, matrix = composite(name)
    trace = linalg.trace(op)
    assert float(trace) == pytest.approx(np.trace(matrix), rel=1e-12)
    assert trace.standard_error == 0


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_diagonal_of_a_composite_is_exact(name):
    op, matrix = composite(name)
    diagonal = linalg.diagonal(op)
    np.testing.assert_allclose(diagonal.value, np.diag(matrix), rtol=1e-10, atol=1e-12)
    assert not diagonal.standard_error.any()


INVERSES = ["dual", "dense"]


@pytest.mark.parametrize("method", INVERSES)
def test_the_diagonal_of_an_inverse_is_exact(method):
    """The recursion of S. Singh and D. Alistarh, NeurIPS 2020, with one row after the other."""
    net, X, y = network()
    damping = 1e-5
    inverse = np.eye(43) / damping
    for row in rows_of(net, X, y):
        u = inverse @ row
        inverse = inverse - np.outer(u, u) / (len(X) + row @ u)
    op = fo.EmpiricalFisherLinearOperator(net, nn.CrossEntropyLoss(), data=(X, y))
    diagonal = linalg.diagonal(linalg.inv(op, damping, method=method))
    np.testing.assert_allclose(diagonal.value, np.diag(inverse), rtol=1e-8)
    assert not diagonal.standard_error.any()


@pytest.mark.parametrize("method", INVERSES)
def test_the_trace_of_an_inverse_is_exact(method):
    net, X, y = network()
    rows = rows_of(net, X, y)
    op = fo.EmpiricalFisherLinearOperator(net, nn.CrossEntropyLoss(reduction="sum"), data=(X, y))
    trace = linalg.trace(linalg.inv(op, 1e-3, method=method))
    expected = np.trace(np.linalg.inv(rows.T @ rows + 1e-3 * np.eye(43)))
    assert float(trace) == pytest.approx(expected, rel=1e-9)
    assert trace.standard_error == 0


# ---- Zero to rounding --------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [100, 1000])
def test_one_numerical_rank_everywhere(small):
    """The last of five orthogonal rows is close to rounding: every routine counts it, or none does."""
    D, eps = 3000, float(np.finfo(np.float32).eps)
    G = np.zeros((5, D), np.float32)
    G[range(5), range(5)] = [1, 1, 1, 1, (small * eps) ** 0.5]
    op = linear(G)
    values = linalg.eigvalsh(op, method="dual")
    ranks = {
        "eigsh": int((linalg.eigsh(op, 5, method="dual").eigenvalues > 0).sum()),
        "least_norm": int((linalg.solve(op, np.ones(D, np.float32), least_norm=True, method="dual").x > 0).sum()),
        "spectral_density": int(linalg.spectral_density(op, method="dual").counts.sum()),
        "plot": int((values > plot.rank_threshold(values, D, op.dtype, len(G))).sum()),
    }
    assert len(set(ranks.values())) == 1, ranks


# ---- Convergence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "primal"])
def test_eigsh_has_not_converged_where_residuals_are_large(method):
    """An operator that is not symmetric has no such eigenpairs."""
    A = np.diag(np.arange(1.0, 31))
    A[0, 1:] = 20.0
    pairs = linalg.eigsh(sla.aslinearoperator(A), 2, method=method)
    residuals = np.linalg.norm(A @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues, axis=0)
    np.testing.assert_allclose(pairs.residuals, residuals, rtol=1e-6)
    assert residuals.max() > 0.1 * np.abs(pairs.eigenvalues).max()
    assert not pairs.converged


class Folded(nn.Module):
    """Multiply by a square weight in some batches, and by its transpose in others."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))

    def forward(self, X):
        x = X["x"]
        return nn.functional.linear(x, self.weight) if X["transposed"] else x @ self.weight


def folded():
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 5, dtype=torch.float64)
    batches = [{"x": x, "transposed": bool(k)} for k, x in enumerate(inputs)]
    net = Folded()
    op = fo.FisherLinearOperator(net, UnitGaussian("sum"), data=[(X, torch.zeros(4, 5)) for X in batches])
    return op, net, batches


def test_the_gram_matrix_of_a_weight_and_its_transpose():
    op, net, batches = folded()
    outputs = torch.cat([net(X).flatten() for X in batches])
    G = torch.stack([torch.autograd.grad(f, net.weight, retain_graph=True)[0].flatten() for f in outputs]).numpy()
    np.testing.assert_allclose(op.todense(), G.T @ G, atol=1e-12)
    np.testing.assert_allclose(op.scores.gram(), G @ G.T, atol=1e-12)


def test_eigenvalues_with_a_weight_and_its_transpose():
    op, *_ = folded()
    pairs = linalg.eigsh(op, 3, method="dual")
    values = np.linalg.eigvalsh(op @ np.eye(25))[-3:]
    assert pairs.converged
    np.testing.assert_allclose(pairs.eigenvalues, values, rtol=1e-10)


# ---- Squares that leave the range of the precision ---------------------------------------------------

TEMPLATES = {
    # (size of inputs, noise, whether the inputs are sequences): the entries of G are of size one or 1e-4.
    "one position": (1e-23, 1e-19, False),
    "overflow": (1e-22, 1e-22, False),
    "large inputs": (1e22, 1e22, False),
    "positions": (1e-23, 1e-19, True),
}


def templates(name):
    """Return an operator in float32 and its score matrix by plain loops in float64."""
    size, noise, positions = TEMPLATES[name]
    torch.manual_seed(0)
    net = nn.Linear(8, 6)
    X = size * torch.randn(*((10, 3) if positions else (30,)), 8)
    double = nn.Linear(8, 6).double()
    outputs = double(X.double()).reshape(-1)
    rows = [torch.autograd.grad(f, double.weight, retain_graph=True)[0].reshape(-1) / noise for f in outputs]
    data = (X, torch.zeros(*X.shape[:-1], 6))
    op = fo.FisherLinearOperator(
        lambda X: net(X) / noise, UnitGaussian("sum"), [net.weight], data=data, cache="factors"
    )
    return op, torch.stack(rows).numpy()


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "positions"])
def test_diagonals_of_factors_that_are_small_or_large(name):
    op, G = templates(name)
    np.testing.assert_allclose(op @ np.ones(48, np.float32), G.T @ G.sum(1), rtol=1e-4)  # products are right
    np.testing.assert_allclose(op.diagonal(), np.square(G).sum(0), rtol=1e-4)
    assert op.trace() == pytest.approx(np.square(G).sum(), rel=1e-4)


@pytest.mark.parametrize("name", TEMPLATES)
def test_gram_matrices_of_factors_that_are_small_or_large(name):
    op, G = templates(name)
    np.testing.assert_allclose(op.scores.gram(), G @ G.T, rtol=1e-4, atol=1e-5 * np.square(G).sum(1).max())
    F = G.T @ G
    damping = 3 * np.trace(F) / 48
    pairs = linalg.eigsh(op, 1, method="dual")
    assert pairs.converged
    assert pairs.eigenvalues[0] == pytest.approx(np.linalg.eigvalsh(F)[-1], rel=1e-4)
    values = np.linalg.eigvalsh(F)
    dimension = linalg.effective_dimension(op, damping, method="dual")
    assert float(dimension) == pytest.approx((values / (values + damping)).sum(), rel=1e-4)
    logarithm = linalg.slogdet(op, damping, method="dual").logabsdet
    assert logarithm == pytest.approx(np.log(values + damping).sum(), rel=1e-4)


def test_a_trace_that_underflows_is_right_or_an_error():
    """Entries of G are 1e-25: those of F are out of float32's range, and zero is not their value."""
    op = linear(np.full((10, 3), 1e-25, np.float32))
    try:
        trace = op.trace()
    except FloatingPointError:
        return
    assert trace == pytest.approx(30e-50, rel=1e-4, abs=0)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lanczos_with_small_and_large_eigenvalues(size):
    """Eigenvalues are in float32's range, and their squares are not."""
    G = (size**0.5 * np.random.default_rng(0).standard_normal((60, 40))).astype(np.float32)
    expected = np.linalg.eigvalsh(G.T.astype(float) @ G)[-2:]
    pairs = linalg.eigsh(linear(G), 2, method="primal")
    np.testing.assert_allclose(pairs.eigenvalues, expected, rtol=1e-4)
    assert pairs.converged


# ---- NaN and infinity --------------------------------------------------------------------------------


class NotFinite(UnitGaussian):
    """An output factor that is NaN."""

    def exact(self, f):
        return DiagonalFactor(torch.full_like(f, float("nan")))


def faulty(fault, cache):
    """Return an operator with finite outputs, and a score matrix that is NaN or too large for squares."""
    if fault == "overflow":
        return linear(np.full((4, 3), 1e30, np.float32), cache=cache)
    parameters = {"b": torch.ones(3)}
    if fault == "derivative":  # that of √(b x)² at x = 0 is 0 / 0
        X, loss = torch.tensor([[1.0, 2, 3], [0, 0, 0], [3, 1, 2], [1, 1, 1]]), UnitGaussian("sum")
        data = (X, torch.zeros(4))
        return fo.FisherLinearOperator(lambda p, X: (X @ p["b"]).square().sqrt(), loss, parameters, data, cache=cache)
    data = (torch.ones(4, 3), torch.zeros(4))
    return fo.FisherLinearOperator(lambda p, X: X @ p["b"], NotFinite("sum"), parameters, data, cache=cache)


LARGE = 1e10  # times 1e30 it leaves float32's range
GUARDED = {
    "op @ v": lambda op: op @ np.full(3, LARGE, np.float32),
    "trace": lambda op: linalg.trace(op),
    "diagonal": lambda op: linalg.diagonal(op),
    "frobenius_norm, primal": lambda op: linalg.frobenius_norm(op, method="primal"),
}
ESCAPES = {
    "scores.gram()": lambda op: op.scores.gram(),
    "scores @ v": lambda op: op.scores @ np.full(3, LARGE, np.float32),
    "scores @ V": lambda op: op.scores.matmat(np.diag(np.full(3, LARGE, np.float32))),
    "scores.T @ w": lambda op: op.scores.T @ np.full(4, LARGE, np.float32),
    "w @ scores": lambda op: np.full(4, LARGE, np.float32) @ op.scores,
    "scores.rmatvec": lambda op: op.scores.rmatvec(np.full(4, LARGE, np.float32)),
    "frobenius_norm, dual": lambda op: linalg.frobenius_norm(op, method="dual"),
    "eigvalsh": lambda op: linalg.eigvalsh(op, method="dual"),
    "eigsh": lambda op: linalg.eigsh(op, 1, method="dual"),
}
ESCAPES_OF_NAN = {
    "slogdet": lambda op: linalg.slogdet(op, 1.0, method="dual"),
    "effective_dimension": lambda op: linalg.effective_dimension(op, 1.0, method="dual"),
    "spectral_density": lambda op: linalg.spectral_density(op, method="dual"),
    "solve": lambda op: linalg.solve(op, np.ones(3, np.float32), 1.0, method="dual"),
}


@pytest.mark.parametrize("fault", ["derivative", "factor", "overflow"])
def test_nan_and_infinity_do_not_leave_operators(fault):
    for cache in ("auto", "linearization", "none"):
        for call in (GUARDED | ESCAPES | ESCAPES_OF_NAN if fault == "derivative" else GUARDED).values():
            if fault == "overflow" and call is GUARDED["trace"]:  # a sum in float64
                assert call(faulty(fault, cache)).value == pytest.approx(12e60)
                continue
            with pytest.raises(FloatingPointError, match=NOT_FINITE):
                call(faulty(fault, cache))


@pytest.mark.parametrize(
    ("fault", "name"),
    [("factor", name) for name in ESCAPES | ESCAPES_OF_NAN] + [("overflow", name) for name in ESCAPES],
)
def test_nan_and_infinity_do_not_leave_score_matrices(fault, name):
    for cache in ("auto", "none"):
        with pytest.raises(FloatingPointError, match=NOT_FINITE):
            (ESCAPES | ESCAPES_OF_NAN)[name](faulty(fault, cache))


@pytest.mark.parametrize("method", ["auto", "dense", "dual", "primal"])
def test_eigenvectors_of_more_eigenvalues_than_the_rank_are_orthonormal(method):
    torch.manual_seed(0)
    model = nn.Linear(20, 3).double()
    data = torch.randn(1, 20, dtype=torch.float64), torch.randint(3, (1,))
    op = fo.EmpiricalFisherLinearOperator(model, nn.CrossEntropyLoss(), data=data)
    found = linalg.eigsh(op, k=3, method=method)
    V = np.asarray(found.eigenvectors)
    np.testing.assert_allclose(V.T @ V, np.eye(3), atol=1e-10)
    np.testing.assert_allclose(op @ V, V * np.asarray(found.eigenvalues), atol=1e-10 * op.trace())


@pytest.mark.parametrize("size", [1e-15, 1e-20, 1e-24])
def test_gram_matrices_of_tiny_inputs_beside_a_bias(size):
    torch.manual_seed(0)
    model, X, y = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,))
    op = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=(size * X, y), cache="factors")
    G = np.asarray(op.scores.todense(), dtype=float)
    np.testing.assert_allclose(op.scores.gram(), G @ G.T, atol=1e-5 * np.abs(G @ G.T).max())
