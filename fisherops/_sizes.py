"""How much is computed at once on a device, by its properties. docs/explanation/gpu.md has the reasons and examples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# Elements that each thread of an accelerator computes in one matrix product, and threads of a multiprocessor.
_ELEMENTS_PER_THREAD, _THREADS = 8, 2048


class Sizes(NamedTuple):
    """Sizes of blocks.

    Attributes
    ----------
    cached : int
        Bytes of what is read twice, the second time from the cache.
    filling : int
        Elements of a matrix product that uses the whole device.
    block : int
        Bytes of rows, or of what a product needs beside its vectors, that are there at once.
    columns : int
        Bytes of vectors that are multiplied together.
    merged : int
        Bytes of cached batches that are joined: products with them take far longer than the calls that they make.
    """

    cached: int
    filling: int
    block: int
    columns: int
    merged: int


HOST = Sizes(cached=2**22, filling=2**21, block=2**26, columns=2**24, merged=2**26)


class _Known(dict[torch.device, Sizes]):
    """Sizes by device; of accelerators they are derived when they are asked for first."""

    def __missing__(self, device: torch.device) -> Sizes:
        self[device] = HOST if device.type == "cpu" else _of_accelerator(device)
        return self[device]


SIZES = _Known()


def _of_accelerator(device: torch.device) -> Sizes:
    """Derive the sizes from what a device says of itself; what it does not say is taken as on the host.

    Half of the second cache is for what is read twice, the other half for what it is multiplied with. Memory stands for
    time: accelerators read all of theirs in 20 to 30 ms, so 1/1024 of it in about 5 launches of a kernel, and 1/64 in
    about 80.
    """
    query: Any = getattr(torch.get_device_module(device), "get_device_properties", lambda _: None)
    own = query(device)
    cache, memory, processors = (
        int(getattr(own, name, 0)) for name in ("L2_cache_size", "total_memory", "multi_processor_count")
    )
    threads = getattr(own, "max_threads_per_multi_processor", _THREADS)
    return Sizes(
        cached=cache // 2 or 2**26,
        filling=processors * threads * _ELEMENTS_PER_THREAD or HOST.filling,
        block=memory // 2**10 or HOST.block,
        columns=memory // 2**6 or HOST.columns,
        merged=memory // 2**6 or HOST.merged,
    )
