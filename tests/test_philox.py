"""Philox against the published known-answer vectors, and the uniform numbers made of it."""

import numpy as np
import pytest
import torch
from scipy import stats

from fisherops import _philox

# Random123, kat_vectors: philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = _philox.words(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_uniform_numbers_are_uniform_and_never_zero_or_one():
    index = torch.arange(200_000)
    zero = torch.zeros((), dtype=torch.int64)
    pair = _philox.uniform((index, zero, zero, zero), (1, 2))
    for u in pair:
        assert u.dtype == torch.float64
        assert u.min() > 0
        assert u.max() < 1
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-6
    assert abs(np.corrcoef(pair[0], pair[1])[0, 1]) < 5 / np.sqrt(len(index))
    assert abs(np.corrcoef(pair[0][1:], pair[0][:-1])[0, 1]) < 5 / np.sqrt(len(index))


def test_the_ends_of_the_interval(monkeypatch):
    for word, expected in ((0, 2.0**-53), (0xFFFFFFFF, 1 - 2.0**-53)):
        monkeypatch.setattr(_philox, "words", lambda counter, key, word=word: (torch.tensor([word]),) * 4)
        u, _ = _philox.uniform((torch.zeros(1),) * 4, (0, 0))
        assert float(u) == expected
