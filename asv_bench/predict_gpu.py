"""Predict the time of warm products on a GPU from what they launch, read and compute.

    python asv_bench/predict_gpu.py

The products run on the simulated accelerator of the tests, which takes the same path as CUDA and has the properties of
an H100 here, so that blocks have its sizes. For each kernel, bytes
are those of its operands and results, and flops those of matrix products. docs/explanation/gpu.md has the formula.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE / "benchmarks")]

import networks  # noqa: E402
import simulated  # noqa: E402

import fisherops as fo  # noqa: E402

# H100 SXM by its data sheet: bytes and float32 operations (without tensor cores) per second. The launch is assumed.
BANDWIDTH, FLOPS, LAUNCH = 3.35e12, 67e12, 5e-6


class Counter(TorchDispatchMode):
    """Sums kernels, bytes, flops, and the time of each kernel by the larger of the two limits."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes, self.flops, self.seconds = 0, 0, 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or func._schema.name in ("aten::empty", "aten::empty_strided", "aten::new_empty", "aten::detach"):
            return out
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        nbytes = sum(_distinct(t) * t.itemsize for t in tensors.values())
        flops = 0
        if func._schema.name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::mv"):
            left = args[1] if func._schema.name == "aten::addmm" else args[0]
            flops = 2 * out.numel() * left.shape[-1]
        self.kernels += 1
        self.bytes += nbytes
        self.flops += flops
        self.seconds += max(nbytes / BANDWIDTH, flops / FLOPS)
        return out


def _distinct(t):
    """Return how many elements a tensor has in memory, without the axes along which it is repeated."""
    n = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        n *= size if stride else 1
    return n


def main():
    device = simulated.register()
    with simulated.properties(simulated.H100):
        predict(device)


def predict(device):
    for name in ("mlp", "cnn", "resnet", "transformer"):
        net, (X, y) = networks.make(name)
        rows = "datum" if name == "transformer" else "term"
        net = simulated.moved(net.eval(), device)
        op = fo.FisherMCLinearOperator(
            net, torch.nn.CrossEntropyLoss(), data=[(X.to(device), y.to(device))], rows=rows, check_deterministic=False
        )
        x = torch.ones(op.shape[0], device=device)
        op @ x
        op @ x
        with torch.no_grad(), Counter() as counter:
            op @ x
        held, form = op.plan.nbytes, op.plan.entries[0].form
        print(
            f"| {name} | {len(X)} | {op.shape[0]:,} | {form}, {held / 1e6:.0f} MB | {counter.kernels} | "
            f"{counter.bytes / 1e6:.0f} MB | {counter.flops / 1e9:.2f} G | {counter.seconds * 1e6:.0f} µs | "
            f"{counter.kernels * LAUNCH * 1e6:.0f} µs |"
        )


if __name__ == "__main__":
    main()
