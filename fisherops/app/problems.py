"""The model, weights, data and operator that the options name, or the demonstration."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fisherops._checks import first_line
from fisherops.app.progress import Progress
from fisherops.fisher import FisherOperator
from fisherops.operators import EmpiricalFisherLinearOperator, FisherLinearOperator, FisherMCLinearOperator

LOSSES: dict[str, Any] = {
    "ce": nn.CrossEntropyLoss,
    "nll": nn.NLLLoss,
    "bce": nn.BCEWithLogitsLoss,
    "bce-probabilities": nn.BCELoss,
    "mse": nn.MSELoss,
    "gaussian": nn.GaussianNLLLoss,
    "l1": nn.L1Loss,
    "smooth-l1": nn.SmoothL1Loss,
    "huber": nn.HuberLoss,
    "poisson": nn.PoissonNLLLoss,
    "distribution": None,
}
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "mc": (FisherMCLinearOperator, ("rows", "mc_samples", "seed")),
    "exact": (FisherLinearOperator, ()),
    "empirical": (EmpiricalFisherLinearOperator, ("rows",)),
}
INSTALL = "install it with `pip install 'fisherops[demo]'`"


class UsageError(Exception):
    """An error that the user can correct, with a message of one line."""


class Problem(NamedTuple):
    """A model with its data and loss, and perhaps data to ask about."""

    model: nn.Module
    X: Any
    y: Any
    loss: str
    title: str
    held_out_accuracy: float | None
    query: tuple[Any, Any] | None = None

    @property
    def has_images(self) -> bool:
        """Whether the examples, and those to ask about, are images (1 or 3, height, width) or with channels last."""
        arrays = () if self.query is None else (self.X, self.query[0])
        return bool(arrays) and all(X.ndim == 4 and ({1, 3} & {X.shape[1], X.shape[3]}) for X in arrays)


def load_problem(arguments: argparse.Namespace, progress: Progress) -> Problem:
    """Return the model and data that the options name, or the demonstration if they name none."""
    files = {"--train": arguments.data, "--query": arguments.query} if asks(arguments) else {"--data": arguments.data}
    if not (arguments.model or any(files.values()) or arguments.weights):
        return _demo(arguments, progress)
    if not arguments.model or not all(files.values()):
        given = {"--model": arguments.model, **files, "--weights": arguments.weights}
        names = [name for name, value in given.items() if value]
        needed = ["--model FILE.py:FACTORY", *(f"{name} FILE.npz" for name in files)]
        raise UsageError(
            f"{' and '.join(names)} {'was' if len(names) == 1 else 'were'} given alone: give "
            f"{'both ' if len(needed) == 2 else ''}{', '.join(needed[:-1])} and {needed[-1]}"
        )
    progress.start("loading the model and the data")
    loss = arguments.loss or "ce"
    (X, y), *others = (_load_data(path, loss, name) for name, path in files.items())
    for other, _ in others:
        if other.shape[1:] != X.shape[1:]:
            raise UsageError(
                f"X in {arguments.query} has shape {other.shape}, and X in {arguments.data} {X.shape}: all examples "
                "must have one shape"
            )
    model = _load_model(arguments.model)
    if arguments.weights:
        _load_weights(model, arguments.weights)
    return Problem(model.eval(), X, y, loss, arguments.model, None, *others)


def asks(arguments: argparse.Namespace) -> bool:
    """Return whether a command asks about other data than those of the Fisher matrix."""
    return hasattr(arguments, "query")


def _demo(arguments: argparse.Namespace, progress: Progress) -> Problem:
    if arguments.loss not in (None, "ce"):
        data = "--train" if asks(arguments) else "--data"
        raise UsageError(f"--loss {arguments.loss} needs --model and {data}; the digits are classified with ce")
    from fisherops.app import demo

    progress.start("training a small convolutional network on scikit-learn's digits")
    try:
        model, X, y, held_out, accuracy = demo.train(progress.report)
    except ImportError:
        raise UsageError(f"scikit-learn is needed for the digits and is not installed: {INSTALL}") from None
    query = demo.hardest(model, *held_out) if asks(arguments) else None
    return Problem(model, X, y, "ce", "convolutional network on scikit-learn's digits", accuracy, query)


# ---- Data, model and weights ---------------------------------------------------------------------------


def _load_data(path: Path, loss: str, option: str) -> tuple[Any, Any]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UsageError(f"{option} {path} is one array, not an archive: write numpy.savez(FILE, X=..., y=...)")
        with file:
            missing = {"X", "y"} - set(file.files)
            if missing:
                raise UsageError(
                    f"{option} {path} has the arrays {sorted(file.files)}: X and y are needed, "
                    "write numpy.savez(FILE, X=..., y=...)"
                )
            X, y = file["X"], file["y"]
    except FileNotFoundError:
        raise UsageError(f"{option} {path} does not exist: give an .npz file with arrays X and y") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{option} {path} cannot be read as .npz: {error}") from None
    for name, array in (("X", X), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise UsageError(f"{name} in {path} has dtype {array.dtype}: it must be real numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0]) if array.ndim else 0
            raise UsageError(f"{name} in {path} has NaN or infinity in row {row}: remove or impute it")
        if array.ndim == 0 or len(array) == 0 or len(X) != len(y):
            raise UsageError(
                f"X and y in {path} have shapes {X.shape} and {y.shape}: they must have one row for each example"
            )
    if loss in ("ce", "nll") and y.dtype.kind == "f" and y.ndim == 1:
        raise UsageError(f"y in {path} has dtype {y.dtype}: --loss {loss} takes integer classes, other losses floats")
    return X, y


def is_one_hot(y: Any) -> bool:
    """Return whether integer targets are rows of one 1 and otherwise 0."""
    return y.ndim > 1 and y.dtype.kind in "biu" and bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())


def _load_model(where: str) -> nn.Module:
    source, separator, name = where.rpartition(":")
    if not separator or not source or not name:
        raise UsageError(f"--model is {where!r}: write FILE.py:FACTORY or package.module:FACTORY")
    module = _import(source)
    try:
        model = getattr(module, name)
    except AttributeError:
        public = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise UsageError(f"--model: {source} has no {name!r}; it has {', '.join(public) or 'no callables'}") from None
    if not isinstance(model, nn.Module):
        try:
            model = model()
        except Exception as error:
            raise UsageError(f"--model: {name} in {source} raised {type(error).__name__}: {error}") from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model: {name} in {source} returned {type(model).__name__}: it must return an nn.Module")
    return model


def _import(source: str) -> Any:
    path = Path(source)
    if not source.endswith(".py"):
        _search(Path.cwd())
        try:
            return importlib.import_module(source)
        except Exception as error:
            raise UsageError(f"--model: importing {source} raised {type(error).__name__}: {error}") from None
    if not path.is_file():
        raise UsageError(f"--model: the file {path} does not exist")
    # Dataclasses look up the module of a class by name. The name must not be that of another module.
    spec = importlib.util.spec_from_file_location(f"fisherops model {path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    _search(path.parent.absolute())
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--model: {path} raised {type(error).__name__}: {error}") from None
    return module


def _search(folder: Path) -> None:
    """Search a folder for modules, after the standard library and before installed packages.

    A script's folder comes first in Python. Here a file that is named like a standard module must not replace it.
    """
    standard = sysconfig.get_path("stdlib")
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").absolute() != folder]
    last = [i for i, entry in enumerate(sys.path) if entry.startswith(standard) and "-packages" not in entry]
    sys.path.insert(max(last, default=-1) + 1, str(folder))


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"--weights {path} is not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UsageError(f"safetensors is needed for {path} and is not installed: {INSTALL}") from None
    except Exception as error:
        raise UsageError(
            f"--weights {path} cannot be read: {type(error).__name__}: {first_line(error)} (it must be a safetensors "
            "file, or a torch file that holds tensors only: save model.state_dict())"
        ) from None
    own = model.state_dict()
    state = _unwrap(state, own)
    if not isinstance(state, Mapping):
        raise UsageError(f"--weights {path} holds {type(state).__name__}, not a state dict: save model.state_dict()")
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is not in the model" for name in state if name not in own]
    if not wrong:
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            wrong = [str(error)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(f"--weights {path} do not fit the model: {', '.join(wrong[:3])}{more}")


def _unwrap(state: Any, own: Mapping[str, Any]) -> Any:
    """Take a state dict out of a checkpoint, and the prefixes of wrappers off its names."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and key not in own and isinstance(state.get(key), Mapping):
            state = state[key]
    for prefix in ("module.", "_orig_mod.", "model."):  # of DataParallel, torch.compile and Lightning
        if isinstance(state, Mapping) and not any(name in own for name in state):
            state = {str(name).removeprefix(prefix): value for name, value in state.items()}
    return state


# ---- The operator --------------------------------------------------------------------------------------


def reported(batches: Sequence[Any], progress: Progress) -> Any:
    """Return batches that report which of them is read."""
    return _Batches(batches, progress)


class _Batches:
    """Batches that report which of them is read."""

    def __init__(self, batches: Sequence[Any], progress: Progress) -> None:
        self._batches, self._progress = batches, progress

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._batches, 1):
            self._progress.report(f"batch {number:,} of {len(self._batches):,}")
            yield batch
        self._progress.report("")


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that do not apply to the kind or loss."""
    for name in ("rows", "mc_samples", "seed"):
        if getattr(arguments, name) is not None and name not in KINDS[arguments.kind][1]:
            raise UsageError(f"--{name.replace('_', '-')} does not apply to --kind {arguments.kind}: leave it out")
    if arguments.loss == "distribution" and arguments.reduction == "mean":
        raise UsageError("--reduction mean does not apply to --loss distribution, which is a sum: leave it out")


def make_operator(
    problem: Problem, arguments: argparse.Namespace, batches: Sequence[Any], progress: Progress, **shared: Any
) -> FisherOperator:
    """Return the operator that the options describe, of batches that may be shared with other processes."""
    try:
        device = torch.device(arguments.device)
        if shared and arguments.device == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())  # that of this process on its machine
        model = problem.model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {arguments.device} cannot be used: {first_line(error)}") from None
    loss = LOSSES[problem.loss]
    make, names = KINDS[arguments.kind]
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    op: FisherOperator = make(
        model, loss and loss(reduction=arguments.reduction or "mean"), _parameters(model, arguments.params),
        reported(batches, progress), dtype=arguments.dtype, cache=arguments.cache, max_memory=arguments.max_memory,
        **shared, **options,
    )  # fmt: skip
    return op


def _parameters(model: nn.Module, patterns: Sequence[str] | None) -> list[Tensor] | None:
    if patterns is None:
        return None
    named = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise UsageError(f"--params {pattern} matches no parameter; the model has {', '.join(named)}")
    return [p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
