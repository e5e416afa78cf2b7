"""Checks of arguments that several files make, and the words of errors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return an integer argument within its bounds.

    Raises
    ------
    TypeError
        If `value` is not an integer.
    ValueError
        If it is out of bounds.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    number: int = value.__index__()
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` must be {bounds}, got {number}.")
    return number


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the error's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the caller outside of this package; wrappers of torch may lie between."""
    own, frame, level = ("fisherops", "torch"), sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in own:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


@contextmanager
def noting(where: str) -> Iterator[None]:
    """Add a note that names the place to exceptions of the user's model, whose type and traceback stay."""
    try:
        yield
    except Exception as error:
        _note(error, where)
        raise


@contextmanager
def prefixing(where: str) -> Iterator[None]:
    """Name the place at the beginning of messages of this package; other errors keep their text and get a note."""
    try:
        yield
    except Exception as error:
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        module = "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))
        if module.startswith("fisherops.") and type(error) in (TypeError, ValueError):
            error.args = (f"{where}: {error}",)
        else:
            _note(error, where)
        raise


def _note(error: Exception, where: str) -> None:
    note = f"Raised for {where}."
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
