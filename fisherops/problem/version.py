"""Whether anything that products depend on has changed: the only judge of freshness."""

from __future__ import annotations

import dis
import functools
import operator
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherops import _torch
from fisherops.likelihoods import Likelihood

# All entries are compared where there are at most so many, which takes a few microseconds; else some of each tensor.
_FEW_ENTRIES = 2**14
_SAMPLE = 64

# What a module keeps beside its tensors, parts and settings, and no evaluation reads.
BOOKKEEPING = {
    "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
}  # fmt: skip

# Longer lists and mappings are data sets or tables, not settings that an evaluation reads.
LONG = 1000

# Attributes of objects that are no modules, such as configurations: what else they hold may be a whole program.
_SETTINGS = (int, float, complex, str, bytes, dict, list, set, tuple, Tensor, np.ndarray, torch.dtype, type(None))

# Reads torch's counter of changes in place.
_COUNTER = operator.attrgetter("_version")

# One look at a time: a second one would compare with half of a new snapshot.
_LOCK = threading.RLock()

_WATCHED: weakref.WeakSet[Version] = weakref.WeakSet()


def _note_step(optimizer: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for version in list(_WATCHED):
        version.note_step(stepped)


_torch.on_optimizer_step(_note_step)


class Version:
    """The single source of truth for freshness: an integer that grows when the model, its tensors or the loss change.

    Objects are compared by identity: modules with their attributes, parts, modes and hooks; what functions have
    captured; the lists and mappings among these. Tensors are compared by identity, version counter, address, and
    contents: all entries of small models, else 64 of each tensor, which finds what changes no counter (NumPy arrays
    that share memory, ``.data``). Steps of torch's optimizers are noted by a hook, since fused ones leave no mark.

    Parameters
    ----------
    model : callable
        ``() -> objects``, what an evaluation of the model reads, as far as it is known.
    loss : object
        What the likelihood was made from.

    Attributes
    ----------
    structure : int
        Grows when modules, their modes or their hooks change.
    loss : int
        Grows when the loss changes.
    """

    def __init__(self, model: Callable[[], Iterable[Any]], loss: Any) -> None:
        self.number = self.structure = self.loss = 0
        self._watches = _Watch(model), _Watch(functools.partial(tuple, (loss,)))
        self._stepped = False
        _WATCHED.add(self)

    def look(self) -> int:
        """Return the number, after one look at everything."""
        model, loss = self._watches
        with _LOCK:
            try:
                if not (self._stepped or model.changed() or loss.changed()):
                    return self.number
            except RuntimeError:  # another thread puts things in place for an evaluation
                pass
        # What differs may be such things, so the evaluation is waited for.
        with _torch.EVALUATION, _LOCK:
            if model.changed() or self._stepped:
                before, self._stepped = model.structure, False
                model.renew()
                self.number += 1
                self.structure += model.structure != before
            if loss.changed():
                loss.renew()
                self.number += 1
                self.loss += 1
            return self.number

    def absorb(self) -> None:
        """Take what an evaluation has changed or made known, such as counters of functions, as the present state."""
        with _LOCK:
            model = self._watches[0]
            if model.grew() or model.changed():
                model.renew()

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the model is known to hold."""
        return self._watches[0].tensors

    def note_step(self, parameters: set[int]) -> None:
        """Note that an optimizer has changed the parameters with these identities."""
        self._stepped = self._stepped or not parameters.isdisjoint(self._watches[0].tensor_ids)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _WATCHED.add(self)


class _Watch:
    """A snapshot of what some objects hold. What it compares by identity it refers to, so no address is used again."""

    def __init__(self, roots: Callable[[], Iterable[Any]]) -> None:
        self._roots = roots
        self.renew()

    def renew(self) -> None:
        """Take the present state as the known one."""
        self._readers: list[Callable[[], Iterable[Any]]] = []
        self._empty: list[Any] = []
        self.tensors: list[Tensor] = []
        structure: list[Any] = []
        arrays: list[Tensor] = []  # of NumPy, by tensors that share their memory
        held: list[Any] = []
        seen: set[int] = set()
        waiting = list(self._roots())
        self._count = roots = len(waiting)
        for number, x in enumerate(waiting):
            if id(x) in seen:
                continue
            seen.add(id(x))
            if isinstance(x, Tensor):
                self.tensors.append(x)
                continue
            if isinstance(x, np.ndarray):
                arrays += _shared(x)
                continue
            if isinstance(x, dict | list | set) and not x:
                self._empty.append(x)  # most mappings of modules, which are looked at fastest so
                continue
            if isinstance(x, nn.Module):
                structure += [x, type(x), x.training, *x._modules.values(), *x._forward_hooks, *x._forward_pre_hooks]
            for reader, follows in _readers(x, number < roots):
                self._readers.append(reader)
                found = list(reader())
                held += found
                waiting += found if follows is None else filter(follows, found)
            if isinstance(x, nn.Module):
                own = vars(x)
                seen |= {id(own[name]) for name in BOOKKEEPING if name in own}
        self._held, self._seen = waiting + held, seen
        self._ids = self._read()
        self._marks = self._read_marks()
        self.tensor_ids = set(map(id, self.tensors))
        contents = self.tensors + arrays
        few = sum(t.numel() for t in contents) <= _FEW_ENTRIES
        views: dict[Any, list[Tensor]] = {}
        for t in contents:
            view = _torch.memory_of(t, _FEW_ENTRIES if few else _SAMPLE)
            if view is not None:
                views.setdefault((view.dtype, view.device), []).append(view)
        self._views = list(views.values())
        self._contents = [torch.cat(group) for group in self._views]
        self._answers: list[_torch.Arrival] = []
        self._differ = False
        self.structure = tuple(map(id, structure))
        """Identities of modules, their modes, parts and hooks; what it names is referred to by the snapshot."""

    def grew(self) -> bool:
        """Whether more objects are to be compared, such as modules that an evaluation was seen to call."""
        roots = list(self._roots())
        return len(roots) > self._count and any(
            not isinstance(x, nn.Module) or id(x) not in self._seen for x in roots[self._count :]
        )

    def changed(self) -> bool:
        """Whether anything differs from the snapshot."""
        return (
            self._read() != self._ids
            or any(self._empty)
            or self._read_marks() != self._marks
            or (bool(self._views) and self._contents_differ())
        )

    def _read(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(operator.call, self._readers))))

    def _read_marks(self) -> Sequence[int | None]:
        try:
            return [*map(_COUNTER, self.tensors), *map(Tensor.data_ptr, self.tensors)]
        except (AttributeError, RuntimeError, NotImplementedError):  # some tensor has no counter, or no memory
            tensors = self.tensors
            return [*map(_torch.version_of, tensors), *map(_torch.address_of, tensors)]

    def _contents_differ(self) -> bool:
        """Whether contents differ, or did at an earlier look: on an accelerator an answer is there only once."""
        # On an accelerator the answer would be waited for: those of earlier looks are read when they have arrived.
        if self._answers and _torch.is_capturing():
            return self._differ
        while self._answers and self._answers[0].is_here:
            self._differ = bool(self._answers.pop(0).read()) or self._differ
        for group, known in zip(self._views, self._contents, strict=True):
            if known.device.type == "cpu":
                self._differ = self._differ or not torch.equal(torch.cat(group), known)
            elif not _torch.is_capturing():
                self._answers.append(_torch.Arrival((torch.cat(group) != known).any()))
        return self._differ

    def __getstate__(self) -> dict[str, Any]:
        return {"_roots": self._roots}  # identities and addresses mean nothing elsewhere

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.renew()


Reader = Callable[[], Iterable[Any]]
Follows = Callable[[Any], bool]


def _readers(x: Any, root: bool) -> Iterator[tuple[Reader, Follows | None]]:
    """Return functions that list what an object holds at present, as far as evaluations may read it.

    Each comes with a function that says which of these objects are looked into; None means all.
    """
    if isinstance(x, dict | list | set | tuple | frozenset):
        if len(x) <= LONG:
            yield x.values if isinstance(x, dict) else x.__iter__, None
    elif isinstance(x, types.FunctionType):
        if not (x.__module__ or "").startswith("torch."):
            yield functools.partial(_captured, x), None
            own, names = x.__globals__, _names_of_globals(x.__code__)
            module = None if root else x.__module__
            yield lambda: map(own.get, names), functools.partial(_is_setting, module=module)
    elif isinstance(x, types.MethodType):
        yield lambda: (x.__self__, x.__func__), None
        yield from _readers(x.__self__, True)
    elif isinstance(x, functools.partial):
        yield lambda: (x.func, *x.args, *x.keywords.values()), None
    elif isinstance(x, nn.Module | Likelihood) or (root and hasattr(x, "__dict__") and not isinstance(x, type)):
        yield vars(x).values, None
        if isinstance(x, nn.Module) and not type(x).__module__.startswith("torch."):
            yield lambda: (type(x), type(x).forward), None
    elif hasattr(x, "__dict__") and _has_settings(x):
        yield vars(x).values, lambda y: isinstance(y, _SETTINGS)


def _is_setting(x: Any, module: str | None) -> bool:
    """Whether a global variable of a function is looked into; other functions only if they are of a module."""
    if isinstance(x, types.FunctionType):
        return module is None or x.__module__ == module
    return isinstance(x, nn.Module | Tensor | np.ndarray | dict | list) or (hasattr(x, "__dict__") and _has_settings(x))


def _has_settings(x: Any) -> bool:
    """Whether an object with attributes may configure a model: no class, no part of Python or torch."""
    if isinstance(x, type | types.ModuleType | types.FunctionType):
        return False
    return type(x).__module__.partition(".")[0] not in ("torch", "logging")


def _shared(x: np.ndarray[Any, Any]) -> list[Tensor]:
    """Return a tensor that shares the memory of an array, or none if it cannot change or torch has no such dtype."""
    try:
        return [torch.from_numpy(x)] if x.flags.writeable else []
    except (TypeError, ValueError):  # other dtypes, negative strides
        return []


def _captured(function: types.FunctionType) -> list[Any]:
    """List the captured variables and the defaults of a function."""
    found: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            found.append(None)
    return found


@functools.lru_cache(1000)
def _names_of_globals(code: types.CodeType) -> tuple[str, ...]:
    """Name the global variables that a function reads, and those in it."""
    own = [x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names_of_globals(part)]
    return tuple(dict.fromkeys(own + inner))
