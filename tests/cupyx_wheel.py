"""The solvers of cupyx over the stand-in for CuPy, read from a wheel of CuPy or from an installed one.

CuPy can be imported without a driver, but its solvers import CUDA's libraries, and no array can be made. The solvers
are written in Python, so their files are executed as they are: what they import of CuPy is the stand-in, which computes
by NumPy on the memory of the simulated device. cuBLAS's functions get addresses, as the real ones do.
"""

import importlib.machinery
import importlib.util
import os
import sys
from contextlib import contextmanager
from types import ModuleType

import numpy as np
from cupy_stand_in import ndarray

PACKAGE = "cupyx.scipy.sparse.linalg"


def found():
    """Return the folder of cupyx, which may be inside of a wheel; None if there is none."""
    wheel = os.environ.get("CUPY_WHEEL")
    if wheel:
        return os.path.join(wheel, "cupyx")
    spec = importlib.util.find_spec("cupyx")
    return spec.submodule_search_locations[0] if spec else None


# ---- cuBLAS -----------------------------------------------------------------------------------------


def _memory(address, *shape, dtype):
    kind = np.ctypeslib.as_ctypes_type(dtype) * int(np.prod(shape))
    return np.ctypeslib.as_array(kind.from_address(address)).reshape(shape, order="F")


def _by_addresses(dtype):
    """Return dot, nrm2, axpy and gemv for a dtype, with the arguments of cuBLAS."""

    def dot(handle, n, x, incx, y, incy, out):
        _memory(out, 1, dtype=dtype)[:] = _memory(x, n, dtype=dtype) @ _memory(y, n, dtype=dtype)

    def nrm2(handle, n, x, incx, out):
        _memory(out, 1, dtype=dtype)[:] = np.linalg.norm(_memory(x, n, dtype=dtype))

    def axpy(handle, n, alpha, x, incx, y, incy):
        if factor := _memory(alpha, 1, dtype=dtype)[0]:  # nothing is read for 0
            _memory(y, n, dtype=dtype)[:] += factor * _memory(x, n, dtype=dtype)

    def gemv(handle, transposes, m, n, alpha, a, lda, x, incx, beta, y, incy):
        A = _memory(a, lda, n, dtype=dtype)[:m]
        A = A.T if transposes else A
        out, scale = _memory(y, len(A), dtype=dtype), _memory(beta, 1, dtype=dtype)
        product = _memory(alpha, 1, dtype=dtype) * (A @ _memory(x, A.shape[1], dtype=dtype))
        out[:] = product + (scale * out if scale else 0)

    return {"dot": dot, "nrm2": nrm2, "axpy": axpy, "gemv": gemv}


def _into(out, value):
    if out is None:
        return ndarray(np.asarray(value))
    out._a[...] = value
    return out


def _cublas():
    """Return the modules `cupy.cublas`, for arrays, and `cupy_backends.cuda.libs.cublas`, for addresses."""
    arrays, addresses = ModuleType("cupy.cublas"), ModuleType("cupy_backends.cuda.libs.cublas")
    arrays.nrm2 = lambda x, out=None: _into(out, np.linalg.norm(x._a))
    arrays.dotc = lambda x, y, out=None: _into(out, np.vdot(x._a, y._a))

    def gemv(transposes, alpha, a, x, beta, y):
        A = a._a.T if transposes else a._a
        _into(y, alpha * (A @ x._a) + (beta * y._a if beta else 0))

    arrays.gemv = gemv
    addresses.CUBLAS_OP_N, addresses.CUBLAS_OP_T, addresses.CUBLAS_OP_C = range(3)
    addresses.CUBLAS_POINTER_MODE_HOST, addresses.CUBLAS_POINTER_MODE_DEVICE = range(2)
    addresses.getPointerMode = lambda handle: 0
    addresses.setPointerMode = lambda handle, mode: None
    for letter, dtype in (("s", np.float32), ("d", np.float64)):
        for name, function in _by_addresses(dtype).items():
            setattr(addresses, letter + name, function)
    return arrays, addresses


class _Kernel:
    """A kernel in C++, which is written again in Python here."""

    def __init__(self, inputs, outputs, operation, name):
        self.name = name

    def __call__(self, u, beta, j, n, v, V):
        if self.name != "cupy_eigsh_normalize":
            raise NotImplementedError(self.name)
        v[...] = u / beta[j]
        V[j + 1] = v


# ---- The package ------------------------------------------------------------------------------------


def _stand_ins():
    """Return what the solvers import beside arrays, by name."""
    names = (
        "cupy._core", "cupy._core._dtype", "cupy._core.core", "cupy.cuda", "cupy.cuda.device", "cupy.cuda.runtime",
        "cupy.linalg._util", "cupyx.cusparse", "cupyx.scipy.sparse._csr", "cupy_backends", "cupy_backends.cuda",
        "cupy_backends.cuda.libs", "cupy_backends.cuda.libs.cusparse",
    )  # fmt: skip
    own = {name: ModuleType(name) for name in names}
    own["cupy._core.core"].ndarray = ndarray
    own["cupy.cuda.device"].get_cublas_handle = lambda: 0
    own["cupyx.scipy.sparse._csr"]._is_csr = lambda A: False
    own["cupy.cublas"], own["cupy_backends.cuda.libs.cublas"] = _cublas()
    return own


def _load(name, path):
    spec = importlib.machinery.PathFinder.find_spec(name, [path])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def installed(cupy):
    """Let the stand-in `cupy`, which is installed, have the solvers of the wheel; yields their module."""
    folder = os.path.join(found(), "scipy", "sparse")
    before, sparse = dict(sys.modules), sys.modules["cupyx.scipy.sparse"]
    own, cuda = _stand_ins(), cupy.cuda
    sys.modules.update(own)
    try:
        for name, module in own.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        cupy.cuda = own["cupy.cuda"]
        cupy.cuda.get_current_stream = cuda.get_current_stream
        cupy.ElementwiseKernel = _Kernel
        sparse.issparse = lambda x: False
        del sparse.linalg  # so that an import by one of the solvers finds the module that is being loaded
        sparse._util = _load("cupyx.scipy.sparse._util", folder)
        sparse.linalg = _load(PACKAGE, folder)
        yield sparse.linalg
    finally:
        for name in sys.modules.keys() - before.keys():
            if name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends"):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.startswith("cupy")})
        cupy.cuda = cuda
