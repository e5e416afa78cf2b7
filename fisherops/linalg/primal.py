"""Products with F alone: Krylov methods, and random probes for sums over the spectrum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fisherops._checks import integer
from fisherops._linop import TorchLinearOperator
from fisherops.linalg.cg import ConjugateGradients, Iterate
from fisherops.linalg.dense import rank_threshold, times
from fisherops.linalg.iteration import Iteration, checksum
from fisherops.linalg.lanczos import Krylov, Lanczos, Matrix, quadrature
from fisherops.linalg.results import HaltedError, Mean, Pairs, Solved

_UNSEEN = Iteration()


def random_vector(op: TorchLinearOperator, seed: int) -> Tensor:
    """Return a normal random vector (D,), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return _normal(op, generator)


def _normal(op: TorchLinearOperator, generator: torch.Generator) -> Tensor:
    z = torch.randn(op.shape[0], generator=generator, dtype=torch.float64, device="cpu")
    return z.to(op.device, op.torch_dtype)


def rademacher(op: TorchLinearOperator, count: int, seed: int) -> Tensor:
    """Return random signs (count, D), the same on every device."""
    return random_signs(count, op.shape[0], seed, op.torch_dtype, op.device)


def random_signs(count: int, n: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random signs (count, n), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(2, (n, count), generator=generator, device="cpu", dtype=torch.int8).T
    return signs.to(device, dtype).mul_(2).sub_(1)


@dataclass
class Primal:
    """Products with F alone.

    `op`, `shift` and `damping` are those of `Dense`. The other fields are the options of the public functions, with
    `x0` as rows (K, D), and `precondition` a function of F and the total damping that returns the preconditioner.
    """

    op: TorchLinearOperator
    shift: Any
    damping: float
    iteration: Iteration = _UNSEEN
    maxiter: int | None = None
    x0: Tensor | None = None
    precondition: Callable[[TorchLinearOperator, Any], Callable[[Tensor], Tensor]] | None = None
    v0: Tensor | None = None
    ncv: int = 20
    tol: float = 0.0
    probes: int = 30
    steps: int = 40
    seed: int = 0

    name: ClassVar[str] = "primal"
    is_exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.total = self.shift + self.damping

    def _product(self, v: Tensor) -> Tensor:
        """Multiply F with one vector (D,)."""
        return self.op.multiply(v[None])[0]

    def _damped(self, V: Tensor) -> Tensor:
        """Multiply F + total · I."""
        return self.op.multiply(V).add_(times(self.total, V))

    def prepare(self) -> None:
        """Do nothing: there is no factorization."""

    # ---- Solves -----------------------------------------------------------------------------------

    def solve(self, B: Tensor, targets: Tensor) -> Solved:
        """Solve (F + total · I) x = b for rows (K, D) by conjugate gradients, all at once.

        Raises
        ------
        HaltedError
            At a KeyboardInterrupt, with the best solution so far.
        """
        op, processes = self.op, self.op.processes
        maxiter = 10 * op.shape[0] if self.maxiter is None else integer("maxiter", self.maxiter, 0)
        # Rows of norm 1, so that squares stay in the range of the precision.
        scales = processes.norms(B)
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        unit, x0 = (None if V is None else (V / scales[:, None]).to(B.dtype) for V in (B, self.x0))
        assert unit is not None
        precondition = _unchanged if self.precondition is None else self.precondition(op, self.total)
        algorithm = ConjugateGradients(
            self._damped, precondition, unit, scales, targets / scales, x0, maxiter, processes
        )
        identity: dict[str, Any] = {}
        if self.iteration.checkpoint is not None:
            total = self.total.cpu() if isinstance(self.total, Tensor) else self.total
            identity = {"damping": total, "b": scales.cpu(), "directions": checksum(unit)}

        def solved(state: Iterate, R: Tensor) -> Solved:
            X, R = ((V * scales[:, None]).to(B.dtype) for V in (state.X, R))
            norms = processes.norms(R)
            return Solved(X, norms, state.done, bool((norms <= targets).all()))

        try:
            state = self.iteration.run(op, algorithm, **identity)
        except HaltedError as halt:
            raise HaltedError(solved(halt.found, halt.found.R)._replace(converged=False)) from None
        try:
            return solved(state, algorithm.true_residual(state))
        except KeyboardInterrupt:
            raise HaltedError(solved(state, state.R)._replace(converged=False)) from None

    def zero(self, largest: float) -> float:
        """Return the size below which eigenvalues are zero to rounding, for the largest of them."""
        G, D = self.op.score_matrix, self.op.shape[0]
        return rank_threshold(largest, D, D if G is None else G.shape[0], self.op.dtype)

    # ---- Spectra ----------------------------------------------------------------------------------

    def eigenpairs(self, k: int, largest: bool, with_vectors: bool) -> Pairs:  # noqa: ARG002
        """Return k eigenpairs of F at one end of the spectrum, by Lanczos' method.

        Raises
        ------
        HaltedError
            At a KeyboardInterrupt, with the best pairs so far.
        """
        op = self.op
        maxiter = 10 * op.shape[0] if self.maxiter is None else integer("maxiter", self.maxiter, 1)
        v0 = random_vector(op, 0) if self.v0 is None else self.v0
        tol = max(self.tol, float(torch.finfo(op.torch_dtype).eps))
        algorithm = Lanczos(self._product, partial(random_vector, op), v0, self.ncv, k, maxiter, largest, tol)
        identity: dict[str, Any] = {}
        if self.iteration.checkpoint is not None:
            identity = {"k": k, "largest": largest, "ncv": self.ncv, "checksum of v0": checksum(v0)}
        try:
            return self._pairs(algorithm, self.iteration.run(op, algorithm, **identity))
        except HaltedError as halt:
            raise HaltedError(self._pairs(algorithm, halt.found)._replace(converged=False)) from None

    def _pairs(self, algorithm: Lanczos, space: Krylov) -> Pairs:
        """Return the pairs of a space as those of F."""
        values, S, residuals, converged = algorithm.pairs(space)
        vectors = torch.from_numpy(S.T.copy()).to(space.basis) @ space.basis[: len(S)]
        scale = float(abs(space.ritz()[0]).max(initial=0)) if space.size else 0.0
        found, norms = (torch.as_tensor(x, device=self.op.device) for x in (values, residuals))
        return Pairs(found, vectors, scale, norms, space.done, converged)

    def largest_eigenvalue(self) -> float:
        """Return the largest eigenvalue of F, to three digits."""
        alone = Primal(self.op, self.shift, self.damping, ncv=min(self.op.shape[0], 20), tol=1e-3)
        return float(alone.eigenpairs(1, True, False).values[0])

    def spectral_sum(self, function: Callable[[Matrix], Matrix]) -> Mean:
        """Estimate tr f(F + shift · I) for a function of nodes (m,) with values (m, ...), and its standard error.

        The standard error is that of the probes, not of the quadrature, which is exact for polynomials of degree
        2 · steps − 1.
        """
        probes, steps = integer("probes", self.probes, 2), integer("steps", self.steps, 1)
        D, sums, floor = self.op.shape[0], [], self._floor()
        generator = torch.Generator("cpu").manual_seed(self.seed)
        for _ in range(probes):
            # In all directions alike: random signs would show no variance at all for a diagonal F.
            z = _normal(self.op, generator)
            nodes, weights = quadrature(self._product, z, steps)
            sums.append(D * np.tensordot(weights, function(nodes.clip(min=floor) + self.shift), 1))
        mean, error = Mean.of(torch.from_numpy(np.asarray(sums, dtype=float)))
        return Mean(mean.numpy(), error.numpy())

    def _floor(self) -> float:
        """Return a lower bound of the eigenvalues of F, which has a damping of its own for each parameter or none."""
        return float(self.op.shift.min()) if isinstance(self.op.shift, Tensor) else 0.0

    def square_norm(self) -> Mean:
        """Estimate ‖F + shift · I‖², the mean of ‖(F + shift · I) z‖² over random signs z."""
        Z = rademacher(self.op, integer("probes", self.probes, 2), self.seed)
        products = self.op.multiply(Z).add_(times(self.shift, Z))
        return Mean.of(self.op.processes.norms(products).square())

    def effective_dimension(self) -> Mean:
        """Estimate tr A (A + λI)⁻¹ for A = F + shift · I and the damping λ."""
        return self.spectral_sum(lambda nodes: nodes / (nodes + self.damping))

    def log_determinant(self) -> Mean:
        """Estimate log det (F + total · I)."""
        if self._floor() + self.total == 0:
            raise ValueError(
                "`damping` must be positive for method='primal', because the logarithm of zero eigenvalues has no "
                "quadrature, got 0. Pass damping > 0, or method='dense'."
            )
        return self.spectral_sum(lambda nodes: np.asarray(np.log(nodes + self.damping)))


def jacobi(op: TorchLinearOperator, total: Any) -> Callable[[Tensor], Tensor]:
    """Return the preconditioner by the exact diagonal of F + total · I, and none for operators without G."""
    G = op.score_matrix
    if G is None:
        return _unchanged
    diagonal = G.col_squares() + op.shift + total
    # Of parameters that have no effect; without damping their entries of b cannot be met anyway.
    inverse = torch.where(diagonal > 0, 1 / diagonal, torch.ones_like(diagonal))
    return lambda R: inverse.to(R.dtype) * R


def _unchanged(R: Tensor) -> Tensor:
    return R
