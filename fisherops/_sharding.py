"""Parameters that are divided among processes themselves (FSDP2): which pieces are whose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fisherops._processes import Processes, Result
from fisherops._ranks import Alone


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor."""
    if not isinstance(x, Tensor) or type(x) in (Tensor, torch.nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def reshard(model: Any) -> None:
    """Let a model that `fully_shard` divided give up what it gathered: its outermost part keeps that otherwise."""
    if not isinstance(model, nn.Module) or not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class DividedVectors(Processes):
    """Processes each of which has its pieces of all vectors."""

    def __init__(self, ranks: Alone) -> None:
        self._ranks = ranks
        self.leads = ranks.leads

    def guard(self, what: str) -> AbstractContextManager[None]:
        """Return a context for work that this process does alone; if it fails, the others are told."""
        return self._ranks.guard(what)

    def least(self, number: int) -> int:
        """Return the smallest of the numbers that the processes pass."""
        return self._ranks.least(number)

    def from_leader(self, make: Callable[[], Result]) -> Result:
        """Return what the leading process makes, on every process."""
        return self._ranks.from_leader(make)

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return the inner products of vectors with others, (K,), summed over their pieces (K, d)."""
        with self._ranks.step("inner products"):
            return self._ranks.sum((X * Y).sum(-1))


class Sharding:
    """How the flat vector of the parameters is divided among the ranks.

    A rank has its pieces of all parameters, one after the other in their order; the flat vector is those of rank 0,
    then those of rank 1, and so on. It is a DTensor, sharded along its first axis.

    Parameters
    ----------
    tensors : mapping of str to DTensor
        The parameters, divided along their first axis over one mesh.
    ranks : Alone
        The processes of the operator, which must be those of the mesh.

    Raises
    ------
    NotImplementedError
        If the parameters are divided in another way.
    ValueError
        If the processes are not those of the mesh.
    """

    def __init__(self, tensors: Mapping[str, Any], ranks: Alone) -> None:
        from torch.distributed.tensor import Shard

        plain = [name for name, t in tensors.items() if not is_sharded(t)]
        if plain:
            raise NotImplementedError(
                f"some parameters are sharded and others are not ({', '.join(plain[:3])}): call `fully_shard` on the "
                "whole model too, or leave these out of `params`."
            )
        meshes = {t.device_mesh for t in tensors.values()}
        self.mesh = meshes.pop()
        if meshes or self.mesh.ndim != 1 or any(tuple(t.placements) != (Shard(0),) for t in tensors.values()):
            raise NotImplementedError(
                "parameters sharded along their first axis over one mesh of one dimension are taken (FSDP2's "
                "`fully_shard`), and these are divided in another way."
            )
        if ranks.size != self.mesh.size() or ranks.rank != self.mesh.get_local_rank():
            raise ValueError(
                f"the parameters are sharded over {self.mesh.size()} processes: pass process_group= of these processes."
            )
        self._ranks = ranks
        self.processes = DividedVectors(ranks)
        """The processes, each with its pieces of vectors."""
        own = {name: t.to_local().numel() for name, t in tensors.items()}
        with ranks.step("shards of the parameters"):
            by_rank = ranks.share(list(own.values()))
        self._starts = {name: sum(sizes[k] for sizes in by_rank[: ranks.rank]) for k, name in enumerate(own)}
        ends = list(accumulate(own.values()))
        self._own = {name: (end - size, end) for (name, size), end in zip(own.items(), ends, strict=True)}
        self.numel = ends[-1]
        """Numbers of the flat vector on this rank."""

    def local(self, V: Any) -> Tensor:
        """Return this rank's part (d, K) of a DTensor (D, K).

        Raises
        ------
        TypeError
            If it is none.
        ValueError
            If it is divided in another way.
        """
        if not is_sharded(V):
            raise TypeError(
                "the parameters are sharded, so vectors are too: pass a DTensor of this rank's part, such as "
                f"`op.sharded(local)` with {self.numel} rows here, got {type(V).__name__}."
            )
        part: Tensor = V.to_local()
        if V.device_mesh != self.mesh or len(part) != self.numel:
            raise ValueError(
                f"got a DTensor with {len(part)} rows on rank {self._ranks.rank}, which has {self.numel} of the "
                "parameters: make it by `op.sharded(local)`."
            )
        return part

    def whole(self, local: Tensor, length: int) -> Any:
        """Return the DTensor (D, ...) of which this is a rank's part."""
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((length, *local.shape[1:]))
        stride = (local.shape[1], 1) if local.ndim == 2 else (1,)
        return DTensor.from_local(
            local.contiguous(), self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def piece(self, t: Any) -> Tensor:
        """Return this rank's piece of a tensor that is divided as its parameter, flat."""
        if not is_sharded(t):
            raise TypeError("the parameters are sharded, so their gradients must be too: got a plain tensor.")
        own: Tensor = t.to_local()
        return own.reshape(-1)

    def like(self, t: Any, piece: Tensor) -> Any:
        """Return a DTensor that is divided as another, of this rank's piece of it."""
        from torch.distributed.tensor import DTensor

        local = piece.view(t.to_local().shape)
        return DTensor.from_local(local, self.mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())

    def gathered(self, name: str, local: Tensor) -> Tensor:
        """Return the part of a vector for one parameter, (K, n), from all ranks' parts (d, K)."""
        own = local[slice(*self._own[name])]
        return torch.cat(self._ranks.gather(own)).T

    def scattered(self, name: str, full: Tensor, local: Tensor) -> None:
        """Sum vectors (K, n) for one parameter over the ranks, and put this rank's piece where it belongs."""
        start, stop = self._own[name]
        first = self._starts[name]
        local[start:stop] = self._ranks.sum(full).T[first : first + stop - start]
