"""Lanczos' method with full orthogonalization: for eigenpairs with restarts, and for quadrature without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]
Matrix = npt.NDArray[np.float64]


class _State(NamedTuple):
    """All that changes of a space: replaced as a whole, so that an interrupt finds one state or the next."""

    basis: Tensor
    projected: Matrix
    size: int
    coupling: float
    products: int


class Krylov:
    """An orthonormal basis and the operator within it.

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
    products : int
        Products with A so far.
    """

    def __init__(self, state: _State) -> None:
        self._state = state

    @classmethod
    def start(cls, v0: Tensor, m: int) -> Krylov:
        """Return the empty space that starts from a vector."""
        basis = v0.new_zeros(m + 1, len(v0))
        basis[0] = v0 / v0.norm(dtype=torch.float64)
        return cls(_State(basis, np.zeros((m, m)), 0, 0.0, 0))

    def restore(self, basis: Tensor, projected: Matrix, coupling: float, products: int) -> None:
        """Take up a state that was saved: the rows of the basis up to the next direction, and the rest."""
        self.basis[: len(basis)] = basis.to(self.basis)
        self._state = _State(self.basis, np.array(projected), len(basis) - 1, coupling, products)

    @property
    def basis(self) -> Tensor:
        return self._state.basis

    @property
    def projected(self) -> Matrix:
        return self._state.projected

    @property
    def size(self) -> int:
        return self._state.size

    @property
    def coupling(self) -> float:
        return self._state.coupling

    @property
    def products(self) -> int:
        return self._state.products

    def grow(self, multiply: Multiply, random: Callable[[], Tensor]) -> None:
        """Add a vector by one product; where the space is invariant, the next direction is random."""
        basis, projected, j, _, products = self._state
        V = basis[: j + 1]
        w = multiply(basis[j])
        before = _norm(w)
        h = torch.zeros(j + 1, dtype=w.dtype, device=w.device)
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            more = V @ w
            w = w - more @ V
            h += more
        norm = coupling = _norm(w)
        eps = float(torch.finfo(w.dtype).eps)
        if not norm > 10 * eps * before:  # what is left is rounding
            coupling = 0.0
            w = random()
            for _ in range(2):
                w = w - (V @ w) @ V
            norm = _norm(w)
        # Beyond the present state; it takes effect with the new one.
        projected[: j + 1, j] = projected[j, : j + 1] = h.double().cpu().numpy()
        if norm > 0:
            basis[j + 1] = w / norm
        self._state = _State(basis, projected, j + 1, coupling, products + 1)

    def ritz(self) -> tuple[Matrix, Matrix]:
        """Return the eigenvalues of the projected matrix, ascending, and its eigenvectors."""
        values, vectors = np.linalg.eigh(self.projected[: self.size, : self.size])
        return values, vectors

    def residuals(self, vectors: Matrix) -> Matrix:
        """Return the norms ‖A x − θ x‖ of Ritz pairs, as the coupling gives them."""
        return np.asarray(abs(self.coupling * vectors[-1]))

    def restart(self, values: Matrix, vectors: Matrix) -> None:
        """Shrink the space to some Ritz vectors (thick restart)."""
        old, p = self._state, len(values)
        S = torch.as_tensor(vectors.T.copy(), dtype=old.basis.dtype, device=old.basis.device)
        basis = torch.zeros_like(old.basis)
        basis[:p] = S @ old.basis[: old.size]
        basis[p] = old.basis[old.size]
        projected = np.zeros_like(old.projected)
        projected[:p, :p] = np.diag(values)
        self._state = _State(basis, projected, p, old.coupling, old.products)


def _norm(v: Tensor) -> float:
    """Return ‖v‖, also where its square is out of the range of the precision."""
    return float(v.norm(dtype=torch.float64))


def eigenpairs(
    space: Krylov,
    multiply: Multiply,
    k: int,
    largest: bool,
    tol: float,
    maxiter: int,
    random: Callable[[], Tensor],
    report: Callable[[Krylov, Matrix, Matrix], None],
) -> tuple[Matrix, Matrix, Matrix, bool]:
    """Find k extreme eigenpairs by thick restarts.

    Parameters
    ----------
    space : Krylov
        Grown further from where it is; its size is below the number of rows of its basis.
    multiply : callable
        Product of the operator with one vector.
    k : int
        Number of pairs, at most m.
    largest : bool
        Whether those at the upper end of the spectrum.
    tol : float
        Residuals relative to the largest Ritz value in size.
    maxiter : int
        Products at most.
    random : callable
        Returns a random vector, where the space is invariant.
    report : callable
        Called after each cycle, before the restart, with the space, and eigenvalues and residuals so far.

    Returns
    -------
    values, vectors, residuals
        Ascending eigenvalues (k,), coefficients in the basis (size, k), and residual norms.
    converged : bool

    References
    ----------
    K. Wu, H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal. Appl. 22
    (2000) 602–616, doi:10.1137/S0895479898334605.
    """
    m = len(space.basis) - 1
    while True:
        while space.size < m and space.products < maxiter:
            space.grow(multiply, random)
        values, vectors = space.ritz()
        order = np.argsort(values if largest else -values, kind="stable")[-k:]
        order = np.sort(order)
        residuals = space.residuals(vectors)
        scale = max(float(abs(values).max()), float(np.finfo(np.float64).tiny))
        converged = bool((residuals[order] <= tol * scale).all()) and len(order) == k
        converged = converged or space.size == space.basis.shape[1]  # all of it
        report(space, values[order], residuals[order])
        if converged or space.products >= maxiter:
            return values[order], vectors[:, order], residuals[order], converged
        # Some more than are wanted, which speeds up convergence.
        kept = np.sort(np.argsort(values if largest else -values, kind="stable")[-min(m - 1, k + (m - k) // 2) :])
        space.restart(values[kept], vectors[:, kept])


def quadrature(multiply: Multiply, z: Tensor, steps: int) -> tuple[Matrix, Matrix]:
    """Return nodes θ and weights τ² with zᵀ f(A) z ≈ ‖z‖² Σ τ² f(θ) (stochastic Lanczos quadrature).

    References
    ----------
    S. Ubaru, J. Chen, Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J. Matrix Anal.
    Appl. 38 (2017) 1075–1099, doi:10.1137/16M1104974.
    """
    space = Krylov.start(z, min(steps, len(z)))
    for _ in range(min(steps, len(z))):
        space.grow(multiply, lambda: torch.zeros_like(z))
        if space.coupling == 0:
            break
    values, vectors = space.ritz()
    return values, np.asarray(vectors[0] ** 2)
