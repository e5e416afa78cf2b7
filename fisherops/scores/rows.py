"""Dense rows of G for one batch, in blocks of bounded size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fisherops._memory import is_memory_error
from fisherops._sizes import SIZES
from fisherops._tree import leaves, map_arrays
from fisherops.likelihoods import OutputFactor
from fisherops.problem.evaluation import Evaluation


def list_rows(evaluation: Evaluation, factor: OutputFactor, size: int) -> Iterator[Tensor]:
    """List G in blocks of rows (r, D), ordered by block of S and then by vector.

    Where the data of the batch do not depend on each other, all rows of a block cost about one backward pass;
    each block is checked against plain reverse mode, and where that fails a row costs one backward pass.

    Parameters
    ----------
    evaluation : Evaluation
    factor : OutputFactor
        S, whose vectors are listed as they are needed: all of them may be the square of the outputs.
    size : int
        Number of data in the batch.
    """
    facts, numel = evaluation.facts, evaluation.problem.parameters.numel
    B, R, P = factor.blocks, factor.rank, factor.outputs
    rows, names = B * R, list(evaluation.point)
    per_datum = rows // size if rows % (size * R) == 0 else 0
    separable = per_datum > 0 and bool(evaluation.reached) and _can_be_cut(evaluation.X, size)
    for start, stop in _spans(rows, per_datum, P * B // size + numel, evaluation.outputs):

        def by_backward(start: int = start, stop: int = stop) -> Tensor:
            return _by_backward(evaluation, factor, start, stop)

        def by_datum(start: int = start, stop: int = stop) -> Tensor:
            block = _by_datum(evaluation, factor, size, start, stop, names)
            if not _matches(block, evaluation, factor, start, stop, names):
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


def rows_by_datum(evaluation: Evaluation, factor: OutputFactor, size: int, names: Sequence[str]) -> Tensor | None:
    """Return the rows of G for some parameters, (B · R, d), or None if the data cannot be differentiated one by one.

    Parameters
    ----------
    evaluation, factor, size
        As for `list_rows`.
    names : sequence of str
        The parameters; the columns of the result are theirs, one after the other.
    """
    B, R, P = factor.blocks, factor.rank, factor.outputs
    if B % size or not _can_be_cut(evaluation.X, size):
        return None
    numel = sum(evaluation.point[name].numel() for name in names)

    def at_once() -> Tensor:
        blocks = []
        for start, stop in _spans(B * R, B // size * R, P * B // size + numel, evaluation.outputs):
            block = _by_datum(evaluation, factor, size, start, stop, names)
            if not _matches(block, evaluation, factor, start, stop, names):
                raise RuntimeError("the data of the batch depend on each other")
            blocks.append(block)
        return torch.cat(blocks)

    return evaluation.facts.try_vmap("rows", at_once, lambda: None)


def rows_one_by_one(evaluation: Evaluation, factor: OutputFactor, size: int, names: Sequence[str]) -> Tensor:
    """Return the rows of G for some parameters, (B · R, d), by one backward pass for each row.

    A datum is evaluated by itself where that gives the same; else each pass goes through the whole batch.
    """
    B, R = factor.blocks, factor.rank
    if B % size == 0 and _can_be_cut(evaluation.X, size):
        try:
            rows = _alone(evaluation, factor, size, names)
            if _matches(rows, evaluation, factor, 0, B * R, names):
                return rows
        except (NotImplementedError, RuntimeError, ValueError, IndexError) as error:
            if is_memory_error(error):
                raise
    spans = [slice(*evaluation.problem.parameters.spans[name]) for name in names]
    every = (_by_backward(evaluation, factor, r, r + 1) for r in range(B * R))
    return torch.cat([torch.cat([row[:, s] for s in spans], 1) for row in every])


def _alone(evaluation: Evaluation, factor: OutputFactor, size: int, names: Sequence[str]) -> Tensor:
    """Differentiate one datum after the other, each evaluated by itself."""
    problem, own = evaluation.problem, factor.blocks // size
    rows = []
    for n in range(size):

        def only(t: Tensor, n: int = n) -> Tensor:
            return t[n : n + 1]

        with torch.enable_grad(), evaluation.kernels():
            point = problem.model.leaves(evaluation.point)
            f = problem.flat(point, map_arrays(only, evaluation.X))
        vectors = factor.restricted(slice(n * own, (n + 1) * own)).columns()
        for block, vector in itertools.product(range(own), range(factor.rank)):
            U = vectors.new_zeros(own, factor.outputs)
            U[block] = vectors[block, vector]
            gradients = torch.autograd.grad(
                f, [point[name] for name in names], U.view(f.shape), retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([g.to_dense().reshape(-1) for g in gradients]))
    return torch.stack(rows)


def _spans(rows: int, per_datum: int, numbers_per_row: int, f: Tensor) -> Iterator[tuple[int, int]]:
    """Cut the rows into blocks of whole data, or into pieces of one datum where that is too large."""
    fitting = max(1, SIZES[f.device].block // (numbers_per_row * f.itemsize))
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
    evaluation: Evaluation, factor: OutputFactor, size: int, start: int, stop: int, names: Sequence[str]
) -> Tensor:
    """Differentiate each datum by itself, all at once: whole data, or some rows of one."""
    problem, X, f = evaluation.problem, evaluation.X, evaluation.outputs
    own, R, P = factor.blocks // size, factor.rank, factor.outputs
    first, last = start // (own * R), -(-stop // (own * R))
    vectors, blocks = _vectors(factor, start, stop, f)
    vectors, blocks = vectors.view(last - first, -1, P), blocks.view(last - first, -1)[0] % own
    rows = len(blocks)
    cotangents = f.new_zeros(last - first, rows, own, P)
    cotangents[:, torch.arange(rows, device=f.device), blocks] = vectors
    cotangents = cotangents.reshape(last - first, rows, -1, f.shape[1])

    def one_datum(x: tuple[Tensor, ...], U: Tensor) -> dict[str, Tensor]:
        parts = iter(x)
        datum = map_arrays(lambda _: next(parts).unsqueeze(0), X)
        chosen = {name: evaluation.point[name] for name in names}
        pull = vjp(lambda point: problem.flat({**evaluation.point, **point}, datum), chosen)[1]
        gradients: dict[str, Tensor] = vmap(pull)(U)[0]
        return gradients

    with evaluation.kernels(), torch.no_grad():
        gradients = vmap(one_datum, randomness="same")(tuple(t[first:last] for t in leaves(X)), cotangents)
    return torch.cat([gradients[name].reshape(len(cotangents) * rows, -1) for name in names], 1)


def _vectors(factor: OutputFactor, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """List the vectors of some rows of G, (r, P), and the blocks of S that they are in, (r,)."""
    R = factor.rank
    pieces = []
    block = start // R
    while block * R < stop:
        if start <= block * R and (whole := stop // R) > block:  # all vectors of some blocks
            pieces.append(factor.restricted(slice(block, whole)).columns().flatten(0, 1))
            block = whole
        else:
            span = max(start - block * R, 0), min(stop - block * R, R)
            pieces.append(factor.restricted(slice(block, block + 1)).vectors(*span, like)[0])
            block += 1
    return torch.cat(pieces), torch.arange(start, stop, device=like.device) // R


def _by_backward(evaluation: Evaluation, factor: OutputFactor, start: int, stop: int) -> Tensor:
    """Differentiate the batch once for each row."""
    f, B, P = evaluation.outputs, factor.blocks, factor.outputs
    at_once = max(1, SIZES[f.device].block // (B * P * f.itemsize))
    rows = []
    for begin in range(start, stop, at_once):
        vectors, blocks = _vectors(factor, begin, min(begin + at_once, stop), f)
        U = f.new_zeros(len(vectors), B, P)
        U[torch.arange(len(vectors), device=f.device), blocks] = vectors
        rows.append(evaluation.vjp(U.reshape(len(vectors), *f.shape)))
    return torch.cat(rows)


def _matches(
    block: Tensor, evaluation: Evaluation, factor: OutputFactor, start: int, stop: int, names: Sequence[str]
) -> bool:
    """Compare a weighted sum of the rows with one plain backward pass; weights in [1, 2] let no row vanish."""
    B, R = factor.blocks, factor.rank
    weights = torch.zeros(B * R, dtype=block.dtype, device=block.device)
    weights[start:stop] = torch.linspace(1, 2, stop - start, dtype=block.dtype, device=block.device)
    U = factor.apply(weights.view(1, B, R))
    whole = evaluation.vjp(U.reshape(1, *evaluation.outputs.shape))[0]
    spans = evaluation.problem.parameters.spans
    plain = torch.cat([whole[slice(*spans[name])] for name in names])
    difference = (weights[start:stop] @ block - plain).norm()
    return bool(difference <= evaluation.facts.tolerance * plain.norm())
