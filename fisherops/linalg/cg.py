"""Preconditioned conjugate gradients for several right-hand sides at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fisherops._processes import Processes
from fisherops.linalg.iteration import Report

Multiply = Callable[[Tensor], Tensor]

# Restarts from the true residual, after the residual of the recursion has met the tolerance and the true one has not.
_RESTARTS = 5


class Iterate(NamedTuple):
    """Solutions, residuals of the recursion and directions, (K, D) each; zᵀr of each row, (K,); and counts."""

    X: Tensor
    R: Tensor
    P: Tensor
    rho: Tensor
    done: int = 0
    restarts: int = 0


@dataclass
class ConjugateGradients:
    """Solve A x = b for all rows of B.

    Parameters
    ----------
    multiply, precondition : callable
        Products of A, and of an approximation of A⁻¹, with rows (K, D).
    B : torch.Tensor
        (K, D), of norm about 1, so that squares are in the range of the precision.
    scales, targets : torch.Tensor
        (K,), factors of the norms that are reported, and norms of residuals to stop at.
    X : torch.Tensor or None
        (K, D), initial guess; zeros if None.
    maxiter : int
    processes : Processes
        They know inner products.

    References
    ----------
    M. Hestenes, E. Stiefel, Methods of conjugate gradients for solving linear systems, J. Res. NBS 49 (1952) 409–436.
    """

    multiply: Multiply
    precondition: Multiply
    B: Tensor
    scales: Tensor
    targets: Tensor
    X: Tensor | None
    maxiter: int
    processes: Processes

    name: ClassVar[str] = "solve"
    unit: ClassVar[str] = "iterations"

    def start(self) -> Iterate:
        """Return the state at the initial guess."""
        X = torch.zeros_like(self.B) if self.X is None else self.X
        R = self.B if self.X is None else self.B - self.multiply(X)
        P = self.precondition(R)
        return Iterate(X, R, P, self.processes.inner(R, P))

    def true_residual(self, state: Iterate) -> Tensor:
        """Return b − A x, from which the residual of the recursion drifts."""
        return self.B - self.multiply(state.X)

    def step(self, state: Iterate) -> Iterate | None:
        """Return the next state, or None if the true residual meets the targets or does not gain."""
        X, R, P, rho, done, restarts = state
        if done >= self.maxiter:
            return None
        # Both at once, because an accelerator must be waited for.
        is_solved, has_direction = torch.stack([self._is_solved(R), (rho > 0).any()]).tolist()
        if is_solved:
            R = self.true_residual(state)
            if restarts == _RESTARTS or bool(self._is_solved(R)):
                return None
            P = self.precondition(R)
            rho, restarts = self.processes.inner(R, P), restarts + 1
        elif not has_direction:
            return None
        product = self.multiply(P)
        curvature = self.processes.inner(P, product)
        active = curvature > 0  # rows that are solved exactly have no direction left
        alpha = torch.where(active, rho / curvature, torch.zeros_like(rho))[:, None]
        X, R = X + alpha * P, R - alpha * product
        Z = self.precondition(R)
        following = torch.where(active, self.processes.inner(R, Z), torch.zeros_like(rho))
        beta = torch.where(rho > 0, following / rho, torch.zeros_like(rho))[:, None]
        return Iterate(X, R, Z + beta * P, following, done + 1, restarts)

    def _is_solved(self, R: Tensor) -> Tensor:
        return (self.processes.norms(R) <= self.targets).all()

    def report(self, state: Iterate) -> Report:
        """Return iterations and residual norms."""
        norms = self.processes.norms(state.R)
        relative = float((norms / self.processes.norms(self.B)).nan_to_num().max())
        arguments = state.done, (norms * self.scales).to(state.R.dtype)
        return Report(arguments, f"residual {relative:.1e}", is_saved=state.done % 20 == 0)
