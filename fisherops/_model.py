"""The model as a function of its parameters, with nothing of the user's changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import batchnorm, dropout
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from fisherops._params import Parameters

Function = Callable[[Mapping[str, Tensor], Any], Any]


def as_function(model_func: Any, parameters: Parameters, functional: bool) -> Function:
    """Return ``(point, X) -> f``, where `point` maps parameter names to the values to use.

    Parameters
    ----------
    model_func : callable
        What the user passed.
    parameters : Parameters
        The parameters that `point` will replace.
    functional : bool
        Whether `model_func`, if it is no module, takes the parameters as its first argument.

    Raises
    ------
    TypeError
        If `model_func` cannot be called.
    ValueError
        If a plain callable is to be evaluated in another precision than its parameters have.
    """
    if isinstance(model_func, nn.Module):
        return _ModuleFunction(model_func, parameters)
    if not callable(model_func):
        raise TypeError(
            f"`model_func` must be an nn.Module or a callable, got {type(model_func).__name__}. "
            "Pass the model, a callable X -> f, or with `params` a mapping a callable (params, X) -> f."
        )
    if functional:
        return lambda point, X: model_func(dict(point), X)
    if parameters.converts:
        raise ValueError(
            f"to compute in {parameters.dtype} the model must be an nn.Module or a callable (params, X) -> f with "
            "`params` a mapping: the tensors that a callable X -> f holds cannot be converted from outside."
        )
    return _ClosureFunction(model_func, parameters)


class _ModuleFunction:
    """A module called with other values for its parameters."""

    def __init__(self, module: nn.Module, parameters: Parameters) -> None:
        self._module = module
        self._dtype = parameters.dtype
        self._converts = parameters.converts
        own = dict(module.named_parameters(remove_duplicate=False))
        chosen = {id(own[name]) for name in parameters.tensors}
        self._frozen = {name: p for name, p in module.named_parameters() if id(p) not in chosen}

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        # The frozen ones are detached so that no graph is built for them, and buffers of a module in training
        # mode are copied because layers update them in place.
        values = {name: self._convert(p.detach()) for name, p in self._frozen.items()}
        training = any(module.training for module in self._module.modules())
        for name, buffer in self._module.named_buffers():
            values[name] = self._convert(buffer.clone() if training else buffer)
        return torch.func.functional_call(self._module, values | dict(point), (X,))

    def _convert(self, t: Tensor) -> Tensor:
        return t.to(self._dtype) if self._converts and t.is_floating_point() else t


class _ClosureFunction:
    """A callable ``X -> f`` that holds its parameters itself, called with other values in their place."""

    def __init__(self, function: Callable[[Any], Any], parameters: Parameters) -> None:
        self._function = function
        self._names = {id(t): name for name, t in parameters.tensors.items()}

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        with _Substitution({key: point[name] for key, name in self._names.items()}):
            return self._function(X)


class _Substitution(TorchFunctionMode):
    """Replaces tensors, known by identity, in the arguments of every torch function that is called."""

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*self._replace(args), **self._replace(kwargs or {}))

    def _replace(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._replacements.get(id(x), x)
        if isinstance(x, tuple | list) and type(x) in (tuple, list):
            return type(x)(self._replace(item) for item in x)
        if type(x) is dict:
            return {key: self._replace(item) for key, item in x.items()}
        return x


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Evaluate attention and recurrent layers by elementary operations, which can be differentiated in every mode."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # By the flag alone: the context managers of these backends also set precisions, with warnings.
        for backend in (torch.backends.mkldnn, torch.backends.cudnn):
            stack.callback(setattr, backend, "enabled", getattr(backend, "enabled"))  # noqa: B009
            setattr(backend, "enabled", False)  # noqa: B010 (the attribute is unknown to type checkers)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield


@contextmanager
def fixed_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Fix torch's global random numbers inside, and leave their state untouched outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def watch_modules() -> Iterator[list[tuple[nn.Module, str]]]:
    """List the modules called inside that make outputs random or let a datum's output depend on its batch."""
    found: list[tuple[nn.Module, str]] = []

    def look(module: nn.Module, _inputs: Any) -> None:
        fault = _fault(module)
        if fault is not None and all(module is not known for known, _ in found):
            found.append((module, fault))

    handle = register_module_forward_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def _fault(module: nn.Module) -> str | None:
    if isinstance(module, batchnorm._BatchNorm):
        if module.training:
            return "couples the data of a batch"
        if module.running_mean is None:
            return "couples the data of a batch, having no running statistics"
    if not module.training:
        return None
    random = (
        (isinstance(module, dropout._DropoutNd) and module.p > 0)
        or (isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1)
        or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
        or isinstance(module, nn.RReLU)
    )
    return "is random" if random else None


def module_names(model_func: Any, modules: list[nn.Module]) -> list[str]:
    """Return names for modules: the qualified name where `model_func` is a module, and the class."""
    known = {}
    if isinstance(model_func, nn.Module):
        known = {id(m): name for name, m in model_func.named_modules()}
    return [f"{known.get(id(m)) or 'model'} ({type(m).__name__})" for m in modules]
