"""Rows of G in files of PyTorch's format: those that memory is too small for, and those that are saved."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fisherops._files import replacing
from fisherops._memory import read_ahead
from fisherops._sums import SegmentSum
from fisherops.problem.calls import Window
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.columns import Factors, Rows, Table
from fisherops.scores.convolutions import Convolution
from fisherops.scores.derived import Strided
from fisherops.scores.kinds import Empirical, Exact, MonteCarlo, Outputs

FORMAT, VERSION = "fisherops score matrix", 1

_CLASSES: dict[str, Any] = {
    own.__name__: own
    for own in (
        MaterializedBatch, Strided, Rows, Factors, Table, Convolution, SegmentSum, Window,
        MonteCarlo, Exact, Empirical, Outputs,
    )
}  # fmt: skip
"""Classes of objects in files. `VERSION` grows if their attributes change."""

_MUST = "`path` must be a file that `G.save(path)` wrote"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


# ---- Contents ----------------------------------------------------------------------------------


def packed(value: Any, on_host: Callable[[Tensor], Tensor] = Tensor.cpu) -> Any:
    """Return an object as tensors, numbers and texts in lists and dicts, which `torch.load` reads without pickled code.

    Objects become their class and attributes, containers their class and items; `on_host` copies tensors of a device.
    """
    name = type(value).__name__
    if isinstance(value, Tensor):
        own = value.detach()
        return on_host(own if own.untyped_storage().nbytes() == own.nbytes else own.clone())
    if _CLASSES.get(name) is type(value):
        attributes = value._asdict() if isinstance(value, Window) else vars(value)
        return {"class": name, "items": {key: packed(item, on_host) for key, item in attributes.items()}}
    if isinstance(value, Mapping):
        return {
            "class": "dict",
            "items": [[packed(key, on_host), packed(item, on_host)] for key, item in value.items()],
        }
    if isinstance(value, tuple | frozenset):
        name = "Size" if isinstance(value, torch.Size) else "tuple" if isinstance(value, tuple) else "frozenset"
        return {"class": name, "items": [packed(item, on_host) for item in value]}
    return [packed(item, on_host) for item in value] if isinstance(value, list) else value


def unpacked(value: Any, device: torch.device) -> Any:
    """Return the object that `packed` took apart, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [unpacked(item, device) for item in value]
    if not isinstance(value, dict):
        return value
    name, items = value["class"], value["items"]
    if name not in _CLASSES:
        own = (unpacked(item, device) for item in items)
        return {"dict": dict, "Size": torch.Size, "tuple": tuple, "frozenset": frozenset}[name](own)
    kept = {key: unpacked(item, device) for key, item in items.items()}
    if issubclass(_CLASSES[name], tuple):
        return _CLASSES[name](**kept)
    found = _CLASSES[name].__new__(_CLASSES[name])
    found.__dict__.update(kept)
    return found


def write(file: IO[bytes], batches: list[MaterializedBatch], **manifest: Any) -> None:
    """Write batches to a file, with what else is to be known of them."""
    known: dict[Any, tuple[Tensor, Tensor]] = {}

    def on_host(t: Tensor) -> Tensor:  # once for those that share memory
        key = t.data_ptr(), t.dtype, t.shape, t.stride()
        if t.device.type != "cpu" and key not in known:
            known[key] = t, t.cpu()
        return known[key][1] if key in known else t

    content = {key: packed(x, on_host) for key, x in {"batches": batches, **manifest}.items()}
    torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def read(path: Path, verify: bool = False) -> dict[str, Any]:
    """Return what `write` wrote, with tensors that are read from the file as they are used.

    Parameters
    ----------
    path : Path
    verify : bool
        Whether all of the file is read and compared with its checksums.

    Raises
    ------
    ValueError
        If the file is damaged, or of another format or version.
    """
    wrong = None
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever damaged bytes lead to
        raise ValueError(f"{_MUST}, but it is damaged, or another file ({error}). Save the matrix again.") from None
    if wrong is not None:
        raise ValueError(f"{_MUST}, but it is damaged: the checksum of {wrong!r} differs. Save the matrix again.")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{_MUST}, got another file of PyTorch's format. Save the matrix again.")
    if content["version"] != VERSION:
        raise ValueError(
            f"{_MUST} in this version of fisherops, which reads version {VERSION} of the format, got version "
            f"{content['version']}. Save the matrix again."
        )
    return content


def manifest_of(G: Any) -> dict[str, Any]:
    """Return what is to be known of the rows of a score matrix."""
    try:
        datum = torch.from_numpy(G.datum)
    except ValueError:  # of a loader that samples in an order of its own
        datum = None
    return {
        "parameters": dict(G.parameters.shapes),
        "checksum": G.parameter_checksum,
        "dtype": str(G.torch_dtype).removeprefix("torch."),
        "kind": next(iter(G.kinds)),
        "reductions": G.reductions,
        "rows": G.num_rows,
        "datum": datum,
    }


def save(path: Any, batches: list[MaterializedBatch], manifest: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as file:
        write(file, batches, nbytes=sum(batch.nbytes for batch in batches), **manifest)


# ---- Files of rows that do not fit in memory -----------------------------------------------------


class Store:
    """A folder for the files of one operator, which is removed with the object.

    Parameters
    ----------
    parent : path
        Where the folder is made.

    Raises
    ------
    OSError
        If it cannot be made there.
    """

    def __init__(self, parent: Any) -> None:
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="fisherops-", dir=parent))
        except OSError as error:
            raise type(error)(
                error.errno, f"`spill` must be a folder that can be written to ({error.strerror})", str(parent)
            ) from None
        self._count = 0
        self.close = weakref.finalize(self, _remove, self.folder, os.getpid())

    def write(self, held: MaterializedBatch) -> StoredBatch:
        """Write the rows of a batch to a file.

        Raises
        ------
        OSError
            If there is no room for them; what was written of them is removed.
        """
        path = self.folder / f"batch-{self._count}.pt"
        self._count += 1
        held = held.without_graphs()
        try:
            with path.open("wb") as file:
                write(file, [held])
        except OSError as error:
            path.unlink(missing_ok=True)
            why = "do not fit on the disk of" if error.errno in _FULL else "cannot be written to"
            raise type(error)(
                error.errno,
                f"the {held.nbytes} bytes of a batch {why} `spill` ({error.strerror}): make room or choose another "
                "folder, and multiply again; nothing is lost",
                str(self.folder),
            ) from None
        return StoredBatch(path, held)


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not a copy of it by fork
        shutil.rmtree(folder, ignore_errors=True)


class StoredBatch:
    """G of one batch in a file, which is mapped into memory while it is used.

    Parameters
    ----------
    path : Path
        A file of PyTorch's format.
    held : MaterializedBatch
        What was written.
    """

    def __init__(self, path: Path, held: MaterializedBatch) -> None:
        self._path, self._device, self.count = path, held.device, held.count
        self._stat = self._look()
        self.size = self._stat.st_size
        """Bytes of the file."""

    def load(self) -> MaterializedBatch:
        """Return the rows; those on the CPU are read from the file as they are used.

        Raises
        ------
        FileNotFoundError
            If the file was removed or changed.
        """
        now = self._look()
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise self._gone("changed")
        (batch,) = read(self._path)["batches"]
        held: MaterializedBatch = unpacked(batch, self._device)
        return held

    def read_ahead(self) -> None:
        """Let the system read the file while something else is computed."""
        read_ahead(self._path)

    def _look(self) -> Any:
        try:
            return self._path.stat()
        except OSError:
            raise self._gone("removed") from None

    def _gone(self, how: str) -> FileNotFoundError:
        return FileNotFoundError(
            errno.ENOENT,
            f"a file with rows of the score matrix was {how}: call `op.refresh()`, which makes them anew; nothing else "
            "is lost",
            str(self._path),
        )


class InOrder(list[Any]):
    """Batches that are kept: while one of them is used, the file of the next is read."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            present = self[number]
            if number + 1 < len(self) and isinstance(self[number + 1], StoredBatch):
                self[number + 1].read_ahead()
            yield loaded(present)


def loaded(scores: Any) -> Any:
    """Return G of a batch that may be in a file."""
    return scores.load() if isinstance(scores, StoredBatch) else scores
