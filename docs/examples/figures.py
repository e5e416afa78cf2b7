"""Draw the pictures of the examples: python figures.py [NAME ...].

Each run is compared with first-order optimizers, for which the best of
several rates is drawn. Times are processor times of one thread,
without the evaluations of the error.
"""

import math
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import digits
import exponentials
import heat
import poisson
import spin_chain
import torch
from matplotlib import pyplot as plt

import fisherops as fo

FOLDER = Path(__file__).parent
STYLES = {
    "natural gradient": ("#0072B2", "-"),
    "Adam": ("#D55E00", "--"),
    "gradient descent": ("#009E73", ":"),
}


def record(step, error, steps=None, seconds=None, points=60):
    """Return steps, seconds and errors of a run that is limited."""
    rows, spent, done = [(0, 0.0, error())], 0.0, 0
    while (steps is None or done < steps) and (
        seconds is None or spent < seconds
    ):
        started = time.process_time()
        step()
        spent, done = spent + time.process_time() - started, done + 1
        last, before, _ = rows[-1]
        part = done - last if steps else spent - before
        share = part / (steps or seconds)
        if share * points >= 1 or spent > 1.15 * before:
            rows.append((done, spent, error()))
    return rows


def first_order(kind, make, rates, seconds, **options):
    """Return the best of several runs, and its rate."""
    runs = []
    for lr in rates:
        model, loss, batch, error = make()
        optimizer = kind(model.parameters(), lr=lr, **options)

        def step(model=model, loss=loss, batch=batch, opt=optimizer):
            X, y = batch()
            opt.zero_grad()
            loss(model(X), y).backward()
            opt.step()

        runs.append((record(step, error, seconds=seconds), lr))

    def area(run):
        return sum(
            (later[1] - row[1]) * math.log(row[2])
            for row, later in pairwise(run[0])
        )

    return min(runs, key=area)


def compare(make, optimizer, steps, rates, **others):
    """Return runs by name, all with the time of the first."""
    model, loss, batch, error = make()
    own = optimizer(model, loss)
    runs = {
        "natural gradient": record(
            lambda: own.step(batch()), error, steps=steps
        )
    }
    seconds = runs["natural gradient"][-1][1]
    for name, (kind, options) in others.items():
        run, lr = first_order(kind, make, rates, seconds, **options)
        print(f"  {name}: best rate {lr:g}")
        runs[name.replace("_", " ")] = run
    return runs


def draw(name, runs, label, by_steps="steps"):
    figure, axes = plt.subplots(
        1, 2, figsize=(8.4, 3.4), sharey=True, layout="constrained"
    )
    for run, rows in runs.items():
        color, line = STYLES[run]
        steps, seconds, errors = zip(*rows, strict=True)
        print(
            f"  {run}: {errors[-1]:.2e} after {steps[-1]} steps, "
            f"{seconds[-1]:.1f} s"
        )
        axes[0].plot(
            steps[steps[0] == 0 :],
            errors[steps[0] == 0 :],
            color=color,
            linestyle=line,
            label=run,
        )
        axes[1].plot(seconds, errors, color=color, linestyle=line)
    for ax, x in zip(axes, (by_steps, "seconds"), strict=True):
        ax.set_xlabel(x)
        ax.set_yscale("log")
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_xscale("log")
    axes[0].set_ylabel(label)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(FOLDER / f"{name}.png", dpi=110)


def of_equation(module, steps):
    def make():
        model, loss, data, error = module.problem()
        return model, loss, lambda: data, error

    return compare(
        make,
        fo.optim.NaturalGradient,
        steps,
        (1e-3, 1e-2),
        Adam=(torch.optim.Adam, {}),
    )


def of_exponentials():
    def make():
        model, loss, data, error = exponentials.problem()
        return model, loss, lambda: data, error

    return compare(
        make,
        fo.optim.NaturalGradient,
        100,
        (1e-2, 1e-1),
        Adam=(torch.optim.Adam, {}),
        gradient_descent=(torch.optim.SGD, {}),
    )


def of_digits(epochs=4):
    def make():
        model, loss, train, _ = digits.problem()

        def batches():
            while True:
                yield from digits.epoch(*train)

        source = batches()
        return (
            model,
            loss,
            lambda: next(source),
            lambda: 1 - digits.accuracy(model, *train) + 1e-4,
        )

    runs = compare(
        make,
        digits.natural,
        12 * epochs,
        (0.01, 0.03, 0.3),
        Adam=(torch.optim.Adam, {}),
        gradient_descent=(torch.optim.SGD, {"momentum": 0.9}),
    )
    for name, rows in runs.items():
        reached = next((r for r in rows if r[2] < 0.02), None)
        print(f"  98 % by {name}: {reached}")
    return {
        name: [(k / 12, s, e) for k, s, e in rows]
        for name, rows in runs.items()
    }


def of_spin_chain(steps=200):
    def adam(psi, lr):
        optimizer = torch.optim.Adam(psi.parameters(), lr)

        def step(batch):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(
                psi(batch[0]), batch[1]
            ).backward()
            optimizer.step()

        return step

    found = []
    for step_of in (
        spin_chain.natural,
        partial(adam, lr=1e-3),
        partial(adam, lr=1e-2),
    ):
        rows, started, paused = [], time.process_time(), 0.0
        for k, psi in enumerate(
            spin_chain.train(steps, step_of=step_of), 1
        ):
            now = time.process_time()
            energy = spin_chain.true_energy(psi)
            error = 1 - energy / spin_chain.GROUND
            rows.append((k, now - started - paused, error))
            paused += time.process_time() - now
        found.append(rows)
    own, *others = found
    best = min(others, key=lambda rows: rows[-1][2])
    return {"natural gradient": own, "Adam": best}


FIGURES = {
    "poisson": (lambda: of_equation(poisson, 100), "relative error"),
    "heat": (lambda: of_equation(heat, 80), "relative error"),
    "digits": (of_digits, "share of errors"),
    "exponentials": (of_exponentials, "relative error of the rates"),
    "spin_chain": (of_spin_chain, "relative error of the energy"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or FIGURES:
        print(name)
        runs, label = FIGURES[name]
        draw(
            name,
            runs(),
            label,
            "epochs" if name == "digits" else "steps",
        )
