"""Lanczos' method with full orthogonalization: for eigenpairs with restarts, and for quadrature without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fisherops import _arrays
from fisherops.linalg.iteration import Report

Multiply = Callable[[Tensor], Tensor]
Matrix = npt.NDArray[np.float64]


class Krylov(NamedTuple):
    """An orthonormal basis and the operator within it; replaced as a whole, and never changed within its size.

    Attributes
    ----------
    basis : torch.Tensor
        (m + 1, D); the first `size` rows span the space, and the next one is the direction in which it grows.
    projected : numpy.ndarray
        (m, m), V A Vᵀ for the rows V of the space.
    size : int
        Vectors of the space.
    coupling : float
        Norm of what the last product left outside the space.
    done : int
        Products with A so far.
    """

    basis: Tensor
    projected: Matrix
    size: int = 0
    coupling: float = 0.0
    done: int = 0

    @classmethod
    def from_vector(cls, v0: Tensor, m: int) -> Krylov:
        """Return the empty space that starts from a vector."""
        basis = v0.new_zeros(m + 1, len(v0))
        basis[0] = v0 / v0.norm(dtype=torch.float64)
        return cls(basis, np.zeros((m, m)))

    def grown(self, multiply: Multiply, random: Callable[[int], Tensor]) -> Krylov:
        """Return the space with one more vector, by a product; if it is invariant, the next direction is random."""
        basis, projected, j, _, done = self
        V = basis[: j + 1]
        w = multiply(basis[j])
        before = _norm(w)
        h = torch.zeros(j + 1, dtype=w.dtype, device=w.device)
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            more = V @ w
            w = w - more @ V
            h += more
        left = _norm(w)
        basis[j + 1] = w / left[0]
        # All numbers at once, because an accelerator must be waited for.
        *entries, size, norm = _arrays.to_numpy(torch.cat([h.double(), before, left])).tolist()
        coupling = norm
        eps = float(torch.finfo(w.dtype).eps)
        if not norm > 10 * eps * size:  # what is left is rounding
            coupling = 0.0
            w = random(done)
            for _ in range(2):
                w = w - (V @ w) @ V
            norm = float(_norm(w))
            basis[j + 1] = w / norm if norm > 0 else 0
        # These entries are beyond the present size, and take effect with the new one.
        projected[: j + 1, j] = projected[j, : j + 1] = entries
        return Krylov(basis, projected, j + 1, coupling, done + 1)

    def ritz(self) -> tuple[Matrix, Matrix]:
        """Return the eigenvalues of the projected matrix, ascending, and its eigenvectors."""
        values, vectors = np.linalg.eigh(self.projected[: self.size, : self.size])
        return values, vectors

    def residuals(self, vectors: Matrix) -> Matrix:
        """Return the norms ‖A x − θ x‖ of Ritz pairs, as the coupling gives them."""
        return np.asarray(abs(self.coupling * vectors[-1]))

    def shrunk(self, values: Matrix, vectors: Matrix) -> Krylov:
        """Return the space of some Ritz vectors (thick restart)."""
        p = len(values)
        S = torch.as_tensor(vectors.T.copy(), dtype=self.basis.dtype, device=self.basis.device)
        basis = torch.zeros_like(self.basis)
        basis[:p] = S @ self.basis[: self.size]
        basis[p] = self.basis[self.size]
        projected = np.zeros_like(self.projected)
        projected[:p, :p] = np.diag(values)
        return Krylov(basis, projected, p, self.coupling, self.done)


def _norm(v: Tensor) -> Tensor:
    """Return ‖v‖, (1,), also if its square is out of the range of the precision."""
    norm: Tensor = v.norm(dtype=torch.float64)
    return norm.view(1)


class RitzPairs(NamedTuple):
    """The wanted Ritz values (k,), ascending, coefficients in the basis (size, k), and residual norms (k,)."""

    values: Matrix
    vectors: Matrix
    residuals: Matrix
    converged: bool


@dataclass
class Lanczos:
    """Find k extreme eigenpairs by thick restarts.

    Parameters
    ----------
    multiply, random : callable
        Product of the operator with one vector; a random vector for a seed, needed if the space is invariant.
    v0 : torch.Tensor
        (D,), the first vector.
    ncv, k, maxiter : int
        Vectors of the space, pairs, and products at most.
    largest : bool
        Whether pairs are at the upper end of the spectrum.
    tol : float
        Residuals relative to the largest Ritz value in size.

    References
    ----------
    K. Wu, H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal. Appl. 22
    (2000) 602–616, doi:10.1137/S0895479898334605.
    """

    multiply: Multiply
    random: Callable[[int], Tensor]
    v0: Tensor
    ncv: int
    k: int
    maxiter: int
    largest: bool = True
    tol: float = 0.0

    name: ClassVar[str] = "eigsh"
    unit: ClassVar[str] = "products"

    def start(self) -> Krylov:
        """Return the empty space."""
        return Krylov.from_vector(self.v0, self.ncv)

    def step(self, space: Krylov) -> Krylov | None:
        """Return the space with one more vector, after a restart if it is full; None if it is good enough."""
        if self._is_cycle(space):
            if space.done >= self.maxiter or self.pairs(space).converged:
                return None
            values, vectors = space.ritz()
            # Some more than are wanted, which speeds up convergence.
            kept = np.sort(self._order(values)[-min(self.ncv - 1, self.k + (self.ncv - self.k) // 2) :])
            space = space.shrunk(values[kept], vectors[:, kept])
        return space.grown(self.multiply, self.random)

    def _is_cycle(self, space: Krylov) -> bool:
        """Return whether a cycle has ended."""
        return space.size == self.ncv or space.done >= self.maxiter

    def report(self, space: Krylov) -> Report | None:
        """Return products, eigenvalues and residuals after each cycle."""
        if not self._is_cycle(space):
            return None
        values, _, residuals, _ = self.pairs(space)
        relative = residuals.max(initial=0) / max(abs(values).max(initial=0), 1e-300)
        return Report((space.done, values, residuals), f"residual {relative:.1e} of the largest", is_saved=True)

    def pairs(self, space: Krylov) -> RitzPairs:
        """Return the wanted pairs of a space; fewer than k if it has fewer vectors."""
        if not space.size:
            return RitzPairs(np.zeros(0), np.zeros((0, 0)), np.zeros(0), False)
        values, vectors = space.ritz()
        order = np.sort(self._order(values)[-self.k :])
        residuals = space.residuals(vectors)
        scale = max(float(abs(values).max()), float(np.finfo(np.float64).tiny))
        converged = bool((residuals[order] <= self.tol * scale).all()) and len(order) == self.k
        converged = converged or space.size == space.basis.shape[1]  # all of it
        return RitzPairs(values[order], vectors[:, order], residuals[order], converged)

    def _order(self, values: Matrix) -> npt.NDArray[np.intp]:
        """Return the indices of Ritz values, the wanted ones last."""
        return np.argsort(values if self.largest else -values, kind="stable")


def quadrature(multiply: Multiply, z: Tensor, steps: int) -> tuple[Matrix, Matrix]:
    """Return nodes θ and weights τ² with zᵀ f(A) z ≈ ‖z‖² Σ τ² f(θ) (stochastic Lanczos quadrature).

    References
    ----------
    S. Ubaru, J. Chen, Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J. Matrix Anal.
    Appl. 38 (2017) 1075–1099, doi:10.1137/16M1104974.
    """
    space = Krylov.from_vector(z, min(steps, len(z)))
    for _ in range(min(steps, len(z))):
        space = space.grown(multiply, lambda _: torch.zeros_like(z))
        if space.coupling == 0:
            break
    values, vectors = space.ritz()
    return values, np.asarray(vectors[0] ** 2)
