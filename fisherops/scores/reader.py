"""Reading the data of a problem: each batch evaluated, with what its output factor is made from, and c."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays, _torch
from fisherops._checks import noting, prefixing
from fisherops._data import Batch, Data
from fisherops._tree import copied
from fisherops.likelihoods import Likelihood, Terms
from fisherops.problem import Problem
from fisherops.scores.kinds import FactorOf, Kind, terms_of


def itself(tensor: Tensor) -> Tensor:
    """Return a tensor as it is: the sum over one process."""
    return tensor


class Reader:
    """A problem with data and a kind of output factor.

    Parameters
    ----------
    problem : Problem
    data : Data
    kind : Kind
    name : str
        Of the operator, for errors and progress.
    rows : {"term", "datum"}
    checks : bool
        Whether layers that are random or couple data are refused.
    weights : torch.Tensor or None
        The weight of each example by its index in the data set, (N,) in float64 on the CPU.
    stream : int
        Number of the stream of draws, where data that other processes read have others.
    total : callable
        Sums a small tensor over all processes that share the data.
    reduction : {"mean", "sum"}, optional
        In place of the loss's own.

    Attributes
    ----------
    c : torch.Tensor or None
        What each head of the loss is divided by, if it is known.
    sums : bool
        Whether the vectors of the terms of a datum are summed.
    """

    def __init__(
        self,
        problem: Problem,
        data: Data,
        kind: Kind,
        *,
        name: str,
        rows: str,
        checks: bool,
        weights: Tensor | None = None,
        stream: int = 0,
        total: Callable[[Tensor], Tensor] = itself,
        reduction: str | None = None,
    ) -> None:
        if rows not in ("term", "datum"):
            raise ValueError(f"`rows` must be 'term' or 'datum', got {rows!r}.")
        if rows == "datum" and not kind.may_sum_terms:
            raise ValueError(f"`rows` must be 'term' for kind={kind.name!r}, got 'datum'. Leave it out.")
        self.problem, self.data, self.kind, self.name = problem, data, kind, name
        self.sums, self.checks, self.weights = rows == "datum", checks, weights
        self.stream, self._total, self._reduction = stream, total, reduction
        self.c: Tensor | None = None
        self._divisors = Divisors(problem.likelihood, self._reduction)
        self._reached: frozenset[str] = frozenset()
        self._structure, self._loss = problem.version.structure, problem.version.loss

    @property
    def finds_c_late(self) -> bool:
        """Whether c is found by the pass that needs it: there is one head, whose rows can be divided afterwards."""
        return self.c is None and len(self.problem.likelihood.reductions) == 1

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of the loss."""
        return tuple(self._reduction or reduction for reduction in self.problem.likelihood.reductions)

    @property
    def repeats(self) -> tuple[bool, bool]:
        """Whether the next pass checks the model again, and whether it sums c again."""
        version = self.problem.version
        return self.checks and self._structure != version.structure, self.c is None or self._loss != version.loss

    @contextmanager
    def reading(self, description: str) -> Iterator[Iterator[Batch]]:
        """Read all data once, with the model evaluated as if nothing else ran in the process."""
        with torch.no_grad(), self.problem.isolated():
            self.problem.model.check_unchanged()
            with self.problem.model.refuse_faults() if self.checks else nullcontext():
                self._follow_changes()
                with self._batches(description) as batches:
                    yield batches

    def of_data(self, data: Data, kind: Kind, *, rows: str | None, reduction: str, weights: Tensor | None) -> Reader:
        """Return a reader of other data for the same problem; `rows` are as here if they are None."""
        if rows is None:
            rows = "datum" if self.sums and kind.may_sum_terms else "term"
        return Reader(
            self.problem,
            data,
            kind,
            name=f"kind={kind.name!r}",
            rows=rows,
            checks=self.checks,
            weights=weights,
            stream=self.stream,
            total=self._total,
            reduction=reduction,
        )

    def to(self, device: torch.device) -> Reader:
        """Return a reader of the same data for the same problem on another device, with the same draws.

        Raises
        ------
        ValueError
            If the draws are a stream, which each device has its own of, or the problem cannot be moved.
        """
        if self.kind.order == "fixed":
            raise ValueError(
                "an operator with sampler='stream' cannot be moved, because the generators of each device draw other "
                f"numbers: its matrix would be another one. Make it anew on {device}, or use sampler='counter'."
            )
        other = copy.copy(self)
        other.problem, other.data = self.problem.to(device), self.data.to(device)
        other._structure, other._loss = other.problem.version.structure, other.problem.version.loss
        return other

    def of_kind(self, kind: Kind) -> Reader:
        """Return a reader of the same data for another kind."""
        other = copy.copy(self)
        other.kind = kind
        return other

    def evaluations(
        self, batches: Iterator[Batch], known: Any = (), records: bool = True
    ) -> Iterator[tuple[Batch, Any, Any]]:
        """Evaluate batches, and find c if it is not known.

        Parameters
        ----------
        batches : iterator of Batch
        known : container of int
            Numbers of batches that are not evaluated if they are those of earlier passes.
        records : bool
            Whether uses of parameters are recorded, to build rows from them.

        Yields
        ------
        batch : Batch
        evaluation : Evaluation
        factor_of : FactorOf
            Both None for a known batch.
        """
        problem, kind = self.problem, self.kind
        sampler = kind.sampler(self.stream, problem.device)
        divisors, reached, skipped = Divisors(problem.likelihood, self._reduction), frozenset[str](), False
        c = torch.ones(1, dtype=torch.float64, device="cpu") if self.finds_c_late else self.divisor()
        # A graph that is kept must not share memory with the user, and products must round the same whether it is kept
        # or not, which depends on how tensors are aligned.
        point = problem.parameters.point(copied=True)
        for batch in batches:
            if batch.number in known and batch.as_before:
                skipped = True
                yield batch, None, None
                continue
            with noting(f"batch {batch.number}"):
                evaluation = problem.evaluate(copied(batch.X), point, records)
                _check_not_empty(evaluation.outputs, batch)
                if not reached:
                    evaluation.compare_with_plain()
            reached |= evaluation.reached
            terms = self._terms(evaluation.output, batch)
            _check_finite(evaluation.outputs, batch)
            divisors.add(terms)
            if self.sums or kind.by_datum:
                _check_terms_by_datum(evaluation.outputs, batch)
            draws = sampler.batch(batch.places) if sampler is not None else None
            factor_of = FactorOf(
                kind,
                problem.likelihood,
                batch.y,
                evaluation.output,
                terms,
                batch.size,
                batch.places,
                draws,
                c,
                self.sums,
                self._weights_of(batch),
            )
            yield batch, evaluation, factor_of
        if not skipped:
            self._finish(reached, divisors)

    def gradients(self, batches: Iterator[Batch]) -> Iterator[Tensor]:
        """Compute each batch's part of the gradient of the loss, by reverse mode alone: (D,), Jᵀ Σ (w/c) s."""
        problem, c = self.problem, self.divisor()
        point = problem.parameters.point()
        divisors, reached = Divisors(problem.likelihood, self._reduction), frozenset[str]()
        for batch in batches:
            with noting(f"batch {batch.number}"):
                evaluation = problem.evaluate(batch.X, point, records=False)
            reached |= evaluation.reached
            terms = self._terms(evaluation.output, batch, needs_targets=True)
            q, f = problem.likelihood.bind(evaluation.output), evaluation.outputs
            _check_finite(f, batch)
            divisors.add(terms)
            root = q.scale(f, terms, c)
            factor = q.scores(f, q.observed(terms)).scaled(root).scaled(root)
            summed = factor.apply(f.new_ones(1, factor.blocks, factor.rank))
            yield evaluation.vjp(summed.reshape(1, *f.shape))[0]
        self._finish(reached, divisors)

    def divisor(self) -> Tensor:
        """Return c, found by a pass over the data that only evaluates the model if it is not known."""
        if self.c is None:
            divisors = Divisors(self.problem.likelihood, self._reduction)
            if divisors.needed:
                point = self.problem.parameters.point()
                # The pass that follows must find the same random numbers: a loader may shuffle by them.
                with _torch.fixed_randomness(self.problem.device, 0), self._batches("normalization") as batches:
                    for batch in batches:
                        # With a graph, because models may differentiate inside.
                        with noting(f"batch {batch.number}"), torch.enable_grad():
                            output = self.problem.call(point, batch.X)
                        divisors.add(self._terms(output, batch))
            self._divisors, self.c = divisors, divisors.total(self._total)
        return self.c

    def count(self) -> int:
        """Read the data once, and return the number of batches."""
        with self.problem.isolated(), self._batches("first pass") as batches:
            return sum(1 for _ in batches)

    def check(self) -> None:
        """Evaluate the model twice and read the data twice, with other random numbers each time.

        Raises
        ------
        RuntimeError
            If two evaluations differ, or the data.
        """
        problem = self.problem
        writes, problem.clones_inputs = False, True
        divisors = Divisors(problem.likelihood, self._reduction)
        with problem.isolated(), torch.no_grad(), problem.model.refuse_faults():
            with self._batches("check") as batches:
                for batch in batches:
                    with noting(f"batch {batch.number}"):
                        output, f, same, wrote = problem.evaluate_twice(batch.X)
                    _check_not_empty(f, batch)
                    writes = writes or wrote
                    divisors.add(self._terms(output, batch))
                    _check_finite(f, batch)
                    if not same:
                        raise RuntimeError(
                            f"the model is not deterministic: two evaluations of batch {batch.number} differ. Switch "
                            "the randomness off (`model.eval()`, no functional dropout in training mode), or pass "
                            "check_deterministic=False to take it with fixed random numbers."
                        )
            if not self.data.is_stored:
                with _torch.fixed_randomness(problem.device, 2), self._batches("check") as batches:
                    for _ in batches:
                        pass
        problem.clones_inputs = writes
        self._divisors, self.c = divisors, divisors.total(self._total)

    def _follow_changes(self) -> None:
        """Repeat the checks if modules, modes or hooks have changed, and forget c if the loss has."""
        version = self.problem.version
        if self._structure != version.structure:
            if self.checks:
                self.check()
            self._structure = version.structure
        if self._loss != version.loss:
            self.c, self._loss = None, version.loss

    @contextmanager
    def _batches(self, description: str) -> Iterator[Iterator[Batch]]:
        with closing(self.data.batches(f"{self.name} {description}")) as batches:
            yield batches
        self._check_weights()

    def _terms(self, output: Any, batch: Batch, needs_targets: bool = False) -> Terms:
        if not self.kind.needs_terms and not needs_targets:
            return Terms(None, 0, None)
        # Whether a distribution depends on the parameters shows in its graph.
        with prefixing(f"batch {batch.number}"), torch.enable_grad():
            if batch.y is None and needs_targets:
                raise ValueError("the targets y must be given for the gradient of the loss, got None. Pass (X, y).")
            if batch.y is None and self.kind.needs_targets:
                raise ValueError(
                    f"the targets y must be given for {self.name}, got None. Pass (X, y), or use "
                    "FisherMCLinearOperator or FisherLinearOperator (kind='mc' or 'exact'), which most losses need no "
                    "targets for."
                )
            return terms_of(self.problem.likelihood, output, batch.y, self._weights_of(batch))

    def _weights_of(self, batch: Batch) -> Tensor | None:
        """Return the weights of a batch's examples, (size,), if there are weights."""
        if self.weights is None:
            return None
        index = batch.places.cpu()
        if int(index.max()) >= len(self.weights):
            raise ValueError(
                f"`sample_weight` must have a weight for each example, got {len(self.weights)} weights and an example "
                f"with the index {int(index.max())}."
            )
        return self.weights[index].to(self.problem.device)

    def _check_weights(self) -> None:
        """Raise ValueError unless there is a weight for each example, if they are numbered by their order."""
        data, weights = self.data, self.weights
        if weights is None or data.is_indexed:
            return
        if not data.has_known_order:
            raise ValueError(
                "`sample_weight` needs to know the examples, and the DataLoader samples them in an order of its own. "
                "Let it yield (X, y, index)."
            )
        if data.total != len(weights):
            raise ValueError(
                f"`sample_weight` must have a weight for each example, got {len(weights)} weights for {data.total} "
                "examples."
            )

    def _finish(self, reached: frozenset[str], divisors: Divisors) -> None:
        """Compare what a pass over all data found with what earlier passes did."""
        if self.data.num_data:
            self._check_reached(reached)
        if self.c is None:
            self._divisors, self.c = divisors, divisors.total(self._total)
        elif not torch.allclose(divisors.sum, self._divisors.sum, rtol=1e-6):
            raise RuntimeError(
                "what reduction='mean' divides by changed from one pass to the next: the weights of the loss were "
                "changed. Make a new operator."
            )

    def _check_reached(self, reached: frozenset[str]) -> None:
        """Compare the parameters that the outputs depend on with those of earlier passes."""
        lost = self._reached - reached
        if lost and reached:
            raise RuntimeError(
                f"the model's output no longer depends on the parameters {sorted(lost)}: they were replaced by other "
                "tensors, or the model was changed. Make a new operator."
            )
        self._reached = self._reached | reached
        if not reached:
            raise ValueError(
                "the model's output does not depend on any of `params`, so its Fisher is zero: check that the "
                "parameters are those that the model uses, and that it does not detach them."
            )


class Divisors:
    """The sum over the data of what ``reduction="mean"`` divides by, for each head of the model."""

    def __init__(self, likelihood: Likelihood, reduction: str | None) -> None:
        self._likelihood, self._reduction = likelihood, reduction
        self.sum = torch.zeros(len(likelihood.reductions), dtype=torch.float64, device="cpu")
        self.needed = bool(self._mean.any())
        self._is_empty = True

    @property
    def _mean(self) -> Tensor:
        # Of some losses this is known when the first batch was looked at.
        own = (self._reduction or reduction for reduction in self._likelihood.reductions)
        return torch.tensor([reduction == "mean" for reduction in own], device="cpu")

    def add(self, terms: Terms) -> None:
        """Add those of one batch."""
        self._is_empty = False
        self.sum = self.sum + torch.as_tensor(terms.divisor, dtype=torch.float64, device="cpu") * self._mean

    def total(self, over_processes: Callable[[Tensor], Tensor]) -> Tensor:
        """Return c for each head: 1 where the reduction is a sum."""
        total = over_processes(self.sum.clone())
        zero = self._mean & (total == 0)
        if zero.any() and not self._is_empty:
            raise ValueError(
                "every loss term of the data is ignored or has weight 0, so reduction='mean' divides by zero: "
                "check `ignore_index`, the class weights and `sample_weight`, or use reduction='sum'."
            )
        return torch.where(self._mean & ~zero, total, torch.ones_like(total))


def as_weights(sample_weight: Any) -> Tensor:
    """Return the weights of examples as a tensor (N,) of our own in float64 on the CPU."""
    if not _arrays.is_array(sample_weight):
        sample_weight = np.asarray(sample_weight)
    is_number = not isinstance(sample_weight, np.ndarray) or sample_weight.dtype.kind in "biuf"
    if sample_weight.ndim != 1 or not is_number or "complex" in str(sample_weight.dtype):
        raise ValueError(
            "`sample_weight` must be real numbers of shape (N,), one for each example, got shape "
            f"{tuple(sample_weight.shape)} of {sample_weight.dtype}."
        )
    weights = _arrays.to_tensor(sample_weight, "sample_weight").to("cpu", torch.float64, copy=True)
    wrong = ~(weights.isfinite() & (weights >= 0))
    if wrong.any():
        number = int(wrong.nonzero()[0])
        raise ValueError(
            f"`sample_weight` must be finite and at least 0, got {float(weights[number])} for example {number}."
        )
    return weights


def name_of_loss(loss_func: Any) -> str:
    """Name a loss with its reduction, and each of several losses."""
    if loss_func is None:
        return "None (distributions)"
    if isinstance(loss_func, Mapping):
        return f"{{{', '.join(f'{key!r}: {name_of_loss(loss)}' for key, loss in loss_func.items())}}}"
    if isinstance(loss_func, tuple | list):
        return f"({', '.join(map(name_of_loss, loss_func))})"
    name = getattr(loss_func, "__name__", type(loss_func).__name__)
    reduction = getattr(loss_func, "reduction", None)
    return name if reduction is None else f"{name}({reduction!r})"


def _check_terms_by_datum(f: Tensor, batch: Batch) -> None:
    if len(f) % batch.size:
        raise ValueError(
            f"batch {batch.number} has {len(f)} loss terms for {batch.size} data, so they do not belong to data in "
            "equal numbers: use rows='term', and sampler='stream' for a Monte-Carlo Fisher."
        )


def _check_not_empty(f: Tensor, batch: Batch) -> None:
    if not f.numel():
        raise ValueError(
            f"the model must return outputs, got none for batch {batch.number} of {batch.size} examples. Leave such "
            "batches out."
        )


def _check_finite(f: Tensor, batch: Batch) -> None:
    if not f.isfinite().all():
        kind = "NaN" if f.isnan().any() else "infinity"
        raise FloatingPointError(
            f"the model's output for batch {batch.number} contains {kind}: check the inputs and the parameters. (For "
            "classes that are not allowed, use logits of -1e9 and not -inf.)"
        )
