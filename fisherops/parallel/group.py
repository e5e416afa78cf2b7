"""Collectives of a process group, inside of steps that all ranks are seen to do."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import pickle
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fisherops._checks import first_line
from fisherops._packing import as_bytes, from_tensors, to_tensors
from fisherops._processes import Processes, Result
from fisherops._sizes import SIZES, Sizes
from fisherops._torch import judge_later
from fisherops.parallel.abort import Abort, RankError, named

# Seconds between looks at whether another rank has raised the failure flag, at first and at most.
_FIRST_LOOK, _LOOKS = 0.1, 1.0

# What ranks compare, in the words of an error; other names stand as they are.
_TEXTS = {
    "name": "the operator",
    "dtype": "the dtype",
    "loss": "the loss",
    "loss_options": "the checksum of the loss's options",
    "shapes": "the shapes of the parameters",
    "parameters": "the checksum of the parameters",
    "tensors": "the checksum of all parameters and buffers of the model",
    "present_tensors": "the checksum of the parameters and buffers",
    "sample_weight": "the checksum of `sample_weight`",
    "columns": "the number of columns",
    "vectors": (
        "the checksum of the vectors (SciPy's solvers draw others on each rank unless v0 or rng is given; "
        "ranks with other processors or numbers of threads round differently)"
    ),
    "is_current": "whether the parameters are those of the last product",
    "repeats": "whether the model is checked again, and whether the divisor of the loss is summed again",
}


class Group(Processes):
    """The processes of a torch.distributed group, which share an operator.

    They talk over a group of their own, so that ours and the user's collectives do not meet. It is made by all ranks of
    the user's group together, once; `group_of` finds it again.

    A rank that waits looks now and then, in torch.distributed's store, whether another has raised the failure flag:
    because something failed there, because a connection broke, or because it has waited too long. Then all that are
    alive report, and end with an error that names those that did not.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        The user's.
    device : torch.device
        Where the tensors are.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.leads = self.rank == 0
        self._device = device
        self._doing = "the first operator of the group"
        self._announced: dict[str, Any] | None = None
        self._mark: Tensor | None = None
        self._operators = 0
        on_cpu = device.type == "cpu" or "gloo" in dist.get_backend(group)
        # Torch has no public names for what every group has: a name, and a time limit.
        backend = group._get_backend(torch.device("cpu") if on_cpu else device)
        self._timeout: float = backend.options._timeout.total_seconds()
        self._abort = Abort(f"fisherops/{group.group_name}", self.rank, self.size, self._timeout)
        missing = self._abort.missing("made", self._timeout)
        if missing:
            raise RankError(
                f"{named(missing)} made no operator within {self._timeout:g} s, and operators with a process group "
                "are made by all of its ranks together."
            )
        # Not by `new_group`, whose names depend on what other groups a process is in. Its limit is later than ours,
        # because we can name the ranks for which we waited.
        limit, store = timedelta(seconds=self._timeout + 60), self._abort.store
        self._cpu: Any = dist.ProcessGroupGloo(store, self.rank, self.size, limit)
        self._gpu: Any = None
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            nccl = dist.distributed_c10d.PrefixStore("nccl", store)
            self._gpu = dist.ProcessGroupNCCL(nccl, self.rank, self.size, options)

        # Devices may differ, and with them how much each would compute between two collectives.
        known = self.share(tuple(SIZES[device])) if device.type != "cpu" else [SIZES[device]]
        self._sizes = Sizes(*map(min, zip(*known, strict=True)))

    def sizes(self, device: torch.device) -> Sizes:
        is_shared = device.type == self._device.type != "cpu"
        return self._sizes if is_shared else super().sizes(device)

    @property
    def is_broken(self) -> bool:
        """Whether the ranks are out of step, after an error."""
        return self._abort.is_broken

    # ---- What linear algebra asks -------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            self._abort.is_broken = True
            with contextlib.suppress(RuntimeError):  # what went wrong here is more than that nobody can be told
                self._abort.raise_flag(f"failed in {what}: {type(error).__name__}: {first_line(error)}", failed=True)
                self._end_collectives()
            raise

    def least(self, number: int) -> int:
        with self.step("smallest number"):
            smallest: int = min(self.share(number))
        return smallest

    def from_leader(self, make: Callable[[], Result]) -> Result:
        with self.step("leader"):
            result: Result = self.broadcast(make() if self.leads else None, 0)
        return result

    # ---- Steps --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, what: str, mark: Tensor | None = None, **values: Any) -> Iterator[None]:
        """Do something inside that all ranks do: sums, gathering and broadcasts are inside of such steps.

        What it is, and the values, are compared before the first of them; the mark, a number on an accelerator, without
        waiting for it, so that an error comes later. If something fails inside, the others are told.
        """
        if self.is_broken:
            raise RankError("the ranks are out of step after an error: make a new operator, on all of them.")
        self._compare()
        self._doing, self._announced, self._mark = what, values, mark
        with self.guard(what):
            yield
            self._compare()

    def _compare(self) -> None:
        """Compare the present step with that of the other ranks, once.

        Not while this rank works: threads that talk would take its processor from it.
        """
        values, self._announced = self._announced, None
        if values is None:
            return
        mark = zlib.crc32(repr((self._doing, values)).encode())
        marks = torch.tensor([mark, -mark], device="cpu")
        self._wait(self._cpu.allreduce([marks], dist.ReduceOp.MAX))
        if int(marks.sum()) != 0:  # the largest of all is not the smallest
            shared = self.share((self._doing, values))
            self._abort.is_broken = True
            raise RankError(f"the ranks do not do the same: {_difference(shared)}.")
        if self._mark is not None:
            marks, self._mark = torch.stack([self._mark, -self._mark]), None
            self._wait(self._group(marks).allreduce([marks], dist.ReduceOp.MAX), marks.device)
            judge_later(marks, partial(self._refuse_mark, self._doing))

    def _refuse_mark(self, what: str, marks: Tensor) -> None:
        """Raise RankError, and tell the other ranks, if the largest mark of all was not the smallest."""
        if int(marks.sum()) != 0:
            text = f"the ranks did not do the same: in {what}, before this one, {_TEXTS['vectors']} differed."
            self._abort.is_broken = True
            self._abort.raise_flag(text, failed=True)
            raise RankError(text)

    def number(self) -> int:
        """Return a number for another operator."""
        self._operators += 1
        return self._operators

    # ---- Collectives --------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks; the tensor may be overwritten."""
        return self.begin_sum(tensor).value()

    def begin_sum(self, tensor: Tensor) -> PendingSum:
        """Begin to sum a tensor over all ranks, rounded once, the same bits on each of them; it may be overwritten."""
        self._compare()
        # Two numbers are rounded once when they are added; a sum of more is made in float64, or it would lose digits.
        wide = tensor if self.size == 2 or not tensor.is_floating_point() else tensor.to(torch.float64)
        # Columns may lie one after the other. Look at the shape, which is the same on all ranks, unlike the strides.
        turned = wide.ndim == 2 and wide.shape[1] < wide.shape[0]
        wide = (wide.T if turned else wide).contiguous()
        work = self._group(wide).allreduce([wide], dist.ReduceOp.SUM)
        return PendingSum(self, wide, turned, tensor.dtype, work)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which may differ in the length of their first axis."""
        self._compare()
        counts = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.size)]
        own = torch.tensor([len(tensor)], device="cpu")
        self._wait(self._cpu.allgather([counts], [own]))
        longest = max(int(count) for count in counts)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._wait(self._group(padded).allgather([parts], [padded]), padded.device)
        return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]

    def share(self, value: Any) -> list[Any]:
        """Return the objects of all ranks, small ones."""
        texts = self.gather(as_bytes(pickle.dumps(value)))
        return [pickle.loads(text.numpy().tobytes()) for text in texts]

    def broadcast(self, value: Any, source: int) -> Any:
        """Return the object that rank `source` passes, such as one that holds tensors; to be read only."""
        tensors = to_tensors(value) if self.rank == source else []
        kinds = self.share([(t.shape, t.dtype, t.device.type) for t in tensors])[source]
        if self.rank != source:
            devices = {"cpu": torch.device("cpu"), self._device.type: self._device}
            tensors = [torch.empty(shape, dtype=dtype, device=devices[kind]) for shape, dtype, kind in kinds]
        for t in tensors:
            self._wait(self._group(t).broadcast(t, source), t.device)
        return value if self.rank == source else from_tensors(tensors)

    def _group(self, t: Tensor) -> Any:
        return self._cpu if t.device.type == "cpu" else self._gpu

    # ---- Waiting ------------------------------------------------------------------------------

    def _wait(self, work: Any, device: torch.device | None = None) -> None:
        if device is not None and device.type != "cpu":
            work.wait()  # in the order of the device's stream; NCCL's own watchdog ends a process that waits too long
            return
        deadline, look = time.monotonic() + self._timeout, _FIRST_LOOK
        while True:
            try:
                work.wait(timedelta(seconds=look))
            except RuntimeError as error:
                if "timed out" not in str(error).lower():
                    self._fail(f"lost a connection in {self._doing}")
            else:
                return
            if self._abort.is_raised() or time.monotonic() > deadline:
                self._fail(f"waited {self._timeout:g} s for the others in {self._doing}")
            look = min(2 * look, _LOOKS)

    def _fail(self, text: str) -> NoReturn:
        """End waiting with an error that names the ranks at fault."""
        error = self._abort.error(text)
        self._end_collectives()
        raise error

    def _end_collectives(self) -> None:
        """End what is still under way, as far as it lets itself be ended."""
        for group in (self._cpu, self._gpu):
            if group is not None:
                group.abort()
                # Never freed: that would wait for the threads, which wait for a rank that may never come.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self.let_go()

    def let_go(self) -> None:
        """Drop the references to torch's groups."""
        self._cpu = self._gpu = None

    def __reduce__(self) -> NoReturn:
        raise TypeError("an operator with a process group belongs to its processes: it cannot be pickled or copied.")


class PendingSum:
    """A sum over the ranks that is under way.

    Parameters
    ----------
    group : Group
    wide : torch.Tensor
        The tensor that becomes the sum.
    turned : bool
        Whether it is the transpose of the result.
    dtype : torch.dtype
        Of the result.
    work : object
        What torch.distributed returned.
    """

    def __init__(self, group: Group, wide: Tensor, turned: bool, dtype: torch.dtype, work: Any) -> None:
        self._group, self._wide, self._turned, self._dtype, self._work = group, wide, turned, dtype, work

    def value(self) -> Tensor:
        """Return the sum, once it is there."""
        self._group._wait(self._work, self._wide.device)
        total = self._wide.to(self._dtype)
        return total.T if self._turned else total


def checksum(V: Tensor) -> Tensor:
    """Return a number, on the device, by which different vectors (K, n) are told apart."""
    # Weighted by index, so that the same numbers in another order are other vectors.
    index = torch.arange(1, V.shape[1] + 1, device=V.device)
    total = torch.zeros((), dtype=torch.int64, device=V.device)
    for k, v in enumerate(V, 1):
        bits = v.contiguous().view(torch.int32 if v.itemsize == 4 else torch.int64)
        total += k * (bits * index).sum()
    return total


_KNOWN: dict[tuple[Any, str], Group] = {}


@atexit.register
def _forget() -> None:
    """Let go of the groups while torch can still end their threads, whoever still has an operator."""
    for group in _KNOWN.values():
        group.let_go()
    _KNOWN.clear()


def as_process_group(process_group: Any) -> Any:
    """Return the process group that a user's argument means.

    Raises
    ------
    TypeError
        If it is no process group.
    ValueError
        If this process does not belong to it.
    """
    if not dist.is_available():
        raise ValueError("this build of torch has no torch.distributed, so there is no `process_group`.")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"`process_group` is a mesh of {process_group.ndim} dimensions: pass the one over which the data are "
                "divided, `mesh['name']`."
            )
        process_group = process_group.get_group()
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process does not belong to `process_group`.")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "`process_group` must be a process group of torch.distributed (`torch.distributed.group.WORLD` after "
            f"`init_process_group`), a mesh of one dimension or None, got {type(process_group).__name__}."
        )
    if dist.get_rank(process_group) < 0:
        raise ValueError("this process does not belong to `process_group`.")
    return process_group


def group_of(process_group: Any, device: torch.device) -> Group | None:
    """Return the processes of a process group that share operators on a device; None if there is only one.

    Raises
    ------
    TypeError
        If it is no process group.
    ValueError
        If this process does not belong to it.
    RankError
        If another process of it is not there.
    """
    if process_group is None:
        return None
    process_group = as_process_group(process_group)
    return known_group(process_group, device) if dist.get_world_size(process_group) > 1 else None


def known_group(process_group: Any, device: torch.device) -> Group:
    """Return the `Group` of a process group of any size, the same object for all operators as long as it works."""
    group = _KNOWN.get((process_group, device.type))
    if group is None or group.is_broken:
        group = _KNOWN[process_group, device.type] = Group(process_group, device)
    return group


def _difference(shared: list[tuple[str, dict[str, Any]]]) -> str:
    """Describe the first difference between the steps of the ranks."""
    whats = [what for what, _ in shared]
    if len(set(whats)) > 1:
        return _by_rank(whats)
    name = next(name for name in shared[0][1] if len({repr(values.get(name)) for _, values in shared}) > 1)
    return f"in {whats[0]}, {_TEXTS.get(name, name)} is {_by_rank([values.get(name) for _, values in shared])}"


def _by_rank(values: list[Any]) -> str:
    """List the values with their ranks, the first two of them at least."""
    different = [(rank, value) for rank, value in enumerate(values) if rank == 0 or repr(value) != repr(values[0])]
    listed = [f"{value} on rank {rank}" for rank, value in different[:3]]
    return ", ".join(listed) + (" …" if len(different) > 3 else "")
