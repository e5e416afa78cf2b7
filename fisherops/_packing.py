"""Objects that hold tensors, taken apart for transport and put together again."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


def taken_apart(value: Any) -> list[Tensor]:
    """Return the tensors in an object, and the rest of it as a tensor of bytes, at the end."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> int | None:
            if not isinstance(part, Tensor):
                return None
            tensors.append(part.contiguous())
            return len(tensors) - 1

    stream = io.BytesIO()
    Pickler(stream).dump(value)
    return [*tensors, as_bytes(stream.getvalue())]


def put_together(tensors: list[Tensor]) -> Any:
    """Return the object that was taken apart into these tensors, which it shares."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(tensors[-1].cpu().numpy().tobytes())).load()


def as_bytes(text: bytes) -> Tensor:
    """Return bytes as a tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
