"""Score matrices of other data for the same problem, Gram matrices of two, norms and blocks of rows."""

import functools
import re
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import KINDS, cases
from tolerances import assert_same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fisherops as fo
from fisherops._sizes import HOST, SIZES

CACHES = ["auto", "scores", "factors", "linearization", "none"]


def jacobian(case, data):
    """Return J of all outputs in the order of the terms, by one backward pass for each."""
    classes_second = isinstance(case.loss, nn.CrossEntropyLoss)
    parameters = list(case.model.parameters())
    rows = []
    for X, _ in data:
        f = case.model(X)
        f = f.movedim(1, -1) if classes_second else f
        for number in f.flatten():
            gradients = torch.autograd.grad(number, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(gradients, parameters, strict=True)
            rows.append(torch.cat([(p * 0 if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(rows).detach().numpy()


@given(
    cases(2),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([None, *sorted(KINDS), "outputs"]),
    st.sampled_from(["term", "datum"]),
    st.sampled_from(CACHES),
    st.sampled_from(CACHES),
)
def test_it_is_that_of_an_operator_of_these_data(case, kind, other, rows, cache, other_cache):
    options = {"exact": {}}.get(kind, {"rows": rows})
    G = KINDS[kind](case.model, case.loss, data=case.data[:1], cache=cache, **options).scores
    data = case.data[1:]
    Q = G.on(data, kind=other, cache=other_cache)
    if other == "outputs":
        expected = jacobian(case, data)
    else:
        name = other or kind
        options = {"exact": {}}.get(name, {"rows": rows if kind != "exact" else "term"})
        loss = type(case.loss)(reduction="sum")
        expected = KINDS[name](case.model, loss, data=data, cache="scores", **options).scores.todense()
    assert Q.shape == expected.shape
    dense, own = Q.todense(), G.todense()
    assert_same(dense, expected, case.dtype)
    assert_same(Q.gram(G), expected @ own.T, case.dtype)
    assert_same(G.gram(Q), own @ expected.T, case.dtype)
    assert_same(Q.gram(), expected @ expected.T, case.dtype)
    assert_same(Q.row_norms(), np.linalg.norm(expected, axis=1), case.dtype)
    assert_same(G.row_norms(), np.linalg.norm(own, axis=1), case.dtype)
    start, stop = len(expected) // 3, min(len(expected), len(expected) // 3 + 2)
    assert_same(Q.rows(start, stop), expected[start:stop], case.dtype)
    assert_same(Q.rows(), expected, case.dtype)
    w = np.ones(len(expected), Q.dtype)
    assert_same(Q.T @ w, expected.T @ w, case.dtype)
    counts = [len(X) for X, _ in data]
    np.testing.assert_array_equal(Q.datum, np.repeat(np.arange(sum(counts)), len(expected) // sum(counts)))


def make(cache="auto", loss=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    op = fo.FisherMCLinearOperator(
        model, loss or nn.CrossEntropyLoss(), data=[(X[:5], y[:5]), (X[5:], y[5:])], cache=cache, **options
    )
    return op, model, X, y


def test_a_row_of_the_empirical_fisher_is_a_gradient():
    op, model, X, y = make(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double()))
    Q = op.scores.on((X, y), kind="empirical", rows="datum", batch_size=5)
    weights = torch.tensor([1.0, 2, 3])[y]
    for n in range(12):
        loss = weights[n] * nn.functional.cross_entropy(model(X[n : n + 1]), y[n : n + 1])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        np.testing.assert_allclose(Q.rows(n, n + 1)[0], gradient, rtol=1e-10, atol=1e-13)


def test_rows_by_parameter():
    op, model, X, y = make()
    Q = op.scores.on((X, y), kind="empirical")
    parts = Q.rows(2, 5, by_parameter=True)
    assert list(parts) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert parts[name].shape == (3, *p.shape)
    flat = np.concatenate([part.reshape(3, -1) for part in parts.values()], 1)
    np.testing.assert_array_equal(flat, Q.rows(2, 5))
    like = Q.rows(2, 5, like=torch.empty(0))
    assert isinstance(like, torch.Tensor)
    np.testing.assert_array_equal(like, flat)


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_blocks(cache):
    op, _, X, y = make(cache)
    G = op.scores
    blocks = list(G.blocks(5))
    assert [len(block) for block in blocks] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), G.rows())
    (whole,) = G.blocks(like=torch.empty(0))
    assert isinstance(whole, torch.Tensor)
    parts = [block["0.weight"] for block in G.blocks(7, by_parameter=True)]
    np.testing.assert_array_equal(np.concatenate(parts), G.rows(by_parameter=True)["0.weight"])
    assert list(G.on((X[:0], y[:0])).blocks()) == []
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        G.blocks(0)


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_progress_of_gram_matrices(cache, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, torch.device("cpu"), HOST._replace(merged=0))
    op, _, X, y = make(cache)
    G, Q = op.scores, op.scores.on((X, y), batch_size=4, cache=cache, progressbar=True)
    for H, other in ((G, None), (G, Q), (Q, G)):
        H.gram(other)
    capsys.readouterr()
    G.gram(progressbar=True)  # in less than a second
    assert "Gram" not in capsys.readouterr().err
    monkeypatch.setattr("fisherops._progress._DELAY", 1e-9)
    for H, other, options in ((G, None, {"progressbar": True}), (G, Q, {"progressbar": True}), (Q, G, {})):
        with mock.patch("fisherops._progress.tqdm", functools.partial(tqdm, mininterval=0, miniters=1)):
            H.gram(other, **options)
        shown = capsys.readouterr().err
        done, total = re.findall(r"Gram matrix: 100%.* (\d+)/(\d+) ", shown)[-1]
        assert done == total
    G.gram()
    Q.gram(G, progressbar=False)
    assert "Gram" not in capsys.readouterr().err


def test_reductions_and_options():
    op, model, X, y = make()
    mean = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=(X[:7], y[:7]), mc_samples=2, seed=3)
    Q = op.scores.on((X[:7], y[:7]), reduction="mean", mc_samples=2, seed=3)
    np.testing.assert_allclose(Q.todense(), mean.scores.todense(), rtol=1e-12, atol=1e-15)
    summed = op.scores.on((X[:7], y[:7]), mc_samples=2, seed=3)
    np.testing.assert_allclose(summed.todense(), np.sqrt(7) * Q.todense(), rtol=1e-12, atol=1e-15)
    # Without options, as the operator has them.
    own = op.scores.on([(X[:5], y[:5]), (X[5:], y[5:])], reduction="mean")
    np.testing.assert_allclose(own.todense(), op.scores.todense(), rtol=1e-12, atol=1e-15)
    weights = np.arange(7.0)
    weighted = op.scores.on((X[:7], y[:7]), mc_samples=2, seed=3, sample_weight=weights)
    factor = np.sqrt(np.repeat(weights, 2))[:, None]
    np.testing.assert_allclose(weighted.todense(), factor * summed.todense(), rtol=1e-12, atol=1e-15)


def test_one_example_and_none():
    op, _, X, y = make()
    G = op.scores
    whole = G.on((X, y)).todense()
    np.testing.assert_allclose(G.on((X[:1], y[:1])).todense(), whole[:1], rtol=1e-12)
    for kind in ("mc", "outputs"):
        empty = G.on((X[:0], y[:0]), kind=kind)
        assert empty.shape == (0, G.shape[1])
        assert empty.todense().shape == (0, G.shape[1])
        assert empty.gram(G).shape == (0, G.shape[0])
        assert G.gram(empty).shape == (G.shape[0], 0)
        assert empty.row_norms().shape == empty.datum.shape == (0,)
        np.testing.assert_array_equal(empty.T @ np.zeros(0), np.zeros(G.shape[1]))
    assert G.on([], kind="mc").shape == (0, G.shape[1])


def test_outputs_need_no_targets():
    op, model, X, _ = make(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double()))
    J = op.scores.on((X, None), kind="outputs")
    (expected,) = torch.autograd.functional.jacobian(
        lambda W: torch.func.functional_call(model, {"2.weight": W}, X), (model[2].weight.detach(),)
    )
    np.testing.assert_allclose(J.rows(by_parameter=True)["2.weight"], expected.flatten(0, 1), rtol=1e-12, atol=1e-15)


def test_data_with_indices_and_loaders():
    op, _, X, y = make()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    Q = op.scores.on([(X[part], y[part], part) for part in order.split(5)])
    np.testing.assert_array_equal(Q.datum, order)
    unknown = op.scores.on(DataLoader(TensorDataset(X, y), batch_size=5, shuffle=True))
    with pytest.raises(ValueError, match=r"not known which row is whose. Let it yield \(X, y, index\)"):
        _ = unknown.datum
    whole = op.scores.on((X, y)).todense()
    np.testing.assert_allclose(Q.todense(), whole[order], rtol=1e-12, atol=1e-15)
    loader = DataLoader(TensorDataset(X, y), batch_size=4)
    np.testing.assert_allclose(op.scores.on(loader).todense(), whole, rtol=1e-12, atol=1e-15)


def test_the_data_are_not_checked_twice_and_the_model_not_again():
    calls = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, X):
            calls.append(len(X))
            return self.linear(X)

    X, y = torch.randn(12, 4), torch.randint(3, (12,))
    G = fo.FisherMCLinearOperator(Counting(), nn.CrossEntropyLoss(), data=(X, y)).scores
    calls.clear()
    Q = G.on((X[:7], y[:7]))
    assert not calls
    Q.gram(G)
    assert calls.count(7) <= 2  # one with the uses recorded, and one as a plain call to compare with


def test_it_follows_the_model():
    op, model, X, y = make()
    Q = op.scores.on((X, y), kind="empirical")
    before = Q.todense()
    with torch.no_grad():
        model[0].weight.mul_(2)
    fresh = fo.EmpiricalFisherLinearOperator(model, nn.CrossEntropyLoss(reduction="sum"), data=(X, y))
    np.testing.assert_allclose(Q.todense(), fresh.scores.todense(), rtol=1e-10, atol=1e-13)
    assert abs(Q.todense() - before).max() > 1e-3
    np.testing.assert_allclose(Q.gram(op.scores), Q.todense() @ op.scores.todense().T, rtol=1e-10, atol=1e-13)


def test_of_sums():
    """Gram matrices with the rows of a sum of Fisher operators."""
    op, _, X, y = make()
    other, _, _, _ = make(seed=5)
    both = (2 * op + other).scores
    Q = op.scores.on((X[:3], y[:3]), kind="empirical")
    dense = np.concatenate([np.sqrt(2) * op.scores.todense(), other.scores.todense()])
    np.testing.assert_allclose(both.todense(), dense, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(Q.gram(both), Q.todense() @ dense.T, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(both.gram(Q), dense @ Q.todense().T, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(both.row_norms(), np.linalg.norm(dense, axis=1), rtol=1e-12)
    np.testing.assert_allclose(both.rows(3, 15), dense[3:15], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda G, X, y: G.on((X, y), kind="fisher"), ValueError, "`kind` must be one of 'mc', 'exact', 'empirical', "),
        (lambda G, X, y: G.on((X, y), reduction="none"), ValueError, "`reduction` must be 'sum' or 'mean', got 'none'"),
        (lambda G, X, y: G.on((X, y), rows="all"), ValueError, "`rows` must be 'term' or 'datum', got 'all'"),
        (lambda G, X, y: G.on((X, y), cache="all"), ValueError, "`cache` must be one of"),
        (lambda G, X, y: G.on((X, y), kind=["mc"]), ValueError, "`kind` must be one of 'mc', 'exact', 'empirical', "),
        (
            lambda G, X, y: G.on((X, y), kind="exact", rows="datum"),
            ValueError,
            "`rows` must be 'term' for kind='exact'",
        ),
        (lambda G, X, y: G.on((X, y), kind="outputs", reduction="mean"), ValueError, "no weights and no mean"),
        (lambda G, X, y: G.on((X, y), kind="outputs", sample_weight=y), ValueError, "no weights and no mean"),
        (lambda G, X, y: G.rows(0, 2.0), TypeError, "cannot be interpreted as an integer"),
        (lambda G, X, y: G.on((X, y), kind="exact", seed=1), ValueError, "`seed` and `mc_samples` are those of kind"),
        (lambda G, X, y: G.on((X[:, :3], y)).plan, RuntimeError, "shape"),
        (lambda G, X, y: G.on((X * torch.nan, y)).plan, FloatingPointError, "contains NaN"),
        (lambda G, X, y: G.on((X, None), kind="empirical").plan, ValueError, "the targets y must be given"),
        (lambda G, X, y: G.rows(3, 13), ValueError, r"rows 3 to 13 must be among the 12 rows of the score matrix"),
        (lambda G, X, y: G.rows(-1, 2), ValueError, r"rows -1 to 2 must be among"),
        (lambda G, X, y: G.gram(X), TypeError, "`other` must be a score matrix, got Tensor"),
        (lambda G, X, y: G.gram(G.dtype), TypeError, "`other` must be a score matrix"),
    ],
)
def test_what_does_not_fit(change, error, text):
    op, _, X, y = make()
    with pytest.raises(error, match=text):
        change(op.scores, X, y)


def test_score_matrices_of_other_parameters():
    op, *_ = make()
    model = nn.Linear(4, 3).double()
    other = fo.FisherMCLinearOperator(
        model, nn.CrossEntropyLoss(), data=(torch.randn(3, 4).double(), torch.ones(3).long())
    )
    with pytest.raises(ValueError, match="must have the same parameters, got 43 .* and 15"):
        op.scores.gram(other.scores)


@pytest.mark.parametrize("cache", ["auto", "scores", "factors", "none"])
def test_the_dense_matrix_is_read_from_the_rows(cache, monkeypatch):
    """D products in its place would cost hundreds of times as much."""
    op, *_ = make(cache)
    expected = (op.scores.T @ np.eye(12)).T
    monkeypatch.setattr(type(op.scores), "_mul", None)
    np.testing.assert_allclose(op.scores.todense(), expected, rtol=1e-12, atol=1e-15)


SELECTIONS = {
    "one parameter": "0.weight",
    "two parameters": ["2.bias", "0.weight"],
    "a slice": slice(3, 30, 2),
    "indices": [5, 0, 42, -3, 17],
    "a mask": np.arange(43) % 4 == 1,
}


@pytest.mark.parametrize("cache", ["auto", "scores", "none"])
@pytest.mark.parametrize("which", SELECTIONS)
def test_a_submatrix(which, cache):
    op, model, _, _ = make(cache)
    flat = np.arange(43)
    spans, start = {}, 0
    for name, p in model.named_parameters():
        spans[name], start = flat[start : start + p.numel()], start + p.numel()
    which = SELECTIONS[which]
    index = spans[which] if isinstance(which, str) else None
    if isinstance(which, list) and isinstance(which[0], str):
        index = np.concatenate([spans[name] for name in which])
    index = flat[which] if index is None else index
    d = np.linspace(0, 1, 43)
    for whole in (op, op.damped(0.1), op.damped(d), 2 * op.damped(d) + op):
        part, F = whole.submatrix(which), whole.todense()[np.ix_(index, index)]
        V = np.random.default_rng(0).standard_normal((len(index), 2))
        np.testing.assert_allclose(part @ V, F @ V, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(part.todense(), F, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(part.diagonal(), np.diag(F), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(part.trace(), np.trace(F), rtol=1e-10)
        G = part.scores.todense()
        np.testing.assert_allclose(G, whole.scores.todense()[:, index], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(part.scores.gram(), G @ G.T, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(part.scores.row_norms(), np.linalg.norm(G, axis=1), rtol=1e-10)
        again = part.submatrix(slice(1, 3)).todense()
        np.testing.assert_allclose(again, F[1:3, 1:3], rtol=1e-10, atol=1e-13)
        if part.shift is op.shift:
            assert len(fo.linalg.eigsh(part, 2).eigenvalues) == 2
    with mock.patch("fisherops.scores.selected.by_rows", None):  # of equal columns, by those of the whole matrices
        Q = op.submatrix(which).scores.gram((3 * op).submatrix(which).scores)
    np.testing.assert_allclose(Q, np.sqrt(3) * op.submatrix(which).scores.gram(), rtol=1e-10, atol=1e-13)
    part, F = op.submatrix(which), op.todense()[np.ix_(index, index)]
    b = np.ones(len(index))
    for method in ("auto", "dual", "dense", "primal"):
        x = fo.linalg.solve(part, b, 0.1, method=method, rtol=1e-10).x
        np.testing.assert_allclose(x, np.linalg.solve(F + 0.1 * np.eye(len(F)), b), rtol=1e-8)
    np.testing.assert_allclose(fo.linalg.inv(part, 0.1) @ b, np.linalg.solve(F + 0.1 * np.eye(len(F)), b), rtol=1e-4)
    np.testing.assert_allclose(fo.linalg.eigsh(part, 2).eigenvalues, np.linalg.eigvalsh(F)[-2:], rtol=1e-8, atol=1e-12)
    exact = np.linalg.slogdet(F + 0.1 * np.eye(len(F)))[1]
    np.testing.assert_allclose(fo.linalg.slogdet(part, 0.1).logabsdet, exact, rtol=1e-8)


@pytest.mark.parametrize(
    ("which", "error", "text"),
    [
        ("3.weight", KeyError, "there is no parameter '3.weight', the parameters are"),
        ([43], IndexError, "index 43 is out of range for 43 parameters"),
        ([-44], IndexError, "index -44 is out of range"),
        (np.ones(4, bool), IndexError, "a mask must have one entry for each of the 43 parameters, got 4"),
        (np.zeros(43, bool), ValueError, "must select at least one"),
        ([0.5], ValueError, "must be names, a slice, integers"),
        ([], ValueError, "must select at least one"),
        (["2.bias", "2.bias"], ValueError, "must not repeat parameters"),
        ([2, -41], ValueError, "must not repeat indices"),
        (np.ones((2, 2), int), ValueError, "must be names, a slice, integers"),
    ],
)
def test_submatrices_that_do_not_exist(which, error, text):
    with pytest.raises(error, match=text):
        make()[0].submatrix(which)


def test_names_in_other_containers():
    op = make()[0]
    expected = op.submatrix(["2.weight", "2.bias"]).todense()
    for names in ({"2.weight": 0, "2.bias": 0}.keys(), np.array(["2.weight", "2.bias"]), ("2.weight", "2.bias")):
        np.testing.assert_allclose(op.submatrix(names).todense(), expected, rtol=1e-12, atol=1e-15)


def test_gram_matrices_of_other_columns():
    op = make()[0]
    first, second = op.submatrix([0, 1]).scores, op.submatrix([2, 3]).scores
    for one, other in [
        (first, second),
        (first, op.scores),
        (op.scores, first),
        (op.submatrix(slice(None)).scores, op.scores),
    ]:
        with pytest.raises(ValueError, match="must have the same parameters"):
            one.gram(other)
    np.testing.assert_allclose(first.gram(op.submatrix([0, 1]).scores), first.gram(), rtol=1e-12)


@pytest.mark.parametrize("rows", [None, "term"])
def test_the_exact_fisher_of_other_data_has_rows_by_term(rows):
    """Columns of the square roots of different terms do not belong together, so they are not summed by example."""
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3).double(), nn.MSELoss(reduction="sum")
    data = torch.randn(6, 5, 4, dtype=torch.float64), torch.randn(6, 5, 3, dtype=torch.float64)
    G = fo.FisherMCLinearOperator(model, loss, data=data, rows="datum").scores
    Q = G.on(data, kind="exact", rows=rows)
    F = fo.FisherLinearOperator(model, loss, data=data).todense()
    np.testing.assert_allclose(Q.rows().T @ Q.rows(), F, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(np.bincount(Q.datum), 15)


def test_a_description_reads_nothing():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, X):
            Counting.calls += 1
            return super().forward(X)

    X, y = torch.randn(12, 4), torch.randint(3, (12,))
    G = fo.FisherMCLinearOperator(Counting(4, 3), nn.CrossEntropyLoss(), data=(X, y)).scores
    Counting.calls = 0
    Q = G.on((X[:7], y[:7]), kind="empirical")
    assert repr(Q) == "<ScoreMatrix: rows not counted yet, D=15, kind='empirical'>"
    assert not Counting.calls
    Q.gram()
    assert repr(Q) == "<ScoreMatrix: 7 rows, D=15, kind='empirical'>"


def test_reductions_of_other_data():
    op, _, X, y = make()
    assert op.scores.reductions == ("mean",)
    assert op.scores.on((X, y)).reductions == ("sum",)
    assert op.scores.on((X[:0], y[:0]), reduction="mean").shape == (0, 43)


def test_tiny_rows():
    """Squares that float32 cannot represent."""
    X = torch.linspace(1, 2, 8).view(4, 2) * 1e-25
    op = fo.FisherMCLinearOperator(
        nn.Linear(2, 3, bias=False), nn.MSELoss(reduction="sum"), data=(X, torch.zeros(4, 3))
    )
    exact = (op.scores.todense().astype(float) ** 2).sum()
    assert 0 < exact < 1e-40
    np.testing.assert_allclose(op.trace(), exact, rtol=1e-6)
    np.testing.assert_allclose(op.submatrix(slice(None)).trace(), exact, rtol=1e-6)
    np.testing.assert_allclose(
        op.scores.row_norms(), np.linalg.norm(op.scores.todense().astype(float), axis=1), rtol=1e-6
    )


@pytest.mark.parametrize("cache", ["scores", "factors"])
def test_gram_matrices_of_multiples_are_found_from_the_cached_rows(cache, monkeypatch):
    op = make(cache)[0]
    other = make(cache, seed=5)[0]
    both = 2 * op + other
    expected = {F: F.scores.todense() @ F.scores.todense().T for F in (2 * op, both, op.submatrix("2.weight"))}
    monkeypatch.setattr(type(op.scores), "_mul", None)  # no products with rows in their place
    for F, K in expected.items():
        np.testing.assert_allclose(F.scores.gram(), K, rtol=1e-10, atol=1e-13)
