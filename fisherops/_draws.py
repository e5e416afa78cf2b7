"""Random draws for the Monte-Carlo Fisher: where a likelihood's random numbers come from.

A sampler lasts for one pass over the data and gives the draws of each batch. Draws answer what a likelihood asks for:
``uniform``, ``normal``, ``categorical``, ``bernoulli``, ``poisson`` or whatever else torch can draw, with a leading
axis of samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisherops import _philox
from fisherops._torch import fixed_randomness

# Of the 32 bits that number the samples, those for the samples of one head where a model has several.
_SAMPLE_BITS = 24


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
        self._start = self._generator.get_state()

    def batch(self, index: Tensor) -> StreamSampler:  # noqa: ARG002 (only their order matters)
        """Return the draws for the data with these indices."""
        self._start = self._generator.get_state()
        return self

    def again(self) -> StreamSampler:
        """Return the draws of the present batch from their beginning."""
        self._generator.set_state(self._start)
        return self

    def normal(self, like: Tensor, samples: int) -> Tensor:
        """Draw standard normal numbers (samples, ...) of the dtype and device of `like`, of any shape."""
        shape = (samples, *like.shape)
        return torch.randn(shape, generator=self._generator, dtype=like.dtype, device=like.device)

    def categorical(self, probabilities: Tensor, samples: int) -> Tensor:
        """Draw class indices (samples, T) for probabilities (T, C)."""
        return probabilities.multinomial(samples, replacement=True, generator=self._generator).T

    def bernoulli(self, logits: Tensor, samples: int) -> Tensor:
        """Draw zeros and ones (samples, ...) for logits of any shape."""
        return logits.sigmoid().expand(samples, *logits.shape).bernoulli(generator=self._generator)

    def uniform(self, like: Tensor, samples: int) -> Tensor:
        """Draw float64 numbers in (0, 1), (samples, ...) for `like` of any shape."""
        shape = (samples, *like.shape)
        integers = torch.randint(2**52, shape, generator=self._generator, device=like.device)
        return (integers.double() + 0.5) * 2.0**-52

    def poisson(self, rate: Tensor, samples: int) -> Tensor:
        """Draw counts (samples, ...) for rates of any shape."""
        _check_rate(rate)
        return torch.poisson(rate.expand(samples, *rate.shape), generator=self._generator)

    def generated(self, f: Tensor, sample: Callable[[Tensor], Tensor]) -> Tensor:
        """Draw by a function that uses torch's global generator."""
        with fixed_randomness(f.device, 0) as generators:
            generators[-1].set_state(self._generator.get_state())
            drawn = sample(f)
            self._generator.set_state(generators[-1].get_state())
        return drawn

    def head(self, number: int) -> StreamSampler:  # noqa: ARG002 (no two draws are the same)
        """Return draws for another head of the model."""
        return self


class CounterSampler:
    """Draws that are a function of (seed, datum, term, sample, class) and of the number of the call alone.

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
    """The draws of one batch; its terms are ordered by datum.

    Calls are numbered: a likelihood that asks for two arrays gets independent ones.
    """

    def __init__(self, key: tuple[int, int], index: Tensor, head: int = 0) -> None:
        self._key, self._index, self._head = key, index, head
        self._calls, self._generated_calls = 0, 0

    def again(self) -> CounterDraws:
        """Return the draws from their beginning."""
        return CounterDraws(self._key, self._index, self._head)

    def normal(self, like: Tensor, samples: int) -> Tensor:
        """Draw standard normal numbers (samples, T, C) of the dtype of `like` (T, C)."""
        normal: Tensor = torch.special.ndtri(self.uniform(like, samples))
        return normal.to(like.dtype)

    def categorical(self, probabilities: Tensor, samples: int) -> Tensor:
        """Draw class indices (samples, T) for probabilities (T, C)."""
        cumulative = probabilities.cumsum(1, dtype=torch.float64)
        # The last class must not be drawn for want of digits in the sum, nor one of probability 0.
        targets = self.uniform(probabilities[:, :1], samples)[..., 0].T * cumulative[:, -1:]
        C = probabilities.shape[1]
        return torch.searchsorted(cumulative, targets.contiguous(), right=True).clamp_(max=C - 1).T

    def bernoulli(self, logits: Tensor, samples: int) -> Tensor:
        """Draw zeros and ones (samples, T, C) for logits (T, C)."""
        # In float32, probabilities next to 1 have no digits for what is left.
        return (self.uniform(logits, samples) < logits.double().sigmoid()).to(logits.dtype)

    def poisson(self, rate: Tensor, samples: int) -> Tensor:
        """Draw counts (samples, T, C) for rates (T, C)."""
        _check_rate(rate)
        return _poisson_quantile(self.uniform(rate, samples), rate.double()).to(rate.dtype)

    def generated(self, f: Tensor, sample: Callable[[Tensor], Tensor]) -> Tensor:
        """Draw by a function that uses torch's global generator, seeded for each datum."""
        zero = torch.zeros_like(self._index)
        # A counter that `uniform` does not use: its last word counts pairs of classes.
        key = _key_of_call(self._key, self._generated_calls)
        self._generated_calls += 1
        high, low, *_ = _philox.words((self._index, zero, zero + self._head, zero + 0xFFFFFFFF), key)
        seeds = ((high << 31) ^ low).tolist()
        drawn = []
        # On the host, because the generators of other devices draw other numbers.
        with fixed_randomness(torch.device("cpu"), 0) as generators:
            for part, seed in zip(f.cpu().chunk(len(seeds)), seeds, strict=True):
                generators[-1].manual_seed(seed)
                drawn.append(sample(part))
        return torch.cat(drawn, 1).to(f.device)

    def head(self, number: int) -> CounterDraws:
        """Return draws for another head of the model."""
        return CounterDraws(self._key, self._index, number)

    def uniform(self, like: Tensor, samples: int) -> Tensor:
        """Draw float64 numbers in (0, 1), (samples, T, C) for `like` (T, C)."""
        (T, C), device = like.shape, self._index.device
        terms = T // len(self._index)
        datum = self._index.repeat_interleave(terms)[:, None]
        term = torch.arange(terms, device=device).repeat(len(self._index))[:, None]
        if self._head >= 2 ** (32 - _SAMPLE_BITS) or samples > 2**_SAMPLE_BITS:
            raise ValueError(
                f"there are numbers for {2 ** (32 - _SAMPLE_BITS)} heads of {2**_SAMPLE_BITS} samples each, got "
                f"head {self._head} and {samples} samples: use sampler='stream'."
            )
        sample = torch.arange(samples, device=device)[:, None, None] + (self._head << _SAMPLE_BITS)
        pair = torch.arange(-(-C // 2), device=device)
        key = _key_of_call(self._key, self._calls)
        self._calls += 1
        numbers = torch.stack(_philox.uniform((datum, term, sample, pair), key), -1)
        return numbers.expand(samples, T, -(-C // 2), 2).flatten(2)[..., :C]


def _key_of_call(key: tuple[int, int], call: int) -> tuple[int, int]:
    """Return the key of a call within `Likelihood.sample`: the first has the seed's, each other one a word of it.

    All four words of a counter number something else already, so the call is in the counter of a key.
    """
    if call == 0:
        return key
    ones = torch.tensor([_philox.MASK], device="cpu")
    high, low, *_ = (int(word) for word in _philox.words((ones.new_tensor([call]), ones, ones, ones), key))
    return high, low


def _check_rate(rate: Tensor) -> None:
    wrong = ~((rate > 0) & (rate < 2.0**53))
    if wrong.any():
        raise ValueError(
            f"counts can be drawn for Poisson rates above 0 and below 2**53, and the model predicts "
            f"{rate[wrong][0].item()}: check its outputs."
        )


def _poisson_quantile(u: Tensor, rate: Tensor) -> Tensor:
    """Return the smallest counts k with P(Y ≤ k) ≥ u.

    A Cornish-Fisher expansion is corrected by single steps. For rates above 10⁵, where torch's incomplete gamma
    function is not accurate, it stands as it is: in one of 10⁴ draws it is one count off, when a standard deviation is
    more than 300 counts.
    """
    z: Tensor = torch.special.ndtri(u)
    root = rate.sqrt()
    steps = rate <= 1e5
    k = rate + root * z + (z.square() - 1) / 6 + torch.where(steps, 0, (z - z**3) / (72 * root))
    k = (k - 0.5).ceil().clamp(min=0)
    rate = rate.clamp(max=1e5).expand(k.shape)
    for _ in range(1000):
        too_low = torch.special.gammaincc(k + 1, rate) < u
        # P(Y ≤ k − 1); gammaincc(0, λ) is 0
        too_high = ~too_low & (k > 0) & (torch.special.gammaincc(k, rate) >= u)
        step = (too_low.double() - too_high.double()) * steps
        if not step.any():
            break
        k = k + step
    return k
