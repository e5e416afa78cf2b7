"""Random projections Z = G Π of the rows of score matrices, from factors where there are some."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import _philox
from fisherops._matmul import times_transposed
from fisherops.problem import Parameters
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.columns import TERMS, Columns, Factors, Table, flat, summed
from fisherops.scores.convolutions import Convolution
from fisherops.scores.derived import Derived, Strided
from fisherops.scores.lazy import LazyBatch

# Signs that one call of the generator gives, so that blocks of columns begin at multiples of it.
_BITS = 128

# Temporary elements of a block of columns, and columns of a block.
_ELEMENTS, _MANY_COLUMNS = 2**22, 8 * _BITS

# Bytes of the factors of a batch that is not cached.
_BYTES = 2**28

# Words that tell the counters of probes from those of parameters.
_PROBES_OF_ERROR = 2**32 - 1


@dataclass(frozen=True)
class Projection:
    """Random projections of the rows of a score matrix; ``numpy.asarray(projection)`` is the array.

    Attributes
    ----------
    value : array
        Z, (rows, k), in the compute precision. The expectation of Z Zᵀ over the seeds is the Gram matrix G Gᵀ.
    error : float
        ‖Z Zᵀ − G Gᵀ‖ / ‖G Gᵀ‖ in the Frobenius norm, estimated by products with 8 random vectors.
    """

    value: Any
    error: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.value, dtype=dtype) if copy else np.asarray(self.value, dtype=dtype)


class Signs:
    """The matrix √k Π, (D, k), a function of the seed and the shapes of the parameters.

    The part of a column for a parameter of shape (d, ...) is the outer product of random signs (d,) and (...,): so what
    it is multiplied by may be an outer product b aᵀ as well, and the numbers of a column are uncorrelated.

    Parameters
    ----------
    parameters : Parameters
    k : int
        Number of columns.
    seed : int
        Of 64 bits.
    """

    def __init__(self, parameters: Parameters, k: int, seed: int) -> None:
        self.parameters, self.k = parameters, k
        self._key = seed & _philox.MASK, seed >> 32 & _philox.MASK
        self._numbers = {name: number for number, name in enumerate(parameters.shapes)}

    def blocks(self, elements: int, columns: int = _MANY_COLUMNS) -> Iterator[slice]:
        """List blocks of columns, each of which takes so many elements of memory."""
        step = max(1, min(columns, _ELEMENTS // max(1, elements)))
        step = step // _BITS * _BITS if step > _BITS else step
        for start in range(0, self.k, step):
            yield slice(start, min(start + step, self.k))

    def of(self, name: str, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the two factors of the signs of a parameter, (K, d) and (K, r)."""
        d, r = _matrix(self.parameters.shapes[name])
        number = 2 * self._numbers[name]
        return self._draw(d, number, columns), self._draw(r, number + 1, columns)

    def vectors(self, name: str, columns: slice) -> Tensor:
        """Return the signs of a parameter, (K, numel)."""
        p, q = self.of(name, columns)
        return (p[:, :, None] * q[:, None]).flatten(1)

    def flat(self, columns: slice) -> Tensor:
        """Return the signs of all parameters, (K, D)."""
        return torch.cat([self.vectors(name, columns) for name in self.parameters.shapes], 1)

    def probes(self, count: int, rows: int) -> Tensor:
        """Return random signs (count, rows) that are independent of the others."""
        return self._draw(rows, _PROBES_OF_ERROR, slice(0, count))

    def seen(self, view: Strided, columns: slice) -> tuple[Tensor, Tensor] | None:
        """Return factors (K, g, o) and (K, g, i) of the signs as a view sees them; None if there are none.

        There are if an index of the view's axis o, or of its axis i, is all that each factor of the signs depends on.
        """
        (name,) = view.names
        places = view.places(_matrix(self.parameters.shapes[name])[1])
        if places is None:
            return None
        K, device, (g, o, i) = columns.stop - columns.start, self.parameters.device, view.shape
        sides = [torch.ones(K, g, n, dtype=self.parameters.dtype, device=device) for n in (o, i)]
        for factor, (of_g, of_o, of_i) in zip(self.of(name, columns), zip(*places, strict=True), strict=True):
            if bool(of_o.any()) and bool(of_i.any()):
                return None
            side = int(bool(of_i.any()))
            index = of_g[:, None] + (of_i if side else of_o)
            sides[side] *= factor[:, index.to(device)]
        return sides[0], sides[1]

    def _draw(self, n: int, number: int, columns: slice) -> Tensor:
        """Return signs (K, n) by their indices, the columns and the number of what they are for."""
        first, last = columns.start // _BITS, -(-columns.stop // _BITS)
        device, dtype = self.parameters.device, self.parameters.dtype
        index = torch.arange(n, device=device)[:, None]
        block = torch.arange(first, last, device=device)
        zero = torch.zeros_like(block)
        words = _philox.words((index & _philox.MASK, block, zero + number, (index >> 32) + zero), self._key)
        bits = torch.stack(words, -1)[..., None] >> torch.arange(32, device=device) & 1
        drawn = bits.flatten(1)[:, columns.start - first * _BITS : columns.stop - first * _BITS]
        return (1 - 2 * drawn).T.to(dtype, memory_format=torch.contiguous_format)


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """Return the shape of a parameter as a matrix: its first axis, and the others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def projected(batch: MaterializedBatch | LazyBatch, signs: Signs) -> Tensor:
    """Multiply G of a batch with the signs, (rows, k)."""
    parameters = signs.parameters
    if isinstance(batch, LazyBatch):
        made = batch.materialized(_BYTES)
        if made is not None:
            return projected(made, signs)
        blocks = signs.blocks(parameters.numel, batch.columns)
        return torch.cat([batch.apply(signs.flat(columns)) for columns in blocks]).T
    total = batch.empty(batch.count, signs.k).zero_()
    for name in batch.names_of_dense():
        dense = batch.dense_at([parameters.spans[name]])
        for columns in signs.blocks(dense.shape[1]):
            total[:, columns] += times_transposed(dense, signs.vectors(name, columns))
    for derived, own in batch.blocks:
        for columns in signs.blocks(sum(own.shape)):
            total[:, columns] += _of_block(derived, own, signs, columns)
    return total


def _of_block(derived: Derived, columns: Columns, signs: Signs, chosen: slice) -> Tensor:
    """Multiply the columns of G of one use with some columns of the signs, (N · q, K)."""
    sides = signs.seen(derived, chosen) if isinstance(derived, Strided) else None
    if sides is not None and isinstance(columns, Factors):
        return _of_factors(columns, *sides)
    if sides is not None and isinstance(columns, Table):
        return _of_table(columns, *sides)
    if sides is not None and isinstance(columns, Convolution):
        return torch.cat([_of_factors(factors, *sides) for _, factors in columns.as_factors()])
    found = []
    elements = sum(signs.parameters.shapes[name].numel() for name in derived.names) + columns.elements_per_vector
    step = max(1, _ELEMENTS // elements)
    for start in range(chosen.start, chosen.stop, step):
        part = slice(start, min(start + step, chosen.stop))
        pushed = derived.push({name: signs.vectors(name, part) for name in derived.names})
        found.append(columns.apply(pushed).flatten(1))
    return torch.cat(found).T


def _of_factors(factors: Factors, left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_t (b_t · left) (a_t · right), (N · q, K), for signs (K, g, o) and (K, g, i)."""
    A, B = factors.by_datum()
    (N, T, q), (K, g) = B.shape[:3], left.shape[:2]

    def of_group(group: int, own: slice, positions: slice) -> Tensor:
        a, b = A[own, positions, group], B[own, positions, :, group]
        inputs = times_transposed(flat(a), right[:, group].contiguous())
        outputs = times_transposed(flat(b), left[:, group].contiguous())
        product = outputs.view(*b.shape[:3], K).mul_(inputs.view(*a.shape[:2], 1, K))
        return product.sum(1) if product.shape[1] > 1 else product[:, 0]

    step = max(1, _ELEMENTS // (T * (q + 1) * K))
    found = []
    for n in range(0, N, step):
        own = slice(n, n + step)
        pieces = [slice(t, t + TERMS) for t in range(0, T, TERMS)]
        found.append(summed(of_group(group, own, piece) for group in range(g) for piece in pieces))
    return torch.cat(found).flatten(0, 1)


def _of_table(table: Table, left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_t left[index_t] (b_t · right), (N · q, K), for signs (K, 1, o) and (K, 1, i)."""
    N, q, T, _ = table.gradients.shape
    K, found = len(left), []
    step = max(1, _ELEMENTS // (T * (q + 1) * K))
    for n in range(0, N, step):
        terms = []
        for t in range(0, T, TERMS):
            b, index = table.gradients[n : n + step, :, t : t + TERMS], table.index[n : n + step, t : t + TERMS]
            products = times_transposed(flat(b), right[:, 0].contiguous()).view(*b.shape[:3], K)
            terms.append(products.mul_(left[:, 0].T[index][:, None]).sum(2))
        found.append(summed(iter(terms)))
    return torch.cat(found).flatten(0, 1)
