"""What every score matrix offers: its rows, their norms, and Gram matrices with others."""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays, _torch
from fisherops._checks import integer
from fisherops._linop import TorchLinearOperator, Transposed, check_result
from fisherops._matmul import symmetrized
from fisherops._progress import BAR, progress
from fisherops._torch import opaque
from fisherops.problem import Parameters
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.kinds import Kind
from fisherops.scores.projection import Projection, Signs
from fisherops.scores.store import manifest_of, save


class Key(NamedTuple):
    """The name of a sum over batches, which can be pickled."""

    of: Hashable
    role: str
    is_of_rows: bool
    """Whether it is proportional to GᵀG, and not made of the data alone."""
    lists_rows: bool = False
    """Whether it is rows of G themselves, which are not added to those of another G: `of` is then a tuple, to which
    the number of the G is appended."""


Sums = dict[Key, Tensor]
SumsOfUses = Callable[[Iterable[MaterializedBatch]], Sums]

# Blocks of rows that are multiplied at once where they are not cached as such.
BLOCKS = 4

# Random vectors by which the error of a projection is measured.
_PROBES = 8


class CacheSize(NamedTuple):
    """What is cached, and the memory that is left; of several processes, on the one with the least."""

    nbytes: int
    memory_left: int
    holds_rows: bool


class Scores(TorchLinearOperator):
    """A score matrix G, (rows, D): the building block of F, sums, and linear algebra.

    A subclass says what it is a matrix of, multiplies by it, and gives its rows: all that raises NotImplementedError
    here. Its parameters must be known when this constructor is called.
    """

    def __init__(self) -> None:
        parameters = self.parameters
        super().__init__((parameters.numel,) * 2, parameters.dtype, parameters.device)

    is_listed = False
    """Whether the rows are those of an array, so that listing them costs nothing."""

    is_stored = False
    """Whether it was read from a file, so that its parameters are those of another time."""

    shows_progress = False
    """Whether progress is shown unless it is asked for."""

    is_divided = False
    """Whether vectors (D,) are divided among processes."""

    # ---- What a subclass says -----------------------------------------------------------------

    @property
    def parameters(self) -> Parameters:
        """The parameters, which the columns belong to."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Number of rows; found by a pass over the data if there was none."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[tuple[float, Scores], ...]:
        """The score matrices of which this one is a stack √α G, with their factors α."""
        return ((1.0, self),)

    @property
    def is_cached(self) -> bool:
        """Whether all rows are cached, so that products read no data."""
        return False

    @property
    def kinds(self) -> frozenset[Kind]:
        """Which vectors make the rows."""
        raise NotImplementedError

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of each loss."""
        raise NotImplementedError

    @property
    def parameter_checksum(self) -> int:
        """A checksum of the present values of the parameters."""
        raise NotImplementedError

    @property
    def cache_size(self) -> CacheSize:
        """What is cached between products, on all processes together."""
        raise NotImplementedError

    max_memory: int
    """Bytes that may be cached, on this process."""

    @property
    def rows_have_order(self) -> bool:
        """Whether every pass lists the rows in the same order, as products with G need it."""
        raise NotImplementedError

    def require_order(self) -> None:
        """Raise ValueError if the rows have no order."""
        raise NotImplementedError

    def product(self, V: Tensor) -> Tensor:
        """Multiply GᵀG: (K, D) → (K, D)."""
        raise NotImplementedError

    def _mul_t(self, W: Tensor) -> Tensor:
        """Multiply Gᵀ: (K, rows) → (K, D)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return GᵀG as a matrix (D, D)."""
        raise NotImplementedError

    def col_squares(self) -> Tensor:
        """Return the squared norms of the columns, (D,): the diagonal of F."""
        raise NotImplementedError

    def square_root(self, triangular: bool) -> Tensor:
        """Return B in float64 with BᵀB = GᵀG: the rows that are not zero, or the triangle R of G = QR, (n, D)."""
        raise NotImplementedError

    def block(self, start: int, stop: int) -> Tensor:
        """Return some rows, (stop − start, D)."""
        raise NotImplementedError

    def row_squares(self) -> Tensor:
        """Return the squared norms of the rows, (rows,) in float64."""
        raise NotImplementedError

    def projected(self, signs: Signs) -> Tensor:
        """Multiply with random signs (D, k): (rows, k)."""
        blocks = [self._mul(signs.flat(columns)) for columns in signs.blocks(self.parameters.numel)]
        return torch.cat(blocks).T

    def cross(self, other: Scores, scale: Tensor | None = None) -> Tensor:
        """Multiply G diag(scale) Hᵀ, for another score matrix that is not a stack: (rows, rows of H)."""
        return by_rows(self, other, scale)

    def over_uses(self, sums_of: SumsOfUses, kept: list[MaterializedBatch] | None = None) -> Sums:
        """Return sums over all batches, each with the factors of every contraction, on all processes together.

        Parameters
        ----------
        sums_of : callable
            Takes batches, and returns the sums of this process.
        kept : list of MaterializedBatch, optional
            Is read in place of the data if it is not empty; otherwise the batches of this process are put there, if
            they fit into the memory that is left.
        """
        raise NotImplementedError

    gram_is_by_panels = False
    """Whether panels of the Gram matrix are computed one by one, and not cut out of all of it."""

    def panels_of_gram(self, width: int, first: int = 0, scale: Tensor | None = None) -> Iterator[Tensor]:
        """List K[a:, a:b] of K = G diag(scale) Gᵀ for panels of `width` columns, from the one of number `first` on."""
        whole = self.gram_tensor(scale=scale)
        for start in range(first * width, len(whole), width):
            yield whole[start:, start : start + width]

    def blocks_of_gram(self, other: Scores, step: int) -> Iterator[Tensor]:
        """List G Hᵀ in blocks (b, rows of H), b ≤ `step` or that of one batch."""
        for start in range(0, self.num_rows, step):
            yield other._mul(self.block(start, min(start + step, self.num_rows)))

    def has_columns_of(self, other: Scores) -> bool:
        """Whether the columns belong to parameters of the same names and shapes."""
        return self.parameters.shapes == other.parameters.shapes and type(other).has_columns_of is Scores.has_columns_of

    def to(self, device: Any) -> Scores:
        """Return the same matrix on another device."""
        raise NotImplementedError(
            f"an operator of several processes cannot be moved. Make it anew with the model on {device}."
        )

    # ---- What is made of these ----------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, D); the rows are found by a pass over the data if there was none."""
        return self.num_rows, self.parameters.numel

    @shape.setter
    def shape(self, _: Any) -> None:
        """Do nothing: SciPy's constructor sets a shape."""

    def square_norm(self) -> float:
        """Return the squared Frobenius norm, which is the trace of F."""
        total = float(self.col_squares().sum(dtype=torch.float64))
        limits = torch.finfo(self.torch_dtype)
        # Of so small a sum some squares may be below the range of the precision.
        return float(self.row_squares().sum()) if total <= limits.tiny / limits.eps else total

    def _transpose(self) -> Transposed:
        return Transposed(self)

    @opaque
    def todense(self) -> np.ndarray[Any, Any]:
        """Return G as a NumPy array of shape (rows, D), from the rows."""
        return _arrays.to_numpy(check_result(self.block(0, self.num_rows)))

    @opaque
    def rows(self, start: int = 0, stop: int | None = None, *, by_parameter: bool = False, like: Any = None) -> Any:
        """Return some rows as an array.

        Parameters
        ----------
        start, stop : int
            The first row, and the first after the last one. Default: all rows.
        by_parameter : bool
            Whether to return a dict from the names of the parameters to arrays (rows, ...), each row in the shape of
            the parameter. Default: False, one array (rows, D).
        like : array, optional
            Array whose library and device the result has. Default: NumPy.

        Returns
        -------
        array or dict

        Raises
        ------
        ValueError
            If there are no such rows, or the rows have no order.

        Examples
        --------
        Gradients of the losses of single examples:

        >>> import torch, fisherops as fo
        >>> _ = torch.manual_seed(0)
        >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
        >>> op = fo.EmpiricalFisherLinearOperator(
        ...     torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(reduction="sum"), data=(X, y), rows="datum"
        ... )
        >>> gradients = op.scores.rows(0, 10, by_parameter=True)
        >>> gradients["weight"].shape
        (10, 3, 4)
        """
        R = self.num_rows
        start, stop = operator.index(start), R if stop is None else operator.index(stop)
        if not 0 <= start <= stop <= R:
            raise ValueError(f"rows {start} to {stop} must be among the {R} rows of the score matrix.")
        leave = _arrays.leave_like(like) if like is not None else _arrays.to_numpy
        rows = check_result(self.block(start, stop))
        if by_parameter:
            return {name: leave(part.contiguous()) for name, part in self.parameters.split(rows).items()}
        return leave(rows)

    def blocks(self, size: int | None = None, *, by_parameter: bool = False, like: Any = None) -> Iterator[Any]:
        """List all rows in blocks, as `rows` returns them.

        Rows that are not cached are computed by a pass over the data for each block.

        Parameters
        ----------
        size : int, optional
            Number of rows in a block. Default: as many as take 256 MiB.
        by_parameter, like
            See `rows`.

        Yields
        ------
        array or dict
            (size, D); the last block may have fewer rows.

        Examples
        --------
        The mean gradient:

        >>> import torch, fisherops as fo
        >>> _ = torch.manual_seed(0)
        >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
        >>> op = fo.EmpiricalFisherLinearOperator(
        ...     torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(reduction="sum"), data=(X, y)
        ... )
        >>> mean = sum(block.sum(0) for block in op.scores.blocks(20)) / 50
        >>> mean.shape
        (15,)
        """
        step = rows_of_block(self, BLOCKS) if size is None else integer("size", size, 1)
        self.require_order()
        rows = self.num_rows
        return (
            self.rows(start, min(start + step, rows), by_parameter=by_parameter, like=like)
            for start in range(0, rows, step)
        )

    @opaque
    def row_norms(self) -> np.ndarray[Any, Any]:
        """Return the Euclidean norms of the rows as a NumPy array of shape (rows,).

        From factors, without listing the rows, where that is cheaper.
        """
        return _arrays.to_numpy(check_result(self.row_squares().sqrt().to(self.torch_dtype)))

    @opaque
    def gram(self, other: Any = None, *, progressbar: bool | None = None) -> np.ndarray[Any, Any]:
        """Return G Hᵀ as a NumPy array of shape (rows, rows of H), with H another score matrix or G itself.

        The nonzero eigenvalues of the Gram matrix G Gᵀ are those of F. Where the rows of both are cached, it is found
        from them by blocks: for factors Σ (A Aᵀ) ∘ (B Bᵀ) over the layers; otherwise by products with blocks of rows.

        Parameters
        ----------
        other : ScoreMatrix, optional
            H, a score matrix of the same parameters, such as ``G.on(...)`` or the scores of another operator. Default:
            G.
        progressbar : bool, optional
            Whether progress is shown on stderr if it takes longer than a second. Default: as for the operator.

        Raises
        ------
        TypeError
            If `other` is not a score matrix.
        ValueError
            If its columns belong to parameters of other names or shapes, or rows have no order.
        """
        if other is not None:
            if not isinstance(other, Scores):
                raise TypeError(f"`other` must be a score matrix, got {type(other).__name__}. Pass `op.scores`.")
            self.check_same_parameters(other)
        is_shown = (self.shows_progress if progressbar is None else progressbar) and self.processes.leads
        with _torch.full_precision(), progress("Gram matrix", is_shown):
            return _arrays.to_numpy(self.gram_tensor(other))

    @opaque
    def project(self, k: int, seed: int = 0, *, like: Any = None) -> Projection:
        """Return k random projections of each row, whose inner products estimate the Gram matrix.

        They are found from factors where the rows are cached as such: of a layer with inputs a and gradients b at its
        outputs, column j is Σ_t (p_jᵀ b_t) (q_jᵀ a_t) / √k with random signs p_j and q_j.

        Parameters
        ----------
        k : int
            Number of projections. The error of the Gram matrix falls as 1/√k.
        seed : int
            The signs are a function of the seed and of the shapes and order of the parameters alone. So projections of
            other data, ``G.on(data).project(k, seed)``, belong to the same space. From 0 to 2⁶⁴ − 1. Default: 0.
        like : array, optional
            Array whose library and device the result has. Default: NumPy.

        Returns
        -------
        Projection
            Z, (rows, k), and the relative error of Z Zᵀ.

        Raises
        ------
        ValueError
            If `k` or `seed` is out of range, or the rows have no order.

        Notes
        -----
        E[Z Zᵀ] = G Gᵀ. The relative variance of the squared norm of a row is at most 8/k. Signs without structure have
        2/k, and take as many operations as k products with G.

        References
        ----------
        D. Achlioptas, Database-friendly random projections, Journal of Computer and System Sciences 66 (2003) 671–687,
        doi:10.1016/S0022-0000(03)00025-4. Products of signs: S. Choe et al., What is your data worth to GPT? LLM-scale
        data valuation with influence functions, arXiv:2405.13954.

        Examples
        --------
        >>> import torch, fisherops as fo
        >>> _ = torch.manual_seed(0)
        >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
        >>> op = fo.EmpiricalFisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
        >>> projection = op.scores.project(4000)
        >>> projection.value.shape, projection.error < 0.1
        ((50, 4000), True)
        """
        signs = Signs(self.parameters, integer("k", k, 1), integer("seed", seed, 0, 2**64 - 1))
        leave = _arrays.leave_like(like) if like is not None else _arrays.to_numpy
        self.require_order()
        with torch.no_grad(), _torch.full_precision():
            Z = check_result(self.projected(signs).div_(sqrt(signs.k)))
            W = signs.probes(_PROBES, len(Z))
            expected = check_result(self._mul(self._mul_t(W)))
            difference, size = ((W @ Z) @ Z.T - expected).norm(), expected.norm()
            error = float(difference / size) if size else 0.0
        return Projection(leave(Z), error)

    @opaque
    def save(self, path: Any) -> None:
        """Write the rows, as they are cached, to a file that `fisherops.load_scores` opens without the model.

        Rows that are not cached are computed by a pass over the data, and written to a temporary folder first.

        Parameters
        ----------
        path : path
            The file. One that is there is replaced when the new one is complete.

        Raises
        ------
        ValueError
            If the rows have no order.
        NotImplementedError
            If it is a sum, a multiple or a submatrix, or the rows cannot be found example by example.

        See Also
        --------
        fisherops.load_scores
        """
        self.require_order()
        parent = Path(path).absolute().parent
        with torch.no_grad(), tempfile.TemporaryDirectory(dir=parent, prefix=".fisherops-") as folder:
            batches, manifest = self.storable(Path(folder)), manifest_of(self)
            self.processes.from_leader(lambda: save(path, batches, manifest))

    def storable(self, folder: Path) -> list[MaterializedBatch]:
        """Return all batches without graphs, some of them in files in a folder; on the leading process at least."""
        raise NotImplementedError(
            "a sum, a multiple or a submatrix cannot be saved. Save the score matrices that it is made of, and combine "
            "the operators `FisherOperator(load_scores(path))` in the same way."
        )

    def check_same_parameters(self, other: Scores) -> None:
        """Raise ValueError if the columns of another score matrix are not of the same parameters and precision."""
        if not self.has_columns_of(other):
            texts = []
            for G in (self, other):
                shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in G.parameters.shapes.items())
                texts.append(f"{G.parameters.numel} numbers ({shapes})")
            raise ValueError(f"the score matrices must have the same parameters, got {' and '.join(texts)}.")
        if (self.torch_dtype, self.device) != (other.torch_dtype, other.device):
            raise ValueError(
                f"the score matrices must have one dtype and device, got {self.torch_dtype} on {self.device} and "
                f"{other.torch_dtype} on {other.device}."
            )
        if (self.is_stored or other.is_stored) and self.parameter_checksum != other.parameter_checksum:
            raise ValueError(
                "the score matrices must belong to the same values of the parameters, and those of one from a file are "
                "others. Load the parameters that the file was saved with, or save the score matrix again."
            )
        if self.processes is not other.processes:
            raise ValueError("the score matrices must have their data divided among the same processes.")

    @opaque
    def gram_tensor(self, other: Scores | None = None, scale: Tensor | None = None) -> Tensor:
        """Return G diag(scale) Hᵀ as a torch tensor on the operator's device; see `gram`.

        Parameters
        ----------
        other : Scores, optional
            H. Default: G itself, and the result is symmetric to the last bit.
        scale : torch.Tensor, optional
            (D,). Default: ones.
        """
        with torch.no_grad():
            other = self if other is None else other
            if self.parts[0][1] is self and other.parts[0][1] is other:
                return check_result(self.cross(other, scale))
            heights, widths = ([G.num_rows for _, G in of.parts] for of in (self, other))
            result = torch.empty(sum(heights), sum(widths), dtype=self.torch_dtype, device=self.device)
            blocks = [rows.split(widths, 1) for rows in result.split(heights)]
            for j, (alpha, G) in enumerate(self.parts):
                for k, (beta, H) in enumerate(other.parts):
                    if other is self and k < j:
                        blocks[j][k].copy_(blocks[k][j].T)
                    else:
                        blocks[j][k].copy_(G.cross(H, scale)).mul_(sqrt(alpha * beta))
            return check_result(result)


def clipped(start: int, stop: int, rows: int) -> tuple[int, int]:
    """Return the part of an interval that lies between 0 and a number of rows, (0, 0) or (rows, rows) if none does."""
    return min(max(start, 0), rows), min(max(stop, 0), rows)


def rows_of_block(G: Scores, blocks: int = 1) -> int:
    """Return how many dense rows fit into a number of blocks."""
    step: int = blocks * G.processes.sizes(G.device).block // max(1, G.parameters.numel * G.dtype.itemsize)
    return max(1, step)


def by_rows(G: Scores, H: Scores, scale: Tensor | None = None) -> Tensor:
    """Return G diag(scale) Hᵀ by products with blocks of the rows of G, none of which may be cached."""
    if H.is_listed and not G.is_listed:
        return by_rows(H, G, scale).T
    R, step = G.num_rows, rows_of_block(G, BLOCKS)
    blocks = [torch.empty(0, H.num_rows, dtype=G.torch_dtype, device=G.device)]
    bar = BAR.get()
    if bar is not None:
        bar.total += -(-R // step)
    for start in range(0, R, step):
        if bar is not None:
            bar.update()
        rows = G.block(start, min(start + step, R))
        blocks.append(H._mul(rows if scale is None else rows * scale))
    result = torch.cat(blocks)
    return symmetrized(result) if G is H else result
