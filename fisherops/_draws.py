"""Random draws for the Monte-Carlo Fisher: where a likelihood's random numbers come from.

A sampler lasts for one pass over the data and gives the draws of each batch. Draws answer what a likelihood asks for:
``normal``, ``categorical`` and ``bernoulli``, with a leading axis of samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherops import _philox


class StreamSampler:
    """Draws batch after batch from one ``torch.Generator``, seeded anew for each pass over the data.

    The numbers are those of curvlinops-for-pytorch 3.0.1: they depend on the order and the size of the batches
    and on the device. The global generator is never touched.

    Parameters
    ----------
    seed : int
    device : torch.device
        Where the distributions' parameters, and so the draws, live.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(seed)

    def batch(self, index: Tensor) -> StreamSampler:  # noqa: ARG002 (only their order matters)
        """Return the draws for the data with these indices."""
        return self

    def normal(self, like: Tensor, samples: int) -> Tensor:
        """Draw standard normal numbers (samples, ...) of the dtype and device of `like`, of any shape."""
        shape = (samples, *like.shape)
        return torch.randn(shape, generator=self._generator, dtype=like.dtype, device=like.device)

    def categorical(self, probabilities: Tensor, samples: int) -> Tensor:
        """Draw class indices (samples, T) for probabilities (T, C)."""
        return probabilities.multinomial(samples, replacement=True, generator=self._generator).T

    def bernoulli(self, probabilities: Tensor, samples: int) -> Tensor:
        """Draw zeros and ones (samples, ...) for probabilities of any shape."""
        return probabilities.expand(samples, *probabilities.shape).bernoulli(generator=self._generator)


class CounterSampler:
    """Draws that are a function of (seed, datum, term, sample, class) alone.

    So they do not depend on how the data are split or ordered, nor on the device, and the first m of M samples are the
    samples of m. All are inverse distribution functions of Philox's uniform numbers.

    Parameters
    ----------
    seed : int
        Taken modulo 2⁶⁴.
    """

    def __init__(self, seed: int) -> None:
        self._key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF

    def batch(self, index: Tensor) -> CounterDraws:
        """Return the draws for the data with these indices, int64 (size,) in [0, 2³²)."""
        return CounterDraws(self._key, index)


class CounterDraws:
    """The draws of one batch; its terms are ordered by datum."""

    def __init__(self, key: tuple[int, int], index: Tensor) -> None:
        self._key, self._index = key, index

    def normal(self, like: Tensor, samples: int) -> Tensor:
        """Draw standard normal numbers (samples, T, C) of the dtype of `like` (T, C)."""
        normal: Tensor = torch.special.ndtri(self._uniform(like.shape[0], like.shape[1], samples))
        return normal.to(like.dtype)

    def categorical(self, probabilities: Tensor, samples: int) -> Tensor:
        """Draw class indices (samples, T) for probabilities (T, C)."""
        T, C = probabilities.shape
        cumulative = probabilities.cumsum(1, dtype=torch.float64)
        # The last class must not be drawn for want of digits in the sum, nor one of probability 0.
        targets = self._uniform(T, 1, samples)[..., 0].T * cumulative[:, -1:]
        return torch.searchsorted(cumulative, targets.contiguous(), right=True).clamp_(max=C - 1).T

    def bernoulli(self, probabilities: Tensor, samples: int) -> Tensor:
        """Draw zeros and ones (samples, T, C) for probabilities (T, C)."""
        uniform = self._uniform(probabilities.shape[0], probabilities.shape[1], samples)
        return (uniform < probabilities).to(probabilities.dtype)

    def _uniform(self, T: int, C: int, samples: int) -> Tensor:
        """Return numbers in (0, 1), (samples, T, C)."""
        terms, device = T // len(self._index), self._index.device
        datum = self._index.repeat_interleave(terms)[:, None]
        term = torch.arange(terms, device=device).repeat(len(self._index))[:, None]
        sample = torch.arange(samples, device=device)[:, None, None]
        pair = torch.arange(-(-C // 2), device=device)
        numbers = torch.stack(_philox.uniform((datum, term, sample, pair), self._key), -1)
        return numbers.expand(samples, T, -(-C // 2), 2).flatten(2)[..., :C]
