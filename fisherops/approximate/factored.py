"""Kronecker-factored approximations: KFAC, EKFAC and the nearest Kronecker products; exact blocks and diagonals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherops._linop import TorchLinearOperator, check_result, outside_of_autocast
from fisherops.approximate.sites import (
    LARGEST_BLOCK,
    LARGEST_FACTOR,
    Adding,
    Names,
    Piece,
    Site,
    exchanged,
    groups_of,
    is_shared,
    moments,
    overlap,
    sites_of,
)
from fisherops.approximate.structured import (
    BlockDiagonal,
    Eigen,
    Kronecker,
    LowRank,
    Place,
    StructuredOperator,
    dense,
    diagonal_matrix,
    from_left,
    from_right,
    put,
)
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.columns import Factors
from fisherops.scores.protocol import Key, Scores, Sums

SHARINGS = ("expand", "reduce")

# Passes over the batches for the nearest Kronecker products, and the relative gain of the norm at which they end.
_PASSES = 200
_GAIN = 16.0


@dataclass
class _Part:
    """A block with Kronecker factors: where it lies, its uses, and its factors."""

    place: Place
    piece: Piece
    left: Tensor
    right: Tensor
    label: str


class _Model:
    """The uses of the parameters of G, found by one pass.

    Parameters
    ----------
    G : Scores
    reduces : bool
        Whether inputs are averaged, and gradients summed, over shared positions before they are squared.
    separate_bias : bool
    """

    def __init__(self, G: Scores, reduces: bool, separate_bias: bool) -> None:
        self.G, self.reduces, self._separate = G, reduces, separate_bias
        self.kept: list[MaterializedBatch] = []
        self.names = Names(tuple(G.parameters.shapes))
        while True:
            self.sums = G.over_uses(self._moments, self.kept)
            names, self.names = self.names, _revised(self.names, self.sums)
            if self.names == names:
                break
        self.plan: dict[str, str] = {}
        self.parts = self._parts()
        self._rest = self._blocks_without_factors()

    @property
    def is_shared(self) -> bool:
        """Whether a layer sees several positions of an example."""
        return is_shared(self.sums)

    def _moments(self, batches: Iterable[MaterializedBatch]) -> Sums:
        return moments(batches, self.names, self.reduces, LARGEST_BLOCK)

    def operator(self, form: Callable[[_Part], StructuredOperator]) -> StructuredOperator:
        """Return the approximation whose blocks with factors have a form."""
        return _assembled(self.G, [*((part.place, form(part)) for part in self.parts), *self._rest], self.plan)

    def over_parts(self, update: Callable[[int, _Part, MaterializedBatch, Any], Tensor | None]) -> Sums:
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

    def _parts(self) -> list[_Part]:
        by_name: dict[str, list[Site]] = {}
        for key in self.sums:
            if isinstance(key.of, Site) and key.role == "gradients":
                by_name.setdefault(key.of.name, []).append(key.of)
        parts: list[_Part] = []
        for name in self.names.all:
            for sites in _merged(by_name.get(name, [])):
                parts += self._parts_of(sites)
        return parts

    def _parts_of(self, sites: list[tuple[Site, bool]]) -> list[_Part]:
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
            return [_Part(self._place_of(site, start), Piece(tuple(sites), "weight"), left, right, site.name)]
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
            return [_Part(place, Piece(tuple(sites), "joint"), left, right, label)]
        self.plan |= {site.name: own, site.bias: "covariance of the gradients at the outputs"}
        i = site.shape[2]
        inner, last = (right[:, :i, :i], right[:, i:, i:]) if right.ndim == 3 else (right[:, :i], right[:, i:])
        return [
            _Part(self._place_of(site, start), Piece(tuple(sites), "weight"), left, inner.contiguous(), site.name),
            _Part(_place(of_bias, self.G.device), Piece(tuple(sites), "bias"), left, last.contiguous(), site.bias),
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
            blocks.append((_place(index, self.G.device), block))
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


# ---- The public functions -----------------------------------------------------------------------------


@outside_of_autocast
def kfac(op: Any, sharing: str = "expand", *, separate_bias: bool = False) -> StructuredOperator:
    """Return the Kronecker-factored approximation (KFAC) of a Fisher matrix.

    The block of a layer with inputs a and gradients b at its outputs is the product of the second moments of both,
    E[b bᵀ] ⊗ E[a aᵀ]. Weight and bias of a layer are one block.

    Parameters
    ----------
    op : FisherOperator
        F, of any kind: Monte-Carlo, exact or empirical. One pass over its batches; cached factors are read.
    sharing : {"expand", "reduce"}
        What a layer does with the T positions of an example that share its weight, such as tokens or pixels. "expand":
        each is an example of its own. "reduce": inputs are averaged and gradients summed over them. Default: "expand".
    separate_bias : bool
        Whether weight and bias have blocks of their own. Default: False.

    Returns
    -------
    StructuredOperator
        K, (D, D), with the order of the parameters of `op`. `K.plan` describes each block. Convolutions have factors of
        their windows, and groups factors of their own; embeddings counts and a covariance. Parameters whose uses have
        no factors, such as gains, biases of normalization layers and parameters that are derived from others, have
        exact blocks, or diagonals above 2,048 elements. If one weight has several uses, its factors are the nearest
        Kronecker product to the sum of theirs, which for uses of one form adds them.

    Raises
    ------
    TypeError
        If `op` has no score matrix.
    ValueError
        If `sharing` is not an option, or is "reduce" and no layer has shared positions.
    NotImplementedError
        If parameters are sharded, or rows do not belong to examples.

    References
    ----------
    J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015,
    arXiv:1503.05671. R. Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network
    architectures, NeurIPS 2023, arXiv:2311.00636.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> K = fo.approximate.kfac(op)
    >>> K.plan
    {'weight, bias': 'Kronecker product'}
    >>> (K.inv(0.1) @ torch.ones(15)).shape
    torch.Size([15])
    """
    G, shift = scores_of(op)
    model = _modelled(G, sharing, separate_bias)
    return _shifted(model.operator(_kronecker), shift)


@outside_of_autocast
def ekfac(op: Any, sharing: str = "expand", *, separate_bias: bool = False) -> StructuredOperator:
    """Return the eigenvalue-corrected Kronecker-factored approximation (EKFAC) of a Fisher matrix.

    In the basis of the eigenvectors of KFAC's factors, the diagonal of F is exact. No other diagonal matrix in this
    basis is nearer to F in the Frobenius norm, KFAC included.

    Parameters
    ----------
    op : FisherOperator
        F. Two passes over its batches; without a cache, batches are kept between them if they fit into ``max_memory``.
    sharing, separate_bias
        As for `kfac`.

    Returns
    -------
    StructuredOperator
        K, (D, D).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `kfac`.

    References
    ----------
    T. George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis, NeurIPS 2018,
    arXiv:1806.03884.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> K, E = fo.approximate.kfac(op), fo.approximate.ekfac(op)
    >>> fo.approximate.error(op, E) <= fo.approximate.error(op, K)
    True
    """
    G, shift = scores_of(op)
    model = _modelled(G, sharing, separate_bias)
    bases = [_kronecker(part).eigen for part in model.parts]
    sums = model.over_parts(lambda number, part, batch, found: _squares(part, bases[number], batch, found))

    def form(part: _Part) -> StructuredOperator:
        number = next(k for k, own in enumerate(model.parts) if own is part)
        basis = bases[number]
        values = sums.get(Key(number, "values", True), torch.zeros_like(basis.values))
        return Eigen(basis.left, basis.right, check_result(values))

    K = model.operator(form)
    factored = {part.label for part in model.parts}
    K.plan = {
        label: f"{text}, eigenvalues corrected" if label in factored else text for label, text in model.plan.items()
    }
    return _shifted(K, shift)


@outside_of_autocast
def kronecker(op: Any, *, separate_bias: bool = False, tol: float | None = None) -> StructuredOperator:
    """Return the nearest Kronecker product to each layer's block of a Fisher matrix, in the Frobenius norm.

    By power iterations on the rearranged block, L ← Σ Gₙ R Gₙᵀ and R ← Σ Gₙᵀ L Gₙ for the rows Gₙ of a layer as
    matrices (o, i), from KFAC's factors. Each is positive semi-definite, and so is the limit.

    Parameters
    ----------
    op : FisherOperator
        F. Two passes over its batches for each iteration; without a cache, batches are kept between them if they fit
        into ``max_memory``.
    separate_bias : bool
        As for `kfac`.
    tol : float, optional
        Relative gain of the norm of the product at which iterations end. Default: 16 times the rounding of the dtype.

    Returns
    -------
    StructuredOperator
        K, (D, D), of which no block is further from F than that of `kfac` with either sharing.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `kfac`.

    References
    ----------
    C. F. Van Loan, N. Pitsianis, Approximation with Kronecker products, Linear Algebra for Large Scale and Real-Time
    Applications (1993) 293–314, doi:10.1007/978-94-015-8196-7_17.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> K, nearest = fo.approximate.kfac(op), fo.approximate.kronecker(op)
    >>> fo.approximate.error(op, nearest) <= fo.approximate.error(op, K)
    True
    """
    G, shift = scores_of(op)
    least = _GAIN * torch.finfo(G.torch_dtype).eps
    if tol is not None and not 0 <= tol < 1:
        raise ValueError(f"`tol` must be at least 0 and below 1, got {tol!r}. Pass a small number such as 1e-6.")
    tol = least if tol is None else max(tol, least)
    model = _Model(G, False, separate_bias)
    gains = torch.zeros(len(model.parts), dtype=torch.float64)
    for _ in range(_PASSES):
        before = gains.clone()
        for of_left in (True, False):
            for part in model.parts:
                _normalize(part, of_left)
            sums = model.over_parts(_contracting(of_left))
            for number, part in enumerate(model.parts):
                value = sums.get(Key(number, "values", True))
                if value is None:
                    continue
                if of_left:
                    part.left = value
                else:
                    part.right = value
                gains[number] = float(value.double().norm())
        if bool((gains - before <= tol * gains).all()):
            break
    K = model.operator(_kronecker)
    K.plan = {
        label: text.replace("Kronecker product", "nearest Kronecker product") for label, text in model.plan.items()
    }
    return _shifted(K, shift)


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
            total.add(Key((group, G.processes.rank), "rows", False), torch.cat(blocks))
        return total.value()

    found = G.over_uses(sums_of, kept)
    blocks: list[tuple[Place, StructuredOperator]] = []
    plan: dict[str, str] = {}
    for group, own in index.items():
        block = found.get(Key(group, "block", True))
        of_group = [v for key, v in found.items() if key.role == "rows" and key.of[0] == group]  # type: ignore[index]
        if block is None:
            rows = torch.cat(of_group) if of_group else torch.zeros(0, len(own), dtype=G.torch_dtype, device=G.device)
            plan[", ".join(group)] = "exact block, by its Gram matrix"
            blocks.append((_place(own, G.device), LowRank.of_rows(check_result(rows))))
        else:
            plan[", ".join(group)] = "exact block"
            blocks.append((_place(own, G.device), dense(check_result(block))))
    return _shifted(_assembled(G, blocks, plan), shift)


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
    return _shifted(K, shift)


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


def _modelled(G: Scores, sharing: str, separate_bias: bool) -> _Model:
    if sharing not in SHARINGS:
        raise ValueError(f"`sharing` must be 'expand' or 'reduce', got {sharing!r}.")
    model = _Model(G, sharing == "reduce", separate_bias)
    if sharing == "reduce" and not model.is_shared:
        raise ValueError(
            "`sharing` must be 'expand' for a model without shared positions, got 'reduce': every layer sees each "
            "example once. Leave it out."
        )
    return model


def _shifted(K: StructuredOperator, shift: float) -> StructuredOperator:
    if not shift:
        return K
    result = K.raised(shift)
    result.plan = K.plan
    return result


def _kronecker(part: _Part) -> Kronecker:
    return Kronecker(check_result(part.left), check_result(part.right))


def _place(index: Tensor, device: torch.device) -> Place:
    """Return indices as a slice if they follow each other."""
    flat = index.flatten()
    first, n = int(flat[0]), len(flat)
    return slice(first, first + n) if bool((flat.diff() == 1).all()) else flat.to(device)


def _assembled(
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
        own.append((_place(rest, G.device), diagonal_matrix(zeros)))
        planned = set(", ".join(plan).split(", "))
        text |= {name: "zero: the outputs do not depend on it" for name in G.parameters.shapes if name not in planned}
    K = BlockDiagonal(own)
    K.plan = text
    return K


# ---- Terms of single batches --------------------------------------------------------------------------


def _squares(part: _Part, basis: Eigen, batch: MaterializedBatch, found: Any) -> Tensor | None:
    """Return the squares of the rows in a basis, summed, (g, o, i)."""
    factors = part.piece.factors(found)
    if factors is not None:
        A, B = factors
        (_, T, _, i), (q, _, o) = A.shape, B.shape[2:]
        if T == 1 or T * (i * i + q * o * o) <= q * o * i * (o + i):
            A = A if basis.right is None else torch.einsum("ntgi,gij->ntgj", A, basis.right)
            B = B if basis.left is None else torch.einsum("ntqgo,gop->ntqgp", B, basis.left)
            return Factors(A, B).col_squares()
    total: Tensor | None = None
    for rows in part.piece.rows(batch, found):
        rows = rows if basis.left is None else from_left(basis.left.mT, rows)
        rows = rows if basis.right is None else from_right(rows, basis.right)
        squares = rows.square().sum(0)
        total = squares if total is None else total + squares
    return total


def _normalize(part: _Part, of_left: bool) -> None:
    """Divide the factor that the next one is computed from by its norm."""
    x = check_result(part.right if of_left else part.left)
    norm = x.double().norm()
    if float(norm) > 0:
        x = (x.double() / norm).to(x.dtype)
    part.left, part.right = (part.left, x) if of_left else (x, part.right)


def _contracting(of_left: bool) -> Callable[[int, _Part, MaterializedBatch, Any], Tensor | None]:
    return lambda _, part, batch, found: _contracted(part, of_left, batch, found)


def _contracted(part: _Part, of_left: bool, batch: MaterializedBatch, found: Any) -> Tensor | None:
    """Return Σ G R Gᵀ, (g, o, o), or Σ Gᵀ L G, (g, i, i), of the rows G; large ones as diagonals."""
    factors = part.piece.factors(found)
    if factors is not None and factors[0].shape[1] == 1:
        A, B = factors[0][:, 0], factors[1][:, 0]  # (N, g, i) and (N, q, g, o)
        if of_left:
            weights = _forms(A, part.right)
            return _weighted(B.flatten(0, 1), weights.repeat_interleave(B.shape[1], 0), part.left.ndim == 2)
        weights = _forms(B.flatten(0, 1), part.left).view(*B.shape[:2], -1).sum(1)
        return _weighted(A, weights, part.right.ndim == 2)
    total: Tensor | None = None
    for rows in part.piece.rows(batch, found):
        if of_left:
            other, X, is_diagonal = from_right(rows, part.right), rows, part.left.ndim == 2
            own = (other * X).sum((0, 3)) if is_diagonal else torch.einsum("rgoi,rgpi->gop", other, X)
        else:
            other, X, is_diagonal = from_left(part.left, rows), rows, part.right.ndim == 2
            own = (other * X).sum((0, 2)) if is_diagonal else torch.einsum("rgoi,rgoj->gij", other, X)
        total = own if total is None else total + own
    if total is None or total.ndim == 2:
        return total
    return (total + total.mT) / 2


def _forms(X: Tensor, M: Tensor) -> Tensor:
    """Return xᵀ M x, (n, g), for X (n, g, k) and M (g, k, k) or a diagonal (g, k)."""
    Y = X * M if M.ndim == 2 else torch.matmul(X.transpose(0, 1), M).transpose(0, 1)
    return (X * Y).sum(2).clamp_min_(0)


def _weighted(X: Tensor, weights: Tensor, is_diagonal: bool) -> Tensor:
    """Return Σ w x xᵀ, (g, k, k), or its diagonal, for X (n, g, k) and weights (n, g)."""
    Y = (X * weights.sqrt()[:, :, None]).transpose(0, 1)
    return Y.square().sum(1) if is_diagonal else torch.matmul(Y.mT, Y)


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
    step = max(1, 2**24 // (batch.vectors * sum(batch.numel_of(name) for name in group)))
    for n in range(0, batch.size, step):
        yield torch.cat([batch.rows_of(name, n, min(n + step, batch.size)) for name in group], 1)
