"""The score matrix G as an operator, and its Gram matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import KINDS, cases, make_case
from scipy.sparse.linalg import LinearOperator, svds
from tolerances import assert_same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherops as fo
from fisherops._sizes import HOST, SIZES


@given(
    cases(),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["term", "datum"]),
    st.sampled_from(["auto", "scores", "factors", "linearization", "none"]),
)
def test_rows_products_and_gram(case, kind, rows, cache):
    options = {"exact": {}}.get(kind, {"rows": rows})
    op = KINDS[kind](case.model, case.loss, data=case.data, cache=cache, **options)
    scores = op.scores
    assert isinstance(scores, LinearOperator)
    G = scores.todense()
    assert G.shape == scores.shape
    assert_same(G.T @ G, op.todense(), case.dtype)
    assert_same(scores.gram(), G @ G.T, case.dtype)
    np.testing.assert_array_equal(scores.gram(), scores.gram().T)
    generator = np.random.default_rng(0)
    v, W = (generator.standard_normal(shape).astype(op.dtype) for shape in (case.D, (len(G), 2)))
    assert_same(scores @ v, G @ v, case.dtype)
    assert_same(scores.T @ W, G.T @ W, case.dtype)
    assert_same(scores.T @ (scores @ v), op @ v, case.dtype)
    assert_same(op.diagonal(), (G**2).sum(0), case.dtype)
    assert_same(np.array(op.trace()), np.array((G**2).sum()), case.dtype)


def test_svds_of_the_scores():
    case = make_case("dense", "ce", sizes=(5, 4))
    op = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    singular = np.sort(svds(op.scores, k=3, return_singular_vectors=False, v0=np.ones(9)))
    np.testing.assert_allclose(singular**2, np.linalg.eigvalsh(op.todense())[-3:], rtol=1e-9)


def test_the_gram_matrix_of_long_sequences_goes_by_blocks(monkeypatch):
    """Positions of linear layers and of embeddings, in blocks that do not divide the data."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 2)

        def forward(self, X):
            return self.head(self.table(X)).tanh().mean(1)

    net = Net().double()
    data = [(torch.randint(7, (n, 4)), torch.randint(2, (n,))) for n in (7, 5)]
    op = fo.FisherMCLinearOperator(net, nn.CrossEntropyLoss(), data=data, mc_samples=2, cache="factors")
    expected = op.scores.todense() @ op.scores.todense().T
    assert "factors" in str(op.plan)
    for filling in (1, 100, 2**21):
        monkeypatch.setitem(SIZES, torch.device("cpu"), HOST._replace(filling=filling))
        assert_same(op.scores.gram(), expected, torch.float64)
        assert_same(op.diagonal(), np.diag(op.todense()), torch.float64)


def test_batches_in_other_forms():
    """A batch in rows and one that is not kept: by products."""
    case = make_case("dense", "ce", sizes=(4, 3))
    whole = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data)
    G = whole.scores.todense()
    part = fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, max_memory=int(0.7 * whole.plan.nbytes))
    assert len({entry.form for entry in part.plan.entries}) == 2
    assert_same(part.scores.gram(), G @ G.T, case.dtype)
    assert_same(part.scores.todense(), G, case.dtype)


def test_rows_in_no_order():
    X, y = torch.randn(12, 3), torch.randint(3, (12,))
    loader = DataLoader(TensorDataset(X, y, torch.arange(12)), batch_size=4, shuffle=True)
    op = fo.FisherMCLinearOperator(nn.Linear(3, 3), nn.CrossEntropyLoss(), data=loader)
    kept = op.scores
    assert_same(kept.T @ (kept @ np.ones(12)), op @ np.ones(12), torch.float32)
    op = fo.FisherMCLinearOperator(nn.Linear(3, 3), nn.CrossEntropyLoss(), data=loader, cache="none")
    with pytest.raises(ValueError, match="the rows of the score matrix have no order: pass data in a fixed order"):
        op.scores
