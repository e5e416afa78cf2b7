"""Matrix products by the fastest kernel at hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

# Multiplications from which arranging matrices in blocks pays.
_LARGE = 128**3


def times_transposed(X: Tensor, W: Tensor) -> Tensor:
    """Multiply X Wᵀ, (m, k) and (n, k) → (m, n), fastest where X is contiguous, and W is or its transpose.

    Torch multiplies float32 matrices by MKL, which uses no AVX-512 on processors of other makers than Intel; oneDNN,
    which torch has for convolutions, does, and is twice as fast there. It is taken for matrices that are large enough,
    unless the user has allowed lower precision.
    """
    if (
        X.shape[0] * X.shape[1] * W.shape[0] >= _LARGE
        and X.is_contiguous()
        and (W.is_contiguous() or W.T.is_contiguous())  # of others oneDNN makes copies, a hundred times as slow
        and takes_onednn(X)
    ):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(X, W, None, "none", [], "")
        return product
    return X @ W.T


def takes_onednn(X: Tensor) -> bool:
    """Whether large matrices of this dtype and device are multiplied by oneDNN."""
    return X.dtype == torch.float32 and X.device.type == "cpu" and _onednn_is_fast() and _precision_is_full()


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


def _precision_is_full() -> bool:
    flags: Any = torch.backends.mkldnn
    return flags.fp32_precision in ("none", "ieee") and flags.matmul.fp32_precision in ("none", "ieee")
