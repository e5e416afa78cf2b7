"""Rows that are given as an array, as a score matrix of the same parameters as another one."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherops._processes import Processes
from fisherops.problem import Parameters
from fisherops.scores.kinds import Kind
from fisherops.scores.protocol import Scores


class GivenRows(Scores):
    """A matrix (k, D) of rows, such as gradients of other losses.

    Parameters
    ----------
    rows : torch.Tensor
        (k, D).
    processes : Processes
        Those of the operator, on all of which the rows are the same.
    parameters : Parameters or None
        Those of the operator, if it has any.
    """

    def __init__(self, rows: Tensor, processes: Processes, parameters: Parameters | None) -> None:
        self._rows, self._own_processes = rows, processes
        column = torch.empty(rows.shape[1], dtype=rows.dtype, device=rows.device)
        self._parameters = Parameters({"rows": column}) if parameters is None else parameters
        super().__init__()

    max_memory = 0
    is_listed = True

    @property
    def parameters(self) -> Parameters:
        return self._parameters

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset()

    @property
    def processes(self) -> Processes:
        return self._own_processes

    def _mul(self, V: Tensor) -> Tensor:
        products: Tensor = V @ self._rows.T
        return products

    def _mul_t(self, W: Tensor) -> Tensor:
        combinations: Tensor = W @ self._rows
        return combinations

    def block(self, start: int, stop: int) -> Tensor:
        return self._rows[start:stop].clone()

    def row_squares(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self._rows, dim=1, dtype=torch.float64)
        return norms.square()
