"""Losses that are any function of one example's output and target, for the empirical Fisher alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisherops.likelihoods.base import Draws, Likelihood, Terms, checked_tensor
from fisherops.likelihoods.factors import DenseFactor, OutputFactor

_REDUCTIONS = {"mean": "mean", "batchmean": "mean", "sum": "sum"}


class ExampleLoss(Likelihood):
    """A loss ``loss(outputs, targets)`` of a batch that is the mean or the sum of the losses of its examples.

    Each example is one loss term. Its gradient is that of the loss of a batch of this example alone, so that examples
    cannot be mixed; that the loss of the batch is the mean or the sum of these is checked for every batch.

    Parameters
    ----------
    loss_func : callable
        Takes outputs (batch, ...) and targets, returns one number. Its `reduction`, or the keyword argument of that
        name of a `functools.partial`, says whether it is a mean; without one this is found by comparing.
    """

    def __init__(self, loss_func: Callable[[Any, Any], Any]) -> None:
        self._loss = loss_func
        keywords = loss_func.keywords if isinstance(loss_func, partial) else {}
        given = getattr(loss_func, "reduction", keywords.get("reduction"))
        super().__init__("mean" if given is None else _REDUCTIONS.get(given, given))
        self._is_known = given is not None
        self._shape = torch.Size()

    def bind(self, output: Any) -> ExampleLoss:
        bound = copy.copy(self)
        bound._shape = output.shape[1:]
        return bound

    def flatten(self, output: Any) -> Tensor:
        rows = checked_tensor(output)
        return rows.reshape(len(rows), -1)

    def terms(self, output: Any, y: Any) -> Terms:
        output = output.detach()
        with torch.no_grad():
            whole = self._evaluate(output, y)
            losses = torch.stack([self._evaluate(output[n : n + 1], _example(y, n)) for n in range(len(output))])
            # Twice the same example tells means from sums, also in a batch of one.
            n = int(losses.abs().argmax())
            twice = self._evaluate(_double(output[n : n + 1]), _double(_example(y, n)))
        tolerance = torch.finfo(output.dtype).eps ** 0.5 * losses.abs().sum() / len(losses)
        if not self._is_known and losses[n] != 0:
            self.reduction = "sum" if (twice - 2 * losses[n]).abs() < (twice - losses[n]).abs() else "mean"
            self._is_known = True
        expected, doubled = losses.mean(), losses[n]
        if self.reduction == "sum":
            expected, doubled, tolerance = losses.sum(), 2 * losses[n], tolerance * len(losses)
        if not ((whole - expected).abs() <= tolerance and (twice - doubled).abs() <= tolerance + 1e-3 * doubled.abs()):
            raise ValueError(
                f"`loss_func` {loss_name(self._loss)} must be the {self.reduction} of the losses of single examples, "
                f"got {whole.item():.6g} for a batch and {expected.item():.6g} from its examples. Use a loss that does "
                "not couple examples, or reduction='sum' if it divides by weights or by terms that count."
            )
        return Terms(None, len(output), y)

    def observed(self, terms: Terms) -> Any:
        return terms.observed

    def scores(self, f: Tensor, y: Any) -> OutputFactor:
        with torch.enable_grad():
            point = f.detach().requires_grad_()
            outputs = point.view(len(f), *self._shape)
            total = sum(self._evaluate(outputs[n : n + 1], _example(y, n)) for n in range(len(f)))
            if not isinstance(total, Tensor) or not total.requires_grad:
                raise ValueError(
                    f"`loss_func` {loss_name(self._loss)} must depend on the outputs, got a constant. Compute it from "
                    "the outputs in torch, without detaching."
                )
            (gradient,) = torch.autograd.grad(total, point)
        return DenseFactor(gradient.unsqueeze(1))

    def sample(self, f: Tensor, samples: int, draws: Draws) -> Any:
        raise NotImplementedError("a loss of single examples has no likelihood to draw from")

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError("a loss of single examples has no likelihood")

    def _evaluate(self, outputs: Tensor, y: Any) -> Tensor:
        value = self._loss(outputs, y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"`loss_func` {loss_name(self._loss)} must return one number for a batch, got {got}. Return the mean "
                "or the sum over the batch."
            )
        return value.reshape(())


def loss_name(loss_func: Any) -> str:
    """Return the name of a loss for errors."""
    inner = loss_func.func if isinstance(loss_func, partial) else loss_func
    return getattr(inner, "__name__", type(inner).__name__)


def _example(y: Any, n: int) -> Any:
    """Return the target of an example with a batch axis."""
    return _map(lambda t: t[n : n + 1], y)


def _double(y: Any) -> Any:
    return _map(lambda t: torch.cat([t, t]), y)


def _map(function: Callable[[Tensor], Tensor], y: Any) -> Any:
    if isinstance(y, Tensor):
        return function(y)
    if isinstance(y, Mapping):
        return {key: _map(function, item) for key, item in y.items()}
    if isinstance(y, tuple | list):
        parts = [_map(function, item) for item in y]
        return type(y)(*parts) if hasattr(y, "_fields") else type(y)(parts)
    return y
