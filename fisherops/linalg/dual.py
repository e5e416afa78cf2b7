"""The Gram matrix G Gᵀ, with the nonzero eigenvalues of F = GᵀG, and matrices for dampings of single parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fisherops._linop import TorchLinearOperator, check_later, check_result, identity
from fisherops.linalg.dense import Dense, top_of_matrix
from fisherops.linalg.iteration import Iteration, checksum
from fisherops.linalg.panels import Cholesky, Panels, Storage
from fisherops.linalg.results import Mean, Pairs, Solved
from fisherops.scores.protocol import Scores
from fisherops.scores.selected import SelectedScores

# Rows of T whose products with G are there at once: so few that the same memory serves for all.
_FEW_ROWS = 512


class Dual(Dense):
    """The Gram matrix K = G Gᵀ, (R, R)."""

    name: ClassVar[str] = "dual"

    def matrix(self) -> Tensor:
        """Return the Gram matrix in float64."""
        matrix: Tensor = self._G.gram_tensor()
        return matrix.double()

    # F⁺ = Gᵀ (G Gᵀ)⁺² G.
    _power_of_pseudoinverse = -2.0

    def _lowered(self, V: Tensor) -> Tensor:
        return check_later(self._G._mul(V), V)

    def _raised(self, W: Tensor) -> Tensor:
        return check_later(self._G._mul_t(W), W)

    def _direct(self, V: Tensor) -> Tensor:
        """Multiply rows (K, D) by (F + λI)⁻¹ = (I − Gᵀ (K + λI)⁻¹ G) / λ, Woodbury's identity."""
        return V.sub(self._raised(super()._direct(self._lowered(V)))).div_(self.added)

    # ---- Rows of other score matrices ---------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Number of rows of G."""
        rows: int = self._G.num_rows
        return rows

    def draw(self, Z: Tensor, E: Tensor | None = None) -> Tensor:
        """Return draws of covariance (F + total · I)⁻¹ from standard normal rows (K, D) and (K, R)."""
        assert E is not None
        W = Z / self.added**0.5
        drawn: Tensor = W - self._raised(Dense._direct(self, self._lowered(W) + E))
        return drawn

    def direct(self, V: Tensor) -> Tensor:
        """Multiply rows (K, D) by (F + total · I)⁻¹, without refinement."""
        return self._direct(V)

    # ---- The Cholesky factor of K + λI --------------------------------------------------------------

    storage = Storage()
    """Where its panels are."""
    iteration = Iteration()
    """How its progress is shown and saved."""
    itemsizes: tuple[int, ...] = (8,)
    """Bytes of an entry, in order of preference; see `Cholesky`."""
    rtol = 0.0
    """Relative residual that float32 must allow, to be taken if there is a choice."""

    def factorization(self) -> tuple[Panels, float]:
        """Return the panels of the factor, and the norm of K."""
        return self._panels(), self._norm

    def adopt(self, panels: Panels, norm: float) -> None:
        """Take the factorization of another method with the same matrix."""
        self._L, self._norm, self._version = panels, norm, self.op.version

    def widen(self) -> bool:
        """Return whether the factor was in float32 and may be in float64, as which it is computed when it is used."""
        if 8 not in self.itemsizes or self._panels().dtype == torch.float64:
            return False
        self.itemsizes, self._version = (8,), None
        return True

    def prepare(self) -> None:
        """Compute the factorization, which may raise ValueError."""
        self._panels()

    def _panels(self) -> Panels:
        """Return the panels of the factor, computed again if F has changed."""
        if self._version != (version := self.op.version):
            self._L = None  # its memory is used again
            self._L, self._norm = self._factorized()
            self._version = version
        panels: Panels = self._L
        return panels

    def _factorized(self) -> tuple[Panels, float]:
        G = self._G
        panels = Panels(G.num_rows, self.storage)
        algorithm = Cholesky(
            panels,
            lambda first: G.panels_of_gram(panels.width, first),
            self.added,
            self.itemsizes if self.op.torch_dtype == torch.float32 else (8,),
            self.rtol,
            self.zero,
            self.op.device,
            self.iteration.checkpoint is not None,
        )
        total = torch.as_tensor(self.total, dtype=torch.float64, device=self.op.device).reshape(-1)
        identity = {"rows": panels.n, "columns of a panel": panels.width, "checksum of the damping": checksum(total)}
        state = self.iteration.run(self.op, algorithm, **identity)
        return panels, state.squares**0.5

    def _half(self, V: Tensor) -> Tensor:
        panels = self._panels()
        return panels.solve(_columns(V, panels.dtype)).T.double()

    def _raised_half(self, W: Tensor) -> Tensor:
        panels = self._panels()
        return panels.solve_t(_columns(W, panels.dtype)).T.double()

    # ---- Forms --------------------------------------------------------------------------------------

    def form(self, Q: Scores, T: Scores, step: int) -> tuple[Tensor, Tensor]:
        """Return Q (F + total · I)⁻¹ Tᵀ in float64, and the norm of what the subtraction in it starts from.

        Q Gᵀ is held in blocks of `step` rows, and T Gᵀ of fewer, which is found again for each block of Q Gᵀ.
        """
        G, is_symmetric = self._G, T is Q
        Q = self._columns_of(Q)
        T = Q if is_symmetric else self._columns_of(T)
        value = Q.gram_tensor(None if is_symmetric else T).double()
        norm = value.norm() / self.added
        first = 0
        for block in gram_blocks(Q, G, step):
            Z, own = self._half(block), value[first : first + len(block)]
            first += len(block)
            if is_symmetric and len(block) == len(value):
                own -= Z @ Z.T
                break
            Z, at = self._raised_half(Z), 0
            for other in gram_blocks(T, G, min(step, _FEW_ROWS)):
                own[:, at : at + len(other)] -= Z @ other.double().T
                at += len(other)
        return (value + value.T).div_(2 * self.added) if is_symmetric else value.div_(self.added), norm

    def diagonal_form(self, Q: Scores, step: int) -> tuple[Tensor, Tensor]:
        """Return the diagonal of Q (F + total · I)⁻¹ Qᵀ in float64, (k,), and what the subtraction starts from."""
        Q = self._columns_of(Q)
        squares = Q.row_squares()
        reduced = [self._half(block).square().sum(1) for block in gram_blocks(Q, self._G, step)]
        return (squares - torch.cat([squares[:0], *reduced])).div_(self.added), squares / self.added

    def _columns_of(self, rows: Scores) -> Scores:
        """Return rows as they meet G in this method."""
        return rows

    def inverse_diagonal(self) -> Tensor:
        """Return (1 − ‖L⁻¹ G e_i‖²) / λ from the Cholesky factor L of K + λI, (D,)."""
        norms = torch.zeros(self.dim, dtype=torch.float64, device=self.op.device)
        for rows in self._rows_of_inverse():
            norms += self._raised(rows.to(self.op.torch_dtype)).double().square().sum(0)
        return (1 - norms).div_(self.added)

    def _rows_of_inverse(self) -> Iterator[Tensor]:
        """List the rows of L⁻¹ in blocks (K, R)."""
        for rows in identity(self.rows, torch.float64, self.op.device):
            yield self._raised_half(rows)

    def inverse_trace(self) -> float:
        """Return (D − n)/λ + tr (K + λI)⁻¹ for n rows of G."""
        own = sum(float(rows.square().sum()) for rows in self._rows_of_inverse())
        return own + (self.dim - self.rows) / self.added

    def eigenpairs(self, k: int, largest: bool, with_vectors: bool) -> Pairs:
        """Return k eigenpairs of F at one end of the spectrum; besides those of K it has zeros."""
        rows = self._rows() if with_vectors else None
        matrix = self.matrix() if rows is None else rows @ rows.T
        n, norm = len(matrix), float(matrix.norm())
        values, U = top_of_matrix(matrix, min(k, n) if largest else n, self._tol)
        positive = values > self.zero(float(values[-1]))
        values, W = values[positive], U.T[positive]
        rank = len(values)  # or k, if that is less
        if not rank and with_vectors:  # F = 0, of which all vectors are eigenvectors
            zeros = min(k, self.dim)
            V = torch.eye(zeros, self.dim, dtype=self.op.torch_dtype, device=self.op.device)
            return Pairs(values.new_zeros(zeros), V, norm)
        zeros = max(0, k - rank) if largest else min(k, self.dim - rank)
        chosen = rank if largest else k - zeros
        eigenvalues = torch.cat([values.new_zeros(zeros), values[:chosen]])
        if not with_vectors:
            return Pairs(eigenvalues, None, norm)
        # All images are needed for the complement of their space.
        W = (W if zeros else W[:chosen]).to(self.op.torch_dtype if rows is None else W.dtype)
        V = _orthonormal(self._raised(W) if rows is None else (W @ rows).to(self.op.torch_dtype))
        if zeros:
            V = torch.cat([_complement(V, zeros), V[:chosen]])
        return Pairs(eigenvalues, V, norm)

    def _rows(self) -> Tensor | None:
        """Return the rows of G that are not zero, (n, D) in float64, if that saves passes over the data.

        The Gram matrix of rows that are not cached takes two passes for each block of the identity, and their images
        another one; all rows take one.
        """
        size, R = self._G.cache_size, self._G.shape[0]
        if self._G.is_cached or self._G.is_divided or 8 * R * (self.dim + 6 * R) > size.memory_left:
            return None
        rows: Tensor = self._G.square_root(triangular=False)
        return rows if len(rows) else None


class _Scaled(Dense):
    """F + T = T^½ (S F S + I) T^½ with T = diag(total) and S = T^-½, if each parameter has its own damping.

    The matrix that is factorized is S F S + I, or that of the Gram matrix of G S.
    """

    def __init__(self, op: TorchLinearOperator, shift: Tensor, damping: float) -> None:
        super().__init__(op, shift.to(torch.float64), damping)
        self._s = self.total.rsqrt()
        self.added = 1.0

    def solve(self, B: Tensor, targets: Tensor) -> Solved:
        """Solve (F + T) x = b for rows (K, D), refined until the true residuals meet the targets (K,)."""
        solved = super().solve(B, targets)
        return solved._replace(size=solved.size * float(self.total.max()))

    def _direct(self, V: Tensor) -> Tensor:
        s = self._s.to(V.dtype)
        return super()._direct(V * s).mul_(s)

    def inverse_diagonal(self) -> Tensor:
        """Return that of (S F S + I)⁻¹, scaled, (D,)."""
        return super().inverse_diagonal().mul_(self._s.square())

    def inverse_trace(self) -> float:
        """Return the sum of the diagonal."""
        return float(self.inverse_diagonal().sum())

    def effective_dimension(self) -> Mean:
        """Return tr F (F + T)⁻¹ + tr (T − λI) (F + T)⁻¹."""
        values = self._without_rounding(self.eigenvalues()).clamp_min(0)
        of_shift = float((self.shift * self.inverse_diagonal()).sum())
        return Mean(float((values / (values + 1)).sum()) + of_shift)

    def log_determinant(self) -> Mean:
        """Return log det (S F S + I) + log det T."""
        return Mean(super().log_determinant().value + float(self.total.log().sum()))


class ScaledDense(_Scaled):
    """S F S, (D, D)."""

    def draw(self, Z: Tensor) -> Tensor:
        """Return draws as those of S (S F S + I)⁻¹ S."""
        drawn: Tensor = super().draw(Z) * self._s.to(Z.dtype)
        return drawn

    def matrix(self) -> Tensor:
        """Return S F S in float64."""
        return super().matrix().mul_(self._s).mul_(self._s[:, None])


class ScaledDual(_Scaled, Dual):
    """The Gram matrix of G S, (R, R)."""

    def __init__(self, op: TorchLinearOperator, shift: Tensor, damping: float) -> None:
        super().__init__(op, shift, damping)
        self._factors = self._s.to(op.torch_dtype)
        self._G = SelectedScores(self._G, factors=self._factors)

    def draw(self, Z: Tensor, E: Tensor | None = None) -> Tensor:
        """Return draws as those of S (S F S + I)⁻¹ S."""
        drawn: Tensor = super().draw(Z, E) * self._factors
        return drawn

    def _columns_of(self, rows: Scores) -> Scores:
        return SelectedScores(rows, factors=self._factors)


def gram_blocks(Q: Scores, G: Scores, step: int) -> Iterator[Tensor]:
    """List Q Gᵀ in blocks of rows (b, R): whole if it has at most `step` rows, else by batches or dense rows."""
    if Q.num_rows <= step:
        yield Q.gram_tensor(G)
        return
    for block in Q.blocks_of_gram(G, step):
        yield check_result(block)


def _columns(V: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of rows (K, n) as columns (n, K)."""
    return torch.empty_like(V.T, dtype=dtype, memory_format=torch.contiguous_format).copy_(V.T)


def _orthonormal(V: Tensor) -> Tensor:
    """Return the orthonormal eigenvectors of F, (k, D), for images Gᵀu of those of G Gᵀ, in ascending order."""
    if not len(V):
        return V
    inner = V @ V.T
    V /= inner.diagonal().sqrt()[:, None]
    overlaps = inner / torch.outer(inner.diagonal(), inner.diagonal()).sqrt()
    eps = float(torch.finfo(V.dtype).eps)
    if float(overlaps.fill_diagonal_(0).abs().max()) > 100 * eps:
        # The images of larger ones are orthogonal to rounding; those of smaller ones are made so to them.
        Q, R = torch.linalg.qr(V.flip(0).T)
        V = (Q * R.diagonal().sign()).T.flip(0)
        V /= (V @ V.T).diagonal().sqrt()[:, None]
    return V


def _complement(V: Tensor, count: int) -> Tensor:
    """Return orthonormal vectors (count, D) that are orthogonal to the orthonormal rows of V."""
    generator = torch.Generator("cpu").manual_seed(0)
    Z = torch.randn(count, V.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(V.device, V.dtype)
    for _ in range(2):
        Z = torch.linalg.qr((Z - (Z @ V.T) @ V).T)[0].T
    return Z
