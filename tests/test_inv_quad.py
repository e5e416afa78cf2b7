"""Q (F + λI)⁻¹ Tᵀ against dense algebra, by every method."""

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import KINDS, cases
from torch import nn

import fisherops as fo
from fisherops import linalg
from fisherops.linalg import panels

METHODS = ["auto", "dual", "dense", "primal"]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


def reference(op, q, t, damping):
    A = op.todense().astype(float) + damping * np.eye(op.shape[0])
    return q.astype(float) @ np.linalg.solve(A, t.astype(float).T)


def problem(dtype=torch.float64, **options):
    """Return an operator of 40 examples in two batches, and empirical scores of these and of 20 others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    X, y = torch.randn(60, 6, dtype=dtype), torch.randint(3, (60,))
    train = [(X[:20], y[:20]), (X[20:40], y[20:40])]
    op = fo.FisherMCLinearOperator(net, nn.CrossEntropyLoss(), data=train, **options)
    return op, op.scores.on((X[40:], y[40:]), kind="empirical"), op.scores.on(train, kind="empirical")


@settings(max_examples=40)
@given(
    cases(2),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(sorted([*KINDS, "outputs"])),
    st.sampled_from(["auto", "scores", "factors", "linearization", "none"]),
    st.sampled_from(METHODS),
    st.sampled_from([2048, 3]),
)
def test_it_is_that_of_dense_algebra(case, kind, other, cache, method, width):
    with mock.patch.multiple(panels, _WHOLE=width, _WIDTH=width):
        compare(case, kind, other, cache, method)


def compare(case, kind, other, cache, method):
    op = KINDS[kind](case.model, case.loss, data=case.data[:1], cache=cache)
    Q, G = op.scores.on(case.data[1:], kind=other, cache=cache), op.scores
    damping = max(0.1 * float(np.linalg.norm(op.todense(), 2)), 1e-3)
    tolerance = TOLERANCES[case.dtype]
    for rows, others in ((Q, None), (Q, G), (G, Q)):
        found = linalg.inv_quad(op, rows, others, damping=damping, method=method, rtol=tolerance / 10, maxiter=1000)
        q, t = rows.rows(), (rows if others is None else others).rows()
        expected = reference(op, q, t, damping)
        assert found.converged or case.dtype == torch.float32
        scale = np.linalg.norm(q.astype(float), 2) * np.linalg.norm(t.astype(float), 2) / damping
        assert np.abs(found.value - expected).max(initial=0) <= tolerance * scale
        if others is None:
            np.testing.assert_array_equal(found.value, found.value.T)
            alone = linalg.inv_quad(op, Q, damping=damping, method=method, rtol=tolerance / 10, diagonal=True)
            assert np.abs(alone.value - np.diag(expected)).max(initial=0) <= tolerance * scale
            less = linalg.inv_quad(op, Q, damping=2 * damping, method=method, rtol=tolerance / 10, diagonal=True)
            assert (less.value <= alone.value + tolerance * scale).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", "vector", "composite", "submatrix"])
def test_operators_and_arrays(name, method, dtype):
    op, test, train = problem(dtype)
    other = fo.FisherLinearOperator(
        nn.Linear(op.shape[0] - 1, 1).to(dtype),
        nn.MSELoss(),
        data=(torch.randn(5, op.shape[0] - 1).to(dtype), torch.randn(5, 1).to(dtype)),
    )
    A = {
        "plain": op,
        "vector": op.damped(np.linspace(0.1, 1, op.shape[0])),
        "composite": 2 * op.damped(0.1) + other,
        "submatrix": op.submatrix(slice(0, 48)),
    }[name]
    q, t = (rows.rows()[:, : A.shape[0]] for rows in (test, train))
    tolerance = TOLERANCES[dtype]
    for Q, T in [(q, t), (t, q)] if name == "submatrix" else [(test, train), (train, test), (test, t), (q, train)]:
        found = linalg.inv_quad(A, Q, T, damping=0.05, method=method, rtol=tolerance / 10)
        expected = reference(A, *((q, t) if len(found.value) == len(q) else (t, q)), 0.05)
        assert found.converged
        np.testing.assert_allclose(found.value, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("method", ["dual", "dense"])
def test_least_norm_is_the_pseudoinverse(method):
    op, test, train = problem()
    found = linalg.inv_quad(op, test, train, damping=0, least_norm=True, method=method)
    F = op.todense()
    expected = test.rows() @ np.linalg.pinv(F, rcond=1e-12, hermitian=True) @ train.rows().T
    np.testing.assert_allclose(found.value, expected, atol=1e-8 * np.abs(expected).max())


def test_values_fall_as_the_damping_grows():
    op, test, _ = problem()
    values = [linalg.inv_quad(op, test, damping=d, diagonal=True).value for d in (1e-3, 1e-2, 1e-1, 1.0)]
    assert (np.diff(values, axis=0) < 0).all()


def test_one_factorization_serves_all_calls_until_the_model_changes(monkeypatch):
    op, test, train = problem()
    count = []
    original = panels.Cholesky.start
    monkeypatch.setattr(panels.Cholesky, "start", lambda self: count.append(1) or original(self))
    for _ in range(2):
        linalg.inv_quad(op, test, train, damping=0.1, method="dual")
        linalg.inv_quad(op, train, damping=0.1, method="dual", diagonal=True)
    assert len(count) == 1
    with torch.no_grad():
        next(iter(op.scores.parameters.tensors.values())).add_(0.1)
    found = linalg.inv_quad(op, test, damping=0.1, method="dual")
    assert len(count) == 2
    np.testing.assert_allclose(found.value, reference(op, test.rows(), test.rows(), 0.1), rtol=1e-9)
    linalg.inv_quad(op, test, damping=0.2, method="dual")
    assert len(count) == 3


@pytest.mark.parametrize("method", ["dual", "primal"])
def test_blocks_that_fit_into_memory_give_the_same(method, monkeypatch, tmp_path):
    op, test, train = problem()
    whole = linalg.inv_quad(op, test, train, damping=0.1, method=method, rtol=1e-10).value
    module = sys.modules["fisherops.linalg.inv_quad"]
    original = module._Problem

    class Small(original):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._memory = 7 * (24 * 40 if method == "dual" else 10 * op.shape[0] * 8)

    monkeypatch.setattr(module, "_Problem", Small)
    checkpoint = tmp_path / "state" if method == "primal" else None
    for _ in range(2):
        found = linalg.inv_quad(op, test, train, damping=0.1, method=method, rtol=1e-10, checkpoint=checkpoint)
        np.testing.assert_allclose(found.value, whole, rtol=1e-7, atol=1e-9 * np.abs(whole).max())
    if checkpoint is not None:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["state", "state-1", "state-2"]


def test_arrays_come_in_the_library_that_is_asked_for():
    op, test, _ = problem()
    q = torch.from_numpy(test.rows())
    assert isinstance(linalg.inv_quad(op, q, damping=0.1).value, torch.Tensor)
    assert isinstance(linalg.inv_quad(op, test, damping=0.1, like=q).value, torch.Tensor)
    forms = linalg.inv_quad(op, test, damping=0.1)
    np.testing.assert_array_equal(np.asarray(forms), forms.value)


def test_no_rows():
    op, _, train = problem()
    nothing = np.zeros((0, op.shape[0]))
    for method in METHODS:
        assert linalg.inv_quad(op, nothing, train, damping=0.1, method=method).value.shape == (0, 40)
        assert linalg.inv_quad(op, nothing, damping=0.1, method=method, diagonal=True).value.shape == (0,)


def test_bad_input():
    op, test, train = problem()
    D, y = op.shape[0], torch.zeros(4, dtype=torch.int64)
    of_nan, of_five = (op.scores.on((X.double(), y)) for X in (torch.full((4, 6), np.nan), torch.ones(4, 5)))
    elsewhere = fo.FisherMCLinearOperator(
        nn.Linear(6, 3).double(), nn.CrossEntropyLoss(), data=(torch.randn(4, 6).double(), torch.randint(3, (4,)))
    )
    bad = [
        (ValueError, "`Q` must belong to the operator's problem", {"Q": elsewhere.scores}),
        (ValueError, "`T` must belong to the operator's problem", {"T": elsewhere.scores}),
        (ValueError, "`Q` must have shape .k, 83.", {"Q": np.ones((2, D - 1))}),
        (ValueError, "`T` must be finite, got NaN", {"T": np.full((2, D), np.nan)}),
        (TypeError, "`Q` must be a score matrix or an array", {"Q": "rows"}),
        (TypeError, "`Q` must be real", {"Q": np.ones((2, D), complex)}),
        (ValueError, "`damping` must be at least 0", {"damping": -1.0}),
        (ValueError, "`damping` must be positive, because F is singular", {"damping": 0.0}),
        (ValueError, "`damping` must be at least 0 and finite", {"damping": np.nan}),
        (ValueError, "`rtol` must be at least 0 and below 1", {"rtol": 2.0}),
        (FloatingPointError, "the model's output for batch 0 contains NaN", {"Q": of_nan}),
        (RuntimeError, "shapes cannot be multiplied", {"Q": of_five}),
        (ValueError, "`T` must be None for diagonal=True", {"diagonal": True}),
        (ValueError, "`method` must be 'dual' or 'dense' for least_norm", {"method": "primal", "least_norm": True}),
    ]
    for error, match, changes in bad:
        options = {"Q": test, "T": train, "damping": 0.1, **changes}
        with pytest.raises(error, match=match):
            linalg.inv_quad(op, options.pop("Q"), options.pop("T"), **options)
    small, test, _ = problem(max_memory=20_000)
    with pytest.raises(ValueError, match="`max_memory` must leave .* bytes for method='dual'.* or 'primal'"):
        linalg.inv_quad(small, test, damping=0.1, method="dual")


def test_interrupted_conjugate_gradients_raise_what_python_does(tmp_path):
    """The blocks that are done are in their files."""
    op, Q, _ = problem()
    calls = []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return product(*arguments)

    product = op.score_matrix.product
    with mock.patch.object(op.score_matrix, "product", interrupt), pytest.raises(KeyboardInterrupt):
        linalg.inv_quad(op, Q, damping=1e-3, method="primal", rtol=1e-10, checkpoint=tmp_path / "state")
    assert list(tmp_path.iterdir())
    found = linalg.inv_quad(op, Q, damping=1e-3, method="primal", rtol=1e-10, checkpoint=tmp_path / "state")
    assert found.converged
    expected = linalg.inv_quad(op, Q, damping=1e-3, method="dense")
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-6, atol=1e-9)


# ---- Large Gram matrices -----------------------------------------------------------------------------


@pytest.fixture
def _small_panels(monkeypatch):
    for name in ("_WHOLE", "_WIDTH", "_WIDEST"):
        monkeypatch.setattr(panels, name, 7)


def wide_problem(dtype=torch.float64, **options):
    """Return an operator of 80 rows in two batches, its factor's bytes, and other rows."""
    op, test, train = problem(dtype, mc_samples=2, **options)
    return op, panels.bytes_of(op.scores.shape[0], 4 if dtype == torch.float32 else 8), test, train


@pytest.mark.usefixtures("_small_panels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_exceeds_memory_goes_to_files(dtype, tmp_path):
    op, _, test, train = wide_problem(dtype)
    whole = linalg.inv_quad(op, test, train, damping=0.1, method="dual")
    left = panels.bytes_at_work(80, dtype.itemsize)
    op, _, test, train = wide_problem(dtype, max_memory=op.plan.nbytes + left)
    with pytest.raises(ValueError, match="`max_memory` must leave .* Raise it, pass a folder as `spill`, or use"):
        linalg.inv_quad(op, test, train, damping=0.1, method="dual")
    found = linalg.inv_quad(op, test, train, damping=0.1, method="dual", spill=tmp_path)
    assert found.converged
    np.testing.assert_allclose(found.value, whole.value, atol=TOLERANCES[dtype] * np.abs(whole.value).max())
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    assert len(files) > 2
    assert {np.load(file).dtype.itemsize for file in files} == {dtype.itemsize}
    del op, test, train, found
    gc.collect()
    assert not folder.exists()  # it belongs to the score matrix


@pytest.mark.usefixtures("_small_panels")
@pytest.mark.parametrize("is_wide", [True, False])
def test_single_precision_is_taken_where_the_spectrum_allows(is_wide, tmp_path):
    """Half the bytes, refined if the residual demands it; double precision for a damping near the rounding."""
    op, nbytes, test, train = wide_problem(torch.float32)
    left = nbytes + panels.bytes_at_work(80, 4)
    op, _, test, train = wide_problem(torch.float32, max_memory=None if is_wide else op.plan.nbytes + left)
    expected = reference(op, test.rows(), train.rows(), 1e-3)
    dtypes, append = [], panels.Panels.append
    with mock.patch.object(
        panels.Panels, "append", lambda self, panel: dtypes.append(panel.dtype) or append(self, panel)
    ):
        for damping in (0.1, 1e-3):
            found = linalg.inv_quad(op, test, train, damping=damping, method="dual", rtol=1e-4)
            assert found.converged
    np.testing.assert_allclose(found.value, expected, atol=1e-3 * np.abs(expected).max())
    assert set(dtypes[:12]) == {torch.float32}
    assert set(dtypes[12:]) == {torch.float64 if is_wide else torch.float32}


@pytest.mark.usefixtures("_small_panels")
def test_a_gram_matrix_that_is_singular_to_rounding_is_factorized():
    op, test, _ = problem(torch.float32, mc_samples=2)
    found = linalg.inv_quad(op, test, damping=1e-9, method="dual")
    assert np.isfinite(found.value).all()


KILLED = """
import os, sys
import numpy as np
import test_inv_quad as own
from fisherops import linalg
from fisherops.linalg import panels

panels._WHOLE = panels._WIDTH = panels._WIDEST = 7
op, _, test, train = own.wide_problem()
append, stop = panels.Panels.append, int(sys.argv[2])

def counted(self, panel):
    if len(self) == stop:
        os._exit(3)
    append(self, panel)

panels.Panels.append = counted
linalg.inv_quad(op, test, train, damping=0.1, method="dual", spill=sys.argv[1], checkpoint=sys.argv[1] + "/state")
"""


@pytest.mark.usefixtures("_small_panels")
def test_a_factorization_resumes_after_its_process_was_killed(tmp_path, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", KILLED, str(tmp_path), "5"]
    assert subprocess.run(command, env=environment, check=False).returncode == 3
    op, _, test, train = wide_problem()
    options = {"damping": 0.1, "method": "dual", "spill": tmp_path, "checkpoint": tmp_path / "state"}
    with pytest.raises(ValueError, match="checkpoint.*must belong to this problem, but its checksum of the damping"):
        linalg.inv_quad(op, test, train, **{**options, "damping": 0.2})
    numbers, append = [], panels.Panels.append

    def interrupted(self, panel):
        numbers.append(len(self))
        if numbers == [5, 6, 7]:
            raise KeyboardInterrupt
        append(self, panel)

    monkeypatch.setattr(panels.Panels, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        linalg.inv_quad(op, test, train, **options)
    found = linalg.inv_quad(op, test, train, **options)
    assert numbers == [5, 6, 7, *range(7, 12)]
    np.testing.assert_allclose(found.value, linalg.inv_quad(op, test, train, damping=0.1, method="dense").value)
    file = tmp_path / "state.panels" / "panel-1.npy"
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    op, _, test, train = wide_problem()
    with pytest.raises(ValueError, match="panel-1.npy' must be the panel that belongs to `checkpoint`"):
        linalg.inv_quad(op, test, train, **options)


@pytest.mark.usefixtures("_small_panels")
def test_bad_folders(tmp_path, monkeypatch):
    op, _, test, _ = wide_problem()
    op, _, test, _ = wide_problem(max_memory=op.plan.nbytes + panels.bytes_at_work(80, 8))
    options = {"damping": 0.1, "method": "dual", "spill": tmp_path}
    for spill, error, match in [(3, TypeError, "`spill` must be the path"), ("no", NotADirectoryError, "no folder")]:
        with pytest.raises(error, match=match):
            linalg.inv_quad(op, test, **{**options, "spill": spill})
    with (
        mock.patch("shutil.disk_usage", return_value=mock.Mock(free=10)),
        pytest.raises(
            ValueError, match="`spill` must be a folder with .* bytes of free disk space for the Gram matrix, got 10"
        ),
    ):
        linalg.inv_quad(op, test, **options)
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch("numpy.save", side_effect=full),
        pytest.raises(OSError, match="bytes of a panel must fit on the disk"),
    ):
        linalg.inv_quad(op, test, **options)
    linalg.inv_quad(op, test, **options)
    for file in tmp_path.glob("*/panel-3.npy"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="a file with a panel of the Gram matrix was removed"):
        linalg.inv_quad(op, test, **options)
