"""The processes among which the data are divided: sums over them, and that none waits for another in vain."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fisherops._checks import first_line
from fisherops._packing import as_bytes, put_together, taken_apart
from fisherops._processes import Processes, Result

# Seconds between looks at whether another rank has raised the alarm, at first and at most; and for all to answer it.
_FIRST_LOOK, _LOOKS = 0.1, 1.0
_ROLL_CALL = 10.0

# Seconds that the store may take for an answer.
_STORE_ANSWERS = 30.0

Answer = TypeVar("Answer")


class RankError(RuntimeError):
    """The processes that share an operator do not do the same, or one of them failed or is gone."""


class PendingSum:
    """A sum over the ranks that is under way; of one rank alone it is done."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def value(self) -> Tensor:
        """Return the sum, once it is there."""
        return self._tensor


class Alone(Processes):
    """One process that has all data: what `Ranks` does for several, done for one."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:  # type: ignore[override]
        return self.rank == 0

    def least(self, number: int) -> int:
        with self.step("smallest number"):
            smallest: int = min(self.share(number))
        return smallest

    def from_leader(self, make: Callable[[], Result]) -> Result:
        with self.step("leader"):
            result: Result = self.broadcast(make() if self.leads else None, 0)
        return result

    @contextlib.contextmanager
    def step(self, what: str, **values: Any) -> Iterator[None]:  # noqa: ARG002
        """Do something inside that all ranks do: sums, gathering and broadcasts are inside of such steps.

        What it is, and the values, are compared before the first of them. If something fails inside, the others are
        told.
        """
        yield

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:  # noqa: ARG002
        """Do something inside that only this rank may do; if it fails, the others are told."""
        yield

    def begin_sum(self, tensor: Tensor) -> PendingSum:
        """Begin to sum a tensor over all ranks, rounded once, the same bits on each of them; it may be overwritten."""
        return PendingSum(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which may differ in the length of their first axis."""
        return [tensor]

    def share(self, value: Any) -> list[Any]:
        """Return the objects of all ranks, small ones."""
        return [value]

    def broadcast(self, value: Any, source: int) -> Any:  # noqa: ARG002
        """Return the object that rank `source` passes, such as one that holds tensors; to be read only."""
        return value

    def number(self) -> int:
        """Return a number for another operator."""
        return 0

    def checksum(self, V: Tensor) -> int:  # noqa: ARG002
        """Return a number by which different vectors (K, n) are told apart, where there are others to compare with."""
        return 0

    # ---- Made of these ------------------------------------------------------------------------

    def agree(self, what: str, **values: Any) -> None:
        """Raise RankError unless all ranks pass the same values."""
        with self.step(what, **values):
            pass

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks; the tensor may be overwritten."""
        return tensor


class Ranks(Alone):
    """The processes of a torch.distributed group.

    They talk over a group of their own, so that ours and the user's collectives do not meet. It is made by all ranks of
    the user's group together, once; `ranks_of` finds it again.

    A rank that waits looks now and then, in torch.distributed's store, whether another has raised the alarm: because
    something failed there, because a connection broke, or because it has waited too long. Then all that are alive
    answer a roll call, and end with an error that names those that did not.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        The user's.
    device : torch.device
        Where the tensors are.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._device = device
        self._doing = "the first operator of the group"
        self._announced: dict[str, Any] | None = None
        self._operators = 0
        self.broken = False
        """Whether an alarm was raised, after which the ranks are out of step."""
        on_cpu = device.type == "cpu" or "gloo" in dist.get_backend(group)
        # Torch has no public names for what every group has: a name, a store, and a time limit.
        backend = group._get_backend(torch.device("cpu") if on_cpu else device)
        self._timeout: float = backend.options._timeout.total_seconds()
        world, name = dist.distributed_c10d._get_default_store(), f"fisherops/{group.group_name}"
        # Of how many ranks before, so that what earlier groups of this name left in the store is not ours.
        arrived = self._ask(lambda: world.add(f"{name}/arrived", 1)) - 1
        self._store = dist.distributed_c10d.PrefixStore(f"{name}/{arrived // self.size}", world)
        self._ask(lambda: self._store.set(f"made/{self.rank}", ""))
        missing = self._without("made", self._timeout)
        if missing:
            raise RankError(
                f"{_named(missing)} made no operator within {self._timeout:g} s, and operators with a process group "
                "are made by all of its ranks together."
            )
        # Not by `new_group`, whose names depend on what other groups a process is in. Its limit is later than ours,
        # because we can say for whom we waited.
        limit = timedelta(seconds=self._timeout + 60)
        self._cpu: Any = dist.ProcessGroupGloo(self._store, self.rank, self.size, limit)
        self._gpu: Any = None
        if device.type == "cuda":
            nccl = dist.distributed_c10d.PrefixStore("nccl", self._store)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._gpu = dist.ProcessGroupNCCL(nccl, self.rank, self.size, options)

    # ---- What the operators do ----------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, what: str, **values: Any) -> Iterator[None]:
        if self.broken:
            raise RankError("the ranks are out of step after an error: make a new operator, on all of them.")
        self._compare()
        self._doing, self._announced = what, values
        with self.guard(what):
            yield
            self._compare()

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            self.broken = True
            with contextlib.suppress(RuntimeError):  # what went wrong here is more than that nobody can be told
                self._raise_alarm(f"failed in {what}: {type(error).__name__}: {first_line(error)}", failed=True)
                self._abort()
            raise

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
            said = self.share((self._doing, values))
            self.broken = True
            raise RankError(f"the ranks do not do the same: {_difference(said)}.")

    def sum(self, tensor: Tensor) -> Tensor:
        return self.begin_sum(tensor).value()

    def begin_sum(self, tensor: Tensor) -> PendingSum:
        self._compare()
        # Two numbers are rounded once when they are added; a sum of more is made in float64, or it would lose digits.
        wide = tensor if self.size == 2 or not tensor.is_floating_point() else tensor.to(torch.float64)
        # Few columns lie one after the other, as products leave them; by the shape, which is the same on all ranks.
        turned = wide.ndim == 2 and wide.shape[1] < wide.shape[0]
        wide = (wide.T if turned else wide).contiguous()
        work = self._group(wide).allreduce([wide], dist.ReduceOp.SUM)
        return _PendingReduction(self, wide, turned, tensor.dtype, work)

    def gather(self, tensor: Tensor) -> list[Tensor]:
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
        texts = self.gather(as_bytes(pickle.dumps(value)))
        return [pickle.loads(text.numpy().tobytes()) for text in texts]

    def broadcast(self, value: Any, source: int) -> Any:
        tensors = taken_apart(value) if self.rank == source else []
        kinds = self.share([(t.shape, t.dtype, t.device.type) for t in tensors])[source]
        if self.rank != source:
            devices = {"cpu": torch.device("cpu"), self._device.type: self._device}
            tensors = [torch.empty(shape, dtype=dtype, device=devices[kind]) for shape, dtype, kind in kinds]
        for t in tensors:
            self._wait(self._group(t).broadcast(t, source), t.device)
        return value if self.rank == source else put_together(tensors)

    def number(self) -> int:
        self._operators += 1
        return self._operators

    def checksum(self, V: Tensor) -> int:
        # Weighted by place, so that the same numbers in another order are other vectors.
        places = torch.arange(1, V.shape[1] + 1, device=V.device)
        total = 0
        for k, v in enumerate(V, 1):
            bits = v.contiguous().view(torch.int32 if v.itemsize == 4 else torch.int64)
            total += k * int((bits * places).sum())
        return total

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
                    self._end(f"lost a connection in {self._doing}")
            else:
                return
            if self._ask(lambda: self._store.check(["alarm"])) or time.monotonic() > deadline:
                self._end(f"waited {self._timeout:g} s for the others in {self._doing}")
            look = min(2 * look, _LOOKS)

    def _raise_alarm(self, text: str, failed: bool) -> dict[str, Any]:
        """Let all ranks know that something is wrong, and return what the first of them said."""
        own = json.dumps({"rank": self.rank, "text": text, "failed": failed})
        self._ask(lambda: self._store.set(f"here/{self.rank}", ""))
        alarm: dict[str, Any] = json.loads(self._ask(lambda: self._store.compare_set("alarm", "", own)))
        return alarm

    def _end(self, text: str) -> NoReturn:
        """End waiting with an error that names the ranks at fault."""
        self.broken = True
        alarm = self._raise_alarm(text, failed=False)
        if alarm["failed"]:
            self._abort()
            raise RankError(f"rank {alarm['rank']} {alarm['text']}")
        missing = self._without("here", min(_ROLL_CALL, self._timeout))
        self._abort()
        fault = f"{_named(missing)} died, hangs or does something else" if missing else "all ranks are there"
        raise RankError(f"{fault}: rank {alarm['rank']} {alarm['text']}.")

    def _abort(self) -> None:
        """End what is still under way, as far as it lets itself be ended."""
        for group in (self._cpu, self._gpu):
            if group is not None:
                group.abort()
                # Never freed: that would wait for the threads, which wait for a rank that may never come.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self._cpu = self._gpu = None

    def _without(self, key: str, seconds: float) -> list[int]:
        """Return the ranks that did not set a key within some time."""
        deadline = time.monotonic() + seconds
        while True:
            there = self._ask(lambda: [self._store.check([f"{key}/{rank}"]) for rank in range(self.size)])
            missing = [rank for rank, is_there in enumerate(there) if not is_there]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.02)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """Ask the store, which may never answer: a process that is stopped keeps its connections."""
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put((question(), None))
            except Exception as error:
                answers.put((None, error))

        Thread(target=ask, daemon=True).start()
        try:
            answer, error = answers.get(timeout=min(_STORE_ANSWERS, self._timeout))
        except Empty:
            answer, error = None, TimeoutError("it does not answer")
        if error is not None:
            self.broken = True
            raise RankError(
                "rank 0 of the world, which holds the store of torch.distributed, or whatever else holds it, is gone "
                f"({first_line(error)})."
            ) from None
        result: Answer = answer
        return result

    def __reduce__(self) -> NoReturn:
        raise TypeError("an operator with a process group belongs to its processes: it cannot be pickled or copied.")


class _PendingReduction(PendingSum):
    def __init__(self, ranks: Ranks, wide: Tensor, turned: bool, dtype: torch.dtype, work: Any) -> None:
        self._ranks, self._wide, self._turned, self._dtype, self._work = ranks, wide, turned, dtype, work

    def value(self) -> Tensor:
        self._ranks._wait(self._work, self._wide.device)
        total = self._wide.to(self._dtype)
        return total.T if self._turned else total


_KNOWN: dict[tuple[Any, str], Ranks] = {}


@atexit.register
def _forget() -> None:
    """Let go of the groups while torch can still end their threads, whoever still has an operator."""
    for ranks in _KNOWN.values():
        ranks._cpu = ranks._gpu = None
    _KNOWN.clear()


def as_group(process_group: Any) -> Any:
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


def ranks_of(process_group: Any, device: torch.device) -> Alone:
    """Return the ranks of a process group; one process alone for None.

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
        return Alone()
    process_group = as_group(process_group)
    if dist.get_world_size(process_group) == 1:
        return Alone()
    ranks = _KNOWN.get((process_group, device.type))
    if ranks is None or ranks.broken:
        ranks = _KNOWN[process_group, device.type] = Ranks(process_group, device)
    return ranks


def fingerprint(x: Any, depth: int = 8) -> int:
    """Return a number that depends on the numbers and texts in an object, the same in every process."""
    if isinstance(x, Tensor):
        own: Any = x.to_local() if hasattr(x, "to_local") else x
        own = own.detach().cpu().contiguous()
        text = own.as_strided((own.numel(),), (1,)).view(torch.uint8).numpy().tobytes() if own.numel() else b""
        return zlib.crc32(text, zlib.crc32(repr((tuple(own.shape), own.dtype)).encode()))
    if x is None or isinstance(x, bool | int | float | complex | str | bytes | torch.dtype | torch.Size):
        return zlib.crc32(repr(x).encode())
    parts: Any = ()
    if depth > 0 and isinstance(x, Mapping):
        parts = [(repr(key), fingerprint(value, depth - 1)) for key, value in x.items()]
    elif depth > 0 and isinstance(x, tuple | list):
        parts = [fingerprint(item, depth - 1) for item in x]
    elif depth > 0 and hasattr(x, "__dict__") and not isinstance(x, type) and not callable(x):
        parts = [(name, fingerprint(value, depth - 1)) for name, value in sorted(vars(x).items())]
    return zlib.crc32(repr((type(x).__name__, parts)).encode())


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _difference(said: list[tuple[str, dict[str, Any]]]) -> str:
    """Describe the first difference between what the ranks said."""
    whats = [what for what, _ in said]
    if len(set(whats)) > 1:
        return _by_rank(whats)
    name = next(name for name in said[0][1] if len({repr(values.get(name)) for _, values in said}) > 1)
    return f"in {whats[0]}, {name} is {_by_rank([values.get(name) for _, values in said])}"


def _by_rank(values: list[Any]) -> str:
    """List the values with their ranks, the first two of them at least."""
    different = [(rank, value) for rank, value in enumerate(values) if rank == 0 or repr(value) != repr(values[0])]
    listed = [f"{value} on rank {rank}" for rank, value in different[:3]]
    return ", ".join(listed) + (" …" if len(different) > 3 else "")
