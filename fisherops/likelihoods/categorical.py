"""The likelihood of class labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherops.likelihoods.base import (
    Draws,
    Likelihood,
    Terms,
    checked_targets,
    checked_tensor,
    checked_weights,
    refuse,
    require_targets,
)
from fisherops.likelihoods.factors import CategoricalFactor, CategoricalRoot, DenseFactor, OutputFactor


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
        self._class_weights = checked_weights("weight", class_weights)
        self._ignore_index = ignore_index
        self._smoothing = label_smoothing

    def flatten(self, output: Any) -> Tensor:
        f = checked_tensor(output)
        if f.ndim < 2:
            raise ValueError(
                f"cross-entropy takes outputs (batch, C, ...), got shape {tuple(f.shape)}: keep the batch axis."
            )
        return f.movedim(1, -1).reshape(-1, f.shape[1])

    def terms(self, output: Any, y: Any) -> Terms:
        shape = output.shape
        C = shape[1]
        if y is None:
            if self._class_weights is not None:
                require_targets(y, "class weights")
            return Terms(None, output.numel() // C, None)
        y = checked_targets(y)
        if self._class_weights is not None and self._class_weights.shape != (C,):
            raise ValueError(
                f"the loss has {self._class_weights.numel()} class weights, but the outputs have {C} classes."
            )
        if y.shape == shape and y.is_floating_point():
            return self._soft_terms(self.flatten(y))
        expected = shape[:1] + shape[2:]
        if y.shape != expected or y.is_floating_point():
            raise ValueError(
                f"the outputs have shape {tuple(shape)} and the targets {tuple(y.shape)} of {y.dtype}: "
                f"cross-entropy takes class indices {tuple(expected)} of int64, or probabilities {tuple(shape)}."
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
        observed = self._label_distribution(nn.functional.one_hot(y, C)) if self._smoothing else y
        if self._class_weights is None and counts.all():
            return Terms(None, len(y), observed)
        # In float64: sums of half-precision weights overflow.
        class_weights = torch.ones(C) if self._class_weights is None else self._class_weights
        class_weights = class_weights.to(y.device, torch.float64)
        weights = class_weights[y] * counts
        # What the mean divides by knows nothing of smoothing.
        smooth = (1 - self._smoothing) * weights + self._smoothing * class_weights.mean() * counts
        return Terms(smooth.unsqueeze(1), weights.sum(), observed, weights)

    def _soft_terms(self, y: Tensor) -> Terms:
        if (negative := (y < 0).any(1)).any():
            refuse("probabilities as targets must be at least 0", y, negative, "correct them")
        weights, observed = self._weighted(y).sum(1, keepdim=True), self._label_distribution(y)
        if self._class_weights is None and (y.double().sum(1) - 1).abs().max() <= 4 * torch.finfo(y.dtype).eps:
            return Terms(None, len(y), observed)
        return Terms(weights, len(y), observed)

    def _weighted(self, target: Tensor) -> Tensor:
        """Return t of a term's loss −Σ t_c log p_c, for target probabilities (T, C)."""
        t = (1 - self._smoothing) * target.double() + self._smoothing / target.shape[1]
        return t if self._class_weights is None else t * self._class_weights.to(t)

    def _label_distribution(self, target: Tensor) -> Tensor:
        """Return t / w for target probabilities (T, C); anything finite where w = 0."""
        t = self._weighted(target)
        total = t.sum(1, keepdim=True)
        return torch.where(total > 0, t / total, 0)

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Tensor:
        return draws.categorical(f.softmax(dim=1), samples)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log q for class indices (..., T), or the mean over label distributions (..., T, C)."""
        log_p = f.log_softmax(-1)
        return (y * log_p).sum(-1) if y.is_floating_point() else log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)

    def scores(self, f: Tensor, y: Tensor) -> OutputFactor:
        p = f.softmax(dim=1)
        if y.is_floating_point():
            return DenseFactor((p - y).to(f.dtype).transpose(0, 1))
        return CategoricalFactor(p, y.T)

    def exact(self, f: Tensor) -> OutputFactor:
        return CategoricalRoot(f.softmax(dim=1))


class LogCategorical(Categorical):
    """``NLLLoss``: outputs (batch, C, ...) are log-probabilities, the logits of which are themselves."""

    def terms(self, output: Any, y: Any) -> Terms:
        if isinstance(y, Tensor) and y.is_floating_point():
            raise ValueError(
                f"NLLLoss takes class indices of int64 as targets, got {y.dtype}: convert them, or for probabilities "
                "use CrossEntropyLoss, for which log-probabilities are logits."
            )
        total = output.logsumexp(1)
        # Half precision, and a model in low precision, stay well below this.
        wrong = total.abs() > 0.05
        if wrong.any():
            total = total[wrong][0].exp().item()
            raise ValueError(
                f"NLLLoss takes log-probabilities as outputs, got some whose probabilities sum to {total:.4g}: end the "
                "model with a log_softmax, or use CrossEntropyLoss."
            )
        return super().terms(output, y)
