"""What is private to torch or belongs to the whole process: versions of tensors, random state, kernels, graph nodes.

A torch that lacks one of these names answers "unknown", never with an error; `tests/test_torch.py` tries each.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.attention import SDPBackend, sdpa_kernel

# Torch's random state, forward-mode level and kernel flags belong to the process, not to a thread.
EVALUATION = threading.RLock()
"""What a thread holds while it evaluates a model."""
_depth = 0  # of `isolated`, by the thread that has the lock


_Function = TypeVar("_Function", bound=Callable[..., Any])


# ---- Tensors ----------------------------------------------------------------------------------


def as_device(device: Any) -> torch.device:
    """Return a device with its index: of "cuda" that of the present card.

    Raises
    ------
    ValueError
        If PyTorch cannot compute there.
    """
    try:
        found = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`device` must be a device on which PyTorch can compute here, got {device!r} ({reason}). Pass one such as "
            "'cpu' or 'cuda:0'."
        ) from error
    if found.type == "meta":
        raise ValueError(f"`device` must be a device with memory, got {device!r}. Pass one such as 'cpu' or 'cuda:0'.")
    return found


def version_of(t: Tensor) -> int | None:
    """Return the number of in-place changes of a tensor that torch counted, or None if it does not count them."""
    try:
        return t._version
    except (AttributeError, RuntimeError):  # inference tensors have no counter
        return None


def address_of(t: Tensor) -> int | None:
    """Return the address of the elements, or None for tensors without memory of their own (fake, sparse, wrapped)."""
    try:
        return t.data_ptr()
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


def memory_of(t: Tensor, count: int) -> Tensor | None:
    """Return at most `count` elements of a tensor as integers, evenly spaced in its memory, without a copy.

    The view shares memory with the tensor and does not refer to it: `torch.utils.swap_tensors` refuses tensors that
    something else refers to. None if the tensor has no strided memory.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    try:
        if t.layout is not torch.strided or t.numel() == 0 or type(t).__torch_dispatch__ is not _PLAIN_DISPATCH:
            return None
        extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        step = -(-extent // count)
        view = torch.empty(0, dtype=t.dtype, device=t.device)
        view.set_(t.untyped_storage(), t.storage_offset(), (-(-extent // step),), (step,))
        # Bits are compared, so that NaN equals itself; a strided view of complex elements has no integer type.
        return view.view(integers[t.itemsize]) if t.itemsize in integers else torch.view_as_real(view)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


_PLAIN_DISPATCH = Tensor.__torch_dispatch__


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms of tensors by one call."""
    try:
        return list(torch._foreach_norm(list(tensors)))
    except (AttributeError, NotImplementedError):
        return [t.norm() for t in tensors]


def on_optimizer_step(note: Callable[[Any], None]) -> None:
    """Call `note` with every optimizer of torch after each of its steps: fused steps change no version counter."""
    with suppress(ImportError):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda optimizer, *_: note(optimizer))


# ---- Numbers of an accelerator ----------------------------------------------------------------


class Arrival:
    """A few numbers on their way from a device to the host."""

    def __init__(self, values: Tensor) -> None:
        device = values.device
        module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._values, self._event = values, None
        if hasattr(module, "Event") and hasattr(module, "current_stream"):
            # Only pinned memory is written by the device itself.
            on_host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=device.type == "cuda")
            self._values = on_host.copy_(values, non_blocking=True)
            self._event = module.Event()
            self._event.record(module.current_stream(device))

    @property
    def is_here(self) -> bool:
        """Whether the numbers can be read without waiting."""
        return self._event is None or bool(self._event.query())

    def read(self) -> Tensor:
        """Return the numbers; waits for the device if they are not here."""
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        return self._values.cpu()


_pending: deque[tuple[Arrival, Callable[[Tensor], None]]] = deque()


def judge(values: Tensor, refuse: Callable[[Tensor], None]) -> None:
    """Call ``refuse(values)`` on the host: at once on the CPU, else when an accelerator has computed them.

    Numbers are looked at when a later product finds that they have arrived, or when a result goes to the host, which
    waits for the device anyway: see `settle`. A graph of CUDA kernels repeats products without this code, so
    nothing is judged while one is captured.
    """
    if values.device.type == "cpu":
        refuse(values)
        return
    if is_capturing():
        return
    _judge_pending(waits=False)
    judge_later(values, refuse)


def judge_later(values: Tensor, refuse: Callable[[Tensor], None]) -> None:
    """Call ``refuse(values)`` when an accelerator has computed them, and look at nothing else now."""
    _pending.append((Arrival(values), refuse))


def settle() -> None:
    """Judge everything that is pending; the host waits for the device."""
    _judge_pending(waits=True)


def is_capturing() -> bool:
    """Whether operations are recorded for a graph of CUDA kernels: no event may be asked for then."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _judge_pending(waits: bool) -> None:
    """Judge what has arrived, or all that is pending, and raise the first error, which stands for all of them."""
    failure: Exception | None = None
    while _pending:
        try:
            first = _pending.popleft()
        except IndexError:  # another thread has judged it
            break
        arrival, refuse = first
        if not waits and not arrival.is_here:
            _pending.appendleft(first)
            break
        try:
            refuse(arrival.read())
        except (FloatingPointError, RuntimeError) as error:
            failure = failure or error
    if failure is not None:
        raise failure


# ---- The process ------------------------------------------------------------------------------


@contextmanager
def fixed_randomness(device: torch.device, seed: int) -> Iterator[list[torch.Generator]]:
    """Fix global random numbers inside, and leave their state untouched outside; yields torch's generators."""
    # Only the generators used here: torch.manual_seed would also seed those of other devices, and not restore them.
    generators = [torch.default_generator]
    if device.type != "cpu":
        generators += [own[device.index]] if (own := _default_generators(device)) else []
    states = [generator.get_state() for generator in generators]
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state is meant)
    try:
        for generator in generators:
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        yield generators
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _default_generators(device: torch.device) -> Sequence[torch.Generator]:
    """Return the generators of an accelerator's cards; none if its module in torch does not name them."""
    return getattr(torch.get_device_module(device), "default_generators", ())


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Evaluate models inside as if nothing else ran in the process, and leave no trace.

    The global random numbers are fixed inside and restored afterwards; inference mode and autocasting of the caller do
    not reach in; other threads wait.
    """
    global _depth
    with EVALUATION:
        if _depth:
            with own_precision(device):  # what is evaluated inside may have entered other contexts
                yield
            return
        _depth += 1
        try:
            with fixed_randomness(device, 0), own_precision(device), _unvalidated_distributions():
                yield
        finally:
            _depth -= 1


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Compute inside without the caller's inference mode and autocasting."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices inside without TF32, which a user may allow for the kernels of CUDA elsewhere.

    Squares of small numbers beside large ones, as in Gram matrices, need all digits.
    """
    flags: Any = torch.backends.cuda.matmul
    if flags.fp32_precision != "tf32":
        yield
        return
    flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = "tf32"


def needs_own_precision(device: torch.device) -> bool:
    """Whether the caller's contexts would change results on a device: asking costs less than entering others."""
    return torch.is_autocast_enabled(device.type) or torch.is_inference_mode_enabled()


@contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """Let models make torch.distributions inside of torch's transforms, where values cannot be looked at.

    Likelihoods look at them outside.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def elementary_kernels() -> Iterator[None]:
    """Evaluate attention and recurrent layers by elementary operations, which can be differentiated in every mode."""
    with ExitStack() as stack:
        stack.enter_context(elementary_attention())
        # By the flag alone: the context managers of these backends also set precisions, with warnings.
        for backend in (torch.backends.mkldnn, torch.backends.cudnn):
            stack.callback(setattr, backend, "enabled", getattr(backend, "enabled"))  # noqa: B009
            setattr(backend, "enabled", False)  # noqa: B010 (the attribute is unknown to type checkers)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def elementary_attention() -> Any:
    """Evaluate attention by elementary operations."""
    return sdpa_kernel(SDPBackend.MATH)


def eager() -> Any:
    """Evaluate compiled models by their Python code, which the modes of a build can see."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    try:
        return torch.compiler.set_stance("force_eager")
    except (AttributeError, RuntimeError):  # inside of a compiled function the stance cannot be changed
        return nullcontext()


# ---- Graphs -----------------------------------------------------------------------------------


def graph_nodes(*roots: Tensor) -> list[Any]:
    """List the nodes of the autograd graph of tensors, each after one that uses it."""
    nodes = list(dict.fromkeys(t.grad_fn for t in roots if t.grad_fn is not None))
    seen = set(nodes)
    for node in nodes:
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return nodes


def signature(nodes: list[Any], names: Mapping[int, str]) -> int:
    """Return a number that depends on the structure of a graph.

    It covers the operations, the shapes and dtypes that they give, how they are connected, integers that they save,
    and the parameters, whose names are given by the identity of their leaves.
    """
    index = {node: k for k, node in enumerate(nodes)}
    text: list[tuple[Any, ...]] = []
    for node in nodes:
        if hasattr(node, "variable"):
            text.append((names.get(id(node.variable)), tuple(node.variable.shape)))
            continue
        shapes = tuple([(tuple(m.shape), m.dtype) for m in getattr(node, "_input_metadata", ())])
        integers = tuple([_hashable(getattr(node, name)) for name in _saved_integers(node)])
        parents = tuple([(index.get(parent, -1), number) for parent, number in node.next_functions])
        text.append((node.name(), shapes, integers, parents))
    return hash(tuple(text))


_INTEGERS = {
    "_saved_dim", "_saved_dim0", "_saved_dim1", "_saved_dims", "_saved_start", "_saved_end", "_saved_index",
    "_saved_split_size", "_saved_chunks", "_saved_size", "_saved_stride", "_saved_pad", "_saved_step",
    "_saved_normalized_shape", "_saved_training",
}  # fmt: skip


_SAVED_INTEGERS: dict[type, tuple[str, ...]] = {}


def _saved_integers(node: Any) -> tuple[str, ...]:
    """Name the integers that a node saves."""
    kind = type(node)
    if kind not in _SAVED_INTEGERS:
        _SAVED_INTEGERS[kind] = tuple(name for name in dir(kind) if name in _INTEGERS)
    return _SAVED_INTEGERS[kind]


def _hashable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_hashable, value))
    return tuple(value.shape) if isinstance(value, Tensor) else value


def custom_functions(nodes: list[Any]) -> frozenset[str]:
    """Name the torch.autograd.Function subclasses among the nodes of a graph."""
    custom = (n for n in nodes if isinstance(n, torch.autograd.function.BackwardCFunction))
    return frozenset(type(node).__name__.removesuffix("Backward") for node in custom)


def saved_tensors(nodes: list[Any]) -> Iterator[Tensor]:
    """List the tensors that nodes of a graph have saved, those of custom functions too."""
    for node in nodes:
        for name in _saved_names(node):
            value: Any = None
            with suppress(RuntimeError, AttributeError):
                value = getattr(node, name)
            for t in value if isinstance(value, tuple | list) else (value,):
                if isinstance(t, Tensor):
                    yield t


_SAVED: dict[type, tuple[str, ...]] = {}


def _saved_names(node: Any) -> tuple[str, ...]:
    kind = type(node)
    if kind not in _SAVED:
        custom = issubclass(kind, torch.autograd.function.BackwardCFunction)
        names = ("saved_tensors",) if custom else (name for name in dir(kind) if name.startswith("_saved_"))
        _SAVED[kind] = tuple(names)
    return _SAVED[kind]


def saved_bytes(nodes: list[Any]) -> int:
    """Return the memory of the tensors that nodes of a graph have saved, each storage counted once."""
    storages: dict[int, int] = {}
    for t in saved_tensors(nodes):
        with suppress(RuntimeError, NotImplementedError):
            storage = t.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def has_fused_attention(nodes: list[Any]) -> bool:
    """Whether a graph goes through attention kernels whose double-backward is missing or slow."""
    return any("ScaledDotProduct" in node.name() for node in nodes)


def uses_reentrant_checkpoints(nodes: list[Any]) -> bool:
    """Whether a graph goes through `torch.utils.checkpoint` in its reentrant form, which hides parameters."""
    return any("CheckpointFunctionBackward" in node.name() for node in nodes)


# ---- Calls ------------------------------------------------------------------------------------

_NO_OVERRIDES = {
    name: lambda *_: False
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
}  # fmt: skip


@functools.cache
def body_of(function: types.FunctionType) -> Callable[..., Any]:
    """Return a Python function of torch without its first lines, which would hand it over to the active mode again."""
    names = {**function.__globals__, **_NO_OVERRIDES}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@functools.lru_cache(4096)
def name_of(function: Any) -> str:
    """Return the name of an operation of torch, without its namespace and overload; in-place ones keep the last _."""
    if isinstance(function, torch._ops.OpOverload):
        return str(function.name()).split("::")[1].split(".")[0].removeprefix("_")
    name: str = getattr(function, "__name__", "")
    if name == "__get__":
        return "get"  # an attribute, such as W.T
    return name.strip("_") if name.startswith("_") else name


def is_recurrent_kernel(names: Iterable[str]) -> bool:
    """Whether one of some kernels computes all steps of a recurrent layer at once."""
    return any(name in ("mkldnn_rnn_layer", "cudnn_rnn", "miopen_rnn", "thnn_fused_lstm_cell") for name in names)


# ---- Contexts of callers ----------------------------------------------------------------------


def opaque(function: _Function) -> _Function:
    """Make a function one opaque call for torch.compile, which cannot trace the autograd inside.

    Importing torch's compiler takes seconds, so it is not imported here: nothing can be compiled before it is loaded.
    """
    disabled: list[Any] = []

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@contextmanager
def quiet() -> Iterator[None]:
    """Compute in the operator's precision and without graphs, whatever the caller's contexts and flags."""
    accelerator = torch.accelerator.current_accelerator()
    with torch.no_grad(), ExitStack() as stack:
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            stack.enter_context(full_precision())
        for kind in {"cpu", "cuda", "cuda" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def outside_of_autocast(function: _Function) -> _Function:
    """Let a routine compute in the operator's precision and without graphs, whatever the caller's contexts."""

    @opaque
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with quiet():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
