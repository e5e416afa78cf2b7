"""Processes of torch.distributed on this machine, which do jobs for a test: several at once, each within a time limit.

A job is a function ``job(group, *arguments)`` in `rank_jobs`; its results, by rank, come back, or the error that ended it.
"""

import contextlib
import datetime
import multiprocessing
import tempfile
import time
from pathlib import Path

# Forks of a server that has imported what takes seconds, and has neither threads nor anything of the tests.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["scipy.sparse.linalg", "torch.distributed.fsdp", "fisherops"])


class JobError(Exception):
    """A job that raised an error: its type and text."""

    def __init__(self, kind, text):
        super().__init__(kind, text)
        self.kind, self.text = kind, text


class DeathError(Exception):
    """A process that ended before its job did."""


def _work(rank, size, file, timeout, pipe):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    if file is None:  # rank 0 holds the store, on a port that the system chooses
        store = dist.TCPStore("127.0.0.1", 0 if rank == 0 else pipe.recv(), size, rank == 0, wait_for_workers=False)
        if rank == 0:
            pipe.send(store.port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    else:
        dist.init_process_group("gloo", init_method=file, rank=rank, world_size=size, timeout=limit)
    import rank_jobs

    while True:
        message = pipe.recv()
        if message is None:
            break
        name, arguments = message
        try:
            answer = getattr(rank_jobs, name)(dist.group.WORLD, *arguments)
        except BaseException as error:
            answer = JobError(type(error).__name__, str(error))
        pipe.send(answer)
    dist.destroy_process_group()


class Processes:
    """Processes that wait for jobs; to be used with ``with``."""

    def __init__(self, size, timeout=60.0, tcp=False):
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self.processes = [], []
        file = None if tcp else f"file://{Path(self._folder.name)}/store"
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            arguments = (rank, size, file, timeout, theirs)
            self.processes.append(CONTEXT.Process(target=_work, args=arguments, daemon=True))
            self._pipes.append(ours)
            self.processes[-1].start()
            theirs.close()
        if tcp:
            port = self._pipes[0].recv()
            for pipe in self._pipes[1:]:
                pipe.send(port)

    def run(self, name, *arguments, seconds=120.0, wait_for=None):
        """Let every rank do a job, and return the results by rank (or of some ranks), failures among them."""
        for pipe in self._pipes:
            pipe.send((name, arguments))
        end = time.monotonic() + seconds
        return [self._answer(rank, end) for rank in (range(self.size) if wait_for is None else wait_for)]

    def _answer(self, rank, end):
        pipe = self._pipes[rank]
        try:
            if pipe.poll(max(0.0, end - time.monotonic())):
                return pipe.recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(10)
            return DeathError(f"rank {rank} ended with {self.processes[rank].exitcode}")
        raise AssertionError(f"rank {rank} did not come back in time")

    def results(self, name, *arguments, seconds=120.0):
        """Let every rank do a job that must succeed, and return the results by rank."""
        answers = self.run(name, *arguments, seconds=seconds)
        failures = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if isinstance(answer, Exception)]
        assert not failures, failures
        return answers

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        end = time.monotonic() + 20
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()
