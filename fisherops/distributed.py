"""Data divided among the processes of torch.distributed; operators take the parts with ``process_group=``."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from fisherops._checks import integer
from fisherops._data import is_pair, length_of_pair
from fisherops._ranks import Alone, RankError, as_group
from fisherops._tree import leaves, map_arrays

__all__ = ["RankError", "shard"]

_ORDERS = ("contiguous", "strided")


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


def with_indices(data: Any, ranks: Alone) -> Any:
    """Return data that say which they are where a DistributedSampler knows it, without those that it repeats.

    Raises
    ------
    ValueError
        If the sampler is of other ranks.
    """
    sampler = getattr(data, "sampler", None) if isinstance(data, DataLoader) else None
    if isinstance(data, DataLoader) and type(data.batch_sampler) is BatchSampler:
        sampler = data.batch_sampler.sampler
    if ranks.size == 1 or not isinstance(sampler, DistributedSampler):
        return data
    if (sampler.num_replicas, sampler.rank) != (ranks.size, ranks.rank):
        raise ValueError(
            f"the DistributedSampler is of rank {sampler.rank} of {sampler.num_replicas}, and this is rank "
            f"{ranks.rank} of {ranks.size} of `process_group`."
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
        own = [index for k, index in enumerate(own) if ranks.rank + k * ranks.size < N]
    else:
        with ranks.step("indices of the sampler"):
            before = torch.cat(ranks.gather(torch.tensor(own, dtype=torch.int64))[: ranks.rank + 1])
        taken = set(before[: len(before) - len(own)].tolist())
        own = [index for index in dict.fromkeys(own) if index not in taken]
    step = data.batch_sampler.batch_size  # type: ignore[attr-defined]
    if data.batch_sampler.drop_last:  # type: ignore[attr-defined]
        own = own[: len(own) // step * step]
    return IndexedLoader(data, own)


def _part(count: int, process_group: Any, order: str) -> range:
    """Return which of so many things belong to this rank."""
    group = dist.group.WORLD if process_group is None else as_group(process_group)
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
