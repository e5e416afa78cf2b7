"""Natural-gradient steps beside Adam and K-FAC, on the digits: python asv_bench/optimizers.py [--seconds S].

Each optimizer trains the classifier of docs/examples/digits.py on mini-batches of 128 examples, with the best of a few
rates, for the same processor time of one thread. The table has steps per second, and the loss over the training data
after parts of that time. K-FAC is that of ASDL (``pip install --no-deps asdfghjkl==0.1a5``), which preconditions the
gradients of SGD, and the inverse of curvlinops 3.0.1, made in each step; they are left out if they are not installed.
"""

import argparse
import importlib.util
import math
import sys
import time
from pathlib import Path

import torch

import fisherops as fo

sys.path.insert(0, str(Path(__file__).parent.parent / "docs" / "examples"))
import digits


def natural(model, loss, lr, **options):
    optimizer = fo.optim.NaturalGradient(model, loss, lr=lr, **options)
    return lambda X, y: optimizer.step((X, y))


def adam(model, loss, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr)

    def step(X, y):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()

    return step


def asdl_kfac(model, loss, lr, damping=1e-2):
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    maker = KfacGradientMaker(model, PreconditioningConfig(data_size=128, damping=damping))

    def step(X, y):
        optimizer.zero_grad()
        output = maker.setup_model_call(model, X)
        maker.setup_loss_call(loss, output, y)
        maker.forward_and_backward()
        optimizer.step()

    return step


def curvlinops_kfac(model, loss, lr, damping=1e-2):
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr, momentum=0.9)

    def step(X, y):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        K = KFACLinearOperator(model, loss, params, [(X, y)], check_deterministic=False)
        inverse = KFACInverseLinearOperator(K, damping=damping, use_exact_damping=True)
        for p, direction in zip(params, inverse @ [p.grad for p in params], strict=True):
            p.grad = direction.detach()
        optimizer.step()

    return step


OPTIMIZERS = {
    "NaturalGradient, exact": (natural, (0.3, 0.5), {"damping": 0.1, "momentum": 0.9}),
    "NaturalGradient, mc": (natural, (0.1, 0.3), {"kind": "mc", "damping": 0.1, "momentum": 0.9, "trust": 0.3}),
    "K-FAC of ASDL": (asdl_kfac, (0.01, 0.03, 0.1), {}),
    "K-FAC of curvlinops": (curvlinops_kfac, (0.01, 0.03, 0.1), {}),
    "Adam": (adam, (3e-3, 1e-2, 3e-2), {}),
}


def run(make, lr, options, seconds, parts=(0.1, 0.3, 1.0)):
    """Return steps per second, and the losses after parts of a processor time."""
    model, loss, train, _ = digits.problem()
    step, done, spent, losses = make(model, loss, lr, **options), 0, 0.0, []
    while True:
        for X, y in digits.epoch(*train):
            started = time.process_time()
            try:
                step(X, y)
            except (RuntimeError, FloatingPointError):  # the rate is too large
                return 0.0, [math.inf] * len(parts)
            spent, done = spent + time.process_time() - started, done + 1
            if spent >= parts[len(losses)] * seconds:
                with torch.no_grad():
                    losses.append(float(loss(model(train[0]), train[1])))
            if len(losses) == len(parts):
                return done / spent, losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="processor time of each run")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    print(f"| optimizer | rate | steps/s | loss at {0.1 * seconds:g} s | {0.3 * seconds:g} s | {seconds:g} s |")
    print("|---|---|---|---|---|---|")
    peers = {asdl_kfac: "asdl", curvlinops_kfac: "curvlinops"}
    for name, (make, rates, options) in OPTIMIZERS.items():
        if make in peers and importlib.util.find_spec(peers[make]) is None:
            continue
        runs = {lr: run(make, lr, options, seconds) for lr in rates}
        lr, (speed, losses) = min(runs.items(), key=lambda item: (math.isnan(item[1][1][-1]), item[1][1][-1]))
        print(f"| {name} | {lr:g} | {speed:.0f} | {' | '.join(f'{value:.1e}' for value in losses)} |", flush=True)


if __name__ == "__main__":
    main()
