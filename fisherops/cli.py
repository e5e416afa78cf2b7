"""The command line: ``python -m fisherops spectrum``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import nn
from tqdm import tqdm

import fisherops
from fisherops import FisherMCLinearOperator
from fisherops._checks import first_line

_LOSSES = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}
_INSTALL = "install it with `pip install 'fisherops[demo]'`"


class _UsageError(Exception):
    """What the user can mend; its message is one line."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        Exit status: 0; 2 with one line on stderr where the input is at fault; 130 after an interrupt.
    """
    parser = _make_parser()
    name = parser.prog
    try:
        arguments = parser.parse_args(argv)
        name = f"{parser.prog} {arguments.command}"
        arguments.run(arguments)
    except _UsageError as error:
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
    spectrum = commands.add_parser(
        "spectrum",
        help="top eigenvalues of a model's Monte-Carlo Fisher",
        description="Top eigenvalues of the Monte-Carlo Fisher of a model, by SciPy's eigsh. Without --model and "
        "--data: of a small convolutional network trained for a few seconds on scikit-learn's handwritten digits.",
    )
    spectrum.set_defaults(run=_spectrum)
    work = spectrum.add_argument_group("your own work")
    work.add_argument("--model", metavar="FILE.py:FACTORY", help="or package.module:FACTORY; called without arguments")
    work.add_argument("--weights", metavar="FILE", type=Path, help="state dict: safetensors, or torch (weights only)")
    work.add_argument("--data", metavar="FILE.npz", type=Path, help="arrays X and y, one row per datum")
    work.add_argument("--loss", choices=list(_LOSSES), help="default: ce")
    fisher = spectrum.add_argument_group("the Fisher")
    fisher.add_argument("--reduction", choices=["mean", "sum"], default="mean", help="default: %(default)s")
    fisher.add_argument("--mc-samples", type=_integer(1), default=1, metavar="M", help="draws per term, default: 1")
    fisher.add_argument("--seed", type=_integer(0), default=2147483647, help="of the draws, default: %(default)s")
    fisher.add_argument("--dtype", choices=["float32", "float64"], help="default: that of the parameters")
    fisher.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...; default: %(default)s")
    fisher.add_argument("--batch-size", type=_integer(1), default=512, metavar="B", help="default: %(default)s")
    solver = spectrum.add_argument_group("the eigenvalues")
    solver.add_argument("-k", type=_integer(1), default=50, help="how many, default: %(default)s")
    solver.add_argument(
        "--tol", type=_tolerance, default=0.0, help="relative accuracy; 0, the default: machine precision"
    )
    output = spectrum.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="for spectrum.json and .png; default: ."
    )
    output.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return parser


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


# ---- spectrum ----------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """What to take the Fisher of."""

    model: nn.Module
    X: Any
    y: Any
    loss: str
    title: str
    held_out_accuracy: float | None


def _spectrum(arguments: argparse.Namespace) -> None:
    plot = _import_plot()
    _make_directory(arguments.out)
    started = time.perf_counter()
    problem = _own_problem(arguments) if arguments.model or arguments.data or arguments.weights else _demo(arguments)
    try:
        op = _operator(problem, arguments)
        D = op.shape[0]
        if arguments.k >= D:
            raise _UsageError(
                f"-k is {arguments.k}, but the model has {D} parameters and eigsh finds fewer than that: "
                + (f"choose k < {D}" if D > 1 else "it cannot be used for one parameter")
            )
        trace = op.trace()
        if trace == 0:
            raise _UsageError("the Fisher of the model on these data is zero, so it has no eigenvalues to find")
        values, products, seconds = _eigenvalues(op, arguments.k, arguments.tol)
    except _UsageError:
        raise
    except Exception as error:  # the model is the user's: anything may come from it
        kind = "" if isinstance(error, ValueError | FloatingPointError) else f"{type(error).__name__}: "
        shapes = f"X {tuple(problem.X.shape)} and y {tuple(problem.y.shape)}"
        raise _UsageError(f"the Fisher of the model on {shapes} failed: {kind}{error}") from None
    result = {
        "fisherops": fisherops.__version__,
        "model": problem.title,
        "loss": problem.loss,
        "reduction": arguments.reduction,
        "parameters": D,
        "data": len(problem.y),
        "mc_samples": arguments.mc_samples,
        "seed": arguments.seed,
        "dtype": op.dtype.name,
        "device": str(op.device),
        "held_out_accuracy": problem.held_out_accuracy,
        "eigenvalues": [float(value) for value in values],
        "trace": trace,
        "share_of_trace": [float(value) / trace if trace > 0 else None for value in values],
        "rank_threshold": plot.rank_threshold(values, D, op.dtype),
        "products": products,
        "eigsh_seconds": round(seconds, 3),
    }
    with _atomic_files(arguments.out / "spectrum.json", arguments.out / "spectrum.png") as (json_file, png_file):
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        ax = plot.spectrum(values, trace=trace, threshold=result["rank_threshold"])
        ax.set_title(f"Monte-Carlo Fisher, {problem.title}\n{D:,} parameters, {len(problem.y):,} data", fontsize=11)
        ax.figure.savefig(png_file, format="png", dpi=160)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        _print_table(result, time.perf_counter() - started, arguments.out)


def _import_plot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise _UsageError(f"matplotlib is needed for the picture and is not installed: {_INSTALL}") from None
    mpl.use("Agg")
    from fisherops import plot

    return plot


def _demo(arguments: argparse.Namespace) -> _Problem:
    if arguments.loss not in (None, "ce"):
        raise _UsageError(f"--loss {arguments.loss} needs --model and --data; the digits are classified with ce")
    from fisherops import _demo as demo

    try:
        model, X, y, accuracy = demo.train()
    except ImportError:
        raise _UsageError(f"scikit-learn is needed for the digits and is not installed: {_INSTALL}") from None
    title = "convolutional network on scikit-learn's digits"
    return _Problem(model, X, y, "ce", title, accuracy)


def _own_problem(arguments: argparse.Namespace) -> _Problem:
    if not arguments.model or not arguments.data:
        given = "--model" if arguments.model else "--data" if arguments.data else "--weights"
        raise _UsageError(f"{given} was given alone: give both --model FILE.py:FACTORY and --data FILE.npz")
    loss = arguments.loss or "ce"
    X, y = _load_data(arguments.data, loss)
    model = _load_model(arguments.model)
    if arguments.weights:
        _load_weights(model, arguments.weights)
    return _Problem(model.eval(), X, y, loss, arguments.model, None)


def _load_data(path: Path, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise _UsageError(f"--data {path} is one array, not an archive: write numpy.savez(FILE, X=..., y=...)")
        with file:
            missing = {"X", "y"} - set(file.files)
            if missing:
                raise _UsageError(
                    f"--data {path} has the arrays {sorted(file.files)}: X and y are needed, "
                    "write numpy.savez(FILE, X=..., y=...)"
                )
            X, y = file["X"], file["y"]
    except FileNotFoundError:
        raise _UsageError(f"--data {path} does not exist: give an .npz file with arrays X and y") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _UsageError(f"--data {path} cannot be read as .npz: {error}") from None
    for name, array in (("X", X), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise _UsageError(f"{name} in {path} has dtype {array.dtype}: real numbers are taken")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0]) if array.ndim else 0
            raise _UsageError(f"{name} in {path} has NaN or infinity in row {row}: remove or impute it")
        if array.ndim == 0 or len(array) == 0 or len(X) != len(y):
            raise _UsageError(
                f"X and y in {path} have shapes {X.shape} and {y.shape}: they must have one row for each datum"
            )
    if loss == "ce" and y.dtype.kind == "f":
        raise _UsageError(f"y in {path} has dtype {y.dtype}: --loss ce takes integer classes, mse and bce take floats")
    return torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(np.ascontiguousarray(y))


def _load_model(where: str) -> nn.Module:
    source, separator, name = where.rpartition(":")
    if not separator or not source or not name:
        raise _UsageError(f"--model is {where!r}: write FILE.py:FACTORY or package.module:FACTORY")
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    try:
        factory = getattr(module, name)
    except AttributeError:
        public = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise _UsageError(f"--model: {source} has no {name!r}; it has {', '.join(public) or 'no callables'}") from None
    model = factory
    if not isinstance(factory, nn.Module):
        try:
            model = factory()
        except Exception as error:
            raise _UsageError(f"--model: {name} in {source} raised {type(error).__name__}: {error}") from None
    if not isinstance(model, nn.Module):
        raise _UsageError(f"--model: {name} in {source} returned {type(model).__name__}: it must return an nn.Module")
    return model


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise _UsageError(f"--model: the file {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # pickled classes and dataclasses look their module up here
    sys.path.insert(0, str(path.parent))  # as if the file were run as a script
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _UsageError(f"--model: {path} raised {type(error).__name__}: {error}") from None
    return module


def _import_module(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _UsageError(f"--model: importing {name} raised {type(error).__name__}: {error}") from None


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise _UsageError(f"--weights {path} is no file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise _UsageError(f"safetensors is needed for {path} and is not installed: {_INSTALL}") from None
    except Exception as error:
        raise _UsageError(
            f"--weights {path} cannot be read: {type(error).__name__}: {first_line(error)} "
            "(safetensors and torch files of tensors alone are taken)"
        ) from None
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _UsageError(f"--weights {path} do not fit the model: {error}") from None


def _operator(problem: _Problem, arguments: argparse.Namespace) -> FisherMCLinearOperator:
    try:
        device = torch.device(arguments.device)
        model = problem.model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise _UsageError(f"--device {arguments.device} cannot be used: {first_line(error)}") from None
    loss = _LOSSES[problem.loss](reduction=arguments.reduction)
    X, y = problem.X, problem.y
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if X.is_floating_point() and dtype is not None:
        X = X.to(dtype)
    return FisherMCLinearOperator(
        model, loss, None, (X, y), seed=arguments.seed, mc_samples=arguments.mc_samples, dtype=arguments.dtype,
        batch_size=arguments.batch_size,
    )  # fmt: skip


def _eigenvalues(op: FisherMCLinearOperator, k: int, tol: float) -> tuple[np.ndarray[Any, Any], int, float]:
    """Return the top k eigenvalues in falling order, the number of products, and the time in seconds."""
    started = time.perf_counter()
    products = itertools.count()
    with tqdm(desc="eigsh", unit=" products", leave=False, disable=None) as bar:

        def multiply(x: Any) -> Any:
            next(products)
            bar.update()
            return op @ x

        v0 = np.random.default_rng(0).standard_normal(op.shape[0]).astype(op.dtype)
        try:
            counted = LinearOperator(op.shape, matvec=multiply, dtype=op.dtype)
            values = eigsh(counted, k=k, tol=tol, v0=v0, return_eigenvectors=False)
        except ArpackNoConvergence as error:
            raise _UsageError(
                f"eigsh found {len(error.eigenvalues)} of {k} eigenvalues to --tol {tol:g} and gave up after "
                f"{next(products)} products: ask for fewer, or for a larger --tol such as 1e-3"
            ) from None
    return np.sort(values)[::-1], next(products), time.perf_counter() - started


# ---- output --------------------------------------------------------------------------------------------


def _print_table(result: dict[str, Any], seconds: float, out: Path) -> None:
    accuracy = result["held_out_accuracy"]
    print(f"Monte-Carlo Fisher of {result['model']}")
    print(
        f"{result['parameters']:,} parameters, {result['data']:,} data, loss {result['loss']} ({result['reduction']}), "
        f"{result['mc_samples']} draw(s) per term, {result['dtype']} on {result['device']}"
    )
    if accuracy is not None:
        print(f"held-out accuracy: {accuracy:.1%}")
    print()
    print(f"{'rank':>4}  {'eigenvalue':>12}  {'share of trace':>14}  {'cumulative':>10}")
    cumulative = 0.0
    for rank, (value, share) in enumerate(zip(result["eigenvalues"], result["share_of_trace"], strict=True), 1):
        cumulative += share or 0.0
        print(f"{rank:>4}  {value:>12.5e}  {share or 0.0:>14.2%}  {cumulative:>10.2%}")
    print()
    above = sum(value > result["rank_threshold"] for value in result["eigenvalues"])
    rank_text = f"{above}" if above < len(result["eigenvalues"]) else f"at least {above}"
    print(f"trace {result['trace']:.5e}; numerical rank {rank_text} (eigenvalues above {result['rank_threshold']:.1e})")
    print(f"{result['products']} products in {result['eigsh_seconds']:.1f} s; {seconds:.1f} s in all")
    print(f"wrote {out / 'spectrum.png'} and {out / 'spectrum.json'}")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _UsageError(f"--out {path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise _UsageError(f"--out {path} cannot be written to: choose another directory")


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
            raise _UsageError(f"cannot write to {targets[0].parent}: {error.strerror}") from None
