"""Dense rows of G for one batch, in blocks of bounded size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fisherops._memory import is_memory_error
from fisherops._tree import leaves, map_arrays
from fisherops.problem.evaluation import Evaluation

# Bytes that one block of rows, with the vectors that it is computed from, may take.
_BLOCK_BYTES = 2**26


def list_rows(evaluation: Evaluation, columns: Tensor, size: int) -> Iterator[Tensor]:
    """List G in blocks of rows (r, D), ordered by block of S and then by vector.

    Where the data of the batch do not depend on each other, all rows of a block cost about one backward pass;
    each block is checked against plain reverse mode, and where that fails a row costs one backward pass.

    Parameters
    ----------
    evaluation : Evaluation
    columns : torch.Tensor
        The vectors of the output factor, (B, R, P).
    size : int
        Number of data in the batch.
    """
    facts, numel = evaluation.facts, evaluation.problem.parameters.numel
    B, R, P = columns.shape
    rows, names = B * R, list(evaluation.point)
    per_datum = rows // size if rows % (size * R) == 0 else 0
    separable = per_datum > 0 and bool(evaluation.reached) and _can_be_cut(evaluation.X, size)
    for start, stop in _spans(rows, per_datum, P * B // size + numel, columns.itemsize):

        def by_backward(start: int = start, stop: int = stop) -> Tensor:
            return _by_backward(evaluation, columns, start, stop)

        def by_datum(start: int = start, stop: int = stop) -> Tensor:
            block = _by_datum(evaluation, columns, size, start, stop, names)
            if not _matches(block, evaluation, columns, start, stop, names):
                raise RuntimeError("the data of the batch depend on each other")
            return block

        if not separable:
            yield by_backward()
            continue
        try:
            yield facts.try_vmap("rows", by_datum, by_backward)
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
            yield by_backward()


def rows_by_datum(evaluation: Evaluation, columns: Tensor, size: int, names: Sequence[str]) -> Tensor | None:
    """Return the rows of G for some parameters, (B · R, d), or None if the data cannot be differentiated one by one.

    Parameters
    ----------
    evaluation, columns, size
        As for `list_rows`.
    names : sequence of str
        The parameters; the columns of the result are theirs, one after the other.
    """
    B, R, P = columns.shape
    if B % size or not _can_be_cut(evaluation.X, size):
        return None
    numel = sum(evaluation.point[name].numel() for name in names)

    def at_once() -> Tensor:
        blocks = []
        for start, stop in _spans(B * R, B // size * R, P * B // size + numel, columns.itemsize):
            block = _by_datum(evaluation, columns, size, start, stop, names)
            if not _matches(block, evaluation, columns, start, stop, names):
                raise RuntimeError("the data of the batch depend on each other")
            blocks.append(block)
        return torch.cat(blocks)

    return evaluation.facts.try_vmap("rows", at_once, lambda: None)


def rows_one_by_one(evaluation: Evaluation, columns: Tensor, size: int, names: Sequence[str]) -> Tensor:
    """Return the rows of G for some parameters, (B · R, d), by one backward pass for each row.

    A datum is evaluated by itself where that gives the same; else each pass goes through the whole batch.
    """
    B, R, _ = columns.shape
    if B % size == 0 and _can_be_cut(evaluation.X, size):
        try:
            rows = _alone(evaluation, columns, size, names)
            if _matches(rows, evaluation, columns, 0, B * R, names):
                return rows
        except (NotImplementedError, RuntimeError, ValueError, IndexError) as error:
            if is_memory_error(error):
                raise
    spans = [slice(*evaluation.problem.parameters.spans[name]) for name in names]
    every = (_by_backward(evaluation, columns, r, r + 1) for r in range(B * R))
    return torch.cat([torch.cat([row[:, s] for s in spans], 1) for row in every])


def _alone(evaluation: Evaluation, columns: Tensor, size: int, names: Sequence[str]) -> Tensor:
    """Differentiate one datum after the other, each evaluated by itself."""
    problem, (B, R, P) = evaluation.problem, columns.shape
    own = columns.view(size, B // size, R, P)
    rows = []
    for n in range(size):

        def only(t: Tensor, n: int = n) -> Tensor:
            return t[n : n + 1]

        with torch.enable_grad(), evaluation.kernels():
            point = problem.model.leaves(evaluation.point)
            f = problem.flat(point, map_arrays(only, evaluation.X))
        for block, vector in itertools.product(range(B // size), range(R)):
            U = own.new_zeros(B // size, P)
            U[block] = own[n, block, vector]
            gradients = torch.autograd.grad(
                f, [point[name] for name in names], U.view(f.shape), retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([g.to_dense().reshape(-1) for g in gradients]))
    return torch.stack(rows)


def _spans(rows: int, per_datum: int, numbers_per_row: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Cut the rows into blocks of whole data, or into pieces of one datum where that is too large."""
    fitting = max(1, _BLOCK_BYTES // (numbers_per_row * itemsize))
    if per_datum and fitting >= per_datum:
        step = fitting // per_datum * per_datum
        yield from ((start, min(start + step, rows)) for start in range(0, rows, step))
        return
    for datum in range(0, rows, per_datum or rows):
        end = datum + (per_datum or rows)
        yield from ((start, min(start + fitting, end)) for start in range(datum, end, fitting))


def _can_be_cut(X: Any, size: int) -> bool:
    """Whether every array in X has one row for each datum."""
    inputs = leaves(X)
    return bool(inputs) and all(t.ndim and len(t) == size and t.layout is torch.strided for t in inputs)


def _by_datum(
    evaluation: Evaluation, columns: Tensor, size: int, start: int, stop: int, names: Sequence[str]
) -> Tensor:
    """Differentiate each datum by itself, all at once."""
    problem, X = evaluation.problem, evaluation.X
    B, R, P = columns.shape
    own_blocks = B // size
    rows = own_blocks * R
    first, last = start // rows, -(-stop // rows)
    within = torch.arange(start - first * rows, min(stop - first * rows, rows), device=columns.device)
    own = columns.view(size, own_blocks, R, P)[first:last]
    cotangents = columns.new_zeros(last - first, len(within), own_blocks, P)
    number = torch.arange(len(within), device=columns.device)
    cotangents[:, number, within // R] = own[:, within // R, within % R]
    cotangents = cotangents.reshape(last - first, len(within), -1, evaluation.outputs.shape[1])

    def one_datum(x: tuple[Tensor, ...], U: Tensor) -> dict[str, Tensor]:
        parts = iter(x)
        datum = map_arrays(lambda _: next(parts).unsqueeze(0), X)
        chosen = {name: evaluation.point[name] for name in names}
        pull = vjp(lambda point: problem.flat({**evaluation.point, **point}, datum), chosen)[1]
        gradients: dict[str, Tensor] = vmap(pull)(U)[0]
        return gradients

    with evaluation.kernels(), torch.no_grad():
        gradients = vmap(one_datum, randomness="same")(tuple(t[first:last] for t in leaves(X)), cotangents)
    return torch.cat([gradients[name].reshape(len(cotangents) * len(within), -1) for name in names], 1)


def _by_backward(evaluation: Evaluation, columns: Tensor, start: int, stop: int) -> Tensor:
    """Differentiate the batch once for each row."""
    B, R, P = columns.shape
    at_once = max(1, _BLOCK_BYTES // (B * P * columns.itemsize))
    blocks = []
    for begin in range(start, stop, at_once):
        index = torch.arange(begin, min(begin + at_once, stop), device=columns.device)
        U = columns.new_zeros(len(index), B, P)
        U[torch.arange(len(index), device=columns.device), index // R] = columns[index // R, index % R]
        blocks.append(evaluation.vjp(U.reshape(len(index), *evaluation.outputs.shape)))
    return torch.cat(blocks)


def _matches(
    block: Tensor, evaluation: Evaluation, columns: Tensor, start: int, stop: int, names: Sequence[str]
) -> bool:
    """Compare a weighted sum of the rows with one plain backward pass; weights in [1, 2] let no row vanish."""
    B, R, _ = columns.shape
    weights = torch.zeros(B * R, dtype=block.dtype, device=block.device)
    weights[start:stop] = torch.linspace(1, 2, stop - start, dtype=block.dtype, device=block.device)
    U = torch.einsum("brp,br->bp", columns, weights.view(B, R))
    whole = evaluation.vjp(U.reshape(1, *evaluation.outputs.shape))[0]
    spans = evaluation.problem.parameters.spans
    plain = torch.cat([whole[slice(*spans[name])] for name in names])
    difference = (weights[start:stop] @ block - plain).norm()
    return bool(difference <= evaluation.facts.tolerance * plain.norm())
