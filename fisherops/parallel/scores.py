"""The score matrix of data that are divided among processes: each has the rows of its own data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fisherops._data import Batch
from fisherops._fingerprint import checksum_of, fingerprint
from fisherops._linop import check_result
from fisherops._matmul import symmetrized
from fisherops._processes import Processes
from fisherops._torch import opaque
from fisherops.parallel.group import Group, checksum
from fisherops.parallel.shard import with_indices
from fisherops.problem import Evaluation, Parameters
from fisherops.score_matrix import NO_ORDER, ScoreMatrix, column_step
from fisherops.scores import Kind, Plan
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.kinds import FactorOf
from fisherops.scores.projection import Signs
from fisherops.scores.protocol import CacheSize, Key, Scores, Sums, SumsOfUses, by_rows, clipped

# Rows of the Gram matrix that are summed over the ranks at a time.
_FEW_ROWS = 128

Item = TypeVar("Item")


class DistributedScores(Scores):
    """The score matrix G of all processes of a group, each with the rows of its own data; as `ScoreMatrix`.

    Everything that asks the other ranks is inside of a step, in which all ranks compare what they do, with which
    vectors, and whether a pass over the data must find the rows again: such a pass sums the divisor of the loss over
    the ranks, so it must not happen on one of them alone.

    Parameters
    ----------
    local : ScoreMatrix
        G of this rank's data.
    group : Group
    """

    def __init__(self, local: ScoreMatrix, group: Group, checks: bool = True) -> None:
        self.local, self.group = local, group
        self.max_memory, self.shows_progress = local.max_memory, local.shows_progress
        self._number = group.number()
        self._counts: list[int] | None = None
        self._by_rank: list[int] = []
        super().__init__()
        with self._step("construction", **self._identity()):
            self._prepare(checks and local.reader.checks)

    def _prepare(self, checks: bool) -> None:
        """Read the data, with or without checks: which data are whose must be known before the first draw."""
        if checks:
            self.local.check()
        else:
            self.local.reader.count()

    # ---- Steps --------------------------------------------------------------------------------

    def _step(self, description: str, mark: Tensor | None = None, **values: Hashable) -> AbstractContextManager[None]:
        """Do something together with the other ranks, which must pass the same values and mark."""
        return self.group.step(f"{description} of operator {self._number}", mark, **values)

    def _pass(self, description: str, V: Tensor | None = None) -> AbstractContextManager[None]:
        """Do something with the batches together with the other ranks, and with the same vectors (K, n)."""
        values: dict[str, Any] = {} if V is None else {"columns": len(V)}
        mark = None if V is None else self._checksum(V)
        if mark is not None and mark.device.type == "cpu":
            values["vectors"], mark = int(mark), None
        # What a rank does next must not depend on more than the ranks have compared.
        values["is_current"] = self.local.is_current
        if not values["is_current"]:
            values |= {"repeats": self.local.reader.repeats, "present_tensors": self._checksum_of_model()}
        return self._step(description, mark, **values)

    def _checksum(self, V: Tensor) -> Tensor | None:
        return checksum(V)

    def _checksum_of_model(self) -> int:
        return checksum_of(self.local.problem.model.tensors())

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same on all ranks."""
        reader, likelihood = self.local.reader, self.local.problem.likelihood
        return {
            "name": reader.name,
            "dtype": str(self.torch_dtype),
            "loss": f"{type(likelihood).__name__} ({', '.join(likelihood.reductions)})",
            "loss_options": fingerprint(likelihood),
            "shapes": {name: tuple(shape) for name, shape in self.parameters.shapes.items()},
            "parameters": self.parameter_checksum,
            "tensors": self._checksum_of_model(),
            "sample_weight": fingerprint(reader.weights),
            "check_deterministic": reader.checks,
            "rows": "datum" if reader.sums else "term",
            **self.kind.identity(),
        }

    # ---- What it is ---------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """Number of the rows of all ranks; found by a pass over the data if there was none."""
        if self._counts is None or self._counts is not self.local.counts:
            with self._pass("rows"):
                _ = self.local.plan
                self._by_rank = self.group.share(self.local.num_rows)
            self._counts = self.local.counts
        return sum(self._by_rank)

    @property
    def processes(self) -> Processes:
        """The processes among which the data are divided."""
        return self.group

    @property
    def parameters(self) -> Parameters:
        """The parameters, which the columns belong to."""
        return self.local.parameters

    @property
    def kind(self) -> Kind:
        """Which vectors make the output factor."""
        return self.local.kind

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kind, as one of a stack has it."""
        return self.local.kinds

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of the loss."""
        return self.local.reductions

    @property
    def num_data(self) -> int | None:
        """Number of data on this rank, if they were read."""
        return self.local.num_data

    @property
    def version(self) -> int:
        """A number that grows whenever the model, its tensors or the loss were seen to change."""
        return self.local.version

    @property
    def rows_have_order(self) -> bool:
        """Whether every pass lists the rows in the same order, on all ranks."""
        with self._pass("order of the rows"):
            return all(self.group.share(self.local.rows_have_order))

    def require_order(self) -> None:
        """Raise ValueError if the rows have no order."""
        if not self.rows_have_order:
            raise ValueError(NO_ORDER)

    @property
    def cache_size(self) -> CacheSize:
        """What is cached between products on all ranks together."""
        with self._pass("what is kept"):
            shares = self.group.share(tuple(self.local.cache_size))
        nbytes, left, rows = zip(*shares, strict=True)
        return CacheSize(sum(nbytes), min(left), all(rows))

    @property
    @opaque
    def plan(self) -> Plan:
        """What this rank caches between products, its memory and why; made by a pass if there was none."""
        with self._pass("plan"):
            return self.local.plan

    def refresh(self) -> None:
        """Forget what is cached; see `FisherMCLinearOperator.refresh`."""
        self.local.refresh()

    @property
    def parameter_checksum(self) -> int:
        """A checksum of the present values of the parameters."""
        return self.local.parameter_checksum

    def redrawn(self, kind: Kind) -> DistributedScores:
        """Return G of the same problem and data with other draws; what was learnt about these is shared."""
        other = copy.copy(self)
        other._number, other._counts = self.group.number(), None
        with self._step("resampling", **kind.identity()):
            other.local = self.local.redrawn(kind)
            # All ranks share what was learnt, or none does.
            if not all(self.group.share(other.local.is_current)):
                other.local.refresh()
        return other

    def on(self, data: Any, kind: str | None = None, **options: Any) -> DistributedScores:
        """Return the score matrix of other data, of which each rank passes its own part; see `ScoreMatrix.on`."""
        options["progressbar"] = options.get("progressbar", False) and self.group.leads
        local = self.local.on(with_indices(data, self.group), kind, **options)
        return type(self)(local, self.group, checks=False)

    def check(self) -> None:
        """Check that the model is deterministic on all ranks; see `ScoreMatrix.check`."""
        with self._step("check"):
            self.local.check()

    def find(self, see: Callable[[Batch, Evaluation, FactorOf], object]) -> None:
        """Find G of all batches in one pass, and show `see` those of this rank; see `ScoreMatrix.find`."""
        with self._pass("rows and their evaluations"):
            self.local.find(see)

    # ---- Products -----------------------------------------------------------------------------

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (K, D) → (K, D)."""
        local, step = self.local, column_step(V, self.group.sizes(V.device))
        with self._pass("product", V):
            if len(V) <= step:
                return self.group.sum(local.product(V))
            # Data that are not cached are read once for all blocks. Else the sum of a block over the ranks is under way
            # while the next block is multiplied.
            blocks = map(local.product, V.split(step)) if local.is_cached else iter(local.product(V).split(step))
            sums = _one_ahead(map(self.group.begin_sum, blocks))
            result = torch.empty_like(V, memory_format=torch.contiguous_format)
            for rows, pending in zip(result.split(step), sums, strict=True):
                rows.copy_(pending.value())
        return result

    def _mul(self, V: Tensor) -> Tensor:
        self.require_order()
        with self._pass("scores", V):
            return torch.cat(self.group.gather(self.local._mul(V).T)).T

    def _mul_t(self, W: Tensor) -> Tensor:
        self.require_order()
        own = self._own(W)
        with self._pass("transposed scores", W):
            return self.group.sum(self.local._mul_t(own))

    def _own(self, W: Tensor) -> Tensor:
        """Return the pieces (K, rows) of vectors that belong to this rank's rows."""
        first, rows = self._own_rows()
        return W[:, first : first + rows]

    def _own_rows(self) -> tuple[int, int]:
        """Return the number of the first of this rank's rows, and how many it has."""
        _ = self.num_rows
        return sum(self._by_rank[: self.group.rank]), self._by_rank[self.group.rank]

    # ---- What F = GᵀG asks --------------------------------------------------------------------

    def _sum(self, description: str, own: Callable[[], Tensor], V: Tensor | None = None) -> Tensor:
        """Return the sum over the ranks, which is finite if the vectors are."""
        with self._pass(description, V):
            total = self.group.sum(own())
        return check_result(total, *(() if V is None else (V,)))

    def dense(self) -> Tensor:
        """Return GᵀG as a matrix (D, D), from the rows."""
        return self._sum("dense", self.local.sum_of_squares)

    def col_squares(self) -> Tensor:
        """Return the squared norms of the columns, (D,): the diagonal of F."""
        return self._sum("diagonal", self.local.sum_of_diagonals)

    def square_norm(self) -> float:
        """Return the squared Frobenius norm, which is the trace of F."""
        return float(self._sum("trace", self.local.sum_of_squared_norms))

    def square_root(self, triangular: bool) -> Tensor:
        """Return B in float64 with BᵀB = F; see `ScoreMatrix.square_root`."""
        with self._pass("square root"):
            B = torch.cat(self.group.gather(self.local.square_root(triangular)))
        return torch.linalg.qr(B, mode="r")[1] if triangular and len(B) > B.shape[1] else B

    def gradient(self) -> Tensor:
        """Return the gradient of the loss over all data, (D,)."""
        return self._sum("gradient", self.local.sum_of_gradients)

    def moments_of_forms(self, V: Tensor) -> Tensor:
        """Sum the variance and the second moment of vᵀFv over the M samples of each term, (2, K) in float64."""
        return self._sum("standard error", lambda: self.local.sum_of_moments(V), V)

    def over_uses(self, sums_of: SumsOfUses, kept: list[MaterializedBatch] | None = None) -> Sums:
        """Return sums over the batches of all ranks, which need not have the same keys."""
        with self._pass("uses"):
            own = self.local.over_uses(sums_of, kept)
            kinds = {key: kind for of_rank in self.group.share(_kinds(own)) for key, kind in of_rank.items()}
            total: Sums = {}
            for key in sorted(kinds, key=repr):
                shape, dtype = kinds[key]
                term = own[key] if key in own else torch.zeros(shape, dtype=dtype, device=self.device)
                total[key] = self.group.sum(term.clone())
            return total

    # ---- Its rows -----------------------------------------------------------------------------

    @property
    def is_cached(self) -> bool:
        """Whether the rows of this rank are cached."""
        return self.local.is_cached

    @property
    def datum(self) -> np.ndarray[Any, Any]:
        """The index in the data set of the example that each row belongs to, (rows,) of int64."""
        self.require_order()
        with self._pass("examples of the rows"):
            return torch.cat(self.group.gather(torch.from_numpy(self.local.datum))).numpy()

    def block(self, start: int, stop: int) -> Tensor:
        """Return some rows, (stop − start, D)."""
        first, rows = self._own_rows()
        with self._pass("rows"):
            own = self.local.block(*clipped(start - first, stop - first, rows))
            return torch.cat(self.group.gather(own))

    def storable(self, folder: Path) -> list[MaterializedBatch]:
        """Return the batches of all ranks on the leading one, and no batches on the others."""
        group, found = self.group, []
        with self._pass("rows to save"):
            own = self.local.storable(folder)
            for source, count in enumerate(group.share(len(own))):
                for k in range(count):
                    batch = group.broadcast(own[k] if source == group.rank else None, source)
                    found += [batch] if group.leads else []
        return found

    def projected(self, signs: Signs) -> Tensor:
        """Multiply with random signs (D, k): (rows, k)."""
        with self._pass("projection"):
            return torch.cat(self.group.gather(self.local.projected(signs)))

    def row_squares(self) -> Tensor:
        """Return the squared norms of the rows, (rows,) in float64."""
        self.require_order()
        with self._pass("norms of the rows"):
            return torch.cat(self.group.gather(self.local.row_squares()))

    def cross(self, other: Scores, scale: Tensor | None = None) -> Tensor:
        """Multiply G diag(scale) Hᵀ: (rows, rows of H), from the rows of both if all ranks have cached them."""
        _ = self.num_rows, other.num_rows
        result = None
        if isinstance(other, DistributedScores) and other.group is self.group:
            with self._pass("Gram matrix"), other._pass("Gram matrix"):
                result = self._gram_of_batches(other, scale)
        return by_rows(self, other, scale) if result is None else result

    def _gram_of_batches(self, other: DistributedScores, scale: Tensor | None) -> Tensor | None:
        """Multiply every two batches, whatever rank has them; None if the rows of some are not cached."""
        group, is_symmetric = self.group, other is self
        own = self.local.materialized()
        their = own if is_symmetric else other.local.materialized()
        known = group.share(None if own is None or their is None else len(their))
        if None in known:
            return None
        own = [batch.without_graphs() for batch in own or []]
        their = own if is_symmetric else [batch.without_graphs() for batch in their or []]
        # A rank fills in the blocks that it finds, and leaves zeros for the others.
        shape = sum(self._by_rank), sum(other._by_rank)
        result = torch.zeros(shape, dtype=self.torch_dtype, device=self.device)
        first, column = sum(self._by_rank[: group.rank]), 0
        for source, count in enumerate(known):
            for k in range(count):
                batch_of_other = group.broadcast(their[k] if source == group.rank else None, source)
                row = first
                for j, batch in enumerate(own):
                    mine, theirs = slice(row, row + batch.count), slice(column, column + batch_of_other.count)
                    row += batch.count
                    if not is_symmetric:
                        result[mine, theirs] = batch.gram(batch_of_other, scale)
                    elif source == group.rank and j == k:
                        result[mine, mine] = symmetrized(batch.gram(batch, scale))
                    elif j < k if source == group.rank else _falls_to(group.rank, source, group.size):
                        block = batch.gram(batch_of_other, scale)
                        result[mine, theirs] = block
                        result[theirs, mine] = block.T
                column += batch_of_other.count
        for rows in result.split(_FEW_ROWS):
            rows.copy_(group.sum(rows))
        return result


def _kinds(sums: Sums) -> dict[Key, tuple[torch.Size, torch.dtype]]:
    """Return the shapes and dtypes of sums."""
    return {key: (value.shape, value.dtype) for key, value in sums.items()}


def _falls_to(rank: int, other: int, size: int) -> bool:
    """Whether the products of the rows of two ranks are found by the first, so that each rank has as many."""
    distance = (other - rank) % size
    return distance < size - distance or (2 * distance == size and rank < other)


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item when the next is made."""
    previous: list[Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous
