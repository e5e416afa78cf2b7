"""The parameters F is taken with respect to: names, shapes, and the way to and from one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Compute precision for each dtype. Half precisions hold parameters but are not computed in: a Fisher squares gradients.
_COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


class Parameters:
    """Named tensors in a fixed order, seen as one vector of length D.

    Parameters
    ----------
    tensors : mapping of str to torch.Tensor
        The user's tensors. Their values are read anew at each :meth:`point`; nothing is written to them.
    dtype : torch.dtype or None
        Compute precision; None takes that of the tensors (float32 for half precisions).

    Attributes
    ----------
    tensors : dict of str to torch.Tensor
    numel : int
        D, the length of the flat vector.
    dtype : torch.dtype
        Compute precision.
    asks_dtype : bool
        Whether the user named the precision; then frozen tensors are converted to it too.
    device : torch.device
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        if not tensors:
            raise ValueError(
                "`params` is empty: the Fisher information needs at least one parameter. Pass the list of "
                "parameters, or a model with parameters that require grad."
            )
        self.tensors = dict(tensors)
        _check_each(self.tensors)
        self.device = _the_device(self.tensors)
        self.dtype = _the_dtype(self.tensors, dtype)
        self.asks_dtype = dtype is not None
        self.shapes = {name: t.shape for name, t in self.tensors.items()}
        self._sizes = [t.numel() for t in self.tensors.values()]
        self.numel = sum(self._sizes)
        if self.numel == 0:
            raise ValueError(f"the parameters {list(self.tensors)} have no elements, so there is no Fisher.")

    @property
    def converts(self) -> bool:
        """Whether some tensor has another dtype than the compute precision."""
        return any(t.dtype != self.dtype for t in self.tensors.values())

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Where each parameter lies in the flat vector: the first place, and the first after it."""
        ends = list(accumulate(self._sizes))
        return {name: (end - size, end) for name, size, end in zip(self.shapes, self._sizes, ends, strict=True)}

    def point(self, copied: bool = False) -> dict[str, Tensor]:
        """Return the present values, in the compute precision and detached from the user's graph."""
        point = {name: t.detach().to(self.dtype, copy=copied) for name, t in self.tensors.items()}
        # A tensor made under inference_mode cannot be differentiated; its copy can.
        return {name: t.clone() if t.is_inference() else t for name, t in point.items()}

    def split(self, V: Tensor) -> dict[str, Tensor]:
        """Split columns (D, K) into one tensor (K, ...) for each parameter; views where possible."""
        rows = V.T.contiguous()
        parts = torch.split(rows, self._sizes, dim=1)
        return {
            name: part.view(len(part), *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Join tensors (K, ...) into columns (D, K)."""
        return torch.cat(
            [parts[name].flatten(1) if s else parts[name][:, None] for name, s in self.shapes.items()], 1
        ).T


def select(model_func: Any, params: Any) -> dict[str, Tensor]:
    """Name the tensors that `params` means for `model_func`, as the operators document it.

    Tied parameters appear once, under their first name.
    """
    if isinstance(params, Tensor):
        raise TypeError(
            f"`params` must be a list of parameters or a mapping name → tensor, got one tensor of shape "
            f"{tuple(params.shape)}: pass `[tensor]`."
        )
    if isinstance(params, Mapping):
        return _from_mapping(model_func, params)
    if params is None:
        if not isinstance(model_func, nn.Module):
            raise TypeError(
                "`params=None` means every parameter of an nn.Module that requires grad, but `model_func` is "
                f"{type(model_func).__name__}: pass a list of parameters, or a mapping for a callable (params, X) -> f."
            )
        return {name: p for name, p in model_func.named_parameters() if p.requires_grad}
    if not isinstance(params, Iterable):
        raise TypeError(
            f"`params` must be a list of parameters, a mapping name → tensor or None, got {type(params).__name__}."
        )
    return _from_list(model_func, list(params))


def as_dtype(dtype: Any) -> torch.dtype | None:
    """Return the torch dtype that a user's ``dtype=`` names."""
    if dtype is None:
        return None
    names = {torch.float32: "float32", torch.float64: "float64"}
    try:
        name = names[dtype] if isinstance(dtype, torch.dtype) else np.dtype(dtype).name
        return {"float32": torch.float32, "float64": torch.float64}[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"`dtype` must be float32 or float64 (as a name, a NumPy or a torch dtype) or None, got {dtype!r}."
        ) from None


def _from_mapping(model_func: Any, params: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = dict(params)
    _check_each(tensors)
    if isinstance(model_func, nn.Module):
        own = dict(model_func.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        for name, tensor in tensors.items():
            if name not in own:
                raise ValueError(f"`params` names {name!r}, which the model does not have; it has {list(own)}.")
            if own[name].shape != tensor.shape:
                raise ValueError(
                    f"`params[{name!r}]` has shape {tuple(tensor.shape)}, "
                    f"the model's parameter has shape {tuple(own[name].shape)}."
                )
            if first.setdefault(id(own[name]), name) != name:
                raise ValueError(
                    f"`params` has the names {first[id(own[name])]!r} and {name!r}, which are one tied parameter of "
                    "the model: keep one."
                )
    return tensors


def _from_list(model_func: Any, params: list[Any]) -> dict[str, Tensor]:
    names = {}
    if isinstance(model_func, nn.Module):
        names = {id(p): name for name, p in model_func.named_parameters()}
    tensors: dict[str, Tensor] = {}
    seen: dict[int, int] = {}
    for i, p in enumerate(params):
        if not isinstance(p, Tensor | tuple):
            raise TypeError(f"`params[{i}]` must be a torch tensor, got {type(p).__name__}.")
        if isinstance(p, tuple):
            raise TypeError(
                f"`params[{i}]` is a tuple: pass `dict(model.named_parameters())` or a list of the tensors alone."
            )
        if id(p) in seen:
            raise ValueError(f"`params[{i}]` and `params[{seen[id(p)]}]` are the same tensor: pass it once.")
        if names and id(p) not in names:
            raise ValueError(
                f"`params[{i}]`, of shape {tuple(p.shape)}, is not a parameter of the model: take it from "
                "`model.parameters()`, or pass a callable as `model_func`."
            )
        seen[id(p)] = i
        tensors[names.get(id(p), str(i))] = p
    return tensors


def _check_each(tensors: Mapping[str, Any]) -> None:
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`params[{name!r}]` must be a torch tensor, got {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            raise TypeError(f"`params[{name!r}]` has dtype {tensor.dtype}: parameters must be real floating point.")
        if id(tensor) in seen:
            raise ValueError(f"`params` has one tensor under the names {seen[id(tensor)]!r} and {name!r}: keep one.")
        seen[id(tensor)] = name


def _the_device(tensors: Mapping[str, Tensor]) -> torch.device:
    devices = {t.device for t in tensors.values()}
    if len(devices) > 1:
        first = {d: next(name for name, t in tensors.items() if t.device == d) for d in sorted(devices, key=str)}
        listed = ", ".join(f"{name!r} on {d}" for d, name in first.items())
        raise ValueError(f"the parameters live on several devices ({listed}): move the model to one device.")
    return devices.pop()


def _the_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1:
        first = {d: next(name for name, t in tensors.items() if t.dtype == d) for d in sorted(dtypes, key=str)}
        listed = ", ".join(f"{name!r} is {d}" for d, name in first.items())
        raise ValueError(
            f"the parameters have several dtypes ({listed}): pass dtype='float32' or dtype='float64' to compute in."
        )
    only = dtypes.pop()
    try:
        return _COMPUTE[only]
    except KeyError:
        raise ValueError(f"the parameters are {only}: pass dtype='float32' or dtype='float64' to compute in.") from None
