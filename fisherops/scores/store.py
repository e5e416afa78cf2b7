"""Rows of G in files, where memory is too small for them."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops._memory import read_ahead
from fisherops._packing import from_tensors, to_tensors
from fisherops.scores.batch import MaterializedBatch

# Tensors begin at multiples of this in a file, as the fastest instructions want it.
_ALIGNMENT = 64

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
        path = self.folder / f"batch-{self._count}.npy"
        self._count += 1
        held = held.without_graphs()
        tensors = [t.detach().cpu() for t in to_tensors(held)]
        ends = list(accumulate(-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors))
        places = [(start, t.shape, t.dtype) for t, start in zip(tensors, [0, *ends], strict=False)]
        size = ends[-1]
        try:
            with path.open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
                np.lib.format.write_array_header_1_0(file, header)
                start = file.tell()
                for (place, _, _), t in zip(places, tensors, strict=True):
                    file.seek(start + place)
                    file.write(t.reshape(-1).view(torch.uint8).numpy().data)
                file.truncate(start + size)
        except OSError as error:
            path.unlink(missing_ok=True)
            why = "do not fit on the disk of" if error.errno in _FULL else "cannot be written to"
            raise type(error)(
                error.errno,
                f"the {size} bytes of a batch {why} `spill` ({error.strerror}): make room or choose another folder, "
                "and multiply again; nothing is lost",
                str(self.folder),
            ) from None
        return StoredBatch(path, start, places, held)


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not a copy of it by fork
        shutil.rmtree(folder, ignore_errors=True)


class StoredBatch:
    """G of one batch in a file, which is mapped into memory while it is used.

    Parameters
    ----------
    path : Path
        A file in NumPy's format, of bytes.
    start : int
        Where they begin.
    places : list
        Where each tensor lies in them, its shape and dtype.
    held : MaterializedBatch
        What was written.
    """

    def __init__(
        self, path: Path, start: int, places: list[tuple[int, torch.Size, torch.dtype]], held: MaterializedBatch
    ) -> None:
        self._path, self._start, self._places, self._device = path, start, places, held.device
        self._stat = self._look()
        self.count = held.count
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
        with self._path.open("rb") as file:  # only while it is used: each map takes a descriptor
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        everything = torch.frombuffer(mapped, dtype=torch.uint8, offset=self._start)
        tensors: list[Tensor] = []
        for place, shape, dtype in self._places:
            own = everything[place : place + shape.numel() * dtype.itemsize]
            tensors.append(own.view(dtype).view(shape).to(self._device))
        held: MaterializedBatch = from_tensors(tensors)
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
