"""What G needs to know of the output factor S."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Factor(Protocol):
    """The output factor S: block-diagonal, with B blocks of P × R.

    The outputs (T, C) of a batch, as one row of numbers, are those of the blocks one after the other.
    """

    blocks: int
    outputs: int
    rank: int

    def apply(self, W: Tensor) -> Tensor:
        """Multiply S: (K, B, R) → (K, B, P)."""
        ...

    def adjoint(self, U: Tensor) -> Tensor:
        """Multiply Sᵀ: (K, B, P) → (K, B, R)."""
        ...

    def columns(self) -> Tensor:
        """List the vectors, (B, R, P)."""
        ...
