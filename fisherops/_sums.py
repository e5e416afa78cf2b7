"""Sums over many batches that keep their digits."""

from __future__ import annotations

import torch
from torch import Tensor


class CompensatedSum:
    """A running sum of tensors with Kahan's compensation.

    Its error stays at about one rounding of the result however many tensors are added, where a plain running sum
    loses digits in proportion to their number.

    Parameters
    ----------
    like : torch.Tensor
        Of the shape, dtype and device of the terms.

    References
    ----------
    W. Kahan, Further remarks on reducing truncation errors, Comm. ACM 8 (1965) 40, doi:10.1145/363707.363723.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._sum: Tensor | None = None
        self._error: Tensor | None = None

    def add(self, term: Tensor) -> None:
        """Add a tensor, which becomes property of the sum."""
        if self._sum is None:
            self._sum = term
            return
        if self._error is None:
            self._error = torch.zeros_like(self._sum)
        corrected = term.sub_(self._error)
        total = self._sum + corrected
        torch.sub(total, self._sum, out=self._error).sub_(corrected)
        self._sum.copy_(total)

    def value(self) -> Tensor:
        """Return the sum; that of no terms is zero."""
        return torch.zeros_like(self._like) if self._sum is None else self._sum
