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


class CategoricalFactor(OutputFactor):
    """Would-be gradients √(w/M) (p − e_ỹ) of cross-entropy, kept as probabilities and class indices.

    Parameters
    ----------
    probabilities : torch.Tensor
        p, (T, C).
    labels : torch.Tensor
        ỹ, (T, M) class indices.
    scale : torch.Tensor
        √(w/M), (T,).
    """

    def __init__(self, probabilities: Tensor, labels: Tensor, scale: Tensor) -> None:
        self._p, self._labels, self._scale = probabilities, labels, scale
        self.rank = labels.shape[1]

    def apply(self, W: Tensor) -> Tensor:
        W = W * self._scale[:, None]
        U = self._p * W.sum(-1, keepdim=True)
        return U.scatter_add_(-1, self._labels.expand(W.shape), -W)

    def adjoint(self, U: Tensor) -> Tensor:
        inner = torch.einsum("tc,ktc->kt", self._p, U).unsqueeze(-1)
        picked = U.gather(-1, self._labels.expand(U.shape[0], *self._labels.shape))
        return (inner - picked).mul_(self._scale[:, None])

    def columns(self) -> Tensor:
        columns = self._p.unsqueeze(1).repeat(1, self.rank, 1)
        columns.scatter_add_(-1, self._labels.unsqueeze(-1), -torch.ones_like(columns[..., :1]))
        return columns.mul_(self._scale[:, None, None])


class Terms(NamedTuple):
    """What the targets of a batch say about its loss terms."""

    weights: Tensor | None
    """Observation weights w ≥ 0, (T,); None if all are 1."""
    divisor: Tensor | int
    """What ``reduction="mean"`` divides by, the part of this batch."""


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
            Observation weights, (T,).
        samples : int
            M, draws per term.
        draws : Draws
            Where random numbers come from.

        Returns
        -------
        OutputFactor
            With vectors √(w/M) ∇_f(−log q(ỹ_m | f)), ỹ_m ~ q(· | f).
        """


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
        return Terms(None, f_shape.numel())


class Gaussian(_ElementwiseLikelihood):
    """``MSELoss``: ‖f − y‖² is −log of a normal density with variance ½, up to a constant.

    The score is 2(f − y), so with ỹ = f + √½ ε, ε ~ N(0, 1), would-be gradients are −√2 ε and B = 2I.
    """

    def sample(self, f: Tensor, weights: Tensor | None, samples: int, draws: Draws) -> OutputFactor:
        return DenseFactor(draws.normal(f, samples).mul_(-sqrt(2 / samples)).transpose(0, 1))


class Bernoulli(_ElementwiseLikelihood):
    """``BCEWithLogitsLoss``: each output element is the logit of an independent Bernoulli variable.

    The score is σ(f) − y, so B = diag σ(f)(1 − σ(f)). Targets may lie anywhere in [0, 1]; the Fisher does
    not depend on them.
    """

    def terms(self, f_shape: torch.Size, y: Tensor) -> Terms:
        terms = super().terms(f_shape, y)
        outside = ~((y >= 0) & (y <= 1))  # true for NaN
        if outside.any():
            raise ValueError(
                f"binary cross-entropy takes targets in [0, 1], got {y[outside][0].item()}: "
                "use 0/1 labels or probabilities."
            )
        return terms

    def sample(self, f: Tensor, weights: Tensor | None, samples: int, draws: Draws) -> OutputFactor:
        p = f.sigmoid()
        return DenseFactor((p - draws.bernoulli(p, samples)).mul_(sqrt(1 / samples)).transpose(0, 1))


class Categorical(Likelihood):
    """``CrossEntropyLoss``: outputs (batch, C, ...) are the logits of one categorical variable for each term.

    The score is p − e_y with p = softmax f, so B = diag p − p pᵀ. Class weights and ``ignore_index`` weight the
    terms by their observed targets, and the mean divides by the sum of these weights.
    """

    def __init__(self, reduction: str, class_weights: Tensor | None, ignore_index: int) -> None:
        super().__init__(reduction)
        if class_weights is not None and not ((class_weights >= 0) & class_weights.isfinite()).all():
            raise ValueError(f"class weights must be finite and at least 0, got {class_weights.tolist()}.")
        self._class_weights = class_weights
        self._ignore_index = ignore_index

    def flatten(self, f: Tensor) -> Tensor:
        if f.ndim < 2:
            raise ValueError(
                f"cross-entropy takes outputs (batch, C, ...), got shape {tuple(f.shape)}: keep the batch axis."
            )
        return f.movedim(1, -1).reshape(-1, f.shape[1])

    def terms(self, f_shape: torch.Size, y: Tensor) -> Terms:
        T = f_shape.numel() // f_shape[1]
        if y.shape == f_shape and y.is_floating_point():
            if self._class_weights is not None:
                raise NotImplementedError(
                    "class weights together with probabilities as targets are not supported: "
                    "use class indices as targets, or no weights."
                )
            return Terms(None, T)
        expected = f_shape[:1] + f_shape[2:]
        if y.shape != expected or y.is_floating_point():
            raise ValueError(
                f"the outputs have shape {tuple(f_shape)} and the targets {tuple(y.shape)} of {y.dtype}: "
                f"cross-entropy takes class indices {tuple(expected)} of int64, or probabilities {tuple(f_shape)}."
            )
        y = y.reshape(-1).long()
        counts = y != self._ignore_index
        outside = counts & ((y < 0) | (y >= f_shape[1]))
        if outside.any():
            raise ValueError(
                f"class index {y[outside][0].item()} is not in [0, {f_shape[1]}), and it is not "
                f"ignore_index={self._ignore_index}: correct the targets."
            )
        if self._class_weights is None:
            if counts.all():
                return Terms(None, T)
            return Terms(counts, counts.sum())
        if self._class_weights.shape != f_shape[1:2]:
            raise ValueError(
                f"the loss has {self._class_weights.numel()} class weights, but the outputs have {f_shape[1]} classes."
            )
        # In float64: sums of half-precision weights overflow.
        weights = self._class_weights.to(y.device, torch.float64)[y.where(counts, 0)] * counts
        return Terms(weights, weights.sum())

    def sample(self, f: Tensor, weights: Tensor | None, samples: int, draws: Draws) -> OutputFactor:
        p = f.softmax(dim=1)
        labels = draws.categorical(p, samples).T
        w = torch.ones(len(f), dtype=f.dtype, device=f.device) if weights is None else weights.to(f.dtype)
        return CategoricalFactor(p, labels, (w / samples).sqrt())


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
        if loss_func.label_smoothing != 0 and loss_func.weight is not None:
            raise NotImplementedError(
                "CrossEntropyLoss with class weights and "
                f"label_smoothing={loss_func.label_smoothing} is not supported: "
                "leave out one of them (label smoothing alone does not change the Fisher)."
            )
        return Categorical(loss_func.reduction, loss_func.weight, loss_func.ignore_index)
    if isinstance(loss_func, nn.BCEWithLogitsLoss):
        for option in ("weight", "pos_weight"):
            if getattr(loss_func, option) is not None:
                raise NotImplementedError(f"BCEWithLogitsLoss with {option} is not supported yet: leave it out.")
        return Bernoulli(loss_func.reduction)
    hint = " Pass an instance, such as `nn.MSELoss()`." if isinstance(loss_func, type) else ""
    name = loss_func.__name__ if isinstance(loss_func, type) else type(loss_func).__name__
    raise NotImplementedError(f"`loss_func` must be one of {SUPPORTED}, got {name}.{hint}")
