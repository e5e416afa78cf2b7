"""Models, losses and parameters on another device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherops.likelihoods import Likelihood


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


def _on(x: Any, device: torch.device) -> Any:
    """Return a copy whose tensors are on a device; a tensor that is used twice is one tensor still."""
    return _moved(copy.deepcopy(x), device, {})


def _moved(x: Any, device: torch.device, known: dict[int, Any]) -> Any:
    """Move the tensors of modules, likelihoods, mappings and tuples of these, in place where that is possible."""
    if isinstance(x, Tensor):
        if id(x) not in known:
            own = x.detach().to(device)
            known[id(x)] = x, nn.Parameter(own, x.requires_grad) if isinstance(x, nn.Parameter) else own
        return known[id(x)][1]
    if isinstance(x, Mapping):
        return {name: _moved(part, device, known) for name, part in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(_moved(part, device, known) for part in x)
    if isinstance(x, nn.Module):
        for module in x.modules():
            tensors: tuple[dict[str, Any], ...] = module._parameters, module._buffers
            for group in tensors:
                group.update({name: _moved(t, device, known) for name, t in group.items() if t is not None})
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()  # its list of the same parameters
    if isinstance(x, nn.Module | Likelihood):
        held = {name: t for name, t in vars(x).items() if isinstance(t, Tensor)}
        vars(x).update({name: _moved(t, device, known) for name, t in held.items()})
    return x
