"""What all builders of approximations share: the score matrix of an operator, and blocks put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherops._linop import TorchLinearOperator
from fisherops.approximate.structured import BlockDiagonal, Place, StructuredOperator, diagonal_matrix, put
from fisherops.scores.protocol import Scores


def scores_of(op: Any) -> tuple[Scores, float]:
    """Return G and λ of a Fisher operator GᵀG + λI."""
    G = getattr(op, "score_matrix", None)
    if not isinstance(op, TorchLinearOperator) or G is None:
        raise TypeError(
            f"`op` must be a Fisher operator, got {type(op).__name__}, which has no score matrix. Approximate the "
            "operators that it is made of; positive multiples and sums of Fisher operators have one."
        )
    if isinstance(op.shift, Tensor):
        raise ValueError(
            "`op` must have the same damping for all parameters, got one for each of them. Approximate `op.undamped`."
        )
    if G.is_divided:
        raise NotImplementedError(
            "structured approximations are not supported for sharded parameters. Gather the parameters, and pass "
            "`process_group` to divide the data alone."
        )
    return G, float(op.shift)


def shifted(K: StructuredOperator, shift: float) -> StructuredOperator:
    """Return K + shift · I with the plan of K."""
    if not shift:
        return K
    result = K.raised(shift)
    result.plan = K.plan
    return result


def place_of(index: Tensor, device: torch.device) -> Place:
    """Return indices as a slice if they follow each other."""
    flat = index.flatten()
    first, n = int(flat[0]), len(flat)
    return slice(first, first + n) if bool((flat.diff() == 1).all()) else flat.to(device)


def assembled(
    G: Scores, blocks: Sequence[tuple[Place, StructuredOperator]], plan: Mapping[str, str]
) -> StructuredOperator:
    """Put blocks together, with zeros for parameters that the outputs do not depend on."""
    own, text = list(blocks), dict(plan)
    if sum(block.shape[0] for _, block in blocks) < G.parameters.numel:
        free = torch.ones(G.parameters.numel, dtype=torch.bool)
        for place, block in blocks:
            put(free[None], place, torch.zeros(1, 1, dtype=torch.bool).expand(1, block.shape[0]))
        rest = free.nonzero()[:, 0]
        zeros = torch.zeros(len(rest), dtype=G.torch_dtype, device=G.device)
        own.append((place_of(rest, G.device), diagonal_matrix(zeros)))
        planned = set(", ".join(plan).split(", "))
        text |= {name: "zero: the outputs do not depend on it" for name in G.parameters.shapes if name not in planned}
    K = BlockDiagonal(own)
    K.plan = text
    return K
