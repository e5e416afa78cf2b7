"""The failure flag of a process group: how a process that waits hears that another failed or is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist

from fisherops._checks import first_line

# Seconds that the store may take for an answer, and that all ranks have to report when the flag is raised.
_STORE_ANSWERS = 30.0
_REPORT = 10.0

Answer = TypeVar("Answer")


class RankError(RuntimeError):
    """The processes that share an operator do not do the same, or one of them failed or is gone."""


class Abort:
    """A flag in torch.distributed's store, with which one rank stops all others, and the ranks that did not report.

    Parameters
    ----------
    name : str
        Name of the group, the same on all of its ranks and for no other group.
    rank, size : int
        This rank, and the number of ranks.
    timeout : float
        Seconds that a rank may take.

    Attributes
    ----------
    store : torch.distributed.Store
        Part of the store that belongs to this group.
    is_broken : bool
        Whether the flag was raised or the store is gone, after which the ranks are out of step.
    """

    def __init__(self, name: str, rank: int, size: int, timeout: float) -> None:
        self._rank, self._size, self._timeout = rank, size, timeout
        self.is_broken = False
        # Torch has no public name for the store of the default group.
        world = dist.distributed_c10d._get_default_store()
        # The number of ranks that arrived before tells this group from earlier groups of this name.
        arrived = self.ask(lambda: world.add(f"{name}/arrived", 1)) - 1
        self.store = dist.distributed_c10d.PrefixStore(f"{name}/{arrived // size}", world)
        self.report("made")

    def report(self, key: str) -> None:
        """Let the others know that this rank is there."""
        self.ask(lambda: self.store.set(f"{key}/{self._rank}", ""))

    def is_raised(self) -> bool:
        """Return whether a rank has raised the flag."""
        return self.ask(lambda: self.store.check(["alarm"]))

    def raise_flag(self, text: str, failed: bool) -> dict[str, Any]:
        """Let all ranks know that something is wrong, and return what the first of them wrote."""
        own = json.dumps({"rank": self._rank, "text": text, "failed": failed})
        self.report("here")
        first: dict[str, Any] = json.loads(self.ask(lambda: self.store.compare_set("alarm", "", own)))
        return first

    def error(self, text: str) -> RankError:
        """Raise the flag because of waiting in vain, and return an error that names the ranks at fault."""
        self.is_broken = True
        first = self.raise_flag(text, failed=False)
        if first["failed"]:
            return RankError(f"rank {first['rank']} {first['text']}")
        missing = self.missing("here", min(_REPORT, self._timeout))
        fault = f"{named(missing)} died, hangs or does something else" if missing else "all ranks are there"
        return RankError(f"{fault}: rank {first['rank']} {first['text']}.")

    def missing(self, key: str, seconds: float) -> list[int]:
        """Return the ranks that did not report within some time."""
        deadline = time.monotonic() + seconds
        while True:
            there = self.ask(lambda: [self.store.check([f"{key}/{rank}"]) for rank in range(self._size)])
            missing = [rank for rank, is_there in enumerate(there) if not is_there]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.02)

    def ask(self, question: Callable[[], Answer]) -> Answer:
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
            self.is_broken = True
            raise RankError(
                "rank 0 of the world, which holds the store of torch.distributed, or whatever else holds it, is gone "
                f"({first_line(error)})."
            ) from None
        result: Answer = answer
        return result


def named(ranks: list[int]) -> str:
    """Name ranks in words."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
