"""Checkpoints of iterative solvers: written whole or not at all, and refused where they are not of this problem."""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherops._linop import TorchLinearOperator
from fisherops.fisher import FisherOperator

_VERSION = 1


class Checkpoint:
    """A file that holds the state of a solver.

    Parameters
    ----------
    path : str or path
    solver : str
        Name of the solver; states of others are refused.
    op : TorchLinearOperator
        The operator: a product with it is the fingerprint.
    options : mapping of str to int, float or array
        What else makes the problem: states with other integers, or numbers that differ by more than rounding, are
        refused.
    """

    def __init__(self, path: Any, solver: str, op: TorchLinearOperator, **options: Any) -> None:
        self.path = Path(path)
        self._rounding = 1000 * float(torch.finfo(op.torch_dtype).eps)
        self._identity: dict[str, Any] = {"version": _VERSION, "solver": solver, "dtype": op.dtype.name}
        self._identity |= {name: value for name, value in options.items() if isinstance(value, int)}
        options = {name: value for name, value in options.items() if not isinstance(value, int)}
        self._identity |= {f"shape of {name}": np.shape(value) for name, value in options.items()}
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(op.shape[1], 2, generator=generator, dtype=torch.float64, device="cpu")
        probe = probe.to(op.device, op.torch_dtype)
        self._identity["D"] = op.shape[1]
        if isinstance(op, FisherOperator):
            self._identity["checksum of the parameters"] = op.parameter_checksum
        self._numbers = {name: np.asarray(value, dtype=float) for name, value in options.items()}
        self._numbers["the operator"] = (probe.T @ op.times_columns(probe)).double().cpu().numpy()
        self._processes = op.processes
        self._processes.from_leader(self._check_folder)

    def _check_folder(self) -> None:
        folder = self.path.parent
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`checkpoint` must be in a folder that exists, got {str(self.path)!r}. Make the folder first."
            )

    def save(self, **arrays: Any) -> None:
        """Write the state, on the first rank; the file is the old one until the new one is complete."""
        if not self._processes.leads:
            return
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
        """Return the state, or None if there is no file yet; the first rank reads it for all.

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

    def remove(self) -> None:
        """Remove the file, as the work is done."""
        self.path.unlink(missing_ok=True)
