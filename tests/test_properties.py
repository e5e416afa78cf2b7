"""The Monte-Carlo Fisher is the matrix that its definition says, for any model, loss, data and precision."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES, LOSSES, make_case
from tolerances import assert_same

import fisherops as fo
from fisherops._sizes import HOST, SIZES

cases = st.builds(
    make_case,
    architecture=st.sampled_from(ARCHITECTURES),
    loss=st.sampled_from(sorted(LOSSES)),
    reduction=st.sampled_from(["mean", "sum"]),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    C=st.integers(2, 4),
    seed=st.integers(0, 10**6),
)


def operator(case, **options):
    return fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, **{"sampler": "stream", **options})


def vectors(case, *shape, seed=0):
    return torch.randn(case.D, *shape, generator=torch.Generator().manual_seed(seed), dtype=case.dtype).numpy()


@given(cases, st.integers(1, 3), st.integers(0, 2**63))
def test_operator_equals_the_definition(case, samples, seed):
    op = operator(case, seed=seed, mc_samples=samples)
    expected = oracle.monte_carlo_fisher(case.model, case.loss, case.params, case.data, seed, samples)
    assert_same(op @ np.eye(case.D, dtype=op.dtype), expected, case.dtype)
    assert_same(op.todense(), expected, case.dtype)
    assert_same(op.diagonal(), np.diag(expected), case.dtype)
    assert_same(op.trace(), np.trace(expected), case.dtype)


@given(cases)
def test_operator_is_symmetric_and_positive_semidefinite(case):
    op = operator(case)
    F = op.todense()
    assert_same(F, F.T, case.dtype)
    x, y = vectors(case), vectors(case, seed=1)
    Fx, Fy = op @ x, op @ y
    scale = np.linalg.norm(x) * np.linalg.norm(Fy)
    eps = np.finfo(op.dtype).eps
    assert abs(y @ Fx - x @ Fy) <= 1000 * eps * scale
    assert x @ Fx >= -1000 * eps * np.linalg.norm(x) * np.linalg.norm(Fx)
    assert np.linalg.eigvalsh(F.astype(np.float64)).min() >= -1000 * eps * np.abs(F).max() * case.D


@given(cases, st.floats(-4, 4), st.floats(-4, 4))
def test_products_are_linear(case, a, b):
    op = operator(case)
    x, y = vectors(case), vectors(case, seed=1)
    expected = a * (op @ x) + b * (op @ y)
    bound = 1000 * np.finfo(op.dtype).eps * (abs(a) * np.abs(op @ x).max() + abs(b) * np.abs(op @ y).max())
    assert np.abs(op @ (np.asarray(a * x + b * y, op.dtype)) - expected).max() <= bound


@given(cases, st.integers(0, 40))
def test_matmat_is_the_stack_of_matvecs(case, K):
    op = operator(case)
    V = vectors(case, K)
    stacked = np.stack([op.matvec(V[:, k]) for k in range(K)], axis=1) if K else np.zeros((case.D, 0))
    assert_same(op.matmat(V), stacked, case.dtype)


@given(cases)
def test_every_product_sees_the_same_matrix(case):
    op = operator(case)
    v = vectors(case)
    first = op @ v
    torch.rand(7)  # the state of the global generator does not matter
    np.testing.assert_array_equal(op @ v, first)
    np.testing.assert_array_equal(operator(case) @ v, first)
    assert_same(operator(case, check_deterministic=False) @ v, first, case.dtype)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_other_seeds_are_other_matrices(loss):
    case = make_case("dense", loss, sizes=(20,))
    traces = {operator(case, seed=seed).trace() for seed in range(20)}
    assert len(traces) == 20


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_another_split_of_the_data_changes_the_draws_but_not_the_scale(loss):
    """Averaged over seeds, one batch, ragged batches and single data have the same trace (5 standard errors)."""
    X, y = make_case("dense", loss, sizes=(12,)).data[0]
    model = make_case("dense", loss).model
    estimates = []
    for sizes in ([12], [7, 4, 1], [1] * 12):
        data = list(zip(X.split(sizes), y.split(sizes), strict=True))
        traces = [
            fo.FisherMCLinearOperator(
                model, LOSSES[loss](), data=data, seed=s, mc_samples=4, check_deterministic=False
            ).trace()
            for s in range(25)
        ]
        estimates.append((np.mean(traces), np.std(traces, ddof=1) / 5))
    for mean, error in estimates[1:]:
        assert abs(mean - estimates[0][0]) <= 5 * np.hypot(error, estimates[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_thousand_batches_keep_the_digits_of_one(monkeypatch, dtype):
    """Batches that are not merged, because they do not fit or differ, are added with compensation."""
    monkeypatch.setitem(SIZES, torch.device("cpu"), HOST._replace(merged=0))
    model = torch.nn.Linear(3, 1, bias=False, dtype=dtype)
    X = torch.rand(2_000, 3, dtype=dtype)  # numbers of one sign, whose plain sum loses digits
    data = [(X[i : i + 1], X[i : i + 1, :1]) for i in range(len(X))]
    op = fo.FisherMCLinearOperator(
        model, torch.nn.MSELoss(reduction="sum"), data=data, check_deterministic=False, sampler="stream"
    )
    generator = torch.Generator().manual_seed(2147483647)
    noise = torch.stack([torch.randn((1, 1, 1), generator=generator, dtype=dtype) for _ in X]).reshape(-1, 1)
    G = (noise.numpy().astype(np.longdouble) * X.numpy()) * np.sqrt(np.longdouble(2))
    v = torch.rand(3, dtype=dtype).numpy()
    expected = G.T @ (G @ v)
    bound = 4 * np.finfo(v.dtype).eps * np.abs(expected).max()
    assert np.abs(op @ v - expected).max() <= bound
    plain = np.cumsum(G * (G @ v)[:, None], 0, dtype=v.dtype)[-1]
    assert np.abs(plain - expected).max() > bound


def test_merged_batches_have_the_digits_of_one_batch():
    model = torch.nn.Linear(3, 1, bias=False)
    X = torch.rand(2_000, 3)
    small = [(X[i : i + 4], X[i : i + 4, :1]) for i in range(0, len(X), 4)]
    v = torch.rand(3).numpy()
    exact = fo.FisherMCLinearOperator(model.double(), torch.nn.MSELoss(), data=[(X.double(), X[:, :1].double())])
    expected = exact @ v.astype("f8")
    model.float()
    op, one = (
        fo.FisherMCLinearOperator(model, torch.nn.MSELoss(), data=data, check_deterministic=False)
        for data in (small, [(X, X[:, :1])])
    )
    error, own = (np.abs(F @ v - expected).max() for F in (op, one))
    assert len(op.scores.materialized()) == 1
    assert error <= 2 * own + 4 * np.finfo("f4").eps * np.abs(expected).max()
