"""Approximations on the networks of the benchmarks: python asv_bench/approximations.py [--figure FILE] [NETWORK ...].

Prints the table of `approximate.compare` for each network: the distance from F, memory, time to build, and iterations
of conjugate gradients to 1e-6 at 1e-4, 1e-6 and 1e-8 times the largest eigenvalue, for the Monte-Carlo Fisher at the
initialization with one thread. Without `--figure`, nothing is drawn.
"""

import argparse
import sys
from pathlib import Path

import torch
from benchmarks.networks import make
from torch import nn

import fisherops as fo
from fisherops import approximate

# Examples, such that all approximations together take less than 5 GiB.
SIZES = {"mlp": 64, "cnn": 256, "resnet": 32, "transformer": 16}


def measure(name, maxiter):
    """Return the shape of the score matrix of a network, and its comparison."""
    net, batch = make(name, SIZES[name])
    rows = "datum" if name == "transformer" else "term"
    op = fo.FisherMCLinearOperator(net, nn.CrossEntropyLoss(), data=[batch], rows=rows)
    print(f"{name}: {op.shape[0]:,} parameters, {op.num_rows} rows", flush=True)
    return op.scores.shape, approximate.compare(op, maxiter=maxiter)


def draw(found, path):
    """Draw the iterations of all networks beside each other."""
    from matplotlib import pyplot as plt

    from fisherops import plot

    figure, axes = plt.subplots(2, 2, figsize=(12.8, 9), layout="constrained")
    for ax in axes.flat[len(found) :]:
        ax.remove()
    for ax, (name, ((rows, parameters), table)) in zip(axes.flat, found.items(), strict=False):
        plot.approximations(table, ax=ax)
        ax.set_title(f"{name}: {parameters:,} parameters, {rows} rows", fontsize=11)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*SIZES, []], help="default: all")
    parser.add_argument("--figure", type=Path, help="file for the picture")
    parser.add_argument("--maxiter", type=int, default=60, help="iterations at most; default: 60")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(name, arguments.maxiter) for name in arguments.networks or SIZES}
    if arguments.figure:
        draw(found, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
