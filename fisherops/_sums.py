"""Long sums that keep their digits."""

from __future__ import annotations

import torch
from torch import Tensor

# Terms that are added one after the other.
_TERMS = 32


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
        self._next: Tensor | None = None

    def add(self, term: Tensor) -> None:
        """Add a tensor, which becomes property of the sum."""
        if self._sum is None:
            self._sum = term
            return
        if self._error is None:
            self._error = torch.zeros_like(self._sum)
        corrected = term.sub_(self._error)
        self._next = torch.add(self._sum, corrected, out=self._next)
        torch.sub(self._next, self._sum, out=self._error).sub_(corrected)
        self._sum, self._next = self._next, self._sum

    def value(self) -> Tensor:
        """Return the sum; that of no terms is zero."""
        return torch.zeros_like(self._like) if self._sum is None else self._sum


class SegmentSum:
    """Sums of the vectors that share an index, such as the gradients of a table by its look-ups.

    Vectors of one index are summed in blocks of at most `_TERMS`, then the sums of the blocks. Added one after the
    other, a million equal numbers lose two digits in float32.

    Parameters
    ----------
    index : torch.Tensor
        (M,), the segment of each vector.
    count : int
        Number of segments.
    """

    def __init__(self, index: Tensor, count: int) -> None:
        self._levels: list[tuple[Tensor, int]] = []
        while (counts := index.bincount(minlength=count)).max() > _TERMS:
            order = index.argsort(stable=True)
            rank = torch.empty_like(index)
            rank[order] = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[index[order]]
            blocks = (counts + _TERMS - 1) // _TERMS
            self._levels.append(((blocks.cumsum(0) - blocks)[index] + rank // _TERMS, int(blocks.sum())))
            index = torch.arange(count, device=index.device).repeat_interleave(blocks)
        self._levels.append((index, count))

    @property
    def rows(self) -> int:
        """Number of vectors that intermediate sums take at most."""
        return max([0, *(count for _, count in self._levels[:-1])])

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(index.nbytes for index, _ in self._levels)

    def __call__(self, vectors: Tensor, out: Tensor) -> None:
        """Sum vectors (K, M, d) into `out` (K, count, d)."""
        for index, count in self._levels[:-1]:
            vectors = vectors.new_zeros(len(vectors), count, vectors.shape[2]).index_add_(1, index, vectors)
        out.zero_().index_add_(1, self._levels[-1][0], vectors)
