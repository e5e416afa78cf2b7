"""The parameters F is taken with respect to: names, shapes, and the way to and from one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

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
                "`params` must have at least one parameter, got none. Pass the list of parameters, or a model with "
                "parameters that require grad."
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
            raise ValueError(
                f"the parameters must have at least one element, got none in {list(self.tensors)}. Pass others."
            )

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
        for name, t in self.tensors.items():
            if t.device != self.device:
                raise RuntimeError(
                    f"the parameters must be on {self.device}, where the operator was made, got {name!r} on {t.device}."
                    f" Use `op.to('{t.device}')` for the operator there, or move the model back."
                )
        point = {name: t.detach().to(self.dtype, copy=copied) for name, t in self.tensors.items()}
        # A tensor made under inference_mode cannot be differentiated; its copy can.
        return {name: t.clone() if t.is_inference() else t for name, t in point.items()}

    def split(self, V: Tensor) -> dict[str, Tensor]:
        """Split vectors (K, D) into one tensor (K, ...) for each parameter; views where possible."""
        parts = torch.split(V, self._sizes, dim=1)
        return {
            name: part.reshape(len(part), *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Join tensors (K, ...) into vectors (K, D)."""
        return torch.cat([parts[name].flatten(1) if s else parts[name][:, None] for name, s in self.shapes.items()], 1)


def select(model_func: Any, params: Any) -> dict[str, Tensor]:
    """Name the tensors that `params` means for `model_func`, as the operators document it.

    Tied parameters appear once, under their first name.
    """
    if isinstance(params, Tensor | np.ndarray) or hasattr(type(params), "__array__"):
        raise TypeError(
            "`params` must be a list of parameters or a mapping name → tensor, got one "
            f"{'tensor' if isinstance(params, Tensor) else type(params).__name__} of shape {tuple(params.shape)}. Pass "
            "`[tensor]`; if these are inputs X, pass the data by name, `data=(X, y)`."
        )
    if isinstance(params, Dataset | DataLoader):
        raise TypeError(
            "`params` must be a list of parameters or a mapping name → tensor, got the data "
            f"({type(params).__name__}). Pass them by name, `data=...`."
        )
    if isinstance(params, Mapping):
        return _from_mapping(model_func, params)
    if params is None:
        if not isinstance(model_func, nn.Module):
            raise TypeError(
                "`params` must be a list of parameters, or a mapping for a callable (params, X) -> f, got None, and "
                f"`model_func` is not an nn.Module but {type(model_func).__name__}. Pass `list(model.parameters())`."
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
                raise ValueError(f"`params` must have names of the model's parameters, {list(own)}, got {name!r}.")
            if own[name].shape != tensor.shape:
                raise ValueError(
                    f"`params[{name!r}]` must have the shape of the model's parameter, {tuple(own[name].shape)}, got "
                    f"{tuple(tensor.shape)}."
                )
            if first.setdefault(id(own[name]), name) != name:
                raise ValueError(
                    f"`params` must have each parameter once, got the names {first[id(own[name])]!r} and {name!r} of "
                    "one tied parameter. Keep one of them."
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
            cure = "If these are batches (X, y), pass them by name, `data=...`."
            if p and isinstance(p[0], str):
                cure = "Pass `dict(model.named_parameters())` or a list of the tensors alone."
            raise TypeError(f"`params[{i}]` must be a torch tensor, got a tuple. {cure}")
        if id(p) in seen:
            raise ValueError(
                f"`params` must have each tensor once, got the same one as `params[{seen[id(p)]}]` and `params[{i}]`. "
                "Pass it once."
            )
        if names and id(p) not in names:
            raise ValueError(
                f"`params[{i}]` must be a parameter of the model, got a tensor of shape {tuple(p.shape)} that is not. "
                "Take it from `model.parameters()`, or pass a callable as `model_func`."
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
            raise TypeError(f"`params[{name!r}]` must be real floating point, got dtype {tensor.dtype}.")
        if id(tensor) in seen:
            raise ValueError(
                f"`params` must have each tensor once, got one under the names {seen[id(tensor)]!r} and {name!r}. Keep "
                "one of them."
            )
        seen[id(tensor)] = name


def _the_device(tensors: Mapping[str, Tensor]) -> torch.device:
    devices = {t.device for t in tensors.values()}
    if len(devices) > 1:
        first = {d: next(name for name, t in tensors.items() if t.device == d) for d in sorted(devices, key=str)}
        listed = ", ".join(f"{name!r} on {d}" for d, name in first.items())
        raise ValueError(f"the parameters must be on one device, got {listed}. Move the model to one device.")
    return devices.pop()


def _the_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1:
        first = {d: next(name for name, t in tensors.items() if t.dtype == d) for d in sorted(dtypes, key=str)}
        listed = ", ".join(f"{name!r} is {d}" for d, name in first.items())
        raise ValueError(
            f"`dtype` must be given if the parameters have several dtypes, got None, and {listed}. Pass "
            "dtype='float32' or dtype='float64'."
        )
    only = dtypes.pop()
    try:
        return _COMPUTE[only]
    except KeyError:
        raise ValueError(
            f"`dtype` must be given for parameters of dtype {only}, got None. Pass dtype='float32' or dtype='float64'."
        ) from None
