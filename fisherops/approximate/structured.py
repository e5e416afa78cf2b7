"""Symmetric matrices with a structure from which inverses, roots and determinants follow; tensors only.

Four classes compose to all approximations: :class:`Kronecker` products, matrices by their eigenvectors
(:class:`Eigen`), :class:`LowRank` plus a multiple of the identity, and :class:`BlockDiagonal` matrices, which place
their blocks anywhere among the parameters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from math import inf
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from fisherops import _arrays
from fisherops._files import replacing
from fisherops._linop import TorchLinearOperator, add_shift, as_damping, check_result
from fisherops._matmul import times_transposed
from fisherops._sizes import SIZES
from fisherops._torch import opaque

Function = Callable[[Tensor], Tensor]
Place = slice | Tensor | tuple[tuple[int, int, int], ...]
"""Indices of a block: a slice, (n,) integers, or the starts, stops and widths of matrices that lie side by side."""

# Rows from which matrices of low rank are decomposed by it, and Cholesky factorizations that find it.
_LARGE = 256
_PIVOTED: dict[torch.dtype, Callable[..., Any]] = {torch.float32: lapack.spstrf, torch.float64: lapack.dpstrf}

_FORMAT = "fisherops structured operator 1"


class SlogDet(NamedTuple):
    """Sign and natural logarithm of a determinant."""

    sign: float
    logabsdet: float


class StructuredOperator(TorchLinearOperator):
    """A symmetric, positive semi-definite matrix K whose spectrum is known, as a SciPy operator.

    It is a matrix of its own: it does not follow changes of the model that it was made from. Products accept and return
    arrays of any library, in the precision of the Fisher operator.

    Attributes
    ----------
    plan : dict of str to str
        What approximates the block of each layer. Empty for parts and functions of an approximation.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__((n, n), dtype, device)
        self.plan: dict[str, str] = {}

    # ---- What a structure says --------------------------------------------------------------------

    def mapped(self, function: Function) -> StructuredOperator:
        """Return f(K) for a function of the eigenvalues."""
        raise NotImplementedError

    def spectrum(self) -> Tensor:
        """Return the eigenvalues with their multiplicities in any order, (n,)."""
        raise NotImplementedError

    def raised(self, damping: float) -> StructuredOperator:
        """Return K + λI without a decomposition, if that is possible."""
        return self.mapped(lambda x: x + damping)

    def times_number(self, alpha: float) -> StructuredOperator:
        """Return αK for α > 0."""
        return self.mapped(lambda x: alpha * x)

    def diagonal_tensor(self) -> Tensor:
        """Return the diagonal, (n,)."""
        raise NotImplementedError

    def square_norm(self) -> float:
        """Return the squared Frobenius norm."""
        return float(self.spectrum().double().square().sum())

    def factored_inverse(self, damping: float) -> StructuredOperator:
        """Return the inverse with a damping that is split between factors; that of K + λI if there are none."""
        return self.mapped(_reciprocal(damping))

    @property
    def has_factors(self) -> bool:
        """Whether the matrix is made of Kronecker products whose factors are known."""
        return False

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    # ---- Functions --------------------------------------------------------------------------------

    @opaque
    def inv(self, damping: Any = 0.0, split: str = "exact") -> StructuredOperator:
        """Return (K + λI)⁻¹ as an operator.

        Parameters
        ----------
        damping : float
            λ ≥ 0, in the units of the eigenvalues; positive if K is singular. Default: 0.
        split : {"exact", "factored"}
            "exact": K + λI, by eigenvalues. "factored": for K of Kronecker products A ⊗ B, the product of the inverses
            of A + √λ/π I and B + π√λ I with π² = (tr B / dim B) / (tr A / dim A), the heuristic of the KFAC literature;
            it needs no eigenvectors, and is another matrix. Default: "exact".

        Returns
        -------
        StructuredOperator

        Raises
        ------
        ValueError
            If λ is negative, or 0 and K is singular; if there are no factors for "factored".

        References
        ----------
        J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015,
        section 6.3 of arXiv:1503.05671.

        Examples
        --------
        >>> import torch, fisherops as fo
        >>> _ = torch.manual_seed(0)
        >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
        >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
        >>> K = fo.approximate.kfac(op)
        >>> v = torch.ones(15)
        >>> bool(torch.allclose(K.inv(0.1) @ (K @ v + 0.1 * v), v, atol=1e-4))
        True
        """
        if split not in ("exact", "factored"):
            raise ValueError(f"`split` must be 'exact' or 'factored', got {split!r}.")
        value = self._positive(damping)
        if split == "exact":
            return self.mapped(_reciprocal(value))
        if not self.has_factors:
            raise ValueError(
                "`split` must be 'exact' for an approximation without Kronecker factors, got 'factored'. Use "
                "`approximate.kfac` or `approximate.kronecker`, or leave it out."
            )
        return self.factored_inverse(value)

    @opaque
    def root(self, damping: Any = 0.0) -> StructuredOperator:
        """Return (K + λI)^½, symmetric, as an operator.

        ``K.inv(damping).root() @ z`` for standard normal z is a sample of N(0, (K + λI)⁻¹).
        """
        value = as_damping(damping, self.torch_dtype)
        return self.mapped(lambda x: (x.clamp_min(0) + value).sqrt())

    @opaque
    def slogdet(self, damping: Any = 0.0) -> SlogDet:
        """Return the sign and the logarithm of det (K + λI); of a singular matrix 0 and -inf."""
        value = as_damping(damping)
        values = self.spectrum().double() + value
        if value == 0 and self._is_singular(values):
            return SlogDet(0.0, -inf)
        return SlogDet(1.0, float(check_result(values.log().sum())))

    @opaque
    def trace(self) -> float:
        """Return the trace."""
        return float(check_result(self.diagonal_tensor().sum(dtype=torch.float64)))

    @opaque
    def diagonal(self) -> np.ndarray[Any, Any]:
        """Return the diagonal as a NumPy array of shape (D,)."""
        return _arrays.to_numpy(check_result(self.diagonal_tensor()))

    @opaque
    def eigvalsh(self) -> np.ndarray[Any, Any]:
        """Return all eigenvalues as a NumPy array of shape (D,), in ascending order."""
        return _arrays.to_numpy(check_result(self.spectrum().sort().values))

    def _positive(self, damping: Any) -> float:
        """Return λ, by which the matrix must be regular."""
        value = as_damping(damping, self.torch_dtype)
        if value == 0 and self._is_singular(self.spectrum().double()):
            raise ValueError(
                "`damping` must be positive, got 0, because the approximation is singular. Pass damping > 0."
            )
        return value

    def _is_singular(self, values: Tensor) -> bool:
        eps = torch.finfo(self.torch_dtype).eps
        return bool(values.min() <= eps * values.max())

    # ---- Algebra ----------------------------------------------------------------------------------

    def _scaled(self, alpha: Any) -> TorchLinearOperator:
        if isinstance(alpha, complex) or not 0 < alpha < inf:
            return super()._scaled(alpha)
        return self.times_number(float(alpha))

    def damped(self, damping: Any) -> TorchLinearOperator:
        shift = self._as_shift(damping)
        return super().damped(damping) if isinstance(shift, Tensor) else self.raised(shift)

    # ---- Files ------------------------------------------------------------------------------------

    @opaque
    def save(self, path: Any) -> None:
        """Write the operator to a file, whole or not at all.

        Parameters
        ----------
        path : path
            The file; one that is there is replaced.

        See Also
        --------
        fisherops.approximate.load
        """
        with replacing(path) as file:
            torch.save({"format": _FORMAT, "operator": self._state()}, file)

    def _state(self) -> dict[str, Any]:
        """Return what the constructor takes, with the class and the plan."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} approximation: {self.shape[0]} × {self.shape[0]}, {self.nbytes} bytes>"


def load(path: Any) -> StructuredOperator:
    """Read an operator from a file that `StructuredOperator.save` wrote.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    StructuredOperator
        On the CPU.

    Raises
    ------
    ValueError
        If the file holds something else.

    Examples
    --------
    >>> import tempfile, torch, fisherops as fo
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> K = fo.approximate.kfac(op)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     K.save(f"{folder}/kfac.pt")
    ...     same = fo.approximate.load(f"{folder}/kfac.pt")
    >>> bool((K.todense() == same.todense()).all())
    True
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError
        return _restored(state["operator"])
    except FileNotFoundError:
        raise
    except Exception:
        raise ValueError(
            f"`path` must be a file that `K.save(path)` wrote, got {os.fspath(path)!r}. Save the approximation again."
        ) from None


def _restored(state: dict[str, Any]) -> StructuredOperator:
    classes: dict[str, Any] = {c.__name__: c for c in (Kronecker, Eigen, LowRank, BlockDiagonal)}
    arguments = dict(state["arguments"])
    if "blocks" in arguments:
        places = [slice(*place) if isinstance(place, list) else place for place in arguments.pop("places")]
        arguments["blocks"] = list(zip(places, map(_restored, arguments["blocks"]), strict=True))
    operator: StructuredOperator = classes[state["class"]](**arguments)
    operator.plan = state["plan"]
    return operator


class _Leaf(StructuredOperator):
    """A structure whose constructor takes tensors and numbers, which are its attributes of the same names."""

    _arguments: tuple[str, ...]

    def _state(self) -> dict[str, Any]:
        arguments = {name: getattr(self, name) for name in self._arguments}
        return {"class": type(self).__name__, "arguments": arguments, "plan": self.plan}


class Kronecker(_Leaf):
    """L_g ⊗ R_g + shift · I for each of some groups g.

    Parameters
    ----------
    left : torch.Tensor
        L, (g, o, o) symmetric; or (g, o), a diagonal.
    right : torch.Tensor
        R, (g, i, i) symmetric; or (g, i), a diagonal.
    shift : float
        A multiple of the identity that is added. Default: 0.
    """

    _arguments = ("left", "right", "added")

    def __init__(self, left: Tensor, right: Tensor, added: float = 0.0) -> None:
        self.left, self.right, self.added = left, right, added
        self.sizes = left.shape[0], left.shape[1], right.shape[1]
        super().__init__(math.prod(self.sizes), left.dtype, left.device)

    def _mul(self, V: Tensor) -> Tensor:
        X = from_left(self.left, V.reshape(len(V), *self.sizes))
        return add_shift(from_right(X, self.right).reshape(len(V), -1), V, self.added)

    @cached_property
    def eigen(self) -> Eigen:
        """The same matrix by the eigenvectors of its factors."""
        (left, of_left), (right, of_right) = _decomposed(self.left), _decomposed(self.right)
        values = of_left[:, :, None] * of_right[:, None, :]
        return Eigen(left, right, values + self.added if self.added else values)

    def mapped(self, function: Function) -> StructuredOperator:
        return self.eigen.mapped(function)

    def spectrum(self) -> Tensor:
        return self.eigen.spectrum()

    def raised(self, damping: float) -> StructuredOperator:
        return Kronecker(self.left, self.right, self.added + damping)

    def times_number(self, alpha: float) -> StructuredOperator:
        return Kronecker(alpha * self.left, self.right, alpha * self.added)

    def diagonal_tensor(self) -> Tensor:
        left, right = _diagonal_of(self.left), _diagonal_of(self.right)
        return (left[:, :, None] * right[:, None, :]).flatten() + self.added

    def square_norm(self) -> float:
        norms = self.left.double().square().flatten(1).sum(1) * self.right.double().square().flatten(1).sum(1)
        trace = float((self.diagonal_tensor().double() - self.added).sum())
        total: float = float(norms.sum()) + 2 * self.added * trace + self.shape[0] * self.added**2
        return total

    def factored_inverse(self, damping: float) -> StructuredOperator:
        damping += self.added
        left, right = _diagonal_of(self.left).double().mean(1), _diagonal_of(self.right).double().mean(1)
        if bool(((left == 0) | (right == 0)).any()) or self.sizes[2] == 1 or self.sizes[1] == 1:
            return self.mapped(_reciprocal(damping - self.added))
        ratio = (right / left).sqrt()
        shifts = damping**0.5 / ratio, damping**0.5 * ratio
        return Kronecker(_inverse_of(self.left, shifts[0]), _inverse_of(self.right, shifts[1]))

    @property
    def has_factors(self) -> bool:
        return self.sizes[1] > 1 and self.sizes[2] > 1

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "eigen"}


class Eigen(_Leaf):
    """Q diag(values) Qᵀ with Q = P_g ⊗ Q_g for each of some groups g.

    Parameters
    ----------
    left, right : torch.Tensor or None
        P, (g, o, o), and Q, (g, i, i), orthogonal; None is the identity.
    values : torch.Tensor
        Eigenvalues, (g, o, i).
    """

    _arguments = ("left", "right", "values")

    def __init__(self, left: Tensor | None, right: Tensor | None, values: Tensor) -> None:
        self.left, self.right, self.values = left, right, values
        super().__init__(values.numel(), values.dtype, values.device)

    def _mul(self, V: Tensor) -> Tensor:
        X = V.reshape(len(V), *self.values.shape)
        if self.left is not None:
            X = from_left(self.left.mT, X)
        X = self.values * (X if self.right is None else from_right(X, self.right))
        if self.right is not None:
            X = from_right(X, self.right.mT)
        return (X if self.left is None else from_left(self.left, X)).reshape(len(V), -1)

    def mapped(self, function: Function) -> StructuredOperator:
        return Eigen(self.left, self.right, function(self.values.double()).to(self.torch_dtype))

    def spectrum(self) -> Tensor:
        return self.values.flatten()

    def diagonal_tensor(self) -> Tensor:
        X = self.values[None]
        if self.left is not None:
            X = from_left(self.left.square(), X)
        if self.right is not None:
            X = from_right(X, self.right.square().mT)
        return X.flatten()


class LowRank(_Leaf):
    """Vᵀ diag(values) V + shift · I for orthonormal rows V.

    Parameters
    ----------
    vectors : torch.Tensor
        V, (r, n).
    values : torch.Tensor
        (r,).
    added : float
        The multiple of the identity. Default: 0.
    """

    _arguments = ("vectors", "values", "added")

    def __init__(self, vectors: Tensor, values: Tensor, added: float = 0.0) -> None:
        self.vectors, self.values, self.added = vectors, values, added
        super().__init__(vectors.shape[1], vectors.dtype, vectors.device)

    @classmethod
    def of_rows(cls, rows: Tensor) -> LowRank:
        """Return BᵀB for rows B (r, n), by the eigenvectors of B Bᵀ."""
        values, U = torch.linalg.eigh(_gram(rows))
        kept = values > len(rows) * torch.finfo(torch.float64).eps * values[-1:].clamp_min(0)
        vectors = _times(U[:, kept].T / values[kept].sqrt()[:, None], rows)
        if len(vectors):  # images of small eigenvalues are orthogonal to rounding only after this
            L = torch.linalg.cholesky(_gram(vectors).flip((0, 1))).flip((0, 1))
            vectors = _times(torch.linalg.solve_triangular(L, torch.eye(len(L)).to(L), upper=True), vectors)
        return cls(vectors, check_result(values[kept].to(rows.dtype)))

    def _mul(self, V: Tensor) -> Tensor:
        return add_shift((V @ self.vectors.T * self.values) @ self.vectors, V, self.added)

    def mapped(self, function: Function) -> StructuredOperator:
        has_rest = len(self.values) < self.shape[0]
        rest = float(function(torch.tensor([self.added], dtype=torch.float64))) if has_rest else 0.0
        values = function(self.values.double() + self.added) - rest
        return LowRank(self.vectors, values.to(self.torch_dtype), rest)

    def spectrum(self) -> Tensor:
        rest = self.values.new_full((self.shape[0] - len(self.values),), self.added)
        return torch.cat([rest, self.values + self.added])

    def diagonal_tensor(self) -> Tensor:
        return self.values @ self.vectors.square() + self.added


class BlockDiagonal(StructuredOperator):
    """A block-diagonal matrix whose blocks lie at given places of the vector.

    Parameters
    ----------
    blocks : sequence of (slice, torch.Tensor or tuple, StructuredOperator)
        Indices (n,) of each block, and the block. Together they are all indices, each once. An index may be a tuple of
        the starts, stops and widths of matrices that lie side by side, as weight and bias of a layer do.
    """

    def __init__(self, blocks: Sequence[tuple[Place, StructuredOperator]]) -> None:
        self.blocks = list(blocks)
        first = self.blocks[0][1]
        super().__init__(sum(block.shape[0] for _, block in self.blocks), first.torch_dtype, first.device)

    def _mul(self, V: Tensor) -> Tensor:
        result = torch.empty_like(V, memory_format=torch.contiguous_format)
        for place, block in self.blocks:
            put(result, place, block._mul(taken(V, place)))
        return result

    def _each(self, function: Callable[[StructuredOperator], StructuredOperator]) -> BlockDiagonal:
        return BlockDiagonal([(place, function(block)) for place, block in self.blocks])

    def mapped(self, function: Function) -> StructuredOperator:
        return self._each(lambda block: block.mapped(function))

    def raised(self, damping: float) -> StructuredOperator:
        return self._each(lambda block: block.raised(damping))

    def times_number(self, alpha: float) -> StructuredOperator:
        return self._each(lambda block: block.times_number(alpha))

    def factored_inverse(self, damping: float) -> StructuredOperator:
        return self._each(lambda block: block.factored_inverse(damping))

    def spectrum(self) -> Tensor:
        return torch.cat([block.spectrum() for _, block in self.blocks])

    def diagonal_tensor(self) -> Tensor:
        result = torch.empty(self.shape[0], dtype=self.torch_dtype, device=self.device)
        for place, block in self.blocks:
            put(result[None], place, block.diagonal_tensor()[None])
        return result

    def square_norm(self) -> float:
        return sum(block.square_norm() for _, block in self.blocks)

    @property
    def has_factors(self) -> bool:
        return any(block.has_factors for _, block in self.blocks)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes + (place.nbytes if isinstance(place, Tensor) else 0) for place, block in self.blocks)

    def _state(self) -> dict[str, Any]:
        places = [[p.start, p.stop] if isinstance(p, slice) else p for p, _ in self.blocks]
        arguments = {"places": places, "blocks": [block._state() for _, block in self.blocks]}
        return {"class": type(self).__name__, "arguments": arguments, "plan": self.plan}


def taken(V: Tensor, place: Place) -> Tensor:
    """Return the entries (K, n) of vectors at a place."""
    if not isinstance(place, tuple):
        return V[:, place]
    return torch.cat([V[:, a:b].reshape(len(V), -1, width) for a, b, width in place], 2).flatten(1)


def put(V: Tensor, place: Place, entries: Tensor) -> None:
    """Write entries (K, n) of vectors at a place."""
    if not isinstance(place, tuple):
        V[:, place] = entries
        return
    widths = [width for *_, width in place]
    pieces = entries.view(len(V), -1, sum(widths)).split(widths, 2)
    for (a, b, width), piece in zip(place, pieces, strict=True):
        V[:, a:b].view(len(V), -1, width).copy_(piece)


def dense(matrix: Tensor) -> Kronecker:
    """Return a dense matrix (n, n) as a structure."""
    return Kronecker(matrix[None], matrix.new_ones(1, 1))


def diagonal_matrix(values: Tensor) -> Eigen:
    """Return a diagonal matrix with entries (n,) as a structure."""
    return Eigen(None, None, values.view(1, -1, 1))


def from_left(L: Tensor, X: Tensor) -> Tensor:
    """Multiply L X for L (g, o, o) or a diagonal (g, o), and X (K, g, o, i)."""
    if L.ndim == 2:
        return L[:, :, None] * X
    if L.shape[0] == 1 and X.shape[3] == 1:
        return times_transposed(X[:, 0, :, 0].contiguous(), L[0])[:, None, :, None]
    if L.shape[0] == 1 and len(X) == 1 and L[0].is_contiguous():
        return times_transposed(L[0], X[0, 0].contiguous().T)[None, None]
    return torch.matmul(L, X)


def from_right(X: Tensor, R: Tensor) -> Tensor:
    """Multiply X R for X (K, g, o, i), and R (g, i, i) or a diagonal (g, i)."""
    if R.ndim == 2:
        return X * R[:, None, :]
    if R.shape[0] == 1:
        return times_transposed(X.reshape(-1, X.shape[3]).contiguous(), R[0].T).view(X.shape)
    return torch.matmul(X, R)


def _width(rows: Tensor) -> int:
    """Return how many columns are multiplied in float64 at a time."""
    return max(1, SIZES[rows.device].block // (8 * max(1, len(rows))))


def _gram(rows: Tensor) -> Tensor:
    """Return rows · rowsᵀ in float64, (r, r), a block of columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in rows.split(_width(rows), 1):
        wide = block.double()
        total += wide @ wide.T
    return total


def _times(M: Tensor, rows: Tensor) -> Tensor:
    """Return M · rows for M in float64, rounded to the dtype of the rows, a block of columns at a time."""
    result = rows.new_empty(len(M), rows.shape[1])
    width = _width(rows)
    for block, out in zip(rows.split(width, 1), result.split(width, 1), strict=True):
        out.copy_(M @ block.double())
    return result


def _diagonal_of(x: Tensor) -> Tensor:
    """Return the diagonals (g, n) of matrices, or diagonals as they are."""
    return x if x.ndim == 2 else x.diagonal(dim1=1, dim2=2)


def _decomposed(x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return eigenvectors (g, n, n), None for a diagonal, and eigenvalues (g, n) that are not negative."""
    if x.ndim == 2:
        return None, x
    if x.shape[1] == 1:
        return None, x[:, :, 0].clamp_min(0)
    values, vectors = eigenvectors_of(x)
    return vectors, values.clamp_min(0)


def eigenvectors_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (g, n) and eigenvectors (g, n, n), in float64 if the precision of the matrix fails."""
    if not bool(x.isfinite().all()):
        raise FloatingPointError(
            "the factors must be finite, got NaN or infinity: values exceed the precision. Pass dtype='float64' to the "
            "operator."
        )
    try:
        found = _eigenvectors_of_low_rank(x) if _has_pivots(x) else None
        values, vectors = torch.linalg.eigh(x) if found is None else found
        if bool(vectors.isfinite().all()):
            return values, vectors
    except RuntimeError:  # torch's LinAlgError is one
        pass
    values, vectors = torch.linalg.eigh(x.double())
    return values.to(x.dtype), vectors.to(x.dtype)


def _has_pivots(x: Tensor) -> bool:
    """Whether matrices (g, n, n) are so large that their rank is worth finding, by a routine for the CPU."""
    return x.device.type == "cpu" and x.dtype in _PIVOTED and x.shape[1] >= _LARGE


def _eigenvectors_of_low_rank(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues (g, n) and eigenvectors (g, n, n) if all ranks are at most n/2 to rounding; None otherwise.

    P x Pᵀ = L Lᵀ by Cholesky's factorization with pivots. The first r columns of Q in L = Q R span the range, in which
    the eigenvectors are those of an r × r matrix, and the others the null space.
    """
    n, values, vectors = x.shape[1], torch.zeros_like(x[:, 0]), torch.empty_like(x)
    for own, own_values, own_vectors in zip(x, values, vectors, strict=True):
        # What is left below this is the rounding of x; LAPACK's own tolerance is n times as large.
        rounding = 2 * torch.finfo(x.dtype).eps * float(own.diagonal().max())
        factor, pivots, rank, info = _PIVOTED[x.dtype](own.numpy(), lower=True, tol=rounding)
        if info < 0 or not 0 < rank <= n // 2:
            return None
        L = own.new_empty(n, rank)
        L[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(np.tril(factor[:, :rank]))
        Q = torch.linalg.qr(L, mode="complete")[0]
        range_, null = Q[:, :rank], Q[:, rank:]
        own_values[n - rank :], U = torch.linalg.eigh(range_.T @ own @ range_)
        torch.cat([null, range_ @ U], 1, out=own_vectors)
    return values, vectors


def _inverse_of(x: Tensor, shift: Tensor) -> Tensor:
    """Return (x + shift · I)⁻¹ for matrices (g, n, n) or diagonals (g, n), and shifts (g,)."""
    if x.ndim == 2:
        return (x.double() + shift[:, None]).reciprocal().to(x.dtype)
    own = x.double()
    own.diagonal(dim1=1, dim2=2).add_(shift[:, None])
    return torch.cholesky_inverse(torch.linalg.cholesky(own)).to(x.dtype)


def _reciprocal(damping: float) -> Function:
    return lambda x: (x.clamp_min(0) + damping).reciprocal()
