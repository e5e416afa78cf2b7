"""How much memory may be used."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import torch

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def as_bytes(max_memory: Any, device: torch.device) -> int:
    """Return a bound on memory in bytes: a number, a text such as "4GiB", or for None half of what is free."""
    if max_memory is None:
        return _free(device) // 2
    if isinstance(max_memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", max_memory)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(
                f"`max_memory` must be a number of bytes or a text such as '4GiB' or '500MB', got {max_memory!r}."
            )
        return int(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(max_memory, bool) or not isinstance(max_memory, int | float) or not 0 <= max_memory < 2**63:
        raise ValueError(
            f"`max_memory` must be a number of bytes or a text such as '4GiB' or '500MB', got {max_memory!r}."
        )
    return int(max_memory)


def as_folder(path: Any) -> Path | None:
    """Return a folder, or say why it is none."""
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`spill` must be the path of a folder or None, got {path!r}.")
    folder = Path(path).resolve()  # the present directory may change
    if not folder.is_dir():
        raise NotADirectoryError(f"`spill` is {str(path)!r}, which is no folder: make it first.")
    return folder


def read_ahead(path: Path) -> None:
    """Let the system read a file while something else is computed."""
    if hasattr(os, "posix_fadvise"):  # not on every system
        with contextlib.suppress(OSError), path.open("rb") as file:  # what is wrong is said when it is loaded
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def is_memory_error(error: BaseException) -> bool:
    """Whether there was not enough memory; torch has an error of its own for that on CUDA only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(re.findall(r"MemAvailable:\s*(\d+) kB", text)[0]) * 1024
    except (OSError, IndexError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        return 2**32
