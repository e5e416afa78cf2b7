"""The SciPy contract and the algebra of operators, written once, in torch.

A subclass says how it multiplies (:meth:`TorchLinearOperator._mul`) and what its transpose is; every public way to
multiply is here, with the one check that results are finite. Inside, vectors are rows: (K, N). The public methods of
SciPy convert their input to NumPy before any private hook sees it, so they are all overridden, and so are its
composites.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherops import _arrays, _torch
from fisherops._processes import ONE, Processes
from fisherops._torch import opaque

# Shapes that products take: with one vector, with a matrix, with either.
_SHAPES = {True: "({0},) or ({0}, 1)", False: "({0}, K)", None: "({0},) or ({0}, K)"}

# Rows of the identity that are multiplied at a time.
_BLOCK = 256


def as_damping(damping: Any, dtype: torch.dtype = torch.float64) -> float:
    """Return λ as a number that is finite in `dtype` and at least 0."""
    value = _arrays.real("damping", damping)
    if not 0 <= value <= torch.finfo(dtype).max:
        raise ValueError(
            f"`damping` must be at least 0 and finite in {str(dtype).removeprefix('torch.')}, got {value}. Pass a "
            "positive number; to subtract a multiple of the identity use "
            "`op - mu * scipy.sparse.linalg.aslinearoperator(scipy.sparse.eye_array(D))`."
        )
    return float(value)


def add_shift(result: Tensor, V: Tensor, shift: float | Tensor) -> Tensor:
    """Add λV, or V diag(λ) for λ (N,), to a product (K, N), in place."""
    if isinstance(shift, Tensor):
        return result.addcmul_(V, shift)
    return result.add_(V, alpha=shift) if shift else result


def check_result(result: Tensor, *inputs: Tensor) -> Tensor:
    """Return a result that leaves if it is finite, or an input is not."""
    check_later(result, *inputs)
    if result.device.type != "cpu":
        _torch.settle()
    return result


def check_later(result: Tensor, *inputs: Tensor) -> Tensor:
    """Return a result as `check_result` does; of an accelerator it is judged later, because the host does not wait."""
    own = _arrays.part_of(result) if type(result) is not Tensor else result
    if own.device.type != "cpu":
        if own.numel():
            # Largest sizes, which are NaN if an entry is: one reading each, without the memory of a comparison.
            inexact = (x for x in (own, *map(_arrays.part_of, inputs)) if x.is_floating_point() or x.is_complex())
            _torch.judge(torch.stack([torch.linalg.vector_norm(x, torch.inf) for x in inexact]), _refuse_infinite)
    # The sum is finite if all entries are, unless it overflows, which the second test settles.
    elif (
        not own.sum().isfinite()
        and not own.isfinite().all()
        and all(_arrays.part_of(x).isfinite().all() for x in inputs)
    ):
        raise FloatingPointError(_NOT_FINITE.format("the result"))
    return result


def _refuse_infinite(sizes: Tensor) -> None:
    """Raise FloatingPointError for the largest sizes of a result and its inputs."""
    if not sizes[0].isfinite() and bool(sizes[1:].isfinite().all()):
        raise FloatingPointError(_NOT_FINITE.format("the result, of this product or an earlier one on its device,"))


_NOT_FINITE = (
    "{} must be finite, got NaN or infinity, although the inputs and the model's outputs are finite: a derivative of "
    "the model is not finite, or values exceed the precision. Check the model's operations, or pass dtype='float64'."
)


def identity(n: int, dtype: torch.dtype, device: torch.device, step: int = _BLOCK) -> Iterator[Tensor]:
    """List the identity in blocks of rows (K, n), K ≤ `step`."""
    for start in range(0, n, step):
        rows = torch.zeros(min(step, n - start), n, dtype=dtype, device=device)
        rows.diagonal(start).fill_(1)
        yield rows


class Vectors(NamedTuple):
    """Vectors that were converted from an array.

    Attributes
    ----------
    rows : torch.Tensor
        (K, N); each process's pieces of them, (K, n), if the parameters are sharded.
    is_single : bool
        Whether the array was a vector.
    leave, leave_numbers : callable
        Convert solutions (K, N) to such an array, and one number for each vector, (K,), to its library.
    """

    rows: Tensor
    is_single: bool
    leave: _arrays.Leave
    leave_numbers: _arrays.Leave


class TorchLinearOperator(LinearOperator):
    """A SciPy linear operator that computes in torch.

    Subclasses implement ``_mul`` and, unless they are symmetric, ``_transpose``.

    Parameters
    ----------
    shape : tuple of int
        Rows M and columns N.
    dtype : torch.dtype
        Compute precision.
    device : torch.device
        Where ``_mul`` gets its input and leaves its result.
    """

    score_matrix: Any = None
    """G, if this operator is GᵀG + shift · I."""
    shift: Any = 0.0
    """λ, if this operator is GᵀG + λI; a tensor (D,) if each parameter has its own."""

    # Reflected products (`ndarray @ op`) must reach this class instead of NumPy's loops.
    __array_ufunc__ = None

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(_arrays.numpy_dtype(dtype), shape)
        self.device = device
        """Where products are computed."""
        self.torch_dtype = dtype
        """The compute precision, as torch's dtype."""

    # ---- What a subclass says -----------------------------------------------------------------

    def _mul(self, V: Tensor) -> Tensor:
        """Multiply with vectors.

        Parameters
        ----------
        V : torch.Tensor
            (K, N) with K ≥ 1, in the operator's dtype and on its device; only to be read.

        Returns
        -------
        torch.Tensor
            (K, M), shared with nobody.
        """
        raise NotImplementedError

    def _transpose(self) -> TorchLinearOperator:
        """Return the transpose; a symmetric operator is its own."""
        return self

    def _adjoint(self) -> TorchLinearOperator:
        """Return the conjugate transpose; the same as the transpose where the operator is real."""
        return self._transpose()

    @property
    def undamped(self) -> TorchLinearOperator:
        """The operator without `shift`."""
        return self

    @property
    def version(self) -> int:
        """A number that grows whenever the operator was seen to become another matrix: the sum of its parts'."""
        return sum(part.version for part in self._parts())

    def refresh(self) -> None:
        """Forget what is cached by the operators that this one is made of; see `FisherMCLinearOperator.refresh`."""
        for part in self._parts():
            part.refresh()

    def _parts(self) -> list[TorchLinearOperator]:
        return [part for part in vars(self).values() if isinstance(part, TorchLinearOperator)]

    @property
    def processes(self) -> Processes:
        """The processes that multiply together; all of them make the same calls."""
        return next((own for part in self._parts() if (own := part.processes) is not ONE), ONE)

    # ---- Products -----------------------------------------------------------------------------

    def matvec(self, x: Any) -> Any:
        """Multiply with one vector of shape (N,) or (N, 1), or with batches of vectors (..., N)."""
        return self._product(x, "matvec", vector=True)

    def matmat(self, X: Any) -> Any:
        """Multiply with the columns of a matrix of shape (N, K), or of batches of matrices (..., N, K)."""
        return self._product(X, "matmat", vector=False)

    def rmatvec(self, x: Any) -> Any:
        """Multiply the adjoint with one vector of shape (M,) or (M, 1), or with batches of vectors (..., M)."""
        return self.H._product(x, "rmatvec", vector=True)

    def rmatmat(self, X: Any) -> Any:
        """Multiply the adjoint with the columns of a matrix of shape (M, K), or of batches of matrices (..., M, K)."""
        return self.H._product(X, "rmatmat", vector=False)

    def dot(self, x: Any) -> Any:
        """Multiply with a vector, a matrix, a scalar or another operator, as `op * x` does.

        Parameters
        ----------
        x : array, scalar or scipy.sparse.linalg.LinearOperator
            An array of shape (N,) or (..., N, K), a number, or an operator with N rows.

        Returns
        -------
        array or TorchLinearOperator
            An array of the library, device and dimensionality of `x`, of its dtype if that is inexact and of
            ``op.dtype`` otherwise; fresh, C-contiguous and writable. For a scalar or an operator: an operator.

        Raises
        ------
        FloatingPointError
            If the result is not finite although `x` is, or if the dtype of `x` cannot represent it: half-precision
            vectors overflow above 65504.
        """
        if isinstance(x, LinearOperator):
            return _Product(self, as_torch_operator(x, self.device, self.torch_dtype))
        alpha = _arrays.scalar(x)
        return self._product(x, "@") if alpha is None else self._scaled(alpha)

    def rdot(self, x: Any) -> Any:
        """Multiply from the left, `x @ op`.

        Parameters
        ----------
        x : array, scalar or scipy.sparse.linalg.LinearOperator
            An array of shape (M,) or (..., K, M), a number, or an operator with M columns.

        Returns
        -------
        array or TorchLinearOperator
            As for :meth:`dot`; an array of shape (N,) or (..., K, N).
        """
        if isinstance(x, LinearOperator):
            return _Product(as_torch_operator(x, self.device, self.torch_dtype), self)
        alpha = _arrays.scalar(x)
        return self.T._product(x, "rdot", rows=True) if alpha is None else self._scaled(alpha)

    _rdot = rdot  # the name up to SciPy 1.17

    def _matvec(self, x: Any) -> Any:
        return self.matvec(x)

    def _matmat(self, X: Any) -> Any:
        return self.matmat(X)

    @opaque
    def _product(self, x: Any, name: str, vector: bool | None = None, rows: bool = False) -> Any:
        """Convert `x` to torch, check its shape, multiply, and convert the result back.

        With ``rows=True`` the vectors are the rows of `x`, and those of the result.
        """
        if issparse(x):
            raise TypeError(
                f"the array must be dense, as its product is, got a sparse matrix of shape {x.shape}. Pass "
                "`x.toarray()`."
            )
        X, leave = _arrays.enter(x)
        are_columns = self._are_columns(X, name, vector, rows)
        if X.ndim > 2:  # vectors of all batches together
            V = (X.mT if are_columns else X).flatten(0, -2)
        else:
            V = X.unsqueeze(0) if X.ndim == 1 else X.T if are_columns else X
        if type(X) in _arrays.DIVIDED:
            return self._product_of_pieces(X, name)
        Y = self.multiply(V.to(self.device).resolve_conj().resolve_neg())
        if X.ndim > 2:
            Y = Y.unflatten(0, (*X.shape[:-2], X.shape[-1]) if are_columns else X.shape[:-1])
        Y = Y.squeeze(0) if X.ndim == 1 else Y.mT if are_columns else Y
        return Y if type(Y) in _arrays.DIVIDED else leave(Y)

    def _product_of_pieces(self, X: Any, name: str) -> Any:  # noqa: ARG002
        """Multiply with a vector (N,) or matrix (N, K) that is divided among processes."""
        Y = self.multiply(X.unsqueeze(0) if X.ndim == 1 else X.T)
        return Y.squeeze(0) if X.ndim == 1 else Y.T

    def _enter(self, x: Any, name: str) -> Vectors:
        """Convert an array (N,) or (N, K) to vectors that are rows, and see how solutions go back to such an array.

        They have at least the compute precision: in a narrower one a solution would neither meet the tolerance that was
        checked, nor be sure to be finite.
        """
        X, leave = _arrays.enter(x)
        if type(X) in _arrays.DIVIDED:
            raise TypeError(
                f"the array must not be a {type(X).__name__} for this operator. Pass it to the Fisher operator itself."
            )
        self._check_shape(X, name)
        leave = _arrays.no_narrower(x, X, leave, self.torch_dtype)
        single = X.ndim == 1
        return Vectors(
            (X.unsqueeze(0) if single else X.T).to(self.device),
            single,
            lambda V: leave(V[0] if single else V.T),
            lambda values: leave(values[0] if single else values),
        )

    def _are_columns(self, X: Tensor, name: str, vector: bool | None, rows: bool) -> bool:
        """Return whether vectors are the columns of `X`, (..., N, K), and not its rows; its shape must fit one of them.

        As in SciPy from 1.18 on: `matvec` takes (..., N), and (N, 1); `matmat` and `dot` take (..., N, K), and `rdot`
        (..., K, N).
        """
        N, shape = self.shape[1], X.shape
        if len(shape) == 1 and vector is not False and shape[0] == N:
            return False
        if len(shape) >= 2:
            if vector and tuple(shape) == (N, 1):
                return True
            if shape[-1 if rows or vector else -2] == N:
                return not rows and not vector
        raise self._mismatch(X, name, "({0},) or (K, {0})" if rows else _SHAPES[vector])

    def _check_shape(self, X: Tensor, name: str) -> None:
        """Raise ValueError unless `X` is a vector (N,) or a matrix (N, K)."""
        if X.ndim not in (1, 2) or X.shape[0] != self.shape[1]:
            raise self._mismatch(X, name, _SHAPES[None])

    def _mismatch(self, X: Tensor, name: str, expected: str) -> ValueError:
        shape = self.shape[::-1] if name.startswith("r") else self.shape  # of the operator that the caller sees
        return ValueError(
            f"dimension mismatch in {name}: for an operator of shape {shape} the array must have shape "
            f"{expected.format(self.shape[1])}, got {tuple(X.shape)}."
        )

    def multiply(self, V: Tensor) -> Tensor:
        """Multiply with torch vectors (K, N) of any dtype: (K, M) in the operator's dtype, complex ones in parts.

        Raises
        ------
        FloatingPointError
            If the result is not finite although `V` is, or the operator's dtype cannot represent `V`.
        """
        return check_later(self._times(V), V)

    def _times(self, V: Tensor) -> Tensor:
        """Multiply with vectors (K, N) of any dtype, as a part of another operator."""
        if len(V) == 0:
            dtype = torch.promote_types(self.torch_dtype, V.dtype) if V.is_complex() else self.torch_dtype
            return torch.zeros(0, self.shape[0], dtype=dtype, device=self.device)
        if V.is_complex() and not self.torch_dtype.is_complex:
            real, imaginary = self._times(torch.cat([V.real, V.imag])).split(len(V))
            return torch.complex(real.contiguous(), imaginary.contiguous())
        return self._mul(self._narrowed(V)).to(self.torch_dtype)

    def _narrowed(self, V: Tensor) -> Tensor:
        """Convert vectors (K, N) to the operator's dtype, which must be able to represent each of them."""
        if V.dtype == self.torch_dtype:
            return V
        if type(V) in _arrays.DIVIDED:
            return V.to(self.torch_dtype)
        cure = "Scale the vectors, or make the operator with dtype='float64'."
        return _arrays.narrowed(V.T, self.torch_dtype, cure).T

    def todense(self) -> np.ndarray[Any, Any]:
        """Return the matrix as a NumPy array of shape (M, N); costs N products."""
        M, N = self.shape
        blocks = [np.zeros((0, M), dtype=self.dtype)]
        blocks += [_arrays.to_numpy(self.multiply(rows)) for rows in identity(N, self.torch_dtype, self.device)]
        return np.ascontiguousarray(np.concatenate(blocks).T)

    def toarray(self) -> np.ndarray[Any, Any]:
        """Return the matrix as a NumPy array of shape (M, N), as `todense` does; the name is that of sparse arrays."""
        return self.todense()

    def to_cupy(self) -> Any:
        """Return this operator as a ``cupyx.scipy.sparse.linalg.LinearOperator``.

        cupyx's solvers take the operator itself too, but their ``aslinearoperator`` keeps only its products with
        vectors; this view keeps those with matrices (which make ``lobpcg`` fast), and combines with other cupyx
        operators.

        Raises
        ------
        ImportError
            If CuPy is not installed.
        """
        return _arrays.cupyx_operator(self)

    # ---- Algebra ------------------------------------------------------------------------------

    def __call__(self, x: Any) -> Any:
        return self.dot(x)

    def __mul__(self, x: Any) -> Any:
        return self.dot(x)

    def __rmul__(self, x: Any) -> Any:
        return self.rdot(x)

    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, LinearOperator):
            return self.dot(x)
        _refuse_scalar(x)
        return self._product(x, "@")

    def __rmatmul__(self, x: Any) -> Any:
        _refuse_scalar(x)
        return self.rdot(x)

    def __truediv__(self, alpha: Any) -> TorchLinearOperator:
        value = _arrays.scalar(alpha)
        if value is None:
            raise ValueError(
                f"the divisor of an operator must be a scalar, got {type(alpha).__name__}. For an inverse use "
                "`fisherops.linalg.solve` or `inv`."
            )
        return self._scaled(1.0 / value)

    def __neg__(self) -> TorchLinearOperator:
        return self._scaled(-1)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, LinearOperator):
            return _refuse_sum(other)
        return self._plus(as_torch_operator(other, self.device, self.torch_dtype))

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, LinearOperator):
            return _refuse_sum(other)
        return _Sum(self, -as_torch_operator(other, self.device, self.torch_dtype))

    def __pow__(self, exponent: Any) -> Any:
        try:
            p = operator.index(exponent)
        except TypeError:
            p = -1
        if p < 0:
            raise ValueError(
                f"the exponent of an operator must be an integer of at least 0, got {exponent!r}. For an inverse use a "
                "solver, such as `scipy.sparse.linalg.cg(op.damped(1e-3), b)`."
            )
        return _Power(self, p)

    def _scaled(self, alpha: Any) -> TorchLinearOperator:
        return _Scaled(self, alpha)

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        return _Sum(self, other)

    def damped(self, damping: Any) -> TorchLinearOperator:
        """Return ``op + damping · I``, or ``op + diag(damping)`` for a vector.

        Parameters
        ----------
        damping : float or array
            λ ≥ 0, the number added to the diagonal, in the units of the operator's eigenvalues; or one number for each
            entry of the diagonal, (N,), such as the precision of a prior for each parameter, or a multiple of
            ``op.diagonal()``.

        Raises
        ------
        TypeError
            If `damping` is not a real number or array of real numbers.
        ValueError
            If `damping` is negative or not finite, has another shape than (N,), or the operator is not square.
        """
        return _Damped(self, self._as_shift(damping))

    def _as_shift(self, damping: Any) -> float | Tensor:
        """Return what is added to the diagonal: a number, or a tensor (N,) of our own in the operator's dtype."""
        if _arrays.scalar(damping) is not None or not _arrays.is_array(damping):
            return as_damping(damping, self.torch_dtype)
        d = _arrays.enter(damping)[0]
        if d.is_complex() or d.dtype == torch.bool:
            raise TypeError(f"`damping` must be real numbers, got {d.dtype}.")
        if d.shape != self.shape[:1]:
            raise ValueError(f"`damping` must be a real number or have shape {self.shape[:1]}, got {tuple(d.shape)}.")
        own = d.to(self.device, self.torch_dtype, copy=True)
        # A positive number must not become 0, which another matrix would have.
        wrong = ~(own.isfinite() & (own >= 0) & ((own > 0) | (d.to(self.device) == 0)))
        if wrong.any():
            number = int(wrong.nonzero()[0])
            raise ValueError(
                f"`damping` must be at least 0 and finite in {str(self.torch_dtype).removeprefix('torch.')}, got "
                f"{float(d[number])} for entry {number}."
            )
        return own


class _Composite(TorchLinearOperator):
    """An operator made from others, which are among its attributes."""

    def to(self, device: Any) -> Self:
        """Return the same matrix, to rounding, as an operator on another device, by moving what it is made from."""
        other = copy.copy(self)
        other.device = _torch.as_device(device)
        for name, own in vars(self).items():
            if isinstance(own, Tensor):
                setattr(other, name, own.to(other.device))
            elif isinstance(own, TorchLinearOperator):
                if not hasattr(own, "to"):
                    raise TypeError(
                        f"a composite can be moved if its parts can, got {type(own).__name__}. Make the part anew on "
                        f"{other.device}, and combine again."
                    )
                setattr(other, name, own.to(other.device))
        return other


class Transposed(_Composite):
    """The transpose of an operator that has a method for it (``_mul_t``)."""

    def __init__(self, A: Any) -> None:
        super().__init__((A.shape[1], A.shape[0]), A.torch_dtype, A.device)
        self._A = A

    def _mul(self, V: Tensor) -> Tensor:
        result: Tensor = self._A._mul_t(V)
        return result

    def _transpose(self) -> TorchLinearOperator:
        original: TorchLinearOperator = self._A
        return original


class _Sum(_Composite):
    """A + B."""

    def __init__(self, A: TorchLinearOperator, B: TorchLinearOperator) -> None:
        if A.shape != B.shape:
            raise ValueError(f"operators must have equal shapes to be added, got {A.shape} and {B.shape}.")
        super().__init__(A.shape, torch.promote_types(A.torch_dtype, B.torch_dtype), same_device(A, B))
        self._A, self._B = A, B

    def _mul(self, V: Tensor) -> Tensor:
        return self._A._times(V) + self._B._times(V)

    def _transpose(self) -> TorchLinearOperator:
        return _Sum(self._A.T, self._B.T)

    def _adjoint(self) -> TorchLinearOperator:
        return _Sum(self._A.H, self._B.H)


class _Scaled(_Composite):
    """α A. A scalar never raises the precision; a complex one makes the operator complex."""

    def __init__(self, A: TorchLinearOperator, alpha: Any) -> None:
        dtype = A.torch_dtype
        super().__init__(A.shape, dtype.to_complex() if isinstance(alpha, complex) else dtype, A.device)
        self._A, self._alpha = A, alpha

    def _mul(self, V: Tensor) -> Tensor:
        return self._A._times(V).mul_(self._alpha)

    def _transpose(self) -> TorchLinearOperator:
        return _Scaled(self._A.T, self._alpha)

    def _adjoint(self) -> TorchLinearOperator:
        return _Scaled(self._A.H, self._alpha.conjugate())


class _Damped(_Composite):
    """A + λI, or A + diag(λ) for a vector."""

    def __init__(self, A: TorchLinearOperator, damping: float | Tensor) -> None:
        if A.shape[0] != A.shape[1]:
            raise ValueError(f"the operator must be square to be damped, got shape {A.shape}.")
        super().__init__(A.shape, A.torch_dtype, A.device)
        self._A, self.damping = A, damping

    def _mul(self, V: Tensor) -> Tensor:
        return add_shift(self._A._times(V), V, self.damping)

    def _transpose(self) -> TorchLinearOperator:
        return self if self._A.T is self._A else _Damped(self._A.T, self.damping)

    def _adjoint(self) -> TorchLinearOperator:
        return self if self._A.H is self._A else _Damped(self._A.H, self.damping)


class _Product(_Composite):
    """A B."""

    def __init__(self, A: TorchLinearOperator, B: TorchLinearOperator) -> None:
        if A.shape[1] != B.shape[0]:
            raise ValueError(
                f"operators must have shapes (M, N) and (N, K) to be multiplied, got {A.shape} and {B.shape}."
            )
        dtype = torch.promote_types(A.torch_dtype, B.torch_dtype)
        super().__init__((A.shape[0], B.shape[1]), dtype, same_device(A, B))
        self._A, self._B = A, B

    def _mul(self, V: Tensor) -> Tensor:
        return self._A._times(self._B._times(V))

    def _transpose(self) -> TorchLinearOperator:
        return _Product(self._B.T, self._A.T)

    def _adjoint(self) -> TorchLinearOperator:
        return _Product(self._B.H, self._A.H)


class _Power(_Composite):
    """Aᵖ, p ≥ 0."""

    def __init__(self, A: TorchLinearOperator, p: int) -> None:
        if A.shape[0] != A.shape[1]:
            raise ValueError(f"the operator must be square to be raised to a power, got shape {A.shape}.")
        super().__init__(A.shape, A.torch_dtype, A.device)
        self._A, self._p = A, p

    def _mul(self, V: Tensor) -> Tensor:
        if self._p == 0:
            return V.clone()  # a result never shares the memory of its input
        for _ in range(self._p):
            V = self._A._times(V)
        return V

    def _transpose(self) -> TorchLinearOperator:
        return self if self._A.T is self._A else _Power(self._A.T, self._p)

    def _adjoint(self) -> TorchLinearOperator:
        return self if self._A.H is self._A else _Power(self._A.H, self._p)


class _Foreign(_Composite):
    """A SciPy operator inside a composite; its products are computed with NumPy on the host.

    It has no less than the precision of its partner, which multiplies its results; integers have no precision of their
    own.
    """

    def __init__(self, A: LinearOperator, device: torch.device, partner: torch.dtype) -> None:
        if len(A.shape) != 2:
            raise ValueError(f"an operator must be a matrix to be combined with another, got shape {A.shape}.")
        own = np.dtype(np.float64 if A.dtype is None else A.dtype)
        if own.kind not in "biu":
            single = own.itemsize <= (8 if own.kind == "c" else 4)
            kinds = (torch.complex64, torch.complex128) if own.kind == "c" else (torch.float32, torch.float64)
            partner = torch.promote_types(partner, kinds[0] if single else kinds[1])
        super().__init__(A.shape, partner, device)
        self._A, self._partner = A, partner

    def _mul(self, V: Tensor) -> Tensor:
        # Copies both ways: a foreign operator may write to what it is given, and IdentityOperator returns it.
        result = np.array(self._A.matmat(np.array(V.cpu().numpy().T, order="C")).T, dtype=self.dtype, order="C")
        return torch.from_numpy(result).to(self.device)

    def _transpose(self) -> TorchLinearOperator:
        return _Foreign(self._A.T, self.device, self._partner)

    def _adjoint(self) -> TorchLinearOperator:
        return _Foreign(self._A.H, self.device, self._partner)


def as_torch_operator(
    A: LinearOperator, device: torch.device | str = "cpu", partner: torch.dtype = torch.float64
) -> TorchLinearOperator:
    """Return an operator that computes in torch.

    A foreign operator gets and returns vectors on `device`, in a precision no lower than `partner` or its own; see
    `_Foreign`.
    """
    return A if isinstance(A, TorchLinearOperator) else _Foreign(A, torch.device(device), partner)


def same_device(A: TorchLinearOperator, B: TorchLinearOperator) -> torch.device:
    if A.device != B.device:
        raise ValueError(
            f"operators must be on one device to be combined, got {A.device} and {B.device}. Build both on the same "
            "device."
        )
    return A.device


def _refuse_sum(other: Any) -> Any:
    if _arrays.is_array(other) or issparse(other) or _arrays.scalar(other) is not None:
        raise TypeError(
            f"only an operator can be added to an operator, got {type(other).__name__}. Wrap a matrix by "
            "`scipy.sparse.linalg.aslinearoperator`; for op + λI use `op.damped(λ)`."
        )
    return NotImplemented


def _refuse_scalar(x: Any) -> None:
    if _arrays.scalar(x) is not None:
        raise ValueError("the operand of `@` must be an array or an operator, got a scalar. Use `*` instead.")
