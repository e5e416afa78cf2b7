"""Compare the working tree with a frozen reference, in turns: python asv_bench/paired.py b2cece1.

Each of the two has a process of its own, which imports its own copy of the package. The processes take turns, so that
what else runs on the machine slows both alike; ratios are formed within pairs. Only the public API is used, and both
use the networks of the working tree.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ASV = Path(__file__).parent
ROOT = ASV.parent
NETWORKS = ("mlp", "cnn", "resnet", "transformer")
WORK = ("product 1", "product 8", "product 32", "construction", "eigsh", "solve")


# ---- In each of the two processes -------------------------------------------------------------------------


def prepare(fo, networks, network, work, size):
    """Return a function to be timed."""
    import torch

    model, batch = networks.make(network, size)

    def make():
        return fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), list(model.parameters()), [batch])

    op = make()
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(op.shape[1], 32, generator=generator)
    kind, _, columns = work.partition(" ")
    if kind == "product":
        V = V[:, : int(columns)].contiguous()
        return lambda: op @ V
    v = V[:, 0].contiguous()
    if kind == "construction":
        return lambda: make() @ v
    op @ v
    damping = op.trace() / op.shape[1]
    if kind == "eigsh":
        return lambda: fo.linalg.eigsh(op, min(10, op.shape[1])).eigenvalues
    return lambda: fo.linalg.solve(op, v, damping).x


def serve(clock):
    """Answer requests, one JSON object in a line each, with the times of a clock of the module `time`."""
    import numpy as np

    import fisherops as fo

    now = getattr(time, clock)
    location = importlib.util.spec_from_file_location("networks", ASV / "benchmarks" / "networks.py")
    networks = importlib.util.module_from_spec(location)
    location.loader.exec_module(networks)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the work prints is no answer
    print(json.dumps({"path": fo.__file__}), file=answers)
    function = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "calls" in request:
                start = now()
                for _ in range(request["calls"]):
                    result = function()
                answer = {"seconds": (now() - start) / request["calls"]}
            else:
                function = None  # the last operator is freed before the next is made
                function = prepare(fo, networks, **request)
                start = now()
                result = function()
                answer = {"seconds": now() - start}
            answer["norm"] = float(np.linalg.norm(np.asarray(result, dtype=np.float64)))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers)


# ---- In the process that compares -------------------------------------------------------------------------


class Side:
    """A process that imports the package from a folder."""

    def __init__(self, folder, clock):
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--serve", clock]
        # Not in the working tree, whose package Python might find first.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        path = Path(self._answer()["path"]).resolve()
        if not path.is_relative_to(Path(folder).resolve()):
            raise RuntimeError(f"fisherops was imported from {path} instead of {folder}.")

    def ask(self, **request):
        """Return the seconds of a call, and the norm of its result."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["seconds"], answer["norm"]

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the comparison ended with {self.process.wait()}.")
        return json.loads(line)

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def compare(new, old, network, work, pairs, size):
    """Return seconds of both and their ratios, and the relative difference of the norms of the results."""
    case = {"network": network, "work": work, "size": size}
    sides = new, old
    for side in sides:
        side.ask(**case)
    first = [side.ask(calls=1) for side in sides]
    # 20 ms for a turn, which is long enough beside a timer's resolution and a switch of processes.
    calls = max(1, min(1000, round(0.02 / max(first[1][0], 1e-6))))
    seconds = ([], [])
    for pair in range(pairs):
        for k in (0, 1) if pair % 2 else (1, 0):
            seconds[k].append(sides[k].ask(calls=calls)[0])
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    return *map(statistics.median, seconds), ratios, abs(first[0][1] / first[1][1] - 1)


def quartiles(values):
    """Return the quartiles of some numbers."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values


def processor():
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def frozen(reference):
    """Give a folder with the package as it is in a commit, or the folder that was named."""
    if Path(reference).is_dir():
        yield Path(reference).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "-C", str(ROOT), "archive", "--format=tar", reference, "fisherops"]
        process = subprocess.run(command, capture_output=True, check=False)
        if process.returncode:
            raise SystemExit(f"REF must be a commit of this repository or a folder, got {reference!r}. Check its name.")
        with tarfile.open(fileobj=io.BytesIO(process.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def main():
    """Print a table of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", metavar="REF", help="commit, or folder that contains fisherops/")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of timings of each case (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains this text")
    parser.add_argument("--cpu", action="store_true", help="time of the processor instead of the clock on the wall")
    parser.add_argument("--size", type=int, help="examples in a batch instead of the usual number of the network")
    arguments = parser.parse_args()
    cases = [(network, work) for network in NETWORKS for work in WORK if arguments.only in f"{network} {work}"]
    import torch

    clock = "processor" if arguments.cpu else "wall"
    print(
        f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads; {arguments.pairs} pairs; {clock} time; reference "
        f"{arguments.reference}.\n"
    )
    print("| case | reference, ms | new, ms | new / reference (quartiles) |\n|---|---|---|---|", flush=True)
    with frozen(arguments.reference) as folder, contextlib.ExitStack() as stack:
        new, old = (Side(tree, "process_time" if arguments.cpu else "perf_counter") for tree in (ROOT, folder))
        stack.callback(new.close)
        stack.callback(old.close)
        for network, work in cases:
            try:
                a, b, ratios, difference = compare(new, old, network, work, arguments.pairs, arguments.size)
            except RuntimeError as error:
                print(f"| {network} {work} | failed: {error} | | |", flush=True)
                continue
            low, middle, high = quartiles(ratios)
            note = f"; results differ by {difference:.0e}" if difference > 1e-3 else ""
            figures = f"{1000 * b:.3g} | {1000 * a:.3g} | {middle:.3f} ({low:.3f} to {high:.3f}){note}"
            print(f"| {network} {work} | {figures} |", flush=True)
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["--serve"] else main()
