"""The exact, the empirical and the Monte-Carlo Fisher: against torch's own losses, and against each other."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES, LOSSES, make_case
from tolerances import assert_same
from torch import nn

import fisherops as fo
from fisherops import likelihoods
from fisherops._draws import StreamSampler
from fisherops.likelihoods.factors import Combined

cases = st.builds(
    make_case,
    architecture=st.sampled_from(ARCHITECTURES),
    loss=st.sampled_from(sorted(LOSSES)),
    reduction=st.sampled_from(["mean", "sum"]),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    C=st.integers(2, 4),
    seed=st.integers(0, 10**6),
)


def check(op, expected, dtype):
    assert_same(op @ np.eye(len(expected), dtype=op.dtype), expected, dtype)
    assert_same(op.todense(), expected, dtype)
    assert_same(op.trace(), np.trace(expected), dtype)


@given(cases)
def test_the_exact_fisher_is_the_gauss_newton_matrix_of_the_loss(case):
    op = fo.FisherLinearOperator(case.model, case.loss, data=case.data)
    check(op, oracle.gauss_newton(case.model, case.loss, case.params, case.data), case.dtype)
    check(op, oracle.exact_fisher(case.model, case.loss, case.params, case.data), case.dtype)


@given(cases, st.sampled_from(["term", "datum"]))
def test_the_empirical_fisher_is_the_second_moment_of_gradients(case, rows):
    op = fo.EmpiricalFisherLinearOperator(case.model, case.loss, data=case.data, rows=rows)
    check(op, oracle.empirical_fisher(case.model, case.loss, case.params, case.data, rows), case.dtype)


WEIGHTED = {
    "class weights": ("ce", lambda: {"weight": torch.tensor([0.5, 2.0, 0.0])}),
    "ignore_index": ("ce", lambda: {"ignore_index": 1}),
    "both": ("ce", lambda: {"weight": torch.tensor([0.5, 2.0, 1.0]), "ignore_index": 0}),
    "smoothing": ("ce", lambda: {"label_smoothing": 0.3}),
    "smoothing and ignore_index": ("ce", lambda: {"label_smoothing": 0.3, "ignore_index": 2}),
    "smoothing and weights": ("ce", lambda: {"label_smoothing": 0.3, "weight": torch.tensor([0.5, 2.0, 1.0])}),
    "all": ("ce", lambda: {"label_smoothing": 0.2, "weight": torch.tensor([0.5, 2.0, 0.1]), "ignore_index": 1}),
    "weight": ("bce", lambda: {"weight": torch.tensor([0.5, 2.0, 0.0])}),
    "pos_weight": ("bce", lambda: {"pos_weight": torch.tensor([0.5, 2.0, 3.0])}),
    "weight and pos_weight": ("bce", lambda: {"weight": torch.rand(3), "pos_weight": torch.tensor([0.5, 2.0, 0.0])}),
}


def soft(y, loss, C=3):
    """Targets that are no labels."""
    if loss == "bce":
        return 0.8 * y + 0.1
    y = nn.functional.one_hot(y.clamp(min=0), C).double().movedim(-1, 1)
    return 0.7 * y + 0.1


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("architecture", ["dense", "recurrent", "image"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_and_soft_targets(name, architecture, reduction, targets):
    """The exact Fisher is the GGN of the weighted loss over all data, and other batches do not change it."""
    loss_name, options = WEIGHTED[name]
    loss = LOSSES[loss_name](reduction=reduction, **options()).double()
    case = make_case(architecture, loss_name, sizes=(4, 3, 1))
    data = case.data if targets == "hard" else [(X, soft(y, loss_name)) for X, y in case.data]
    if targets == "soft" and "ignore_index" in options():
        return  # torch ignores indices only
    exact = fo.FisherLinearOperator(case.model, loss, data=data)
    check(exact, oracle.gauss_newton(case.model, loss, case.params, data), case.dtype)
    joined = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    for other in (joined, [(X[i : i + 1], y[i : i + 1]) for X, y in joined for i in range(len(X))][::-1]):
        assert_same(fo.FisherLinearOperator(case.model, loss, data=other).todense(), exact.todense(), case.dtype)
    for rows in ("term", "datum"):
        empirical = fo.EmpiricalFisherLinearOperator(case.model, loss, data=data, rows=rows)
        check(empirical, oracle.empirical_fisher(case.model, loss, case.params, data, rows), case.dtype)
    M = 20_000 if architecture == "dense" else 4_000
    many = fo.FisherMCLinearOperator(case.model, loss, data=data, mc_samples=M).todense()
    # Each entry of B has variance of order 1/M.
    assert np.abs(many - exact.todense()).max() <= 6 / np.sqrt(M) * np.abs(exact.todense()).max() * 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"weight": torch.tensor([0.5, 2.0, 0.0])}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_soft_targets_that_do_not_sum_to_one(reduction, options, dtype):
    """torch accepts any t ≥ 0: the loss −Σ t_c log p_c weighs the term by Σ t, also if that is close to 1 or 0."""
    loss = nn.CrossEntropyLoss(reduction=reduction, **options).double()
    case = make_case("dense", "ce", reduction, sizes=(6, 2))
    torch.manual_seed(0)
    data = []
    for X, _ in case.data:
        y = torch.rand(len(X), 3, dtype=torch.float64)
        y[0], y[1] = 0.0, torch.tensor([0.3, 0.3, 0.3995])
        data.append((X, (2 * y if dtype is torch.bfloat16 else y).to(dtype)))
    as_double = [(X, y.double()) for X, y in data]
    exact = fo.FisherLinearOperator(case.model, loss, data=data)
    check(exact, oracle.gauss_newton(case.model, loss, case.params, as_double), case.dtype)
    empirical = fo.EmpiricalFisherLinearOperator(case.model, loss, data=data)
    check(empirical, oracle.empirical_fisher(case.model, loss, case.params, as_double), case.dtype)
    op = fo.FisherMCLinearOperator(case.model, loss, data=data, mc_samples=500)
    v = np.ones(case.D)
    assert abs(v @ (op @ v) - v @ (exact @ v)) <= 5 * op.standard_error(v)


@pytest.mark.parametrize("samples", [2, 7])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_summed_rows_are_unbiased(loss, samples):
    """Over seeds, quadratic forms of both kinds of rows have the exact mean (5 standard errors), M > C or not."""
    case = make_case("recurrent", loss, sizes=(3, 2))
    # Each copy of the data has draws of its own, so 50 seeds give as many as 300 would without copies.
    data = [(torch.cat([X] * 6), torch.cat([y] * 6)) for X, y in case.data]
    exact = fo.FisherLinearOperator(case.model, case.loss, data=data)
    v = np.random.default_rng(0).standard_normal(case.D)
    expected = v @ (exact @ v)
    for rows in ("term", "datum"):
        forms = []
        for seed in range(50):
            op = fo.FisherMCLinearOperator(
                case.model,
                case.loss,
                data=data,
                rows=rows,
                seed=seed,
                mc_samples=samples,
                check_deterministic=False,
            )
            forms.append(v @ (op @ v))
        assert abs(np.mean(forms) - expected) <= 5 * np.std(forms, ddof=1) / np.sqrt(50)


@given(cases, st.integers(1, 6))
def test_summed_rows_are_sums_of_rows(case, samples):
    """rows="datum" is Σ_n Σ_m (Σ_t g_ntm)(Σ_t g_ntm)ᵀ with the draws of rows="term"."""
    drawn, divisor = oracle.score_rows(case.model, case.loss, case.params, case.data, samples=samples)
    terms = len(drawn) // samples // sum(len(X) for X, _ in case.data)
    G = np.stack([g for _, g in drawn]).reshape(-1, terms, samples, case.D).sum(1).reshape(-1, case.D)
    expected = G.T @ G / samples / (divisor if case.loss.reduction == "mean" else 1)
    op = fo.FisherMCLinearOperator(
        case.model, case.loss, data=case.data, rows="datum", mc_samples=samples, sampler="stream"
    )
    check(op, expected, case.dtype)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_more_samples_than_classes_cost_no_more_vectors(loss):
    case = make_case("dense", loss, sizes=(6,))
    likelihood = likelihoods.of_loss(case.loss)
    f = torch.randn(6, 3, dtype=torch.float64)

    class Fixed:
        normal = staticmethod(lambda like, samples: torch.randn(samples, *like.shape, dtype=like.dtype))
        categorical = staticmethod(lambda p, samples: p.multinomial(samples, replacement=True).T)
        bernoulli = staticmethod(lambda f, samples: f.sigmoid().expand(samples, *f.shape).bernoulli())

    for samples in (1, 3, 4, 50):
        torch.manual_seed(0)
        factor = likelihood.scores(f, likelihood.sample(f, samples, Fixed))
        assert factor.rank == samples
        assert factor.compressed().rank == min(samples, 3)
    expected = oracle.monte_carlo_fisher(case.model, case.loss, case.params, case.data, samples=50)
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, mc_samples=50, sampler="stream")
    check(op, expected, case.dtype)


@given(
    st.sampled_from(sorted(LOSSES)), st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.booleans(), st.data()
)
def test_factors_multiply_as_their_columns_say(loss, T, C, samples, weighted, data):
    """S W, Sᵀ U and the listed columns are one matrix, for every factor of every likelihood, and combinations of them."""
    likelihood = likelihoods.of_loss(LOSSES[loss]())
    g = torch.Generator().manual_seed(T + 10 * C)
    f = torch.randn(T, C, generator=g, dtype=torch.float64)
    draws = StreamSampler(0, torch.device("cpu"))
    parts = [likelihood.scores(f, likelihood.sample(f, samples, draws)), likelihood.exact(f)]
    expected = [part.columns() for part in parts]
    if weighted:
        scale = torch.rand(T, 1, generator=g, dtype=torch.float64)
        parts = [part.scaled(scale) for part in parts]
        expected = [columns * scale.unsqueeze(1) for columns in expected]
    for part, columns in zip(parts, expected, strict=True):
        torch.testing.assert_close(part.columns(), columns)
        small, outer = part.compressed(), torch.einsum("brp,brq->bpq", columns, columns)
        assert small.rank <= C
        torch.testing.assert_close(torch.einsum("brp,brq->bpq", small.columns(), small.columns()), outer)
    blocks = data.draw(st.sampled_from([b for b in range(1, T + 1) if T % b == 0]))
    group = T // blocks
    summed = parts[0].summed(group)
    together = parts[0].columns().view(blocks, group, samples, C).transpose(1, 2).flatten(2)
    torch.testing.assert_close(summed.columns(), together)
    joined = Combined(parts, blocks, shared=False)
    torch.testing.assert_close(joined.columns(), block_diagonal(parts, blocks))
    for factor in (*parts, *(part.compressed() for part in parts), summed, joined, joined.compressed()):
        columns = factor.columns()
        assert columns.shape == (factor.blocks, factor.rank, factor.outputs)
        W = torch.randn(2, factor.blocks, factor.rank, generator=g, dtype=torch.float64)
        U = torch.randn(2, factor.blocks, factor.outputs, generator=g, dtype=torch.float64)
        torch.testing.assert_close(factor.apply(W), torch.einsum("trc,ktr->ktc", columns, W))
        torch.testing.assert_close(factor.adjoint(U), torch.einsum("trc,ktc->ktr", columns, U))
        scale = torch.rand(factor.blocks, factor.outputs, generator=g, dtype=torch.float64)
        scale = scale if loss != "ce" else scale[:, :1]
        torch.testing.assert_close(factor.scaled(scale).columns(), columns * scale.unsqueeze(1))


def block_diagonal(parts, blocks):
    """The columns of several factors, block by block."""
    listed = [part.columns().view(blocks, -1, *part.columns().shape[1:]) for part in parts]
    return torch.stack([torch.block_diag(*(c for columns in listed for c in columns[b])) for b in range(blocks)])


def test_the_exact_fisher_of_many_classes_is_never_written_out():
    """50,000 classes: B has 2.5·10⁹ entries for each term."""
    model = nn.Linear(2, 50_000, bias=False)
    X, y = torch.randn(3, 2), torch.tensor([0, 1, 2])
    op = fo.FisherLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y))
    v = torch.randn(100_000)
    p = (X @ model.weight.detach().T).softmax(1)
    Jv = X @ v.view(50_000, 2).T
    expected = (p * Jv - p * (p * Jv).sum(1, keepdim=True)).T @ X / 3
    assert_same(op @ v, expected.reshape(-1), torch.float32)


def test_what_is_refused():
    case = make_case("dense", "mse")
    with pytest.raises(ValueError, match="`rows` must be 'term' or 'datum', got 'x'"):
        fo.EmpiricalFisherLinearOperator(case.model, case.loss, data=case.data, rows="x")
    with pytest.raises(TypeError, match="rows"):
        fo.FisherLinearOperator(case.model, case.loss, data=case.data, rows="datum")

    class Pairs(nn.Linear):
        def forward(self, X):
            return super().forward(X[:-1] * X[1:])

    op = fo.FisherMCLinearOperator(
        Pairs(3, 2), nn.MSELoss(), data=[(torch.randn(4, 3), torch.zeros(3, 2))], batch_size_fn=len, rows="datum"
    )
    with pytest.raises(ValueError, match=r"batch 0 has 3 loss terms for 4 data.*use rows='term'"):
        op @ np.ones(8)
    X = torch.randn(2, 3).double()
    with pytest.raises(ValueError, match=r"batch 0: probabilities as targets must be at least 0, got \[0.5, 0.69"):
        fo.FisherLinearOperator(case.model, nn.CrossEntropyLoss(), data=[(X, torch.tensor([[0.5, 0.7, -0.2]] * 2))])
    for name in ("weight", "pos_weight"):
        with pytest.raises(ValueError, match=f"the `{name}` of the loss must be finite and at least 0"):
            fo.FisherLinearOperator(case.model, nn.BCEWithLogitsLoss(**{name: -torch.ones(3)}), data=case.data)
        with pytest.raises(ValueError, match=rf"the `{name}` of the loss has shape \(2,\), which does not broadcast"):
            fo.FisherLinearOperator(
                case.model, nn.BCEWithLogitsLoss(**{name: torch.ones(2)}), data=[(X, torch.zeros(2, 3))]
            )
