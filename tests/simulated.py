"""A simulated accelerator: a device of PyTorch's own kind whose memory is the host's, and whose kernels are the CPU's.

It shows on every machine what otherwise only a GPU shows. Tensors of the device ``sim`` are plain tensors, with
storages and views of their own. Like CUDA it

- refuses to compute with tensors of the host, 0-d ones excepted, or of another card (there are two);
- runs behind the host: what a copy without waiting brings to the host is poison until its event has passed, and events
  pass `LAG` operations later, or when the host waits;
- has generators and streams of its own, and no pinned memory.

`watched` counts each time that the host waits for the device, with the line that makes it wait, and each copy between
host and device with its bytes, and lists the operations.

Memory goes from one device to the other by DLPack, whose capsules name the device; kernels are called with aliases of
the same memory on the CPU.
"""

import ctypes
import functools
import sys
import weakref
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_unflatten

from fisherops._sizes import SIZES

NAME = "sim"
CARDS = 2

# Operations that the device is behind the host.
LAG = 100

_ON_HOST, _ON_DEVICE = 1, 12  # kDLCPU and kDLExtDev
_CPU = torch._C.DispatchKey.CPU


# ---- What was seen ------------------------------------------------------------------------------


@dataclass
class Log:
    """What the device did.

    Attributes
    ----------
    waits : list of (str, str)
        Operations for which the host waited, and their lines.
    copies : list of (str, int, str)
        "to host" or "to device", bytes, line.
    operations : list of tuple
        Name, and shapes and dtypes of the tensors, of each kernel.
    """

    waits: list = field(default_factory=list)
    copies: list = field(default_factory=list)
    operations: list = field(default_factory=list)


_logs: list[Log] = []


@contextmanager
def watched():
    """List what happens inside."""
    log = Log()
    _logs.append(log)
    try:
        yield log
    finally:
        _logs.remove(log)


def _line():
    """Return the innermost line of the library, or if there is none of who calls torch."""
    frame, first = sys._getframe(1), None
    while frame is not None:
        file = frame.f_code.co_filename
        if "/fisherops/" in file and "/tests/" not in file:
            return f"{file.rpartition('/')[2]}:{frame.f_lineno}"
        if first is None and "/torch/" not in file and file != __file__:
            first = f"{file.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return first or "autograd"


class _Timeline:
    """How far the device is behind the host, and what it will have done."""

    def __init__(self):
        self.launched, self.passed, self._actions = 0, 0, deque()

    def launch(self):
        self.launched += 1
        self._reach(self.launched - LAG)

    def after_this(self, action):
        self._actions.append((self.launched, action))
        self._reach(self.launched - LAG)

    def wait(self, why, until=None):
        if until is None or until > self.passed:
            for log in _logs:
                log.waits.append((why, _line()))
        self._reach(self.launched if until is None else until)

    def _reach(self, number):
        self.passed = max(self.passed, number)
        while self._actions and self._actions[0][0] <= self.passed:
            self._actions.popleft()[1]()


_time = _Timeline()


@contextmanager
def lag(operations):
    """Let the device be so many operations behind the host inside."""
    global LAG
    before, LAG = LAG, operations
    try:
        yield
    finally:
        LAG = before


# ---- Memory -------------------------------------------------------------------------------------


class _DLDevice(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", _DLDevice)]


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def capsule_of(t, kind=_ON_DEVICE, index=0):
    """Return a DLPack capsule with the memory of a tensor, said to be on a device."""
    capsule = torch._C._to_dlpack(t)
    device = _DLTensor.from_address(_pointer_of(capsule, b"dltensor")).device
    device.type, device.index = kind, index
    return capsule


def _alias(t, kind, index=0):
    return torch._C._from_dlpack(capsule_of(t.detach(), kind, index))


def on_host(t):
    """Return a tensor of the CPU with the memory of one of the device."""
    if t.is_conj():
        return on_host(t.conj()).conj()
    if t.is_neg():
        return torch._neg_view(on_host(torch._neg_view(t)))
    return _alias(t, _ON_HOST)


def on_device(t, index=0):
    """Return a tensor of the device with the memory of one of the CPU."""
    return _alias(t.resolve_conj().resolve_neg(), _ON_DEVICE, index)


def _is_sim(device):
    return device is not None and torch.device(device).type == NAME


# ---- Kernels ------------------------------------------------------------------------------------

# Operations for which the host must know a number that the device computes: the shape of a result, or whether a
# factorization has failed. Those that return a number, such as `equal`, are known by that.
_WAITING = {
    "aten::nonzero", "aten::bincount", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::masked_select", "aten::_linalg_eigh", "aten::_linalg_eigvals", "aten::linalg_eig", "aten::_linalg_svd",
    "aten::linalg_lstsq", "aten::_linalg_det", "aten::_linalg_slogdet", "aten::_linalg_solve_ex",
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class _Signature(NamedTuple):
    """What is asked of an operation's schema, which torch makes anew each time."""

    name: str
    is_view: bool
    takes_tensor: list
    written: list
    outs: list
    generator: int | None
    returns: int
    returns_written: bool
    waits: bool

    @classmethod
    @functools.cache
    def of(cls, op):
        schema = op._schema
        name, arguments, returns = schema.name, list(schema.arguments), list(schema.returns)
        return cls(
            name,
            any(r.alias_info is not None and not r.alias_info.is_write for r in returns),
            [isinstance(a.type, torch.TensorType) for a in arguments],
            [a.alias_info is not None and a.is_write for a in arguments],
            [a.name for a in arguments if a.is_out],
            next((k for k, a in enumerate(arguments) if a.name == "generator"), None),
            len(returns),
            bool(returns) and all(r.alias_info is not None for r in returns),
            name.removesuffix("_") in _WAITING
            or name in _WAITING
            or any(not isinstance(r.type, torch.TensorType | torch.ListType) for r in returns),
        )


def _waits(own, args, kwargs):
    if own.name in _INDEXING:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if own.name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return own.waits


def _check_devices(name, tensors):
    cards = {t.device for t in tensors if t.device.type == NAME}
    strangers = {t.device for t in tensors if t.device.type != NAME and t.ndim}
    if len(cards | strangers) > 1:
        listed = " and ".join(sorted(map(str, cards | strangers)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {listed}: {name}")
    return next(iter(cards)) if cards else None


def _record(name, tensors):
    _time.launch()
    for log in _logs:
        log.operations.append((name, *((tuple(t.shape), t.dtype) for t in tensors)))


def _kernel(op, *args, **kwargs):
    """Run the kernel of the CPU on the memory of the device."""
    own = _Signature.of(op)
    name = own.name
    if own.is_view:
        return op._op_dk(_CPU, *args, **kwargs)  # a view
    args = [_as_tensor(x, args) if takes else x for takes, x in zip(own.takes_tensor, args, strict=False)]
    flat, form = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    if name in _INDEXING:  # indices may be on the host, as on CUDA, and are copied
        for t in args[1]:
            if t is not None and t.device.type != NAME and name != "aten::index":  # that one has copied them before
                _note_copy("to device", t.nbytes)
                _time.wait("copy to device")
        tensors = [args[0], *(t for t in args[1] if t is not None and t.device.type == NAME), *args[2:3]]
    asked = [x for x in flat if isinstance(x, torch.device)]
    card = _check_devices(name, tensors) or next((torch.device(d) for d in asked if _is_sim(d)), torch.device(NAME, 0))
    _record(name, tensors)
    if _waits(own, args, kwargs):
        _time.wait(name)
    coarse = name in _MATRIX_PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32"
    aliases = {id(t): _as_tf32(on_host(t)) if coarse else on_host(t) for t in tensors if t.device.type == NAME}
    host = [
        aliases.get(id(x), x) if isinstance(x, Tensor)
        else torch.device("cpu") if isinstance(x, torch.device)
        else _own_generator(x, card) if isinstance(x, torch.Generator)
        else x
        for x in flat
    ]  # fmt: skip
    args_, kwargs_ = tree_unflatten(host, form)
    for out in own.outs:  # they may have to grow, which memory of others cannot
        kwargs_[out] = torch.empty(0, dtype=kwargs[out].dtype)
    if own.generator is not None and len(args_) <= own.generator and kwargs_.get("generator") is None:
        kwargs_["generator"] = default_generators[card.index or 0]
    result = op(*args_, **kwargs_)
    for out in own.outs:
        _fill(kwargs[out], kwargs_[out])
    if own.outs:
        found = tuple(kwargs[out] for out in own.outs)
        return found if len(found) > 1 else found[0]
    if own.returns_written:
        written = [x for writes, x in zip(own.written, args, strict=False) if writes]
        return tuple(written) if own.returns > 1 else written[0]
    return _entered(result, card.index or 0)


# What CUDA computes with 10 bits of mantissa if TF32 is allowed.
_MATRIX_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


def _as_tf32(t):
    if t.dtype != torch.float32:
        return t
    return (t.contiguous().view(torch.int32) + 2**12 & ~(2**13 - 1)).view(torch.float32)


def _as_tensor(x, args):
    """Return numbers as tensors that do not change the precision of the others."""
    if isinstance(x, Tensor) or x is None:
        return x
    kinds = [t.dtype for t in args if isinstance(t, Tensor) and t.dtype != torch.bool]
    dtype = {bool: torch.bool, int: torch.int64, float: torch.get_default_dtype(), complex: torch.complex64}[type(x)]
    known = next((d for d in kinds if d.is_floating_point == dtype.is_floating_point and not d.is_complex), dtype)
    return torch.tensor(x, dtype=known if type(x) in (int, float) else dtype)


def _entered(result, index):
    if isinstance(result, Tensor):
        return on_device(result, index)
    if isinstance(result, tuple | list):
        return type(result)(_entered(x, index) for x in result)
    return result


def _fill(out, value):
    """Write a result to a tensor of the device, which gets memory of its own if it has another shape."""
    if out.shape != value.shape:
        fresh = on_device(value.contiguous(), out.device.index)
        torch.ops.aten.set_.source_Tensor(out, fresh)
    else:
        on_host(out).copy_(value)


def _own_generator(generator, card):
    known = _generators.get(generator._cdata)  # torch makes new Python objects for kernels
    device = generator.device if known is None else known.device
    if device != card:
        raise RuntimeError(f"Expected a '{card}' device type for generator but found '{device}'")
    return generator


def _note_copy(direction, nbytes):
    for log in _logs:
        log.copies.append((direction, nbytes, _line()))


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    if pin_memory:
        raise RuntimeError("the simulated device has no pinned memory")
    if (torch.device(device).index or 0) >= CARDS:
        raise RuntimeError("invalid device ordinal")
    t = torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
    return on_device(t, torch.device(device).index or 0)


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    t = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
    return on_device(t, torch.device(device).index or 0)


def _copy(self, src, non_blocking=False):
    """Copy between devices: without waiting only if asked, as from memory that is not pinned CUDA would not either."""
    ours, theirs = self.device.type == NAME, src.device.type == NAME
    _record("aten::copy_", (self, src))
    if ours and theirs:
        on_host(self).copy_(on_host(src))
    elif ours:
        _note_copy("to device", src.nbytes)
        on_host(self).copy_(src)
        if not non_blocking:
            _time.wait("copy to device")
    else:
        _note_copy("to host", src.nbytes)
        value = on_host(src).clone()
        if non_blocking:
            self.detach().view(-1).view(torch.uint8).fill_(0xFF)  # NaN, or True
            _time.after_this(lambda: self.copy_(value))
        else:
            _time.wait("copy to host")
            self.copy_(value)
    return self


def _copy_from(self, dst, non_blocking=False):
    return _copy(dst, self, non_blocking)


def _number(t):
    _record("aten::_local_scalar_dense", (t,))
    _time.wait("item")
    return on_host(t).item()


def _set_tensor(self, source):
    return _set(self, source.untyped_storage(), source.storage_offset(), source.shape, source.stride())


def _set(self, source, storage_offset, size, stride=()):
    torch.ops.aten.set_.source_Storage_storage_offset._op_dk(_CPU, self, source, storage_offset, size, stride)
    return self


def _resize(self, size, memory_format=None):
    if tuple(self.shape) != tuple(size):
        fresh = torch.empty(size, dtype=self.dtype)
        fresh.view(-1)[: self.numel()] = on_host(self).reshape(-1)[: fresh.numel()]
        _set_tensor(self, on_device(fresh, self.device.index))
    return self


def _convolution(*args):
    return torch.ops.aten.convolution(*args)


def _convolution_backward(grad, x, weight, stride, padding, dilation, transposed, output_padding, groups, mask):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [0], stride, padding, dilation, transposed, output_padding, groups, mask
    )


def _lstm_cell(input_gates, hidden_gates, cx, input_bias=None, hidden_bias=None):
    """Return h, c and the gates of one step of an LSTM, which CUDA computes by one kernel too."""
    gates = input_gates + hidden_gates
    if input_bias is not None:
        gates = gates + input_bias + hidden_bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * cx + i * g
    return o * c.tanh(), c, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(grad_h, grad_c, cx, cy, workspace, has_bias):
    i, f, g, o = workspace.chunk(4, 1)
    tanh = cy.tanh()
    zero = torch.zeros_like(cy)
    grad_h = zero if grad_h is None else grad_h
    grad_c = (zero if grad_c is None else grad_c) + grad_h * o * (1 - tanh**2)
    gates = torch.cat(
        [
            grad_c * g * i * (1 - i), grad_c * cx * f * (1 - f), grad_c * i * (1 - g**2),
            grad_h * tanh * o * (1 - o),
        ],
        1,
    )  # fmt: skip
    return gates, grad_c * f, gates.sum(0) if has_bias else torch.empty(0, dtype=cy.dtype)


def _gru_cell(input_gates, hidden_gates, hx, input_bias=None, hidden_bias=None):
    if input_bias is not None:
        input_gates, hidden_gates = input_gates + input_bias, hidden_gates + hidden_bias
    (ir, iz, i_n), (hr, hz, hn) = input_gates.chunk(3, 1), hidden_gates.chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (i_n + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], 1)


def _gru_cell_backward(grad, workspace, has_bias):
    r, z, n, hx, hn = workspace.chunk(5, 1)
    gn = grad * (1 - z) * (1 - n**2)
    gz, gr = grad * (hx - n) * z * (1 - z), gn * hn * r * (1 - r)
    of_input, of_hidden = torch.cat([gr, gz, gn], 1), torch.cat([gr, gz, gn * r], 1)
    none = torch.empty(0, dtype=grad.dtype)
    biases = (of_input.sum(0), of_hidden.sum(0)) if has_bias else (none, none)
    return of_input, of_hidden, grad * z, *biases


def _by_function(name, function):
    """Return a kernel that calls a function of tensors on the host."""

    def kernel(*args):
        flat, form = tree_flatten(args)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        card = next(t.device for t in tensors if t.device.type == NAME)
        if len({t.device for t in tensors}) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
        _record(name, tensors)
        host = [on_host(x) if isinstance(x, Tensor) else x for x in flat]
        return _entered(function(*tree_unflatten(host, form)), card.index)

    return kernel


def _autocast(op):
    """Return a kernel that computes in the precision of `torch.autocast`."""

    def kernel(*args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME)
        cast = [x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return op(*cast, **kwargs)

    return kernel


_OWN_KERNELS = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "copy_": _copy,
    "_copy_from": _copy_from,
    "_local_scalar_dense": _number,
    "set_.source_Tensor": _set_tensor,
    "set_.source_Storage_storage_offset": _set,
    "resize_": _resize,
    "record_stream": lambda _, stream: None,
    "convolution_overrideable": _by_function("aten::convolution", _convolution),
    "convolution_backward_overrideable": _by_function("aten::convolution_backward", _convolution_backward),
    "_thnn_fused_lstm_cell": _by_function("aten::_thnn_fused_lstm_cell", _lstm_cell),
    "_thnn_fused_lstm_cell_backward_impl": _by_function("aten::_thnn_fused_lstm_cell_backward", _lstm_cell_backward),
    "_thnn_fused_gru_cell": _by_function("aten::_thnn_fused_gru_cell", _gru_cell),
    "_thnn_fused_gru_cell_backward": _by_function("aten::_thnn_fused_gru_cell_backward", _gru_cell_backward),
    "_fused_sdp_choice": lambda *_, **__: 0,  # elementary operations
}


# ---- Streams, events and generators -----------------------------------------------------------


class Stream:
    """The only stream of a card."""

    def __init__(self, device=None):
        self.device = torch.device(device or NAME)

    def synchronize(self):
        _time.wait("stream")


class Event:
    """Passes when the device has done what was launched before it was recorded."""

    def __init__(self, enable_timing=False, blocking=False):
        self._number = 0

    def record(self, stream=None):
        self._number = _time.launched

    def query(self):
        return _time.passed >= self._number

    def synchronize(self):
        _time.wait("event", self._number)


class _KindOfGenerator(type(torch.Generator)):
    def __instancecheck__(cls, x):
        return isinstance(x, _Generator)


_Generator = torch.Generator
_generators: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


class SimulatedGenerator(_Generator):
    """Random numbers of the device: the CPU's of another seed, so that nobody mistakes one for the other."""

    def __new__(cls, device=NAME):
        self = super().__new__(cls, "cpu")
        self.own = torch.device(NAME, torch.device(device).index or 0)
        _generators[self._cdata] = self
        return self

    def __init__(self, device=NAME):
        pass

    @property
    def device(self):
        return self.own

    def manual_seed(self, seed):
        _Generator.manual_seed(self, (seed + 0x5EED) % 2**63)
        return self


class Generator(_Generator, metaclass=_KindOfGenerator):
    """`torch.Generator`, which the device has too."""

    def __new__(cls, device="cpu"):
        return SimulatedGenerator(device) if _is_sim(device) else _Generator(device)


# Of a small device, so that matrices are cut into several blocks.
PROPERTIES = SimpleNamespace(
    name="simulated",
    L2_cache_size=2**21,
    multi_processor_count=1,
    max_threads_per_multi_processor=64,
    total_memory=2**28,
)
TINY = SimpleNamespace(
    L2_cache_size=2**12, multi_processor_count=1, max_threads_per_multi_processor=4, total_memory=2**22
)
H100 = SimpleNamespace(
    name="H100", L2_cache_size=50 * 2**20, multi_processor_count=132, max_threads_per_multi_processor=2048,
    total_memory=80 * 2**30,
)  # fmt: skip


def _forget():
    for card in range(CARDS):
        SIZES.pop(torch.device(NAME, card), None)


@contextmanager
def properties(own):
    """Let the device have other properties inside."""
    global PROPERTIES
    before = PROPERTIES
    _forget()
    PROPERTIES = own
    try:
        yield
    finally:
        PROPERTIES = before
        _forget()


class _Module:
    """What torch asks of a device, as ``torch.sim``."""

    Stream, Event = Stream, Event

    def __init__(self):
        self.default_generators = default_generators
        self._current = 0

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return CARDS

    def current_device(self):
        return self._current

    def current_stream(self, device=None):
        return Stream(device)

    def synchronize(self, device=None):
        _time.wait("synchronize")

    def manual_seed(self, seed):
        default_generators[0].manual_seed(seed)

    def manual_seed_all(self, seed):
        for generator in default_generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device=NAME):
        return default_generators[torch.device(device).index or 0].get_state()

    def set_rng_state(self, state, device=NAME):
        default_generators[torch.device(device).index or 0].set_state(state)

    def get_device_properties(self, device=None):
        return PROPERTIES

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


_clone_of_storage = torch.UntypedStorage.clone


def _clone(storage):
    """Copy memory, as `copy.deepcopy` does; torch has no allocator for a device that is written in Python."""
    if storage.device.type != NAME:
        return _clone_of_storage(storage)
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
    return whole.clone().untyped_storage()


default_generators: list[SimulatedGenerator] = []
_libraries = []


def register():
    """Make the device known to torch, once for the process; returns it."""
    if not _libraries:
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        default_generators.extend(SimulatedGenerator(f"{NAME}:{k}") for k in range(CARDS))
        torch.Generator = Generator
        torch.UntypedStorage.clone = _clone
        every = torch.library.Library("_", "IMPL")
        every.fallback(_kernel, "PrivateUse1")
        own = torch.library.Library("aten", "IMPL")
        for name, kernel in _OWN_KERNELS.items():
            own.impl(name, kernel, "PrivateUse1")
        cast = torch.library.Library("_", "IMPL")
        cast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        for name in ("mm", "bmm", "addmm", "matmul", "linear"):
            own.impl(name, _autocast(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
        _libraries.extend([every, own, cast])
    return torch.device(NAME, 0)


def moved(model, device):
    """Move a model in place; parameters that it uses twice are still one, where `Module.to` makes two of them."""
    register()
    known = {}

    def move(t):
        if id(t) not in known:
            own = t.detach().to(device)
            known[id(t)] = t, torch.nn.Parameter(own, t.requires_grad) if isinstance(t, torch.nn.Parameter) else own
        return known[id(t)][1]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: move(t) for name, t in own.items() if t is not None})
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            module._init_flat_weights()
    return model
