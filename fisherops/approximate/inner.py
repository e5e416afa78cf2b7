"""Σ_r g_rᵀ K g_r over the rows g of G, for a block-diagonal K, without dense rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherops._linop import check_result
from fisherops.approximate.factored import contracted, squares
from fisherops.approximate.model import Model, Part
from fisherops.approximate.structured import BlockDiagonal, Eigen, Kronecker, Place, StructuredOperator, taken
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.protocol import Key, Scores


def inner_product(G: Scores, K: Any) -> float | None:
    """Return Σ_r g_rᵀ K g_r = tr FK; None if the blocks of K are not those of the layers of G.

    Of a Kronecker product it is ⟨L, Σ G R Gᵀ⟩ for rows as matrices G, and of a matrix by its eigenvectors
    ⟨values, Σ (QᵀG)²⟩, both from the factors of G where this is cheaper. Blocks without factors are those of F itself.
    """
    if not isinstance(K, BlockDiagonal) or not any(_is_factored(block) for _, block in K.blocks):
        return None
    for separate_bias in (False, True):
        try:
            model = Model(G, False, separate_bias)
        except NotImplementedError:  # layers cannot be told apart
            return None
        total = _matched(G, K, model)
        if total is not None:
            return total
    return None


def _is_factored(block: StructuredOperator) -> bool:
    return block.has_factors or (isinstance(block, Eigen) and block.left is not None and block.right is not None)


def _matched(G: Scores, K: BlockDiagonal, model: Model) -> float | None:
    """Return the sum, or None if a block of K is none of the parts of a model."""
    parts: list[tuple[Part, Kronecker | Eigen]] = []
    norms, total = G.col_squares()[None], 0.0
    for place, block in K.blocks:
        part = next((part for part in model.parts if _is_same(part.place, place)), None)
        own = next((F for other, F in model.rest if _is_same(other, place)), None)
        if isinstance(block, Eigen) and block.left is None and block.right is None:
            total += _dot(taken(norms, place)[0], block.values.flatten())
        elif part is not None and isinstance(block, Kronecker | Eigen):
            parts.append((part, block))
        elif isinstance(own, Kronecker):
            units = torch.eye(block.shape[0], dtype=G.torch_dtype, device=G.device)
            total += _dot(own.left[0], block.multiply(units))
        else:
            return None
        if isinstance(block, Kronecker) and block.added and part is not None:
            total += block.added * float(taken(norms, place).sum(dtype=torch.float64))
    model.parts = [
        replace(part, left=block.left, right=block.right) if isinstance(block, Kronecker) else part
        for part, block in parts
    ]

    def term(number: int, part: Part, batch: MaterializedBatch, found: Any) -> Tensor | None:
        block = parts[number][1]
        if isinstance(block, Eigen):
            return squares(part, block, batch, found)
        return contracted(True, number, part, batch, found)

    sums = model.over_parts(term)
    for number, (_, block) in enumerate(parts):
        value = sums.get(Key(number, "values", True))
        if value is not None:
            total += _dot(check_result(value), block.left if isinstance(block, Kronecker) else block.values)
    return total


def _dot(x: Tensor, y: Tensor) -> float:
    """Return ⟨x, y⟩ in float64."""
    return float((x.double() * y).sum())


def _is_same(first: Place, second: Place) -> bool:
    """Return whether two places have the same indices in the same order."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    return first == second
