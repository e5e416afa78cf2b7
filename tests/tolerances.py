"""How far two ways of computing the same numbers may be apart."""

import numpy as np
import torch


def assert_same(actual, expected, dtype, operations=1000):
    """Assert equality to the rounding of about `operations` dependent operations in `dtype`.

    The bound is relative to the largest entry of `expected`: sums of products cancel in the small entries.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{actual.shape} != {expected.shape}"
    eps = torch.finfo(dtype).eps if isinstance(dtype, torch.dtype) else np.finfo(dtype).eps
    largest = np.abs(expected).max(initial=0)
    worst = np.abs(actual - expected).max(initial=0)
    assert worst <= operations * eps * largest, f"differ by {worst} = {worst / (eps * largest):.0f} eps of {largest}"
