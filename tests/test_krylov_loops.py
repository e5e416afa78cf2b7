"""Solvers written in the style of CuPy's: Python loops over `matvec` that change results in place.

CuPy's own loops need a GPU. What they ask of an operator is asked here on the CPU, in every library whose arrays can be
changed: fresh, contiguous, writable results of `op.dtype`, from contiguous vectors and from columns of a matrix.
"""

import numpy as np
import pytest
import torch
from libraries import NUMPY, STRICT, TORCH
from test_arrays import MATRICES, OPERATORS, D, x_of

SHIFT = 0.5


class Contract:
    """Passes products on, after a look at what CuPy's solvers rely on."""

    def __init__(self, op, library):
        self.op, self.library, self.dtype = op, library, op.dtype
        self.given = {}  # by pointer; they are kept alive, as memory that is free may be given again

    def matvec(self, x):
        y = self.op.matvec(x)
        assert isinstance(y, self.library.array_type)
        assert y.shape == x.shape
        numbers = self.library.read(y)
        assert numbers.dtype == self.op.dtype
        assert numbers.flags.c_contiguous
        pointer = self.library.pointer(y)
        assert pointer != self.library.pointer(x)
        assert pointer not in self.given
        self.given[pointer] = y
        return y


def conjugate_gradients(A, b, iterations):
    x, r = 0 * b, b + 0
    p, rho = r + 0, float(r @ r)
    for _ in range(iterations):
        q = A.matvec(p)
        alpha = rho / float(p @ q)
        x += alpha * p
        q *= alpha  # in place, in the operator's result
        r -= q
        new = float(r @ r)
        if new < 1e-30 * float(b @ b):  # squares of smaller numbers vanish in float32
            break
        p *= new / rho
        p += r
        rho = new
    return x


def conjugate_gradients_squared(A, b, iterations):
    x, r = 0 * b, b + 0
    shadow, rho = r + 0, float(r @ r)
    p, u = r + 0, r + 0
    for _ in range(iterations):
        v = A.matvec(p)
        alpha = rho / float(shadow @ v)
        v *= alpha
        q = u - v
        u += q
        x += alpha * u
        w = A.matvec(u)
        w *= alpha
        r -= w
        if float(r @ r) ** 0.5 < 1e-10:
            break
        new = float(shadow @ r)
        u = r + (new / rho) * q
        p = u + (new / rho) * (q + (new / rho) * p)
        rho = new
    return x


def arnoldi_gmres(A, b, iterations):
    """Full GMRES whose orthogonalisation overwrites the product, as CuPy's does by a gemv."""
    beta = float(b @ b) ** 0.5
    V, H = [b / beta], np.zeros((iterations + 1, iterations))
    for j in range(iterations):
        u = A.matvec(V[j])
        for i, v in enumerate(V):
            H[i, j] = float(v @ u)
            u -= float(H[i, j]) * v
        H[j + 1, j] = float(u @ u) ** 0.5
        if H[j + 1, j] < 1e-12:
            break
        u /= float(H[j + 1, j])
        V.append(u)
    e = np.zeros(len(H))
    e[0] = beta
    y = np.linalg.lstsq(H, e, rcond=None)[0]
    return sum(float(c) * v for c, v in zip(y, V, strict=False))


def power_iteration_by_columns(A, X, iterations):
    """Block iteration that multiplies column by column, each a strided (D, 1) view."""
    for _ in range(iterations):
        columns = [A.matvec(X[:, k : k + 1]) for k in range(X.shape[1])]
        for k, column in enumerate(columns):
            column *= 1 / float((column[:, 0] @ column[:, 0]) ** 0.5)
            X[:, k : k + 1] = column
    return X


@pytest.mark.parametrize("library", [NUMPY, TORCH, STRICT], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solve", [conjugate_gradients, conjugate_gradients_squared, arnoldi_gmres])
def test_linear_systems(solve, dtype, library):
    op, F = OPERATORS[dtype], MATRICES[dtype].astype(np.float64)
    b = x_of(dtype=op.dtype)
    x = library.read(solve(Contract(op.damped(SHIFT), library), library.make(b), D))
    dense = F + SHIFT * np.eye(D)
    residual = np.linalg.norm(dense @ x - b)
    assert residual <= 1e4 * np.finfo(op.dtype).eps * np.linalg.norm(dense, 2) * np.linalg.norm(x)


@pytest.mark.parametrize("library", [NUMPY, TORCH, STRICT], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_of_a_matrix(dtype, library):
    op, F = OPERATORS[dtype], MATRICES[dtype].astype(np.float64)
    X = library.make(x_of(2, dtype=op.dtype))
    X = library.read(
        power_iteration_by_columns(Contract(op, library), X, 60)
    )  # the second eigenvalue is half of the first
    top = np.linalg.eigh(F)[1][:, -1]
    for k in range(2):
        assert abs(abs(X[:, k] @ top) - 1) <= 1e4 * np.finfo(op.dtype).eps
