"""Cholesky factors of large matrices by panels of columns, in memory or in files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fisherops._memory import read_ahead
from fisherops.linalg.iteration import Report, checksum
from fisherops.scores.store import Store

# Size up to which a matrix is one panel; and columns of the panels of a larger one in memory, and at least and at most
# in files, of which each is read again for each later panel.
_WHOLE, _WIDTH, _NARROWEST, _WIDEST = 2048, 512, 64, 4096

# Panels that are there at once while one is computed: it, the block of the Gram matrix, and products.
_PRESENT = 4


class Storage(NamedTuple):
    """Where panels are: in memory, if `folder` is None, or in files there."""

    folder: Path | None = None
    name: str | None = None
    """Name of a folder within `folder` that stays; otherwise one is made, and removed with the panels."""
    memory: int = 0
    """Bytes that may be used."""


def width_of(n: int, storage: Storage) -> int:
    """Return the columns of a panel of a matrix (n, n)."""
    if n <= _WHOLE:
        return max(1, n)
    if storage.folder is None:
        return _WIDTH
    return max(1, min(_WIDEST, storage.memory // (8 * _PRESENT * n)))


def bytes_of(n: int, itemsize: int, width: int = _WIDTH) -> int:
    """Return the bytes of all panels of a matrix (n, n), which have the blocks of its diagonal as squares."""
    width = n if n <= _WHOLE else width
    return itemsize * (n * (n + width) // 2)


def bytes_at_work(n: int, itemsize: int, in_files: bool = False) -> int:
    """Return the bytes that computing a panel takes besides the others, for entries of the Gram matrix of some size."""
    width = min(_WIDTH, _NARROWEST) if in_files else _WIDTH
    return itemsize * n * n if n <= _WHOLE else 8 * _PRESENT * n * width


class Panels:
    """The lower triangle of a matrix (n, n) in panels of columns, from the diagonal down: (n − a, b − a) each.

    Parameters
    ----------
    n : int
    storage : Storage
    """

    def __init__(self, n: int, storage: Storage) -> None:
        self.n, self.width = n, width_of(n, storage)
        self.count = -(-n // self.width)
        self._held: list[Tensor | Path] = []
        self._device: Any = None
        self._store: Store | None = None
        self._folder: Path | None = None
        if storage.folder is not None and storage.name is None:
            self._store = Store(storage.folder)
            self._folder = self._store.folder
        elif storage.folder is not None:
            self._folder = storage.folder / str(storage.name)
            self._folder.mkdir(exist_ok=True)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(panel.nbytes for panel in self._held if isinstance(panel, Tensor))

    def append(self, panel: Tensor) -> None:
        """Add the next panel."""
        self._device = panel.device
        if self._folder is None:
            self._held.append(panel)
            return
        path = self._path(len(self))
        temporary = path.with_suffix(f".{os.getpid()}.part")  # of processes that write the same file
        try:
            with temporary.open("wb") as file:
                np.save(file, panel.cpu().numpy(), allow_pickle=False)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise type(error)(
                error.errno,
                f"the {panel.nbytes} bytes of a panel must fit on the disk of `spill` ({error.strerror}): make room, "
                "or choose another folder",
                str(self._folder),
            ) from None
        self._held.append(path)

    def forget(self) -> None:
        """Drop all panels."""
        self._held.clear()

    def resume(self, checksums: Sequence[int], device: torch.device) -> None:
        """Take the panels of an earlier run from their files.

        Raises
        ------
        ValueError
            If a file is missing, or is not the one that was written.
        """
        self._device = device
        self._held = [self._path(number) for number in range(len(checksums))]
        for number, expected in enumerate(checksums):
            try:
                is_same = checksum(self[number]) == expected
            except (OSError, ValueError):
                is_same = False
            if not is_same:
                raise ValueError(
                    f"{str(self._path(number))!r} must be the panel that belongs to `checkpoint`, but it is missing or "
                    "was changed. Move the checkpoint away to start again."
                )

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"panel-{number}.npy"

    def __getitem__(self, number: int) -> Tensor:
        panel = self._held[number]
        if isinstance(panel, Tensor):
            return panel
        try:
            mapped = np.load(panel, mmap_mode="c", allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(
                errno.ENOENT, "a file with a panel of the Gram matrix was removed: start again", str(panel)
            ) from None
        return torch.from_numpy(mapped).to(self._device)

    def listed(self, backward: bool = False) -> Iterator[tuple[int, Tensor]]:
        """List the panels with their first columns; while one is used, the file of the next is read."""
        order = range(len(self))[:: -1 if backward else 1]
        for number in order:
            following = number + order.step
            ahead = self._held[following] if following in order else None
            if isinstance(ahead, Path):
                read_ahead(ahead)
            yield number * self.width, self[number]

    # ---- As a Cholesky factor L ---------------------------------------------------------------------

    def solve(self, B: Tensor) -> Tensor:
        """Return L⁻¹ B for columns (n, K), in their memory."""
        for start, panel in self.listed():
            own, below = B[start : start + panel.shape[1]], B[start + panel.shape[1] :]
            own.copy_(torch.linalg.solve_triangular(panel[: len(own)], own, upper=False))
            below.addmm_(panel[len(own) :], own, alpha=-1)
        return B

    def solve_t(self, B: Tensor) -> Tensor:
        """Return L⁻ᵀ B for columns (n, K), in their memory."""
        for start, panel in self.listed(backward=True):
            own, below = B[start : start + panel.shape[1]], B[start + panel.shape[1] :]
            own.addmm_(panel[len(own) :].T, below, alpha=-1)
            own.copy_(torch.linalg.solve_triangular(panel[: len(own)].T, own, upper=True))
        return B

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the panels."""
        return self[0].dtype if self._held else torch.float64


class Progress(NamedTuple):
    """Panels that are done, bytes of an entry, the squared norm of their part of K, and what is added besides λ."""

    done: int
    itemsize: int
    squares: float
    extra: float
    checksums: Tensor


_DTYPES = {4: torch.float32, 8: torch.float64}


class Cholesky:
    """The factorization of K + λI, panel by panel: one is computed when all before it are done, and then stays.

    Parameters
    ----------
    panels : Panels
        Where the factor goes.
    panels_of : callable
        Takes the number of a panel, and lists K[a:, a:b] from there on.
    added : float
        λ > 0.
    itemsizes : sequence of int
        4 for float32, 8 for float64, or both: then float32 is taken if its eps · ‖K‖ / λ is at most `rtol`, and float64
        otherwise.
    rtol : float
    zero : callable
        Takes the norm of K, and returns the size below which eigenvalues are zero to rounding. It is added to the
        diagonal if K + λI is not positive definite without.
    device : torch.device
    is_checked : bool
        Whether panels have checksums, by which they are known when the factorization is resumed.
    """

    name: ClassVar[str] = "cholesky"
    unit: ClassVar[str] = "panels"

    def __init__(
        self,
        panels: Panels,
        panels_of: Callable[[int], Iterator[Tensor]],
        added: float,
        itemsizes: Sequence[int],
        rtol: float,
        zero: Callable[[float], float],
        device: torch.device,
        is_checked: bool,
    ) -> None:
        self._panels, self._panels_of, self._added = panels, panels_of, added
        self._itemsizes, self._rtol, self._zero = tuple(itemsizes), rtol, zero
        self._device, self._is_checked = device, is_checked
        self._coming: Iterator[Tensor] | None = None

    def start(self) -> Progress:
        """Return the state without panels."""
        return self._restarted(self._itemsizes[0])

    def _restarted(self, itemsize: int, extra: float = 0.0) -> Progress:
        self._panels.forget()
        self._coming = None
        return Progress(0, itemsize, 0.0, extra, torch.zeros(self._panels.count, dtype=torch.int64, device="cpu"))

    def step(self, state: Progress) -> Progress | None:
        """Return the state with one more panel, or None if all are done.

        Raises
        ------
        ValueError
            If K + λI is not positive definite to rounding.
        """
        if state.itemsize not in self._itemsizes:
            return self._restarted(self._itemsizes[0])
        panels, done = self._panels, state.done
        if len(panels) < done:
            panels.resume(state.checksums[:done].tolist(), self._device)
        if done == panels.count:
            return None
        if self._coming is None:
            self._coming = self._panels_of(done)
        panel = next(self._coming)
        width = panel.shape[1]
        squares = 2 * _square(panel) - _square(panel[:width])
        if done == 0 and state.extra == 0 and len(self._itemsizes) > 1 and state.itemsize == 4:
            size = (squares * panels.n / width) ** 0.5  # the norm of K, if the other panels are like this one
            if torch.finfo(torch.float32).eps * size > self._rtol * self._added:
                state = state._replace(itemsize=8)
        factor = self._factor(panel.to(_DTYPES[state.itemsize], copy=True), done * panels.width, state.extra)
        if factor is None:
            return self._after_failure(state)
        panels.append(factor)
        checksums = state.checksums.clone()
        if self._is_checked:
            checksums[done] = checksum(factor)
        return state._replace(done=done + 1, squares=state.squares + squares, checksums=checksums)

    def _factor(self, panel: Tensor, start: int, extra: float) -> Tensor | None:
        """Return the columns of L for those of K from `start` on, in their memory, or None if there are none."""
        width = panel.shape[1]
        panel.diagonal().add_(self._added + extra)
        for first, before in self._panels.listed():
            rows = before[start - first :]
            panel.addmm_(rows, rows[:width].T, alpha=-1)
        L, info = torch.linalg.cholesky_ex(panel[:width])
        if int(info):
            return None
        panel[:width] = L
        if len(panel) > width:
            panel[width:] = torch.linalg.solve_triangular(L.T, panel[width:], upper=True, left=False)
        return panel

    def _after_failure(self, state: Progress) -> Progress:
        """Return where to start again: in float64, or with a larger diagonal."""
        if state.itemsize == 4 and 8 in self._itemsizes:
            return self._restarted(8)
        if state.extra == 0:
            squares = sum(2 * _square(panel) - _square(panel[: panel.shape[1]]) for panel in self._panels_of(0))
            return self._restarted(state.itemsize, self._zero(squares**0.5))
        raise ValueError(
            f"`damping` must make F + λI positive definite to rounding, got {self._added:g}. Pass a larger one."
        )

    def report(self, state: Progress) -> Report:
        """Return what is shown of a state, which is saved after each panel."""
        return Report((state.done,), f"{state.done} of {self._panels.count}", True)


def _square(panel: Tensor) -> float:
    """Return the squared Frobenius norm of a matrix."""
    return float(torch.linalg.vector_norm(panel, dtype=torch.float64)) ** 2


def check_disk(folder: Path, needed: int) -> None:
    """Raise ValueError if a folder has less room than is needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"`spill` must be a folder with {needed} bytes of free disk space for the Gram matrix, got {free}. Choose "
            "another folder, or use method='primal'."
        )
