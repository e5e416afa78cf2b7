"""Likelihoods in output space: what a loss says about the distribution of the targets.

A likelihood knows tensors only: outputs f, targets y, and draws. Outputs are flattened to (T, C), one row
for each loss term of the batch, so that the rest of the library sees no other shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import sqrt
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Draws(Protocol):
    """What a likelihood may ask of a sampler; shapes as in :class:`fisherops._draws.StreamDraws`."""

    def normal(self, like: Tensor, samples: int) -> Tensor:
        """Draw standard normal numbers (samples, ...)."""
        ...

    def categorical(self, probabilities: Tensor, samples: int) -> Tensor:
        """Draw class indices (samples, T) for probabilities (T, C)."""
        ...

    def bernoulli(self, probabilities: Tensor, samples: int) -> Tensor:
        """Draw zeros and ones (samples, ...)."""
        ...


class OutputFactor(ABC):
    """S, the output factor of one batch: for each term a C × R matrix with S Sᵀ = B (or an estimate of it)."""

    rank: int
    """R, vectors per term."""

    @abstractmethod
    def apply(self, W: Tensor) -> Tensor:
        """Multiply S: (K, T, R) → (K, T, C)."""

    @abstractmethod
    def adjoint(self, U: Tensor) -> Tensor:
        """Multiply Sᵀ: (K, T, C) → (K, T, R)."""

    @abstractmethod
    def columns(self) -> Tensor:
        """List the vectors themselves, (T, R, C)."""


class DenseFactor(OutputFactor):
    """An output factor given by its vectors (T, R, C)."""

    def __init__(self, columns: Tensor) -> None:
        self._columns = columns
        self.rank = columns.shape[1]

    def apply(self, W: Tensor) -> Tensor:
        return torch.einsum("trc,ktr->ktc", self._columns, W)

    def adjoint(self, U: Tensor) -> Tensor:
        return torch.einsum("trc,ktc->ktr", self._columns, U)

    def columns(self) -> Tensor:
        return self._columns


class DiagonalFactor(OutputFactor):
    """An output factor that is a diagonal matrix for each term; `diagonal` is (T, C)."""

    def __init__(self, diagonal: Tensor) -> None:
        self._diagonal = diagonal
        self.rank = diagonal.shape[1]

    def apply(self, W: Tensor) -> Tensor:
        return self._diagonal * W

    def adjoint(self, U: Tensor) -> Tensor:
        return self._diagonal * U

    def columns(self) -> Tensor:
        return torch.diag_embed(self._diagonal)


class CategoricalFactor(OutputFactor):
    """Scores p − e_y of cross-entropy, scaled, kept as probabilities and class indices.

    Parameters
    ----------
    probabilities : torch.Tensor
        p, (T, C).
    labels : torch.Tensor
        y, (T, R) class indices.
    scale : torch.Tensor
        (T, R), such as √(w/M).
    """

    def __init__(self, probabilities: Tensor, labels: Tensor, scale: Tensor) -> None:
        self._p, self._labels, self._scale = probabilities, labels, scale
        self.rank = labels.shape[1]

    def apply(self, W: Tensor) -> Tensor:
        W = W * self._scale
        U = self._p * W.sum(-1, keepdim=True)
        return U.scatter_add_(-1, self._labels.expand(W.shape), -W)

    def adjoint(self, U: Tensor) -> Tensor:
        inner = torch.einsum("tc,ktc->kt", self._p, U).unsqueeze(-1)
        picked = U.gather(-1, self._labels.expand(U.shape[0], *self._labels.shape))
        return (inner - picked).mul_(self._scale)

    def columns(self) -> Tensor:
        columns = self._p.unsqueeze(1).repeat(1, self.rank, 1)
        columns.scatter_add_(-1, self._labels.unsqueeze(-1), -torch.ones_like(columns[..., :1]))
        return columns.mul_(self._scale.unsqueeze(-1))


class CategoricalRoot(OutputFactor):
    """√w (diag √p − p √pᵀ), the square root of w (diag p − p pᵀ), never written out.

    Parameters
    ----------
    probabilities : torch.Tensor
        p, (T, C).
    scale : torch.Tensor
        √w, (T, 1).
    """

    def __init__(self, probabilities: Tensor, scale: Tensor) -> None:
        self._p, self._root, self._scale = probabilities, probabilities.sqrt(), scale
        self.rank = probabilities.shape[1]

    def apply(self, W: Tensor) -> Tensor:
        inner = torch.einsum("tc,ktc->kt", self._root, W).unsqueeze(-1)
        return (self._root * W - self._p * inner).mul_(self._scale)

    def adjoint(self, U: Tensor) -> Tensor:
        inner = torch.einsum("tc,ktc->kt", self._p, U).unsqueeze(-1)
        return (self._root * (U - inner)).mul_(self._scale)

    def columns(self) -> Tensor:
        columns = torch.diag_embed(self._root) - self._root.unsqueeze(2) * self._p.unsqueeze(1)
        return columns.mul_(self._scale.unsqueeze(-1))


class Terms(NamedTuple):
    """What the targets of a batch say about its loss terms."""

    weights: Tensor | None
    """Observation weights w ≥ 0, (T, 1), or (T, C) where each output element has its own; None if all are 1."""
    divisor: Tensor | int
    """What ``reduction="mean"`` divides by, the part of this batch."""
    observed: Tensor
    """The targets, as `Likelihood.observed` takes them."""


class Likelihood(ABC):
    """The distribution q(y | f) that a loss ℓ(f, y) = −log q(y | f) + const stands for.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        How the loss reduces its terms over the whole data set.
    """

    def __init__(self, reduction: str) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f"the loss has reduction={reduction!r}: a Fisher of a sum or a mean over the data is taken. "
                "Use reduction='sum' or 'mean'."
            )
        self.reduction = reduction

    @abstractmethod
    def flatten(self, f: Tensor) -> Tensor:
        """Arrange outputs of a batch as (T, C)."""

    @abstractmethod
    def terms(self, f_shape: torch.Size, y: Tensor) -> Terms:
        """Read the targets.

        Parameters
        ----------
        f_shape : torch.Size
            Shape of the outputs, not flattened.
        y : torch.Tensor
            Targets as the loss takes them.

        Raises
        ------
        ValueError
            If the loss would not take targets of this shape or value.
        """

    @abstractmethod
    def sample(self, f: Tensor, weights: Tensor | None, samples: int, draws: Draws) -> OutputFactor:
        """Draw would-be gradients.

        Parameters
        ----------
        f : torch.Tensor
            Flattened outputs, (T, C).
        weights : torch.Tensor or None
            Observation weights, as in `Terms`.
        samples : int
            M, draws per term.
        draws : Draws
            Where random numbers come from.

        Returns
        -------
        OutputFactor
            With vectors √(w/M) ∇_f(−log q(ỹ_m | f)), ỹ_m ~ q(· | f), or at most C others with the same S Sᵀ.
        """

    @abstractmethod
    def exact(self, f: Tensor, weights: Tensor | None) -> OutputFactor:
        """Return a closed-form square root of w E[s sᵀ], the expectation over the labels."""

    @abstractmethod
    def observed(self, f: Tensor, terms: Terms) -> OutputFactor:
        """Return the one vector √w ∇_f(−log q(y | f)) at the observed targets."""


def _compressed(columns: Tensor) -> DenseFactor:
    """Make a factor of vectors (T, R, C), replacing more than C by C with the same sum of outer products."""
    _, R, C = columns.shape
    return DenseFactor(torch.linalg.qr(columns, mode="r")[1] if R > C else columns)


class _ElementwiseLikelihood(Likelihood):
    """Outputs (batch, ..., C) and targets of the same shape; the mean is over elements."""

    def flatten(self, f: Tensor) -> Tensor:
        return f.reshape(-1, f.shape[-1]) if f.ndim > 1 else f.reshape(-1, 1)

    def terms(self, f_shape: torch.Size, y: Tensor) -> Terms:
        if y.shape != f_shape:
            raise ValueError(
                f"the outputs have shape {tuple(f_shape)} and the targets {tuple(y.shape)}: for this loss they must "
                "be equal (reshape or unsqueeze the targets)."
            )
        return Terms(None, f_shape.numel(), self.flatten(y))


class Gaussian(_ElementwiseLikelihood):
    """``MSELoss``: ‖f − y‖² is −log of a normal density with variance ½, up to a constant.

    The score is 2(f − y), so with ỹ = f + √½ ε, ε ~ N(0, 1), would-be gradients are −√2 ε and B = 2I.
    """

    def sample(self, f: Tensor, weights: Tensor | None, samples: int, draws: Draws) -> OutputFactor:
        return _compressed(draws.normal(f, samples).mul_(-sqrt(2 / samples)).transpose(0, 1))

    def exact(self, f: Tensor, weights: Tensor | None) -> OutputFactor:
        return DiagonalFactor(torch.full_like(f, sqrt(2)))

    def observed(self, f: Tensor, terms: Terms) -> OutputFactor:
        return DenseFactor((2 * (f - terms.observed.to(f.dtype))).unsqueeze(1))


class Bernoulli(_ElementwiseLikelihood):
    """``BCEWithLogitsLoss``: each output element is the logit of an independent Bernoulli variable.

    The score is σ(f) − y, so B = diag σ(f)(1 − σ(f)). Targets may lie anywhere in [0, 1]. With ``weight`` v and
    ``pos_weight`` a the loss of an element is −v (a y log σ + (1 − y) log(1 − σ)): an observation of weight
    w = v (a y + 1 − y) whose label is a y / (a y + 1 − y).

    Parameters
    ----------
    reduction : {"mean", "sum"}
    weight, pos_weight : torch.Tensor or None
        As of the loss; broadcast to the outputs.
    """

    def __init__(self, reduction: str, weight: Tensor | None = None, pos_weight: Tensor | None = None) -> None:
        super().__init__(reduction)
        self._weight = _checked_weights("weight", weight)
        self._pos_weight = _checked_weights("pos_weight", pos_weight)

    def terms(self, f_shape: torch.Size, y: Tensor) -> Terms:
        terms = super().terms(f_shape, y)
        outside = ~((y >= 0) & (y <= 1))  # true for NaN
        if outside.any():
            raise ValueError(
                f"binary cross-entropy takes targets in [0, 1], got {y[outside][0].item()}: "
                "use 0/1 labels or probabilities."
            )
        if self._weight is None and self._pos_weight is None:
            return terms
        ones = torch.ones(f_shape, dtype=torch.float64, device=y.device)
        positive = y * _broadcast("pos_weight", self._pos_weight, ones)
        weights = positive + (1 - y)
        label = torch.where(weights > 0, positive / weights, 0)
        weights = weights * _broadcast("weight", self._weight, ones)
        return Terms(self.flatten(weights), terms.divisor, self.flatten(label))

    def sample(self, f: Tensor, weights: Tensor | None, samples: int, draws: Draws) -> OutputFactor:
        p = f.sigmoid()
        scores = (p - draws.bernoulli(p, samples)).mul_(_root(weights, f, samples))
        return _compressed(scores.transpose(0, 1))

    def exact(self, f: Tensor, weights: Tensor | None) -> OutputFactor:
        # σ(f) σ(−f) keeps its digits where σ is close to 1.
        return DiagonalFactor((f.sigmoid() * (-f).sigmoid()).sqrt_().mul_(_root(weights, f)))

    def observed(self, f: Tensor, terms: Terms) -> OutputFactor:
        scores = (f.sigmoid() - terms.observed.to(f.dtype)).mul_(_root(terms.weights, f))
        return DenseFactor(scores.unsqueeze(1))


class Categorical(Likelihood):
    """``CrossEntropyLoss``: outputs (batch, C, ...) are the logits of one categorical variable for each term.

    The score is p − e_y with p = softmax f, so B = diag p − p pᵀ. The loss of a term is −Σ_c t_c log p_c for some
    t ≥ 0, made of the target, class weights and label smoothing: an observation of weight w = Σ t whose label has
    the distribution t / w.

    Parameters
    ----------
    reduction : {"mean", "sum"}
    class_weights : torch.Tensor or None
        (C,).
    ignore_index : int
    label_smoothing : float
    """

    def __init__(
        self,
        reduction: str,
        class_weights: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(reduction)
        self._class_weights = _checked_weights("weight", class_weights)
        self._ignore_index = ignore_index
        self._smoothing = label_smoothing

    def flatten(self, f: Tensor) -> Tensor:
        if f.ndim < 2:
            raise ValueError(
                f"cross-entropy takes outputs (batch, C, ...), got shape {tuple(f.shape)}: keep the batch axis."
            )
        return f.movedim(1, -1).reshape(-1, f.shape[1])

    def terms(self, f_shape: torch.Size, y: Tensor) -> Terms:
        C = f_shape[1]
        if self._class_weights is not None and self._class_weights.shape != (C,):
            raise ValueError(
                f"the loss has {self._class_weights.numel()} class weights, but the outputs have {C} classes."
            )
        if y.shape == f_shape and y.is_floating_point():
            return self._soft_terms(self.flatten(y))
        expected = f_shape[:1] + f_shape[2:]
        if y.shape != expected or y.is_floating_point():
            raise ValueError(
                f"the outputs have shape {tuple(f_shape)} and the targets {tuple(y.shape)} of {y.dtype}: "
                f"cross-entropy takes class indices {tuple(expected)} of int64, or probabilities {tuple(f_shape)}."
            )
        return self._hard_terms(y.reshape(-1).long(), C)

    def _hard_terms(self, y: Tensor, C: int) -> Terms:
        counts = y != self._ignore_index
        outside = counts & ((y < 0) | (y >= C))
        if outside.any():
            raise ValueError(
                f"class index {y[outside][0].item()} is not in [0, {C}), and it is not "
                f"ignore_index={self._ignore_index}: correct the targets."
            )
        y = y.where(counts, 0)
        if self._class_weights is None and counts.all():
            return Terms(None, len(y), y)
        # In float64: sums of half-precision weights overflow.
        class_weights = torch.ones(C) if self._class_weights is None else self._class_weights
        class_weights = class_weights.to(y.device, torch.float64)
        weights = class_weights[y] * counts
        # What the mean divides by knows nothing of smoothing.
        smooth = (1 - self._smoothing) * weights + self._smoothing * class_weights.mean() * counts
        return Terms(smooth.unsqueeze(1), weights.sum(), y)

    def _soft_terms(self, y: Tensor) -> Terms:
        # A tenth of a percent is more than half precision needs and less than any mistake.
        sums = y.sum(1)
        wrong = ~((y >= 0).all(1) & ((sums - 1).abs() <= 1e-3))  # true for NaN
        if wrong.any():
            raise ValueError(
                f"probabilities as targets must be at least 0 and sum to 1, got {y[wrong][0].tolist()}: normalize them."
            )
        if self._class_weights is None:
            return Terms(None, len(y), y)
        smooth = self._smoothed(y.double(), y.shape[1])
        return Terms((smooth * self._class_weights.to(y.device, torch.float64)).sum(1, keepdim=True), len(y), y)

    def _smoothed(self, target: Tensor, C: int) -> Tensor:
        return (1 - self._smoothing) * target + self._smoothing / C

    def sample(self, f: Tensor, weights: Tensor | None, samples: int, draws: Draws) -> OutputFactor:
        p = f.softmax(dim=1)
        labels = draws.categorical(p, samples).T
        scale = _root(weights, f[:, :1], samples)
        C = f.shape[1]
        if samples <= C:
            return CategoricalFactor(p, labels, scale.expand(labels.shape))
        # Draws of the same class are the same vector: C of them, each as often as it was drawn.
        counts = torch.zeros_like(p).scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))
        return CategoricalFactor(p, torch.arange(C, device=f.device).expand(p.shape), counts.sqrt_().mul_(scale))

    def exact(self, f: Tensor, weights: Tensor | None) -> OutputFactor:
        return CategoricalRoot(f.softmax(dim=1), _root(weights, f[:, :1]))

    def observed(self, f: Tensor, terms: Terms) -> OutputFactor:
        p, y = f.softmax(dim=1), terms.observed
        scale = _root(terms.weights, f[:, :1])
        if not y.is_floating_point() and not self._smoothing:
            return CategoricalFactor(p, y.unsqueeze(1), scale)
        C = f.shape[1]
        target = y.to(f.dtype) if y.is_floating_point() else nn.functional.one_hot(y, C).to(f.dtype)
        target = self._smoothed(target, C)
        if self._class_weights is not None:
            target = target * self._class_weights.to(f)
            total = target.sum(1, keepdim=True)
            target = torch.where(total > 0, target / total, p)
        return DenseFactor((p - target).mul_(scale).unsqueeze(1))


def _root(weights: Tensor | None, like: Tensor, samples: int = 1) -> Tensor:
    """Return √(w/M) in the dtype of `like`, and in its shape if there are no weights."""
    if weights is None:
        return torch.full_like(like, sqrt(1 / samples))
    return (weights / samples).sqrt().to(like.dtype)


def _checked_weights(name: str, weights: Tensor | None) -> Tensor | None:
    if weights is not None and not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"the `{name}` of the loss must be finite and at least 0, got {weights.tolist()}.")
    return weights


def _broadcast(name: str, weights: Tensor | None, ones: Tensor) -> Tensor:
    """Return weights in the shape of the outputs."""
    if weights is None:
        return ones
    try:
        return weights.to(ones).broadcast_to(ones.shape)
    except RuntimeError:
        raise ValueError(
            f"the `{name}` of the loss has shape {tuple(weights.shape)}, which does not broadcast to the outputs "
            f"{tuple(ones.shape)}."
        ) from None


SUPPORTED = "MSELoss, CrossEntropyLoss and BCEWithLogitsLoss"


def of_loss(loss_func: object) -> Likelihood:
    """Return the likelihood that a torch loss stands for.

    Raises
    ------
    NotImplementedError
        If the loss, or an option of it, is not supported.
    """
    for known in (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss):
        if isinstance(loss_func, known) and type(loss_func).forward is not known.forward:
            raise NotImplementedError(
                f"`loss_func` is {type(loss_func).__name__}, whose `forward` is not that of {known.__name__}: the "
                f"likelihood that it stands for is not known. Supported are {SUPPORTED}."
            )
    if isinstance(loss_func, nn.MSELoss):
        return Gaussian(loss_func.reduction)
    if isinstance(loss_func, nn.CrossEntropyLoss):
        return Categorical(loss_func.reduction, loss_func.weight, loss_func.ignore_index, loss_func.label_smoothing)
    if isinstance(loss_func, nn.BCEWithLogitsLoss):
        return Bernoulli(loss_func.reduction, loss_func.weight, loss_func.pos_weight)
    hint = " Pass an instance, such as `nn.MSELoss()`." if isinstance(loss_func, type) else ""
    name = loss_func.__name__ if isinstance(loss_func, type) else type(loss_func).__name__
    raise NotImplementedError(f"`loss_func` must be one of {SUPPORTED}, got {name}.{hint}")
