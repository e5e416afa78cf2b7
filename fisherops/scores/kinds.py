"""Which vectors make the output factor S: drawn, closed-form or observed scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherops._checks import integer
from fisherops._draws import CounterDraws, CounterSampler, StreamSampler
from fisherops.likelihoods import DiagonalFactor, Draws, Likelihood, OutputFactor, Terms
from fisherops.problem import Evaluation

Sampler = CounterSampler | StreamSampler

# The seed of draws unless another is given.
_SEED = 2147483647


class Kind(ABC):
    """Which Fisher it is."""

    description: str
    """As `repr` of an operator gives it."""
    order = "any"
    """Which order of the examples G depends on, see `Data`."""
    needs_targets = False
    any_loss = False
    """Whether losses are accepted that are not a likelihood."""
    samples = 1
    """M, what sums over draws are divided by."""
    by_datum = False
    """Whether terms must belong to data in equal numbers, for the draws."""
    name: str
    """As `ScoreMatrix.on` takes it."""
    may_sum_terms = True
    """Whether the vectors of the terms of an example may be summed into one row each."""
    needs_terms = True
    """Whether what the targets say about the terms, and their weights, enter G."""

    @property
    def order_with_weights(self) -> str:
        """Which order G depends on if examples have weights of their own."""
        return "index" if self.order == "any" else self.order

    def sampler(self, stream: int, device: torch.device) -> Sampler | None:
        """Return the sampler for one pass over the data, if any is needed; of a stream, by its number."""
        return None

    @abstractmethod
    def factor(self, q: Likelihood, f: Tensor, terms: Terms, draws: Draws | None) -> OutputFactor:
        """Return S for flattened outputs (T, C), without the weights of observations and normalization."""

    def identity(self) -> dict[str, Any]:
        """Return what must be the same in all processes that share the data."""
        return {"mc_samples": self.samples}


class MonteCarlo(Kind):
    """Scores at targets drawn from the model: M of them for each term."""

    name = "mc"
    by_datum = True

    def __init__(self, samples: int, seed: int, stream: bool) -> None:
        self.samples, self.seed, self._stream = samples, seed, stream
        self.order = "fixed" if stream else "index"
        self.by_datum = not stream
        self.description = f"'mc', mc_samples={samples}"

    def sampler(self, stream: int, device: torch.device) -> Sampler:
        if not self._stream:
            return CounterSampler(self.seed)
        # Two streams must not draw the same numbers; the golden ratio spreads their seeds.
        return StreamSampler((self.seed + 0x9E3779B97F4A7C15 * stream) % 2**64, device)

    def factor(self, q: Likelihood, f: Tensor, terms: Terms, draws: Draws | None) -> OutputFactor:
        assert draws is not None
        q.check_sample(f, self.samples, CounterSampler(self.seed).batch)
        return _checked(q.scores(f, q.sample(f, self.samples, draws)), q, f, self.samples)

    def with_seed(self, seed: int) -> MonteCarlo:
        """Return the same with other draws."""
        return MonteCarlo(self.samples, seed, self._stream)

    def with_samples(self, samples: int) -> MonteCarlo:
        """Return the same with another number of draws."""
        return MonteCarlo(samples, self.seed, self._stream)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "seed": self.seed, "sampler": "stream" if self._stream else "counter"}


class Exact(Kind):
    """A closed-form square root of the Fisher of the outputs."""

    name, description = "exact", "'exact'"
    may_sum_terms = False  # columns of square roots of different terms do not belong together

    def factor(self, q: Likelihood, f: Tensor, terms: Terms, draws: Draws | None) -> OutputFactor:
        return _checked(q.exact(f), q, f, None)


class Empirical(Kind):
    """Scores at the observed targets."""

    name, description = "empirical", "'empirical'"
    needs_targets = any_loss = True

    def factor(self, q: Likelihood, f: Tensor, terms: Terms, draws: Draws | None) -> OutputFactor:
        factor = _checked(q.scores(f, q.observed(terms)), q, f, 1)
        # Rows are multiplied by √w later, as those of an observation of weight w; a gradient has w itself.
        return factor.scaled(q.scale(f, terms, torch.ones(len(q.reductions), dtype=torch.float64, device="cpu")))


class Outputs(Kind):
    """The unit vectors, so that G is the Jacobian J of the outputs, as the likelihood arranges them."""

    name, description = "outputs", "'outputs'"
    may_sum_terms = False
    needs_terms = False

    def factor(self, q: Likelihood, f: Tensor, terms: Terms, draws: Draws | None) -> OutputFactor:
        return DiagonalFactor(torch.ones_like(f))


def kind_of(name: str | None, known: Kind, mc_samples: Any, seed: Any) -> Kind:
    """Return the kind of a score matrix of other data; what is None is as in a known one."""
    names: dict[str, Any] = {kind.name: kind for kind in (MonteCarlo, Exact, Empirical, Outputs)}
    if name is not None and (not isinstance(name, str) or name not in names):
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, names))}, or None, got {name!r}.")
    chosen: Any = type(known) if name is None else names[name]
    if chosen is not MonteCarlo:
        if mc_samples is not None or seed is not None:
            raise ValueError(f"`seed` and `mc_samples` are those of kind='mc', got {name!r}. Leave them out.")
        return known if name is None else chosen()
    like = known if isinstance(known, MonteCarlo) else MonteCarlo(1, _SEED, stream=False)
    samples = like.samples if mc_samples is None else integer("mc_samples", mc_samples, 1)
    return like.with_samples(samples).with_seed(like.seed if seed is None else as_seed(seed))


def as_seed(seed: Any) -> int:
    """Return a seed of 64 bits, signed or not."""
    return integer("seed", seed, -(2**63), 2**64 - 1)


@dataclass(frozen=True)
class FactorOf:
    """What the output factor of one batch is made from, beside the outputs.

    Attributes
    ----------
    kind : Kind
    likelihood : Likelihood
    y : object
        The targets.
    output : object
        What the model returned.
    terms : Terms
        What the targets say for this output.
    size : int
        Number of data.
    index : torch.Tensor
        The place of each datum in the data set.
    draws : StreamSampler, CounterDraws or None
    c : torch.Tensor
        What each head is divided by.
    sums : bool
        Whether the vectors of the terms of a datum are summed.
    weights : torch.Tensor or None
        The weight of each datum, (size,) in float64.
    """

    kind: Kind
    likelihood: Likelihood
    y: Any
    output: Any
    terms: Terms
    size: int
    index: Tensor
    draws: StreamSampler | CounterDraws | None
    c: Tensor
    sums: bool
    weights: Tensor | None = None

    def __call__(self, evaluation: Evaluation, compressed: bool = True) -> OutputFactor:
        """Return S for the present outputs: √(w/c) times the vectors, at most as many as outputs if compressed."""
        q, f = self.likelihood.bind(evaluation.output), evaluation.outputs
        terms = self.terms
        if evaluation.output is not self.output and self.kind.needs_terms:  # other kernels round differently
            with torch.enable_grad():
                terms = terms_of(self.likelihood, evaluation.output, self.y, self.weights)
        draws = self.draws.again() if self.draws is not None else None
        factor = self.kind.factor(q, f, terms, draws)
        if self.kind.needs_terms:
            factor = factor.scaled(q.scale(f, terms, self.c * self.kind.samples))
        if self.sums:
            factor = factor.summed(factor.blocks // self.size)
        return factor.compressed() if compressed else factor

    def redrawn(self, kind: Kind, sampler: Sampler | None) -> FactorOf:
        """Return the same for other draws."""
        return replace(self, kind=kind, draws=None if sampler is None else sampler.batch(self.index))

    def divided(self, c: Tensor) -> FactorOf:
        """Return the same with another divisor."""
        return replace(self, c=c)


def terms_of(likelihood: Likelihood, output: Any, y: Any, weights: Tensor | None) -> Terms:
    """Return what the targets say about the loss terms, with the weight of each datum if there are weights."""
    terms = likelihood.terms(output, y)
    return terms if weights is None else likelihood.weighted(terms, output, weights)


def _checked(factor: OutputFactor, q: Likelihood, f: Tensor, samples: int | None) -> OutputFactor:
    """Return a factor if it is for these outputs and has one vector for each sample."""
    name = type(q).__name__
    if factor.blocks * factor.outputs != f.numel():
        raise ValueError(
            f"{name} returned an output factor of {factor.blocks} blocks of {factor.outputs} for outputs "
            f"{tuple(f.shape)}: it must have one block for each row."
        )
    if samples is not None and len(q.reductions) == 1 and factor.rank != samples:
        raise ValueError(
            f"{name} returned {factor.rank} vectors for each term and there are {samples} samples: `sample` must "
            "return targets with a leading axis of samples, (samples, T, ...)."
        )
    return factor
