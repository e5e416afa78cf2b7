"""Sums of a million terms keep their digits in float32: equal terms round in the same direction, so errors add up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherops as fo
from fisherops._matmul import times_transposed
from fisherops._sums import SegmentSum

MILLION = 10**6
# Blocks of 4,096 terms: at most a quarter of 4,096 roundings, in practice less than half of that.
CLOSE = {"rtol": 512 * np.finfo(np.float32).eps}


class MeanOfLookUps(nn.Module):
    """The mean over positions of one number for each token, which is J = 1 for the token that all positions have."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 1)

    def forward(self, X):
        return self.table(X).mean(1)


class MeanOfProducts(nn.Module):
    """The mean over positions of a bias-free linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, X):
        return self.layer(X).mean(1)


def exact(model, X, **options):
    return fo.FisherLinearOperator(model, nn.MSELoss(reduction="sum"), data=(X, torch.zeros(len(X), 1)), **options)


REVERSE = pytest.mark.xfail(strict=True, reason="torch's own backward pass, the reference of the probe, loses digits")


@pytest.mark.parametrize("shape", [(1000, 1000), pytest.param((1, MILLION), marks=REVERSE)])
@pytest.mark.parametrize(
    "cache",
    ["auto", "factors", "scores", pytest.param("linearization", marks=REVERSE), pytest.param("none", marks=REVERSE)],
)
def test_a_million_equal_look_ups(shape, cache):
    N, _ = shape
    op = exact(MeanOfLookUps(), torch.full(shape, 1), cache=cache)
    expected = np.array([0.0, 2 * N, 0.0])  # MSELoss(reduction="sum") has B = 2
    np.testing.assert_allclose(op @ np.ones(3), expected, **CLOSE)
    np.testing.assert_allclose(op.diagonal(), expected, **CLOSE)
    np.testing.assert_allclose(op.trace(), 2 * N, **CLOSE)
    if cache != "none":
        G = op.scores
        np.testing.assert_allclose(G @ np.ones(3), np.full(N, 2**0.5), **CLOSE)
        np.testing.assert_allclose(G.T @ np.ones(N), expected / 2**0.5, **CLOSE)


@pytest.mark.parametrize("cache", ["auto", "factors", "scores"])
@pytest.mark.parametrize("shape", [pytest.param((1, MILLION), marks=REVERSE), (MILLION, 1)])
def test_a_million_equal_positions_or_examples(shape, cache):
    N, _ = shape
    x = 0.3
    op = exact(MeanOfProducts(), torch.full((*shape, 1), x), cache=cache)
    np.testing.assert_allclose(op @ np.ones(1), [2 * N * x**2], **CLOSE)
    np.testing.assert_allclose(op.diagonal(), [2 * N * x**2], **CLOSE)
    np.testing.assert_allclose(op.todense(), [[2 * N * x**2]], **CLOSE)
    np.testing.assert_allclose(op.scores.T @ np.ones(N), [2**0.5 * N * x], **CLOSE)


@pytest.mark.parametrize("cache", ["factors", "scores"])
@pytest.mark.parametrize("N", [2, 100])
def test_a_million_equal_parameters(N, cache):
    D, x = MILLION if N == 2 else 2**17, 0.3
    op = exact(nn.Linear(D, 1, bias=False), torch.full((N, D), x), cache=cache)
    v = np.ones(D, np.float32)
    np.testing.assert_allclose(op.scores @ v, np.full(N, 2**0.5 * x * D), **CLOSE)
    np.testing.assert_allclose(op @ v, np.full(D, 2 * N * x**2 * D), **CLOSE)
    np.testing.assert_allclose(op.scores.gram(), np.full((N, N), 2 * x**2 * D), **CLOSE)


@given(st.integers(1, 9), st.integers(0, 5000), st.integers(1, 3), st.integers(0, 2**31))
def test_sums_by_index_are_those_of_a_loop(count, M, K, seed):
    generator = torch.Generator().manual_seed(seed)
    index = (torch.rand(M, generator=generator) ** 4 * count).long()
    vectors = torch.randint(-1000, 1000, (K, M, 2), generator=generator).float()  # sums of integers are exact
    out = torch.full((K, count, 2), torch.nan)
    SegmentSum(index, count)(vectors, out)
    for k in range(count):
        assert torch.equal(out[:, k], vectors[:, index == k].sum(1))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 8193), (3, 50, 20_000), (200, 1, 12_288), (9, 8, 600_001)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_a_long_axis(m, n, k, transposed):
    generator = torch.Generator().manual_seed(0)
    X, W = torch.rand(m, k, generator=generator), torch.rand(n, k, generator=generator)
    W = W.T.contiguous().T if transposed else W
    np.testing.assert_allclose(times_transposed(X, W), X.double() @ W.double().T, **CLOSE)
