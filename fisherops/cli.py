"""The command line: ``python -m fisherops spectrum``, ``density``, ``solve`` and ``trace``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

import fisherops
from fisherops import FisherMCLinearOperator, _launch, linalg
from fisherops._problem import INSTALL, LOSSES, Problem, UsageError, demo, make_operator, own_problem


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        Exit status: 0; 2 with one line on stderr where the input is at fault; 130 after an interrupt.
    """
    parser = _make_parser()
    name, heard = parser.prog, True
    try:
        arguments = parser.parse_args(argv)
        name = f"{parser.prog} {arguments.command}"
        out = getattr(arguments, "out", Path())
        with _launch.joined(arguments.device) as arguments.group, _launch.folder(out, arguments.group) as arguments.out:
            heard = _launch.is_first(arguments.group)
            arguments.run(arguments)
    except UsageError as error:
        if heard:
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing was written.", file=sys.stderr)
        return 130
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m fisherops", description=fisherops.__doc__)
    parser.add_argument("--version", action="version", version=f"fisherops {fisherops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    demonstration = (
        " Without --model and --data: of a small convolutional network trained for a few seconds on scikit-learn's "
        "handwritten digits."
    )

    def add(name: str, help_: str, run: Callable[[argparse.Namespace], None], files: str | None) -> Any:
        command = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + "." + demonstration)
        command.set_defaults(run=run)
        _add_problem(command)
        output = command.add_argument_group("output")
        if files:
            output.add_argument("--out", type=Path, default=Path(), metavar="DIR", help=f"for {files}; default: .")
        output.add_argument("--json", action="store_true", help="print JSON in place of the table")
        return command.add_argument_group("the computation")

    spectrum = add("spectrum", "top eigenvalues of a model's Monte-Carlo Fisher", _spectrum, "spectrum.json and .png")
    spectrum.add_argument("-k", type=_integer(1), default=50, help="how many, default: %(default)s")
    spectrum.add_argument(
        "--tol", type=_tolerance, default=0.0, help="relative accuracy; 0, the default: machine precision"
    )
    density = add("density", "how many eigenvalues of a model's Monte-Carlo Fisher are how large", _density,
                  "density.json and .png")  # fmt: skip
    density.add_argument("--probes", type=_integer(2), default=20, help="random vectors, default: %(default)s")
    density.add_argument("--steps", type=_integer(1), default=80, help="products with each, default: %(default)s")
    solve = add("solve", "the natural gradient (F + λI)⁻¹∇loss of a model", _solve, "natural_gradient.npz")
    solve.add_argument("--damping", type=_positive, required=True, metavar="λ", help="in the units of the eigenvalues")
    solve.add_argument("--rtol", type=_tolerance, default=1e-5, help="relative residual, default: %(default)s")
    trace = add("trace", "the trace of a model's Monte-Carlo Fisher, and what else a number can say", _trace, None)
    trace.add_argument(
        "--damping",
        type=_positive,
        metavar="λ",
        help="for the effective dimension and log det(F + λI); default: neither",
    )
    for command in (spectrum, density, solve, trace):
        command.add_argument(
            "--method", choices=["auto", "dual", "dense", "primal"], default="auto",
            help="from the Gram matrix, F as a dense matrix, or products; default: the cheapest",
        )  # fmt: skip
    for command in (spectrum, solve):
        command.add_argument("--checkpoint", type=Path, metavar="FILE", help="of --method primal, to go on from")
    return parser


def _add_problem(command: argparse.ArgumentParser) -> None:
    work = command.add_argument_group("your own work")
    work.add_argument("--model", metavar="FILE.py:FACTORY", help="or package.module:FACTORY; called without arguments")
    work.add_argument("--weights", metavar="FILE", type=Path, help="state dict: safetensors, or torch (weights only)")
    work.add_argument("--data", metavar="FILE.npz", type=Path, help="arrays X and y, one row per datum")
    work.add_argument("--loss", choices=list(LOSSES), help="default: ce")
    fisher = command.add_argument_group("the Fisher")
    fisher.add_argument("--reduction", choices=["mean", "sum"], default="mean", help="default: %(default)s")
    fisher.add_argument("--mc-samples", type=_integer(1), default=1, metavar="M", help="draws per term, default: 1")
    fisher.add_argument("--seed", type=_integer(0), default=2147483647, help="of the draws, default: %(default)s")
    fisher.add_argument("--dtype", choices=["float32", "float64"], help="default: that of the parameters")
    fisher.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...; default: %(default)s")
    fisher.add_argument("--batch-size", type=_integer(1), default=512, metavar="B", help="default: %(default)s")


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, an integer of at least {least} is taken") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"got {value}, an integer of at least {least} is taken")
        return value

    return parse


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, a number from 0 to 1 is taken")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, a number above 0 is taken")
    return value


# ---- The commands ------------------------------------------------------------------------------------


def _problem(arguments: argparse.Namespace) -> Problem:
    own = arguments.model or arguments.data or arguments.weights
    return _launch.load_alike(lambda: own_problem(arguments) if own else demo(arguments), arguments.group)


@contextlib.contextmanager
def _on(problem: Problem, arguments: argparse.Namespace) -> Iterator[FisherMCLinearOperator]:
    """Give the operator; what goes wrong with it is the user's model or data."""
    try:
        yield make_operator(problem, arguments)
    except UsageError:
        raise
    except Exception as error:  # the model is the user's: anything may come from it
        kind = "" if isinstance(error, ValueError | FloatingPointError) else f"{type(error).__name__}: "
        shapes = f"X {tuple(problem.X.shape)} and y {tuple(problem.y.shape)}"
        raise UsageError(f"the Fisher of the model on {shapes} failed: {kind}{error}") from None


def _describe(problem: Problem, op: FisherMCLinearOperator, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "fisherops": fisherops.__version__,
        "model": problem.title,
        "loss": problem.loss,
        "reduction": arguments.reduction,
        "parameters": op.shape[0],
        "data": len(problem.y),
        "mc_samples": arguments.mc_samples,
        "seed": arguments.seed,
        "dtype": op.dtype.name,
        "device": str(op.device),
        "processes": op.ranks.size,
        "held_out_accuracy": problem.held_out_accuracy,
    }


def _spectrum(arguments: argparse.Namespace) -> None:
    plot = _import_plot()
    _make_directory(arguments.out)
    started = time.perf_counter()
    problem = _problem(arguments)
    with _on(problem, arguments) as op:
        D = op.shape[0]
        if arguments.k > D:
            raise UsageError(f"-k is {arguments.k}, but the model has {D} parameters: choose k ≤ {D}")
        trace = op.trace()
        if trace == 0:
            raise UsageError("the Fisher of the model on these data is zero, so it has no eigenvalues to find")
        begun = time.perf_counter()
        pairs = linalg.eigsh(
            op, arguments.k, tol=arguments.tol, method=arguments.method, return_eigenvectors=False,
            progressbar=sys.stderr.isatty(), checkpoint=arguments.checkpoint,
        )  # fmt: skip
        seconds = time.perf_counter() - begun
    if not pairs.converged:
        raise UsageError(
            f"eigsh gave up after {pairs.products} products before --tol {arguments.tol:g}: ask for fewer eigenvalues, "
            "or for a larger --tol such as 1e-3"
        )
    values = pairs.eigenvalues[::-1]
    result = _describe(problem, op, arguments) | {
        "eigenvalues": [float(value) for value in values],
        "trace": trace,
        "share_of_trace": [float(value) / trace if trace > 0 else None for value in values],
        "rank_threshold": plot.rank_threshold(values, D, op.dtype),
        "method": pairs.method,
        "products": pairs.products,
        "eigsh_seconds": round(seconds, 3),
    }
    with _atomic_files(arguments.out / "spectrum.json", arguments.out / "spectrum.png") as (json_file, png_file):
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        ax = plot.spectrum(values, trace=trace, threshold=result["rank_threshold"])
        ax.set_title(_title(problem, op), fontsize=11)
        ax.figure.savefig(png_file, format="png", dpi=160)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        _print_table(result, time.perf_counter() - started, arguments.out)


def _density(arguments: argparse.Namespace) -> None:
    plot = _import_plot()
    _make_directory(arguments.out)
    problem = _problem(arguments)
    with _on(problem, arguments) as op:
        density = linalg.spectral_density(op, method=arguments.method, probes=arguments.probes, steps=arguments.steps)
    result = _describe(problem, op, arguments) | {
        "method": density.method,
        "grid": density.grid.tolist(),
        "counts": density.counts.tolist(),
        "standard_error": density.standard_error.tolist(),
        "below": density.below,
        "above": density.above,
    }
    with _atomic_files(arguments.out / "density.json", arguments.out / "density.png") as (json_file, png_file):
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        ax = plot.density(density)
        ax.set_title(_title(problem, op), fontsize=11)
        ax.figure.savefig(png_file, format="png", dpi=160)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    _print_head(result)
    print(f"{'from':>12}  {'to':>12}  {'eigenvalues':>12}  {'std. error':>10}")
    for low, high, count, error in zip(
        density.grid[:-1], density.grid[1:], density.counts, density.standard_error, strict=True
    ):
        if count > 0:
            print(f"{low:>12.3e}  {high:>12.3e}  {count:>12.1f}  {error:>10.1f}")
    print(f"\n{density.below:,.0f} below {density.grid[0]:.1e}; method {density.method}")
    print(f"wrote {arguments.out / 'density.png'} and {arguments.out / 'density.json'}")


def _solve(arguments: argparse.Namespace) -> None:
    _make_directory(arguments.out)
    problem = _problem(arguments)
    with _on(problem, arguments) as op:
        gradient = _gradient(problem, op, arguments)
        solution = linalg.solve(
            op, gradient, arguments.damping, method=arguments.method, rtol=arguments.rtol,
            progressbar=sys.stderr.isatty(), checkpoint=arguments.checkpoint,
        )  # fmt: skip
        if not solution.converged:
            raise UsageError(
                f"the residual is {solution.residual:.1e} after {solution.iterations} iterations and does not come to "
                f"--rtol {arguments.rtol:g}: choose a larger one, or a larger --damping, or --dtype float64"
            )
    result = _describe(problem, op, arguments) | {
        "damping": arguments.damping,
        "method": solution.method,
        "iterations": solution.iterations,
        "gradient_norm": float(gradient.norm()),
        "residual": solution.residual,
        "norm": float(solution.x.norm()),
        "decrease": float(gradient @ solution.x),
    }
    arrays = {
        name: solution.x[slice(*span)].reshape(op.parameter_shapes[name]).cpu().numpy()
        for name, span in op.parameter_spans.items()
    }
    with _atomic_files(arguments.out / "natural_gradient.npz") as (file,), file.open("wb") as stream:
        np.savez(stream, **arrays)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    _print_head(result)
    print(f"‖∇loss‖ {result['gradient_norm']:.5e}, damping {arguments.damping:g}")
    print(f"‖x‖ {result['norm']:.5e}, ⟨∇loss, x⟩ {result['decrease']:.5e}")
    print(f"residual {solution.residual:.1e} in {solution.iterations} iterations; method {solution.method}")
    print(f"wrote {arguments.out / 'natural_gradient.npz'}")


def _gradient(problem: Problem, op: FisherMCLinearOperator, arguments: argparse.Namespace) -> torch.Tensor:
    """Return the gradient of the loss over all data, in the operator's order and precision."""
    loss = LOSSES[problem.loss](reduction="sum")
    terms = 0
    names = dict(problem.model.named_parameters())
    total = torch.zeros(op.shape[0], dtype=op.torch_dtype, device=op.device)
    for X, y in zip(problem.X.split(arguments.batch_size), problem.y.split(arguments.batch_size), strict=True):
        parameter = names[next(iter(op.parameter_shapes))]
        X = X.to(parameter.device, parameter.dtype if X.is_floating_point() else None)
        f = problem.model(X)
        y = y.to(f.device, torch.int64 if problem.loss == "ce" else f.dtype)
        terms += y.numel() if problem.loss == "ce" else f.numel()
        gradients = torch.autograd.grad(loss(f, y), [names[name] for name in op.parameter_shapes])
        total += torch.cat([g.reshape(-1) for g in gradients]).to(total)
    return total / terms if arguments.reduction == "mean" else total


def _trace(arguments: argparse.Namespace) -> None:
    problem = _problem(arguments)
    with _on(problem, arguments) as op:
        norm = linalg.frobenius_norm(op, method=arguments.method)
        numbers = {"trace": op.trace(), "frobenius_norm": norm.value}
        errors = {"frobenius_norm": norm.standard_error}
        if arguments.damping is not None:
            dimension = linalg.effective_dimension(op, arguments.damping, method=arguments.method)
            log = linalg.slogdet(op, arguments.damping, method=arguments.method)
            numbers |= {"effective_dimension": dimension.value, "log_determinant": log.logabsdet}
            errors |= {"effective_dimension": dimension.standard_error, "log_determinant": log.standard_error}
    result = _describe(problem, op, arguments) | {"damping": arguments.damping, "method": norm.method} | numbers
    result["standard_errors"] = errors
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    _print_head(result)
    for name, value in numbers.items():
        error = errors.get(name, 0.0)
        print(f"{name.replace('_', ' '):>20}  {value:>14.6e}" + (f"  ± {error:.1e}" if error else ""))


def _import_plot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise UsageError(f"matplotlib is needed for the picture and is not installed: {INSTALL}") from None
    mpl.use("Agg")
    from fisherops import plot

    return plot


# ---- output --------------------------------------------------------------------------------------------


def _title(problem: Problem, op: FisherMCLinearOperator) -> str:
    return f"Monte-Carlo Fisher, {problem.title}\n{op.shape[0]:,} parameters, {len(problem.y):,} data"


def _print_head(result: dict[str, Any]) -> None:
    print(f"Monte-Carlo Fisher of {result['model']}")
    print(
        f"{result['parameters']:,} parameters, {result['data']:,} data, loss {result['loss']} ({result['reduction']}), "
        f"{result['mc_samples']} draw(s) per term, {result['dtype']} on {result['device']}"
        + (f" in {result['processes']} processes" if result["processes"] > 1 else "")
    )
    if result["held_out_accuracy"] is not None:
        print(f"held-out accuracy: {result['held_out_accuracy']:.1%}")
    print()


def _print_table(result: dict[str, Any], seconds: float, out: Path) -> None:
    _print_head(result)
    print(f"{'rank':>4}  {'eigenvalue':>12}  {'share of trace':>14}  {'cumulative':>10}")
    cumulative = 0.0
    for rank, (value, share) in enumerate(zip(result["eigenvalues"], result["share_of_trace"], strict=True), 1):
        cumulative += share or 0.0
        print(f"{rank:>4}  {value:>12.5e}  {share or 0.0:>14.2%}  {cumulative:>10.2%}")
    print()
    above = sum(value > result["rank_threshold"] for value in result["eigenvalues"])
    rank_text = f"{above}" if above < len(result["eigenvalues"]) else f"at least {above}"
    print(f"trace {result['trace']:.5e}; numerical rank {rank_text} (eigenvalues above {result['rank_threshold']:.1e})")
    print(
        f"method {result['method']}, {result['products']} products in {result['eigsh_seconds']:.1f} s; "
        f"{seconds:.1f} s in all"
    )
    print(f"wrote {out / 'spectrum.png'} and {out / 'spectrum.json'}")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"--out {path} cannot be written to: choose another directory")


@contextlib.contextmanager
def _atomic_files(*targets: Path) -> Iterator[list[Path]]:
    """Give temporary files that take the place of the targets together, once all are complete."""
    with tempfile.TemporaryDirectory(dir=targets[0].parent, prefix=".fisherops-") as folder:
        temporary = [Path(folder) / target.name for target in targets]
        try:
            yield temporary
            for source, target in zip(temporary, targets, strict=True):
                source.replace(target)
        except OSError as error:
            raise UsageError(f"cannot write to {targets[0].parent}: {error.strerror}") from None
