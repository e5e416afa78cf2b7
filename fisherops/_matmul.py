"""Matrix products by the fastest kernel at hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

# Multiplications from which arranging matrices in blocks pays.
_LARGE = 128**3

# Products that one call sums: fewer by the kernels for vectors, which matrices of few rows are multiplied by.
_PIECE_OF_VECTORS, _PIECE_OF_MATRICES = 2**14, 2**18
_FEW_ROWS = 8

# Rows and columns of a tile that is transposed in the processor's cache.
_TILE = 256


def times_transposed(X: Tensor, W: Tensor) -> Tensor:
    """Multiply X Wᵀ, (m, k) and (n, k) → (m, n), fastest where X is contiguous, and W is or its transpose.

    Torch multiplies float32 matrices by MKL, which uses no AVX-512 on processors of other makers than Intel; oneDNN,
    which torch has for convolutions, does, and is twice as fast there. It is taken for matrices that are large enough,
    unless the user has allowed lower precision.
    """
    (m, k), n = X.shape, len(W)
    longest = _PIECE_OF_MATRICES if min(m, n) >= _FEW_ROWS else _PIECE_OF_VECTORS
    if k > 2 * longest and X.dtype == torch.float32:
        return _in_pieces(X, W, longest)
    if (
        m * k * n >= _LARGE
        and X.is_contiguous()
        and (W.is_contiguous() or W.T.is_contiguous())  # of others oneDNN makes copies, a hundred times as slow
        and takes_onednn(X)
    ):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(X, W, None, "none", [], "")
        return product
    return X @ W.T


def symmetrized(A: Tensor) -> Tensor:
    """Return (A + Aᵀ) / 2 of a matrix in its own memory; of large ones a tile and its mirror image at a time."""
    n = len(A)
    step = _TILE if A.device.type == "cpu" else max(1, n)
    for row in range(0, n, step):
        for column in range(row, n, step):
            i, j = slice(row, row + step), slice(column, column + step)
            mean = (A[i, j] + A[j, i].T).div_(2)
            A[i, j] = mean
            if row < column:
                A[j, i] = mean.T
    return A


def _in_pieces(X: Tensor, W: Tensor, longest: int) -> Tensor:
    """Multiply X Wᵀ a piece of the contracted axis at a time.

    The kernels for vectors add one product after the other, so that sums of millions lose two digits in float32; those
    for matrices add the sums of some hundred products.
    """
    if longest == _PIECE_OF_MATRICES:
        total, copies = X.new_zeros(len(X), len(W)), takes_onednn(X)
        for x, w in zip(X.split(longest, 1), W.split(longest, 1), strict=True):
            if copies:
                total += times_transposed(x.contiguous(), w if w.T.is_contiguous() else w.contiguous())
            else:  # other kernels take columns of a larger matrix as they are
                total += x @ w.T
        return total
    pieces = X.shape[1] // longest
    whole = pieces * longest
    x = X[:, :whole].unflatten(1, (pieces, longest)).transpose(0, 1)
    w = W[:, :whole].unflatten(1, (pieces, longest)).permute(1, 2, 0)
    return torch.bmm(x, w).sum(0) + X[:, whole:] @ W[:, whole:].T


def takes_onednn(X: Tensor) -> bool:
    """Whether large matrices of this dtype and device are multiplied by oneDNN."""
    return X.dtype == torch.float32 and X.device.type == "cpu" and _onednn_is_fast() and precision_is_full()


@cache
def _onednn_is_fast() -> bool:
    """Whether torch has oneDNN's matrix product, this processor has AVX-512, and the product is right."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    X, W = (torch.randn(n, 150, generator=generator) for n in (200, 170))
    try:
        product = torch.ops.mkldnn._linear_pointwise(X, W, None, "none", [], "")
    except (AttributeError, RuntimeError):  # it is not a public function
        return False
    return torch.allclose(product, X @ W.T, rtol=1e-3, atol=1e-3)


def precision_is_full(operation: str = "matmul") -> bool:
    """Whether oneDNN computes "matmul" or "conv" in float32, and not in the lower precision that a user may allow."""
    flags: Any = torch.backends.mkldnn
    return flags.fp32_precision in ("none", "ieee") and getattr(flags, operation).fp32_precision in ("none", "ieee")
