"""What the command line takes the Fisher of: a model, its weights and data from files, or the demonstration."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fisherops._checks import first_line
from fisherops.distributed import shard
from fisherops.operators import FisherMCLinearOperator

LOSSES = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}
INSTALL = "install it with `pip install 'fisherops[demo]'`"


class UsageError(Exception):
    """What the user can mend; its message is one line."""


class Problem(NamedTuple):
    """What to take the Fisher of."""

    model: nn.Module
    X: Any
    y: Any
    loss: str
    title: str
    held_out_accuracy: float | None


def demo(arguments: argparse.Namespace) -> Problem:
    """Return the demonstration: a small convolutional network, trained on scikit-learn's digits."""
    if arguments.loss not in (None, "ce"):
        raise UsageError(f"--loss {arguments.loss} needs --model and --data; the digits are classified with ce")
    from fisherops import _demo

    try:
        model, X, y, accuracy = _demo.train()
    except ImportError:
        raise UsageError(f"scikit-learn is needed for the digits and is not installed: {INSTALL}") from None
    title = "convolutional network on scikit-learn's digits"
    return Problem(model, X, y, "ce", title, accuracy)


def own_problem(arguments: argparse.Namespace) -> Problem:
    """Return the model and data that the user names."""
    if not arguments.model or not arguments.data:
        given = "--model" if arguments.model else "--data" if arguments.data else "--weights"
        raise UsageError(f"{given} was given alone: give both --model FILE.py:FACTORY and --data FILE.npz")
    loss = arguments.loss or "ce"
    X, y = _load_data(arguments.data, loss)
    model = _load_model(arguments.model)
    if arguments.weights:
        _load_weights(model, arguments.weights)
    return Problem(model.eval(), X, y, loss, arguments.model, None)


def _load_data(path: Path, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UsageError(f"--data {path} is one array, not an archive: write numpy.savez(FILE, X=..., y=...)")
        with file:
            missing = {"X", "y"} - set(file.files)
            if missing:
                raise UsageError(
                    f"--data {path} has the arrays {sorted(file.files)}: X and y are needed, "
                    "write numpy.savez(FILE, X=..., y=...)"
                )
            X, y = file["X"], file["y"]
    except FileNotFoundError:
        raise UsageError(f"--data {path} does not exist: give an .npz file with arrays X and y") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"--data {path} cannot be read as .npz: {error}") from None
    for name, array in (("X", X), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise UsageError(f"{name} in {path} has dtype {array.dtype}: real numbers are taken")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0]) if array.ndim else 0
            raise UsageError(f"{name} in {path} has NaN or infinity in row {row}: remove or impute it")
        if array.ndim == 0 or len(array) == 0 or len(X) != len(y):
            raise UsageError(
                f"X and y in {path} have shapes {X.shape} and {y.shape}: they must have one row for each datum"
            )
    if loss == "ce" and y.dtype.kind == "f":
        raise UsageError(f"y in {path} has dtype {y.dtype}: --loss ce takes integer classes, mse and bce take floats")
    return torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(np.ascontiguousarray(y))


def _load_model(where: str) -> nn.Module:
    source, separator, name = where.rpartition(":")
    if not separator or not source or not name:
        raise UsageError(f"--model is {where!r}: write FILE.py:FACTORY or package.module:FACTORY")
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    try:
        factory = getattr(module, name)
    except AttributeError:
        public = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise UsageError(f"--model: {source} has no {name!r}; it has {', '.join(public) or 'no callables'}") from None
    model = factory
    if not isinstance(factory, nn.Module):
        try:
            model = factory()
        except Exception as error:
            raise UsageError(f"--model: {name} in {source} raised {type(error).__name__}: {error}") from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model: {name} in {source} returned {type(model).__name__}: it must return an nn.Module")
    return model


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"--model: the file {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # pickled classes and dataclasses look their module up here
    sys.path.insert(0, str(path.parent))  # as if the file were run as a script
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--model: {path} raised {type(error).__name__}: {error}") from None
    return module


def _import_module(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(f"--model: importing {name} raised {type(error).__name__}: {error}") from None


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"--weights {path} is no file")
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
            f"--weights {path} cannot be read: {type(error).__name__}: {first_line(error)} "
            "(safetensors and torch files of tensors alone are taken)"
        ) from None
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"--weights {path} do not fit the model: {error}") from None


def make_operator(problem: Problem, arguments: argparse.Namespace) -> FisherMCLinearOperator:
    """Return the Monte-Carlo Fisher that the options describe."""
    group = arguments.group
    try:
        device = torch.device(arguments.device)
        if group and arguments.device == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())  # that of this process on its machine
        model = problem.model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {arguments.device} cannot be used: {first_line(error)}") from None
    loss = LOSSES[problem.loss](reduction=arguments.reduction)
    X, y = problem.X, problem.y
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if X.is_floating_point() and dtype is not None:
        X = X.to(dtype)
    data = shard((X, y), group, batch_size=arguments.batch_size) if group else (X, y)
    return FisherMCLinearOperator(
        model, loss, None, data, seed=arguments.seed, mc_samples=arguments.mc_samples, dtype=arguments.dtype,
        batch_size=None if group else arguments.batch_size, process_group=group,
    )  # fmt: skip
