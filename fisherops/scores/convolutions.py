"""The columns of G of a convolution, by its input and the gradients at its output; no unfolded copy is held."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisherops._matmul import precision_is_full, times_transposed
from fisherops._sizes import SIZES
from fisherops.problem.calls import Window
from fisherops.scores.columns import Columns, Concatenate, Factors, owned, rows_are_better, summed

# Elements of unfolded inputs that are there at once, in units of those of outputs.
_UNFOLDED = 4

# Positions that one call sums: the kernels of torch add them one after the other, and more lose digits in float32.
_TERMS = 2**12

# Positions that the kernels for vectors may sum.
_PIECE = 2**14

# The kernel for the gradient by a weight takes twice as long as a product of matrices if the last axis is this short.
_SHORT = 4


class Convolution(Columns):
    """A convolution or its transpose, in the coordinates (g, o, i) of `Window.of_weight`.

    Parameters
    ----------
    X : torch.Tensor
        Inputs, (N, T, channels, ...), of T calls for each datum.
    B : torch.Tensor
        Gradients at the outputs, (N, T, q, channels, ...).
    window : Window
    weight : sequence of int
        Shape of the weight.
    """

    def __init__(self, X: Tensor, B: Tensor, window: Window, weight: Sequence[int]) -> None:
        self.count, self._calls, self._q = B.shape[:3]
        self._x, self._b = owned(X.detach().flatten(0, 1)), owned(B.detach().flatten(0, 1))
        self._window, self._weight = window, tuple(weight)
        self._scale = 1.0
        self._outputs = SIZES[B.device].filling
        g, d = window.groups, len(weight) - 2
        first, second, size = weight[0] // g, weight[1], math.prod(weight[2:])
        self.shape = (g, second * size, first) if window.is_transposed else (g, first, second * size)
        # Positions lie along the axes of what is not unfolded.
        self._positions = tuple((self._x if window.is_transposed else self._b).shape[-d:])

    @property
    def _terms(self) -> int:
        return math.prod(self._positions)

    # ---- Products -----------------------------------------------------------------------------

    def apply(self, V: Tensor) -> Tensor:
        K, M, q = len(V), len(self._x), self._q
        W = V.new_zeros(K, M, q)
        for k in range(0, K, self._vectors):
            v = V[k : k + self._vectors].contiguous()
            own = W[k : k + len(v)]
            if _has_kernels(v):
                self._apply_kernel(v, own)
            else:
                self._apply_unfolded(v, own)
        return W.view(K, self.count, self._calls, q).sum(2).mul_(self._scale)

    def apply_t(self, W: Tensor) -> Tensor:
        K = len(W)
        W = (W * self._scale)[:, :, None].expand(-1, -1, self._calls, -1).reshape(K, len(self._x), self._q)
        has_kernels = _has_kernels(W) and self._terms <= _TERMS and self._positions[-1] > _SHORT
        step, results = self._vectors, []
        for w in W.split(step):
            terms = self._pulled_by_kernel(w) if has_kernels else self._pulled_unfolded(w)
            results.append(summed(terms))
        return results[0] if len(results) == 1 else torch.cat(results)

    @property
    def _vectors(self) -> int:
        """Vectors that are multiplied at once."""
        return max(1, self._outputs // max(1, self._b[0, 0].numel()))

    def _blocks(self, K: int, terms: int | None = None) -> Iterator[slice]:
        """List slices of the inputs whose outputs for K vectors are in the processor's cache."""
        step = max(1, self._outputs // (K * max(1, self._b[0, 0].numel())))
        if terms is not None:
            step = max(1, min(step, terms // self._terms))
        for start in range(0, len(self._x), step):
            yield slice(start, start + step)

    def _apply_kernel(self, v: Tensor, W: Tensor) -> None:
        """Multiply (K, g, o, i) → (K, M, q) by convolutions with the vectors as weights."""
        K, g = len(v), self._window.groups
        if self._window.is_transposed:
            weight = v.permute(1, 3, 0, 2).reshape(self._weight[0], K * self._weight[1], *self._weight[2:])
        else:
            weight = v.transpose(0, 1).reshape(K * self._weight[0], *self._weight[1:])
        for block in self._blocks(K):
            H = torch.convolution(self._x[block], weight, None, *self._window.options)
            H = H.reshape(len(H), g, K, -1)
            b = self._b[block].view(len(H), self._q, g, -1)
            if self._q == 1:
                W[:, block, 0] = H.mul_(b[:, 0, :, None]).sum((1, 3)).T
                continue
            for h, c in zip(H.split(_PIECE, 3), b.split(_PIECE, 3), strict=True):
                W[:, block] += torch.matmul(h, c.permute(0, 2, 3, 1)).sum(1).transpose(0, 1)

    def _pulled_by_kernel(self, W: Tensor) -> Iterator[Tensor]:
        """List terms whose sum is the transposed product (K, M, q) → (K, g, o, i)."""
        K, g = len(W), self._window.groups
        weight = list(self._weight)
        weight[1 if self._window.is_transposed else 0] *= K
        like = W.new_empty(weight)  # the kernel takes its shape
        for block in self._blocks(K, _TERMS):
            b = self._b[block].view(-1, self._q, g, self._b[0, 0].numel() // g)
            w = W[:, block].transpose(0, 1)
            weighted = b[:, 0, :, None] * w[:, None] if self._q == 1 else torch.matmul(w[:, None], b.transpose(1, 2))
            weighted = weighted.reshape(len(b), -1, *self._b.shape[3:])
            options = [*self._window.options, [False, True, False]]
            gradient = torch.ops.aten.convolution_backward(weighted, self._x[block], like, None, *options)[1]
            if self._window.is_transposed:
                yield gradient.view(g, self.shape[2], K, self.shape[1]).permute(2, 0, 3, 1).contiguous()
            else:
                yield gradient.view(g, K, *self.shape[1:]).transpose(0, 1).contiguous()

    # ---- Unfolded, a piece at a time ----------------------------------------------------------

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """List pieces of the positions, unfolded: calls from n to m, a (m - n, g, i, p) and b (m - n, q, g, o, p)."""
        (g, o, i), d, lines = self.shape, len(self._positions), self._positions[0]
        each = max(1, g * (i + self._q * o) * self._terms)
        step = max(1, min(_UNFOLDED * self._outputs // each, _TERMS // self._terms))
        few = max(1, min(lines, _UNFOLDED * self._outputs * lines // each, _TERMS * lines // self._terms))
        for n in range(start, stop, step):
            m = min(n + step, stop)
            x, b = self._unfolded(n, m)
            for line in range(0, lines, few):
                a, c = (t.narrow(-d, line, min(few, lines - line)) for t in (x, b))
                yield n, m, a.reshape(m - n, g, i, -1), c.reshape(m - n, self._q, g, o, -1)

    def _unfolded(self, n: int, m: int) -> tuple[Tensor, Tensor]:
        """Return views of a and b of calls from n to m whose last axes are the positions."""
        x, b = self._x[n:m], self._b[n:m]
        return (x, self._windows(b.flatten(0, 1))) if self._window.is_transposed else (self._windows(x), b)

    def _windows(self, x: Tensor) -> Tensor:
        """Return a view of what a window sees at each position, (n, channels, kernel, positions)."""
        window, size = self._window, self._weight[2:]
        margins = [p for width in reversed(window.padding) for p in (width, width)]
        x = pad(x, margins) if any(margins) else x
        n, channels, *axes = x.stride()
        inner = [s * t for s, t in zip(axes, window.dilation, strict=True)]
        outer = [s * t for s, t in zip(axes, window.stride, strict=True)]
        return x.as_strided((*x.shape[:2], *size, *self._positions), (n, channels, *inner, *outer))

    def _apply_unfolded(self, v: Tensor, W: Tensor) -> None:
        (K, g, o, i), q = v.shape, self._q
        for n, m, a, b in self._pieces(0, len(self._x)):
            A = a.permute(1, 2, 0, 3).reshape(g, i, -1)
            H = torch.matmul(v, A) if g > 1 else times_transposed(v.reshape(K * o, i), A[0].T)
            H = H.reshape(K, g * o, m - n, -1)
            B = b.permute(1, 2, 3, 0, 4).reshape(q, g * o, m - n, -1)
            for r in range(q):
                W[:, n:m, r] += (H * B[r]).sum((1, 3))

    def _pulled_unfolded(self, W: Tensor) -> Iterator[Tensor]:
        (K, _, q), (g, o, i) = W.shape, self.shape
        for n, m, a, b in self._pieces(0, len(self._x)):
            B = b.permute(1, 2, 3, 0, 4).reshape(q, g * o, m - n, -1)
            w = W[:, None, n:m, :, None]
            H = w[..., 0, :] * B[0]
            for r in range(1, q):
                H.addcmul_(w[..., r, :], B[r])
            A = a.permute(1, 2, 0, 3).reshape(g, i, -1)
            if g == 1:
                yield times_transposed(H.reshape(K * o, -1), A[0]).view(K, g, o, i)
            else:
                yield torch.matmul(H.reshape(K, g, o, -1), A.mT)

    def rows(self, start: int, stop: int) -> Tensor:
        (g, o, i), q, T = self.shape, self._q, self._calls
        stop = min(stop, self.count)
        rows = self._x.new_zeros(stop - start, q, g, o, i)
        for n, m, a, b in self._pieces(start * T, stop * T):
            own = torch.matmul(b.transpose(1, 2).reshape(m - n, g, q * o, -1), a.mT)
            own = own.view(m - n, g, q, o, i).transpose(1, 2)
            if T == 1:
                rows[n - start : m - start] += own
            else:
                rows.index_add_(0, torch.arange(n, m, device=rows.device) // T - start, own)
        return rows.mul_(self._scale)

    # ---- What rows say of each other ----------------------------------------------------------

    def gram(self, other: Columns) -> Tensor | None:
        """Multiply with the transpose by pairs of positions, or return None if dense rows take fewer flops."""
        if not isinstance(other, Convolution) or other.shape != self.shape:
            return None
        (_, o, i), q, p = self.shape, self._q, other._q
        S, T = self._terms * self._calls, other._terms * other._calls
        if o * i * (q * p + q * S / other.count + p * T / self.count) <= S * T * (i + q * p * o):
            return None
        result = self._x.new_empty(self.count, q, other.count, p)
        for mine, left in self.as_factors():
            for theirs, right in other.as_factors():
                own = left.gram_with(right, bias=False)
                result[mine, :, theirs] = own.view(mine.stop - mine.start, q, theirs.stop - theirs.start, p)
        return result.view(self.count * q, other.count * p)

    def as_factors(self) -> Iterator[tuple[slice, Factors]]:
        """List the columns as those of a dense layer, a block of data at a time."""
        (g, o, i), q, T = self.shape, self._q, self._calls
        step = max(1, _UNFOLDED * self._outputs // max(1, g * (i + q * o) * self._terms * T))
        for n in range(0, self.count, step):
            m = min(n + step, self.count)
            a, b = self._unfolded(n * T, m * T)
            A = a.reshape(m - n, T, g, i, -1).permute(0, 1, 4, 2, 3).reshape(m - n, -1, g, i)
            B = b.reshape(m - n, T, q, g, o, -1).permute(0, 1, 5, 2, 3, 4).reshape(m - n, -1, q, g, o)
            yield slice(n, m), Factors(A, B * self._scale)

    def matrices(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """List numbers of data with their inputs (g, i, positions) and gradients (g, o, vectors · positions)."""
        (g, o, i), q, T = self.shape, self._q, self._calls
        step = max(1, _UNFOLDED * self._outputs // max(1, g * (i + q * o) * self._terms * T))
        for n in range(0, self.count, step):
            m = min(n + step, self.count)
            # Axes of calls, and of vectors, go behind those of g, o and i, in one copy.
            a, b = self._unfolded(n * T, m * T)
            kernel = len(self._weight) - 2
            size = 1 if self._window.is_transposed else 1 + kernel
            a = a.movedim(0, size).reshape(g, i, -1)
            b = b.movedim(0, 1 + kernel) if self._window.is_transposed else b.permute(2, 1, 0, *range(3, b.ndim))
            b = b.reshape(g, o, -1)
            yield m - n, a, b * self._scale

    @property
    def terms(self) -> int:
        """T, the positions of a datum in all calls."""
        return self._calls * self._terms

    @property
    def magnitude(self) -> float:
        """Return the size of the rows if nothing cancelled in them, by which rounding is measured."""
        energy = self._x.square().sum(1, keepdim=True)
        if not self._window.is_transposed:
            energy = self._windows(energy).sum(tuple(range(2, len(self._weight))))
        return float(self._b.norm()) * math.sqrt(energy.max())

    def joined(self, other: Convolution) -> Convolution | None:
        """Return the sum with another use of the same parameters, or None if their inputs or windows differ."""
        if self._scale != other._scale or (self._window, self._x.shape[1:]) != (other._window, other._x.shape[1:]):
            return None
        parts = [(c._x.unflatten(0, (c.count, -1)), c._b.unflatten(0, (c.count, -1))) for c in (self, other)]
        X, B = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
        return Convolution(X, B, self._window, self._weight)

    def is_better_dense(self, form: str) -> bool:
        """Whether its rows should be held instead, to be small ("factors") or fast ("auto")."""
        rows = self.count * self._q * math.prod(self._weight)
        return rows_are_better(form, rows, self._x.numel() + self._b.numel(), self._terms * self._calls, self._q)

    def scale(self, factor: float) -> None:
        self._scale *= factor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._x, self._b

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return self.tensors

    @property
    def key(self) -> Any:
        return Convolution, self._window, self._weight, self._scale, self._x.shape[1:], self._b.shape[1:], self._calls

    def merged(self, parts: Sequence[Convolution], cat: Concatenate) -> Convolution:
        x, b = (cat(own) for own in zip(*(part.tensors for part in parts), strict=True))
        merged = Convolution(x.unflatten(0, (-1, self._calls)), b.unflatten(0, (-1, self._calls)), *self.key[1:3])
        merged._scale = self._scale
        return merged

    def part(self, start: int, stop: int) -> Convolution:
        X, B = (t.unflatten(0, (-1, self._calls))[start:stop] for t in self.tensors)
        part = Convolution(X, B, self._window, self._weight)
        part._scale = self._scale
        return part


def _has_kernels(x: Tensor) -> bool:
    """Whether torch's convolutions are as precise as products of matrices: not those of GPUs, which take TF32."""
    return x.device.type == "cpu" and precision_is_full("conv")
