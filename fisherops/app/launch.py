"""The command line in several processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from fisherops.app.problems import Problem, UsageError
from fisherops.distributed import shard


@contextlib.contextmanager
def joined(device: str) -> Iterator[Any]:
    """Join the processes that torchrun started and yield their group, or None if there is only this process."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield None
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def load_everywhere(load: Callable[[], Problem], group: Any) -> Problem:
    """Load the model and data in every process, with the weights of rank 0; if one fails, raise UsageError in all."""
    if group is None:
        return load()
    found: Any
    try:
        problem = load()
        tensors = [*problem.model.named_parameters(), *problem.model.named_buffers()]
        shapes = [a.shape for a in (problem.X, problem.y, *(problem.query or ()))]
        found = [(name, t.shape, t.dtype) for name, t in tensors], shapes
    except UsageError as error:
        found = str(error)
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, found, group=group)
    for rank, answer in enumerate(answers):
        if isinstance(answer, str):
            raise UsageError(answer if rank == 0 else f"on rank {rank}: {answer}")
        if answer != answers[0]:
            raise UsageError(f"the model or the data on rank {rank} have other shapes than on rank 0")
    with torch.no_grad():
        for _, t in tensors:
            dist.broadcast(t, 0, group=group)
    return problem


def divide(X: Any, y: Any, batch_size: int, group: Any) -> list[Any]:
    """Return this process's batches."""
    if group is None:
        return [(X[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(y), batch_size)]
    batches: list[Any] = shard((X, y), group, batch_size=batch_size)
    return batches
