"""Some columns of a score matrix, each with a factor: G of a submatrix of F, and of a diagonally scaled F."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._linop import identity
from fisherops._processes import Processes
from fisherops._sums import CompensatedSum
from fisherops.problem import Parameters
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.kinds import Kind
from fisherops.scores.protocol import CacheSize, Scores, Sums, SumsOfUses, by_rows, rows_of_block


class SelectedScores(Scores):
    """G diag(s), or some columns of it.

    Parameters
    ----------
    scores : Scores
        G, (rows, D).
    index : torch.Tensor, optional
        Columns, (d,) of int64. Default: all of them.
    factors : torch.Tensor, optional
        s, (d,). Default: ones.
    parameters : Parameters, optional
        The d parameters that the columns belong to. Default: those of G.
    """

    def __init__(
        self,
        scores: Scores,
        index: Tensor | None = None,
        factors: Tensor | None = None,
        parameters: Parameters | None = None,
    ) -> None:
        self._G, self._columns, self._factors = scores, index, factors
        self._parameters = scores.parameters if parameters is None else parameters
        self.max_memory = scores.max_memory
        super().__init__()

    # ---- What it is ---------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        return self._G.num_rows

    @property
    def parameters(self) -> Parameters:
        return self._parameters

    @property
    def kinds(self) -> frozenset[Kind]:
        return self._G.kinds

    @property
    def reductions(self) -> tuple[str, ...]:
        return self._G.reductions

    @property
    def version(self) -> int:
        return self._G.version

    def refresh(self) -> None:
        self._G.refresh()

    @property
    def processes(self) -> Processes:
        return self._G.processes

    @property
    def parameter_checksum(self) -> int:
        return self._G.parameter_checksum

    @property
    def rows_have_order(self) -> bool:
        return self._G.rows_have_order

    def require_order(self) -> None:
        self._G.require_order()

    @property
    def is_cached(self) -> bool:
        return self._G.is_cached

    @property
    def cache_size(self) -> CacheSize:
        return self._G.cache_size

    def to(self, device: Any) -> SelectedScores:
        G = self._G.to(device)
        index, factors = (None if t is None else t.to(G.device) for t in (self._columns, self._factors))
        tensors = {name: t.detach().to(G.device) for name, t in self._parameters.tensors.items()}
        return SelectedScores(G, index, factors, Parameters(tensors, self._parameters.dtype))

    # ---- Products -----------------------------------------------------------------------------

    def product(self, V: Tensor) -> Tensor:
        return self._cut(self._G.product(self._padded(V)))

    def _mul(self, V: Tensor) -> Tensor:
        return self._G._mul(self._padded(V))

    def _mul_t(self, W: Tensor) -> Tensor:
        return self._cut(self._G._mul_t(W))

    def _padded(self, V: Tensor) -> Tensor:
        """Return diag(s) applied to vectors, at their columns of G: (K, d) → (K, D)."""
        V = V if self._factors is None else V * self._factors
        if self._columns is None:
            return V
        return V.new_zeros(len(V), self._G.parameters.numel).index_add_(1, self._columns, V)

    def _cut(self, V: Tensor) -> Tensor:
        """Return the transpose of `_padded`: (K, D) → (K, d)."""
        V = V if self._columns is None else V[:, self._columns]
        return V if self._factors is None else V * self._factors.to(V.dtype)

    def dense(self) -> Tensor:
        d = self.parameters.numel
        if not self.is_cached:
            return torch.cat([self.product(rows) for rows in identity(d, self.torch_dtype, self.device)])
        total = CompensatedSum(torch.empty(d, d, dtype=self.torch_dtype, device=self.device))
        for rows in self._blocks():
            total.add(rows.T @ rows)
        return total.value()

    def col_squares(self) -> Tensor:
        squares = self._G.col_squares()
        squares = squares if self._columns is None else squares[self._columns]
        return squares if self._factors is None else squares * self._factors.square()

    def has_columns_of(self, other: Scores) -> bool:
        if not isinstance(other, SelectedScores) or not self._G.has_columns_of(other._G):
            return False
        pairs = (self._columns, other._columns), (self._factors, other._factors)
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def square_root(self, triangular: bool) -> Tensor:
        B = self._cut(self._G.square_root(triangular))
        return torch.linalg.qr(B, mode="r")[1] if triangular and len(B) > B.shape[1] else B

    def over_uses(self, sums_of: SumsOfUses, kept: list[MaterializedBatch] | None = None) -> Sums:
        if self._factors is not None or not self._G.parameters.shapes.items() >= self._parameters.shapes.items():
            raise ValueError(
                "`op` must have whole parameters for this approximation, got some of their entries. Select parameters "
                "by name, or approximate the whole operator."
            )
        return self._G.over_uses(sums_of, kept)

    # ---- Its rows -----------------------------------------------------------------------------

    def block(self, start: int, stop: int) -> Tensor:
        return self._cut(self._G.block(start, stop))

    def _blocks(self) -> Iterator[Tensor]:
        """List the rows in blocks (r, d)."""
        step = rows_of_block(self._G)
        for start in range(0, self.num_rows, step):
            yield self.block(start, min(start + step, self.num_rows))

    def row_squares(self) -> Tensor:
        empty = torch.empty(0, dtype=torch.float64, device=self.device)
        norms = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square() for rows in self._blocks())
        return torch.cat([empty, *norms])

    def cross(self, other: Scores, scale: Tensor | None = None) -> Tensor:
        """Multiply G diag(scale) Hᵀ; of equal columns by all of them, in which the others count nothing."""
        if not isinstance(other, SelectedScores) or not self.has_columns_of(other):
            return by_rows(self, other, scale)
        return self._G.gram_tensor(other._G, scale=self._weights(scale))

    @property
    def gram_is_by_panels(self) -> bool:  # type: ignore[override]
        return self._G.gram_is_by_panels

    def panels_of_gram(self, width: int, first: int = 0, scale: Tensor | None = None) -> Iterator[Tensor]:
        return self._G.panels_of_gram(width, first, self._weights(scale))

    def _weights(self, scale: Tensor | None) -> Tensor:
        """Return the diagonal (D,) between the columns of G that stands for `scale` (d,) between those selected."""
        ones = torch.ones(self.parameters.numel, dtype=self.torch_dtype, device=self.device)
        weights = ones if scale is None else scale
        if self._factors is not None:
            weights = weights * self._factors.square()
        if self._columns is not None:
            weights = ones.new_zeros(self._G.parameters.numel).index_add_(0, self._columns, weights)
        return weights


def selected(parameters: Parameters, which: Any) -> tuple[Tensor, Parameters]:
    """Return the columns (d,) that names, indices or a mask select, and the parameters that they belong to."""
    D = parameters.numel
    if isinstance(which, np.ndarray) and which.dtype.kind == "U":
        which = which.tolist()
    names = [which] if isinstance(which, str) else which
    if not _arrays.is_array(which) and isinstance(names, Iterable):
        which = names = list(names)
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        unknown = [name for name in names if name not in parameters.shapes]
        if unknown:
            raise KeyError(f"there is no parameter {unknown[0]!r}, the parameters are {list(parameters.shapes)}.")
        if len(set(names)) < len(names):
            raise ValueError(f"`which` must not repeat parameters, got {names}.")
        spans = parameters.spans
        index = torch.cat([torch.arange(*spans[name]) for name in names])
        return index, Parameters({name: parameters.tensors[name] for name in names}, parameters.dtype)
    if isinstance(which, slice):
        index = torch.tensor(range(D)[which], dtype=torch.int64)
    else:
        if isinstance(which, list) and not which:
            which = np.empty(0, dtype=np.int64)
        given = _arrays.to_tensor(which if _arrays.is_array(which) else np.asarray(which), "which").cpu()
        if given.ndim != 1 or given.is_floating_point() or given.is_complex():
            raise ValueError(
                f"`which` must be names, a slice, integers (d,) or a mask ({D},), got shape {tuple(given.shape)} of "
                f"{given.dtype}."
            )
        if given.dtype == torch.bool:
            if len(given) != D:
                raise IndexError(f"a mask must have one entry for each of the {D} parameters, got {len(given)}.")
            given = given.nonzero()[:, 0]
        index = given.long()
        wrong = (index < -D) | (index >= D)
        if wrong.any():
            raise IndexError(f"index {int(index[wrong][0])} is out of range for {D} parameters.")
        index = index % D
        if len(index.unique()) < len(index):
            raise ValueError("`which` must not repeat indices. Leave the copies out.")
    if not len(index):
        raise ValueError(f"`which` must select at least one of the {D} parameters, got none.")
    own = torch.empty(len(index), dtype=parameters.dtype, device=parameters.device)
    return index, Parameters({"submatrix": own}, parameters.dtype)
