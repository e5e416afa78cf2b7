"""Rows of the score matrix in files: the same products, and nothing lost when a disk fails."""

import errno
import gc
import os
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import fisherops as fo
from fisherops._sizes import HOST, SIZES
from fisherops.scores import store as spilling


def build(folder, max_memory=3000, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    X, y = torch.randn(60, 5), torch.randint(3, (60,))
    options = {"batch_size": 10, **options}
    return model, fo.FisherMCLinearOperator(
        model, nn.CrossEntropyLoss(), data=(X, y), max_memory=max_memory, spill=folder, **options
    )


@pytest.mark.parametrize("cache", ["auto", "scores", "factors"])
@pytest.mark.parametrize("max_memory", [3000, 6000])
def test_products_are_the_same(tmp_path, monkeypatch, cache, max_memory):
    monkeypatch.setitem(SIZES, torch.device("cpu"), HOST._replace(merged=0))  # as those in files, which are not merged
    _, op = build(tmp_path, max_memory, cache=cache)
    _, plain = build(None, None, cache=cache)
    V = np.random.default_rng(0).normal(size=(op.shape[0], 3)).astype("f4")
    np.testing.assert_array_equal(op @ V, plain @ V)
    np.testing.assert_array_equal(op @ V, plain @ V)  # from the files alone
    np.testing.assert_allclose(op.diagonal(), plain.diagonal(), rtol=1e-6)
    np.testing.assert_array_equal(op.todense(), plain.todense())
    np.testing.assert_array_equal(op.scores @ V, plain.scores @ V)
    np.testing.assert_array_equal(op.scores.gram(), plain.scores.gram())
    assert op.num_rows == 60


def test_what_fits_stays_in_memory_and_the_plan_says_so(tmp_path):
    _, op = build(tmp_path, 6000, cache="scores")
    forms = [entry.form for entry in op.plan.entries]
    assert set(forms) == {"dense rows", "dense rows in a file"}
    assert op.plan.nbytes <= 6000
    files = list(tmp_path.glob("fisherops-*/batch-*.pt"))
    assert len(files) == forms.count("dense rows in a file") > 1
    assert sum(file.stat().st_size for file in files) == op.plan.file_size
    assert "in files" in str(op.plan)


def test_files_are_pytorchs_format_and_removed_with_the_operator(tmp_path):
    model, op = build(tmp_path)
    op @ np.ones(op.shape[0])
    (folder,) = tmp_path.iterdir()
    for file in folder.iterdir():
        assert torch.load(file, weights_only=True)["version"] == 1
    with torch.no_grad():
        model[0].weight.mul_(2)
    op.trace()  # the rows are made anew, and their files
    gc.collect()
    (other,) = tmp_path.iterdir()
    assert other != folder
    del op
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_gone_or_changed_is_an_error_and_can_be_made_anew(tmp_path):
    _, op = build(tmp_path)
    v = np.ones(op.shape[0], "f4")
    expected = op @ v
    file = next(tmp_path.glob("*/batch-2.pt"))
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"a file with rows of the score matrix was removed: call `op\.refresh"):
        op @ v
    (tmp_path / "elsewhere").rename(file)
    np.testing.assert_array_equal(op @ v, expected)
    os.truncate(file, 100)
    with pytest.raises(FileNotFoundError, match="was changed"):
        op @ v
    op.refresh()
    np.testing.assert_array_equal(op @ v, expected)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    _, op = build(tmp_path)
    v = np.ones(op.shape[0], "f4")
    opened = spilling.Path.open
    written = []

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *arguments):
            return self.file.__exit__(*arguments)

        def write(self, content):
            written.append(content)
            if len(written) > 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def open_full(path, mode="r", *arguments, **options):
        file = opened(path, mode, *arguments, **options)
        return Full(file) if "w" in mode else file

    monkeypatch.setattr(spilling.Path, "open", open_full)
    with pytest.raises(
        OSError, match=r"do not fit on the disk of `spill` \(No space left on device\): make room"
    ) as caught:
        op @ v
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    monkeypatch.setitem(SIZES, torch.device("cpu"), HOST._replace(merged=0))
    del caught
    gc.collect()
    assert not list(tmp_path.glob("*/*"))
    np.testing.assert_array_equal(op @ v, build(None, None)[1] @ v)


def test_one_batch_must_fit_in_memory(tmp_path):
    _, op = build(tmp_path, 1000, cache="scores")
    with pytest.raises(ValueError, match="pass max_memory="):
        op @ np.ones(op.shape[0])
    _, op = build(tmp_path, 1000)
    _, plain = build(None, None)
    v = np.ones(op.shape[0], "f4")
    np.testing.assert_allclose(op @ v, plain @ v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("folder", "error", "text"),
    [
        (3, TypeError, "`spill` must be the path of a folder"),
        ("/nowhere/at/all", NotADirectoryError, "no folder: make"),
    ],
)
def test_a_folder_is_taken(folder, error, text):
    with pytest.raises(error, match=text):
        build(folder)


def test_what_is_written_is_not_held(tmp_path):
    _, op = build(tmp_path, cache="scores")
    alive = []
    write = spilling.Store.write

    def noted(self, held):
        alive.append(weakref.ref(held._dense))
        return write(self, held)

    gc.disable()
    try:
        with mock.patch.object(spilling.Store, "write", noted):
            op @ np.ones(op.shape[0])
        assert len(alive) > 1
        assert not any(reference() is not None for reference in alive[:-1])
    finally:
        gc.enable()


def test_files_are_closed_and_read_once_for_many_columns(tmp_path):
    _, op = build(tmp_path, cache="scores", batch_size=2, max_memory=1500)
    op @ np.ones(op.shape[0])
    before = len(os.listdir("/proc/self/fd"))
    loads = []
    load = spilling.StoredBatch.load
    with (
        mock.patch.dict(SIZES, {torch.device("cpu"): HOST._replace(columns=1)}),
        mock.patch.object(spilling.StoredBatch, "load", lambda self: loads.append(self) or load(self)),
    ):
        op @ np.ones((op.shape[0], 40))
    assert len(loads) == sum(entry.file_size > 0 for entry in op.plan.entries) > 20
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_relative_folder_is_that_of_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    _, op = build("files")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    v = np.ones(op.shape[0], "f4")
    np.testing.assert_array_equal(op @ v, op @ v)
    assert list((tmp_path / "files").glob("*/*.pt"))


def test_a_fork_does_not_remove_the_files(tmp_path):
    _, op = build(tmp_path)
    v = np.ones(op.shape[0], "f4")
    expected = op @ v
    finalizer = op.score_matrix._cache._spill.close
    with mock.patch("os.getpid", return_value=-1):
        finalizer()
    np.testing.assert_array_equal(op @ v, expected)
