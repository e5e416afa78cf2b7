"""Score matrices on top of each other, each with a factor: G of a sum of Fisher matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops._linop import TorchLinearOperator, Transposed, check_result, identity, opaque
from fisherops._ranks import Alone
from fisherops.problem import Parameters
from fisherops.score_matrix import Kept, ScoreMatrix
from fisherops.scores import Kind


class StackedScores(TorchLinearOperator):
    """G with the rows √α G_k one after the other, so that GᵀG = Σ α G_kᵀG_k.

    Parameters
    ----------
    parts : sequence of (float, ScoreMatrix)
        Factors α > 0 and score matrices of equal parameters' number, precision, device and processes.
    """

    sharding = None
    is_divided = False

    def __init__(self, parts: Sequence[tuple[float, ScoreMatrix]]) -> None:
        self.parts = tuple(parts)
        first = self.parts[0][1]
        D = first.parameters.numel
        super().__init__((D, D), first.torch_dtype, first.device)

    @staticmethod
    def fits(G: ScoreMatrix | StackedScores, H: ScoreMatrix | StackedScores) -> bool:
        """Whether two can be stacked."""
        alone = G.ranks.size == H.ranks.size == 1
        return (
            (G.parameters.numel, G.torch_dtype, G.device) == (H.parameters.numel, H.torch_dtype, H.device)
            and (alone or G.ranks is H.ranks)
            and G.sharding is None
            and H.sharding is None
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, D), those of all parts."""
        return sum(G.shape[0] for _, G in self.parts), self.parameters.numel

    @shape.setter
    def shape(self, _: Any) -> None:
        """Do nothing: SciPy's constructor sets a shape."""

    @property
    def parameters(self) -> Parameters:
        """The parameters of the first part."""
        return self.parts[0][1].parameters

    @property
    def kinds(self) -> frozenset[Kind]:
        """Which vectors make the rows."""
        return frozenset().union(*(G.kinds for _, G in self.parts))

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of each loss."""
        return tuple(name for _, G in self.parts for name in G.reductions)

    @property
    def version(self) -> int:
        """The sum of the parts'."""
        return sum(G.version for _, G in self.parts)

    def refresh(self) -> None:
        """Forget what the parts have cached."""
        for _, G in self.parts:
            G.refresh()

    @property
    def ranks(self) -> Alone:
        """The processes among which the data are divided."""
        return self.parts[0][1].ranks

    @property
    def parameter_checksum(self) -> int:
        """That of the first part."""
        return self.parts[0][1].parameter_checksum

    @property
    def rows_have_order(self) -> bool:
        """Whether those of all parts have."""
        return min(G.rows_have_order for _, G in self.parts)  # asked of all: processes answer together

    def require_order(self) -> None:
        """Raise ValueError if the rows have no order."""
        for _, G in self.parts:
            G.require_order()

    @property
    def kept(self) -> Kept:
        """What is cached of all parts, and the least memory that is left."""
        nbytes, left, rows = zip(*(G.kept for _, G in self.parts), strict=True)
        return Kept(sum(nbytes), min(left), all(rows))

    @property
    def max_memory(self) -> int:
        """The smallest bound of a part."""
        return min(G.max_memory for _, G in self.parts)

    # ---- Products -----------------------------------------------------------------------------

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (K, D) → (K, D)."""
        return _total(G.product(V).mul_(alpha) for alpha, G in self.parts)

    def _mul(self, V: Tensor) -> Tensor:
        return torch.cat([G._mul(V).mul_(sqrt(alpha)) for alpha, G in self.parts], 1)

    def _mul_t(self, W: Tensor) -> Tensor:
        pieces = W.split([G.shape[0] for _, G in self.parts], 1)
        return _total(G._mul_t(piece).mul_(sqrt(alpha)) for (alpha, G), piece in zip(self.parts, pieces, strict=True))

    def _transpose(self) -> Transposed:
        return Transposed(self)

    def dense(self) -> Tensor:
        """Return GᵀG as a matrix (D, D)."""
        return _total(G.dense().mul_(alpha) for alpha, G in self.parts)

    def col_norms(self) -> Tensor:
        """Return the squared norms of the columns, (D,)."""
        return _total(G.col_norms().mul_(alpha) for alpha, G in self.parts)

    def square_norm(self) -> float:
        """Return the squared Frobenius norm."""
        return sum(alpha * G.square_norm() for alpha, G in self.parts)

    def square_root(self, triangular: bool) -> Tensor:
        """Return B in float64 with BᵀB = GᵀG; see `ScoreMatrix.square_root`."""
        B = torch.cat([G.square_root(triangular).mul_(sqrt(alpha)) for alpha, G in self.parts])
        return torch.linalg.qr(B, mode="r")[1] if triangular and len(B) > B.shape[1] else B

    @opaque
    def gram(self) -> np.ndarray[Any, Any]:
        """Return the Gram matrix G Gᵀ as a NumPy array of shape (rows, rows)."""
        return self.gram_tensor().cpu().numpy()

    def gram_tensor(self) -> Tensor:
        """Return the Gram matrix as a torch tensor on the operators' device, by the blocks √(αβ) G_j G_kᵀ."""
        counts = [G.shape[0] for _, G in self.parts]
        result = torch.empty(sum(counts), sum(counts), dtype=self.torch_dtype, device=self.device)
        blocks = [rows.split(counts, 1) for rows in result.split(counts)]
        for j, (alpha, G) in enumerate(self.parts):
            blocks[j][j].copy_(G.gram_tensor().mul_(alpha))
            for k, (beta, H) in enumerate(self.parts[:j]):
                cross = _cross(G, H).mul_(sqrt(alpha * beta))
                blocks[j][k].copy_(cross)
                blocks[k][j].copy_(cross.T)
        return check_result(result)


def _cross(G: ScoreMatrix, H: ScoreMatrix) -> Tensor:
    """Return G Hᵀ, (rows of G, rows of H): from cached rows, or by products for each row of the one with fewer."""
    cached = G.cross(H)
    if cached is not None:
        return cached
    if G.shape[0] < H.shape[0]:
        return _cross(H, G).T
    return torch.cat([G._mul(H._mul_t(rows)) for rows in identity(H.shape[0], G.torch_dtype, G.device)]).T


def _total(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total
