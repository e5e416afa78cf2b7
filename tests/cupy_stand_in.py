"""A strict stand-in for CuPy over the simulated accelerator, as far as arrays cross between CuPy and torch.

Its arrays refuse what CuPy's do: they become no NumPy array by themselves, and do not mix with those of NumPy. They say
that they are on a CUDA device, so torch passes its stream to ``__dlpack__``; the capsule itself names the simulated
device, because a torch without CUDA has no other. Streams have numbers and are recorded, and do nothing.
"""

import functools
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


def _plain(x):
    """Return what NumPy computes with for what CuPy accepts."""
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError(f"Unsupported type {type(x)}")
    return type(x)(map(_plain, x)) if type(x) in (tuple, list) else x


def _entered(x):
    """Return results of NumPy as CuPy returns them: numbers are arrays without axes."""
    if isinstance(x, np.ndarray | np.generic):
        return ndarray(np.asarray(x))
    return tuple(map(_entered, x)) if isinstance(x, tuple) else x


def computed(function):
    """Return a function of NumPy for arrays of the device."""

    @functools.wraps(function)
    def own(*args, **kwargs):
        return _entered(function(*map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()}))

    return own


class ndarray:  # noqa: N801 (the name of CuPy)
    """An array on the device, by a NumPy array of the same memory."""

    __array_priority__ = 100

    def __init__(self, array):
        is_tensor = isinstance(array, torch.Tensor)
        self._a = simulated.on_host(array).numpy() if is_tensor else array
        self.device = array.device.index if is_tensor else 0

    # ---- What CuPy refuses ----

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    def __array_ufunc__(self, ufunc, method, *args, **kwargs):
        """Compute with numbers of NumPy, and refuse its arrays."""
        if any(isinstance(x, np.ndarray) and x.ndim for x in args):
            return NotImplemented
        return computed(getattr(ufunc, method))(*args, **kwargs)

    # ---- What it is ----

    data = property(lambda self: SimpleNamespace(ptr=self._a.ctypes.data))
    T = property(lambda self: ndarray(self._a.T))

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False), "version": 3}

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if max_version is not None:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")  # as of CuPy 13
        to_torch.append(stream)
        return simulated.capsule_of(torch.from_numpy(self._a), index=self.device)

    def __dlpack_device__(self):
        return 2, self.device  # kDLCUDA

    def get(self):
        return self._a.copy()

    # ---- Arithmetic ----

    def __getitem__(self, index):
        return ndarray(self._a[_of_view(index)])

    def __setitem__(self, index, value):
        self._a[_of_view(index)] = _plain(value)

    def item(self):
        return self._a.item()


def _of_view(index):
    """Let elements be views, as CuPy's are."""
    index = _plain(index if isinstance(index, tuple) else (index,))
    return index if any(i is Ellipsis for i in index) else (*index, Ellipsis)


def _in_place(name):
    def own(self, other):
        getattr(self._a, name)(_plain(other))
        return self

    return own


for _name in ("shape", "ndim", "size", "dtype", "itemsize", "strides", "flags"):
    setattr(ndarray, _name, property(lambda self, name=_name: getattr(self._a, name)))
for _name in ("astype", "ravel", "reshape", "copy", "squeeze", "conj", "dot", "sum", "max", "fill"):
    setattr(ndarray, _name, computed(getattr(np.ndarray, _name)))
for _name in ("add", "sub", "mul", "truediv", "matmul", "pow", "lt", "le", "gt", "ge", "eq", "ne", "and"):
    for _side in ("", "r"):
        if hasattr(np.ndarray, f"__{_side}{_name}__"):
            setattr(ndarray, f"__{_side}{_name}__", computed(getattr(np.ndarray, f"__{_side}{_name}__")))
for _name in ("add", "sub", "mul", "truediv"):
    setattr(ndarray, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in ("float", "int", "bool", "len", "abs", "neg"):
    setattr(ndarray, f"__{_name}__", computed(getattr(np.ndarray, f"__{_name}__")))
ndarray.__hash__ = None


class generic(ndarray):  # noqa: N801
    """CuPy's scalars, which are arrays without axes."""


def asarray(x, dtype=None):
    if isinstance(x, ndarray):
        return x
    return ndarray(np.array(x, dtype=dtype))


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
        columns = [self.matvec(X[:, k])._a for k in range(X.shape[1])]
        return ndarray(np.stack(columns, 1))

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


def _of_numpy(module):
    """Return what gives a module of CuPy the functions of one of NumPy."""

    def find(name):
        if name.startswith("_"):
            raise AttributeError(name)
        own = getattr(module, name)
        return computed(own) if callable(own) and not isinstance(own, type) else own

    return find


def modules():
    """Return the modules of CuPy by name."""
    cupy, algebra, rand = (ModuleType(name) for name in ("cupy", "cupy.linalg", "cupy.random"))
    cupy.__getattr__, algebra.__getattr__, rand.__getattr__ = map(_of_numpy, (np, np.linalg, np.random))
    cupy.ndarray, cupy.generic, cupy.asarray, cupy.from_dlpack = ndarray, generic, asarray, from_dlpack
    cupy.array = lambda x, dtype=None, copy=True: asarray(x.get() if isinstance(x, ndarray) and copy else x, dtype)
    cupy.asnumpy = ndarray.get
    cupy.zeros = lambda shape, dtype=float, device=None, order="C": ndarray(np.zeros(shape, dtype, order))
    cupy.result_type = lambda *args: np.result_type(*(getattr(x, "dtype", x) for x in args))
    cupy.isdtype = lambda dtype, kind: np.isdtype(np.dtype(dtype), kind)
    cupy.cuda = SimpleNamespace(get_current_stream=lambda: _stream)
    cupy.linalg, cupy.random = algebra, rand
    linalg = ModuleType("cupyx.scipy.sparse.linalg")
    linalg.LinearOperator, linalg.aslinearoperator, linalg.cg = LinearOperator, aslinearoperator, cg
    sparse, scipy, cupyx = (ModuleType(name) for name in ("cupyx.scipy.sparse", "cupyx.scipy", "cupyx"))
    sparse.linalg, scipy.sparse, cupyx.scipy = linalg, sparse, scipy
    own = (cupy, algebra, rand, cupyx, scipy, sparse, linalg)
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
