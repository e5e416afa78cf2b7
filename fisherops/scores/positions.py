"""Which datum each position of a use belongs to: measured, because no rule about axes covers routing and packing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Arrangement(Protocol):
    """Arranges what belongs to positions by datum."""

    @property
    def reusable(self) -> bool:
        """Whether it depends on shapes alone, and so holds for any batch of the same graph."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Arrange: (P, ...) → (N, T, ...); a view if it can be."""
        ...


@dataclass(frozen=True)
class ByAxis:
    """The data lie along one axis of the positions, alone, or as the slower or the faster part of it."""

    sizes: tuple[int, ...]
    axis: int
    N: int
    is_faster: bool = False
    reusable: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        rest = x.shape[1:]
        x = x.reshape(*self.sizes, *rest).movedim(self.axis, 0)
        if self.is_faster:
            x = x.unflatten(0, (-1, self.N)).transpose(0, 1)
        return x.reshape(self.N, -1, *rest)

    def labels(self, device: torch.device) -> Tensor:
        """Return the datum of each position, (P,)."""
        P = math.prod(self.sizes)
        labels = torch.empty(P, dtype=torch.long, device=device)
        labels[self(torch.arange(P, device=device))] = torch.arange(self.N, device=device)[:, None]
        return labels


@dataclass(frozen=True)
class ByLabel:
    """Each position has a label of its own; a datum has as many positions as any, those that it lacks are zero."""

    table: Tensor
    """(N, T), the positions of each datum, P where there is none."""
    reusable: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self.table]


def only_axis(sizes: Sequence[int], N: int) -> ByAxis | None:
    """Return the one way in which N data can lie along an axis of the positions, None if there is not just one."""
    sizes = tuple(sizes) or (1,)
    if N == 1:
        return ByAxis(sizes, 0, 1)
    ways = list_axes(sizes, N)
    return ways[0] if len(ways) == 1 else None


def list_axes(sizes: tuple[int, ...], N: int) -> list[ByAxis]:
    """Return all ways in which N data can lie along an axis of the positions."""
    return [
        ByAxis(sizes, axis, N, is_faster)
        for axis, size in enumerate(sizes)
        if size % N == 0
        for is_faster in ((False, True) if size > N else (False,))
    ]


def best_axis(ways: Sequence[ByAxis], weights: Tensor, b1: Tensor, b2: Tensor) -> ByAxis | None:
    """Return the way that explains the gradient of a weighted sum at P positions, None if there is none.

    Parameters
    ----------
    ways : sequence of ByAxis
    weights : torch.Tensor
        (ways, P, q), those of the rows of the datum to which a position belongs.
    b1, b2 : torch.Tensor
        (P, q) and (P,), what is backpropagated from the vectors of all data, and from their weighted sum.
    """
    N = ways[0].N
    wrong: list[float] = (b2 - (weights * b1).sum(2)).norm(dim=1).tolist()
    tolerance = 0.1 / N * float(b2.norm())
    fitting = sum(x <= tolerance for x in wrong)
    if not fitting:
        return None
    chosen = ways[wrong.index(min(wrong))]
    # Gradients that are zero fit every axis, and say nothing about those of the next batch.
    return chosen if fitting == 1 else replace(chosen, reusable=False)


def measure(sizes: Sequence[int], b1: Tensor, b2: Tensor, N: int) -> Arrangement:
    """Find which datum each of P positions belongs to.

    Parameters
    ----------
    sizes : sequence of int
        Of the axes of the positions, P in all.
    b1, b2 : torch.Tensor
        (P, features), what is backpropagated to them from the outputs, and from those with the outputs of datum n
        weighted by 1 + n/N: at a position of datum n they differ by this factor.
    N : int
        Number of data.

    Returns
    -------
    Arrangement
        An axis that explains the measurement, else labels. The comparison with reverse mode has the last word.
    """
    sizes = tuple(sizes) or (1,)
    if N == 1:
        return ByAxis(sizes, 0, 1)
    factor = (1 + torch.arange(N, device=b1.device) / N).to(b1.dtype)[:, None, None]
    tolerance = 0.1 / N * float(b2.norm())
    best, chosen, fitting = math.inf, None, 0
    for way in list_axes(sizes, N):
        wrong = float((way(b2) - factor * way(b1)).norm())
        fitting += wrong <= tolerance
        if wrong < best:
            best, chosen = wrong, way
    if chosen is not None and fitting:
        # Gradients that are zero fit every axis, and say nothing about those of the next batch.
        return chosen if fitting == 1 else replace(chosen, reusable=False)
    square = b1.square().sum(1)
    live = square > 0
    ratio = (b1 * b2).sum(1) / square.where(live, torch.ones_like(square))
    labels = ((ratio - 1) * N).round().long().clamp(0, N - 1)
    if chosen is not None and best <= 2 * float((b2 - factor[labels, 0] * b1).norm()):
        return replace(chosen, reusable=False)
    by_datum = torch.argsort(torch.where(live, labels, N), stable=True)[: int(live.sum())]
    count = torch.bincount(labels[by_datum], minlength=N)
    table = torch.full((N, int(count.max()) if len(by_datum) else 1), len(b1), device=b1.device)
    column = torch.arange(len(by_datum), device=b1.device) - (count.cumsum(0) - count)[labels[by_datum]]
    table[labels[by_datum], column] = by_datum
    return ByLabel(table)
