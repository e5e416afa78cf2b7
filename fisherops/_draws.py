"""Random draws for the Monte-Carlo Fisher, given what a likelihood asks for."""

from __future__ import annotations

import torch
from torch import Tensor


class StreamDraws:
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
