"""The model as a function of its parameters, with nothing of the user's changed."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, dropout
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from fisherops.problem.parameters import Parameters
from fisherops.problem.version import BOOKKEEPING, LONG


class ModelFunction:
    """A model as ``(point, X) -> f``, where `point` maps parameter names to the values to use."""

    is_divided = False
    """Whether the parameters are divided among processes, so that their values are there during evaluations only."""
    converts: bool
    """Whether the model is evaluated in another precision than its own, so that inputs must be converted too."""

    def __init__(self) -> None:
        self._called: set[nn.Module] = set()
        """Modules that evaluations were seen to call."""
        self.substitutes: dict[int, Tensor] = {}
        """By identity, the tensors that modules find in place of their own during an evaluation."""

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        """Evaluate the model; what it stores in its modules is put back."""
        raise NotImplementedError

    def leaves(self, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that stand for the parameters in the graph of an evaluation, as its `point`."""
        return {name: value.detach().requires_grad_() for name, value in point.items()}

    def tensors(self) -> list[Tensor]:
        """Return all tensors that the model is known to use."""
        raise NotImplementedError

    def plain(self, X: Any) -> Any:  # noqa: ARG002 (only those that can override it)
        """Evaluate the model with the user's own parameters, as the user does; None if it holds none."""
        return None

    def watched(self) -> list[Any]:
        """Return the objects that evaluations read, as far as they are known."""
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the model no longer has the parameters that were given."""

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

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_called": set(), "substitutes": {}}


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
        return _ModuleFunction(model_func, parameters)
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
        super().__init__()
        self._module, self._parameters = module, parameters
        own = dict(module.named_parameters(remove_duplicate=False))
        self._chosen = {name: own[name] for name in parameters.tensors}
        self._dtype = parameters.dtype

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        chosen = {id(p): point[name] for name, p in self._chosen.items()}
        converts = self.converts

        def substitute(t: Tensor) -> Tensor:
            own = chosen.get(id(t))
            if own is not None:
                return own
            # Frozen parameters are detached so that no graph is built for them; what layers may update in place is
            # copied.
            t = t.detach() if isinstance(t, nn.Parameter) else _copied(t)
            return t.to(self._dtype) if converts and t.is_floating_point() else t

        with _Restoring(self._module.modules(), substitute) as self.substitutes:
            return self._module(X)

    def plain(self, X: Any) -> Any:
        with _Restoring(self._module.modules()):
            return self._module(X)

    @property
    def converts(self) -> bool:  # type: ignore[override]
        """Asked anew, because the user may convert the model."""
        floating = self.tensors() if self._parameters.asks_dtype else self._chosen.values()
        return self._parameters.converts or any(t.dtype != self._dtype for t in floating if t.is_floating_point())

    def tensors(self) -> list[Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]

    def watched(self) -> list[Any]:
        return [self._module, *self._parameters.tensors.values()]

    def check_unchanged(self) -> None:
        own = dict(self._module.named_parameters(remove_duplicate=False))
        replaced = [name for name, p in self._chosen.items() if own.get(name) is not p]
        if replaced:
            device = own[replaced[0]].device if replaced[0] in own else self._parameters.device
            raise RuntimeError(
                f"the model's parameters {replaced} are not those that the operator was made with: they were replaced "
                "by other tensors"
                + (
                    ". Make a new operator (parameters that are changed in place are followed)."
                    if device == self._parameters.device
                    else f" on {device}, and the operator is on {self._parameters.device}. Use `op.to('{device}')`."
                )
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


class _PureFunction(ModelFunction):
    """A callable ``(params, X) -> f``."""

    def __init__(self, function: Callable[[dict[str, Tensor], Any], Any], parameters: Parameters) -> None:
        super().__init__()
        self._function, self._parameters = function, parameters
        self.converts = parameters.converts

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        with _Restoring(self._called, _copied_unless_parameter, self._called) as self.substitutes:
            return self._function(dict(point), X)

    def tensors(self) -> list[Tensor]:
        return list(self._parameters.tensors.values())

    def watched(self) -> list[Any]:
        return [self._function, *self.tensors(), *self._called]


class _ClosureFunction(ModelFunction):
    """A callable ``X -> f`` that holds its parameters itself, called with other values in their place."""

    converts = False

    def __init__(self, function: Callable[[Any], Any], parameters: Parameters) -> None:
        super().__init__()
        self._function, self._parameters = function, parameters

    def plain(self, X: Any) -> Any:
        with _Restoring(self._called, called=self._called):
            return self._function(X)

    def tensors(self) -> list[Tensor]:
        return list(self._parameters.tensors.values())

    def watched(self) -> list[Any]:
        return [self._function, *self.tensors(), *self._called]

    def __call__(self, point: Mapping[str, Tensor], X: Any) -> Any:
        own = self._parameters.tensors
        leaves = {id(t): point[name] for name, t in own.items()}

        def substitute(t: Tensor) -> Tensor:
            return t if id(t) in leaves else _copied_unless_parameter(t)

        # While a graph is built, tensors that escape the substitution must show in it, see Evaluation.
        hidden = [t for t in own.values() if torch.is_grad_enabled() and not t.requires_grad]
        with ExitStack() as stack:
            for t in hidden:
                stack.callback(t.requires_grad_, False)
                t.requires_grad_()
            self.substitutes = stack.enter_context(_Restoring(self._called, substitute, self._called))
            stack.enter_context(_Substitution(leaves))
            return self._function(X)


def _copied(t: Tensor) -> Tensor:
    # A tensor with a history keeps it, so that parameters behind it are found in the graph of the outputs.
    return t.clone() if t.grad_fn is not None else t.detach().clone()


def _copied_unless_parameter(t: Tensor) -> Tensor:
    return t if isinstance(t, nn.Parameter) else _copied(t)


class _Restoring:
    """Lets modules work with other tensors inside, and puts back what they held, by identity, afterwards.

    This covers parameters and buffers under every name and module that has them, plain attributes, and lists and
    mappings among these. (`torch.func.functional_call` leaves its own tensors behind in modules with two names.)

    Parameters
    ----------
    modules : iterable of nn.Module
        Those known before the evaluation.
    substitute : callable
        ``tensor -> tensor``, what modules find in place of each of theirs.
    called : set of nn.Module
        Other modules that are called inside are added to it; they are treated likewise from their first call on.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module] = (),
        substitute: Callable[[Tensor], Tensor] = _copied_unless_parameter,
        called: set[nn.Module] | None = None,
    ) -> None:
        self._modules, self._substitute, self._called = list(modules), substitute, called
        self._hook: Any = None
        self._before: list[tuple[Any, Any]] = []
        self._known: set[nn.Module] = set()
        self._new: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}
        # Tensors that parameters and buffers of modules that were first seen when called stand for, by module's dict.
        self._swapped: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []

    def __enter__(self) -> dict[int, Tensor]:
        try:
            self._enter()
        except BaseException:
            self.__exit__()
            raise
        return self._made

    def _enter(self) -> None:
        for module in self._modules:
            self._known.add(module)
            for holder in _holders(vars(module)):
                self._keep(holder)
            if isinstance(module, torch.jit.ScriptModule):  # whose tensors are held elsewhere
                self._before += [(own, dict(own.items())) for own in (module._parameters, module._buffers)]
        for holder, before in self._before:
            for key, value in before.items() if isinstance(before, dict) else enumerate(before):
                if isinstance(value, Tensor):
                    holder[key] = self._other(value)
        if self._called is not None:
            thread = threading.get_ident()

            def first_call(module: nn.Module, _inputs: Any) -> None:
                if threading.get_ident() == thread and module not in self._known:
                    self._enter_called(module)

            self._hook = register_module_forward_pre_hook(first_call)

    def _enter_called(self, module: nn.Module) -> None:
        # Its tensors may be those of a `functional_call` around it, which puts its own back before we do: only copies
        # of ours are put back.
        assert self._called is not None
        self._known.add(module)
        self._called.add(module)
        own = vars(module)
        for holder in _holders(own):
            if holder is not own["_parameters"] and holder is not own["_buffers"]:
                self._keep(holder)
        buffers = own["_buffers"]
        for name, t in list(buffers.items()):
            if t is not None:
                buffers[name] = self._other(t)
                self._swapped.append((buffers, name, buffers[name], t))

    def _other(self, t: Tensor) -> Tensor:
        if id(t) not in self._new:
            new = self._new[id(t)] = self._substitute(t)
            self._made[id(new)] = new
        return self._new[id(t)]

    def __exit__(self, *_: object) -> None:
        self._made.clear()
        if self._hook is not None:
            self._hook.remove()
        for holder, name, ours, before in self._swapped:
            if holder.get(name) is ours:
                holder[name] = before
        for holder, before in self._before:
            if isinstance(before, dict) and not isinstance(holder, dict):  # of a scripted module
                for name, value in before.items():
                    holder[name] = value
            elif isinstance(before, dict):
                if (
                    len(holder) != len(before)
                    or not all(map(operator.is_, holder.values(), before.values()))
                    or (holder.keys() != before.keys())
                ):
                    holder.clear()
                    holder.update(before)
            elif len(holder) != len(before) or not all(map(operator.is_, holder, before)):
                holder[:] = before

    def _keep(self, holder: Any) -> None:
        self._before.append((holder, dict(holder) if isinstance(holder, dict) else list(holder)))


def _holders(own: dict[str, Any]) -> list[Any]:
    """List the mappings and lists in which a module keeps things: its attributes, and those among these."""
    found: list[Any] = [own]
    seen: set[int] = set()
    for holder in found:
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if (
                isinstance(value, _HOLDERS)
                and key not in BOOKKEEPING
                and value is not own
                and id(value) not in seen
                and len(value) <= LONG
            ):
                seen.add(id(value))
                found.append(value)
    return found


_HOLDERS = (dict, list)


class _Substitution(TorchFunctionMode):
    """Replaces tensors, known by identity, in the arguments of every torch function that is called."""

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = self._replacements
        for x in args:
            if id(x) in known or isinstance(x, tuple | list | dict):
                args = self._replace(args)
                break
        return func(*args, **self._replace(kwargs)) if kwargs else func(*args)

    def _replace(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._replacements.get(id(x), x)
        if isinstance(x, tuple | list) and type(x) in (tuple, list):
            return type(x)(self._replace(item) for item in x)
        if type(x) is dict:
            return {key: self._replace(item) for key, item in x.items()}
        return x


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
