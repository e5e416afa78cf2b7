"""A problem: model, likelihood, parameters, and what was learned about differentiating them. It knows no data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fisherops import _torch, likelihoods
from fisherops._tree import leaves, map_arrays
from fisherops.likelihoods import Likelihood
from fisherops.problem.calls import Calls, Kernels
from fisherops.problem.evaluation import MODES, SEED, Evaluation, GraphFacts
from fisherops.problem.model import ModelFunction, as_function
from fisherops.problem.moving import moved
from fisherops.problem.parameters import Parameters, as_dtype, select
from fisherops.problem.version import Version

# A check for randomness compares with these random numbers.
_OTHER_SEED = 2


class Facts:
    """What was learned about differentiation, by the signature of the graph that it was learned from."""

    def __init__(self) -> None:
        self._known: dict[int, GraphFacts] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": {}}  # signatures are of this process

    def of(self, e: Evaluation) -> GraphFacts:
        """Return what is known of graphs like that of an evaluation."""
        signature = e.signature
        if signature not in self._known:
            own = torch.finfo(e.problem.parameters.dtype).eps ** 0.5
            self._known[signature] = GraphFacts(max(own, e.measure_rounding()))
        return self._known[signature]


class Problem:
    """A model and the likelihood that its loss stands for, as functions of some parameters.

    Parameters
    ----------
    model_func, loss_func, params
        As of the operators.
    dtype : dtype or None
        Compute precision.
    any_loss : bool
        Whether losses are accepted that are not a likelihood.
    make_function : callable
        ``(model_func, parameters, functional) -> ModelFunction``, see `as_function`.

    Attributes
    ----------
    parameters : Parameters
    model : ModelFunction
    likelihood : Likelihood
        Made again when the loss has changed.
    version : Version
    facts : Facts
        Dropped when modules, their modes or hooks have changed.
    mode : Mode
        How the last model that needed J v was differentiated, and so with which kernels it is evaluated first.
    is_divided : bool
        Whether the parameters are divided among processes, so that there is reverse mode only.
    """

    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Any = None,
        *,
        dtype: Any = None,
        any_loss: bool = False,
        make_function: Callable[[Any, Parameters, bool], ModelFunction] = as_function,
    ) -> None:
        self._made_of = model_func, loss_func, params
        self._options = {"dtype": dtype, "any_loss": any_loss, "make_function": make_function}
        self._make_likelihood = functools.partial(likelihoods.of_loss, loss_func, any_loss)
        self.likelihood: Likelihood = self._make_likelihood()
        self.parameters = Parameters(select(model_func, params), as_dtype(dtype))
        self.model = make_function(model_func, self.parameters, isinstance(params, Mapping))
        self.is_divided = self.model.is_divided
        self.clones_inputs = True
        """Whether inputs are copied for each evaluation, because the model may write into them."""
        # Calls of `isolated` that are under way, and whether the model was evaluated in them.
        self._depth, self._was_called = 0, False
        self._forget()
        self.version = Version(self.model.watched, loss_func)
        self._seen = self.version.structure, self.version.loss

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters.device

    def to(self, device: torch.device) -> Problem:
        """Return the same problem on another device; see `moved`."""
        return Problem(*moved(*self._made_of, list(self.parameters.tensors), device), **self._options)

    def look(self) -> int:
        """Return the version, after making anew what belongs to an earlier one."""
        number = self.version.look()
        structure, loss = self._seen
        self._seen = self.version.structure, self.version.loss
        if self.version.loss != loss:
            self.likelihood = self._make_likelihood()
        if self.version.structure != structure:
            self._forget()
        return number

    def _forget(self) -> None:
        self.facts, self.mode = Facts(), MODES[0]
        # How uses of parameters are seen, and whether some cannot be.
        self.front: type[Calls | Kernels] = Calls
        self.hides = False

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Evaluate inside as if nothing else ran in the process, and leave no trace."""
        with _torch.isolated(self.device):
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._was_called and not self._depth:
                    self._was_called = False
                    self.version.absorb()

    def evaluate(self, X: Any, point: Mapping[str, Tensor] | None = None, records: bool = True) -> Evaluation:
        """Evaluate the model on the inputs of a batch with a graph: at the present parameters, or at a point."""
        with self.isolated():
            return Evaluation(self, self.parameters.point() if point is None else point, X, records)

    def call(self, point: Mapping[str, Tensor], X: Any, seed: int = SEED) -> Any:
        """Return the model's output at a point; every evaluation sees the same random numbers."""
        if self.clones_inputs:
            X = map_arrays(Tensor.clone, X)
        with _torch.fixed_randomness(self.device, seed):
            return self._evaluated(point, X)

    def _evaluated(self, point: Mapping[str, Tensor], X: Any) -> Any:
        self._was_called = True
        try:
            return self.model(point, X)
        except Exception as error:
            _advise(error, X)
            raise

    def flat(self, point: Mapping[str, Tensor], X: Any, seed: int = SEED) -> Tensor:
        """Return the outputs at a point, (T, C), in the compute precision."""
        return self.likelihood.flatten(self.call(point, X, seed)).to(self.parameters.dtype)

    def evaluate_twice(self, X: Any) -> tuple[Any, Tensor, bool, bool]:
        """Evaluate with one seed and with another.

        Returns
        -------
        output : object
        f : torch.Tensor
            (T, C), without a graph.
        same : bool
            Whether both evaluations gave the same outputs, to rounding.
        writes : bool
            Whether the model wrote into its inputs.
        """
        point = self.parameters.point()
        # With a graph, because models may differentiate inside.
        with torch.enable_grad():
            own = map_arrays(Tensor.clone, X)
            with _torch.fixed_randomness(self.device, SEED):
                output = self._evaluated(point, own)
            writes = any(t._version > 0 for t in leaves(own))
            f = self.likelihood.flatten(output).detach()
            again = self.flat(point, X, _OTHER_SEED).detach()
        tolerance = torch.finfo(f.dtype).eps ** 0.5 * f.abs().max() if f.numel() else 0.0
        same = again.shape == f.shape and bool(((again - f).abs() <= tolerance).all())
        return output, f, same, writes


def _advise(error: Exception, X: Any) -> None:
    """Add to an error of the user's model how it was called, and what usually helps for such inputs."""
    if any(note.startswith("`model_func`") for note in getattr(error, "__notes__", ())):
        return
    note = f"`model_func` was called as model_func(X) with X of type {type(X).__name__}."
    if isinstance(X, Mapping):
        note += (
            " To pass its items as keyword arguments, use model_func=lambda X: model(**X) (for models of Hugging Face "
            "model(**X).logits) with params=list(model.parameters())."
        )
    elif type(X) in (tuple, list):
        note += (
            " To pass its items as arguments, use model_func=lambda X: model(*X) with params=list(model.parameters())."
        )
    elif isinstance(error, TypeError) and "argument" in str(error):
        note += (
            " If the model takes several arguments, pass batches ((X1, X2), y) and model_func=lambda X: model(*X) with "
            "params=list(model.parameters())."
        )
    small = {str(t.dtype).removeprefix("torch.") for t in leaves(X)} & {"uint8", "int8", "int16"}
    if small:
        listed = ", ".join(sorted(small))
        note += f" X has dtype {listed}: convert images by `X.float() / 255`, and tokens by `X.long()`."
    error.add_note(note)
