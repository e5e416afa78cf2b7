"""Exact blocks of layers, and the exact diagonal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherops._linop import check_result
from fisherops._torch import outside_of_autocast
from fisherops.approximate.assembly import assembled, place_of, scores_of, shifted
from fisherops.approximate.sites import Adding, Names, groups_of
from fisherops.approximate.structured import LowRank, Place, StructuredOperator, dense, diagonal_matrix
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.protocol import Key, Sums


@outside_of_autocast
def layers(op: Any) -> StructuredOperator:
    """Return the exact blocks of a Fisher matrix for the parameters of each layer.

    Parameters
    ----------
    op : FisherOperator
        F. One pass over its batches if the layers are known, else two.

    Returns
    -------
    StructuredOperator
        K, (D, D). A layer is the parameters that are used in one call of PyTorch together, such as weight and bias.
        Each block is held dense, or by the eigenvectors of the layer's Gram matrix if there are fewer rows than
        parameters, whichever is smaller.

    Raises
    ------
    TypeError
        If `op` has no score matrix.
    ValueError
        If the blocks do not fit into ``max_memory``.
    NotImplementedError
        As `kfac`.

    Examples
    --------
    >>> import numpy as np, torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> K = fo.approximate.layers(op)
    >>> bool(np.allclose(K.todense(), op.todense(), atol=1e-6))
    True
    """
    G, shift = scores_of(op)
    names = Names(tuple(G.parameters.shapes), exact=frozenset(G.parameters.shapes))
    kept: list[MaterializedBatch] = []
    counted = G.over_uses(lambda batches: _count(batches, names), kept)
    groups = _joined([key.of for key in counted if key.role == "group"])  # type: ignore[misc]
    spans, R = G.parameters.spans, sum(int(v) for key, v in counted.items() if key.role == "rows")
    index = {group: torch.cat([torch.arange(*spans[name]) for name in group]) for group in groups}
    nbytes = sum(min(R, len(own)) * len(own) for own in index.values()) * G.dtype.itemsize
    if nbytes > G.max_memory:
        raise ValueError(
            f"`max_memory` must be at least {nbytes} bytes for the exact blocks of all layers, got {G.max_memory}. "
            "Raise it, or use `approximate.ekfac`."
        )

    def sums_of(batches: Iterable[MaterializedBatch]) -> Sums:
        total, rows = Adding(), dict[tuple[str, ...], list[Tensor]]()
        for batch in batches:
            for group, own in index.items():
                for block in _rows_of_group(batch, group):
                    if len(own) <= R:
                        total.add(Key(group, "block", True), block.T @ block)
                    else:
                        rows.setdefault(group, []).append(block)
        for group, blocks in rows.items():
            total.add(Key((group, G.processes.rank), "rows", False, lists_rows=True), torch.cat(blocks))
        return total.value()

    found = G.over_uses(sums_of, kept)
    blocks: list[tuple[Place, StructuredOperator]] = []
    plan: dict[str, str] = {}
    for group, own in index.items():
        block = found.get(Key(group, "block", True))
        of_group = [v for key, v in found.items() if key.lists_rows and key.of[0] == group]  # type: ignore[index]
        if block is None:
            rows = torch.cat(of_group) if of_group else torch.zeros(0, len(own), dtype=G.torch_dtype, device=G.device)
            plan[", ".join(group)] = "exact block, by its Gram matrix"
            blocks.append((place_of(own, G.device), LowRank.of_rows(check_result(rows))))
        else:
            plan[", ".join(group)] = "exact block"
            blocks.append((place_of(own, G.device), dense(check_result(block))))
    return shifted(assembled(G, blocks, plan), shift)


@outside_of_autocast
def diagonal(op: Any) -> StructuredOperator:
    """Return the exact diagonal of a Fisher matrix.

    Parameters
    ----------
    op : FisherOperator
        F.

    Returns
    -------
    StructuredOperator
        K, (D, D).

    Raises
    ------
    TypeError
        If `op` has no score matrix.

    Examples
    --------
    >>> import numpy as np, torch, fisherops as fo
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> bool(np.allclose(fo.approximate.diagonal(op).diagonal(), op.diagonal()))
    True
    """
    G, shift = scores_of(op)
    K = diagonal_matrix(G.col_squares())
    K.plan = dict.fromkeys(G.parameters.shapes, "exact diagonal")
    return shifted(K, shift)


def _count(batches: Iterable[MaterializedBatch], names: Names) -> Sums:
    """Count the rows, and name the groups of parameters that are used together."""
    total = Adding()
    for batch in batches:
        one = torch.ones(1, dtype=torch.float64, device=batch.device)
        total.add(Key(None, "rows", False), one * batch.count)
        for group in groups_of(batch, names, {}):
            total.add(Key(group, "group", False), one.clone())
    return total.value()


def _joined(groups: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Join groups that have names in common."""
    joined: list[tuple[str, ...]] = []
    for group in groups:
        own = group
        for other in [g for g in joined if set(g) & set(group)]:
            joined.remove(other)
            own = tuple(dict.fromkeys(other + own))
        joined.append(own)
    return joined


def _rows_of_group(batch: MaterializedBatch, group: tuple[str, ...]) -> Iterable[Tensor]:
    """List the rows of a batch for some parameters in blocks (r, n)."""
    step = batch.step(sum(batch.numel_of(name) for name in group))
    for n in range(0, batch.size, step):
        yield torch.cat([batch.rows_of(name, n, min(n + step, batch.size)) for name in group], 1)
