"""What calls of torch do with a derived value D, in one normal form over letters: out = Σ a · D.

Letters name axes. Those that D shares with the output alone are o, with the data alone i, with both g (heads, experts,
groups); the output's other letters are positions. A rule returns the uses of a call, or None if it has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisherops.problem.calls import Call, Letters, Recorder, Rule, Use, Window, unchanged


@functools.cache
def axes(n: int) -> Letters:
    """Name the last n axes of a tensor, aligned at the right as broadcasting aligns them."""
    return tuple(f"x{n - k}" for k in range(n))


def scaled(factor: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that multiplies by a factor."""
    return unchanged if isinstance(factor, int | float) and factor == 1 else lambda t: t * factor


def contraction(
    call: Call, recorder: Recorder, letters: Sequence[Letters], operands: Sequence[Tensor], out: Letters, scale: Any = 1
) -> list[Use] | None:
    """Return the uses in an einsum of some operands."""
    uses = []
    for k, value in enumerate(operands):
        if not recorder.is_derived(value):
            continue
        rest = [(t, own) for j, (t, own) in enumerate(zip(operands, letters, strict=True)) if j != k]
        if any(recorder.is_derived(t) for t, _ in rest) and not any(recorder.is_data(t) for t, _ in rest):
            return None
        of_a = tuple(dict.fromkeys(c for _, own in rest for c in own))
        uses.append(Use(value, call, (of_a, letters[k], out), _outer(rest, of_a), scaled(scale)))
    return uses


def _outer(factors: Sequence[tuple[Tensor, Letters]], letters: Letters) -> Tensor | Callable[[], Tensor]:
    """Return the product of tensors over all their letters."""
    if len(factors) == 1 and factors[0][1] == letters:
        return factors[0][0]
    number = {c: k for k, c in enumerate(letters)}

    def product() -> Tensor:
        flat = [x for t, own in factors for x in (t.detach(), [number[c] for c in own])]
        result: Tensor = torch.einsum(*flat, list(range(len(letters))))
        return result

    return product


def elementwise(
    call: Call,
    value: Tensor,
    shape: Sequence[int],
    a: Tensor | Callable[[], Tensor] | None = None,
    through: Callable[[Tensor], Tensor] = unchanged,
    take: Callable[[Tensor], Tensor] = unchanged,
) -> Use:
    """Return the use of D that is added to an output of a shape (a None), or multiplied with a, element by element."""
    out = axes(len(shape))
    of_a = axes(a.ndim) if isinstance(a, Tensor) else out if a else ()
    return Use(value, call, (of_a, axes(through(value.detach()).ndim), out), a, through, take)


def _shape(*operands: Any) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(t.shape for t in operands if isinstance(t, Tensor))))


def _bias(c: Call, r: Recorder, bias: Any, shape: Sequence[int]) -> list[Use]:
    return [elementwise(c, bias, shape)] if bias is not None and r.is_derived(bias) else []


# ---- Contractions -----------------------------------------------------------------------------


def _linear(c: Call, r: Recorder) -> list[Use] | None:
    x, w, b = c.get(0, "input"), c.get(1, "weight"), c.get(2, "bias")
    positions = axes(x.ndim)[:-1]
    out = (*positions, "o") if w.ndim == 2 else positions
    uses = contraction(c, r, ((*positions, "i"), ("o", "i")[-w.ndim :]), (x, w), out)
    return None if uses is None else uses + _bias(c, r, b, (*x.shape[:-1], w.shape[0]))


def _product(c: Call, r: Recorder, x: Tensor, y: Tensor, scale: Any = 1) -> list[Use] | None:
    batch = axes(max(x.ndim, y.ndim) - 2) if max(x.ndim, y.ndim) > 2 else ()
    rows, columns = ("t",) if x.ndim > 1 else (), ("o",) if y.ndim > 1 else ()
    left = (*batch[len(batch) - max(x.ndim - 2, 0) :], *rows, "i")
    right = (*batch[len(batch) - max(y.ndim - 2, 0) :], "i", *columns)
    return contraction(c, r, (left, right), (x, y), (*batch, *rows, *columns), scale)


def _matmul(c: Call, r: Recorder) -> list[Use] | None:
    x, y = c.args[0], c.get(1, "other", c.kwargs.get("mat2", c.kwargs.get("tensor", c.kwargs.get("vec"))))
    return _product(c, r, x, y)


def _rmatmul(c: Call, r: Recorder) -> list[Use] | None:
    return _product(c, r, c.args[1], c.args[0])


def _addmm(c: Call, r: Recorder) -> list[Use] | None:
    own, x, y = c.get(0, "input", c.kwargs.get("self")), c.get(1, "mat1"), c.get(2, "mat2")
    if x is None or y is None:
        return None
    uses = _product(c, r, x, y, c.kwargs.get("alpha", 1)) if r.is_data(x) or r.is_data(y) else []
    if uses is None or not r.is_derived(own):
        return uses
    shape = (*x.shape[:-1], *y.shape[x.ndim - 1 :])
    return [*uses, elementwise(c, own, shape, through=scaled(c.kwargs.get("beta", 1)))]


def _einsum(c: Call, r: Recorder) -> list[Use] | None:
    equation, *operands = c.args
    if operands and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str):
        return None
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    hidden = [t.ndim - len(s.replace("...", "")) for t, s in zip(operands, inputs, strict=True)]
    if not arrow:
        free = sorted(ch for ch in set(left) - set(",.") if left.count(ch) == 1)
        right = ("..." if "." in left else "") + "".join(free)

    def letters(text: str, n: int) -> Letters:
        head, dots, tail = text.partition("...")
        return (*head, *(axes(n) if dots else ()), *tail)

    own = [letters(text, n) for text, n in zip(inputs, hidden, strict=True)]
    if any(len(set(s)) < len(s) for s in own):  # a diagonal
        return None
    return contraction(c, r, own, operands, letters(right, max(hidden, default=0)))


def _bilinear(c: Call, r: Recorder) -> list[Use] | None:
    x, y, w, b = c.get(0, "input1"), c.get(1, "input2"), c.get(2, "weight"), c.get(3, "bias")
    lead = axes(x.ndim)[:-1]
    uses = contraction(c, r, ((*lead, "i"), (*lead, "j"), ("o", "i", "j")), (x, y, w), (*lead, "o"))
    return None if uses is None else uses + _bias(c, r, b, (*x.shape[:-1], len(w)))


def _grouped_mm(c: Call, r: Recorder) -> list[Use] | None:
    """Experts: one product for each, of the positions that were sent to it."""
    x, w, ends = c.args[0], c.args[1], c.get(2, "offs")
    if x.ndim != 2 or w.ndim != 3 or ends is None or not r.is_derived(w):
        return None

    def use(expert: int, start: int, stop: int) -> Use:
        letters = (("t", "i"), ("i", "o"), ("t", "o"))
        return Use(w, c, letters, x.detach()[start:stop], lambda d: d[expert], lambda b: b[:, start:stop])

    stops = ends.tolist()
    return [use(e, i, j) for e, (i, j) in enumerate(zip([0, *stops], stops, strict=False)) if j > i]


# ---- Element by element -----------------------------------------------------------------------


def _sum(left: float = 1, right: float = 1) -> Rule:
    def rule(c: Call, r: Recorder) -> list[Use]:
        x, y, alpha = c.args[0], c.get(1, "other"), c.kwargs.get("alpha", 1)
        factors = (left, right * alpha) if left == 1 else (-alpha, 1)
        pairs = zip((x, y), factors, strict=True)
        return [elementwise(c, t, _shape(x, y), through=scaled(s)) for t, s in pairs if r.is_derived(t)]

    return rule


def _mul(c: Call, r: Recorder) -> list[Use] | None:
    x, y = c.args[0], c.get(1, "other")
    pairs = [(d, a) for d, a in ((x, y), (y, x)) if r.is_derived(d)]
    if any(not isinstance(a, Tensor) for _, a in pairs):
        return None
    return [elementwise(c, d, _shape(x, y), a.detach()) for d, a in pairs]


def _div(c: Call, r: Recorder) -> list[Use] | None:
    x, y = c.args[0], c.get(1, "other")
    if len(c.args) > 2 or c.kwargs.get("rounding_mode"):
        return None
    if r.is_derived(x):
        return [elementwise(c, x, _shape(x, y), y.detach().reciprocal())] if isinstance(y, Tensor) else None
    return [elementwise(c, y, _shape(x, y), x.detach(), through=torch.reciprocal)] if isinstance(x, Tensor) else None


def _addcmul(c: Call, r: Recorder) -> list[Use] | None:
    own, x, y, factor = c.args[0], c.get(1, "tensor1"), c.get(2, "tensor2"), c.kwargs.get("value", 1)
    shape = _shape(own, x, y)
    uses = [elementwise(c, own, shape)] if r.is_derived(own) else []
    pairs = ((x, y), (y, x))
    return uses + [elementwise(c, d, shape, a.detach(), scaled(factor)) for d, a in pairs if r.is_derived(d)]


def _where(c: Call, r: Recorder) -> list[Use] | None:
    condition, x, y = c.get(0, "condition"), c.get(1, "input"), c.get(2, "other")
    shape = _shape(condition, x, y)
    pairs = ((x, condition), (y, ~condition))
    own = [(d, a) for d, a in pairs if isinstance(d, Tensor) and r.is_derived(d)]
    return [elementwise(c, d, shape, a.to(d.dtype)) for d, a in own]


def _prelu(c: Call, r: Recorder) -> list[Use] | None:
    x, w = c.args[0], c.get(1, "weight")
    if not r.is_derived(w):
        return None
    if c.name == "prelu_kernel":
        return [elementwise(c, w, x.shape, x.detach().clamp(max=0))]
    return [elementwise(c, w, x.shape, x.detach().clamp(max=0), lambda t: t.view(-1, *[1] * max(0, x.ndim - 2)))]


def _normalization(plain: Callable[[Call], Tensor], weight: int, bias: int | None, by_channel: bool) -> Rule:
    """Return the rule of a normalization: its weight multiplies what the same function gives without weights."""

    def rule(c: Call, r: Recorder) -> list[Use] | None:
        x, w, b = c.args[0], c.get(weight, "weight"), None if bias is None else c.get(bias, "bias")

        def through(t: Tensor) -> Tensor:
            return t.view(-1, *[1] * (x.ndim - 2)) if by_channel else t

        pairs = ((w, lambda: plain(c)), (b, None))
        return [elementwise(c, d, x.shape, a, through) for d, a in pairs if d is not None and r.is_derived(d)]

    return rule


def _cat(stack: bool) -> Rule:
    def rule(c: Call, r: Recorder) -> list[Use]:
        own, axis = c.get(0, "tensors"), c.get(1, "dim", 0)
        parts = [t.unsqueeze(axis) for t in own] if stack else own
        axis %= parts[0].ndim
        uses, start = [], 0
        for t, value in zip(parts, own, strict=True):
            if r.is_derived(value):

                def take(b: Tensor, start: int = start, length: int = t.shape[axis]) -> Tensor:
                    return b.narrow(1 + axis, start, length)

                through = (lambda d: d.unsqueeze(axis)) if stack else unchanged
                uses.append(elementwise(c, value, t.shape, None, through, take))
            start += t.shape[axis]
        return uses

    return rule


def _setitem(c: Call, r: Recorder) -> list[Use] | None:
    h, index, value = c.args
    index = index if isinstance(index, tuple) else (index,)
    uses = []
    if r.is_derived(h):
        rest = torch.ones_like(h, requires_grad=False)
        rest[index] = 0
        uses.append(elementwise(c, h, h.shape, rest))
    if isinstance(value, Tensor) and r.is_derived(value):
        uses.append(elementwise(c, value, h[index].shape, None, take=lambda b: b[(slice(None), *index)]))
    return uses


# ---- Look-ups ---------------------------------------------------------------------------------


def _embedding(c: Call, r: Recorder) -> list[Use] | None:
    w, index, padding = c.args[0], c.args[1], c.get(2, "padding_idx", -1)
    if c.get(3, "scale_grad_by_freq", False) or not r.is_derived(w):
        return None
    padding = -1 if padding is None else padding

    def take(b: Tensor) -> Tensor:
        return b * (index != padding)[..., None] if padding >= 0 else b

    return [Use(w, c, take=take, index=lambda: index)]


def _embedding_bag(c: Call, r: Recorder) -> list[Use] | None:
    w, index, offsets, mode = c.args[0], c.args[1], c.args[2], c.get(4, "mode", 0)
    weights, last, padding = c.get(6, "w"), c.get(7, "include_last_offset", False), c.get(8, "padding_idx", -1)
    if mode == 2 or c.get(3, "s", False) or not r.is_derived(w):
        return None
    starts = offsets[:-1] if last else offsets

    def take(b: Tensor) -> Tensor:
        bag = torch.searchsorted(starts, torch.arange(len(index), device=index.device), right=True) - 1
        factor = (index != (-1 if padding is None else padding)).to(b.dtype)
        if mode == 1:
            factor = factor / b.new_zeros(b.shape[1]).index_add_(0, bag, factor)[bag]
        result: Tensor = b[:, bag] * (factor if weights is None else factor * weights.detach())[:, None]
        return result

    return [Use(w, c, take=take, index=lambda: index)]


def _lookup(c: Call, r: Recorder) -> list[Use] | None:
    return _rows_at(c, r, c.args[0], c.args[1])


def _index_select(c: Call, r: Recorder) -> list[Use] | None:
    return _rows_at(c, r, c.args[0], c.get(2, "index")) if c.get(1, "dim") == 0 else None


def _rows_at(c: Call, r: Recorder, w: Tensor, index: Any) -> list[Use] | None:
    index = index[0] if isinstance(index, tuple | list) and len(index) == 1 else index
    is_lookup = isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool
    if not is_lookup or w.ndim < 2 or not r.is_derived(w):
        return None
    return [Use(w, c, through=lambda t: t.flatten(1), take=lambda b: b.flatten(1 + index.ndim), index=lambda: index)]


# ---- Convolutions -----------------------------------------------------------------------------


def _convolution(c: Call, r: Recorder) -> list[Use] | None:
    """Return the uses of a weight, and of a bias, which is added at every position of a channel."""
    x, w, b = c.get(0, "input"), c.get(1, "weight"), c.get(2, "bias")
    if x.ndim != w.ndim:
        return None
    uses = [_moved(c, x, w)] if r.is_derived(w) else []
    if b is not None and r.is_derived(b):
        letters = ("n", "o", *axes(x.ndim - 2))
        uses.append(Use(b, c, ((), ("o",), letters)))
    return uses


def _moved(c: Call, x: Tensor, w: Tensor) -> Use:
    """Return the use of a weight, known by the derivative of the call alone if its numbers are complex."""
    d = w.ndim - 2
    if x.is_complex() or w.is_complex():
        return Use(w, c)

    def each(value: Any) -> tuple[int, ...]:
        return (value,) * d if isinstance(value, int) else tuple(value) * (d if len(value) == 1 else 1)

    stride, padding = each(c.get(3, "stride", 1)), c.get(4, "padding", 0)
    transposed, output_padding = "transpose" in c.name, 0
    if c.name == "convolution":
        dilation, transposed = c.get(5, "dilation"), c.get(6, "transposed")
        output_padding, groups = c.get(7, "output_padding"), c.get(8, "groups")
    elif transposed:
        output_padding, groups = c.get(5, "output_padding", 0), c.get(6, "groups", 1)
        dilation = c.get(7, "dilation", 1)
    else:
        dilation, groups = c.get(5, "dilation", 1), c.get(6, "groups", 1)
    dilation = each(dilation)
    a: Tensor | Callable[[], Tensor] = x
    if padding == "same":
        widths = [t * (size - 1) for t, size in zip(dilation, w.shape[2:], strict=True)]
        padding = tuple(width // 2 for width in widths)
        # An odd width has one more at the end.
        ends = [e for width in reversed(widths) for e in (0, width % 2)]
        if any(ends):
            a = functools.partial(pad, x, ends)
    padding = each(0 if padding == "valid" else padding)
    return Use(w, c, a=a, window=Window(stride, padding, dilation, transposed, each(output_padding), groups))


def _layer_norm(c: Call) -> Tensor:
    return torch.layer_norm(c.args[0].detach(), c.args[1], None, None, c.get(4, "eps", 1e-5))


def _rms_norm(c: Call) -> Tensor:
    return torch.rms_norm(c.args[0].detach(), c.args[1], None, c.get(3, "eps"))


def _group_norm(c: Call) -> Tensor:
    if c.name == "native_group_norm":
        return torch.group_norm(c.args[0].detach(), c.args[6], None, None, c.args[7])
    return torch.group_norm(c.args[0].detach(), c.args[1], None, None, c.get(4, "eps", 1e-5))


def _batch_norm(c: Call) -> Tensor:
    rest = (*c.args[3:], False) if c.name == "native_batch_norm" else c.args[3:]
    return torch.batch_norm(c.args[0].detach(), None, None, *rest)


def _instance_norm(c: Call) -> Tensor:
    return torch.instance_norm(c.args[0].detach(), None, None, *c.args[3:])


_NAMED: dict[str, Rule] = {
    "linear": _linear, "matmul": _matmul, "rmatmul": _rmatmul, "addmm": _addmm, "einsum": _einsum,
    "bilinear": _bilinear, "grouped_mm": _grouped_mm,
    "add": _sum(), "sub": _sum(1, -1), "rsub": _sum(-1, 1), "mul": _mul, "div": _div, "addcmul": _addcmul,
    "where": _where, "prelu": _prelu, "prelu_kernel": _prelu, "cat": _cat(False), "stack": _cat(True),
    "setitem": _setitem,
    "layer_norm": _normalization(_layer_norm, 2, 3, False),
    "native_layer_norm": _normalization(_layer_norm, 2, 3, False),
    "rms_norm": _normalization(_rms_norm, 2, None, False),
    "group_norm": _normalization(_group_norm, 2, 3, True),
    "native_group_norm": _normalization(_group_norm, 1, 2, True),
    "batch_norm": _normalization(_batch_norm, 1, 2, True),
    "native_batch_norm": _normalization(_batch_norm, 1, 2, True),
    "instance_norm": _normalization(_instance_norm, 1, 2, True),
    "embedding": _embedding, "embedding_bag": _embedding_bag, "getitem": _lookup, "index": _lookup,
    "index_select": _index_select,
    "conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution, "convolution": _convolution,
    "conv_transpose1d": _convolution, "conv_transpose2d": _convolution, "conv_transpose3d": _convolution,
}  # fmt: skip

_ALIASES = {
    "matmul": ("mm", "bmm", "mv", "dot", "imatmul"),
    "addmm": ("baddbmm", "addmv"),
    "add": ("iadd", "radd"),
    "sub": ("isub", "subtract"),
    "mul": ("imul", "rmul", "multiply"),
    "div": ("truediv", "itruediv", "divide", "true_divide"),
    "cat": ("concat", "concatenate"),
}

_IN_PLACE = ("add", "sub", "mul", "div", "addcmul", "addmm", "baddbmm", "addmv")

RULES: dict[str, Rule] = dict(_NAMED)
"""By the name of the operation."""
RULES |= {alias: _NAMED[name] for name, aliases in _ALIASES.items() for alias in aliases}
RULES |= {f"{name}_": RULES[name] for name in _IN_PLACE}
