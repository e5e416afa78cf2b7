"""The counter sampler: draws that depend on nothing but the data."""

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES, LOSSES, make_case
from scipy import stats
from tolerances import assert_same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherops as fo
from fisherops._draws import CounterSampler

MASK = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def uniform(seed, datum, term, sample, k):
    words = philox((datum, term, sample, k // 2), (seed & MASK, seed >> 32))
    high, low = words[:2] if k % 2 == 0 else words[2:]
    return (((high << 20) | (low >> 12)) + 0.5) / 2**52


def expected_fisher(case, seed, samples, places=None):
    """The definition, with draws by plain loops."""
    rows, divisor, start = [], 0.0, 0
    for b, (X, _) in enumerate(case.data):
        raw = case.model(X)
        f = oracle.flatten(case.loss, raw)
        index = range(start, start + len(X)) if places is None else places[b].tolist()
        start += len(X)
        terms = len(f) // len(X)
        divisor += len(f) if isinstance(case.loss, nn.CrossEntropyLoss) else raw.numel()
        for t in range(len(f)):
            for m in range(samples):
                u = [uniform(seed, index[t // terms], t % terms, m, k) for k in range(f.shape[1])]
                if isinstance(case.loss, nn.CrossEntropyLoss):
                    cumulative = f[t].detach().softmax(0).cumsum(0, dtype=torch.float64)
                    y = torch.tensor(int((cumulative <= u[0] * cumulative[-1]).sum()))
                elif isinstance(case.loss, nn.MSELoss):
                    y = f[t].detach() + math.sqrt(0.5) * torch.tensor(stats.norm.ppf(u), dtype=f.dtype)
                else:
                    y = (torch.tensor(u) < f[t].detach().sigmoid()).to(f.dtype)
                g = oracle.gradient(oracle.negative_log_likelihood(case.loss, f[t], y), case.params).double().numpy()
                rows.append(g)
    G = np.stack(rows)
    return G.T @ G / samples / (divisor if case.loss.reduction == "mean" else 1)


def build(case, data=None, **options):
    return fo.FisherMCLinearOperator(case.model, case.loss, data=data or case.data, **options)


@given(
    st.builds(
        make_case,
        architecture=st.sampled_from(ARCHITECTURES),
        loss=st.sampled_from(sorted(LOSSES)),
        reduction=st.sampled_from(["mean", "sum"]),
        sizes=st.lists(st.integers(1, 3), min_size=1, max_size=2),
        C=st.integers(2, 4),
        seed=st.integers(0, 1000),
    ),
    st.integers(0, 2**64 - 1),
    st.integers(1, 3),
)
def test_the_draws_are_philox_by_inverse_distribution_functions(case, seed, samples):
    # the normal quantiles of torch and SciPy differ in their last digits
    assert_same(
        build(case, seed=seed, mc_samples=samples).todense(), expected_fisher(case, seed, samples), torch.float32
    )


@pytest.mark.parametrize("architecture", ["dense", "recurrent", "image"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_split_and_the_order_of_the_data_do_not_matter(architecture, loss):
    case = make_case(architecture, loss, sizes=(12,))
    X, y = case.data[0]
    expected = build(case).todense()
    for sizes in ([5, 4, 3], [1] * 12):
        assert_same(build(case, list(zip(X.split(sizes), y.split(sizes), strict=True))).todense(), expected, case.dtype)
    order = torch.randperm(12)
    shuffled = [(X[part], y[part], part) for part in order.split(5)]
    assert_same(build(case, shuffled).todense(), expected, case.dtype)
    assert_same(build(case, shuffled) @ np.eye(len(expected)), expected, case.dtype)
    loader = DataLoader(TensorDataset(X, y, torch.arange(12)), batch_size=5, shuffle=True)
    op = build(case, loader)
    for _ in range(3):
        assert_same(op @ np.eye(len(expected)), expected, case.dtype)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_samples_are_nested(loss):
    """M F_M − (M − 1) F_{M−1} is the contribution of the last sample alone: positive semi-definite, of few vectors."""
    case = make_case("dense", loss, "sum", sizes=(3,))
    F = [M * build(case, mc_samples=M).todense() for M in (1, 2, 3)]
    for less, more in itertools.pairwise(F):
        values = np.linalg.eigvalsh(more - less)
        assert values.min() >= -1e-12 * values.max()
        assert np.sum(values > 1e-9 * values.max()) <= 3


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_precision_does_not_matter(loss):
    case = make_case("dense", loss, sizes=(50,), dtype=torch.float32)
    assert_same(build(case).todense(), build(case, dtype="float64").todense(), torch.float32)


def test_the_draws_have_their_distributions():
    """Chi-square and Kolmogorov-Smirnov tests, each with a false-alarm probability of 1e-6."""
    n = 100_000
    draws = CounterSampler(5).batch(torch.arange(n))
    p = torch.tensor([0.5, 0.0, 0.2, 0.3])
    counts = torch.bincount(draws.categorical(p.expand(n, 4), 1)[0], minlength=4).numpy()
    assert counts[1] == 0
    assert stats.chisquare(counts[[0, 2, 3]], n * p[[0, 2, 3]].double().numpy()).pvalue > 1e-6
    normal = draws.normal(torch.zeros(n, 3, dtype=torch.float64), 2).numpy()
    for m in range(2):
        for c in range(3):
            assert stats.kstest(normal[m, :, c], "norm").pvalue > 1e-6
    assert np.abs(np.corrcoef(normal.transpose(0, 2, 1).reshape(6, n)) - np.eye(6)).max() < 5.5 / np.sqrt(n)
    heads = draws.bernoulli(torch.full((n, 2), 0.3).logit(), 1)[0].sum(0).numpy()
    assert np.abs(heads - 0.3 * n).max() <= stats.norm.isf(1e-6) * np.sqrt(n * 0.21)


def test_a_test_of_draws_finds_a_planted_fault():
    """The chi-square test above rejects probabilities that are 2 % off."""
    n = 1_000_000
    p = torch.tensor([0.5, 0.2, 0.3])
    wrong = p * torch.tensor([1.02, 1.0, 1.0])
    labels = CounterSampler(5).batch(torch.arange(n)).categorical((wrong / wrong.sum()).expand(n, 3), 1)[0]
    assert stats.chisquare(torch.bincount(labels).numpy(), n * p.double().numpy()).pvalue < 1e-6


def test_indices_are_checked():
    case = make_case("dense", "ce", sizes=(4,))
    X, y = case.data[0]
    for index, error, message in [
        ([0, 1, 2, 3], TypeError, "the indices of batch 0 must be a tensor or array, got list"),
        (torch.arange(3), ValueError, r"must be 4 integers, one for each example, got shape \(3,\)"),
        (torch.arange(4.0), ValueError, "must be 4 integers.* of torch.float32"),
        (torch.arange(4) - 1, ValueError, r"must be in \[0, 2\*\*32\), got -1 to 2"),
        (torch.arange(4) + 2**32, ValueError, r"must be in \[0, 2\*\*32\)"),
    ]:
        with pytest.raises(error, match=message):
            build(case, [(X, y, index)])


def test_other_data_in_a_later_pass_are_found_by_their_indices():
    case = make_case("dense", "ce", sizes=(4,))
    X, y = case.data[0]

    class Growing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(X, y, torch.arange(4) + 10 * (self.passes > 2))])

    op = build(case, Growing())
    with pytest.raises(RuntimeError, match="the first pass read 4 examples, this one 4 others"):
        op @ np.ones(case.D)


def test_terms_that_do_not_belong_to_data_need_the_stream():
    class Pairs(nn.Linear):
        def forward(self, X):
            return super().forward(X[:-1] * X[1:])

    data = [(torch.randn(4, 3), torch.zeros(3, 2))]
    op = fo.FisherMCLinearOperator(Pairs(3, 2), nn.MSELoss(), data=data, batch_size_fn=len)
    with pytest.raises(ValueError, match="3 loss terms for 4 data.*sampler='stream' for a Monte-Carlo Fisher"):
        op @ np.ones(8)
    fo.FisherMCLinearOperator(Pairs(3, 2), nn.MSELoss(), data=data, batch_size_fn=len, sampler="stream") @ np.ones(8)


def test_indices_that_name_a_datum_twice():
    case = make_case("dense", "mse", sizes=(4,))
    X, y = case.data[0]
    with pytest.raises(
        ValueError, match="the indices of batch 0 must be distinct, got 1 more than once.*index of each example"
    ):
        build(case, [(X, y, torch.tensor([0, 1, 1, 2]))])
    with pytest.raises(
        ValueError, match="the indices of all batches must be distinct, got 0 in batch 0 and in batch 1"
    ):
        build(case, [(X, y, torch.arange(4)), (X, y, torch.arange(4))])
