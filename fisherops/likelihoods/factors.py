"""Output factors: matrices S in output space with S Sᵀ = B, that multiply without being written out.

S of a batch is block-diagonal. Its B blocks have P rows, the outputs that a block takes, and R columns, its vectors:
one block is one loss term with P = C, unless :class:`Combined` joins several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor


class OutputFactor(ABC):
    """S of one batch."""

    blocks: int
    """B, diagonal blocks."""
    outputs: int
    """P, rows of a block."""
    rank: int
    """R, columns of a block."""

    @abstractmethod
    def apply(self, W: Tensor) -> Tensor:
        """Multiply S: (K, B, R) → (K, B, P)."""

    @abstractmethod
    def adjoint(self, U: Tensor) -> Tensor:
        """Multiply Sᵀ: (K, B, P) → (K, B, R)."""

    def coordinates(self, U: Tensor) -> Tensor | None:
        """Return W (B, R) with S W = U (B, P) for U in the range of S, None if that is not in closed form."""
        return None

    @abstractmethod
    def columns(self) -> Tensor:
        """List the vectors themselves, (B, R, P)."""

    @abstractmethod
    def scaled(self, scale: Tensor) -> OutputFactor:
        """Return diag(scale) S, for `scale` that broadcasts to (B, P)."""

    def restricted(self, blocks: slice) -> OutputFactor:
        """Return S of some blocks."""
        return DenseFactor(self.columns()[blocks])

    def vectors(self, start: int, stop: int, like: Tensor) -> Tensor:
        """List some of the vectors, (B, stop − start, P) in the dtype of `like`, without the others."""
        units = torch.zeros(stop - start, self.rank, dtype=like.dtype, device=like.device)
        units.diagonal(start).fill_(1)
        return self.apply(units.unsqueeze(1).expand(-1, self.blocks, -1)).transpose(0, 1)

    def compressed(self) -> OutputFactor:
        """Return a factor with at most P vectors and the same S Sᵀ."""
        return DenseFactor(_triangle(self.columns())) if self.rank > self.outputs else self

    def summed(self, group: int) -> OutputFactor:
        """Return the factor whose blocks are `group` successive ones, with their vectors added."""
        return self if group == 1 else Combined([self], self.blocks // group, shared=True)


class DenseFactor(OutputFactor):
    """An output factor given by its vectors (B, R, P)."""

    def __init__(self, columns: Tensor) -> None:
        self._columns = columns
        self.blocks, self.rank, self.outputs = columns.shape

    def apply(self, W: Tensor) -> Tensor:
        return torch.einsum("trc,ktr->ktc", self._columns, W)

    def adjoint(self, U: Tensor) -> Tensor:
        return torch.einsum("trc,ktc->ktr", self._columns, U)

    def columns(self) -> Tensor:
        return self._columns

    def scaled(self, scale: Tensor) -> DenseFactor:
        return DenseFactor(self._columns * scale.unsqueeze(1))

    def restricted(self, blocks: slice) -> DenseFactor:
        return DenseFactor(self._columns[blocks])


class DiagonalFactor(OutputFactor):
    """An output factor that is a diagonal matrix for each block; `diagonal` is (B, P)."""

    def __init__(self, diagonal: Tensor) -> None:
        self._diagonal = diagonal
        self.blocks, self.outputs = diagonal.shape
        self.rank = self.outputs

    def apply(self, W: Tensor) -> Tensor:
        return self._diagonal * W

    def adjoint(self, U: Tensor) -> Tensor:
        return self._diagonal * U

    def coordinates(self, U: Tensor) -> Tensor | None:
        return _quotient(U, self._diagonal)

    def columns(self) -> Tensor:
        return torch.diag_embed(self._diagonal)

    def scaled(self, scale: Tensor) -> DiagonalFactor:
        return DiagonalFactor(self._diagonal * scale)

    def restricted(self, blocks: slice) -> DiagonalFactor:
        return DiagonalFactor(self._diagonal[blocks])


class CategoricalFactor(OutputFactor):
    """Scores p − e_y of a categorical variable, kept as probabilities and class indices.

    Parameters
    ----------
    probabilities : torch.Tensor
        p, (T, C).
    labels : torch.Tensor
        y, (T, R) class indices.
    scale : torch.Tensor or None
        What each vector is multiplied by, broadcasts to (T, R); None is 1.
    """

    def __init__(self, probabilities: Tensor, labels: Tensor, scale: Tensor | None = None) -> None:
        self._p, self._labels = probabilities, labels
        self._scale = probabilities.new_ones(1, 1) if scale is None else scale
        self.blocks, self.outputs = probabilities.shape
        self.rank = labels.shape[1]

    def apply(self, W: Tensor) -> Tensor:
        W = W * self._scale
        U = self._p * W.sum(-1, keepdim=True)
        return U.scatter_add_(-1, self._labels.expand(W.shape), -W)

    def adjoint(self, U: Tensor) -> Tensor:
        inner = torch.einsum("tc,ktc->kt", self._p, U).unsqueeze(-1)
        picked = U.gather(-1, self._labels.expand(U.shape[0], *self._labels.shape))
        return (inner - picked).mul_(self._scale)

    def columns(self) -> Tensor:
        columns = self._p.unsqueeze(1).repeat(1, self.rank, 1)
        columns.scatter_add_(-1, self._labels.unsqueeze(-1), -torch.ones_like(columns[..., :1]))
        return columns.mul_(self._scale.unsqueeze(-1))

    def scaled(self, scale: Tensor) -> CategoricalFactor:
        return CategoricalFactor(self._p, self._labels, self._scale * scale[:, :1])

    def restricted(self, blocks: slice) -> CategoricalFactor:
        return CategoricalFactor(self._p[blocks], self._labels[blocks], _cut(self._scale, blocks))

    def compressed(self) -> OutputFactor:
        if self.rank <= self.outputs:
            return self
        # Draws of the same class are the same vector: C of them, each as often as it was drawn.
        squares = self._scale.square().expand(self._labels.shape)
        counts = torch.zeros_like(self._p).scatter_add_(1, self._labels, squares)
        classes = torch.arange(self.outputs, device=self._p.device).expand(self._p.shape)
        return CategoricalFactor(self._p, classes, counts.sqrt_())


class CategoricalRoot(OutputFactor):
    """diag √p − p √pᵀ, the square root of diag p − p pᵀ, never written out; rows may be scaled.

    Parameters
    ----------
    probabilities : torch.Tensor
        p, (T, C).
    scale : torch.Tensor or None
        Broadcasts to (T, 1); None is 1.
    """

    def __init__(self, probabilities: Tensor, scale: Tensor | None = None) -> None:
        self._p, self._root = probabilities, probabilities.sqrt()
        self._scale = probabilities.new_ones(1, 1) if scale is None else scale
        self.blocks, self.outputs = probabilities.shape
        self.rank = self.outputs

    def apply(self, W: Tensor) -> Tensor:
        inner = torch.einsum("tc,ktc->kt", self._root, W).unsqueeze(-1)
        return (self._root * W - self._p * inner).mul_(self._scale)

    def adjoint(self, U: Tensor) -> Tensor:
        inner = torch.einsum("tc,ktc->kt", self._p, U).unsqueeze(-1)
        return (self._root * (U - inner)).mul_(self._scale)

    def coordinates(self, U: Tensor) -> Tensor | None:
        return _quotient(U, self._root * self._scale)  # the entries of gradients of the loss sum to zero

    def columns(self) -> Tensor:
        columns = torch.diag_embed(self._root) - self._root.unsqueeze(2) * self._p.unsqueeze(1)
        return columns.mul_(self._scale.unsqueeze(-1))

    def scaled(self, scale: Tensor) -> CategoricalRoot:
        return CategoricalRoot(self._p, self._scale * scale[:, :1])

    def restricted(self, blocks: slice) -> CategoricalRoot:
        return CategoricalRoot(self._p[blocks], _cut(self._scale, blocks))


class NormalRoot(OutputFactor):
    """The root of the Fisher of a multivariate normal in its mean and its Cholesky factor L (T, d, d).

    With A = L⁻¹ dL, lower triangular, the metric is ‖L⁻¹ dμ‖² + 2 Σ_i A_ii² + Σ_{i>j} A_ij².
    """

    def __init__(self, L: Tensor, scale: Tensor | None = None) -> None:
        self._L = L
        self._scale = L.new_ones(1, 1) if scale is None else scale
        d = L.shape[-1]
        self._weights = torch.ones_like(L[0]).tril().fill_diagonal_(sqrt(2))
        self.blocks, self.outputs = len(L), d + d * d
        self.rank = self.outputs

    def apply(self, W: Tensor) -> Tensor:
        mean, rest = self._split(W)
        U = torch.linalg.solve_triangular(self._L.mT, torch.cat([mean, self._weights * rest], -1), upper=True)
        return self._join(U[..., :1], U[..., 1:].tril()) * self._scale

    def adjoint(self, U: Tensor) -> Tensor:
        mean, rest = self._split(U * self._scale)
        W = torch.linalg.solve_triangular(self._L, torch.cat([mean, rest.tril()], -1), upper=False)
        return self._join(W[..., :1], self._weights * W[..., 1:])

    def columns(self) -> Tensor:
        eye = torch.eye(self.rank, dtype=self._L.dtype, device=self._L.device)
        return self.apply(eye.unsqueeze(1).expand(self.rank, self.blocks, self.rank)).transpose(0, 1)

    def scaled(self, scale: Tensor) -> NormalRoot:
        return NormalRoot(self._L, self._scale * scale)

    def restricted(self, blocks: slice) -> NormalRoot:
        return NormalRoot(self._L[blocks], _cut(self._scale, blocks))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        d = self._L.shape[-1]
        return x[..., :d].unsqueeze(-1), x[..., d:].unflatten(-1, (d, d))

    def _join(self, mean: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([mean.squeeze(-1), rest.flatten(-2)], -1)


class Combined(OutputFactor):
    """Blocks of several factors joined to larger ones.

    A block takes as many successive blocks of each part as there are more of them; its outputs are theirs, one part
    after the other.

    Parameters
    ----------
    parts : sequence of OutputFactor
    blocks : int
        Divides the number of blocks of each part.
    shared : bool
        Whether the vectors of the joined blocks are added, the first to the first and so on, all parts having the same
        number of them; otherwise each stays a vector of its own.
    """

    def __init__(self, parts: Sequence[OutputFactor], blocks: int, shared: bool) -> None:
        self._parts, self._shared = parts, shared
        self._groups = [part.blocks // max(blocks, 1) for part in parts]
        self.blocks = blocks
        self._heights = [g * part.outputs for g, part in zip(self._groups, parts, strict=True)]
        self._widths = [g * part.rank for g, part in zip(self._groups, parts, strict=True)]
        self.outputs = sum(self._heights)
        self.rank = parts[0].rank if shared else sum(self._widths)

    def apply(self, W: Tensor) -> Tensor:
        pieces = [W] * len(self._parts) if self._shared else W.split(self._widths, dim=-1)
        products = []
        for part, g, piece in zip(self._parts, self._groups, pieces, strict=True):
            own = piece.repeat_interleave(g, dim=1) if self._shared else piece.reshape(len(W), part.blocks, part.rank)
            products.append(part.apply(own).reshape(len(W), self.blocks, g * part.outputs))
        return torch.cat(products, -1)

    def adjoint(self, U: Tensor) -> Tensor:
        products = []
        for part, g, piece in zip(self._parts, self._groups, U.split(self._heights, dim=-1), strict=True):
            own = part.adjoint(piece.reshape(len(U), part.blocks, part.outputs))
            own = own.view(len(U), self.blocks, g, part.rank)
            products.append(own.sum(2) if self._shared else own.flatten(2))
        return torch.stack(products).sum(0) if self._shared else torch.cat(products, -1)

    def columns(self) -> Tensor:
        listed = [part.columns() for part in self._parts]
        cut = [
            c.view(self.blocks, g, part.rank, part.outputs)
            for c, g, part in zip(listed, self._groups, self._parts, strict=True)
        ]
        if self._shared:
            return torch.cat([c.transpose(1, 2).flatten(2) for c in cut], -1)
        columns = listed[0].new_zeros(self.blocks, self.rank, self.outputs)
        row = column = 0
        for c, g, width, height in zip(cut, self._groups, self._widths, self._heights, strict=True):
            corner = columns[:, row : row + width, column : column + height]
            for i in range(g):
                R, P = c.shape[2:]
                corner[:, i * R : (i + 1) * R, i * P : (i + 1) * P] = c[:, i]
            row, column = row + width, column + height
        return columns

    def scaled(self, scale: Tensor) -> Combined:
        scales = scale.expand(self.blocks, self.outputs).split(self._heights, dim=1)
        parts = [
            part.scaled(own.reshape(part.blocks, part.outputs)) for part, own in zip(self._parts, scales, strict=True)
        ]
        return Combined(parts, self.blocks, self._shared)

    def restricted(self, blocks: slice) -> Combined:
        start, stop, _ = blocks.indices(self.blocks)
        cut = [part.restricted(slice(start * g, stop * g)) for part, g in zip(self._parts, self._groups, strict=True)]
        return Combined(cut, stop - start, self._shared)

    def compressed(self) -> OutputFactor:
        if self._shared:
            return super().compressed()
        return Combined([part.compressed() for part in self._parts], self.blocks, shared=False)

    def summed(self, group: int) -> Combined:
        return Combined(self._parts, self.blocks // group, shared=True)


def _quotient(U: Tensor, divisor: Tensor) -> Tensor | None:
    """Return U / divisor with 0 / 0 = 0, None if that is not finite."""
    W = torch.where(U == 0, 0, U / divisor)
    return W if W.isfinite().all() else None


def _cut(scale: Tensor, blocks: slice) -> Tensor:
    """Return a scale that broadcasts to all blocks as that of some of them."""
    return scale if len(scale) == 1 else scale[blocks]


def _triangle(columns: Tensor) -> Tensor:
    """Return P vectors with the same sum of outer products, for vectors (B, R, P)."""
    triangle: Tensor = torch.linalg.qr(columns, mode="r")[1]
    return triangle
