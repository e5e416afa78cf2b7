"""Conversion between PyTorch tensors and arrays of other libraries.

Every product calls :func:`enter` once. It returns the tensor to compute with and a function that converts the result
to the library of the input. The tensor may share memory with the caller's array, so it must only be read; a result is
contiguous, writable and owned by the caller. :func:`narrowed` checks every conversion to a narrower precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Number
from typing import Any

import array_api_compat
import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fisherops import _torch

Leave = Callable[[Tensor], Any]

_ACCEPTED = "an array of NumPy, CuPy, JAX or another array-API library, a strided torch tensor or a sequence of numbers"

# NumPy has unsigned integers for which torch has almost no operations.
_WIDE_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})

# Dtypes that torch imports from NumPy by DLPack without a copy; others are converted first.
_DLPACK_DTYPES = frozenset(
    np.dtype(name) for name in ("?", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8", "c8", "c16")
)


# Classes of tensors that are divided among processes, with functions that return the part in this process. They enter
# and leave as they are: the operators that take them are made of parts too.
DIVIDED: dict[type, Callable[[Any], Tensor]] = {}


def enter(x: Any) -> tuple[Tensor, Leave]:
    """Convert an array to a torch tensor, without a copy if its layout allows that.

    Parameters
    ----------
    x : array
        The caller's array; it is never written to.

    Returns
    -------
    tensor : torch.Tensor
        The elements of `x` on the device of `x`. It must only be read, and not be stored.
    leave : callable
        Converts the result, a tensor with no other references, to the library and device of `x`, and to the dtype of
        `x` if that is inexact. Raises FloatingPointError if that dtype cannot represent the result, see `narrowed`.

    Raises
    ------
    TypeError
        If the library, layout or dtype of `x` is not supported.
    ValueError
        If `x` is a sequence of sequences of unequal lengths.
    """
    if type(x) in DIVIDED:
        return x, lambda y: y
    if isinstance(x, Tensor):
        return _enter_torch(x)
    if isinstance(x, np.ndarray | np.generic | list | tuple):
        return _enter_numpy(x)
    if array_api_compat.is_dask_array(x):
        raise TypeError(
            "the array must be in memory, got a dask array, which is not computed yet. Pass `x.compute()`, or map the "
            "product over blocks."
        )
    if array_api_compat.is_array_api_obj(x):
        return _enter_array_api(x)
    raise TypeError(
        f"the array must be {_ACCEPTED}, got {_describe(x)}. Convert it first, for example by `numpy.asarray(x)`."
    )


def part_of(x: Tensor) -> Tensor:
    """Return the part of a tensor that is in this process: all of it, unless its class is in `DIVIDED`."""
    part = DIVIDED.get(type(x))
    return x if part is None else part(x)


def leave_like(x: Any) -> Leave:
    """Return a function that converts tensors, in their own dtype, to the library and device of an array."""
    if type(x) in DIVIDED:
        return lambda y: y
    if isinstance(x, Tensor):
        return lambda y: _moved(y, x.device).contiguous()
    if isinstance(x, np.ndarray | np.generic | list | tuple):
        return to_numpy
    xp = array_api_compat.array_namespace(x)
    # The library's integers, which every result may replace by its own dtype.
    return enter(xp.zeros(1, dtype=xp.int32, device=array_api_compat.device(x)))[1]


def to_numpy(y: Tensor) -> np.ndarray[Any, Any]:
    """Return a result as a NumPy array, after the checks that are pending on its device."""
    return _moved(y, torch.device("cpu")).contiguous().numpy()


def _moved(y: Tensor, device: torch.device) -> Tensor:
    """Move a result, and judge what is pending if it leaves an accelerator for the host, which then waits anyway."""
    result = y.to(device)
    if device.type == "cpu" != y.device.type:
        _torch.settle()
    return result


def no_narrower(x: Any, entered: Tensor, leave: Leave, dtype: torch.dtype) -> Leave:
    """Return how results go to the library of `x`: in its dtype, or in `dtype` if that is wider."""
    narrower = entered.is_floating_point() and torch.promote_types(entered.dtype, dtype) != entered.dtype
    return leave_like(x) if narrower else leave


def scalar(x: Any) -> Any | None:
    """Return `x` as a Python number if it is a number or a 0-d array of any library, else None."""
    if isinstance(x, np.longdouble | np.clongdouble):
        x = complex(x) if isinstance(x, np.clongdouble) else float(x)  # they are their own items
    elif isinstance(x, np.generic):
        x = x.item()
    elif isinstance(x, Tensor):
        x = None if x.is_nested or x.ndim else x.detach().item()
    elif getattr(x, "shape", None) == () and array_api_compat.is_array_api_obj(x):
        if _is_jax_tracer(x):
            raise TypeError(_TRACER)
        isdtype = array_api_compat.array_namespace(x).isdtype
        if not isdtype(x.dtype, ("bool", "numeric")):
            return None
        x = complex(x) if isdtype(x.dtype, "complex floating") else float(x)
    if not isinstance(x, Number):
        return None
    # Numbers of other types, such as fractions, and integers of more than 64 bits are not known to torch.
    known = isinstance(x, float | complex) or (isinstance(x, int) and abs(x) < 2**63)
    return x if known else float(x)  # type: ignore[arg-type]


def real(name: str, value: Any) -> int | float:
    """Return an argument as a Python number, or say that it is no real one."""
    number: Any = scalar(value)
    if number is None or isinstance(number, complex):
        raise TypeError(f"`{name}` must be a real number, got {type(value).__name__}.")
    own: int | float = number
    return own


def to_tensor(x: Any, name: str) -> Tensor:
    """Convert a data array (inputs or targets) to torch; errors describe it by `name`."""
    try:
        tensor = enter(x)[0]
    except TypeError as error:
        raise TypeError(f"`{name}`: {error}") from None
    return signed(tensor)


def signed(x: Tensor) -> Tensor:
    """Return 16- to 64-bit unsigned integers as int64, because models cannot compute with them; others as they are."""
    return x.to(torch.int64) if x.dtype in _WIDE_UNSIGNED else x


def narrowed(x: Tensor, dtype: torch.dtype, cure: str) -> Tensor:
    """Convert a tensor, and check that a narrower dtype can represent its columns.

    Parameters
    ----------
    x : torch.Tensor
        (n,) or (n, K), whose columns are vectors.
    dtype : torch.dtype
    cure : str
        An imperative sentence that ends the error.

    Raises
    ------
    FloatingPointError
        If a finite entry becomes infinite, or a nonzero column has no normal number left.
    """
    y = x.to(dtype)
    if not x.is_floating_point() and not x.is_complex():
        return y
    known, range_ = torch.finfo(x.dtype), torch.finfo(dtype)
    if (known.max <= range_.max and known.tiny >= range_.tiny) or x.numel() == 0:
        return y
    name = str(dtype).removeprefix("torch.")
    # Sizes above the largest of the dtype round to it up to half of the distance to what would be the next one.
    limit = range_.max + math.ldexp(range_.eps / 2, math.frexp(range_.max)[1] - 1)

    def refuse(largest: Tensor) -> None:
        wrong = largest[(largest >= limit) & largest.isfinite()]
        if len(wrong):
            raise FloatingPointError(
                f"vectors must be within the range of {name}, got an entry of size {float(wrong.max()):.3g}. {cure}"
            )
        wrong = largest[(largest > 0) & (largest < range_.tiny)]
        if len(wrong):
            raise FloatingPointError(
                f"vectors must be within the range of {name}, whose smallest normal number is {range_.tiny:.3g}, got a "
                f"vector whose largest entry has size {float(wrong.min()):.3g}. {cure}"
            )

    _torch.judge(x.abs().amax(0, keepdim=x.ndim == 1), refuse)
    return y


def is_array(x: Any) -> bool:
    """Whether `x` is an array of some library (sequences of numbers do not count)."""
    return isinstance(x, Tensor | np.ndarray) or (
        not isinstance(x, np.generic) and bool(array_api_compat.is_array_api_obj(x))
    )


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the NumPy dtype of a torch dtype."""
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype


def cupyx_operator(op: Any) -> Any:
    """Return an operator as a ``cupyx.scipy.sparse.linalg.LinearOperator``."""
    try:
        from cupyx.scipy.sparse import linalg
    except ImportError as error:
        raise ImportError(
            f"to_cupy() needs CuPy, which cannot be imported here ({error}): install the one for your CUDA, such as "
            "`pip install cupy-cuda12x`."
        ) from error
    # cupyx wraps a foreign object by its matvec alone, and then multiplies with matrices column by column.
    return linalg.LinearOperator(
        op.shape, matvec=op.matvec, rmatvec=op.rmatvec, matmat=op.matmat, rmatmat=op.rmatmat, dtype=op.dtype
    )


# ---- torch ---------------------------------------------------------------------------------------------


def _enter_torch(x: Tensor) -> tuple[Tensor, Leave]:
    kinds = {
        "nested": x.is_nested,
        "quantized": x.is_quantized,
        "meta": x.device.type == "meta",
        f"{type(x).__name__}": type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__,
        f"{x.layout}": x.layout is not torch.strided,
    }
    for kind, holds in kinds.items():
        if holds:
            raise TypeError(f"the array must be {_ACCEPTED}, got a {kind} tensor. Pass a dense tensor with values.")
    x = x.detach()
    device = x.device

    def leave(y: Tensor) -> Tensor:
        return _moved(_to_dtype_of(x.dtype, y), device).contiguous()

    return x, leave


def _to_dtype_of(dtype: torch.dtype, y: Tensor) -> Tensor:
    """Convert a result to the dtype for an input of `dtype`."""
    target = _result_dtype(dtype, y)
    return y if y.dtype == target else narrowed(y, target, _PASS_WIDER.format(str(y.dtype).removeprefix("torch.")))


_PASS_WIDER = "The result has the dtype of the input: pass the input as {} instead."


def _result_dtype(dtype: torch.dtype, y: Tensor) -> torch.dtype:
    """Return the dtype of a result for an input of `dtype`: its own if it is inexact and can hold the result."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return y.dtype
    # A complex result of a real input has the input's precision.
    return torch.promote_types(dtype, torch.complex64) if y.is_complex() else dtype


# ---- NumPy ---------------------------------------------------------------------------------------------


def _enter_numpy(x: Any) -> tuple[Tensor, Leave]:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError("the array must have no masked entries, got a NumPy masked array. Pass `x.filled(0.0)`.")
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"the sequence must be rectangular, got {_describe(x)} with parts of different shapes ({error}). Pass "
            "sequences of equal lengths."
        ) from None
    dtype = array.dtype
    if dtype.kind not in "biufc":
        raise TypeError(
            f"the array must be of numbers (bool to complex), got {_describe(x)} of dtype {dtype}. Convert it to a "
            "numeric dtype."
        )
    if dtype not in _DLPACK_DTYPES or not dtype.isnative:
        native = dtype.newbyteorder("=")
        wider: np.dtype[Any] = np.dtype(np.complex128 if dtype.kind == "c" else np.float64)
        if dtype.kind == "u" and array.max(initial=0) < 2**63:
            wider = np.dtype(np.int64)  # indices and labels must remain integers
        array = array.astype(native if native in _DLPACK_DTYPES else wider)
    if any(stride < 0 or stride % array.itemsize for stride in array.strides) or not array.flags.aligned:
        array = array.copy()
    is_matrix = isinstance(x, np.matrix)

    def leave(y: Tensor) -> Any:
        if dtype.kind in "fc" and dtype.itemsize < y.itemsize:
            y = _to_dtype_of(entered.dtype, y)  # NumPy's own conversion would turn large values into infinity
        y = y.resolve_conj().resolve_neg()
        out = y.contiguous().numpy() if y.device.type == "cpu" else to_numpy(y)
        if dtype.kind in "fc":
            native = dtype.newbyteorder("=")
            promotes = out.dtype.kind == "c" and dtype.kind == "f"
            out = out.astype(np.result_type(native, np.complex64) if promotes else native, copy=False)
        return np.asmatrix(out) if is_matrix else out

    entered = from_dlpack(array)
    return entered, leave


# ---- CuPy, JAX and other libraries of the array API ----------------------------------------------------

_TRACER = (
    "the array must have values, got a JAX tracer. Call the product outside of jax.jit and jax.vmap, or from inside "
    "by `jax.pure_callback`."
)


def _enter_array_api(x: Any) -> tuple[Tensor, Leave]:
    if _is_jax_tracer(x):
        raise TypeError(_TRACER)
    xp = array_api_compat.array_namespace(x)
    try:
        tensor = _share(x)
    except Exception as error:
        if array_api_compat.is_cupy_array(x) and not torch.cuda.is_available():
            return _enter_cupy_by_host(x)
        raise TypeError(
            f"the array must be {_ACCEPTED}, got {_describe(x)} of dtype {x.dtype}, which torch cannot import "
            f"({error}). Convert it first."
        ) from error
    device = array_api_compat.device(x)
    inexact = xp.isdtype(x.dtype, ("real floating", "complex floating"))

    def leave(y: Tensor) -> Any:
        y = _to_dtype_of(tensor.dtype, y) if inexact else y
        y = y.to(device=tensor.device).contiguous().resolve_conj().resolve_neg()
        if array_api_compat.is_cupy_array(x):
            # CuPy reads the result on its own stream; torch must not reuse the memory before it is done there.
            pointer = xp.cuda.get_current_stream().ptr
            y.record_stream(torch.cuda.ExternalStream(pointer, device=y.device))
            return xp.from_dlpack(y)
        return array_api_compat.to_device(xp.from_dlpack(y), device)

    return tensor, leave


def _share(x: Any) -> Tensor:
    """Import an array by DLPack. Negative strides need a copy, because torch aborts the process for them."""
    if array_api_compat.is_cupy_array(x):
        xp = array_api_compat.array_namespace(x)
        return from_dlpack(xp.ascontiguousarray(x) if any(stride < 0 for stride in x.strides) else x)
    if array_api_compat.is_jax_array(x) or x.__dlpack_device__()[0] != 1:
        return from_dlpack(x)
    return _enter_numpy(np.from_dlpack(x))[0]


def _enter_cupy_by_host(x: Any) -> tuple[Tensor, Leave]:
    """Import a CuPy array by a copy on the host, for a torch without CUDA."""
    tensor, leave_numpy = _enter_numpy(x.get())
    cupy = array_api_compat.array_namespace(x)
    return tensor, lambda y: cupy.asarray(leave_numpy(y))


def _is_jax_tracer(x: Any) -> bool:
    return bool(array_api_compat.is_jax_array(x)) and not hasattr(x, "__dlpack_device__")


def _describe(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
