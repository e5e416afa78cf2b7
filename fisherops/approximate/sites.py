"""Where a parameter is used, and the second moments of inputs and gradients there; of one batch after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherops._matmul import takes_onednn, times_transposed
from fisherops._sums import CompensatedSum
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.columns import Columns, Factors, Table
from fisherops.scores.convolutions import Convolution
from fisherops.scores.derived import Strided
from fisherops.scores.protocol import Key, Sums

LARGEST_FACTOR = 2**13
"""Rows of a Kronecker factor beyond which only its diagonal is taken."""

LARGEST_BLOCK = 2**11
"""Parameters beyond which a block without factors becomes a diagonal."""

# Rows of a block of a symmetric product that still fills the kernels.
_SIDE = 128


class Site(NamedTuple):
    """Elements of a parameter in the coordinates (g, o, i) of its columns, and how they are used."""

    key: Any
    """Name, offset, sizes and strides of the view, and its shape."""
    is_table: bool
    """Whether rows are looked up, so that the outputs o are indices and the gradients belong to i."""
    bias: str | None = None
    """The parameter that is added to the outputs, if it is used there alone."""

    @property
    def name(self) -> str:
        """The parameter."""
        return str(self.key[0][0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(g, o, i)."""
        g, o, i = self.key[4]
        return g, o, i

    def places(self) -> Tensor:
        """Return the place of each element within the parameter, (g, o, i)."""
        _, offset, sizes, strides, shape = self.key
        last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        return torch.arange(last + 1).as_strided(sizes, strides, offset).reshape(shape)

    @property
    def span(self) -> tuple[int, int] | None:
        """The first place and the one after the last, if the elements follow each other in the order (g, o, i)."""
        _, offset, sizes, strides, _ = self.key
        step = 1
        for n, s in zip(reversed(sizes), reversed(strides), strict=True):
            if n > 1 and s != step:
                return None
            step *= n
        return offset, offset + step


Found = dict[Site, list[Columns]]


class Names(NamedTuple):
    """Which parameters are approximated, and which of them without factors."""

    all: tuple[str, ...]
    exact: frozenset[str] = frozenset()
    """Those whose uses have no common factors."""
    alone: frozenset[str] = frozenset()
    """Those that are not always used in a call with the same others."""


def sites_of(batch: MaterializedBatch, names: Names) -> Found:
    """Return the sites of the parameters that have Kronecker factors in a batch, with their columns."""
    found: Found = {}
    dense = set(batch.names_of_dense())
    for name in names.all:
        blocks = batch.blocks_of(name)
        if name in dense | names.exact or not blocks:
            continue
        own: Found = {}
        for derived, columns in blocks:
            if not isinstance(derived, Strided) or not derived.is_injective or derived.shape[1:] == (1, 1):
                break
            own.setdefault(Site(derived.key, isinstance(columns, Table), batch.biases.get(name)), []).append(columns)
        else:
            found |= own
    return found


def groups_of(batch: MaterializedBatch, names: Names, found: Found) -> list[tuple[str, ...]]:
    """Return the parameters without factors, those of one call together."""
    with_factors = {site.name for site in found} | {site.bias for site in found}
    used = {*batch.names_of_dense(), *(name for derived, _ in batch.blocks for name in derived.names)}
    left = [name for name in names.all if name in used - with_factors]
    together = {name: {name} for name in left}
    for group in batch.groups:
        own = [name for name in group if name in together and name not in names.alone]
        if own:
            joined = set().union(*(together[name] for name in own))
            for name in joined:
                together[name] = joined
    order = {name: k for k, name in enumerate(names.all)}
    return list(dict.fromkeys(tuple(sorted(together[name], key=order.__getitem__)) for name in left))


class Adding:
    """Sums over batches by keys, without losing digits by their number."""

    def __init__(self) -> None:
        self._sums: dict[Key, CompensatedSum] = {}

    def add(self, key: Key, term: Tensor) -> None:
        """Add a term to the sum of a key."""
        if key not in self._sums:
            self._sums[key] = CompensatedSum(term)
        self._sums[key].add(term)

    def value(self) -> Sums:
        """Return the sums."""
        return {key: total.value() for key, total in self._sums.items()}


def moments(batches: Iterable[MaterializedBatch], names: Names, reduces: bool, limit: int) -> Sums:
    """Return the second moments of inputs and gradients at each site, and exact blocks of the other parameters.

    Keys have the roles "inputs", (g, i, i) or (g, i), with a row and column of ones for a bias; "gradients",
    (g, o, o) or (g, o); "positions" and examples, (2,); and for the names of a group "block", (n, n), or
    "squares", (n,).
    """
    total = Adding()
    for batch in batches:
        found = sites_of(batch, names)
        for site, held in found.items():
            for columns in held:
                _add_moments(total, site, columns, reduces)
        for group in groups_of(batch, names, found):
            _add_block(total, batch, group, limit)
    return total.value()


def _add_moments(total: Adding, site: Site, columns: Columns, reduces: bool) -> None:
    """Add the moments of one use in one batch."""
    has_bias = site.bias is not None
    if isinstance(columns, Convolution) and not reduces:
        for N, a, b in columns.matrices():
            _add(total, site, _moment(a, has_bias), _moment(b), a.shape[2], N)
        return
    for A, B in pieces_of(columns):
        N, T = A.shape[:2]
        if reduces:
            A, B = (A if site.is_table else A.mean(1, keepdim=True)), B.sum(1, keepdim=True)
        inputs = (
            _moment_of_indices(A, site.shape[1], reduces, B) if site.is_table else _moment(_positions_last(A), has_bias)
        )
        _add(total, site, inputs, _moment(B.permute(3, 4, 2, 0, 1).flatten(2)), N * T, N)


def _add(total: Adding, site: Site, inputs: Tensor, gradients: Tensor, positions: int, N: int) -> None:
    total.add(Key(site, "inputs", False), inputs)
    total.add(Key(site, "gradients", True), gradients)
    counts = torch.tensor([positions, N], dtype=torch.float64, device=gradients.device)
    total.add(Key(site, "positions", False), counts)


def _positions_last(X: Tensor) -> Tensor:
    """Return X (N, T, g, n) as (g, n, N · T)."""
    return X.permute(2, 3, 0, 1).flatten(2)


def pieces_of(columns: Columns) -> Iterator[tuple[Tensor, Tensor]]:
    """List A (n, T, g, i), of look-ups the indices (n, T), and B (n, T, q, g, o) of pieces of the data."""
    if isinstance(columns, Table):
        yield columns.index, columns.gradients.transpose(1, 2).unsqueeze(3)
    elif isinstance(columns, Convolution):
        for _, factors in columns.as_factors():
            yield factors.by_datum()
    else:
        assert isinstance(columns, Factors)
        yield columns.by_datum()


def _moment(X: Tensor, with_ones: bool = False) -> Tensor:
    """Return Σ x xᵀ of X (g, n, positions), (g, n, n), also of x with a one; large ones as diagonals (g, n)."""
    g, n, positions = X.shape
    if n > LARGEST_FACTOR:
        squares = X.square().sum(2)
        return torch.cat([squares, squares.new_full((g, 1), positions)], 1) if with_ones else squares
    size = n + with_ones
    result = X.new_empty(g, size, size)
    for own, out in zip(X, result, strict=True):
        # MKL takes a transpose as it is.
        _gram(own.contiguous() if takes_onednn(own) else own, out)
    if with_ones:
        result[:, :n, n] = result[:, n, :n] = X.sum(2)
        result[:, n, n] = positions
    return result


def _gram(X: Tensor, out: Tensor) -> None:
    """Write X Xᵀ, of which blocks on one side of the diagonal are enough, to the corner of a larger matrix."""
    n = len(X)
    step = max(_SIDE, -(-n // 8))
    for k in range(0, n, step):
        rows = slice(k, min(k + step, n))
        out[rows, : rows.stop] = times_transposed(X[rows], X[: rows.stop])
        out[:k, rows] = out[rows, :k].T


def _moment_of_indices(index: Tensor, length: int, reduces: bool, like: Tensor) -> Tensor:
    """Return how often each row is looked up, (1, length); those of means over the positions if they are reduced."""
    N, T = index.shape
    if not reduces:
        return torch.bincount(index.flatten(), minlength=length).to(like.dtype)[None]
    counts = like.new_zeros(N, length).scatter_add_(1, index, like.new_full((1, 1), 1 / T).expand(N, T))
    return _moment(counts.T[None])


def _add_block(total: Adding, batch: MaterializedBatch, group: tuple[str, ...], limit: int) -> None:
    """Add the exact block of some parameters, or their squares if they are too many."""
    sizes = [batch.numel_of(name) for name in group]
    if sum(sizes) > limit and len(group) > 1:
        for name in group:
            _add_block(total, batch, (name,), limit)
        return
    step = batch.step(sum(sizes))
    for n in range(0, batch.size, step):
        rows = torch.cat([batch.rows_of(name, n, min(n + step, batch.size)) for name in group], 1)
        if sum(sizes) <= limit:
            total.add(Key(group, "block", True), rows.T @ rows)
        else:
            total.add(Key(group, "squares", True), rows.square().sum(0))


class Piece(NamedTuple):
    """A block that has Kronecker factors."""

    sites: tuple[tuple[Site, bool], ...]
    """The uses that it sums, and whether their outputs and inputs are exchanged."""
    part: str
    """ "joint" of weight and bias, "weight", or "bias" alone."""

    def rows(self, batch: MaterializedBatch, found: Found) -> Iterator[Tensor]:
        """List the rows of G in blocks (r, g, o, i)."""
        g, o, i = self.sites[0][0].shape
        step = batch.step(g * o * (1 if self.part == "bias" else i))
        used = [(columns, swapped) for site, swapped in self.sites for columns in found.get(site, ())]
        if not used:
            return
        for n in range(0, batch.size, step):
            stop = min(n + step, batch.size)
            bias = None
            if self.part != "weight":
                assert self.sites[0][0].bias is not None
                bias = batch.rows_of(self.sites[0][0].bias, n, stop).view(-1, g, o, 1)
            if self.part == "bias":
                assert bias is not None
                yield bias
                continue
            rows: Tensor | None = None
            for columns, swapped in used:
                own = columns.rows(n, stop).flatten(0, 1)
                own = own.mT if swapped else own
                rows = own if rows is None else rows + own
            assert rows is not None
            yield rows if bias is None else torch.cat([rows, bias], 3)

    def terms(self, found: Found) -> int:
        """Return the number of positions of a datum if the use is one of a dense layer or a convolution."""
        columns = found[self.sites[0][0]][0]
        assert isinstance(columns, Factors | Convolution)
        return columns.terms

    def factors(self, batch: MaterializedBatch, found: Found) -> Iterator[tuple[Tensor, Tensor]] | None:
        """List A (n, T, g, i) and B (n, T, q, g, o) of a dense layer or a convolution; None if rows are cheaper."""
        site, _ = self.sites[0]
        held = found.get(site, [])
        if self.part == "bias" or len(self.sites) > 1 or len(held) != 1 or isinstance(held[0], Table):
            return None
        if not pairs_are_cheaper(self.terms(found), batch.vectors, *site.shape[1:]):
            return None
        return (
            (torch.cat([A, A.new_ones(*A.shape[:3], 1)], 3) if self.part == "joint" else A, B)
            for A, B in pieces_of(held[0])
        )


def pairs_are_cheaper(T: int, q: int, o: int, i: int) -> bool:
    """Whether T inputs and gradients take fewer flops to multiply by a matrix each than q rows (o, i) of a datum."""
    return T == 1 or T * (i * i + q * o * o + T * (i + q * o)) <= q * o * i * (o + i)


def is_shared(sums: Sums) -> bool:
    """Return whether a site has several positions for an example."""
    return any(bool(x[0] > x[1]) for key, x in sums.items() if key.role == "positions")


def exchanged(first: Site, second: Site) -> bool | None:
    """Return whether two sites of one parameter are each other's transpose, or False if they are equal; else None."""
    a, b = first.places(), second.places()
    if a.shape == b.shape and torch.equal(a, b):
        return False
    if first.shape[0] == 1 and a.shape[1:] == b.shape[:0:-1] and torch.equal(a, b.mT):
        return True
    return None


def overlap(sites: Sequence[Site]) -> bool:
    """Return whether sites of one parameter have elements in common."""
    index = torch.cat([site.places().flatten() for site in sites])
    return len(index.unique()) < len(index)
