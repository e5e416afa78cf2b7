"""F as a matrix, and its factorizations by LAPACK in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fisherops._linop import TorchLinearOperator
from fisherops.linalg.lanczos import Lanczos, Matrix
from fisherops.linalg.results import Mean, Pairs, Solved

# Steps of refinement after a direct solve; each gains all the digits that the first one had.
_REFINEMENTS = 5

SINGULAR = (
    "`damping` must be positive, because F is singular ({}): F x = b has no solution for most b and no unique one for "
    "others. Pass damping > 0, or least_norm=True to `solve` for F⁺ b."
)


def rank_threshold(largest: float, dim: int, rows: int, dtype: Any) -> float:
    """Return the size below which eigenvalues of F = GᵀG are zero to rounding: λ_max · eps · max(n, √m).

    F is (dim, dim) and G (rows, dim). n and m are the smaller and the larger side of G. λ_max · eps · n is NumPy's
    convention for the rank of a matrix of size n; its entries are sums of m terms, whose rounding is about √m · eps.
    """
    return abs(largest) * max(min(dim, rows), math.sqrt(max(dim, rows))) * float(np.finfo(dtype).eps)


def cholesky_in_place(matrix: Tensor) -> tuple[Tensor, bool]:
    """Return the lower Cholesky factor of a symmetric matrix in its memory, and whether there is one."""
    # LAPACK overwrites a matrix of columns, which for a symmetric one is its transpose.
    L, info = matrix.T, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(L, out=(L, info))
    return L, not int(info)


def times(damping: float | Tensor, V: Tensor) -> Tensor:
    """Multiply a damping, a number or (D,), with rows (K, D), in their dtype."""
    return V * (damping.to(V.dtype) if isinstance(damping, Tensor) else damping)


class Dense:
    """F itself, (D, D); its factorization is kept as long as F is the same.

    Parameters
    ----------
    op : TorchLinearOperator
        F without `shift`, (D, D).
    shift : float
        Multiple of the identity that belongs to the operator of the user.
    damping : float
        λ, which is added to that operator.

    Attributes
    ----------
    total : float
        Both together, with which systems are solved.
    added : float
        Number that is added to the diagonal of the matrix that is factorized.
    """

    name: ClassVar[str] = "dense"
    is_exact: ClassVar[bool] = True

    def __init__(self, op: TorchLinearOperator, shift: Any, damping: float) -> None:
        self.op, self.shift, self.damping = op, shift, damping
        self.total: Any = shift + damping
        self.added: float = self.total
        self.dim: int = op.shape[0]
        self._G = op.score_matrix
        self._tol = max(0.1 * float(torch.finfo(op.torch_dtype).eps), 1e-14)  # of eigenpairs
        self._version: int | None = None
        self._L: Any = None
        self._values: Tensor | None = None
        self._pairs: tuple[Tensor, Tensor] | None = None

    def zero(self, largest: float) -> float:
        """Return the size below which eigenvalues are zero to rounding, for the largest of them."""
        rows = self.dim if self._G is None else self._G.shape[0]
        return rank_threshold(largest, self.dim, rows, self.op.dtype)

    def matrix(self) -> Tensor:
        """Return F in float64, in which LAPACK loses nothing of what the precision gave."""
        op = self.op
        if self._G is None:
            F = torch.as_tensor(op.todense(), device=op.device).double()
        else:
            F = self._G.dense().double()
            F.diagonal().add_(op.shift)
        return (F + F.T).div_(2)

    # ---- Solves -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Compute the factorization, which may raise ValueError."""
        self._factor()

    def solve(self, B: Tensor, targets: Tensor) -> Solved:
        """Solve (F + total · I) x = b for rows (K, D), refined until the true residuals meet the targets (K,)."""
        X, _, norms, steps = self._refined(B, targets, self._direct)
        return Solved(X, norms, steps, bool((norms <= targets).all()), self._norm + self.added)

    def solve_least_norm(self, B: Tensor, targets: Tensor) -> Solved:
        """Return F⁺ b for rows (K, D), by eigenvalues above rounding, if ‖F r‖ / λ_max meets the targets (K,)."""
        if self._pairs is None:
            self._pairs = torch.linalg.eigh(self.matrix())
        values, U = self._pairs
        largest = float(values[-1])
        powers = values.clamp_min(1e-300) ** self._power_of_pseudoinverse
        powers = torch.where(values > self.zero(largest), powers, torch.zeros_like(powers))

        def direct(V: Tensor) -> Tensor:
            return self._raised(((self._lowered(V).double() @ U) * powers @ U.T).to(V.dtype))

        X, R, norms, steps = self._refined(B, targets, direct)
        # The part of b that is outside the range of F stays in the residual r.
        reached = self.op.processes.norms(self.op.multiply(R)) / max(largest, torch.finfo(B.dtype).tiny)
        return Solved(X, norms, steps, bool((reached <= targets).all()))

    _power_of_pseudoinverse = -1.0

    def _lowered(self, V: Tensor) -> Tensor:
        """Take rows (K, D) to the space of the matrix, (K, n)."""
        return V

    def _raised(self, W: Tensor) -> Tensor:
        """Take rows (K, n) back, (K, D)."""
        return W

    def _refined(
        self, B: Tensor, targets: Tensor, direct: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Solve directly, and again for the residual as long as that helps: X, residuals, their norms, and steps."""
        norms_of = self.op.processes.norms

        def residual(X: Tensor) -> Tensor:
            return B - self.op.multiply(X).add_(times(self.total, X))

        X = direct(B)
        R = residual(X)
        norms = norms_of(R)
        for step in range(_REFINEMENTS):
            if bool((norms <= targets).all()):
                return X, R, norms, step
            better = X + direct(R)
            left = residual(better)
            norms_left = norms_of(left)
            improved = norms_left < norms
            if not bool(improved.any()):
                return X, R, norms, step
            X, R = (torch.where(improved[:, None], new, old) for new, old in ((better, X), (left, R)))
            norms = torch.where(improved, norms_left, norms)
        return X, R, norms, _REFINEMENTS

    def _direct(self, V: Tensor) -> Tensor:
        """Multiply rows (K, D) by the factor alone, without refinement."""
        return self._raised_half(self._half(V)).to(V.dtype)

    def _half(self, V: Tensor) -> Tensor:
        """Multiply rows (K, n) by L⁻ᵀ, (K, n) in float64: their inner products are those with the inverse between."""
        # `cholesky_solve` would copy the factor.
        half: Tensor = torch.linalg.solve_triangular(self._factor(), V.T.double(), upper=False).T
        return half

    def _raised_half(self, W: Tensor) -> Tensor:
        """Multiply rows (K, n) in float64 by L⁻¹: after `_half`, these are products with the inverse."""
        whole: Tensor = torch.linalg.solve_triangular(self._factor().T, W.T, upper=True).T
        return whole

    def _factor(self) -> Tensor:
        """Return the Cholesky factor of the damped matrix, computed again if F has changed."""
        if self._version != (version := self.op.version):
            self._factorize()
            self._version = version
        factor: Tensor = self._L
        return factor

    def _factorize(self) -> None:
        op, damping = self.op, self.added
        matrix = self.matrix()
        self._norm = float(torch.linalg.matrix_norm(matrix))
        n = len(matrix)
        matrix.diagonal().add_(damping)
        L, is_found = cholesky_in_place(matrix)
        if not is_found and damping > 0:  # below the rounding of F; refinement finds what can be found
            del matrix, L
            matrix = self.matrix()
            matrix.diagonal().add_(damping + self.zero(self._norm))
            L, is_found = cholesky_in_place(matrix)
        pivots = L.diagonal()
        eps = float(torch.finfo(op.torch_dtype).eps)
        if not is_found or (damping == 0 and float(pivots.min()) ** 2 <= n * eps * float(pivots.max()) ** 2):
            raise ValueError(
                SINGULAR.format("it has eigenvalues that are zero to rounding")
                if damping == 0
                else _not_positive(damping)
            )
        self._L = L

    def draw(self, Z: Tensor) -> Tensor:
        """Return draws of covariance (F + total · I)⁻¹ from standard normal rows (K, D)."""
        return self._raised_half(Z.double()).to(Z.dtype)

    def draw_of_itself(self, Z: Tensor) -> Tensor:
        """Return draws of covariance F + total · I from standard normal rows (K, D)."""
        return (Z.double() @ self._factor().T).to(Z.dtype)

    def inverse_diagonal(self) -> Tensor:
        """Return the diagonal of (F + total · I)⁻¹ in float64, (D,)."""
        return torch.cholesky_inverse(self._factor()).diagonal()

    def inverse_trace(self) -> float:
        """Return the trace of (F + total · I)⁻¹."""
        return float(torch.cholesky_inverse(self._factor()).diagonal().sum())

    # ---- Spectra ----------------------------------------------------------------------------------

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of F in float64, ascending; if there are fewer than D, the others are zero."""
        if self._values is None:
            self._values = torch.linalg.eigvalsh(self.matrix())[-self.dim :]  # of a larger matrix, the others are zero
        return self._values

    def eigenpairs(self, k: int, largest: bool, with_vectors: bool) -> Pairs:  # noqa: ARG002
        """Return k eigenpairs of F at one end of the spectrum."""
        matrix = self.matrix()
        norm = float(matrix.norm())
        if largest:
            values, V = top_of_matrix(matrix, k, self._tol)
        else:
            values, V = (pairs[..., :k] for pairs in torch.linalg.eigh(matrix))
        return Pairs(values, V.T.to(self.op.torch_dtype), norm)

    def spectral_sum(self, function: Callable[[Matrix], Matrix]) -> Mean:
        """Return tr f(F + shift · I) for a function of nodes (m,) with values (m, ...)."""
        values = self._without_rounding(self.eigenvalues()).cpu().numpy() + self.shift
        others = function(np.full(1, self.shift))[0] * (self.dim - len(values))
        total = function(values).sum(0) + others
        return Mean(total, np.zeros_like(total))

    def largest_eigenvalue(self) -> float:
        """Return the largest eigenvalue of F."""
        return float(self.eigenvalues()[-1])

    def square_norm(self) -> Mean:
        """Return ‖F + shift · I‖², the sum of squared eigenvalues."""
        matrix = self.matrix()
        return Mean(float(matrix.norm()) ** 2 + 2 * self.shift * float(matrix.trace()) + self.dim * self.shift**2)

    def effective_dimension(self) -> Mean:
        """Return tr A (A + λI)⁻¹ for A = F + shift · I and the damping λ."""
        return self.spectral_sum(lambda nodes: nodes.clip(min=0) / (nodes.clip(min=0) + self.damping))

    def log_determinant(self) -> Mean:
        """Return log det (F + total · I), −inf if it is singular."""
        damping, D = self.added, self.dim
        if damping == 0:
            values = self.eigenvalues()
            if len(values) < D or float(values[0]) <= self.zero(float(values[-1])):
                return Mean(-math.inf)
            return Mean(float(values.log().sum()))
        matrix = self.matrix()
        n = len(matrix)
        if damping < 100 * self.zero(float(matrix.norm())):
            # Eigenvalues of the size of rounding would count besides λ.
            values = self._without_rounding(torch.linalg.eigvalsh(matrix)[-D:]).clamp_min(0)
            return Mean(float((values + damping).log().sum()) + (D - len(values)) * math.log(damping))
        matrix.diagonal().add_(damping)
        factor, is_found = cholesky_in_place(matrix)
        if not is_found:
            raise ValueError(_not_positive(damping))
        # The other D − n eigenvalues of F are zero; of n > D those of the Gram matrix, n − D are.
        return Mean(2 * float(factor.diagonal().log().sum()) + (D - n) * math.log(damping))

    def _without_rounding(self, values: Tensor) -> Tensor:
        """Return eigenvalues with those that are zero to rounding as zeros."""
        zeros = values.abs() <= self.zero(float(values[-1]))
        return torch.where(zeros, torch.zeros_like(values), values)


def _not_positive(damping: float) -> str:
    return f"`damping` must make F + λI positive definite to rounding, got {damping:g}. Pass a larger one."


def top_of_matrix(matrix: Tensor, k: int, tol: float) -> tuple[Tensor, Tensor]:
    """Return the k largest eigenpairs of a dense symmetric matrix, ascending: values (k,) and columns (n, k).

    Some of many are found by Lanczos' method, to residuals of `tol` relative to the largest. That none was missed is
    proved by inertia: without those found, no eigenvalue is above the smallest of them, so a Cholesky factor exists.
    """
    n = len(matrix)
    if 8 * k < n:

        def random(seed: int) -> Tensor:
            generator = torch.Generator("cpu").manual_seed(seed)
            return torch.randn(n, generator=generator, dtype=torch.float64, device="cpu").to(matrix)

        lanczos = Lanczos(matrix.mv, random, random(0), max(2 * k + 1, 20), k, maxiter=n, tol=tol)
        space = lanczos.start()
        while (following := lanczos.step(space)) is not None:
            space = following
        found, S, _, converged = lanczos.pairs(space)
        if converged:
            values = torch.from_numpy(found).to(matrix)
            vectors = space.basis[: len(S)].T @ torch.from_numpy(S).to(matrix)
            rest = torch.addmm(matrix, vectors * values, vectors.T, alpha=-1).neg_()
            rest.diagonal().add_(values[0] + 10 * tol * values[-1])
            if int(torch.linalg.cholesky_ex(rest)[1]) == 0:
                return values, vectors
    values, vectors = torch.linalg.eigh(matrix)
    return values[n - k :], vectors[:, n - k :]
