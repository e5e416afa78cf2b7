"""Memory of a process: what is kept and what products take stay within what is said, and nothing grows."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fisherops as fo

STATUS = Path("/proc/self/status")
MIB = 2**20

needs_proc = pytest.mark.skipif(not STATUS.exists(), reason="the peak memory of a process is read from Linux's /proc")

# In a process of its own, as the peak is that of its whole life.
PEAK = """
import re, sys
from pathlib import Path
import torch
from torch import nn
import fisherops as fo

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def build(size, **options):
    X, y = torch.randn(size, 1, 16, 16), torch.randint(10, (size,))
    data = list(zip(X.split(64), y.split(64)))
    return fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data, **options)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10)
)
D, K = sum(p.numel() for p in model.parameters()), {K}
V = torch.ones(D, K)
build(64, cache="{cache}") @ V[:, :1]  # what torch needs for itself
before = peak()
op = build({size}, cache="{cache}", max_memory={max_memory})
result = op @ V
print(peak() - before, op.plan.nbytes, result.nbytes)
"""


@needs_proc
@pytest.mark.parametrize(
    ("cache", "size", "K"),
    [
        *[(cache, 2048, 1) for cache in ("auto", "scores", "linearization", "none")],
        *[(cache, 128, 200) for cache in ("auto", "scores", "linearization", "none")],
    ],
)  # fmt: skip
def test_the_peak_of_a_process(cache, size, K):
    """Beside max_memory: a batch of 64 data at work, and for batches that are not kept three arrays like the result."""
    max_memory = 60 * MIB  # of 350 MB of rows for the larger data set
    script = PEAK.format(cache=cache, size=size, K=K, max_memory=max_memory)
    run = subprocess.run(
        [sys.executable, "-c", script],
        # Freed memory goes back to the system, so that what a run has before does not count.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, kept, result = map(int, run.stdout.split())
    assert (kept > 0) == (cache != "none")
    assert kept <= max_memory
    assert peak <= max_memory + 3 * result + 60 * MIB


# Writing "5" makes the present size of the process its peak.
PEAK_OF_A_TRACE = """
import gc, re
from pathlib import Path
import torch
from torch import nn
import fisherops as fo

def memory(entry):
    return int(re.search(entry + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def peak(function):
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = function()
    return memory("VmHWM") - before

def build(size, model):
    data = torch.randn(size, 300), torch.randint(10, (size,))
    return fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=data, cache="{cache}")

torch.manual_seed(0)
model = nn.Linear(300, 10)
build(64, model).trace()  # what torch needs for itself
op = build({size}, model)
print(op.plan.nbytes, peak(op.trace))
"""


@needs_proc
@pytest.mark.parametrize(("cache", "size"), [("scores", 8_000), ("factors", 80_000)])
def test_a_trace_needs_no_copy_of_what_is_cached(cache, size):
    """Norms in float64 of all rows at once would need twice their memory."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK_OF_A_TRACE.format(cache=cache, size=size)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    cached, peak = map(int, run.stdout.split())
    assert cached > 90 * MIB
    assert peak < 50 * MIB


@needs_proc
@pytest.mark.parametrize("cache", ["auto", "linearization", "none"])
def test_a_thousand_products_leave_nothing_behind(cache):
    def memory():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    X, y = torch.randn(64, 20), torch.randint(3, (64,))
    op = fo.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), data=(X, y), batch_size=32, cache=cache)
    v = np.ones(op.shape[0], op.dtype)
    for _ in range(100):
        op @ v
    before = memory()
    for _ in range(1000):
        op @ v
    assert memory() - before < MIB  # 1 KiB for each product
