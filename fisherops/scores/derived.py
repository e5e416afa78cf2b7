"""Values derived from parameters, D = φ(θ), as uses see them: products with the derivative of φ, (K, n) ↔ (K, g, o, i).

These act on vectors, so that columns of G need not become dense for a slice, a transpose or a weight norm.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherops.problem.calls import Use


class UnknownUseError(Exception):
    """Why the rows for a use cannot be found by what its operation means."""


class Derived(ABC):
    """A value computed from some parameters, in the shape (g, o, i) of its columns."""

    names: tuple[str, ...]
    shape: tuple[int, int, int]

    @abstractmethod
    def push(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Multiply φ' with the pieces (K, n) of vectors: (K, g, o, i)."""

    @abstractmethod
    def pull(self, Y: Tensor) -> dict[str, Tensor]:
        """Multiply its transpose: (K, g, o, i) → (K, n) for each parameter."""

    def pull_into(self, Y: Tensor, out: Mapping[str, Tensor], fills: frozenset[str]) -> None:
        """As `pull`, filling or adding to the pieces (K, n) of a result."""
        for name, piece in self.pull(Y).items():
            (out[name].copy_ if name in fills else out[name].add_)(piece)

    def fills(self, name: str) -> bool:
        """Whether `pull` gives every element of a parameter."""
        return True


class Strided(Derived):
    """A view of one parameter: itself, a transpose, a slice, repeats of it.

    Parameters
    ----------
    name : str
    leaf : torch.Tensor
        The parameter, contiguous.
    view : torch.Tensor
        D in the same memory, its axes in the order g, o, i.
    split : (int, int)
        Where o and i begin among its axes.
    """

    def __init__(self, name: str, leaf: Tensor, view: Tensor, split: tuple[int, int]) -> None:
        self.names = (name,)
        self._numel = leaf.numel()
        self._sizes, self._strides = tuple(view.shape), tuple(view.stride())
        self._offset = view.storage_offset() - leaf.storage_offset()
        o, i = split
        self.shape = math.prod(view.shape[:o]), math.prod(view.shape[o:i]), math.prod(view.shape[i:])
        self.key = self.names, self._offset, self._sizes, self._strides, self.shape
        """Equal for those that see the same elements of the same parameter in the same places."""
        self._repeated = [k for k, n in enumerate(view.shape) if n > 1 and view.stride(k) == 0]
        self.is_injective = not self._repeated
        """Whether no element of the parameter is in two places."""
        self._is_whole = not self._repeated and self._offset == 0 and math.prod(self._sizes) == self._numel
        self._is_plain = self._is_whole and view.is_contiguous()

    @staticmethod
    def fits(leaf: Tensor, view: Tensor) -> bool:
        """Whether a tensor is a view of a parameter, of which no element is in two places but by repeats."""
        if leaf.dtype != view.dtype or not leaf.is_contiguous() or view.is_neg() != leaf.is_neg() or not view.numel():
            return False
        if leaf.untyped_storage().data_ptr() != view.untyped_storage().data_ptr():
            return False
        axes = sorted((s, n) for s, n in zip(view.stride(), view.shape, strict=True) if n > 1 and s != 0)
        reach = 0  # the last element of the smaller axes
        for stride, n in axes:
            if stride <= reach:
                return False
            reach += (n - 1) * stride
        first = view.storage_offset() - leaf.storage_offset()
        return first >= 0 and first + reach < leaf.numel()

    def push(self, pieces: Mapping[str, Tensor]) -> Tensor:
        piece = pieces[self.names[0]]
        return (piece if self._is_plain else self._seen(piece)).reshape(-1, *self.shape)

    def pull(self, Y: Tensor) -> dict[str, Tensor]:
        if self._is_plain:
            return {self.names[0]: Y.reshape(len(Y), -1)}
        out = Y.new_empty(len(Y), self._numel) if self._is_whole else Y.new_zeros(len(Y), self._numel)
        self._add(Y, out, fill=self._is_whole)
        return {self.names[0]: out}

    def pull_into(self, Y: Tensor, out: Mapping[str, Tensor], fills: frozenset[str]) -> None:
        piece, fill = out[self.names[0]], self.names[0] in fills
        if not self._is_plain:
            self._add(Y, piece, fill)
        elif fill:
            piece.copy_(Y.reshape(piece.shape))
        else:
            piece.add_(Y.reshape(piece.shape))

    def fills(self, name: str) -> bool:
        return self._is_whole

    def same(self, other: Derived) -> bool:
        """Whether another one sees the same elements of the same parameter in the same places."""
        return isinstance(other, Strided) and self.key == other.key

    def apart(self, other: Derived) -> bool:
        """Whether another one sees other elements, by the ranges of memory that they span."""
        if not isinstance(other, Strided) or self.names != other.names:
            return False
        (a, b), (c, d) = self._range(), other._range()
        return b < c or d < a

    def places(self, length: int) -> list[tuple[Tensor, Tensor]] | None:
        """Return what indices g, o and i add to the row and column of an element in the parameter as a matrix.

        Parameters
        ----------
        length : int
            Length of the matrix's rows.

        Returns
        -------
        list of (torch.Tensor, torch.Tensor) or None
            For g, o and i, two vectors of integers; None if an axis of the view goes from row to row.
        """
        within = [(n - 1) * s for n, s in zip(self._sizes, self._strides, strict=True) if s % length]
        if self._offset % length + sum(within) >= length:
            return None
        axes, found = list(zip(self._sizes, self._strides, strict=True)), []
        row, column = divmod(int(self._offset), length)
        for count in self.shape:
            rows, columns = torch.tensor([row]), torch.tensor([column])
            while len(rows) < count:
                n, stride = axes.pop(0)
                steps = torch.arange(n) * stride
                along, inside = (steps // length, 0 * steps) if stride % length == 0 else (0 * steps, steps)
                rows, columns = (rows[:, None] + along).flatten(), (columns[:, None] + inside).flatten()
            found.append((rows, columns))
            row = column = 0
        return found

    def _range(self) -> tuple[int, int]:
        first = int(self._offset)
        return first, first + sum((n - 1) * s for n, s in zip(self._sizes, self._strides, strict=True))

    def _seen(self, piece: Tensor) -> Tensor:
        piece = piece if piece.stride(1) == 1 else piece.contiguous()
        size, stride = (len(piece), *self._sizes), (piece.stride(0), *self._strides)
        return piece.as_strided(size, stride, piece.storage_offset() + self._offset)

    def _add(self, Y: Tensor, out: Tensor, fill: bool) -> None:
        Y = Y.view(len(Y), *self._sizes) if Y.is_contiguous() else Y.reshape(len(Y), *self._sizes)
        target = self._seen(out)
        for k in reversed(self._repeated):
            Y, target = Y.sum(1 + k), target.select(1 + k, 0)
        (target.copy_ if fill else target.add_)(Y)


class Composed(Derived):
    """Any other function of parameters, by the graph in which it was computed.

    Parameters
    ----------
    names : tuple of str
    leaves : sequence of torch.Tensor
        These parameters in the graph.
    source : GradientEdge or None
        Where the value is in the graph; None if it is the one parameter itself.
    value : torch.Tensor
        Its copy, where a graph of its own begins.
    view : torch.Tensor
        What the uses see of it, (g, o, i), in that graph.
    """

    def __init__(
        self, names: tuple[str, ...], leaves: Sequence[Tensor], source: GradientEdge | None, value: Tensor, view: Tensor
    ) -> None:
        self.names, self._leaves, self._source, self._value, self._view = names, list(leaves), source, value, view
        self.shape, self.dtype = (view.shape[0], view.shape[1], view.shape[2]), view.dtype
        # J v by the derivative of u ↦ Jᵀu, which is linear: it is built once.
        with torch.enable_grad():
            if source is not None:
                self._u = torch.zeros_like(value, requires_grad=True)
                gradients = torch.autograd.grad(source, self._leaves, self._u, create_graph=True, allow_unused=True)
                self._gradients = [None if g is None or not g.requires_grad else g for g in gradients]
            self._strided = Strided("", value, view.detach(), (1, 2)) if Strided.fits(value, view) else None
            self._w = torch.zeros_like(view, requires_grad=True)
            (self._seen,) = torch.autograd.grad(view, [value], self._w, create_graph=True)

    def push(self, pieces: Mapping[str, Tensor]) -> Tensor:
        if self._source is None:
            piece = pieces[self.names[0]]
            changes = piece.reshape(len(piece), *self._value.shape).to(self._value.dtype)
        else:
            own = [
                (g, pieces[name].reshape(len(pieces[name]), *leaf.shape).to(g.dtype))
                for name, leaf, g in zip(self.names, self._leaves, self._gradients, strict=True)
                if g is not None
            ]
            (changes,) = _batched([g for g, _ in own], [self._u], [v.contiguous() for _, v in own])
        seen = self._strided and [self._strided.push({"": changes.reshape(len(changes), -1)})]
        (result,) = seen or _batched([self._seen], [self._w], [changes.contiguous()])
        return result.to(next(iter(pieces.values())).dtype)

    def pull(self, Y: Tensor) -> dict[str, Tensor]:
        seen = self._strided and [self._strided.pull(Y.to(self.dtype))[""].view(len(Y), *self._value.shape)]
        (changes,) = seen or _batched([self._view], [self._value], [Y.to(self._view.dtype).contiguous()])
        if self._source is None:
            return {self.names[0]: changes.reshape(len(Y), -1).to(Y.dtype)}
        gradients = _batched([self._source], self._leaves, [changes.contiguous()])
        return {name: g.reshape(len(Y), -1).to(Y.dtype) for name, g in zip(self.names, gradients, strict=True)}


class UsedValue:
    """A value D derived from parameters, as a use sees it; it has a graph of its own unless it is a view of one.

    Parameters
    ----------
    use : Use
    names : tuple of str
        The parameters that D was computed from.
    leaves : mapping of str to torch.Tensor
        All parameters in the graph.
    is_freed : bool
        Whether their memory is freed, so that only the place of D in it is known.

    Attributes
    ----------
    Z : torch.Tensor
        Its copy without a history.
    D : torch.Tensor
        What the letters of the use see of it.

    Raises
    ------
    UnknownUseError
        If no parameter is behind it, or it is no view of a sharded one.
    """

    def __init__(self, use: Use, names: tuple[str, ...], leaves: Mapping[str, Tensor], is_freed: bool) -> None:
        if not names:
            raise UnknownUseError("no parameter is behind its value")
        self._use, self._names = use, names
        self._leaves = [leaves[name] for name in names]
        leaf = self._leaves[0]
        if is_freed:  # only its place in memory, which is freed
            if len(names) > 1 or (use.value is not leaf and use.value._base is not leaf):
                raise UnknownUseError("it is computed from sharded parameters")
            self.Z = use.stand_in(leaf)
            self._leaves = [torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")]
        else:
            self.Z = use.value.detach()
        self.D = use.through(self.Z)
        self._is_view = len(names) == 1 and Strided.fits(self._leaves[0], self.D)
        if not self._is_view:
            if is_freed:
                raise UnknownUseError("it is no view of a sharded parameter")
            with torch.enable_grad():
                self.D = use.through(self.Z.requires_grad_())

    def derived(self, view: Tensor, split: tuple[int, int]) -> Derived:
        """Return the value as `view`, computed from D, sees it, with the axes o and i from some on."""
        if self._is_view:
            return Strided(self._names[0], self._leaves[0], view, split)
        is_leaf = len(self._names) == 1 and self._use.value is self._leaves[0]
        o, i = split
        shape = math.prod(view.shape[:o]), math.prod(view.shape[o:i]), math.prod(view.shape[i:])
        source = None if is_leaf else self._use.source
        with torch.enable_grad():
            return Composed(self._names, self._leaves, source, self.Z, view.reshape(shape))

    def repeats(self, D: Tensor, axis: int) -> bool:
        """Whether D is the same function of the parameters all along an axis, which then came by expansion."""
        if D.shape[axis] == 1 or D.stride(axis) == 0:
            return True
        one = torch.randn_like(D.select(axis, 0)).unsqueeze(axis)
        eye = torch.eye(D.shape[axis], dtype=D.dtype, device=D.device)
        eye = eye.view(-1, *[1] * axis, D.shape[axis], *[1] * (D.ndim - axis - 1))
        pulled = self.derived(D, (0, 0)).pull((eye * one).reshape(D.shape[axis], 1, 1, -1))
        rows = torch.cat(list(pulled.values()), 1)
        return bool((rows - rows[:1]).norm() <= torch.finfo(D.dtype).eps ** 0.5 * rows.norm())


def _batched(outputs: Sequence[Any], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Return Σ cotangentᵀ ∂output/∂input for cotangents (K, ...)."""
    K = len(cotangents[0])

    def grad(own: Sequence[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            outputs, inputs, own, retain_graph=True, is_grads_batched=batched, allow_unused=True
        )
        return found

    if K == 1:
        found: Sequence[Tensor | None] = [
            None if g is None else g[None] for g in grad([c[0] for c in cotangents], False)
        ]
    else:
        found = grad(cotangents, True)
    return [x.new_zeros(K, *x.shape) if g is None else g for g, x in zip(found, inputs, strict=True)]
