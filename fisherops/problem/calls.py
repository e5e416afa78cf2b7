"""Where a model uses its parameters: recorded at the calls of torch while the model is evaluated.

A tensor that was computed from parameters alone is a *derived value*. A call that combines derived values with data is
a *use* of them: `problem/rules.py` says what it means, and a call without a rule is opened, down to the kernels of
torch. The gradients at the outputs of uses then give the rows of G. Nothing is read from the nodes of the graph.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fisherops import _torch

Letters = tuple[str, ...]


def unchanged(t: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return t


@dataclass(eq=False)
class Call:
    """One call of torch that combines derived values with data."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    edge: GradientEdge | None = None
    """Where the gradient by its output is to be had."""
    shape: torch.Size | None = None
    """Of the output."""
    derived: frozenset[int] = frozenset()
    """Identities of the derived values among its arguments."""
    below: list[Any] = field(default_factory=list)
    """Nodes of the data that it was given, where a walk through the graph goes on."""

    def get(self, k: int, name: str, default: Any = None) -> Any:
        """Return an argument by place or name."""
        return self.args[k] if len(self.args) > k else self.kwargs.get(name, default)


class Window(NamedTuple):
    """How a convolution moves over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    is_transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def options(self) -> list[Any]:
        """Arguments of `torch.convolution` after input, weight and bias."""
        return [list(x) if isinstance(x, tuple) else x for x in self]

    def of_weight(self, weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return a view of a weight with its axes in the order g, o, i, and where o and i begin among them.

        The axes of the kernel belong to the inputs, because each position sees a window of them; in a transposed
        convolution to the outputs.
        """
        own = weight.unflatten(0, (self.groups, -1))
        if self.is_transposed:
            return own.movedim(1, -1), (1, own.ndim - 1)
        return own, (1, 2)


@dataclass(eq=False)
class Use:
    """What a call does with a derived value D: its output is Σ a · D over letters, plus what does not depend on D.

    With b (q, ...) the gradients of q vectors by the output, the rows of G for D are Σ a · b over the positions.
    """

    value: Tensor
    """D."""
    call: Call
    letters: tuple[Letters, Letters, Letters] | None = None
    """Names of the axes of a, D and the output; None for other uses than contractions."""
    a: Tensor | Callable[[], Tensor] | None = None
    """The data; None stands for 1."""
    through: Callable[[Tensor], Tensor] = unchanged
    """D as the letters see it."""
    take: Callable[[Tensor], Tensor] = unchanged
    """b as the letters see it."""
    index: Callable[[], Tensor] | None = None
    """Rows of D that are looked up, in place of a."""
    window: Window | None = None
    """How D moves over a in a convolution."""
    source: GradientEdge | None = None
    """Where D is in the graph; None if nothing flows back to it."""

    def stand_in(self, leaf: Tensor | None = None) -> Tensor:
        """Return a tensor like D without memory of its own, as a view of one like a parameter if it is given."""
        value = self.value
        if leaf is None:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        memory = torch.empty(leaf.numel(), dtype=leaf.dtype, device="meta")
        return memory.as_strided(value.shape, value.stride(), value.storage_offset() - leaf.storage_offset())

    @property
    def is_generic(self) -> bool:
        """Whether only the derivative of the call itself is known."""
        return self.letters is None and self.index is None and self.window is None


Rule = Callable[[Call, "Recorder"], "list[Use] | None"]


def tensors_in(*values: Any) -> list[Tensor]:
    """List the tensors in nested tuples, lists and mappings."""
    found: list[Tensor] = []
    _collect(values, found)
    return found


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            _collect(x, found)
        elif isinstance(x, dict):
            _collect(x.values(), found)


def _has(values: Iterable[Any], known: Mapping[int, Tensor]) -> bool:
    """Whether a known tensor is in nested tuples, lists and mappings."""
    for x in values:
        if id(x) in known:
            return True
        if isinstance(x, tuple | list | dict) and _has(x.values() if isinstance(x, dict) else x, known):
            return True
    return False


class Recorder:
    """The uses of parameters in one evaluation.

    Parameters
    ----------
    leaves : mapping of str to torch.Tensor
        The parameters.
    X : object
        The inputs.
    constants : iterable of torch.Tensor
        Tensors that the model holds beside parameters. Any other tensor that was not computed from these is data.
    model : object
        Its `substitutes` are what it evaluates in place of some of them.
    rules : mapping of str to callable
        ``(call, recorder) -> uses`` by the name of the operation, None if the call is to be opened.

    Attributes
    ----------
    uses : list of Use
    unknown : set of str
        Kernels without a rule, which are known by their derivative only.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], X: Any, constants: Iterable[Tensor], model: Any, rules: Mapping[str, Rule]
    ) -> None:
        self._rules, self._model = rules, model
        self._inputs = {id(t): t for t in tensors_in(X)}
        self._edges = {id(t): get_gradient_edge(t) for t in leaves.values()}
        self._names = {edge.node: name for edge, name in zip(self._edges.values(), leaves, strict=True)}
        # Both refer to their tensors, so that no identity is used again.
        self._derived: dict[int, Tensor] = {id(t): t for t in leaves.values()}
        self._constants: dict[int, Tensor] = {id(t): t for t in constants}
        self.uses: list[Use] = []
        self.unknown: set[str] = set()
        self._calls: list[Call] = []
        self._pending: list[tuple[Call, Tensor]] = []

    def is_derived(self, t: Any) -> bool:
        """Whether a tensor was computed from parameters alone."""
        return id(t) in self._derived

    def is_data(self, t: Tensor) -> bool:
        """Whether a tensor may depend on data."""
        key = id(t)
        if key in self._derived:
            return False
        if key in self._inputs or t.requires_grad:
            return True
        return key not in self._constants and key not in self._model.substitutes

    def sees_data_only(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        """Whether the first argument is data and no other is derived, as in most calls: these need no note."""
        if not args or not isinstance(args[0], Tensor) or not self.is_data(args[0]):
            return False
        derived = self._derived
        return not (
            _has(args, derived) or (kwargs and _has(kwargs.values(), derived)) or _torch.name_of(func) == "cond"
        )

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kernels: bool) -> Any:
        """Make a call, and note what it does with derived values. `kernels`: whether it is one of torch's kernels."""
        name = _torch.name_of(func)
        if name == "cond" and not kernels:  # which hides what its branches do
            condition, *branches, operands = args
            with Calls(self):
                return branches[0 if condition else 1](*operands)
        given: list[Tensor] = []
        _collect(args, given)
        if kwargs:
            _collect(kwargs.values(), given)
        if kernels:
            self.settle()
        if name in _SHAPE_ONLY:
            given = given[:1]
        elif name == "getitem":  # which reads an index of one element as a number
            given = [t for t in given if t.ndim or t.is_floating_point() or t is args[0]]
        values = [t for t in given if id(t) in self._derived]
        data = [t for t in given if self.is_data(t)]
        if not values and data:  # most calls
            out = func(*args, **kwargs)
            self.mark_data(out)
            if name[-1:] == "_" or name == "setitem":
                self.mark_data(args[0])
            return out
        if not values or not data:
            return self._plain(func, name, args, kwargs, values, kernels)
        call = Call(func, name, args, kwargs, derived=frozenset(map(id, values)))
        rule = self._rules.get(name)
        is_opened = _is_python(func) and not (func in _LIKE_KERNELS and len(args) > 1)
        uses = rule(call, self) if rule and torch.is_grad_enabled() and not is_opened else None
        if uses is None or not {id(v) for v in values} <= {id(use.value) for use in uses}:
            return self._opened(call, values, kernels)
        for use in uses:  # before the call, which may change D in place
            use.source = self._edge(use.value)
        out = func(*args, **kwargs)
        if not kernels and _hides(out, values):
            return self._opened(call, values, kernels)
        self._note(call, out, data)
        self.uses += uses
        return out

    def _plain(self, func: Any, name: str, args: Any, kwargs: Any, values: list[Tensor], kernels: bool) -> Any:
        """Make a call that sees no data."""
        out = func(*args, **kwargs)
        if values and torch.is_grad_enabled() and not kernels and _hides(out, values):
            return self._opened(Call(func, name, args, kwargs), values, kernels)
        for t in tensors_in(out):
            if values and torch.is_grad_enabled() and t.is_floating_point() and (kernels or t.requires_grad):
                self._constants.pop(id(t), None)
                self._derived[id(t)] = t
            elif id(t) not in self._derived:
                self._constants[id(t)] = t
        return out

    def _opened(self, call: Call, values: list[Tensor], kernels: bool) -> Any:
        """Make a call that has no rule by its parts: those of a Python function, else its kernels."""
        if kernels:
            out = call.func(*call.args, **call.kwargs)
            self.unknown.add(call.name)
            for v in values:
                self.uses.append(Use(v, call, source=self._edge(v)))
            self._note(call, out, [t for t in tensors_in(call.args, call.kwargs) if self.is_data(t)])
            return out
        if _is_python(call.func):
            with Calls(self):
                return _torch.body_of(call.func)(*call.args, **call.kwargs)
        with Kernels(self):
            out = call.func(*call.args, **call.kwargs)
        self.settle()
        return out

    def _note(self, call: Call, out: Any, data: list[Tensor]) -> None:
        self.mark_data(out)
        if call.name == "setitem":
            self.mark_data(call.args[0])
            out = call.args[0]
        call.below = [t.grad_fn for t in data if t.grad_fn is not None]
        self._calls.append(call)
        outputs = tensors_in(out)
        if outputs:
            call.shape = outputs[0].shape
            self._pending.append((call, outputs[0]))

    def mark_data(self, x: Any) -> None:
        """Note that the tensors in a value depend on data."""
        for t in (x,) if isinstance(x, Tensor) else tensors_in(x):
            self._derived.pop(id(t), None)
            self._constants.pop(id(t), None)

    def _edge(self, t: Tensor) -> GradientEdge | None:
        own = self._edges.get(id(t))
        return own if own is not None or t.grad_fn is None else get_gradient_edge(t)

    def settle(self) -> None:
        """Look up the edges of calls that have returned: below a dispatch mode outputs get their history late."""
        while self._pending:
            call, out = self._pending.pop()
            if out.requires_grad:
                call.edge = get_gradient_edge(out)

    def owners(self, use: Use) -> tuple[str, ...]:
        """Name the parameters that D was computed from."""
        return tuple(self._reached([] if use.source is None else [use.source.node], {}))

    def missed(self, f: Tensor) -> list[str]:
        """Name the parameters that f depends on past the recorded calls, by the identity of nodes."""
        self.settle()
        return self._reached([f.grad_fn], {c.edge.node: c for c in self._calls if c.edge is not None})

    def _reached(self, waiting: list[Any], stop: Mapping[Any, Call]) -> list[str]:
        seen: set[Any] = {None}
        names = []
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._names:
                names.append(self._names[node])
            waiting += stop[node].below if node in stop else [parent for parent, _ in node.next_functions]
        return names


class Calls(TorchFunctionMode):
    """Shows a recorder every call of torch's functions."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorder = self._recorder
        if recorder.sees_data_only(func, args, kwargs):
            out = func(*args, **kwargs) if kwargs else func(*args)
            recorder.mark_data(out)
            return out
        if getattr(func, "__name__", None) == "__get__":  # most attributes are no tensors
            out = func(*args)
            if not isinstance(out, Tensor):
                return out
        out = recorder.record(func, args, kwargs or {}, kernels=False)
        if recorder._pending:
            recorder.settle()
        return out


class Kernels(TorchDispatchMode):
    """Shows a recorder every kernel that torch runs, those of backward passes too."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._recorder.record(func, args, kwargs or {}, kernels=True)


# Operations that take only the shape or dtype of their other tensors.
_SHAPE_ONLY = {"expand_as", "view_as", "reshape_as", "type_as", "zeros_like", "ones_like", "full_like", "empty_like"}


# Python functions that take the same arguments, in the same order, as the function of torch that has their name.
_LIKE_KERNELS = {torch.functional.einsum, functional.layer_norm, functional.group_norm, functional.rms_norm}


def _is_python(func: Any) -> bool:
    return isinstance(func, types.FunctionType)


def _hides(out: Any, values: list[Tensor]) -> bool:
    """Whether outputs have lost their history, such as inside of a transform of torch.func."""
    if isinstance(out, Tensor) and out.requires_grad:
        return False
    own = [t for t in tensors_in(out) if t.is_floating_point()]
    return bool(own) and not any(t.requires_grad for t in own) and any(v.requires_grad for v in values)
