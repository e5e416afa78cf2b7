"""The only door for arrays: an array of any library in, torch inside, the same library out.

Every product goes through :func:`enter` once. It gives the tensor to compute with and a function
that takes the result back to where the input came from. What enters may share memory with the
caller's array, so it must only be read; what leaves is contiguous, writable and the caller's own.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import array_api_compat
import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Leave = Callable[[Tensor], Any]

_TAKEN = "NumPy arrays (or sequences of numbers) and strided torch tensors are taken"

# What torch.from_dlpack takes from NumPy without a copy; other numbers are converted first.
_DLPACK_DTYPES = frozenset(
    np.dtype(name) for name in ("?", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8", "c8", "c16")
)


def enter(x: Any) -> tuple[Tensor, Leave]:
    """Take an array to torch, without a copy where its layout allows.

    Parameters
    ----------
    x : array
        The caller's array; it is never written to.

    Returns
    -------
    tensor : torch.Tensor
        The numbers of `x` on the device of `x`; read it, never change or keep it.
    leave : callable
        Takes the result, a tensor nobody else refers to, to the library and device of `x`; to its dtype too,
        if that is inexact and can hold the result.

    Raises
    ------
    TypeError
        If the library, layout or dtype of `x` is not taken.
    """
    if isinstance(x, Tensor):
        return _enter_torch(x)
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            "got a NumPy masked array, and a product has no meaning for masked entries: pass `x.filled(0.0)`."
        )
    if isinstance(x, np.ndarray | np.generic | list | tuple):
        return _enter_numpy(x)
    raise TypeError(f"got {_describe(x)}: {_TAKEN}. Convert it first, for example by `numpy.asarray(x)`.")


def scalar(x: Any) -> Any | None:
    """Return `x` as a Python number if it is a number or a 0-d array of any library, else None."""
    if getattr(x, "shape", None) == () and array_api_compat.is_array_api_obj(x) and hasattr(x, "item"):
        x = x.item()
    if not isinstance(x, Number):
        return None
    # Numbers of other types, such as fractions, and integers of more than 64 bits are not known to torch.
    known = isinstance(x, float | complex) or (isinstance(x, int) and abs(x) < 2**63)
    return x if known else float(x)  # type: ignore[arg-type]


def to_tensor(x: Any, name: str) -> Tensor:
    """Take a data array (inputs or targets) to torch; `name` says in errors which one it is."""
    try:
        return enter(x)[0]
    except TypeError as error:
        raise TypeError(f"`{name}`: {error}") from None


def is_array(x: Any) -> bool:
    """Whether `x` is an array of a library that can enter (sequences of numbers do not count)."""
    return isinstance(x, Tensor | np.ndarray)


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the NumPy dtype of a torch dtype."""
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype


def _enter_torch(x: Tensor) -> tuple[Tensor, Leave]:
    if x.is_nested or x.is_quantized or x.device.type == "meta" or x.layout is not torch.strided:
        kinds = {"nested": x.is_nested, "quantized": x.is_quantized, "meta": x.device.type == "meta"}
        kind = next((name for name, holds in kinds.items() if holds), f"{x.layout}")
        raise TypeError(f"got a {kind} tensor: {_TAKEN}. Pass a dense one on a real device, such as `x.to_dense()`.")
    x = x.detach()
    device = x.device
    inexact = x.dtype if x.is_floating_point() or x.is_complex() else None

    def leave(y: Tensor) -> Tensor:
        dtype = y.dtype if inexact is None else inexact
        if y.is_complex() and not dtype.is_complex:
            dtype = y.dtype
        return y.to(device=device, dtype=dtype).contiguous()

    return x, leave


def _enter_numpy(x: Any) -> tuple[Tensor, Leave]:
    array = np.asarray(x)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"got {_describe(x)} of dtype {array.dtype}: numbers (bool to complex) are taken.")
    inexact = array.dtype if array.dtype.kind in "fc" else None
    if array.dtype not in _DLPACK_DTYPES or not array.dtype.isnative:
        array = array.astype(np.complex128 if array.dtype.kind == "c" else _real(array.dtype))
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    tensor = from_dlpack(array)
    is_matrix = isinstance(x, np.matrix)

    def leave(y: Tensor) -> Any:
        out = y.resolve_conj().resolve_neg().cpu().contiguous().numpy()
        if inexact is not None:
            target = inexact.newbyteorder("=")
            if out.dtype.kind == "c" and target.kind != "c":
                target = out.dtype
            out = out.astype(target, copy=False)
        return np.asmatrix(out) if is_matrix else out

    return tensor, leave


def _real(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the native dtype torch knows for real numbers of `dtype`."""
    native = dtype.newbyteorder("=")
    return native if native in _DLPACK_DTYPES else np.dtype(np.float64)


def _describe(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
