"""The command line in several processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fisherops._problem import Problem, UsageError


@contextlib.contextmanager
def joined(device: str) -> Iterator[Any]:
    """Join the processes that torchrun started, and give their group; None where this process was started alone.

    All of them do the same; only the first is heard.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield None
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def folder(out: Path, group: Any) -> Iterator[Path]:
    """Give the folder for results: a temporary one for all processes but the first."""
    if is_first(group):
        yield out
        return
    with tempfile.TemporaryDirectory() as other:
        yield Path(other)


def is_first(group: Any) -> bool:
    """Whether this process is the one that is heard."""
    return group is None or dist.get_rank(group) == 0


def load_alike(load: Callable[[], Problem], group: Any) -> Problem:
    """Load the model and data in every process, with the weights of the first.

    Raises
    ------
    UsageError
        In every process, if one of them fails.
    """
    if group is None:
        return load()
    problem, error, found = None, None, None
    try:
        problem = load()
        found = [(name, t.shape, t.dtype) for name, t in _tensors(problem.model)], problem.X.shape, problem.y.shape
    except UsageError as failure:
        error = str(failure)
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (error, found), group=group)
    for rank, (text, _) in enumerate(answers):
        if text is not None:
            raise UsageError(text if rank == 0 else f"on rank {rank}: {text}")
    for rank, (_, other) in enumerate(answers):
        if other != answers[0][1]:
            raise UsageError(f"the model or the data on rank {rank} have other shapes than on rank 0")
    assert problem is not None
    with torch.no_grad():
        for _, t in _tensors(problem.model):
            dist.broadcast(t, 0, group=group)
    return problem


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
