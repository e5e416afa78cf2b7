"""Parameters that are divided among processes themselves (FSDP2), as DTensors.

Every rank has the rows of its own data for all parameters, as factors, and its own pieces of vectors. Products go
through the parameters one after the other, so that no rank has a whole vector at once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fisherops import _arrays
from fisherops._fingerprint import checksum_of
from fisherops._linop import Transposed, check_result
from fisherops._processes import Processes, Result
from fisherops.parallel.group import Group, group_of, known_group
from fisherops.parallel.scores import DistributedScores
from fisherops.problem import Parameters, Problem
from fisherops.problem.model import ModelFunction, _ModuleFunction, _Restoring, as_function
from fisherops.score_matrix import ScoreMatrix
from fisherops.scores import MaterializedBatch


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor."""
    if not isinstance(x, Tensor) or type(x) in (Tensor, torch.nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def reshard(model: Any) -> None:
    """Let a model that `fully_shard` divided give up what it gathered: its outermost part keeps that otherwise."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a model that was not divided is no reason for its long import
    if isinstance(model, nn.Module) and fsdp is not None:
        for part in model.modules():
            if isinstance(part, fsdp.FSDPModule):
                part.reshard()


def make_problem(model_func: Any, loss_func: Any, params: Any, **options: Any) -> Problem:
    """Return the problem of a model whose parameters may be divided."""
    reshard(model_func)
    return Problem(model_func, loss_func, params, make_function=_as_function, **options)


def group_for(problem: Problem, process_group: Any) -> Group | None:
    """Return the processes that share operators of a problem; None if there is one, which has whole parameters."""
    group = group_of(process_group, problem.device)
    if group is None and problem.is_divided:
        sharded: Any = next(filter(is_sharded, problem.parameters.tensors.values()))
        if sharded.device_mesh.size() == 1:
            return known_group(sharded.device_mesh.get_group(), problem.device)
    return group


def _as_function(model_func: Any, parameters: Parameters, functional: bool) -> ModelFunction:
    """Return the model as a function of its parameters, which may be divided."""
    if not any(map(is_sharded, parameters.tensors.values())):
        return as_function(model_func, parameters, functional)
    if not isinstance(model_func, nn.Module):
        raise NotImplementedError(
            f"sharded parameters need the module that `fully_shard` divided as `model_func`, got "
            f"{type(model_func).__name__}. Pass the module."
        )
    return ShardedModule(model_func, parameters)


class ShardedModule(_ModuleFunction):
    """A module whose parameters `fully_shard` divided: it gathers them itself, group by group, at their own values."""

    is_divided = True

    def __init__(self, module: nn.Module, parameters: Parameters) -> None:
        super().__init__(module, parameters)
        if self.converts:
            raise NotImplementedError("sharded parameters are computed in their own precision: leave out `dtype`.")
        from torch.distributed.fsdp import FSDPModule

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
        with _Restoring(called=self._called) as self.substitutes:
            output = self._module(X)
        reshard(self._module)
        return output

    def leaves(self, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._gathered[name] for name in point}  # in the order of the parameters

    @property
    def converts(self) -> bool:  # type: ignore[override]
        """Whether a tensor that is not divided has another precision; those that are gather in their own."""
        floating = self.tensors() if self._parameters.asks_dtype else self._chosen.values()
        plain = [t for t in floating if t.is_floating_point() and not is_sharded(t)]
        return self._parameters.converts or any(t.dtype != self._dtype for t in plain)


class Sharding:
    """How the flat vector of the parameters is divided among the ranks.

    A rank has its pieces of all parameters, one after the other in their order; the flat vector is those of rank 0,
    then those of rank 1, and so on. It is a DTensor, sharded along its first axis.

    Parameters
    ----------
    tensors : mapping of str to DTensor
        The parameters, divided along their first axis over one mesh.
    group : Group or None
        The processes of the operator, which must be those of the mesh.

    Raises
    ------
    NotImplementedError
        If the parameters are divided in another way.
    ValueError
        If the processes are not those of the mesh.
    """

    def __init__(self, tensors: Mapping[str, Any], group: Group | None) -> None:
        from torch.distributed.tensor import DTensor, Shard

        _arrays.DIVIDED[DTensor] = DTensor.to_local

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
        if group is None or (group.size, group.rank) != (self.mesh.size(), self.mesh.get_local_rank()):
            raise ValueError(
                f"the parameters are sharded over {self.mesh.size()} processes: pass process_group= of these processes."
            )
        self.group = group
        own = {name: t.to_local().numel() for name, t in tensors.items()}
        with group.step("shards of the parameters"):
            by_rank = group.share(list(own.values()))
        self._starts = {name: sum(sizes[k] for sizes in by_rank[: group.rank]) for k, name in enumerate(own)}
        ends = list(accumulate(own.values()))
        self._own = {name: (end - size, end) for (name, size), end in zip(own.items(), ends, strict=True)}
        self.numel = ends[-1]
        """Numbers of the flat vector on this rank."""

    def local(self, V: Any) -> Tensor:
        """Return this rank's part (d, K) of vectors (K, D), a DTensor.

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
        part: Tensor = V.T.to_local()
        if V.device_mesh != self.mesh or len(part) != self.numel:
            raise ValueError(
                f"got a DTensor with {len(part)} rows on rank {self.group.rank}, which has {self.numel} of the "
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
        return torch.cat(self.group.gather(own)).T

    def scattered(self, name: str, full: Tensor, local: Tensor) -> None:
        """Sum vectors (K, n) for one parameter over the ranks, and put this rank's piece where it belongs."""
        start, stop = self._own[name]
        first = self._starts[name]
        local[start:stop] = self.group.sum(full).T[first : first + stop - start]


class DividedVectors(Processes):
    """Processes each of which has its pieces (K, d) of all vectors."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.size, self.leads = group.rank, group.size, group.leads

    def guard(self, what: str) -> AbstractContextManager[None]:
        return self._group.guard(what)

    def least(self, number: int) -> int:
        return self._group.least(number)

    def from_leader(self, make: Callable[[], Result]) -> Result:
        return self._group.from_leader(make)

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        with self._group.step("inner products"):
            return self._group.sum(super().inner(X, Y))


@functools.cache
def _divided_vectors(group: Group) -> DividedVectors:
    """Return the same object for the same group, by which operators see that they can be combined."""
    return DividedVectors(group)


class TransposedPieces(Transposed):
    """Gᵀ, whose products are DTensors."""

    def _mul(self, V: Tensor) -> Any:
        G: Any = self._A
        return G.whole(G._mul_t(V).T).T


class ShardedScores(DistributedScores):
    """The score matrix where parameters, and so vectors (K, D), are divided among the processes too.

    They come as DTensors, and inside of linear algebra as this process's pieces (K, d).

    Parameters
    ----------
    local : ScoreMatrix
        G of this rank's data, all batches of which are cached as factors.
    group : Group or None
        None if the user named no processes.
    """

    is_divided = True

    def __init__(self, local: ScoreMatrix, group: Group | None, checks: bool = True) -> None:
        self._sharding = Sharding(local.parameters.tensors, group)
        self._divided = _divided_vectors(self._sharding.group)
        super().__init__(local, self._sharding.group, checks)

    @property
    def processes(self) -> Processes:
        """The processes, each with its pieces of vectors."""
        return self._divided

    def _prepare(self, checks: bool) -> None:
        counts = self.group.share(self.local.reader.count())
        if len(set(counts)) > 1:
            raise ValueError(
                f"a sharded model is evaluated by all ranks together, and they have {', '.join(map(str, counts))} "
                "batches: give them equally many."
            )
        if checks:
            self.local.check()

    def sharded(self, local: Tensor) -> Any:
        """Return a vector (D,) or (D, K) from each rank's own part of it; see `ShardableFisherOperator.sharded`."""
        numel = self._sharding.numel
        if local.ndim not in (1, 2) or len(local) != numel:
            raise ValueError(f"got shape {tuple(local.shape)}, and this rank has {numel} numbers.")
        return self.whole(local.to(self.device, self.torch_dtype))

    def whole(self, local: Tensor) -> Any:
        """Return the DTensor (D, ...) of which this is a rank's part."""
        return self._sharding.whole(local, self.parameters.numel)

    def _checksum(self, V: Any) -> Tensor | None:
        return None if V.shape[1] == self._sharding.numel else super()._checksum(V)  # each rank has its own part

    def _checksum_of_model(self) -> int:
        return checksum_of([t for t in self.local.problem.model.tensors() if not is_sharded(t)])

    @property
    def parameter_checksum(self) -> int:
        """A checksum of the present values of the parameters, of all ranks."""
        own = checksum_of(map(_arrays.part_of, self.parameters.point().values()))
        with self._step("checksum of the parameters"):
            return checksum_of([torch.tensor(self.group.share(own))])

    # ---- Products -----------------------------------------------------------------------------

    def product(self, V: Any) -> Any:
        """Multiply GᵀG: (K, D) → (K, D), a DTensor, or this rank's pieces of it."""
        if is_sharded(V):
            return self.whole(self.product(self.pieces(V)).T).T
        self._check_pieces(V)
        with torch.no_grad(), self._pass("product", V):
            batches = self._batches()
            return self._apply_t(batches, self._apply(batches, V.T)).T

    def _mul(self, V: Any) -> Tensor:
        own = self.pieces(V) if is_sharded(V) else V
        self._check_pieces(own)
        self.require_order()
        with torch.no_grad(), self._pass("scores", own):
            products = torch.cat(self._apply(self._batches(), own.T), 1)
            return torch.cat(self.group.gather(products.T)).T

    def _mul_t(self, W: Tensor) -> Tensor:
        """Multiply Gᵀ: (K, rows) → this rank's pieces (K, d)."""
        self.require_order()
        own = self._own(W)
        with torch.no_grad(), self._pass("transposed scores", W):
            batches = self._batches()
            return self._apply_t(batches, own.split([batch.count for batch in batches], 1)).T

    def _transpose(self) -> Transposed:
        return TransposedPieces(self)

    def _product_of_pieces(self, X: Any, name: str) -> Any:  # noqa: ARG002
        V = self.pieces(X.unsqueeze(0) if X.ndim == 1 else X.T)
        Y = check_result(self._mul(V), V)
        return Y.squeeze(0) if X.ndim == 1 else Y.T

    def pieces(self, V: Any) -> Tensor:
        """Return this rank's pieces (K, d) of vectors (K, D), a DTensor, in the compute precision."""
        return self._sharding.local(V).T.to(self.torch_dtype)

    def _check_pieces(self, V: Tensor) -> None:
        if V.shape[1] != self._sharding.numel:
            self._sharding.local(V)  # raises an error

    def _batches(self) -> list[MaterializedBatch]:
        batches = self.local.materialized()
        assert batches is not None  # no other form is chosen for sharded parameters
        return batches

    def _apply(self, batches: Sequence[MaterializedBatch], local: Tensor) -> list[Tensor]:
        """Multiply G of each batch: (d, K) → (K, rows)."""
        products = [local.new_zeros(local.shape[1], batch.count) for batch in batches]
        for name in self.parameters.shapes:
            v = self._sharding.gathered(name, local)
            for batch, W in zip(batches, products, strict=True):
                for derived, columns in batch.blocks_of(name):
                    W += columns.apply(derived.push({name: v})).flatten(1)
        return products

    def _apply_t(self, batches: Sequence[MaterializedBatch], products: Sequence[Tensor]) -> Tensor:
        """Multiply Gᵀ and sum over batches and ranks: (K, rows) for each batch → (d, K)."""
        K = len(products[0])
        local = products[0].new_empty(self._sharding.numel, K)
        for name, shape in self.parameters.shapes.items():
            total = local.new_zeros(K, shape.numel())
            for batch, W in zip(batches, products, strict=True):
                for derived, columns in batch.blocks_of(name):
                    total += derived.pull(columns.apply_t(W.view(K, columns.count, -1)))[name]
            self._sharding.scattered(name, total, local)
        return local

    # ---- What F = GᵀG asks --------------------------------------------------------------------

    def dense(self) -> Tensor:
        raise NotImplementedError("the parameters are sharded, and F as a dense matrix would be on every rank.")

    def col_squares(self) -> Tensor:
        """Return the squared norms of the columns, this rank's pieces of them (d,)."""
        with torch.no_grad(), self._pass("diagonal"):
            batches = self._batches()
            local = batches[0].empty(self._sharding.numel, 1)
            for name, shape in self.parameters.shapes.items():
                total = local.new_zeros(1, shape.numel())
                for batch in batches:
                    total += batch.col_squares_of(name)
                self._sharding.scattered(name, total, local)
        return check_result(local[:, 0])

    def square_norm(self) -> float:
        """Return the squared Frobenius norm, which is the trace of F."""
        own = self.col_squares().sum(dtype=torch.float64)
        with self._step("trace"):
            return float(self.group.sum(own))

    def storable(self, folder: Path) -> list[MaterializedBatch]:
        raise NotImplementedError(
            "score matrices of sharded parameters cannot be saved. Save that of the whole model, on a process that has "
            "the memory for it."
        )

    def gradient(self) -> Tensor:
        raise NotImplementedError(
            "the gradient of sharded parameters is not supported. Compute it by `loss.backward()` and pass "
            "`{name: p.grad}` to `linalg.natural_gradient`."
        )

    def moments_of_forms(self, V: Any) -> Tensor:
        raise NotImplementedError("the standard error of products with sharded parameters is not supported.")

    # ---- Vectors by parameter -----------------------------------------------------------------

    def join(self, pieces: Mapping[str, Any]) -> Any:
        """Return the vector (D,) whose parts for the parameters are DTensors that are divided as these."""
        return self.sharded(torch.cat([self._sharding.piece(t) for t in pieces.values()]))

    def split(self, x: Any, like: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parts of a vector (D,) for the parameters, each divided as another tensor."""
        sizes = [self._sharding.piece(t).numel() for t in like.values()]
        parts = _arrays.part_of(x).split(sizes)
        return {name: self._sharding.like(t, part) for (name, t), part in zip(like.items(), parts, strict=True)}


def scores_of(local: ScoreMatrix, group: Group | None) -> ScoreMatrix | DistributedScores:
    """Return G of the data of all processes, whose model and data are checked if that was asked for."""
    if local.problem.is_divided:
        return ShardedScores(local, group)
    if group is not None:
        return DistributedScores(local, group)
    local.check()
    return local
