"""Score matrices in files: the same without the model, and nothing that is damaged or does not belong together."""

import os
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from devices import device_named, on_every_device
from hypothesis import given, settings
from hypothesis import strategies as st
from models import KINDS, cases, make_case
from tolerances import assert_same
from torch import nn

import fisherops as fo
from fisherops import linalg
from fisherops.scores import store

CACHES = ["auto", "scores", "factors", "linearization", "none"]


@pytest.fixture
def device(request):
    return device_named(request.param)


def operator(cache="auto", architecture="dense", **options):
    case = make_case(architecture)
    return case, fo.FisherMCLinearOperator(case.model, case.loss, data=case.data, cache=cache, **options)


@settings(max_examples=settings.default.max_examples // 5)
@given(
    cases(),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["term", "datum"]),
    st.sampled_from(CACHES),
)
def test_they_are_the_same(tmp_path_factory, case, kind, rows, cache):
    path = tmp_path_factory.mktemp("scores") / "G.pt"
    options = {"exact": {}}.get(kind, {"rows": rows})
    op = KINDS[kind](case.model, case.loss, data=case.data, cache=cache, **options)
    G = op.scores
    Q = G.on(case.data[0], kind="empirical")
    G.save(path)
    assert os.listdir(path.parent) == ["G.pt"]
    S, Q_stored = fo.load_scores(path), fo.load_scores(path)
    Q.save(path)  # the file of S and Q_stored is open still
    dense, own = G.todense(), Q.todense()
    v, w = np.linspace(-1, 1, G.shape[1], dtype=G.dtype), np.linspace(-1, 1, G.shape[0], dtype=G.dtype)
    exact = cache in ("scores", "factors")
    pairs = [
        (S.todense(), dense), (S @ v, G @ v), (S.T @ w, G.T @ w), (S.gram(), G.gram()), (S.rows(0, 1), G.rows(0, 1)),
        (S.row_norms(), G.row_norms()), (S.project(5, 1).value, G.project(5, 1).value), (S.gram(Q), G.gram(Q)),
        (Q.gram(S), Q.gram(G)), (Q_stored.gram(S), G.gram()), (S.datum, G.datum),
    ]  # fmt: skip
    F = fo.FisherOperator(S)
    pairs += [
        (F.todense(), op.todense()), (F @ v, op @ v), (F.diagonal(), op.diagonal()), (F.trace(), op.trace()),
        ((2 * F.damped(0.1) + op) @ v, (2 * op.damped(0.1) + op) @ v),
        (F.submatrix(slice(0, 2)).todense(), op.submatrix(slice(0, 2)).todense()),
    ]  # fmt: skip
    for found, expected in pairs:
        if exact and case.dtype == torch.float64:
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14 * np.abs(expected).max())
        assert_same(found, expected, case.dtype)
    assert F.scores is S
    assert {kind.name for kind in S.kinds} == {kind.name for kind in G.kinds}
    assert (S.shape, S.reductions, S.parameters.shapes) == (G.shape, G.reductions, G.parameters.shapes)
    stored = linalg.inv_quad(F, fo.load_scores(path), S, damping=0.3, rtol=1e-2).value
    expected = own @ np.linalg.solve(op.todense().astype(float) + 0.3 * np.eye(len(v)), dense.T)
    np.testing.assert_allclose(
        stored, expected, atol=(1e-9 if G.dtype == np.float64 else 1e-3) * np.abs(expected).max()
    )


def test_linear_algebra_without_the_model(tmp_path):
    _, op = operator()
    op.scores.save(tmp_path / "G.pt")
    expected = [
        linalg.eigsh(op, 3).eigenvalues, linalg.sample(op, 2, damping=0.1).value,
        linalg.slogdet(op, 0.1).logabsdet, linalg.solve(op, np.ones(op.shape[0]), 0.1).x,
        fo.approximate.kfac(op).todense(),
    ]  # fmt: skip
    F = fo.FisherOperator(fo.load_scores(tmp_path / "G.pt"))
    found = [
        linalg.eigsh(F, 3).eigenvalues, linalg.sample(F, 2, damping=0.1).value,
        linalg.slogdet(F, 0.1).logabsdet, linalg.solve(F, np.ones(op.shape[0]), 0.1).x,
        fo.approximate.kfac(F).todense(),
    ]  # fmt: skip
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-9 * np.abs(other).max())


def test_no_rows(tmp_path):
    case, op = operator()
    X, y = case.data[0]
    op.scores.on((X[:0], y[:0])).save(tmp_path / "G.pt")
    S = fo.load_scores(tmp_path / "G.pt")
    assert (S.shape, S.gram().shape, S.gram(op.scores).shape) == ((0, op.shape[0]), (0, 0), (0, op.num_rows))
    assert S.project(3).value.shape == (0, 3)
    assert fo.FisherOperator(S).trace() == 0


def test_rows_stay_in_the_file(tmp_path):
    _, op = operator("factors", spill=tmp_path, max_memory=100_000)
    op.scores.save(tmp_path / "G.pt")
    S = fo.load_scores(tmp_path / "G.pt")
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("/G.pt")]
    (start, stop), *_ = ((int(x, 16) for x in line.split()[0].split("-")) for line in maps)
    tensors = [t for batch in S.materialized() for _, columns in batch.blocks for t in columns.tensors]
    assert tensors
    assert all(start <= t.data_ptr() < stop for t in tensors)


def convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(8, 8, 2), nn.Flatten(1)).double()
    X = torch.randn(5, 8, 4, 4, dtype=torch.float64)
    return fo.FisherMCLinearOperator(model, nn.MSELoss(), data=(X, model(X).detach()), cache="factors")


def weight_norm():
    torch.manual_seed(0)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
    X, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    return fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y), cache="factors")


@pytest.mark.parametrize("make", [convolution, weight_norm])
def test_convolutions_and_graphs(tmp_path, make):
    """What is computed from parameters by a graph has dense rows in the file."""
    op = make()
    op.scores.save(tmp_path / "G.pt")
    S = fo.load_scores(tmp_path / "G.pt")
    np.testing.assert_allclose(S.todense(), op.scores.todense(), atol=1e-14)
    np.testing.assert_allclose(S.gram(op.scores), op.scores.gram(), atol=1e-12)


@on_every_device
def test_on_every_device(tmp_path, device):
    _, op = operator("factors", "attention")
    op.scores.save(tmp_path / "G.pt")
    S = fo.load_scores(tmp_path / "G.pt", device=device)
    moved = fo.FisherOperator(fo.load_scores(tmp_path / "G.pt")).to(device)
    v = torch.linspace(-1, 1, op.shape[0], dtype=torch.float64)
    expected = op @ v
    for F in (fo.FisherOperator(S), moved):
        assert F.device == device
        np.testing.assert_allclose((F @ v.to(device)).cpu(), expected, atol=1e-12)
    np.testing.assert_allclose(S.gram(), op.scores.gram(), atol=1e-12)


# ---- What is refused ---------------------------------------------------------------------------------


def test_damaged_files(tmp_path):
    _, op = operator()
    path = tmp_path / "G.pt"
    op.scores.save(path)
    whole = path.read_bytes()
    places = np.linspace(0, len(whole) - 1, 40).astype(int)
    refused = 0
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            S = fo.load_scores(path)
        except ValueError as error:
            assert str(error).startswith("`path` must be a file that `G.save(path)` wrote")
            refused += 1
        else:  # padding
            np.testing.assert_array_equal(S.todense(), op.scores.todense())
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match="it is damaged, or another file"):
            fo.load_scores(path)
    assert refused > len(places) / 3


def test_other_files(tmp_path):
    _, op = operator()
    path = tmp_path / "G.pt"
    with pytest.raises(FileNotFoundError):
        fo.load_scores(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="it is damaged, or another file"):
        fo.load_scores(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="got another file of PyTorch's format"):
        fo.load_scores(path)
    torch.save(nn.Linear(2, 2), path)  # pickled code is not run
    with pytest.raises(ValueError, match="it is damaged, or another file"):
        fo.load_scores(path)
    with mock.patch.object(store, "VERSION", 2):
        op.scores.save(path)
    with pytest.raises(ValueError, match="which reads version 1 of the format, got version 2"):
        fo.load_scores(path)


def test_attributes_in_files_belong_to_the_version(tmp_path):
    """If this fails, raise `store.VERSION`: files of another version must be refused."""
    found = {}

    def note(value):
        if isinstance(value, dict):
            if isinstance(items := value.get("items"), dict):
                found[value["class"]] = sorted(items)
            for item in value.values():
                note(item)
        elif isinstance(value, list):
            for item in value:
                note(item)

    for op in (operator("factors", "attention")[1], convolution()):
        op.scores.save(tmp_path / "G.pt")
        note(store.read(tmp_path / "G.pt"))
    assert {"MaterializedBatch", "Strided", "Factors", "Table", "Convolution", "Window", "MonteCarlo"} <= set(found)
    text = repr(sorted(found.items()))
    assert (store.VERSION, zlib.crc32(text.encode())) == (1, 2646406343), text


def test_other_parameters(tmp_path):
    case, op = operator()
    G = op.scores
    G.save(tmp_path / "G.pt")
    S = fo.load_scores(tmp_path / "G.pt")
    with torch.no_grad():
        case.params[0].mul_(1.5)
    for call in (lambda: G.gram(S), lambda: S.gram(G), lambda: linalg.inv_quad(op, S, damping=0.1)):
        with pytest.raises(ValueError, match="must belong to the same values of the parameters"):
            call()
    with torch.no_grad():
        case.params[0].div_(1.5)
    np.testing.assert_allclose(G.gram(S), S.gram(), atol=1e-12)
    with pytest.raises(ValueError, match="the score matrices must have the same parameters"):
        operator(architecture="tied")[1].scores.gram(S)


def test_other_data_need_the_model(tmp_path):
    case, op = operator()
    op.scores.save(tmp_path / "G.pt")
    with pytest.raises(TypeError, match="`on` needs the model and the loss, which are not stored"):
        fo.load_scores(tmp_path / "G.pt").on(case.data[0], kind="empirical")
    with pytest.raises(NotImplementedError, match="a sum, a multiple or a submatrix cannot be saved"):
        (op + op).scores.save(tmp_path / "H.pt")
    with pytest.raises(TypeError, match="`scores` must be a score matrix, got ndarray"):
        fo.FisherOperator(np.eye(3))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    _, op = operator()
    path = tmp_path / "G.pt"
    op.scores.save(path)
    before = path.read_bytes()
    with (
        mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space"),
    ):
        op.scores.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["G.pt"]
    with pytest.raises(FileNotFoundError):
        op.scores.save(tmp_path / "nowhere" / "G.pt")
