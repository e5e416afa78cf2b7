"""Whether the operations of a graph keep the examples of a batch apart, whatever the values of the data are.

An index of examples that depends on shapes alone is followed from the outputs towards the uses of parameters: in a
tensor whose elements are numbered in row-major order, element j belongs to example (j // stride) % N. Operations that
are not listed here, and those that combine elements along the axis of the examples, end the walk. Sorting, gates and
routing by the data are among them: such a graph can keep the examples of one batch apart, and mix those of the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Shape = Sequence[int]


class Step(NamedTuple):
    """A step from an output of a node to one of its inputs."""

    node: Any
    k: int
    """Number of the input."""
    axis: int
    """Axis of the output along which the examples lie."""
    outer: Shape
    """Shape of the output."""
    inner: Shape
    """Shape of the input."""


Rule = Callable[[Step], "int | None"]
"""Returns the axis of the input along which the examples lie, None if the operation can mix them."""


def keeps_examples_apart(f: Tensor, N: int, ends: Collection[Any]) -> bool:
    """Return whether every path from the outputs to some nodes keeps the examples at places that shapes determine.

    Parameters
    ----------
    f : torch.Tensor
        Outputs, (T, C), whose rows belong to N examples one after the other.
    N : int
        Number of examples.
    ends : collection of torch.autograd.graph.Node
        Nodes of the uses of parameters.
    """
    if N == 1 or f.grad_fn is None:
        return True
    leading = _leading_to(f.grad_fn, ends)
    start = f.grad_fn, f.output_nr
    strides: dict[Any, int] = {start: f.numel() // N}
    waiting: list[Any] = [start]
    while waiting:
        node, number = waiting.pop()
        for k, edge in enumerate(node.next_functions):
            if edge[0] not in leading:
                continue
            stride = _followed(node, number, strides[node, number], N, k, _shape(*edge))
            if stride is None or stride != strides.get(edge, stride):
                return False
            if edge not in strides:
                strides[edge] = stride
                waiting.append(edge)
    return True


def _leading_to(root: Any, ends: Collection[Any]) -> set[Any]:
    """Return the nodes of which one of some nodes is an input, directly or not, and these themselves."""
    leading = set(ends)
    seen: set[Any] = {None}
    waiting = [root]
    while waiting:
        node = waiting[-1]
        parents = [parent for parent, _ in node.next_functions]
        new = [parent for parent in parents if parent not in seen]
        if node not in seen and new:
            seen.add(node)
            waiting += new
            continue
        seen.add(node)
        waiting.pop()
        if any(parent in leading for parent in parents):
            leading.add(node)
    return leading


def _shape(node: Any, number: int) -> Shape:
    return tuple(node._input_metadata[number].shape)


def _followed(node: Any, number: int, stride: int, N: int, k: int, inner: Shape) -> int | None:
    """Return the stride of the examples in input k of a node from that in one of its outputs, None if there is none."""
    outer = _shape(node, number)
    name = node.name().rstrip("0123456789").removesuffix("Backward")
    if name in _SAME_ORDER:
        return stride if math.prod(inner) == math.prod(outer) else None
    rule = _RULES.get(name)
    axis = _axis(outer, stride, N)
    if rule is None or axis is None or (number > 0 and name not in _SEVERAL_OUTPUTS):
        return None
    try:
        own = rule(Step(node, k, axis, outer, inner))
    except AttributeError:  # another version of PyTorch saves something else
        return None
    if own is None or not 0 <= own < len(inner) or inner[own] != outer[axis]:
        return None
    return stride // math.prod(outer[axis + 1 :]) * math.prod(inner[own + 1 :])


def _axis(shape: Shape, stride: int, N: int) -> int | None:
    """Return the axis along which the examples lie, alone or as a part of it."""
    for axis, size in enumerate(shape):
        below = math.prod(shape[axis + 1 :])
        if size and below and stride % below == 0 and size * below % (stride * N) == 0:
            return axis
    return None


def _dims(node: Any, ndim: int) -> list[int]:
    """Return the axes of the input that a node combines, all of them if it saves none."""
    saved = getattr(node, "_saved_dim", None)
    saved = getattr(node, "_saved_dims", None) if saved is None else saved
    if saved is None or saved == ():
        return list(range(ndim))
    # Negative axes are saved as unsigned integers.
    return [(d - 2**64 if d >= 2**63 else d) % ndim for d in (saved if isinstance(saved, tuple) else (saved,))]


def _elementwise(s: Step) -> int | None:
    return s.axis - len(s.outer) + len(s.inner)


def _along(s: Step) -> int | None:
    """Follow an operation along axes that stay, such as a softmax."""
    return None if len(s.outer) != len(s.inner) or s.axis in _dims(s.node, len(s.inner)) else s.axis


def _removing(s: Step) -> int | None:
    """Follow a reduction or selection along axes, which may stay with size 1."""
    dims = _dims(s.node, len(s.inner))
    if len(s.outer) == len(s.inner):
        return None if s.axis in dims else s.axis
    own = [d for d in range(len(s.inner)) if d not in dims]
    return own[s.axis] if len(own) == len(s.outer) else None


def _stack(s: Step) -> int | None:
    dim = _dims(s.node, len(s.outer))[0]
    return None if s.axis == dim else s.axis - (s.axis > dim)


def _slice(s: Step) -> int | None:
    is_whole = s.outer == s.inner and s.node._saved_step == 1
    return s.axis if is_whole else _along(s)


def _pad(s: Step) -> int | None:
    pad = tuple(s.node._saved_pad)[2 * (len(s.outer) - 1 - s.axis) :][:2]
    return s.axis if not any(pad) else None


def _permute(s: Step) -> int | None:
    return _dims(s.node, len(s.inner))[s.axis]


def _transpose(s: Step) -> int | None:
    own = list(range(len(s.inner)))
    n = len(own)
    i, j = (d - 2**64 if d >= 2**63 else d for d in (s.node._saved_dim0, s.node._saved_dim1))
    own[i % n], own[j % n] = own[j % n], own[i % n]
    return own[s.axis]


def _t(s: Step) -> int | None:
    return len(s.inner) - 1 - s.axis


def _leading(s: Step) -> int | None:
    """Follow the input of an operation that takes its leading axis element by element."""
    return 0 if s.k == 0 and s.axis == 0 else None


def _layer_norm(s: Step) -> int | None:
    return s.axis if s.k == 0 and s.axis < len(s.outer) - len(s.node._saved_normalized_shape) else None


def _batch_norm(s: Step) -> int | None:
    return s.axis if s.k == 0 and not s.node._saved_training else None


def _linear(s: Step) -> int | None:
    return s.axis if s.k == 0 and s.axis < len(s.outer) - 1 else None


def _attention(s: Step) -> int | None:
    return s.axis if s.k < 3 and len(s.outer) == len(s.inner) and s.axis < len(s.outer) - 2 else None


def _mm(first: int) -> Rule:
    """Return the rule of a product of matrices, the two of which are the inputs `first` and `first + 1`."""

    def rule(s: Step) -> int | None:
        if s.k < first:
            return _elementwise(s)
        rows, columns = len(s.outer) - 2, len(s.outer) - 1
        return s.axis if s.axis < rows or s.axis == (rows, columns)[s.k - first] else None

    return rule


# Operations that leave the row-major order of the elements as it is.
_SAME_ORDER = {
    "View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy", "Squeeze", "Unsqueeze",
}  # fmt: skip

_SEVERAL_OUTPUTS = {"Unbind", "Split", "UnsafeSplit", "SplitWithSizes", "UnsafeSplitWithSizes"}

_RULES: dict[str, Rule] = {
    **dict.fromkeys((
        "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Abs", "Reciprocal", "Square", "Pow", "Sqrt", "Rsqrt", "Exp",
        "Expm1", "Exp2", "Log", "Log1P", "Log2", "Log10", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Tanh", "Asinh",
        "Sigmoid", "LogSigmoid", "Relu", "LeakyRelu", "PreluKernel", "Elu", "Silu", "Mish", "Gelu", "Softplus",
        "Hardtanh", "Hardswish", "Hardsigmoid", "Hardshrink", "Softshrink", "Threshold", "Erf", "Erfc",
        "Lgamma", "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Where", "MaskedFill", "Lerp", "Addcmul",
        "Addcdiv", "Expand", "Repeat", "Hypot", "Atan2", "Logaddexp",
    ), _elementwise),
    **dict.fromkeys((
        "Softmax", "LogSoftmax", "Cumsum", "Cumprod", "Logcumsumexp", "Split", "UnsafeSplit", "SplitWithSizes",
        "UnsafeSplitWithSizes", "Cat", "Flip", "Glu",
    ), _along),
    **dict.fromkeys((
        "Sum", "Mean", "Amax", "Amin", "Max", "Min", "Logsumexp", "LinalgVectorNorm", "Var", "Std", "Prod", "Select",
        "Unbind",
    ), _removing),
    **dict.fromkeys((
        "Convolution", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D",
        "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "UpsampleNearest1D", "UpsampleNearest2D",
        "UpsampleBilinear2D", "NativeGroupNorm",
    ), _leading),
    **dict.fromkeys((
        "ScaledDotProductFlashAttention", "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductEfficientAttention",
        "ScaledDotProductCudnnAttention",
    ), _attention),
    "Stack": _stack, "Slice": _slice, "ConstantPadNd": _pad, "Permute": _permute, "Transpose": _transpose, "T": _t,
    "NativeLayerNorm": _layer_norm, "FusedRmsNorm": _layer_norm, "NativeBatchNorm": _batch_norm,
    "CudnnBatchNorm": _batch_norm, "Linear": _linear, "Mm": _mm(0), "Bmm": _mm(0), "Addmm": _mm(1), "Baddbmm": _mm(1),
}  # fmt: skip
