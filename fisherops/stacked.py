"""Score matrices on top of each other, each with a factor: G of a sum of Fisher matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from fisherops._processes import Processes
from fisherops.problem import Parameters
from fisherops.score_matrix import ScoreMatrix
from fisherops.scores import Kind
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.projection import Signs
from fisherops.scores.protocol import CacheSize, Scores, Sums, SumsOfUses, clipped


class StackedScores(Scores):
    """G with the rows √α G_k one after the other, so that GᵀG = Σ α G_kᵀG_k.

    Parameters
    ----------
    parts : sequence of (float, ScoreMatrix)
        Factors α > 0 and score matrices of equal parameters' number, precision, device and processes.
    """

    def __init__(self, parts: Sequence[tuple[float, ScoreMatrix]]) -> None:
        self._stacked = tuple(parts)
        self.max_memory = min(G.max_memory for _, G in self._stacked)
        super().__init__()

    @staticmethod
    def fits(G: ScoreMatrix | StackedScores, H: ScoreMatrix | StackedScores) -> bool:
        """Whether two can be stacked."""
        return (
            (G.parameters.numel, G.torch_dtype, G.device) == (H.parameters.numel, H.torch_dtype, H.device)
            and G.processes is H.processes
            and not (G.is_divided or H.is_divided)
        )

    @property
    def num_rows(self) -> int:
        """Number of the rows of all parts."""
        return sum(G.num_rows for _, G in self._stacked)

    @property
    def parts(self) -> tuple[tuple[float, Scores], ...]:
        """The score matrices, with their factors."""
        return self._stacked

    @property
    def parameters(self) -> Parameters:
        """The parameters of the first part."""
        return self._stacked[0][1].parameters

    @property
    def kinds(self) -> frozenset[Kind]:
        """Which vectors make the rows."""
        return frozenset().union(*(G.kinds for _, G in self._stacked))

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of each loss."""
        return tuple(name for _, G in self._stacked for name in G.reductions)

    @property
    def version(self) -> int:
        """The sum of the parts'."""
        return sum(G.version for _, G in self._stacked)

    def refresh(self) -> None:
        """Forget what the parts have cached."""
        for _, G in self._stacked:
            G.refresh()

    @property
    def processes(self) -> Processes:
        """The processes among which the data are divided."""
        return self._stacked[0][1].processes

    @property
    def parameter_checksum(self) -> int:
        """That of the first part."""
        return self._stacked[0][1].parameter_checksum

    @property
    def rows_have_order(self) -> bool:
        """Whether those of all parts have."""
        return min(G.rows_have_order for _, G in self._stacked)  # asked of all: processes answer together

    def require_order(self) -> None:
        """Raise ValueError if the rows have no order."""
        for _, G in self._stacked:
            G.require_order()

    @property
    def cache_size(self) -> CacheSize:
        """What is cached of all parts, and the least memory that is left."""
        nbytes, left, rows = zip(*(G.cache_size for _, G in self._stacked), strict=True)
        return CacheSize(sum(nbytes), min(left), all(rows))

    def to(self, device: Any) -> StackedScores:
        """Return the same on another device."""
        return StackedScores([(alpha, G.to(device)) for alpha, G in self._stacked])

    # ---- Products -----------------------------------------------------------------------------

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (K, D) → (K, D)."""
        return _total(G.product(V).mul_(alpha) for alpha, G in self._stacked)

    def _mul(self, V: Tensor) -> Tensor:
        return torch.cat([G._mul(V).mul_(sqrt(alpha)) for alpha, G in self._stacked], 1)

    def _mul_t(self, W: Tensor) -> Tensor:
        pieces = W.split([G.num_rows for _, G in self._stacked], 1)
        own = zip(self._stacked, pieces, strict=True)
        return _total(G._mul_t(piece).mul_(sqrt(alpha)) for (alpha, G), piece in own)

    def dense(self) -> Tensor:
        """Return GᵀG as a matrix (D, D)."""
        return _total(G.dense().mul_(alpha) for alpha, G in self._stacked)

    def col_squares(self) -> Tensor:
        """Return the squared norms of the columns, (D,)."""
        return _total(G.col_squares().mul_(alpha) for alpha, G in self._stacked)

    def square_norm(self) -> float:
        """Return the squared Frobenius norm."""
        return sum(alpha * G.square_norm() for alpha, G in self._stacked)

    def square_root(self, triangular: bool) -> Tensor:
        """Return B in float64 with BᵀB = GᵀG; see `ScoreMatrix.square_root`."""
        B = torch.cat([G.square_root(triangular).mul_(sqrt(alpha)) for alpha, G in self._stacked])
        return torch.linalg.qr(B, mode="r")[1] if triangular and len(B) > B.shape[1] else B

    def over_uses(self, sums_of: SumsOfUses, kept: list[MaterializedBatch] | None = None) -> Sums:
        """Return the sums of all parts, those of rows with their factors; the parts' parameters must have one name."""
        if any(G.parameters.shapes != self.parameters.shapes for _, G in self._stacked):
            raise ValueError(
                "the Fisher matrices of a sum must have parameters of the same names for this approximation. "
                "Approximate each of them, and add the results."
            )
        if kept is not None and len(self._stacked) > 1:
            kept = None  # batches do not tell which part they belong to
        total: Sums = {}
        for number, (alpha, G) in enumerate(self._stacked):
            for key, value in G.over_uses(sums_of, kept).items():
                if key.lists_rows:
                    total[key._replace(of=(*key.of, number))] = value * sqrt(alpha)  # type: ignore[misc]
                    continue
                own = value * alpha if key.is_of_rows else value
                total[key] = own if key not in total else total[key] + own
        return total

    # ---- Its rows -----------------------------------------------------------------------------

    @property
    def is_cached(self) -> bool:
        """Whether the rows of all parts are cached."""
        return all(G.is_cached for _, G in self._stacked)

    def block(self, start: int, stop: int) -> Tensor:
        """Return some rows, (stop − start, D)."""
        found, first = [], 0
        for alpha, G in self._stacked:
            rows = G.block(*clipped(start - first, stop - first, G.num_rows))
            found.append(rows.mul_(sqrt(alpha)))
            first += G.num_rows
        return torch.cat(found)

    def projected(self, signs: Signs) -> Tensor:
        """Multiply with random signs (D, k): (rows, k)."""
        return torch.cat([G.projected(signs).mul_(sqrt(alpha)) for alpha, G in self._stacked])

    def row_squares(self) -> Tensor:
        """Return the squared norms of the rows, (rows,) in float64."""
        return torch.cat([G.row_squares().mul_(alpha) for alpha, G in self._stacked])


def _total(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total
