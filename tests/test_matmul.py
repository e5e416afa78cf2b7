"""The kernel for large float32 matrices gives what torch's own gives, and steps back where it should."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherops import _matmul
from fisherops._matmul import symmetrized, times_transposed

sizes = st.integers(1, 300)


@given(sizes, sizes, sizes, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_products(m, n, k, X_is_a_view, W_is_a_view, dtype):
    generator = torch.Generator().manual_seed(m + 1000 * n + k)
    X = torch.randn((k, m) if X_is_a_view else (m, k), dtype=dtype, generator=generator)
    W = torch.randn((k, n) if W_is_a_view else (n, k), dtype=dtype, generator=generator)
    X, W = X.T if X_is_a_view else X, W.T if W_is_a_view else W
    product = times_transposed(X, W)
    expected = X.double() @ W.double().T
    error = k * torch.finfo(dtype).eps * (X.abs().double() @ W.abs().double().T)
    assert product.dtype == dtype
    assert ((product - expected).abs() <= error).all()


def test_other_kernels_are_left_out(monkeypatch):
    if not _matmul._onednn_is_fast():
        pytest.skip("this processor has no AVX-512, so torch's own products are taken anyway")
    called = []
    monkeypatch.setattr(_matmul, "_onednn_is_fast", lambda: called.append(1) or True)
    X = torch.randn(200, 200)
    times_transposed(X, X)
    assert called == [1]
    times_transposed(X[:, :190], X[:, :190])
    times_transposed(X[:4, :100].contiguous(), X[:, :100].contiguous())
    times_transposed(X.double(), X.double())
    assert called == [1]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert not _matmul.precision_is_full()
    finally:
        torch.set_float32_matmul_precision(before)
    assert _matmul.precision_is_full()


def test_a_kernel_that_is_missing_or_wrong_is_not_taken(monkeypatch):
    class Missing:
        def __getattr__(self, name):
            raise AttributeError(name)

    class Wrong:
        def _linear_pointwise(self, X, W, *others):
            return X @ W.T * 1.01

    for other in (Missing(), Wrong()):
        monkeypatch.setattr(torch.ops, "mkldnn", other)
        assert not _matmul._onednn_is_fast.__wrapped__()


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 700])
def test_matrices_become_symmetric_in_their_own_memory(n):
    """By tiles, with the bits of the plain mean."""
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    expected = (A + A.T) / 2
    found = symmetrized(A)
    assert found.data_ptr() == A.data_ptr()
    assert torch.equal(found, expected)
