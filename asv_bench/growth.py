"""How time and memory grow with each size of a problem: python asv_bench/growth.py [--only N] [--figure FILE].

One quantity grows by a factor of 100 and the others stay fixed. Each point is measured in a process of its own with one
thread: the processor time of the construction with the first product, of a second product, the trace, the diagonal and
the Gram matrix; the bytes that the operator caches; and the peak of the process's memory during each of them beyond
what it had before. An exponent is the slope of the logarithms over the upper decade. Linux only.
"""

import argparse
import ctypes
import gc
import multiprocessing
import re
import statistics
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fisherops as fo

WORK = ("construction", "product", "trace", "diagonal", "Gram matrix")
STEPS = 10 ** np.array([0, 1, 1.5, 2])  # two decades, of which slopes are fitted to the upper one

# Gram matrices have at most this number of rows; a slope is fitted if the largest point has these bytes and seconds.
_ROWS = 6_400
_BYTES, _SECONDS = 4e6, 2e-4

# Measured so long, but at most so often.
_LONG, _MOST = 0.2, 50


# ---- What is measured -------------------------------------------------------------------------


@dataclass
class Problem:
    model: nn.Module
    data: list
    kind: str = "mc"
    options: dict = field(default_factory=dict)
    columns: int = 1
    work: tuple[str, ...] = WORK

    def make(self):
        """Return the operator."""
        make = {"mc": fo.FisherMCLinearOperator, "exact": fo.FisherLinearOperator}[self.kind]
        return make(self.model, nn.CrossEntropyLoss(), data=self.data, check_deterministic=False, **self.options)


class Tokens(nn.Module):
    """Classes for every token, from the mean of what came before: linear in the length."""

    def __init__(self, width=32, classes=20):
        super().__init__()
        self.tokens, self.hidden, self.head = (
            nn.Embedding(50, width),
            nn.Linear(width, width),
            nn.Linear(width, classes),
        )

    def forward(self, X):
        h = self.tokens(X)
        h = h + h.cumsum(1) / torch.arange(1, X.shape[1] + 1)[:, None]
        return self.head(self.hidden(h).tanh()).movedim(-1, 1)


def mlp(N, width=32, classes=10, batches=1, **options):
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes))
    if options.pop("is_deep", False):
        model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), *model)
    X, y = torch.randn(N, width), torch.randint(classes, (N,))
    return Problem(model, list(zip(X.tensor_split(batches), y.tensor_split(batches), strict=True)), **options)


def cnn(N, batches=1, **options):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    X, y = torch.randn(N, 1, 16, 16), torch.randint(10, (N,))
    return Problem(model, list(zip(X.tensor_split(batches), y.tensor_split(batches), strict=True)), **options)


def sequences(T, rows):
    X, y = torch.randint(50, (2, T)), torch.randint(20, (2, T))
    return Problem(Tokens(), [(X, y)], options={"rows": rows})


PRODUCT = ("product",)

# Quantity: its name, the smallest value, and a problem for each value of it.
QUANTITIES = {
    "N": ("examples N", 64, {
        "MLP, MC": mlp,
        "MLP, exact": lambda n: mlp(n, kind="exact", work=WORK[:4]),
        "CNN, MC": cnn,
    }),
    "D": ("parameters D", 20_000, {
        "MLP, MC": lambda d: mlp(256, width=round((d / 2) ** 0.5), is_deep=True),
        "MLP, exact": lambda d: mlp(64, width=round((d / 2) ** 0.5), is_deep=True, kind="exact"),
    }),
    "C": ("classes C", 10, {
        "MLP, MC": lambda c: mlp(256, classes=c),
        "MLP, exact": lambda c: mlp(1, classes=c, kind="exact", work=WORK[:4]),
    }),
    "T": ("positions T", 10, {
        'tokens, rows="datum"': lambda t: sequences(t, "datum"),
        'tokens, rows="term"': lambda t: sequences(t, "term"),
    }),
    "K": ("columns K", 1, {
        "MLP, MC": lambda k: mlp(256, width=128, columns=k, work=PRODUCT),
        "CNN, MC": lambda k: cnn(64, columns=k, work=PRODUCT),
    }),
    "M": ("samples M", 1, {
        "MLP, MC": lambda m: mlp(64, classes=200, options={"mc_samples": m}),
    }),
    "batches": ("batches of 8,000 examples", 10, {
        "MLP, MC": lambda b: mlp(8_000, batches=b, work=WORK[:4]),
        "CNN, MC": lambda b: cnn(8_000, batches=b, work=WORK[:4]),
    }),
}  # fmt: skip


def values_of(quantity):
    """Return the values over two decades, whole numbers."""
    return [round(QUANTITIES[quantity][1] * step) for step in STEPS]


# ---- In a process of its own ------------------------------------------------------------------


def seconds(function, long):
    """Return the median processor time of calls, which take this long together."""
    found = []
    while not found or (sum(found) < long and len(found) < _MOST):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return statistics.median(found)


def memory(entry):
    """Return VmRSS or VmHWM in bytes."""
    return 1024 * int(re.search(rf"{entry}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak(function):
    """Return the result of a call, and the bytes that the process had beyond those before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    result = function()
    return result, max(0, memory("VmHWM") - before)


def examine(quantity, series, value, long=_LONG):
    """Return the seconds and bytes of each work of one problem."""
    torch.manual_seed(0)
    problem = QUANTITIES[quantity][2][series](value)
    found = {"seconds": {}, "bytes": {}}
    D = sum(p.numel() for p in problem.model.parameters())
    V = torch.randn(D, problem.columns) if problem.columns > 1 else torch.randn(D)

    def first():
        op = problem.make()
        op @ V
        return op

    op, found["bytes"]["construction"] = peak(first)
    found["bytes"]["cached"] = op.plan.nbytes
    found["form"] = op.plan.entries[0].form
    works = {
        "product": lambda: op @ V,
        "trace": op.trace,
        "diagonal": op.diagonal,
        "Gram matrix": op.scores.gram,
    }
    for name, function in works.items():
        if name in problem.work and (name != "Gram matrix" or op.scores.shape[0] <= _ROWS):
            _, found["bytes"][name] = peak(function)
            found["seconds"][name] = seconds(function, long)
    if "construction" in problem.work:
        del op, works, function
        found["seconds"]["construction"] = seconds(first, long)
    else:
        del found["bytes"]["construction"]
    return found


def answer(pipe, quantity, series, value):
    warnings.simplefilter("ignore")
    examine(quantity, series, values_of(quantity)[0], long=0)  # what libraries need when they are first used
    pipe.send(examine(quantity, series, value))


def apart(*case):
    """Return what `examine` does, in a process that ends with it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, *case))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{case} failed; its error is above.") from None
    finally:
        process.join()


# ---- The table and the figure -----------------------------------------------------------------


def slope(values, measured, least):
    """Return the slope of the logarithms over the upper decade; None if the largest is less than `least`."""
    upper = [(x, y) for x, y in zip(values, measured, strict=True) if y is not None and x >= 0.99 * values[-1] / 10]
    if len(upper) < 2 or measured[-1] is None or upper[-1][1] < least:
        return None
    x, y = np.log([[max(a, 1e-12) for a in own] for own in zip(*upper, strict=True)])
    return float(np.polyfit(x, y, 1)[0])


def collect(quantity, series, values):
    """Return what grows, {"seconds": {work: list}, "bytes": {work: list}}, and the forms."""
    points = [apart(quantity, series, value) for value in values]
    found = {}
    for unit in ("seconds", "bytes"):
        names = dict.fromkeys(name for point in points for name in point[unit])
        found[unit] = {name: [point[unit].get(name) for point in points] for name in names}
    return found | {"forms": [point["form"] for point in points]}


def print_rows(quantity, series, values, found):
    def cell(unit, work):
        measured = found[unit].get(work)
        least = _SECONDS if unit == "seconds" else 0 if work == "cached" else _BYTES
        exponent = None if measured is None else slope(values, measured, least)
        return "" if exponent is None else f"{exponent:.2f}"

    cells = [cell("seconds", work) for work in WORK]
    cells += [cell("bytes", work) for work in ("cached", "construction", "product", "diagonal", "Gram matrix")]
    print(f"| {quantity}, {values[0]:,} to {values[-1]:,} | {series} | {' | '.join(cells)} |", flush=True)


# Of Okabe and Ito, which are told apart by all readers.
COLORS = {
    "construction": "#0072B2", "product": "#D55E00", "trace": "#CC79A7", "diagonal": "#009E73",
    "Gram matrix": "#E69F00", "cached": "#000000",
}  # fmt: skip
STYLES = (("-", "o"), ("--", "s"), (":", "^"))


def draw(results, file):
    """Draw seconds above and bytes below, a panel for each quantity."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    quantities = list(dict.fromkeys(quantity for quantity, _ in results))
    width = 4
    lines = -(-(len(quantities) + 1) // width)
    figure, axes = plt.subplots(2 * lines, width, figsize=(12.8, 5.6 * lines), squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    for unit, offset in (("seconds", 0), ("bytes", lines)):
        for number, quantity in enumerate(quantities):
            ax = axes[offset + number // width, number % width]
            ax.set_visible(True)
            top = 0.0
            series = [name for own, name in results if own == quantity]
            for (style, marker), name in zip(STYLES, series, strict=False):
                values, found = results[quantity, name]
                for work, measured in found[unit].items():
                    scale = 1e3 if unit == "seconds" else 1e-6
                    y = np.array([np.nan if m is None else scale * m for m in measured])
                    y[y < (0 if unit == "seconds" else 0.1)] = np.nan
                    ax.loglog(values, y, style, marker=marker, markersize=3, linewidth=1.2, color=COLORS[work])
                    top = np.nanmax([top, *y])
            x = np.array([values[0], values[-1]], float)
            if top:
                ax.loglog(x, 3 * top * x / x[-1], color="0.6", linewidth=2, zorder=0)
            ax.set_title(QUANTITIES[quantity][0], fontsize=10)
            ax.set_ylabel("milliseconds" if unit == "seconds" else "MB", fontsize=9)
            ax.set_xlabel(quantity, fontsize=9)
            ax.tick_params(labelsize=8)
            styles = [
                Line2D([], [], color="0.3", linestyle=s, marker=m, markersize=3) for s, m in STYLES[: len(series)]
            ]
            ax.legend(styles, series, fontsize=7, loc="upper left", framealpha=0.8, handlelength=2.5)
        legend = axes[offset + lines - 1, -1]
        legend.set_visible(True)
        legend.axis("off")
        names = [*WORK] if unit == "seconds" else ["cached", *WORK]
        names = names if unit == "seconds" else ["cached", *(f"peak of the {w}" for w in names[1:])]
        colors = [COLORS[name.removeprefix("peak of the ")] for name in names]
        handles = [Line2D([], [], color=color, linewidth=2) for color in colors]
        handles.append(Line2D([], [], color="0.6", linewidth=2))
        title = "processor time" if unit == "seconds" else "memory"
        legend.legend(handles, [*names, "slope 1"], loc="center", fontsize=10, title=title, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main():
    """Print a table of exponents, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="QUANTITY", choices=list(QUANTITIES), help="N, D, C, T, K, M or batches")
    parser.add_argument("--points", type=int, default=len(STEPS), help="number of values, from the smallest on")
    parser.add_argument("--figure", type=Path, help="file to draw to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warm = mlp(4).make()  # what torch imports when it is first used
    warm @ np.ones(warm.shape[1], np.float32)
    print("| grows | problem | " + " | ".join(WORK) + " | cached | " + " | ".join(
        f"peak of {work}" for work in WORK if work != "trace") + " |\n|" + "---|" * 12, flush=True)  # fmt: skip
    results = {}
    for quantity in [arguments.only] if arguments.only else QUANTITIES:
        values = values_of(quantity)[: arguments.points]
        for series in QUANTITIES[quantity][2]:
            found = collect(quantity, series, values)
            results[quantity, series] = values, found
            print_rows(quantity, series, values, found)
    print()
    for (quantity, series), (_, found) in results.items():
        print(f"{quantity}, {series}: {', '.join(found['forms'])}")
        for unit, scale in (("seconds", 1e3), ("bytes", 1e-6)):
            for work, measured in found[unit].items():
                listed = ", ".join("-" if m is None else f"{scale * m:.3g}" for m in measured)
                print(f"  {'ms' if unit == 'seconds' else 'MB'} {work}: {listed}")
    if arguments.figure:
        draw(results, arguments.figure)


if __name__ == "__main__":
    main()
