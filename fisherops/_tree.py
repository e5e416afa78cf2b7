"""Arrays nested in mappings, tuples and lists, as the inputs of a model often are."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fisherops import _arrays


def map_arrays(function: Callable[[Any], Any], x: Any, move: Callable[[Any], Any] | None = None) -> Any:
    """Apply a function to every array in nested mappings, tuples and lists; the same object if nothing changes.

    Objects other than mappings that have a method ``to`` of their own, such as graph batches and packed sequences, are
    replaced by what `move` returns for them, if it is given.
    """
    if _arrays.is_array(x):
        return function(x)
    if move is not None and not isinstance(x, Mapping) and callable(getattr(x, "to", None)):
        return move(x)
    if isinstance(x, Mapping):
        items = {key: map_arrays(function, item, move) for key, item in x.items()}
        if all(items[key] is item for key, item in x.items()):
            return x
        if type(x) is dict or not isinstance(x, dict | UserDict):
            return items
        mapped = copy.copy(x)  # keeps its class and attributes; other mappings may share their contents when copied
        for key, item in items.items():
            mapped[key] = item
        return mapped
    if isinstance(x, tuple | list):
        parts = [map_arrays(function, item, move) for item in x]
        if all(new is old for new, old in zip(parts, x, strict=True)):
            return x
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def copied(x: Any) -> Any:
    """Return a copy that shares no memory, also of objects that hold tensors, such as graphs."""
    if isinstance(x, Mapping | tuple | list) or _arrays.is_array(x):
        return map_arrays(lambda a: a.clone() if isinstance(a, Tensor) else a, x)
    return x if x is None or isinstance(x, str | int | float) else copy.deepcopy(x)


def leaves(x: Any) -> list[Tensor]:
    """List the arrays in `x`, in the order in which :func:`map_arrays` meets them."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_arrays(note, x)
    return found
