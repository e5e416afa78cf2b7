"""What a likelihood is: the distribution of the targets given the outputs, in output space alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fisherops.likelihoods.factors import DenseFactor, OutputFactor


class Draws(Protocol):
    """Random numbers for the loss terms of one batch, with a leading axis of samples.

    With ``sampler="counter"`` the numbers of a term depend on that term and on the number of the call within `sample`,
    whatever batch the term is in. Successive calls return independent numbers, so make the same calls in the same order
    for every batch.
    """

    def uniform(self, like: Tensor, samples: int) -> Tensor:
        """Draw float64 numbers in the open interval (0, 1), (samples, T, C) for `like` (T, C)."""
        ...

    def normal(self, like: Tensor, samples: int) -> Tensor:
        """Draw standard normal numbers (samples, T, C) of the dtype of `like` (T, C)."""
        ...

    def categorical(self, probabilities: Tensor, samples: int) -> Tensor:
        """Draw class indices (samples, T) for probabilities (T, C)."""
        ...

    def bernoulli(self, logits: Tensor, samples: int) -> Tensor:
        """Draw zeros and ones (samples, T, C) for logits (T, C)."""
        ...

    def poisson(self, rate: Tensor, samples: int) -> Tensor:
        """Draw counts (samples, T, C) for rates (T, C)."""
        ...

    def generated(self, f: Tensor, sample: Callable[[Tensor], Tensor]) -> Tensor:
        """Draw by ``sample(f)``, which uses torch's global generators: (samples, t, ...) for any rows (t, C) of `f`.

        With ``sampler="counter"`` it is called for one datum after the other, each with a seed of its own, and on the
        host, because draws must not depend on the device.
        """
        ...

    def head(self, number: int) -> Draws:
        """Return other draws for the same data, those of another head of the model."""
        ...


class Terms(NamedTuple):
    """What the targets of a batch say about its T loss terms."""

    weights: Tensor | None
    """Observation weights w ≥ 0, (T, 1), or (T, C) where each output element has its own; None if all are 1."""
    divisor: Any
    """What ``reduction="mean"`` divides by, the part of this batch."""
    observed: Any
    """The targets as `Likelihood.scores` takes them, without the axis of samples; None if there are none."""
    shares: Tensor | None = None
    """What each term adds to the divisor, (T,); None if all add the same."""


class Likelihood(ABC):
    """The distribution q(y | f) that a loss ℓ(f, y) = −log q(y | f) + const stands for.

    A subclass says how to draw targets (`sample`) and how likely they are (`log_prob`); pass an instance of it as
    `loss_func`. Scores are then found by automatic differentiation. Where outputs are not (batch, ..., C), or targets
    have another shape than outputs, it also overrides `flatten` and `terms`; where the exact Fisher has a closed form,
    `exact`.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        Whether the Fisher is that of the sum over the whole data set, or is divided by the number of targets (or what
        `terms` says).

    Examples
    --------
    Rayleigh-distributed targets, whose scale is predicted by its logarithm; the Fisher in f is 4:

    >>> import torch, fisherops as fo
    >>> from fisherops.likelihoods import DiagonalFactor, Likelihood
    >>> class Rayleigh(Likelihood):
    ...     def sample(self, f, samples, draws):
    ...         return f.exp() * (-2 * draws.uniform(f, samples).log()).sqrt()
    ...
    ...     def log_prob(self, f, y):
    ...         return (y.log() - 2 * f - (y / f.exp()) ** 2 / 2).sum(-1)
    ...
    ...     def exact(self, f):
    ...         return DiagonalFactor(torch.full_like(f, 2))
    >>> model, X, y = torch.nn.Linear(1, 1), torch.ones(10, 1), torch.ones(10, 1)
    >>> round(fo.FisherLinearOperator(model, Rayleigh("mean"), data=(X, y)).trace(), 4)
    8.0
    """

    mean_counts_weights = True
    """Whether ``reduction="mean"`` divides by the sum of the weights of observations, and not by their number."""

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f"the loss has reduction={reduction!r}: a Fisher of a sum or a mean over the data is taken. "
                "Use reduction='sum' or 'mean'."
            )
        self.reduction = reduction

    # ---- What a subclass says -----------------------------------------------------------------

    @abstractmethod
    def sample(self, f: Tensor, samples: int, draws: Draws) -> Any:
        """Draw targets ỹ ~ q(· | f).

        Parameters
        ----------
        f : torch.Tensor
            Flattened outputs, (T, C).
        samples : int
            M, draws per term.
        draws : Draws
            Where random numbers come from.

        Returns
        -------
        torch.Tensor
            (M, T, ...).
        """

    @abstractmethod
    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log q(y | f) up to a constant, (..., T) for f (..., T, C) and y (..., T, ...)."""

    def flatten(self, output: Any) -> Tensor:
        """Arrange the model's output for a batch as (T, C), one row for each loss term.

        Here: a tensor (batch, ..., C). Called inside of torch's transforms, so that values cannot be looked at.
        """
        return as_rows(checked_tensor(output))

    def terms(self, output: Any, y: Any) -> Terms:
        """Read the targets, and look at the output's values where not every value is allowed.

        Here: targets in the shape of the output, finite, with weight 1.

        Parameters
        ----------
        output : object
            What the model returned.
        y : torch.Tensor or None
            Targets as they are in the data. None if there are none, which only weights that depend on the target, and
            the empirical Fisher, need.

        Raises
        ------
        ValueError
            If targets or outputs have a shape or value that does not fit.
        """
        if y is None:
            return Terms(None, output.numel(), None)
        y = checked_targets(y)
        if y.shape != output.shape:
            raise ValueError(
                f"the outputs have shape {tuple(output.shape)} and the targets {tuple(y.shape)}: for this loss they "
                "must be equal (reshape or unsqueeze the targets)."
            )
        return Terms(None, output.numel(), as_rows(y))

    def scores(self, f: Tensor, y: Any) -> OutputFactor:
        """Return the vectors ∇_f(−log q(y | f)) for f (T, C) and targets (R, T, ...).

        Here: by automatic differentiation of `log_prob`.
        """
        return DenseFactor(score_columns(self, f, y))

    def exact(self, f: Tensor) -> OutputFactor:
        """Return a square root of B = E[s sᵀ], the expectation over targets y ~ q(· | f), for f (T, C)."""
        raise NotImplementedError(
            f"the exact Fisher of {type(self).__name__} is not known in closed form: take its Monte-Carlo estimate, "
            "FisherMCLinearOperator, or write the `exact` of a Likelihood."
        )

    # ---- What the library asks for; a subclass need not know ------------------------------------

    def check_sample(self, f: Tensor, samples: int, draws_of: Callable[[Tensor], Draws]) -> None:
        """Raise ValueError unless the targets of a term are drawn from its own outputs and numbers alone.

        Shapes that broadcast by mistake mix the terms without an error. Here: the draws of half of the terms must be
        those of all of them; ``draws_of(index)`` returns the numbers of terms.
        """
        if len(f) < 2 or _is_of_library(self.sample):
            return
        terms = torch.arange(len(f), device=f.device)
        half = terms[len(f) // 2 :]
        whole = self.sample(f, samples, draws_of(terms))
        if not isinstance(whole, Tensor) or whole.shape[:2] != (samples, len(f)):
            return  # of other kinds, or refused for its shape
        try:
            part = self.sample(f[half], samples, draws_of(half))
            # An argument next to a boundary may be rounded to either side of it.
            mixed = not torch.isclose(whole[:, half], part, rtol=1e-3, equal_nan=True).double().mean() > 0.99
        except (RuntimeError, IndexError) as error:
            raise ValueError(_mixes_terms(self, "sample", "draw a term from its own f and from `draws`")) from error
        if mixed:
            raise ValueError(_mixes_terms(self, "sample", "draw a term from its own f and from `draws`"))

    def bind(self, output: Any) -> Likelihood:
        """Return the likelihood for one batch, where the model's output has a structure that must be known."""
        return self

    def weighted(self, terms: Terms, output: Any, weights: Tensor) -> Terms:
        """Return terms whose observations have the weight of their example besides, (N,) in float64."""
        f, N = self.flatten(output), len(weights)
        _check_weights(terms, f)
        T = len(f)
        if T % N:
            raise ValueError(
                f"`sample_weight` needs equally many loss terms for each example, got {T} terms for {N} "
                "examples. Weight the terms in the loss instead."
            )
        each = weights.repeat_interleave(T // N)
        own = each.unsqueeze(1) if terms.weights is None else terms.weights * each.unsqueeze(1)
        if not self.mean_counts_weights:
            return terms._replace(weights=own)
        if terms.shares is None:
            return terms._replace(weights=own, divisor=terms.divisor * each.mean())
        shares = terms.shares * each
        return terms._replace(weights=own, divisor=shares.sum(), shares=shares)

    def observed(self, terms: Terms) -> Any:
        """Return the observed targets with an axis of one sample, as `scores` takes them."""
        return terms.observed.unsqueeze(0)

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction of each head."""
        return (self.reduction,)

    def scale(self, f: Tensor, terms: Terms, c: Tensor) -> Tensor:
        """Return √(w/c) in the dtype of f, broadcasting to it; c has one entry for each head."""
        if terms.weights is None:
            return (1 / c).sqrt().to(f).unsqueeze(1)
        _check_weights(terms, f)
        return (terms.weights / c.to(terms.weights.device)).sqrt().to(f.dtype)


def _check_weights(terms: Terms, f: Tensor) -> None:
    """Raise ValueError unless weights are (T, 1) or (T, C), for f (T, C)."""
    if terms.weights is not None and terms.weights.shape not in ((len(f), 1), f.shape):
        raise ValueError(
            f"the weights of `terms` must have shape {(len(f), 1)} or {tuple(f.shape)}, one for each term or output, "
            f"got {tuple(terms.weights.shape)}."
        )


def as_rows(t: Tensor) -> Tensor:
    """Arrange (batch, ..., C) as (T, C), and (batch,) as (T, 1)."""
    return t.reshape(-1, t.shape[-1]) if t.ndim > 1 else t.reshape(-1, 1)


def checked_tensor(output: Any) -> Tensor:
    """Return an output that must be one tensor, or raise TypeError or ValueError."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model must return one tensor for this loss, got {type(output).__name__}: wrap it, for example "
            "`model_func=lambda X: model(**X).logits` with `params=list(model.parameters())`. For several outputs, "
            "pass a mapping or tuple of losses; for a torch.distributions.Distribution, loss_func=None."
        )
    if not output.is_floating_point():
        raise TypeError(f"the model must return real floating-point outputs, got {output.dtype}.")
    if output.ndim == 0:
        raise ValueError("the model must return outputs with a batch axis, got a 0-d tensor.")
    return output


def checked_targets(y: Any) -> Tensor:
    """Return targets that must be one finite tensor, or raise TypeError or ValueError."""
    if not isinstance(y, Tensor):
        raise TypeError(f"the targets y must be a tensor or array for this loss, got {type(y).__name__}.")
    if y.is_complex():
        raise TypeError(f"the targets must be real, got {y.dtype}.")
    if y.dtype == torch.bool:
        return y.to(torch.uint8)
    if y.is_floating_point() and not y.isfinite().all():
        refuse("the targets must be finite", y, ~y.isfinite(), "leave such data out, or correct them")
    return y


def checked_weights(name: str, weights: Tensor | None) -> Tensor | None:
    """Return weights of a loss, which must be finite and not negative."""
    if weights is not None and not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"the `{name}` of the loss must be finite and at least 0, got {weights.tolist()}.")
    return weights


def require_targets(y: Any, reason: str) -> None:
    """Raise ValueError if there are no targets."""
    if y is None:
        raise ValueError(f"the targets y must be given for a loss with {reason}, got None. Pass (X, y).")


def refuse(rule: str, values: Tensor, wrong: Tensor, mend: str) -> None:
    """Raise ValueError with the rule and the first value that breaks it; `wrong` covers leading axes of `values`."""
    value = values.detach()[wrong][0].tolist()
    raise ValueError(f"{rule}, got {value}: {mend}.")


def score_columns(likelihood: Any, f: Tensor, y: Any) -> Tensor:
    """Differentiate −log q by f, (T, R, C) for f (T, C) and targets (R, T, ...).

    The scores of half of the terms and targets are computed a second time, without the others: shapes that broadcast by
    mistake mix them without an error.
    """
    columns = _differentiate(likelihood, f, y)
    rows, terms = slice(len(y) // 2, None), slice(len(f) // 2, None)
    if isinstance(y, Tensor) and y.shape[1:2] == f.shape[:1] and (len(f) > 1 or len(y) > 1):
        whole = columns[terms, rows]
        try:
            part = _differentiate(likelihood, f[terms], y[rows, terms])
            tolerance = torch.finfo(f.dtype).eps ** 0.5
            mixed = ((whole - part).abs() > tolerance * (whole.abs() + part.abs() + whole.abs().mean())).any()
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(_mixes_terms(likelihood, "log_prob", "compute a term from its own f and y")) from error
        if mixed:
            raise ValueError(_mixes_terms(likelihood, "log_prob", "compute a term from its own f and y"))
    return columns


def _is_of_library(method: Callable[..., Any]) -> bool:
    return str(getattr(method, "__module__", "")).startswith("fisherops.")


def _mixes_terms(likelihood: Any, method: str, rule: str) -> str:
    name = getattr(likelihood, "name", type(likelihood).__name__)
    return (
        f"`{method}` of {name} mixes loss terms: for a part of them it returns other values than for all. Keep the "
        f"last axis of f and y, so that their shapes do not broadcast over terms, and {rule} alone."
    )


def _differentiate(likelihood: Any, f: Tensor, y: Any) -> Tensor:
    R = len(y)
    with torch.enable_grad():
        point = f.detach().expand(R, *f.shape).clone().requires_grad_()
        value = likelihood.log_prob(point, y)
        if tuple(value.shape) != (R, len(f)):
            raise ValueError(
                f"`log_prob` of {type(likelihood).__name__} must return one number for each term, shape "
                f"{(R, len(f))}, got {tuple(value.shape)}: sum over the elements of a term."
            )
        if not value.requires_grad:
            raise ValueError(
                f"`log_prob` of {type(likelihood).__name__} does not depend on the outputs f that it is given: compute "
                "it from f in torch, without detaching."
            )
        (gradient,) = torch.autograd.grad(value.sum(), point)
    return gradient.neg_().transpose(0, 1)
