"""The parts of a model that have Kronecker factors, and the blocks of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherops._linop import check_result
from fisherops.approximate.assembly import assembled, place_of
from fisherops.approximate.sites import (
    LARGEST_BLOCK,
    LARGEST_FACTOR,
    Adding,
    Names,
    Piece,
    Site,
    exchanged,
    is_shared,
    moments,
    overlap,
    sites_of,
)
from fisherops.approximate.structured import Place, StructuredOperator, dense, diagonal_matrix
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.protocol import Key, Scores, Sums


@dataclass
class Part:
    """A block with Kronecker factors: where it lies, its uses, and its factors."""

    place: Place
    piece: Piece
    left: Tensor
    right: Tensor
    label: str


class Model:
    """The uses of the parameters of G, found by one pass.

    Parameters
    ----------
    G : Scores
    reduces : bool
        Whether inputs are averaged, and gradients summed, over shared positions before they are squared.
    separate_bias : bool
    keeps : bool
        Whether batches are kept for other passes, if they fit into the memory that is left. Default: True.
    """

    def __init__(self, G: Scores, reduces: bool, separate_bias: bool, keeps: bool = True) -> None:
        self.G, self.reduces, self._separate = G, reduces, separate_bias
        self.kept: list[MaterializedBatch] | None = [] if keeps else None
        self.names = Names(tuple(G.parameters.shapes))
        while True:
            self.sums = G.over_uses(self._moments, self.kept)
            names, self.names = self.names, _revised(self.names, self.sums)
            if self.names == names:
                break
        self.plan: dict[str, str] = {}
        self.parts = self._parts()
        self.rest = self._blocks_without_factors()
        """Places and exact blocks or diagonals of F for the parameters without factors."""

    @property
    def is_shared(self) -> bool:
        """Whether a layer sees several positions of an example."""
        return is_shared(self.sums)

    def _moments(self, batches: Iterable[MaterializedBatch]) -> Sums:
        return moments(batches, self.names, self.reduces, LARGEST_BLOCK)

    def operator(self, blocks: Iterable[StructuredOperator]) -> StructuredOperator:
        """Return the approximation from a block for each part, and those without factors."""
        places = [part.place for part in self.parts]
        return assembled(self.G, [*zip(places, blocks, strict=True), *self.rest], self.plan)

    def over_parts(self, update: Callable[[int, Part, MaterializedBatch, Any], Tensor | None]) -> Sums:
        """Return sums over batches, by the number of each part."""

        def sums_of(batches: Iterable[MaterializedBatch]) -> Sums:
            total = Adding()
            for batch in batches:
                found = sites_of(batch, self.names)
                for number, part in enumerate(self.parts):
                    term = update(number, part, batch, found)
                    if term is not None:
                        total.add(Key(number, "values", True), term)
            return total.value()

        return self.G.over_uses(sums_of, self.kept)

    # ---- What the sums say ------------------------------------------------------------------------

    def _parts(self) -> list[Part]:
        by_name: dict[str, list[Site]] = {}
        for key in self.sums:
            if isinstance(key.of, Site) and key.role == "gradients":
                by_name.setdefault(key.of.name, []).append(key.of)
        parts: list[Part] = []
        for name in self.names.all:
            for sites in _merged(by_name.get(name, [])):
                parts += self._parts_of(sites)
        return parts

    def _parts_of(self, sites: list[tuple[Site, bool]]) -> list[Part]:
        """Return the parts for the uses of the same elements."""
        left, right = _nearest_sum([self._factors_of(site, swapped) for site, swapped in sites])
        site = sites[0][0]
        start, _ = self.G.parameters.spans[site.name]
        own = "look-ups: counts ⊗ covariance" if site.is_table else "Kronecker product"
        if site.shape[0] > 1:
            own += f" for each of {site.shape[0]} groups"
        if len(sites) > 1:
            own = "Kronecker product, the nearest to the sum of its uses"
        if (left.ndim == 2 and not site.is_table) or right.ndim == 2:
            own += f"; factors above {LARGEST_FACTOR} rows by their diagonals"
        if site.bias is None:
            self.plan[site.name] = own
            return [Part(self._place_of(site, start), Piece(tuple(sites), "weight"), left, right, site.name)]
        first, _ = self.G.parameters.spans[site.bias]
        of_bias = (first + torch.arange(site.shape[0] * site.shape[1])).view(*site.shape[:2], 1)
        if not self._separate:
            label = f"{site.name}, {site.bias}"
            self.plan[label] = own
            place: Place
            if site.span is None:
                place = torch.cat([start + site.places(), of_bias], 2).flatten().to(self.G.device)
            else:
                a, b = site.span
                place = (start + a, start + b, site.shape[2]), (first, first + of_bias.numel(), 1)
            return [Part(place, Piece(tuple(sites), "joint"), left, right, label)]
        self.plan |= {site.name: own, site.bias: "covariance of the gradients at the outputs"}
        i = site.shape[2]
        inner, last = (right[:, :i, :i], right[:, i:, i:]) if right.ndim == 3 else (right[:, :i], right[:, i:])
        return [
            Part(self._place_of(site, start), Piece(tuple(sites), "weight"), left, inner.contiguous(), site.name),
            Part(place_of(of_bias, self.G.device), Piece(tuple(sites), "bias"), left, last.contiguous(), site.bias),
        ]

    def _place_of(self, site: Site, start: int) -> Place:
        """Return where a site lies among the parameters; its parameter begins at `start`."""
        if site.span is not None:
            return slice(start + site.span[0], start + site.span[1])
        return (start + site.places()).flatten().to(self.G.device)

    def _factors_of(self, site: Site, swapped: bool) -> tuple[Tensor, Tensor]:
        """Return the factors by outputs and inputs of a site; those of indices belong to the outputs."""
        positions = self.sums[Key(site, "positions", False)]
        inputs = self.sums[Key(site, "inputs", False)] / float(positions[int(self.reduces)])
        gradients = self.sums[Key(site, "gradients", True)]
        return (inputs, gradients) if site.is_table != swapped else (gradients, inputs)

    def _blocks_without_factors(self) -> list[tuple[Place, StructuredOperator]]:
        spans = self.G.parameters.spans
        blocks: list[tuple[Place, StructuredOperator]] = []
        for key, value in self.sums.items():
            if isinstance(key.of, Site):
                continue
            group: tuple[str, ...] = key.of  # type: ignore[assignment]
            self.plan[", ".join(group)] = (
                "exact block" if key.role == "block" else f"exact diagonal, of more than {LARGEST_BLOCK} rows"
            )
            index = torch.cat([torch.arange(*spans[name]) for name in group])
            block = dense(check_result(value)) if key.role == "block" else diagonal_matrix(check_result(value))
            blocks.append((place_of(index, self.G.device), block))
        return blocks


def _revised(names: Names, sums: Sums) -> Names:
    """Return the names with those that have no common factors after all, or other company in another batch."""
    exact, alone = set(names.exact), set(names.alone)
    sites: dict[str, set[Site]] = {}
    groups: dict[str, set[tuple[str, ...]]] = {}
    for key in sums:
        if isinstance(key.of, Site):
            sites.setdefault(key.of.name, set()).add(key.of)
            if key.of.bias is not None:
                groups.setdefault(key.of.bias, set()).add((key.of.name,))
        else:
            group: tuple[str, ...] = key.of  # type: ignore[assignment]
            for name in group:
                groups.setdefault(name, set()).add(group)
    for name, own in sites.items():
        if name in groups or not _fit(list(own)):
            exact.add(name)
    for name, found in groups.items():
        if len(found) > 1:
            alone.add(name)
            exact |= {group[0] for group in found if group[0] in sites}
    return Names(names.all, frozenset(exact), frozenset(alone))


def _fit(sites: Sequence[Site]) -> bool:
    """Return whether sites of one parameter have no elements in common, or the same matrix, perhaps transposed."""
    merged = _merged(sites)
    if len({site.bias for site in sites}) > 1:
        return False
    return len(merged) == 1 or not overlap([of_same[0][0] for of_same in merged])


def _merged(sites: Sequence[Site]) -> list[list[tuple[Site, bool]]]:
    """Put the sites of the same elements together, with whether their outputs and inputs are exchanged."""
    merged: list[list[tuple[Site, bool]]] = []
    for site in sorted(sites, key=repr):
        for own in merged:
            swapped = exchanged(own[0][0], site)
            if swapped is not None:
                own.append((site, swapped))
                break
        else:
            merged.append([(site, False)])
    return merged


def _nearest_sum(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return L ⊗ R that is nearest to Σ L_u ⊗ R_u: combinations of the L_u, and of the R_u, with weights ≥ 0."""
    if len(factors) == 1:
        return factors[0]
    lefts, rights = _alike([left for left, _ in factors]), _alike([right for _, right in factors])
    a, b = (torch.stack([torch.stack([(x.double() * y).sum() for y in own]) for x in own]) for own in (lefts, rights))
    q = torch.ones(len(factors), dtype=torch.float64, device=a.device)
    for _ in range(100):  # the leading singular pair of Σ vec(L_u) vec(R_u)ᵀ in the span of these
        q = a @ (b @ q)
        q = q / q.norm().clamp_min(torch.finfo(torch.float64).tiny)
    norm = float(q @ b @ q)
    p = b @ q / norm if norm else q
    return (
        sum((float(w) * x for w, x in zip(p, lefts, strict=True)), torch.zeros_like(lefts[0])),
        sum((float(w) * x for w, x in zip(q, rights, strict=True)), torch.zeros_like(rights[0])),
    )


def _alike(factors: list[Tensor]) -> list[Tensor]:
    """Return matrices (g, n, n), or diagonals (g, n) if they are large."""
    if len({x.ndim for x in factors}) == 1:
        return factors
    if factors[0].shape[1] > LARGEST_FACTOR:
        return [x if x.ndim == 2 else x.diagonal(dim1=1, dim2=2) for x in factors]
    return [torch.diag_embed(x) if x.ndim == 2 else x for x in factors]
