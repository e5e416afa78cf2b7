"""The part of a data set that belongs to a rank."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from fisherops._checks import integer
from fisherops._data import INDEX, Placed, is_pair, length_of_pair
from fisherops._tree import leaves, map_arrays
from fisherops.parallel.group import Group, as_process_group

_ORDERS = ("contiguous", "strided")

# Indices that ranks compare at a time.
_INDICES_AT_ONCE = 2**20


def shard(data: Any, process_group: Any = None, *, order: str = "contiguous", batch_size: int | None = None) -> Any:
    """Return this rank's part of the data, as batches (X, y, index) that say which data they hold.

    With it the matrix of a Monte-Carlo Fisher does not depend on the number of ranks, nor on `order`.

    Parameters
    ----------
    data : pair of arrays (X, y), list of batches, DataLoader or map-style Dataset
        All data, the same on every rank. Of a ``DataLoader`` the dataset, batch size and collation are taken; a list of
        batches is divided by whole batches.
    process_group : torch.distributed.ProcessGroup, optional
        The group of the operator; the whole world by default.
    order : {"contiguous", "strided"}
        Whether rank r of W has one piece of the data, or every W-th datum (or batch of a list) from r on.
    batch_size : int, optional
        Data of a batch for a pair of arrays, where None takes all of a rank's at once, and for a Dataset.

    Returns
    -------
    iterable of (X, y, index)

    Raises
    ------
    TypeError
        If the data are none of these.
    ValueError
        If a loader draws its data with replacement or leaves some out, or an option does not fit.

    See Also
    --------
    torch.utils.data.DistributedSampler : loaders with it are taken as they are; data that it repeats to make the parts
        equally long are counted once.

    Examples
    --------
    On every rank, after ``torch.distributed.init_process_group("gloo")``:

    >>> group = torch.distributed.group.WORLD  # doctest: +SKIP
    >>> data = fisherops.distributed.shard((X, y), group, batch_size=256)  # doctest: +SKIP
    >>> op = fisherops.FisherMCLinearOperator(model, loss, data=data, process_group=group)  # doctest: +SKIP
    """
    if order not in _ORDERS:
        raise ValueError(f"`order` must be 'contiguous' or 'strided', got {order!r}.")
    batch_size = None if batch_size is None else integer("batch_size", batch_size, 1)
    if isinstance(data, IterableDataset) or isinstance(getattr(data, "dataset", None), IterableDataset):
        raise TypeError(
            "an IterableDataset has no places to divide: let it yield each rank's own part, as (X, y, index)."
        )
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError("`batch_size` is that of the DataLoader: leave it out.")
        known = isinstance(data.sampler, SequentialSampler | RandomSampler | DistributedSampler)
        if data.drop_last or data.batch_size is None or not known:
            raise ValueError(
                "the DataLoader leaves out data or samples in a way of its own, so its data have no places to divide: "
                "pass its dataset and `batch_size`."
            )
        return IndexedLoader(data, list(_part(len(data.dataset), process_group, order)))  # type: ignore[arg-type]
    if is_pair(data):
        part = _part(length_of_pair(*data), process_group, order)
        step = batch_size or max(len(part), 1)
        return [_rows(data, part[start : start + step]) for start in range(0, len(part), step)]
    if isinstance(data, list | tuple):
        if batch_size is not None:
            raise ValueError(
                f"`batch_size` must be None for a list of batches, which are divided whole, got {batch_size}. Leave it "
                "out, or for a list of single examples pass `DataLoader(examples, batch_size=...)`."
            )
        return _batches(data, _part(len(data), process_group, order))
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if batch_size is None:
            raise ValueError(f"pass `batch_size` to divide a Dataset ({type(data).__name__}).")
        return IndexedLoader(DataLoader(data, batch_size=batch_size), list(_part(len(data), process_group, order)))
    raise TypeError(
        f"`data` must be a pair of arrays, a list of batches, a DataLoader or a Dataset, got {type(data).__name__}: "
        "give each rank its own part, as batches (X, y, index)."
    )


class IndexedLoader:
    """Some data of a DataLoader's dataset, in batches that say which they are.

    Parameters
    ----------
    loader : DataLoader
        Of which the dataset, batch size, collation and workers are taken.
    indices : list of int
        The data, in order.
    """

    def __init__(self, loader: DataLoader[Any], indices: Sequence[int]) -> None:
        step: Any = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
        self._batches = [list(indices[start : start + step]) for start in range(0, len(indices), step)]
        self._loader = DataLoader(
            loader.dataset,
            batch_sampler=self._batches,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch, own in zip(self._loader, self._batches, strict=True):
            yield batch if len(batch) == 3 else (*batch, torch.tensor(own))


def with_indices(data: Any, group: Group) -> Any:
    """Return data that say which they are where a DistributedSampler knows it, without those that it repeats.

    Raises
    ------
    ValueError
        If the sampler is of other ranks.
    """
    sampler = getattr(data, "sampler", None) if isinstance(data, DataLoader) else None
    if isinstance(data, DataLoader) and type(data.batch_sampler) is BatchSampler:
        sampler = data.batch_sampler.sampler
    if not isinstance(sampler, DistributedSampler):
        return data
    if (sampler.num_replicas, sampler.rank) != (group.size, group.rank):
        raise ValueError(
            f"the DistributedSampler is of rank {sampler.rank} of {sampler.num_replicas}, and this is rank "
            f"{group.rank} of {group.size} of `process_group`."
        )
    assert isinstance(data, DataLoader)
    if data.batch_sampler is None:
        raise ValueError(
            "the DataLoader with a DistributedSampler has batch_size=None, so its indices are of batches: pass each "
            "rank's own batches, as (X, y, index)."
        )
    own = list(sampler)
    if type(sampler) is DistributedSampler:
        # Rank r has the places r, r + W, ... of a list whose end repeats its beginning.
        N = len(sampler.dataset)  # type: ignore[arg-type]
        own = [index for k, index in enumerate(own) if group.rank + k * group.size < N]
    else:
        with group.step("indices of the sampler"):
            before = torch.cat(group.gather(torch.tensor(own, dtype=torch.int64))[: group.rank + 1])
        taken = set(before[: len(before) - len(own)].tolist())
        own = [index for index in dict.fromkeys(own) if index not in taken]
    step = data.batch_sampler.batch_size  # type: ignore[attr-defined]
    if data.batch_sampler.drop_last:  # type: ignore[attr-defined]
        own = own[: len(own) // step * step]
    return IndexedLoader(data, own)


class Placement:
    """Where the data of a rank lie in those of all ranks.

    Parameters
    ----------
    group : Group
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, number: int, num_data: int | None, index: Tensor | None) -> Placed:
        """Compare with the data of the other ranks at the end of the first pass.

        Without indices, the data of a rank follow those of the ranks before.
        """
        group = self._group
        with group.step("the first pass over the data", num_data=num_data):
            shares = group.share((number, index is not None))
        total, is_indexed = sum(own for own, _ in shares), any(indexed for _, indexed in shares)
        if len({indexed for own, indexed in shares if own}) > 1:
            raise ValueError(
                "the batches of all ranks must be (X, y, index) if those of one are, got some without. Add the indices."
            )
        if not is_indexed:
            return Placed(sum(own for own, _ in shares[: group.rank]), total, is_indexed)
        with group.step("the indices of the data"):
            self._check_distinct(torch.zeros(0, dtype=torch.int64) if index is None else index)
        return Placed(0, total, is_indexed)

    def _check_distinct(self, own: Tensor) -> None:
        """Raise ValueError if a datum occurs on two ranks."""
        group = self._group
        ends = [int(own.min()), int(own.max()) + 1] if len(own) else [0, 0]
        spans = sorted((start, stop) for start, stop in group.share(ends) if stop)
        if all(before[1] <= after[0] for before, after in pairwise(spans)):
            return
        for start in range(spans[0][0], max(stop for _, stop in spans), _INDICES_AT_ONCE):
            inside = own[(own >= start) & (own < start + _INDICES_AT_ONCE)] - start
            counts = group.sum(torch.bincount(inside, minlength=_INDICES_AT_ONCE))
            if (counts > 1).any():
                place = start + int(counts.argmax())
                holders = [rank for rank, holds in enumerate(group.share(bool((own == place).any()))) if holds]
                raise ValueError(
                    f"the indices of all ranks must be distinct, got {place} on rank {holders[0]} and on rank "
                    f"{holders[1]}. {INDEX}"
                )


def _part(count: int, process_group: Any, order: str) -> range:
    """Return which of so many things belong to this rank."""
    group = dist.group.WORLD if process_group is None else as_process_group(process_group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if order == "strided":
        return range(rank, count, size)
    return range(count * rank // size, count * (rank + 1) // size)


def _rows(pair: tuple[Any, Any], own: range) -> tuple[Any, Any, Any]:
    rows = operator.itemgetter((slice(own.start, own.stop, own.step), ...))
    X, y = (map_arrays(rows, part) for part in pair)
    return X, y, torch.tensor(own)


def _batches(batches: Sequence[Any], own: range) -> list[Any]:
    """Choose batches of a list, and number their data by their places in all of them."""
    sizes = [len(leaves(batch[0] if batch[1] is None else batch[1])[0]) for batch in batches]
    return [batches[k] if len(batches[k]) == 3 else (*batches[k], torch.arange(sizes[k]) + sum(sizes[:k])) for k in own]
