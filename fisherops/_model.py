"""The model as a function of its parameters, with nothing of the user's changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import batchnorm, dropout
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from fisherops._params import Parameters
from fisherops._randomness import fixed_randomness
from fisherops._sharding import is_sharded, reshard

# Torch's random state, forward-mode level and kernel flags belong to the process, not to a thread.
_LOCK = threading.RLock()


class ModelFunction:
    """A model as ``(point, X) -> f``, where `point` maps parameter names to the values to use."""

    converts: bool
    """Whether the model is evaluated in another precision than its own, so that inputs must be converted too."""

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        """Evaluate the model; buffers that it updates are left as they were."""
        raise NotImplementedError

    def leaves(self, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that stand for the parameters in the graph of an evaluation, as its `point`."""
        return detached_leaves(point)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that the model is known to use."""
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the model no longer has the parameters that were given."""

    def state(self) -> tuple[Any, ...]:
        """Return what is equal as long as no tensor that the model is known to use was replaced or changed in place.

        Nor is a module replaced or set to another mode.
        """
        raise NotImplementedError

    @contextmanager
    def refuse_faults(self) -> Iterator[None]:
        """Raise ValueError if a layer evaluated inside is random or couples the data of a batch."""
        thread = threading.get_ident()

        def look(module: nn.Module, _inputs: Any) -> None:
            fault = _fault(module) if threading.get_ident() == thread else None
            if fault is not None:
                raise ValueError(_describe_faults({f"a {type(module).__name__}": fault}))

        handle = register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()


def detached_leaves(point: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the values of a point that gradients can be taken with respect to."""
    return {name: value.detach().requires_grad_() for name, value in point.items()}


def as_function(model_func: Any, parameters: Parameters, functional: bool) -> ModelFunction:
    """Return the model as a function of its parameters.

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
    if isinstance(model_func, torch.jit.ScriptModule | nn.DataParallel):
        raise TypeError(
            f"`model_func` is a {type(model_func).__name__}, which cannot be evaluated at other parameter values: pass "
            "the module that it was made from."
        )
    if isinstance(model_func, nn.Module):
        sharded = any(map(is_sharded, parameters.tensors.values()))
        return (_ShardedModule if sharded else _ModuleFunction)(model_func, parameters)
    if not callable(model_func):
        raise TypeError(
            f"`model_func` must be an nn.Module or a callable, got {type(model_func).__name__}. "
            "Pass the model, a callable X -> f, or with `params` a mapping a callable (params, X) -> f."
        )
    if functional:
        return _PureFunction(model_func, parameters)
    if parameters.converts:
        raise ValueError(
            f"to compute in {parameters.dtype} the model must be an nn.Module or a callable (params, X) -> f with "
            "`params` a mapping: the tensors that a callable X -> f holds cannot be converted from outside."
        )
    return _ClosureFunction(model_func, parameters)


class _ModuleFunction(ModelFunction):
    """A module called with other values for its parameters."""

    def __init__(self, module: nn.Module, parameters: Parameters) -> None:
        self._module = module
        self._dtype = parameters.dtype
        own = dict(module.named_parameters(remove_duplicate=False))
        self._chosen = {name: own[name] for name in parameters.tensors}
        self.converts = parameters.converts or any(p.dtype != self._dtype for p in self._chosen.values())

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        # Frozen parameters are detached so that no graph is built for them, and buffers copied because layers may
        # update them in place.
        chosen = {id(p) for p in self._chosen.values()}
        values = {name: self._convert(p.detach()) for name, p in self._module.named_parameters() if id(p) not in chosen}
        values |= {name: self._convert(buffer.clone()) for name, buffer in self._module.named_buffers()}
        with substituted(self._module, values | dict(point)):
            return self._module(X)

    def state(self) -> tuple[Any, ...]:
        return tuple(map(_state_of, self._module.modules()))

    def tensors(self) -> list[Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]

    def check_unchanged(self) -> None:
        own = dict(self._module.named_parameters(remove_duplicate=False))
        replaced = [name for name, p in self._chosen.items() if own.get(name) is not p]
        if replaced:
            raise RuntimeError(
                f"the model's parameters {replaced} are not those that the operator was made with: they were replaced "
                "by other tensors. Make a new operator (parameters that are changed in place are followed)."
            )

    @contextmanager
    def refuse_faults(self) -> Iterator[None]:
        faults = {
            f"{name or 'model'} ({type(module).__name__})": fault
            for name, module in self._module.named_modules()
            if (fault := _fault(module)) is not None
        }
        if faults:
            raise ValueError(_describe_faults(faults))
        yield

    def _convert(self, t: Tensor) -> Tensor:
        return t.to(self._dtype) if self.converts and t.is_floating_point() else t


@contextmanager
def substituted(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module use other values for parameters and buffers, under every name that it has for each of them.

    Afterwards the module has its own tensors again. `torch.func.functional_call` does not ensure that: it exchanges the
    tensors once for each name, so a module that is registered under two names keeps the substitutes.

    Parameters
    ----------
    module : torch.nn.Module
    values : mapping of str to torch.Tensor
        Values by names of parameters and buffers; one name is enough for a tensor that has several.
    """
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    replacements = {id(named[name]): value for name, value in values.items()}
    # `modules` lists each module once. The entries of its dictionaries are exchanged because nn.Module refuses to set
    # an attribute that is a Parameter to a plain tensor, and because subclasses define other ways to set attributes.
    entries: list[tuple[Any, str, Any]] = [
        (owner, name, own)
        for part in module.modules()
        for owner in (part._parameters, part._buffers)
        for name, own in owner.items()
        if id(own) in replacements
    ]
    try:
        for owner, name, own in entries:
            owner[name] = replacements[id(own)]
        yield
    finally:
        for owner, name, own in entries:
            owner[name] = own


class _ShardedModule(_ModuleFunction):
    """A module whose parameters `fully_shard` divided: it gathers them itself, group by group, at their own values."""

    def __init__(self, module: nn.Module, parameters: Parameters) -> None:
        super().__init__(module, parameters)
        if self.converts:
            raise NotImplementedError("sharded parameters are computed in their own precision: leave out `dtype`.")
        from torch.distributed.fsdp import FSDPModule

        self._modules: set[nn.Module] = set()
        self._gathered: dict[str, Tensor] = {}
        for prefix, part in module.named_modules():
            if not isinstance(part, FSDPModule):
                continue
            assert isinstance(part, nn.Module)
            part.unshard()  # the tensors with all values, which last; their memory does not
            for name, p in part.named_parameters(prefix, remove_duplicate=False):
                if name in self._chosen and not is_sharded(p):
                    self._gathered.setdefault(name, p)
            part.reshard()
        missing = [name for name, p in self._chosen.items() if is_sharded(p) and name not in self._gathered]
        if missing:
            raise NotImplementedError(
                f"the parameters {missing[:3]} are DTensors that `fully_shard` did not make: these are taken alone."
            )

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:  # noqa: ARG002 (at its own values)
        with _buffers_restored(self._modules):
            output = self._module(X)
        reshard(self._module)
        return output

    def leaves(self, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._gathered[name] for name in point}  # in the order of the parameters


class _PureFunction(ModelFunction):
    """A callable ``(params, X) -> f``."""

    def __init__(self, function: Callable[[dict[str, Tensor], Any], Any], parameters: Parameters) -> None:
        self._function = function
        self._tensors = list(parameters.tensors.values())
        self._modules: set[nn.Module] = set()
        self.converts = parameters.converts

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        with _buffers_restored(self._modules):
            return self._function(dict(point), X)

    def state(self) -> tuple[Any, ...]:
        return _versions(self._tensors), *map(_state_of, self._modules)

    def tensors(self) -> list[Tensor]:
        return self._tensors


class _ClosureFunction(ModelFunction):
    """A callable ``X -> f`` that holds its parameters itself, called with other values in their place."""

    converts = False

    def __init__(self, function: Callable[[Any], Any], parameters: Parameters) -> None:
        self._function = function
        self._names = {id(t): name for name, t in parameters.tensors.items()}
        self._tensors = list(parameters.tensors.values())
        self._modules: set[nn.Module] = set()

    def state(self) -> tuple[Any, ...]:
        return _versions(self._tensors), *map(_state_of, self._modules)

    def tensors(self) -> list[Tensor]:
        return self._tensors

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        # While a graph is built, tensors that escape the substitution must show in it, see BatchJacobian.build_graph.
        hidden = [t for t in self._tensors if torch.is_grad_enabled() and not t.requires_grad]
        with ExitStack() as stack:
            for t in hidden:
                stack.callback(t.requires_grad_, False)
                t.requires_grad_()
            stack.enter_context(_buffers_restored(self._modules))
            stack.enter_context(_Substitution({key: point[name] for key, name in self._names.items()}))
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
def _buffers_restored(modules: set[nn.Module]) -> Iterator[None]:
    """Let every module called inside work on copies of its buffers, and note which they are."""
    thread = threading.get_ident()
    originals: dict[nn.Module, dict[str, Tensor]] = {}

    def swap(module: nn.Module, _inputs: Any) -> None:
        if threading.get_ident() == thread and module not in originals:
            modules.add(module)
            originals[module] = dict(module.named_buffers(recurse=False))
            for name, buffer in originals[module].items():
                setattr(module, name, buffer.clone())

    handle = register_module_forward_pre_hook(swap)
    try:
        yield
    finally:
        handle.remove()
        for module, buffers in originals.items():
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


def _versions(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    return tuple((id(t), None if t.is_inference() else t._version) for t in tensors if t is not None)


def _state_of(module: nn.Module) -> tuple[Any, ...]:
    own = (*module._parameters.values(), *module._buffers.values())
    return id(module), module.training, _versions(own)


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
def isolated(device: torch.device) -> Iterator[None]:
    """Evaluate models inside as if nothing else ran in the process, and leave no trace.

    The global random numbers are fixed inside and restored afterwards; inference mode and autocasting of the caller do
    not reach in; other threads wait.
    """
    with (
        _LOCK,
        fixed_randomness(device, 0),
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        _unvalidated_distributions(),
    ):
        yield


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


def _fault(module: nn.Module) -> str | None:
    """Say what makes outputs of a module no function of the parameters and one datum, and how to mend it."""
    if isinstance(module, batchnorm._BatchNorm):
        if module.training:
            return "couples the data of a batch: call `model.eval()`"
        if module.running_mean is None:
            return "couples the data of a batch, having no running statistics: use track_running_stats=True"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "rewrites its weights in each evaluation: set its `max_norm` to None"
    if not module.training:
        return None
    random = (
        (isinstance(module, dropout._DropoutNd) and module.p > 0)
        or (isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1)
        or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
        or isinstance(module, nn.RReLU)
    )
    return "is random: call `model.eval()`" if random else None


def _describe_faults(faults: Mapping[str, str]) -> str:
    listed = "; ".join(f"{name} {fault}" for name, fault in faults.items())
    return (
        f"the Fisher is not defined for this model as it is. {listed}. Or pass check_deterministic=False to take the "
        "model as it is, with the same random numbers in every evaluation."
    )
