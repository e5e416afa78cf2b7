"""What linear algebra asks of the processes that share an operator; here there is one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from fisherops._sizes import SIZES, Sizes

Result = TypeVar("Result")


class Processes:
    """One process, which has all data; a subclass is for several."""

    rank = 0
    size = 1
    leads = True
    """Whether this process shows progress and writes files."""

    def guard(self, what: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a context for work that this process does alone; if it fails, the others are told."""
        return nullcontext()

    def sizes(self, device: torch.device) -> Sizes:
        """Return how much is computed at once on a device, the same on every process."""
        return SIZES[device]

    def least(self, number: int) -> int:
        """Return the smallest of the numbers that the processes pass."""
        return number

    def from_leader(self, make: Callable[[], Result]) -> Result:
        """Return what the leading process makes, on every process."""
        return make()

    def step(self, what: str, **values: Any) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a context for what all processes do together, with the same values."""
        return nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, inside of a step; the tensor may be overwritten."""
        return tensor

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return the inner products of vectors (K, D) with others, (K,)."""
        return (X * Y).sum(-1)

    def norms(self, X: Tensor) -> Tensor:
        """Return the norms of vectors (K, D) in float64, (K,), also if squares exceed the range of the precision."""
        own = torch.linalg.vector_norm(X, dim=-1, keepdim=True, dtype=torch.float64)
        return self.inner(own, own).sqrt()


ONE = Processes()
