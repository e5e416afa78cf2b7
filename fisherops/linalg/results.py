"""Results: what the routines return, and what methods return to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and eigenvectors; unpacks as SciPy's, ``values, vectors = eigsh(op)``.

    Attributes
    ----------
    eigenvalues : array
        (k,), in ascending order.
    eigenvectors : array or None
        (D, k), of norm 1; None if they were not asked for.
    residuals : array or None
        (k,), ‖F v − λ v‖ of each pair, by a product with F; in the primal way without vectors, Lanczos' estimate of it.
    method : str
        "dual", "dense" or "primal".
    products : int
        Products with F and a vector that it took.
    converged : bool
        False where the primal way stopped before its tolerance, at `maxiter`.
    """

    eigenvalues: Any
    eigenvectors: Any
    residuals: Any
    method: str
    products: int
    converged: bool = True

    def __iter__(self) -> Iterator[Any]:
        return iter((self.eigenvalues, self.eigenvectors))


@dataclass(frozen=True)
class Solution:
    """The solution of (F + λI) x = b.

    Attributes
    ----------
    x : array
        Of the shape, library and device of `b`, and of the wider of its dtype and the operator's: for half-precision
        `b` it is float32.
    residual : float or array
        ‖b − (F + λI) x‖, for each column of a matrix; by a product with F.
    iterations : int
        Of conjugate gradients, or of refinement in the other ways.
    converged : bool
        Whether every residual is within max(rtol ‖b‖, atol).
    method : str
        "dual", "dense" or "primal".
    """

    x: Any
    residual: Any
    iterations: int
    converged: bool
    method: str


@dataclass(frozen=True)
class InverseForms:
    """Q (F + λI)⁻¹ Tᵀ or its diagonal; ``numpy.asarray(forms)`` is the array.

    Attributes
    ----------
    value : array
        (rows of Q, rows of T), or (rows of Q,) for the diagonal; in the compute precision.
    residual : float
        ‖q − (F + λI) x‖ / ‖q‖ of the solutions x, the largest of all rows. If the values are found from Gram matrices:
        of random combinations of the rows, or the rounding of the subtraction in them, if that is larger.
    converged : bool
        Whether the residual is within `rtol`.
    method : str
        "dual", "dense" or "primal".
    """

    value: Any
    residual: float
    converged: bool
    method: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.value, dtype=dtype) if copy else np.asarray(self.value, dtype=dtype)


@dataclass(frozen=True)
class Draws:
    """Random vectors; ``numpy.asarray(draws)`` is the array.

    Attributes
    ----------
    value : array
        (size, D), or (D,) for one; in the compute precision.
    error : float
        Relative change of a draw by the last five steps of Lanczos' method, the largest; 0 for the other methods, which
        are exact to rounding.
    converged : bool
        Whether the error is within `rtol`.
    method : str
        "dual", "dense" or "primal".
    """

    value: Any
    error: float
    converged: bool
    method: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.value, dtype=dtype) if copy else np.asarray(self.value, dtype=dtype)


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; ``float(estimate)`` is the number.

    Attributes
    ----------
    value : float
    standard_error : float
        From the spread of the random probes; 0 where the value is exact to rounding.
    method : str
        "rows" (of the score matrix), "dual", "dense" or "primal" (by random probes).
    """

    value: float
    standard_error: float
    method: str

    def __float__(self) -> float:
        return float(self.value)


class LogDeterminant(NamedTuple):
    """As of ``numpy.linalg.slogdet``, with a standard error.

    Attributes
    ----------
    sign : float
        1, or 0 where the determinant is.
    logabsdet : float
        −inf where the determinant is 0.
    standard_error : float
        Of `logabsdet`; 0 where it is exact to rounding.
    method : str
        "dual", "dense" or "primal".
    """

    sign: float
    logabsdet: float
    standard_error: float
    method: str


@dataclass(frozen=True)
class Density:
    """Expected numbers of eigenvalues in the bins of a grid; `fisherops.plot.density` draws it.

    Attributes
    ----------
    grid : numpy.ndarray
        (n + 1,), the edges of the bins, ascending. A bin holds its lower edge; the last one both.
    counts : numpy.ndarray
        (n,), eigenvalues in each bin; ``counts / D / diff(grid)`` is a density.
    standard_error : numpy.ndarray
        (n,), of `counts`; 0 where it is exact.
    below, above : float
        Eigenvalues below and above the grid; those that are zero to rounding count as below a positive grid.
    method : str
        "dual", "dense" or "primal".
    """

    grid: Any
    counts: Any
    standard_error: Any
    below: float
    above: float
    method: str


@dataclass(frozen=True)
class Bounds:
    """Cramér-Rao bounds.

    Attributes
    ----------
    covariance : numpy.ndarray
        (p, p), the least covariance of unbiased estimates of the p functions. Rows and columns of functions that the
        data do not determine are infinite; all entries are NaN if `lost` is not 0.
    standard_deviation : numpy.ndarray
        (p,), the square roots of its diagonal.
    digits : numpy.ndarray
        (p,), decimal digits of each standard deviation that the rounding of the scores leaves, a cautious estimate. 0
        for bounds that are NaN, and infinity for infinite ones.
    names : tuple of str
        Names of the functions.
    unidentifiable : tuple of str
        Directions in parameter space that the data say nothing about, by their largest entries, at most ten.
    nullity : int
        Number of these directions.
    lost : int
        Number of directions whose information is too close to rounding to be told from zero. Every function may depend
        on them, so there are no bounds. Use ``dtype="float64"``, or parameters that are less correlated.
    method : str
        "dual" or "dense".
    """

    covariance: Any
    standard_deviation: Any
    digits: Any
    names: tuple[str, ...]
    unidentifiable: tuple[str, ...]
    nullity: int
    lost: int
    method: str


class Interrupted(KeyboardInterrupt):
    """A KeyboardInterrupt that carries the best result so far.

    Attributes
    ----------
    result : Eigenpairs or Solution
        With ``converged=False``.
    """

    def __init__(self, result: Eigenpairs | Solution) -> None:
        super().__init__("interrupted; the best result so far is in .result")
        self.result = result


# ---- What methods return ------------------------------------------------------------------------


class Mean(NamedTuple):
    """A number or array and its standard error, which is 0 if the value is exact."""

    value: Any
    standard_error: Any = 0.0

    @classmethod
    def of(cls, samples: Tensor) -> Mean:
        """Return the mean of independent samples (n, ...) and its standard error."""
        return cls(samples.mean(0), samples.std(0) / len(samples) ** 0.5)


class Solved(NamedTuple):
    """Solutions (K, D), norms of their true residuals (K,), and the norm of the matrix, 0 if it is not known."""

    X: Tensor
    norms: Tensor
    iterations: int
    converged: bool
    size: float = 0.0


class Pairs(NamedTuple):
    """Eigenvalues (k,), ascending, in float64; eigenvectors (k, D); the size of the matrix; and residual norms (k,)."""

    values: Tensor
    vectors: Tensor | None
    scale: float
    residuals: Tensor | None = None
    products: int = 0
    converged: bool = True


class HaltedError(Exception):
    """A method was interrupted; `found` is the state or result so far."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found
