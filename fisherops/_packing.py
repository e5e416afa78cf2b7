"""Objects that hold tensors, taken apart for transport and put together again."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

# Classes of the module: those made in a function are in a cycle of references, which would hold the tensors.


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_id(self, part: Any) -> int | None:
        if not isinstance(part, Tensor):
            return None
        self._tensors.append(part.contiguous())
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def to_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an object, and the rest of it as a tensor of bytes, at the end."""
    stream, tensors = io.BytesIO(), list[Tensor]()
    _Pickler(stream, tensors).dump(value)
    return [*tensors, as_bytes(stream.getvalue())]


def from_tensors(tensors: list[Tensor]) -> Any:
    """Return the object that was taken apart into these tensors, which it shares."""
    return _Unpickler(io.BytesIO(tensors[-1].cpu().numpy().tobytes()), tensors).load()


def as_bytes(text: bytes) -> Tensor:
    """Return bytes as a tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
