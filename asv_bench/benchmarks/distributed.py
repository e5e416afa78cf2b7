"""Two processes of one thread each, beside one process of one thread."""

import multiprocessing
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn

import fisherops as fo

from .networks import make as make_network


def _work(rank, folder, network, columns, N, cache, pairs, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    model, (X, y) = make_network(network, N)

    def make(process_group):
        data = fo.distributed.shard((X, y), group, batch_size=512) if process_group else (X, y)
        batch_size = None if process_group else 512
        return fo.FisherMCLinearOperator(
            model, nn.CrossEntropyLoss(), data=data, batch_size=batch_size, cache=cache, process_group=process_group
        )

    together = make(group)
    alone = make(None) if rank == 0 else None
    v = torch.randn(together.shape[0], columns, generator=torch.Generator().manual_seed(0))
    together @ v
    ratios, seconds, waiting = [], [], []
    for _ in range(pairs):
        begun = time.perf_counter()
        if alone is not None:
            alone @ v
        single = time.perf_counter() - begun
        dist.barrier()
        begun = time.perf_counter()
        together @ v
        double = time.perf_counter() - begun
        dist.barrier()
        ratios.append(single / double)
        seconds.append((single, double))
    x = torch.zeros(len(v), dtype=torch.float64)
    for _ in range(20):
        begun = time.perf_counter()
        dist.all_reduce(x)
        waiting.append(time.perf_counter() - begun)
    if rank == 0:
        single, double = (statistics.median(s) for s in zip(*seconds, strict=True))
        pipe.send((statistics.median(ratios), single, double, statistics.median(waiting)))
    dist.destroy_process_group()


def measure(network, columns=1, N=4096, cache="factors", pairs=15):
    """Return the median speedup, the seconds of one process and of two, and those of an all-reduce alone."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, network, columns, N, cache, pairs, theirs)
        processes = [context.Process(target=_work, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        came = ours.poll(300)
        for process in processes:
            if not came:
                process.kill()
            process.join()
    if not came:
        raise RuntimeError("the processes did not come back")
    return ours.recv()


class TwoProcesses:
    """Throughput of two processes over that of one."""

    params = (["mlp", "cnn"], [1, 32])
    param_names = ("network", "columns")
    timeout = 600
    unit = "ratio"
    pairs, N = 15, 4096

    def setup(self, network, columns):
        self.result = measure(network, columns, self.N, pairs=self.pairs)

    def track_speedup(self, network, columns):
        return self.result[0]
