"""Random projections of rows: the same signs however rows are held, and Gram matrices without bias."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import KINDS, cases, make_case
from tolerances import assert_same
from torch import nn

import fisherops as fo
from fisherops.scores import projection
from fisherops.scores.projection import Signs

CACHES = ["auto", "scores", "factors", "linearization", "none"]


def signs_of(G, k, seed=0):
    return Signs(G.parameters, k, seed).flat(slice(0, k)).double().cpu().numpy().T


@settings(max_examples=settings.default.max_examples // 5)
@given(
    cases(2),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["term", "datum"]),
    st.sampled_from(CACHES),
    st.integers(1, 300),
    st.sampled_from([2**22, 500]),
)
def test_rows_are_multiplied_by_the_signs(case, kind, rows, cache, k, elements):
    options = {"exact": {}}.get(kind, {"rows": rows})
    G = KINDS[kind](case.model, case.loss, data=case.data[:1], cache=cache, **options).scores
    Q = G.on(case.data[1:], kind="empirical", cache=cache)
    with mock.patch.object(projection, "_ELEMENTS", elements):
        for H in (G, Q):
            dense = H.todense()
            found = H.project(k, 5)
            expected = dense @ signs_of(G, k, 5) / np.sqrt(k)
            assert_same(found.value, expected, case.dtype)
            if (gram := dense @ dense.T).any() and len(dense) < 10:
                assert 0.2 <= found.error / (np.linalg.norm(expected @ expected.T - gram) / np.linalg.norm(gram)) <= 5


class Uses(nn.Module):
    """Parameters that are sliced, transposed, repeated, normalized, grouped, shared with an embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.qkv = nn.Parameter(torch.randn(3, 2, 4, 2))
        self.fused = nn.Linear(4, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.grouped = nn.Conv1d(4, 4, 3, groups=2, padding=1)
        self.transposed = nn.ConvTranspose1d(4, 2, 2)
        self.gain = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, X):
        h = self.table(X)
        heads = torch.einsum("ntd,hde->nthe", h, self.qkv[1]).flatten(2)
        first, second = self.fused(heads).chunk(2, -1)
        h = h + torch.tanh(first) * self.gain + second @ self.qkv[0, 0, :, :1].expand(4, 4)
        h = self.normed(h) + self.scale * h @ self.fused.weight[:4].T
        h = h + self.grouped(h.mT).mT
        return torch.cat([h @ self.table.weight.T, self.transposed(h.mT).mT[:, 1:]], -1).mT


@pytest.mark.parametrize(
    ("cache", "limit", "rows"),
    [
        ("scores", 0, "term"),
        ("factors", 0, "term"),
        ("factors", 0, "datum"),
        ("none", 0, "datum"),
        ("none", 2**28, "term"),
    ],
)
def test_uses_of_every_sort(monkeypatch, cache, limit, rows):
    torch.manual_seed(0)
    model = Uses().double()
    X, y = torch.randint(6, (5, 3)), torch.randint(8, (5, 3))
    op = fo.FisherMCLinearOperator(
        model, nn.CrossEntropyLoss(), data=[(X[:2], y[:2]), (X[2:], y[2:])], cache=cache, rows=rows
    )
    G = op.scores
    monkeypatch.setattr(projection, "_BYTES", limit)
    for H in (G, (2 * op + op.damped(1.0)).scores, op.submatrix(["gain", "fused.weight"]).scores):
        assert_same(H.project(140, 3).value, H.todense() @ signs_of(H, 140, 3) / np.sqrt(140), np.float64)


def test_gram_matrices_have_no_bias():
    case = make_case("dense", sizes=(4,), dtype=torch.float64)
    G = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data).scores
    Q = G.on(case.data[0], kind="empirical")
    draws = []
    for seed in range(80):
        signs = Signs(G.parameters, 4, seed)
        draws.append([(H.projected(signs) / 2).numpy() for H in (G, Q)])
    for left, right, expected in ((0, 0, G.gram()), (1, 0, Q.gram(G))):
        samples = np.stack([pair[left] @ pair[right].T for pair in draws])
        standard_error = samples.std(0, ddof=1) / len(samples) ** 0.5
        assert (np.abs(samples.mean(0) - expected) <= 5 * standard_error + 1e-12).all()
    squares = np.stack([(pair[0] ** 2).sum(1) for pair in draws]) / np.diag(G.gram())
    assert squares.var(0).max() <= 1.5 * 8 / 4


def test_the_error_falls_as_the_root_of_the_columns():
    case = make_case("dense", sizes=(40,), dtype=torch.float64)
    G = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data).scores
    errors = [np.mean([G.project(k, seed).error for seed in range(5)]) for k in (50, 2000)]
    assert 3 <= errors[0] / errors[1] <= 13


def test_signs_are_independent_of_blocks_and_other_columns():
    case = make_case("convolutional")
    G = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data).scores
    signs = Signs(G.parameters, 300, 1)
    whole = signs.flat(slice(0, 300))
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    pieces = [signs.flat(slice(a, b)) for a, b in ((0, 1), (1, 130), (130, 256), (256, 300))]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(Signs(G.parameters, 7, 1).flat(slice(0, 7)), whole[:7])
    assert not torch.equal(Signs(G.parameters, 7, 2**64 - 1).flat(slice(0, 7)), whole[:7])
    assert (whole.T[None] == whole.T[:, None]).all(2).sum() == len(whole.T)  # of no two elements the same


def test_results_and_errors():
    case = make_case()
    G = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data).scores
    assert isinstance(G.project(3, like=torch.empty(0)).value, torch.Tensor)
    assert np.asarray(G.project(3)).shape == (len(G.todense()), 3)
    empty = G.on((case.data[0][0][:0], case.data[0][1][:0]), kind="empirical").project(3)
    assert (empty.value.shape, empty.error) == ((0, 3), 0.0)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        G.project(0)
    with pytest.raises(TypeError, match="`k` must be an integer, got 2.5"):
        G.project(2.5)
    with pytest.raises(ValueError, match="`seed` must be from 0 to 18446744073709551615, got -1"):
        G.project(3, -1)
