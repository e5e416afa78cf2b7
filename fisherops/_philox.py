"""Philox4x32-10: random numbers that are a function of a counter and a key alone.

References
----------
J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, Parallel random numbers: as easy as 1, 2, 3, SC '11,
doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


Words = tuple[Tensor, Tensor, Tensor, Tensor]
Integers = TypeVar("Integers", Tensor, np.ndarray[Any, Any])


def words(counter: Words, key: tuple[int, int]) -> Words:
    """Return four random 32-bit words for each counter.

    Parameters
    ----------
    counter : tuple of four torch.Tensor
        The 32-bit words of the counters, int64 tensors with at least one axis that broadcast to each other.
    key : tuple of two int
        The 32-bit words of the key.

    Returns
    -------
    tuple of four torch.Tensor
        int64 tensors with values in [0, 2³²).
    """
    if counter[0].device.type == "cpu":  # calls of NumPy cost a fifth of those of PyTorch
        w0, w1, w2, w3 = map(torch.from_numpy, _rounds([word.numpy() for word in counter], key))
    else:
        w0, w1, w2, w3 = _rounds(counter, key)
    return w0, w1, w2, w3


def _rounds(counter: Sequence[Integers], key: tuple[int, int]) -> Sequence[Integers]:
    """Return the words for arrays of either library."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1, c2, c3


def uniform(counter: Words, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return two float64 uniform numbers in the open interval (0, 1) for each counter.

    Each is (k + ½) 2⁻⁵² for one of 2⁵² values of k: exact in float64, symmetric about ½, never 0 or 1.
    """
    w0, w1, w2, w3 = words(counter, key)
    return _open_unit(w0, w1), _open_unit(w2, w3)


def _open_unit(high: Tensor, low: Tensor) -> Tensor:
    k = (high << 20) | (low >> 12)
    return (k.double() + 0.5) * 2.0**-52


def _multiply(x: Integers, m: int) -> tuple[Integers, Integers]:
    """Return the high and the low word of x · m, whose 64 bits int64 holds, if with another sign."""
    product = x * m
    return (product >> 32) & MASK, product & MASK
