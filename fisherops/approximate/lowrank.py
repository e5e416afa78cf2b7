"""Low-rank approximations by Nyström's method."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._checks import integer
from fisherops._linop import as_damping, check_result
from fisherops._torch import outside_of_autocast
from fisherops.approximate.assembly import scores_of, shifted
from fisherops.approximate.structured import LowRank, StructuredOperator
from fisherops.scores.protocol import Scores

_TOL = 1e-2

# Pivots that are chosen together, and rank at which growing begins.
_BLOCK, _FIRST = 16, 32

# Rows of a Gram matrix in float64 beyond which products with G are cheaper.
_MANY_ROWS = 2**13


@outside_of_autocast
def nystrom(
    op: Any, rank: int | None = None, tol: float | None = None, *, damping: float | None = None, seed: int = 0
) -> StructuredOperator:
    """Return a low-rank approximation of a Fisher matrix by Nyström's method.

    K = FΩ (ΩᵀFΩ)⁺ ΩᵀF ≤ F. From the Gram matrix G Gᵀ if it fits into memory, Ω are rows of G chosen by randomly
    pivoted Cholesky factorization; otherwise normal random vectors, which are multiplied by G.

    Parameters
    ----------
    op : FisherOperator
        F.
    rank : int, optional
        Rank of K, at most the number of rows of G.
    tol : float, optional
        Relative error ‖F − K‖_F / ‖F‖_F that the rank is chosen for. Default: 0.01 if nothing else is passed.
    damping : float, optional
        λ > 0 for whose effective dimension d = tr F(F + λI)⁻¹ the rank is chosen: 2⌈1.5 d⌉ + 1, with which the
        condition number of F + λI preconditioned by K is at most 28 on average.
    seed : int
        Of the random choices. Default: 0.

    Returns
    -------
    StructuredOperator
        K, (D, D), by its eigenvectors.

    Raises
    ------
    TypeError
        If `op` has no score matrix.
    ValueError
        If the rank exceeds the rows of G, an argument is out of its range, or more than one is passed.
    NotImplementedError
        If parameters are sharded.

    References
    ----------
    Y. Chen, E. Epperly, J. Tropp, R. Webber, Randomly pivoted Cholesky, Comm. Pure Appl. Math. 78 (2025) 995–1041,
    doi:10.1002/cpa.22234. Z. Frangella, J. Tropp, M. Udell, Randomized Nyström preconditioning, SIAM J. Matrix Anal.
    Appl. 44 (2023) 718–752, doi:10.1137/21M1466244.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> K = fo.approximate.nystrom(op, tol=0.05)
    >>> fo.approximate.error(op, K).value <= 0.05
    True
    """
    G, shift = scores_of(op)
    if sum(x is not None for x in (rank, tol, damping)) > 1:
        raise ValueError("`rank`, `tol` and `damping` must not be passed together. Pass one of them.")
    R, D = G.shape
    least = min(R, D)
    if rank is not None and integer("rank", rank, 1) > R:
        raise ValueError(f"`rank` must be at most the {R} rows of the score matrix, got {rank}. Pass a smaller one.")
    if tol is not None and not 0 < (tol := _arrays.real("tol", tol)) < 1:
        raise ValueError(f"`tol` must be above 0 and below 1, got {tol!r}. Pass a relative error such as 0.01.")
    value = None if damping is None else as_damping(damping, G.torch_dtype)
    if value == 0:
        raise ValueError("`damping` must be positive, got 0. Pass the damping of the system, or a rank.")
    if rank is None and value is None and tol is None:
        tol = _TOL
    generator = torch.Generator("cpu").manual_seed(integer("seed", seed, 0))
    has_gram = R <= _MANY_ROWS and G.cache_size.memory_left >= 3 * 8 * R * R
    sketch: _Sketch = _Pivots(G, generator) if has_gram else _Normal(G, generator)
    wanted = min(least, rank or _FIRST)
    while True:
        sketch.grow(wanted)
        if rank is not None or wanted == least:
            break
        if tol is not None and sketch.error() <= tol:
            break
        if value is not None:
            values = sketch.eigenvalues()
            needed = 2 * math.ceil(1.5 * float((values / (values + value)).sum())) + 1
            if needed <= wanted:
                break
            wanted = min(least, max(needed, 2 * wanted))
        else:
            wanted = min(least, 2 * wanted)
    if tol is not None:
        sketch.shrink(tol)
    K = LowRank.of_rows(check_result(sketch.rows()))
    if rank is not None and len(K.values) > rank:
        K = LowRank(K.vectors[-rank:], K.values[-rank:])
    K.plan = dict.fromkeys(G.parameters.shapes, f"eigenvectors of a matrix of rank {len(K.values)}, by {sketch.name}")
    return shifted(K, shift)


class _Sketch(Protocol):
    """The range of G Ω for vectors Ω, to which more are added."""

    name: str

    def grow(self, rank: int) -> None:
        """Add vectors until there are `rank` of them."""

    def shrink(self, tol: float) -> None:
        """Leave out what the error does not need."""

    def error(self) -> float:
        """Return ‖F − K‖ / ‖F‖, or a bound or estimate of it."""

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of K."""

    def rows(self) -> Tensor:
        """Return B with BᵀB = K, (r, D)."""


class _Pivots:
    """Rows of G, chosen with probability proportional to what is left of the diagonal of G Gᵀ; blocks at a time."""

    name = "randomly pivoted Cholesky"

    def __init__(self, G: Scores, generator: torch.Generator) -> None:
        self._G, self._generator = G, generator
        self.K = G.gram_tensor().double()
        self._norm = float(self.K.norm())
        self._diagonal = self.K.diagonal().clamp_min(0).clone()
        self._floor = len(self.K) * torch.finfo(G.torch_dtype).eps * float(self._diagonal.max()) if len(self.K) else 0.0
        self.L = self.K.new_zeros(len(self.K), 0)
        self._chosen: list[int] = []
        self._is_complete = False

    def grow(self, rank: int) -> None:
        while len(self._chosen) < rank and not self._is_complete:
            weights = self._diagonal.cpu()
            weights[self._chosen] = 0
            weights[weights <= self._floor] = 0
            possible = int((weights > 0).sum())
            if not possible:
                self._is_complete = True
                return
            count = min(_BLOCK, rank - len(self._chosen), possible)
            picked = torch.multinomial(weights, count, generator=self._generator).tolist()
            columns = self.K[:, picked] - self.L @ self.L[picked].T
            block = columns[picked]
            scale = float(block.diagonal().max())
            block = block + torch.finfo(torch.float64).eps * scale * len(picked) * torch.eye(len(picked)).to(block)
            C, info = torch.linalg.cholesky_ex(block)
            if int(info):  # rows that depend on each other: one of them at a time
                picked, columns, C = picked[:1], columns[:, :1], block[:1, :1].clamp_min(self._floor).sqrt()
            new = torch.linalg.solve_triangular(C, columns.T, upper=False).T
            self.L = torch.cat([self.L, new], 1)
            self._diagonal = (self._diagonal - new.square().sum(1)).clamp_min_(0)
            self._chosen += picked

    def error(self) -> float:
        if self._norm == 0:
            return 0.0
        U = torch.linalg.qr(self.L)[0]
        # F − K has the eigenvalues of (I − U Uᵀ) G Gᵀ (I − U Uᵀ).
        left = self.K - U @ (U.T @ self.K)
        left = left - (left @ U) @ U.T
        return float(left.norm()) / self._norm

    def shrink(self, tol: float) -> None:
        low, high = 0, self.L.shape[1]
        whole = self.L
        while high - low > 1:  # the error falls with each column
            middle = (low + high) // 2
            self.L = whole[:, :middle]
            low, high = (low, middle) if self.error() <= tol else (middle, high)
        self.L = whole[:, :high]

    def eigenvalues(self) -> Tensor:
        U = torch.linalg.qr(self.L)[0]
        values: Tensor = torch.linalg.eigvalsh(U.T @ self.K @ U)
        return values.clamp_min(0)

    def rows(self) -> Tensor:
        U = torch.linalg.qr(self.L)[0]
        if not self.L.shape[1]:
            return torch.zeros(0, self._G.shape[1], dtype=self._G.torch_dtype, device=self._G.device)
        rows: Tensor = self._G._mul_t(U.T.contiguous().to(self._G.torch_dtype))
        return rows


class _Normal:
    """Normal random vectors multiplied by G, and the rows Uᵀ G for an orthonormal basis U of the products."""

    name = "random vectors"

    def __init__(self, G: Scores, generator: torch.Generator) -> None:
        self._G, self._generator = G, generator
        G.require_order()
        self._largest = 0.0
        R, D = G.shape
        self._U = torch.zeros(0, R, dtype=torch.float64, device=G.device)
        self._B = torch.zeros(0, D, dtype=G.torch_dtype, device=G.device)
        signs = torch.randint(2, (_BLOCK, D), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        self._Z = signs.to(G.device, G.torch_dtype)
        self._FZ = G.product(self._Z)

    def grow(self, rank: int) -> None:
        count = rank - len(self._U)
        omega = torch.randn(count, self._G.shape[1], generator=self._generator, dtype=torch.float64)
        new = self._G._mul(omega.to(self._G.device, self._G.torch_dtype)).double()
        for _ in range(2):
            new = new - (new @ self._U.T) @ self._U
        Q, triangle = torch.linalg.qr(new.T)
        size = triangle.diagonal().abs()
        # What is left of products that others explain is rounding.
        self._largest = max(self._largest, float(size.max()) if len(size) else 0.0)
        Q = Q.T[size > len(self._Z.T) * torch.finfo(self._G.torch_dtype).eps * self._largest]
        if not len(Q):
            return
        Q = torch.linalg.qr((Q - (Q @ self._U.T) @ self._U).T)[0].T
        self._U = torch.cat([self._U, Q])
        self._B = torch.cat([self._B, self._G._mul_t(Q.contiguous().to(self._G.torch_dtype))])

    def error(self) -> float:
        left = self._FZ - (self._Z @ self._B.T) @ self._B
        total = float(self._FZ.double().norm())
        # Twice its standard error above the estimate.
        bound = 1 + 2 * (2 / _BLOCK) ** 0.5
        return bound**0.5 * float(left.double().norm()) / total if total else 0.0

    def shrink(self, tol: float) -> None:
        """Keep all: the estimate of the error is not precise enough for less."""

    def eigenvalues(self) -> Tensor:
        values: Tensor = torch.linalg.eigvalsh(self._B.double() @ self._B.double().T)
        return values.clamp_min(0)

    def rows(self) -> Tensor:
        return self._B
