"""A strict stand-in for CuPy over the simulated accelerator, as far as arrays cross between CuPy and torch.

Its arrays refuse what CuPy's do: they become no NumPy array by themselves, and do not mix with those of NumPy. They say
that they are on a CUDA device, so torch passes its stream to ``__dlpack__``; the capsule itself names the simulated
device, because a torch without CUDA has no other. Streams have numbers and are recorded, and do nothing.
"""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np
import simulated
import torch

TORCH_STREAM, CUPY_STREAM = 7001, 9001

# What was passed to `__dlpack__` of CuPy's arrays and of torch's tensors, and recorded on memory.
to_torch: list = []
to_cupy: list = []
recorded: list = []

_stream = SimpleNamespace(ptr=CUPY_STREAM)


class ndarray:  # noqa: N801 (the name of CuPy)
    """An array on the device."""

    __array_priority__ = 100

    def __init__(self, tensor):
        self._t = tensor

    # ---- What CuPy refuses ----

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    def __array_ufunc__(self, *_, **__):
        return NotImplemented

    # ---- What it is ----

    shape = property(lambda self: tuple(self._t.shape))
    ndim = property(lambda self: self._t.ndim)
    size = property(lambda self: self._t.numel())
    dtype = property(lambda self: simulated.on_host(self._t).numpy().dtype)
    strides = property(lambda self: tuple(s * self._t.itemsize for s in self._t.stride()))
    device = property(lambda self: self._t.device.index)
    data = property(lambda self: SimpleNamespace(ptr=self._t.data_ptr()))
    flags = property(lambda self: SimpleNamespace(c_contiguous=self._t.is_contiguous()))
    T = property(lambda self: ndarray(self._t.T))

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False), "version": 3}

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if max_version is not None:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")  # as of CuPy 13
        to_torch.append(stream)
        return simulated.capsule_of(self._t, index=self._t.device.index)

    def __dlpack_device__(self):
        return 2, self._t.device.index  # kDLCUDA

    def get(self):
        return self._t.cpu().numpy()

    # ---- Arithmetic ----

    def _with(self, other, function):
        if isinstance(other, ndarray):
            return ndarray(function(self._t, other._t))
        if isinstance(other, int | float | complex):
            return ndarray(function(self._t, other))
        if isinstance(other, np.ndarray):
            raise TypeError(f"Unsupported type {type(other)}")
        return NotImplemented

    def __add__(self, other):
        return self._with(other, torch.add)

    def __sub__(self, other):
        return self._with(other, torch.sub)

    def __mul__(self, other):
        return self._with(other, torch.mul)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self._with(other, torch.div)

    def __matmul__(self, other):
        return self._with(other, torch.matmul)

    def __getitem__(self, index):
        return ndarray(self._t[index])

    def reshape(self, *shape):
        return ndarray(self._t.reshape(*shape))

    def __float__(self):
        return float(self._t)


class generic(ndarray):  # noqa: N801
    """CuPy's scalars, which are arrays without axes."""


def asarray(x, dtype=None):
    if isinstance(x, ndarray):
        return x
    return ndarray(torch.from_numpy(np.array(x, dtype=dtype)).to("sim:0"))


def from_dlpack(x):
    """Import a tensor, on the current stream."""
    to_cupy.append(_stream.ptr)
    x.__dlpack__(stream=_stream.ptr)
    return ndarray(x.detach())


class LinearOperator:
    """As cupyx's: by functions, of which it calls `matmat` for matrices if there is one, else `matvec` by column."""

    def __init__(self, shape, matvec, rmatvec=None, matmat=None, dtype=None, rmatmat=None):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._matvec, self._rmatvec, self._matmat, self._rmatmat = matvec, rmatvec, matmat, rmatmat

    def matvec(self, x):
        if x.shape not in ((self.shape[1],), (self.shape[1], 1)):
            raise ValueError("dimension mismatch")
        return self._checked(self._matvec(x)).reshape(*x.shape)

    def rmatvec(self, x):
        return self._checked(self._rmatvec(x))

    def matmat(self, X):
        if self._matmat is not None:
            return self._checked(self._matmat(X))
        columns = [self.matvec(X[:, k])._t for k in range(X.shape[1])]
        return ndarray(torch.stack(columns, 1))

    def rmatmat(self, X):
        return self._checked(self._rmatmat(X))

    def _checked(self, result):
        if not isinstance(result, ndarray):
            raise TypeError(f"expected cupy.ndarray, got {type(result)}")
        return result

    def __matmul__(self, x):
        return self.matvec(x) if x.ndim == 1 else self.matmat(x)

    def __add__(self, other):
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return LinearOperator(
            self.shape, lambda x: self @ x + other @ x, matmat=lambda X: self @ X + other @ X, dtype=self.dtype
        )

    def __rmul__(self, alpha):
        return LinearOperator(
            self.shape, lambda x: alpha * (self @ x), matmat=lambda X: alpha * (self @ X), dtype=self.dtype
        )


def aslinearoperator(A):
    """Wrap an operator by its products with vectors alone, as cupyx does."""
    if isinstance(A, LinearOperator):
        return A
    if isinstance(A, ndarray):
        return LinearOperator(A.shape, lambda x: A @ x, lambda x: A.T @ x, lambda X: A @ X, A.dtype)
    return LinearOperator(A.shape, A.matvec, getattr(A, "rmatvec", None), dtype=A.dtype)


def cg(A, b, tol=1e-10, maxiter=200):
    """Conjugate gradients, which check the array that a product returns as cupyx's do."""
    A = aslinearoperator(A)
    x, r = b * 0.0, b
    p, rho = r, r @ r
    for _ in range(maxiter):
        q = A.matvec(p)
        if q.dtype != A.dtype or not q.flags.c_contiguous:
            raise TypeError("the product must be contiguous, in the dtype of the operator")
        alpha = float(rho) / float(p @ q)
        x, r = x + alpha * p, r - alpha * q
        following = r @ r
        if float(following) <= tol**2 * float(b @ b):
            break
        p, rho = r + (float(following) / float(rho)) * p, following
    return x


def modules():
    """Return the modules of CuPy by name."""
    cupy = ModuleType("cupy")
    cupy.ndarray, cupy.generic, cupy.asarray, cupy.from_dlpack = ndarray, generic, asarray, from_dlpack
    cupy.ascontiguousarray = lambda x: ndarray(x._t.contiguous())
    cupy.int32 = np.dtype(np.int32)
    cupy.zeros = lambda shape, dtype=float, device=None: asarray(np.zeros(shape, dtype))
    cupy.isdtype = lambda dtype, kind: np.isdtype(np.dtype(dtype), kind)
    cupy.cuda = SimpleNamespace(get_current_stream=lambda: _stream)
    linalg = ModuleType("cupyx.scipy.sparse.linalg")
    linalg.LinearOperator, linalg.aslinearoperator, linalg.cg = LinearOperator, aslinearoperator, cg
    sparse, scipy, cupyx = (ModuleType(name) for name in ("cupyx.scipy.sparse", "cupyx.scipy", "cupyx"))
    sparse.linalg, scipy.sparse, cupyx.scipy = linalg, sparse, scipy
    own = (cupy, cupyx, scipy, sparse, linalg)
    return {**{module.__name__: module for module in own}, "array_api_compat.cupy": cupy}


@contextmanager
def installed(monkeypatch):
    """Let `import cupy` find the stand-in inside, and torch's streams be recorded."""
    import array_api_compat

    own = modules()
    for name, module in own.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(array_api_compat, "cupy", own["cupy"], raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=TORCH_STREAM))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device=None: SimpleNamespace(ptr=ptr, device=device))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, stream: recorded.append((t.data_ptr(), stream.ptr, stream.device))
    )
    for seen in (to_torch, to_cupy, recorded):
        seen.clear()
    yield own["cupy"]
