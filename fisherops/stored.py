"""Score matrices in files, which need neither the model nor the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from fisherops import _torch
from fisherops._memory import as_bytes
from fisherops.problem import Parameters
from fisherops.score_matrix import BatchedScores
from fisherops.scores import InOrder, Kind, MaterializedBatch
from fisherops.scores.protocol import CacheSize, Sums, SumsOfUses
from fisherops.scores.store import read, unpacked

Result = TypeVar("Result")


class StoredScores(BatchedScores):
    """A score matrix that `ScoreMatrix.save` wrote to a file, made by `fisherops.load_scores`.

    It has the products, rows, norms, Gram matrices and projections of the matrix that was saved. F = GᵀG is
    ``fisherops.FisherOperator(G)``, which `fisherops.linalg` takes as any other.

    Parameters
    ----------
    path : path
        The file, which must stay as it is while the matrix is used.
    device : torch.device
        Where products are computed. On the CPU, rows are read from the file as they are used.
    verify : bool
        Whether all of the file is compared with its checksums.

    Attributes
    ----------
    shape : tuple of int
        (rows, D).
    """

    is_stored = True
    is_cached = True
    rows_have_order = True
    version = 0

    def __init__(self, path: Any, device: torch.device, verify: bool = False) -> None:
        self._path = Path(path).resolve()
        content = read(self._path, verify)
        self._content = {key: unpacked(x, torch.device("cpu")) for key, x in content.items() if key != "batches"}
        batches = content["batches"]
        if device.type == "cpu":
            batches = [unpacked(batch, device) for batch in batches]
        self._batches = batches
        dtype = getattr(torch, self._content["dtype"])
        number = torch.zeros((), dtype=dtype, device=device)
        # The columns belong to parameters of these names and shapes, whose values are not stored.
        shapes = self._content["parameters"]
        self._parameters = Parameters({name: number.expand(shape) for name, shape in shapes.items()}, dtype)
        self.max_memory = as_bytes(None, device)
        super().__init__()

    # ---- What it is ---------------------------------------------------------------------------

    @property
    def parameters(self) -> Parameters:
        """Names and shapes of the parameters that the columns belong to."""
        return self._parameters

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        rows: int = self._content["rows"]
        return rows

    @property
    def kinds(self) -> frozenset[Kind]:
        """Which vectors make the rows."""
        return frozenset([self._content["kind"]])

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of the loss."""
        return tuple(self._content["reductions"])

    @property
    def parameter_checksum(self) -> int:
        """A checksum of the values that the parameters had."""
        checksum: int = self._content["checksum"]
        return checksum

    @property
    def cache_size(self) -> CacheSize:
        """The size of the batches, and the memory that is left."""
        return CacheSize(self._content["nbytes"], as_bytes(None, self.device), True)

    @property
    def datum(self) -> np.ndarray[Any, Any]:
        """The index in the data set of the example that each row belongs to, (rows,) of int64."""
        datum = self._content["datum"]
        if datum is None:
            raise ValueError(
                "the examples of the rows were not known when the score matrix was saved. Make it anew of batches "
                "(X, y, index)."
            )
        own: np.ndarray[Any, Any] = datum.numpy().copy()
        return own

    def __repr__(self) -> str:
        kind = self._content["kind"].description
        return f"<{type(self).__name__}: {self.num_rows} rows, D={self.parameters.numel}, kind={kind}, {self._path}>"

    def require_order(self) -> None:
        """Do nothing: the rows are in the order of the file."""

    def refresh(self) -> None:
        """Do nothing: there is no model that could have changed."""

    def to(self, device: Any) -> StoredScores:
        """Return the same on another device."""
        return StoredScores(self._path, _torch.as_device(device))

    def on(self, *data: Any, **options: Any) -> NoReturn:  # noqa: ARG002
        """Raise TypeError: a model is needed for rows of other data."""
        raise TypeError(
            "`on` needs the model and the loss, which are not stored with a score matrix. Make the operator again and "
            "use `op.scores.on(data)`: its rows fit those of the file if the parameters have the same values."
        )

    # ---- Batches ------------------------------------------------------------------------------

    def _over(self, description: str, function: Callable[[Any], Result]) -> Result:  # noqa: ARG002
        with torch.no_grad(), _torch.own_precision(self.device):
            return function(_FromFile(self._batches, self.device))

    def materialized(self) -> list[MaterializedBatch]:
        """Return all batches."""
        return list(_FromFile(self._batches, self.device))

    def over_uses(self, sums_of: SumsOfUses, kept: list[MaterializedBatch] | None = None) -> Sums:  # noqa: ARG002
        """Return sums over batches with the factors of every contraction."""
        batches = self.materialized()
        if not all(batch.has_factors for batch in batches):
            raise NotImplementedError(
                "the file has dense rows of some layers, which do not tell the factors that this approximation is made "
                "of. Save the scores of an operator with cache='factors'."
            )
        return sums_of(batches)


class _FromFile(InOrder):
    """Batches that are copied to the device of products, if that is not the CPU, while they are used."""

    def __init__(self, batches: list[Any], device: torch.device) -> None:
        super().__init__(batches)
        self._device = device

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch if isinstance(batch, MaterializedBatch) else unpacked(batch, self._device)


def load_scores(path: Any, *, device: Any = "cpu", verify: bool = True) -> StoredScores:
    """Open a score matrix that `ScoreMatrix.save` wrote, without the model and the data.

    Parameters
    ----------
    path : path
        The file.
    device : torch.device or str
        Where products are computed. Default: the CPU, where rows are read from the file as they are used.
    verify : bool
        Whether all of the file is read and compared with its checksums. Default: True.

    Returns
    -------
    StoredScores
        G, (rows, D).

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, or of another format or version.

    See Also
    --------
    FisherOperator : F = GᵀG of a score matrix.

    Examples
    --------
    >>> import tempfile, torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     op.scores.save(f"{folder}/scores.pt")
    ...     G = fo.load_scores(f"{folder}/scores.pt")
    ...     F = fo.FisherOperator(G)
    ...     same = bool((F.todense() == op.todense()).all())
    >>> same
    True
    """
    return StoredScores(path, _torch.as_device(device), verify)
