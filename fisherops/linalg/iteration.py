"""Iterations of solvers: progress, callback, checkpoint and interrupt, on whole states."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fisherops._linop import TorchLinearOperator
from fisherops.linalg.results import HaltedError

_VERSION = 2

State = TypeVar("State", bound=Any)


class Report(NamedTuple):
    """What is reported of a state: arguments of the callback, text of the progress bar, and whether it is saved."""

    arguments: tuple[Any, ...]
    text: str
    is_saved: bool


class Algorithm(Protocol[State]):
    """An iterative method on states, named tuples of tensors and numbers that are replaced as a whole.

    `name` is that of the public function, and `unit` what a state's attribute `done` counts.
    """

    name: ClassVar[str]
    unit: ClassVar[str]

    def start(self) -> State:
        """Return the first state."""

    def step(self, state: State) -> State | None:
        """Return the next state, or None if there is none."""

    def report(self, state: State) -> Report | None:
        """Return what is reported of a state, or None."""


class Iteration(NamedTuple):
    """What a user asks to see of an iteration: the arguments of the public functions of these names."""

    callback: Callable[..., object] | None = None
    progressbar: bool = False
    checkpoint: Any = None

    def run(self, op: TorchLinearOperator, algorithm: Algorithm[State], **identity: Any) -> State:
        """Return the last state of an algorithm, which resumes from its checkpoint if there is one.

        Parameters
        ----------
        op : TorchLinearOperator
            The operator, whose processes iterate together.
        algorithm : Algorithm
        **identity : int, float or array
            What else makes the problem, see `Checkpoint`.

        Raises
        ------
        HaltedError
            At a KeyboardInterrupt, with the present state.
        """
        file = None if self.checkpoint is None else Checkpoint(self.checkpoint, algorithm.name, op, **identity)
        state, processes = algorithm.start(), op.processes
        if file is not None:
            state = _restored(state, file.load())

        def save() -> None:
            if file is not None:
                file.save(**{name: x.cpu() if isinstance(x, Tensor) else x for name, x in state._asdict().items()})

        bar = tqdm(
            desc=algorithm.name,
            unit=f" {algorithm.unit}",
            initial=state.done,
            leave=False,
            disable=not (self.progressbar and processes.leads),
        )
        with bar:
            try:
                while (following := algorithm.step(state)) is not None:
                    bar.update(following.done - state.done)
                    state = following
                    if bar.disable and file is None and self.callback is None:
                        continue  # nobody reads a report, whose numbers an accelerator would be waited for
                    report = algorithm.report(state)
                    if report is None:
                        continue
                    bar.set_postfix_str(report.text, refresh=False)
                    if report.is_saved:
                        save()
                    if self.callback is not None:
                        with processes.guard(f"the callback of {algorithm.name}"):
                            self.callback(*report.arguments)
                save()
            except KeyboardInterrupt:
                save()
                raise HaltedError(state) from None
        return state


def _restored(state: State, arrays: Mapping[str, Any] | None) -> State:
    """Return the state of a checkpoint, if there is one, with tensors like those of the first state."""
    if arrays is None:
        return state
    values: dict[str, Any] = {}
    for name, x in state._asdict().items():
        found = arrays[name]
        values[name] = torch.from_numpy(found).to(x) if isinstance(x, Tensor) else found
        if isinstance(x, int | float):
            values[name] = type(x)(found)
    restored: State = state._replace(**values)
    return restored


def checksum(X: Tensor) -> int:
    """Return a checksum of the elements of a tensor."""
    return zlib.crc32(X.cpu().contiguous().numpy().tobytes())


class Checkpoint:
    """A file that holds the state of a solver: written whole or not at all, and refused if it is of another problem.

    Parameters
    ----------
    path : str or path
    solver : str
        Name of the solver; states of others are refused.
    op : TorchLinearOperator
        The operator: a product with it is the fingerprint.
    **options : int, float or array
        What else makes the problem: states with other integers, or numbers that differ by more than rounding, are
        refused.
    """

    def __init__(self, path: Any, solver: str, op: TorchLinearOperator, **options: Any) -> None:
        self.path = Path(path)
        G = op.score_matrix
        if G is not None and G.is_divided:
            raise NotImplementedError("`checkpoint` must be None for sharded parameters.")
        self._rounding = 1000 * float(torch.finfo(op.torch_dtype).eps)
        self._identity: dict[str, Any] = {"version": _VERSION, "solver": solver, "dtype": op.dtype.name}
        self._identity |= {name: value for name, value in options.items() if isinstance(value, int)}
        options = {name: value for name, value in options.items() if not isinstance(value, int)}
        self._identity |= {f"shape of {name}": np.shape(value) for name, value in options.items()}
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(op.shape[1], 2, generator=generator, dtype=torch.float64, device="cpu").T
        probe = probe.to(op.device, op.torch_dtype)
        self._identity["D"] = op.shape[1]
        if G is not None:
            self._identity["checksum of the parameters"] = G.parameter_checksum
        self._numbers = {name: np.asarray(value, dtype=float) for name, value in options.items()}
        self._numbers["the operator"] = (probe @ op.multiply(probe).T).double().cpu().numpy()
        self._processes = op.processes
        self._processes.from_leader(self._check_folder)

    def _check_folder(self) -> None:
        folder = self.path.parent
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`checkpoint` must be in a folder that exists, got {str(self.path)!r}. Make the folder first."
            )

    def save(self, **arrays: Any) -> None:
        """Write the state, on the leading process; the file is the old one until the new one is complete."""
        if self._processes.leads:
            with self._processes.guard("writing a checkpoint"):
                self._write(arrays)

    def _write(self, arrays: dict[str, Any]) -> None:
        content = {f"state {name}": np.asarray(value) for name, value in arrays.items()}
        content |= {f"number {name}": value for name, value in self._numbers.items()}
        content |= {f"identity {name}": np.asarray(repr(value)) for name, value in self._identity.items()}
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def load(self) -> dict[str, Any] | None:
        """Return the state, or None if there is no file yet; the leading process reads it for all.

        Raises
        ------
        ValueError
            If the file is damaged, or of another problem; it is left as it is.
        """
        return self._processes.from_leader(self._load)

    def _load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        where = f"the checkpoint {str(self.path)!r}"
        try:
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                content = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{where} must be written by this solver, but it is damaged or another file ({error}). Move it away to "
                "start again. It was not changed."
            ) from None
        for name, value in self._identity.items():
            found = str(content.get(f"identity {name}", "missing"))
            if found != repr(value):
                raise ValueError(
                    f"{where} must belong to this problem, but its {name} is {found}, and here it is {value!r}. Pass "
                    "what it was made with, or move it away."
                )
        for name, number in self._numbers.items():
            found = content[f"number {name}"]
            if not np.allclose(found, number, rtol=self._rounding, atol=self._rounding * abs(number).max(initial=0)):
                raise ValueError(
                    f"{where} must belong to this problem, but {name} differs. Pass what it was made with, or "
                    "move it away."
                )
        return {name.removeprefix("state "): value for name, value in content.items() if name.startswith("state ")}
