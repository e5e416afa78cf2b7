"""Where a model uses its parameters: reading the autograd graph of one batch.

The only file that knows torch's backward nodes by name and the tensors they save. What it reads is checked against
plain reverse mode by whoever uses it, and a node that it does not know is said to be unknown.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.func import vmap

from fisherops.scores.parts import EmbeddingPart, LinearPart, Part, RowsPart, rows_are_cheaper


class Use(ABC):
    """One operation that takes a parameter and data, h = op(a, parameter).

    The rows of G for the parameter follow from a, which the graph has saved, and from b, the gradients of the outputs'
    vectors by h.
    """

    def __init__(self, edge: GradientEdge) -> None:
        self.edge = edge
        """Where b is to be had."""

    @abstractmethod
    def part(self, b: Tensor, N: int, data_second: bool) -> Part | None:
        """Return the rows of G for N data, or None if the data axis cannot be found.

        Parameters
        ----------
        b : torch.Tensor
            (q,) + shape of h, for each of q vectors per datum.
        N : int
            Number of data.
        data_second : bool
            Whether the leading axis of h is not that of the data but of positions, with the data next to it.
        """

    def nbytes(self, N: int, q: int, leaf: Tensor, form: str) -> int:
        """Predict the memory of the part in the form "auto" or "factors"."""
        return N * q * leaf.nbytes


def _by_datum(g: Tensor, N: int, data_second: bool, features: int) -> Tensor | None:
    """Arrange (q, rows, ...) as (N, q, positions..., ...), whether rows are data, positions of data, or the reverse.

    The last axes, as many as `features`, are neither.
    """
    if g.ndim < 2 + features or g.shape[1] == 0:
        return None
    if data_second and g.ndim > 2 + features and g.shape[2] == N:
        return g.movedim(2, 0)
    if g.shape[1] == N:
        return g.movedim(1, 0)
    if g.shape[1] % N:
        return None
    if data_second:
        return g.reshape(len(g), -1, N, *g.shape[2:]).movedim(2, 0)
    return g.reshape(len(g), N, -1, *g.shape[2:]).movedim(1, 0)


class _Linear(Use):
    """H = A Wᵀ with a weight W (o, i), or A W with a weight (i, o)."""

    def __init__(self, edge: GradientEdge, a: Tensor, rows_are_outputs: bool) -> None:
        super().__init__(edge)
        self._a, self._rows_are_outputs = a, rows_are_outputs

    def part(self, b: Tensor, N: int, data_second: bool) -> Part | None:
        A, B = (_by_datum(x, N, data_second, 1) for x in (self._a.unsqueeze(0), b))
        if A is None or B is None:
            return None
        A = A.reshape(N, -1, A.shape[-1]).to(b.dtype)
        B = B.reshape(N, len(b), -1, B.shape[-1]).permute(1, 3, 0, 2)
        return LinearPart(A, B, self._rows_are_outputs)

    def nbytes(self, N: int, q: int, leaf: Tensor, form: str) -> int:
        rows, i = self._a.numel() // self._a.shape[-1], self._a.shape[-1]
        if form == "auto" and rows_are_cheaper(rows // N, q):
            return super().nbytes(N, q, leaf, form)
        return rows * (i + q * leaf.numel() // i) * leaf.itemsize


class _Broadcast(Use):
    """H = parameter ∘ a or parameter + a, broadcast over data and positions."""

    def __init__(self, edge: GradientEdge, shape: torch.Size, a: Tensor | None = None) -> None:
        super().__init__(edge)
        self._shape, self._a = shape, a

    def part(self, b: Tensor, N: int, data_second: bool) -> Part | None:
        shape = list(self._shape)
        if len(shape) > b.ndim - 1:
            return None
        covers_data = 0 < len(shape) == b.ndim - 1
        features = 0 if covers_data else len(shape)
        g = _by_datum(b if self._a is None else b * self._a, N, data_second, features)
        if g is None:
            return None
        # The parameter may have an axis for the data too, along which it is the same for all.
        if covers_data and shape.pop(1 if data_second and b.shape[1] != N else 0) != 1:
            return None
        if len(shape) > g.ndim - 2:
            return None
        rows: Tensor = g.sum_to_size(*g.shape[:2], *[1] * (g.ndim - 2 - len(shape)), *shape)
        return RowsPart(rows.reshape(N, len(b), -1))


class _Convolution(Use):
    """A convolution by the parameter."""

    def __init__(self, edge: GradientEdge, node: Any) -> None:
        super().__init__(edge)
        self._input, self._weight = node._saved_input, node._saved_weight
        self._options = (
            list(node._saved_stride), list(node._saved_padding), list(node._saved_dilation),
            node._saved_transposed, list(node._saved_output_padding), node._saved_groups,
        )  # fmt: skip

    def part(self, b: Tensor, N: int, data_second: bool) -> Part | None:
        if len(self._input) != N:
            return None

        def gradient(x: Tensor, g: Tensor) -> Tensor:
            backward = torch.ops.aten.convolution_backward
            result: Tensor = backward(
                g[None], x[None], self._weight, None, *self._options, [False, True, False]
            )[1]  # fmt: skip
            return result

        with torch.no_grad():
            rows = torch.stack([vmap(gradient)(self._input, own.to(self._input.dtype)) for own in b], 1)
        return RowsPart(rows.flatten(2).to(b.dtype))


class _Embedding(Use):
    """Rows of the parameter, looked up by index."""

    def __init__(self, edge: GradientEdge, indices: Tensor, count: int, padding: int) -> None:
        super().__init__(edge)
        self._indices, self._count, self._padding = indices, count, padding

    def at(self, edge: GradientEdge) -> _Embedding:
        """Return the same rows, as an operation takes them that broadcasts them over data."""
        return _Embedding(edge, self._indices, self._count, self._padding)

    def part(self, b: Tensor, N: int, data_second: bool) -> Part | None:
        indices = self._indices.expand(b.shape[1:-1])
        index, B = _by_datum(indices.unsqueeze(0), N, data_second, 0), _by_datum(b, N, data_second, 1)
        if index is None or B is None:
            return None
        index = index.reshape(N, -1)
        B = B.reshape(N, len(b), -1, b.shape[-1])
        if self._padding >= 0:
            B = B * (index != self._padding)[:, None, :, None]
        return EmbeddingPart(index, B, self._count)

    def nbytes(self, N: int, q: int, leaf: Tensor, form: str) -> int:
        return q * self._indices.numel() * leaf.shape[-1] * leaf.itemsize


def find_uses(f: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, list[Use] | None]:
    """Find the operations that take parameters.

    Parameters
    ----------
    f : torch.Tensor
        Outputs, with a graph.
    leaves : mapping of str to torch.Tensor
        The parameters.

    Returns
    -------
    dict
        For each parameter that f depends on its uses, or None if one of them is of an unknown kind.
    """
    consumers, accumulators = _consumers(f.grad_fn)
    names = {id(leaf): name for name, leaf in leaves.items()}
    uses: dict[str, list[Use] | None] = {}
    for node in accumulators:
        name = names.get(id(node.variable))
        if name is not None:
            uses[name] = _uses_of(node, node.variable, consumers)
    return uses


def _consumers(root: Any) -> tuple[dict[Any, list[tuple[Any, int]]], list[Any]]:
    """Return who takes the result of each node, and the nodes of leaves."""
    consumers: dict[Any, list[tuple[Any, int]]] = {}
    accumulators, seen, waiting = [], {root}, [root]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            accumulators.append(node)
        for position, (parent, _) in enumerate(node.next_functions):
            if parent is None:
                continue
            consumers.setdefault(parent, []).append((node, position))
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return consumers, accumulators


_SAME_NUMBERS = {"ToCopyBackward0", "AliasBackward0", "CloneBackward0"}
_TRANSPOSES = {"TBackward0"}


def _uses_of(node: Any, leaf: Tensor, consumers: Mapping[Any, list[tuple[Any, int]]]) -> list[Use] | None:
    found: list[Use] = []
    waiting = [(consumer, position, False) for consumer, position in consumers.get(node, [])]
    while waiting:
        consumer, position, transposed = waiting.pop()
        name = consumer.name()
        if name in _SAME_NUMBERS or name in _TRANSPOSES:
            swap = name in _TRANSPOSES
            waiting += [(above, place, transposed != swap) for above, place in consumers.get(consumer, [])]
            continue
        read = _READERS.get(name)
        use = read(consumer, position, leaf, transposed) if read is not None else None
        if use is None:
            return None
        found += _where_broadcast(use, consumer, consumers) if isinstance(use, _Embedding) else [use]
    return found


def _where_broadcast(use: _Embedding, node: Any, consumers: Mapping[Any, list[tuple[Any, int]]]) -> list[Use]:
    """Return the additions that spread looked-up rows over the data, such as those of positions; or the look-up."""
    own = node._input_metadata[0].shape
    additions = [above for above, _ in consumers.get(node, [])]
    for above in additions:
        shape = above._input_metadata[0].shape
        spreads = shape[-1:] == own[-1:] and math.prod(shape) > math.prod(own)
        if above.name() != "AddBackward0" or above._saved_alpha != 1 or not spreads:
            return [use]
    return [use.at(GradientEdge(above, 0)) for above in additions]


def _read_addmm(node: Any, position: int, leaf: Tensor, transposed: bool) -> Use | None:
    if node._saved_alpha != 1 or node._saved_beta != 1:
        return None
    if position == 0 and not transposed:
        return _Broadcast(GradientEdge(node, 0), leaf.shape)
    return _Linear(GradientEdge(node, 0), node._saved_mat1, transposed) if position == 2 else None


def _read_mm(node: Any, position: int, leaf: Tensor, transposed: bool) -> Use | None:
    return _Linear(GradientEdge(node, 0), node._saved_self, transposed) if position == 1 else None


def _read_add(node: Any, position: int, leaf: Tensor, transposed: bool) -> Use | None:
    return None if transposed or node._saved_alpha != 1 else _Broadcast(GradientEdge(node, 0), leaf.shape)


def _read_mul(node: Any, position: int, leaf: Tensor, transposed: bool) -> Use | None:
    other = node._saved_self if position == 1 else node._saved_other
    return None if transposed or other is None else _Broadcast(GradientEdge(node, 0), leaf.shape, other)


def _read_convolution(node: Any, position: int, leaf: Tensor, transposed: bool) -> Use | None:
    edge = GradientEdge(node, 0)
    if position == 1 and not transposed:
        return _Convolution(edge, node)
    return _Broadcast(edge, _channels(leaf, node._saved_input)) if position == 2 else None


def _read_embedding(node: Any, position: int, leaf: Tensor, transposed: bool) -> Use | None:
    if transposed or node._saved_scale_grad_by_freq:
        return None
    return _Embedding(GradientEdge(node, 0), node._saved_indices, len(leaf), _signed(node._saved_padding_idx))


def _read_layer_norm(node: Any, position: int, leaf: Tensor, transposed: bool) -> Use | None:
    normal = None
    if position == 1:
        normal = (node._saved_input - node._saved_result1) * node._saved_result2
    return _Broadcast(GradientEdge(node, 0), leaf.shape, normal)


def _read_group_norm(node: Any, position: int, leaf: Tensor, transposed: bool) -> Use | None:
    x, normal = node._saved_input, None
    if position == 1:
        mean, scale = (t.reshape(len(x), -1, 1) for t in (node._saved_result1, node._saved_result2))
        normal = ((x.reshape(len(x), mean.shape[1], -1) - mean) * scale).reshape(x.shape)
    return _Broadcast(GradientEdge(node, 0), _channels(leaf, x), normal)


def _read_batch_norm(node: Any, position: int, leaf: Tensor, transposed: bool) -> Use | None:
    if getattr(node, "_saved_training", True):
        return None
    x, normal, shape = node._saved_input, None, _channels(leaf, node._saved_input)
    if position == 1:
        scale = (node._saved_running_var + node._saved_eps).rsqrt()
        normal = (x - node._saved_running_mean.view(shape)) * scale.view(shape)
    return _Broadcast(GradientEdge(node, 0), shape, normal)


def _channels(leaf: Tensor, x: Tensor) -> torch.Size:
    """Return the shape (C, 1, ...) that broadcasts a vector over the channels of (N, C, ...)."""
    return torch.Size((leaf.numel(), *[1] * (x.ndim - 2)))


def _signed(index: int) -> int:
    """Return an index that torch hands out as unsigned."""
    return index - 2**64 if index >= 2**63 else index


_READERS: dict[str, Callable[[Any, int, Tensor, bool], Use | None]] = {
    "AddmmBackward0": _read_addmm,
    "MmBackward0": _read_mm,
    "AddBackward0": _read_add,
    "MulBackward0": _read_mul,
    "ConvolutionBackward0": _read_convolution,
    "EmbeddingBackward0": _read_embedding,
    "NativeLayerNormBackward0": _read_layer_norm,
    "NativeGroupNormBackward0": _read_group_norm,
    "NativeBatchNormBackward0": _read_batch_norm,
}
