"""G of one batch, held as dense rows for some parameters and as columns by use for the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherops._matmul import symmetrized, takes_onednn, times_transposed
from fisherops._progress import BAR
from fisherops._sizes import SIZES
from fisherops._sums import CompensatedSum
from fisherops.problem.calls import Use
from fisherops.scores.columns import Columns, Factors
from fisherops.scores.derived import Composed, Derived, Strided

# Rows are multiplied by G and then by Gᵀ while they are in the cache, but some rows at least: the result is read and
# written for each block. oneDNN needs many rows at once, and more bytes of them.
_ONEDNN = 8
_MANY_ROWS, _FEW_ROWS = 128, 8

# Rows that are summed at once in the compute precision: more of them would lose digits.
ROWS_PER_SUM = 2**12

Span = tuple[int, int]
Block = tuple[Derived, Columns]


class MaterializedBatch:
    """G of one batch: dense rows for some parameters, columns by use for others.

    Parameters
    ----------
    dense : torch.Tensor
        (N · q, d), the rows for all parameters that are held that way.
    spans : list of (int, int)
        Where the columns of `dense` lie in the flat vector of parameters, one for each parameter, in order.
    blocks : list of (Derived, Columns)
        The other uses; the rows of a parameter are the sum of all that are held for it.
    size : int
        N.
    parameters : mapping of str to (int, int)
        Where each parameter lies in the flat vector.
    layers : mapping of str to str
        Names of weights held as factors, with those of the biases, held dense, that are added to the same outputs; both
        are used there alone.
    """

    def __init__(
        self,
        dense: Tensor,
        spans: Sequence[Span],
        blocks: Sequence[Block],
        size: int,
        parameters: Mapping[str, Span],
        layers: Mapping[str, str] | None = None,
    ) -> None:
        self._dense, self.blocks, self.size = dense, list(blocks), size
        self._parameters, self.layers = dict(parameters), dict(layers or {})
        self.groups: list[tuple[str, ...]] = []
        """Names of the parameters that are used in one call."""
        self.biases: dict[str, str] = {}
        """Names of weights with those of the biases that are added to the same outputs; both are used once."""
        self.has_factors = True
        """Whether every contraction is held by its factors."""
        self._numel = max(stop for _, stop in parameters.values())
        self._own_spans, self._spans = list(spans), _merged(spans)
        self._whole = self._spans == [(0, self._numel)]
        # What the first of the blocks for a parameter may fill instead of adding to it, and what nobody fills.
        seen = {name for name, span in self._parameters.items() if span in set(spans)}
        written = set(seen)
        self._fills: list[frozenset[str]] = []
        for derived, _ in self.blocks:
            fresh = frozenset(name for name in derived.names if name not in seen and derived.fills(name))
            self._fills.append(fresh)
            written |= fresh
            seen |= set(derived.names)
        names = dict.fromkeys(name for derived, _ in self.blocks for name in derived.names)
        self._pieces_of_blocks = [(name, *self._parameters[name]) for name in names]
        self._empty = _merged([span for name, span in self._parameters.items() if name not in written])
        elements = max([1, dense.shape[1], *(columns.elements_per_vector for _, columns in self.blocks)])
        self.columns = min(256, max(1, SIZES[dense.device].block // (elements * dense.itemsize)))
        """Vectors that are multiplied together."""

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self._dense)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        total, seen = self._dense.nbytes, set[int]()
        for _, columns in self.blocks:
            total += columns.nbytes
            for t in columns.shared:
                place = t.untyped_storage().data_ptr()
                total -= t.nbytes if place in seen else 0
                seen.add(place)
        return total

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._dense.device

    def scale(self, factor: float) -> None:
        """Multiply G by a number."""
        self._dense.mul_(factor)
        for _, columns in self.blocks:
            columns.scale(factor)

    @property
    def description(self) -> str:
        """What is held, in words."""
        if not self.blocks:
            return "dense rows"
        return "factors and dense rows" if self._spans else "factors"

    # ---- Products -----------------------------------------------------------------------------

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (K, D) → (K, D), reading dense rows once."""
        W = self._apply_blocks(V)
        if self._whole:
            result = self._dense_product(V, W)
        else:
            result = self._zeroed(V)
            if self._spans:
                self._scatter(self._dense_product(self._dense_columns(V), W), result)
        self._transpose_blocks(W, result)
        return result

    def _dense_product(self, V: Tensor, W: Tensor) -> Tensor:
        """Add the dense rows' product with V to W, and multiply their transpose with it."""
        count, length = self._dense.shape
        is_onednn = takes_onednn(V)
        cached, least = SIZES[V.device].cached, _FEW_ROWS
        if is_onednn:
            cached, least = _ONEDNN * cached, _MANY_ROWS
        # Kernels for vectors add the rows to the result one after the other.
        adds_in_place = len(V) == 1 and count <= ROWS_PER_SUM and not is_onednn
        step = min(max(least, cached // (length * self._dense.itemsize)), ROWS_PER_SUM)
        total = V.new_zeros(0) if step >= count else torch.zeros_like(V)
        for rows, w in zip(self._dense.split(step), W.split(step, 1), strict=True):
            w += times_transposed(V, rows)
            if step >= count:
                return times_transposed(w.contiguous(), rows.T)
            if adds_in_place:
                total[0].addmv_(rows.T, w[0])
            else:
                total += times_transposed(w.contiguous(), rows.T)
        return total

    def apply(self, V: Tensor) -> Tensor:
        """Multiply G: (K, D) → (K, N · q)."""
        W = self._apply_blocks(V)
        if self._spans:
            W += times_transposed(self._dense_columns(V), self._dense)
        return W

    def apply_t(self, W: Tensor) -> Tensor:
        """Multiply Gᵀ: (K, N · q) → (K, D)."""
        result = self._zeroed(W)
        if self._spans:
            self._scatter(times_transposed(W, self._dense.T), result)
        self._transpose_blocks(W, result)
        return result

    def _apply_blocks(self, V: Tensor) -> Tensor:
        W = V.new_zeros(len(V), len(self._dense))
        pieces = self._pieces(V)
        for derived, columns in self.blocks:
            W += columns.apply(derived.push(pieces)).flatten(1)
        return W

    def _transpose_blocks(self, W: Tensor, result: Tensor) -> None:
        pieces = self._pieces(result)
        own = W.view(len(W), self.size, -1)
        for (derived, columns), fills in zip(self.blocks, self._fills, strict=True):
            derived.pull_into(columns.apply_t(own), pieces, fills)

    def _pieces(self, V: Tensor) -> dict[str, Tensor]:
        """Return views of vectors (K, D), (K, n) for each parameter of a block."""
        return {name: V[:, start:stop] for name, start, stop in self._pieces_of_blocks}

    def _zeroed(self, like: Tensor) -> Tensor:
        """Return a buffer for a result (K, D), zero where nothing is filled in."""
        result = like.new_empty(len(like), self._numel)
        for start, stop in self._empty:
            result[:, start:stop] = 0
        return result

    def _dense_columns(self, V: Tensor) -> Tensor:
        return V if self._whole else torch.cat([V[:, start:stop] for start, stop in self._spans], 1)

    def _scatter(self, dense: Tensor, result: Tensor) -> None:
        offset = 0
        for start, stop in self._spans:
            result[:, start:stop] = dense[:, offset : offset + stop - start]
            offset += stop - start

    # ---- What rows say of each other ----------------------------------------------------------

    def gram(self, other: MaterializedBatch, scale: Tensor | None = None) -> Tensor:
        """Multiply with the transpose of another batch: (rows, rows of the other); G diag(scale) Hᵀ with scale (D,).

        Parameters that both hold dense go by one matrix product, uses of the same elements by their factors, and what
        is left by its rows, a block at a time.
        """
        total = self._dense.new_zeros(self.count, other.count)
        left, right = self._by_name(), other._by_name()
        factors = {name: _constant(scale, span) for name, span in self._parameters.items()}
        # Weight and bias of a layer together.
        layers = {
            weight: bias
            for weight, bias in self.layers.items()
            if other.layers.get(weight) == bias
            and _are_alike(left[weight], right[weight])
            and factors[weight] is not None
            and factors[weight] == factors[bias]
        }
        joint = {self._parameters[bias] for bias in layers.values()}
        # Parameters with dense rows and blocks too go by their rows below.
        both = {self._parameters[name] for name in left.keys() | right.keys()}
        shared = [span for span in self._own_spans if span in set(other._own_spans) - joint - both]
        if shared == self._own_spans == other._own_spans and scale is None:
            total += times_transposed(self._dense, other._dense)
        elif shared and scale is None and self._own_spans == other._own_spans:
            for own in self._runs(shared):
                total += times_transposed(self._dense[:, own], other._dense[:, own])
        elif shared:
            total += times_transposed(self.dense_at(shared, scale), other.dense_at(shared))
        bar = BAR.get()
        for name, span in self._parameters.items():
            if bar is not None:
                bar.update()
            if span in joint or factors[name] == 0:
                continue
            mine, theirs = left.get(name, []), right.get(name, [])
            mixed = (span in self._own_spans) != (span in other._own_spans) or (
                span in self._own_spans and bool(mine or theirs)
            )
            factor = factors[name]
            blocks = None if mixed or factor is None else _gram_of_blocks(mine, theirs, bias=name in layers)
            if blocks is not None and factor is not None:
                total.add_(blocks, alpha=factor)
            elif mixed or (mine and theirs):
                total += self._gram_of_rows(name, other, scale)
        return total

    def _runs(self, spans: Sequence[Span]) -> Iterator[slice]:
        """List slices of the dense columns that belong to some parameters, as few as there are."""
        offset, runs = 0, list[Span]()
        for span in self._own_spans:
            stop = offset + span[1] - span[0]
            runs += [(offset, stop)] if span in spans else []
            offset = stop
        return (slice(*run) for run in _merged(runs))

    def _gram_of_rows(self, name: str, other: MaterializedBatch, scale: Tensor | None = None) -> Tensor:
        result, is_symmetric = self._dense.new_zeros(self.count, other.count), self is other and scale is None
        start, stop = self._parameters[name]
        step = max(
            1, SIZES[self.device].block // (max(self.vectors, other.vectors) * (stop - start) * self._dense.itemsize)
        )
        for n in range(0, self.size, step):
            rows = self.rows_of(name, n, min(n + step, self.size))
            if scale is not None:
                rows *= scale[start:stop]
            mine = slice(n * self.vectors, n * self.vectors + len(rows))
            for m in range(n if is_symmetric else 0, other.size, step):
                own = other.rows_of(name, m, min(m + step, other.size))
                theirs = slice(m * other.vectors, m * other.vectors + len(own))
                result[mine, theirs] = times_transposed(rows, own)
                if is_symmetric and m > n:
                    result[theirs, mine] = result[mine, theirs].T
        return result

    @property
    def vectors(self) -> int:
        """Rows for each datum, q."""
        return len(self._dense) // self.size

    @property
    def num_parameters(self) -> int:
        """Number of parameters, which are the steps of a Gram matrix."""
        return len(self._parameters)

    def step(self, numel: int) -> int:
        """Return how many data are taken together whose rows have so many elements."""
        return max(1, SIZES[self.device].block // max(1, self.vectors * numel * self._dense.itemsize))

    def numel_of(self, name: str) -> int:
        """Return the elements of a parameter."""
        start, stop = self._parameters[name]
        return stop - start

    def _by_name(self) -> dict[str, list[Block]]:
        found: dict[str, list[Block]] = {}
        for block in self.blocks:
            for name in block[0].names:
                found.setdefault(name, []).append(block)
        return found

    def row_squares(self) -> Tensor:
        """Return the squared norms of the rows, (rows,) in float64."""
        by_name = self._by_name()
        alone = [span for name, span in self._parameters.items() if span in self._own_spans and name not in by_name]
        total = self._dense.new_zeros(self.count, dtype=torch.float64)
        if alone:
            # torch casts what it is given before it adds.
            step = max(1, SIZES[self.device].cached // max(1, self._dense.shape[1] * self._dense.itemsize))
            for n in range(0, self.count, step):
                own = slice(n, n + step)
                dense = self._dense[own] if alone == self._own_spans else self.dense_at(alone, rows=own)
                total[own] = torch.linalg.vector_norm(dense, dim=1, dtype=torch.float64).square()
        for name, blocks in by_name.items():
            derived, columns = blocks[0]
            mixed = self._parameters[name] in self._own_spans or len(blocks) > 1
            if not mixed and isinstance(derived, Strided) and derived.is_injective:
                total += columns.row_squares().flatten()
                continue
            # What is held for a parameter is summed before it is squared.
            start, stop = self._parameters[name]
            step = self.step(stop - start)
            for n in range(0, self.size, step):
                last = min(n + step, self.size)
                norms = torch.linalg.vector_norm(self.rows_of(name, n, last), dim=1, dtype=torch.float64).square()
                total[n * self.vectors : last * self.vectors] += norms
        return total

    def square_norm(self) -> Tensor:
        """Return the squared Frobenius norm in float64."""
        return self.row_squares().sum()

    def dense_at(self, spans: Sequence[Span], scale: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """Return the dense columns of some parameters, each multiplied by its entry of `scale` (D,), for some rows."""
        starts: dict[Span, int] = {}
        offset = 0
        for span in self._own_spans:
            starts[span] = offset
            offset += span[1] - span[0]
        dense = torch.cat([self._dense[rows, starts[s] : starts[s] + s[1] - s[0]] for s in spans], 1)
        return dense if scale is None else dense.mul_(torch.cat([scale[slice(*span)] for span in spans]))

    def rows_of(self, name: str, first: int, last: int) -> Tensor:
        """Return the rows of some data for one parameter, (n · q, numel)."""
        span, q = self._parameters[name], self.vectors
        rows = self._dense.new_zeros((last - first) * q, span[1] - span[0])
        if span in self._own_spans:
            rows += self.dense_at([span], rows=slice(first * q, last * q))
        for derived, columns in self._by_name().get(name, []):
            rows += derived.pull(columns.rows(first, last).flatten(0, 1))[name]
        return rows

    def diagonal(self) -> Tensor:
        """Return the squared norms of the columns, (D,)."""
        total = self._dense.new_zeros(1, self._numel)
        squares = CompensatedSum(self._dense.new_empty(self._dense.shape[1]))
        for rows in self._dense.split(ROWS_PER_SUM):
            squares.add(rows.square().sum(0))
        self._scatter(squares.value()[None], total)
        for name in self._by_name():
            total[0, slice(*self._parameters[name])] = self.col_squares_of(name)
        return total[0]

    def col_squares_of(self, name: str) -> Tensor:
        """Return the squared norms of the columns for a parameter some of whose uses are held as blocks, (n,)."""
        start, stop = self._parameters[name]
        blocks = self._by_name().get(name, [])
        if len(blocks) == 1 and (start, stop) not in self._own_spans:
            derived, columns = blocks[0]
            if isinstance(derived, Strided) and derived.is_injective:
                return derived.pull(columns.col_squares()[None])[name][0]
        # What is held for a parameter is summed before it is squared.
        step = max(
            1, min(ROWS_PER_SUM, SIZES[self.device].block // ((stop - start) * self._dense.itemsize)) // self.vectors
        )
        total = CompensatedSum(self._dense.new_empty(stop - start))
        for n in range(0, self.size, step):
            total.add(self.rows_of(name, n, min(n + step, self.size)).square().sum(0))
        return total.value()

    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Iterator[Tensor]:
        """List the rows from `start` to `stop` in blocks (r, D), and write them to `out` (rows, D) if it is given."""
        q, stop = self.vectors, self.count if stop is None else stop
        # What is multiplied for a block is copied while it is in the cache.
        own = SIZES[self.device]
        step = max(1, (own.block if out is None else own.cached) // (q * self._numel * self._dense.itemsize))
        end = -(-stop // q)
        for n in range(start // q, end, step):
            first, last = n * q, min(n + step, end) * q
            whole = out is not None and first >= start and last <= stop
            rows = (
                out[first - start : last - start]
                if out is not None and whole
                else self._dense.new_empty(last - first, self._numel)
            )
            for low, high in self._empty:
                rows[:, low:high] = 0
            self._scatter(self._dense[first:last], rows)
            pieces = self._pieces(rows)
            for (derived, columns), fills in zip(self.blocks, self._fills, strict=True):
                derived.pull_into(columns.rows(n, last // q).flatten(0, 1), pieces, fills)
            part = rows[max(start - first, 0) : stop - first]
            if out is not None and not whole:
                out[max(first - start, 0) :][: len(part)] = part
            yield part

    # ---- For files, other processes, and sharded parameters -----------------------------------

    @property
    def key(self) -> Any:
        """Equal for batches that can be merged, None if this one cannot: a graph belongs to one batch."""
        if not all(isinstance(derived, Strided) for derived, _ in self.blocks):
            return None
        blocks = tuple((derived.key, columns.key) for derived, columns in self.blocks if isinstance(derived, Strided))
        uses = tuple(self.layers.items()), tuple(self.groups), tuple(self.biases.items()), self.has_factors
        return blocks, tuple(self._own_spans), self.vectors, uses

    def merged(self, others: Sequence[MaterializedBatch]) -> MaterializedBatch:
        """Return G of the data of this batch and of others with the same key."""
        batches, known = [self, *others], dict[Any, Tensor]()

        def cat(tensors: Sequence[Tensor]) -> Tensor:
            # What is held for several uses, such as the input of two convolutions, is held for them together.
            places = tuple((t.data_ptr(), t.shape, t.stride()) for t in tensors)
            if places not in known:
                known[places] = torch.cat(list(tensors))
            return known[places]

        blocks = [
            (uses[0][0], uses[0][1].merged([columns for _, columns in uses], cat))
            for uses in zip(*(batch.blocks for batch in batches), strict=True)
        ]
        dense, size = cat([batch._dense for batch in batches]), sum(batch.size for batch in batches)
        return self._with(dense, self._own_spans, blocks, size, self.layers)

    def _with(
        self, dense: Tensor, spans: Sequence[Span], blocks: Sequence[Block], size: int, layers: Mapping[str, str]
    ) -> MaterializedBatch:
        """Return another batch of the same uses."""
        other = MaterializedBatch(dense, spans, blocks, size, self._parameters, layers)
        other.groups, other.biases, other.has_factors = self.groups, self.biases, self.has_factors
        return other

    def part(self, start: int, stop: int) -> MaterializedBatch:
        """Return G of some data of the batch."""
        if (start, stop) == (0, self.size):
            return self
        blocks = [(derived, columns.part(start, stop)) for derived, columns in self.blocks]
        dense = self._dense[start * self.vectors : stop * self.vectors]
        return self._with(dense, self._own_spans, blocks, stop - start, self.layers)

    def without_graphs(self) -> MaterializedBatch:
        """Return the same with dense rows for what is computed from parameters by a graph, which cannot leave."""
        composed = [block for block in self.blocks if isinstance(block[0], Composed)]
        if not composed:
            return self
        names = {name for derived, _ in composed for name in derived.names}
        own = {self._parameters[name]: self.dense_at([self._parameters[name]]) for name in self.names_of_dense()}
        for name in names:
            own[self._parameters[name]] = self.rows_of(name, 0, self.size)
        spans = sorted(own)
        blocks = [block for block in self.blocks if not names & set(block[0].names)]
        names = {name for derived, _ in blocks for name in derived.names}
        layers = {weight: bias for weight, bias in self.layers.items() if weight in names}
        return self._with(torch.cat([own[s] for s in spans], 1), spans, blocks, self.size, layers)

    def names_of_dense(self) -> list[str]:
        """Return the parameters that have dense rows."""
        return [name for name, span in self._parameters.items() if span in self._own_spans]

    # ---- For approximations -------------------------------------------------------------------

    def describe(self, uses: Sequence[tuple[Use, tuple[str, ...]]], found: Sequence[Derived | None]) -> None:
        """Note the parameters of one call, the biases of weights, and whether every contraction has its factors.

        Parameters
        ----------
        uses : sequence of (Use, tuple of str)
            All uses, with the names of their parameters.
        found : sequence of Derived or None
            What each of them sees; None if nothing flows back to it.
        """
        counts = Counter(name for _, names in uses for name in names)
        calls: dict[int, dict[str, None]] = {}
        shifts: dict[int, str] = {}
        contractions: list[tuple[int, str, Derived]] = []
        dense = set(self.names_of_dense())
        for (use, names), derived in zip(uses, found, strict=True):
            if derived is None:
                continue
            call = id(use.call)
            calls.setdefault(call, {}).update(dict.fromkeys(names))
            is_contraction = use.letters is not None and use.a is not None
            if not isinstance(derived, Strided):
                continue
            if is_contraction or use.window is not None or use.index is not None:
                if derived.shape[1:] == (1, 1):  # an elementwise gain has no factors
                    continue
                # Dense rows do not tell them.
                self.has_factors &= names[0] not in dense
                if counts[names[0]] == 1:
                    contractions.append((call, names[0], derived))
            elif use.letters is not None and counts[names[0]] == 1:
                shifts[call] = names[0]
        self.groups = [tuple(own) for own in calls.values()]
        for call, name, derived in contractions:
            bias = shifts.get(call)
            if bias is not None and self.numel_of(bias) == math.prod(derived.shape[:2]):
                self.biases[name] = bias

    def blocks_of(self, name: str) -> list[Block]:
        """Return how a parameter is held, where it is not by dense rows."""
        return self._by_name().get(name, [])

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialized buffer with the dtype and device of the rows."""
        return self._dense.new_empty(shape)


def gram_of_batches(
    mine: Sequence[MaterializedBatch], theirs: Sequence[MaterializedBatch], scale: Tensor | None
) -> Tensor:
    """Return G diag(scale) Hᵀ from the rows of all batches; the same batches make a symmetric matrix."""
    is_symmetric = mine is theirs
    bar = BAR.get()
    if bar is not None:
        pairs = len(mine) * (len(mine) + 1) // 2 if is_symmetric else len(mine) * len(theirs)
        bar.total += pairs * mine[0].num_parameters
    if len(mine) == len(theirs) == 1:
        whole = mine[0].gram(theirs[0], scale)
        return symmetrized(whole) if is_symmetric else whole
    heights, widths = ([batch.count for batch in of] for of in (mine, theirs))
    result = mine[0].empty(sum(heights), sum(widths))
    blocks = [rows.split(widths, 1) for rows in result.split(heights)]
    for k, other in enumerate(theirs):
        for j, batch in enumerate(mine):
            if is_symmetric and j > k:
                break
            block = batch.gram(other, scale)
            if is_symmetric and j == k:
                block = symmetrized(block)
            blocks[j][k].copy_(block)
            if is_symmetric and j < k:
                blocks[k][j].copy_(block.T)
    return result


def _constant(scale: Tensor | None, span: Span) -> float | None:
    """Return the number that all entries of a span are, or None if they differ; 1 without a scale."""
    if scale is None:
        return 1.0
    low, high = torch.aminmax(scale[slice(*span)]) if span[0] < span[1] else (scale.new_ones(()),) * 2
    return float(low) if low == high else None


def _are_alike(mine: Sequence[Block], theirs: Sequence[Block]) -> bool:
    """Whether two weights with one dense use each are used alike, and multiplied by pairs of positions."""
    (derived, columns), (other, their_columns) = mine[0], theirs[0]
    assert isinstance(derived, Strided)
    if not isinstance(columns, Factors) or not isinstance(their_columns, Factors):
        return False
    is_same = derived.same(other) and columns.shape == their_columns.shape
    return is_same and not columns.prefers_rows(their_columns)


def _gram_of_blocks(mine: Sequence[Block], theirs: Sequence[Block], bias: bool) -> Tensor | None:
    """Sum over pairs of uses of one parameter, and its bias; None if there are none, or some have rows only."""
    total: Tensor | None = None
    for derived, columns in mine:
        for other, their_columns in theirs:
            if not isinstance(derived, Strided) or not isinstance(other, Strided):
                return None
            if derived.apart(other):
                continue
            if not derived.same(other) or not derived.is_injective:
                return None
            own = (
                columns.gram_with(their_columns, bias=True)
                if bias and isinstance(columns, Factors) and isinstance(their_columns, Factors)
                else columns.gram(their_columns)
            )
            if own is None:
                return None
            total = own if total is None else total.add_(own)
    if total is None and mine and theirs:
        return mine[0][1].tensors[-1].new_zeros(())
    return total


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Join spans that follow each other."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
