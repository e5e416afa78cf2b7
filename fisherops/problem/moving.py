"""Models, losses and parameters on another device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def moved(model_func: Any, loss_func: Any, params: Any, names: list[str], device: torch.device) -> tuple[Any, Any, Any]:
    """Return a model, loss and parameters of some names on a device: the user's module if it is there, else a copy.

    Raises
    ------
    ValueError
        If the model is a callable ``X -> f``, which holds its tensors.
    """
    loss = _on(loss_func, device)
    if isinstance(model_func, nn.Module):
        model, own = model_func, {id(p) for p in model_func.parameters()}
        if any(t.device != device for t in (*model.parameters(), *model.buffers())):
            model = _on(model_func, device)
        if params is None:
            return model, loss, None
        present = dict(model.named_parameters(remove_duplicate=False))
        if isinstance(params, Mapping):
            # Other values than the model's are moved.
            return model, loss, {n: present[n] if id(t) in own else t.detach().to(device) for n, t in params.items()}
        return model, loss, [present[name] for name in names]
    if isinstance(params, Mapping):
        return model_func, loss, {name: t.detach().to(device) for name, t in params.items()}
    raise ValueError(
        "an operator can be moved if its model is an nn.Module, or a callable (params, X) -> f with a mapping `params`"
        ", got a callable X -> f, which holds its parameters itself. Move what it holds, and make the operator anew."
    )


class _Moving(TorchFunctionMode):
    """Puts the copies of tensors, which `copy.deepcopy` makes inside, on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        t, memo = args
        memo[id(t)] = own = t.detach().to(self._device, copy=True)
        return own


def _on(x: Any, device: torch.device) -> Any:
    """Return a copy of a model, or of a loss or several, whose tensors are on a device; ties stay."""
    memo: dict[int, Any] = {}
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple | list) else (x,)
    for module in parts:
        for p in module.parameters() if isinstance(module, nn.Module) else ():
            memo[id(p)] = nn.Parameter(p.detach().to(device, copy=True), p.requires_grad)
    with _Moving(device):
        return copy.deepcopy(x, memo)
