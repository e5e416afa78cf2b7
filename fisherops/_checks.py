"""Checks of arguments that several files make, and the words of errors."""

from __future__ import annotations

from typing import Any


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return an integer argument within its bounds.

    Raises
    ------
    TypeError
        If `value` is no integer.
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


def with_context(error: Exception, context: str) -> Exception | None:
    """Return the library's own error with a text in front that says where it occurred.

    None if the error is not the library's: it gets a note, and must be raised again as it is, with its type,
    attributes, traceback and cause.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = str(traceback.tb_frame.f_globals.get("__name__", "")) if traceback is not None else ""
    if module.startswith("fisherops.") and type(error) in (TypeError, ValueError):
        return type(error)(f"{context}: {error}")
    error.add_note(f"This was raised for {context}.")
    return None
