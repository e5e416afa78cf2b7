"""One evaluation of a model: its outputs with their graph, and products with their Jacobian J."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import isnan
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.func import jvp, vmap

from fisherops import _torch
from fisherops._checks import first_line
from fisherops._memory import is_memory_error
from fisherops._tree import copied
from fisherops.likelihoods import Likelihood
from fisherops.problem.calls import Calls, Kernels, Recorder, Use
from fisherops.problem.model import ModelFunction
from fisherops.problem.parameters import Parameters
from fisherops.problem.rules import RULES
from fisherops.problem.version import Version

Result = TypeVar("Result")

# Comparisons of forward and reverse mode of custom functions.
_PROBES = 6

# Of the random numbers that every evaluation sees.
SEED = 1


class Mode(NamedTuple):
    """One way to compute J v."""

    name: str
    forward: bool
    """Forward-mode differentiation; otherwise the derivative of u ↦ Jᵀu, by a second backward pass."""
    kernels: Callable[[], AbstractContextManager[None]]


# Forward mode costs about half of double-backward. Attention and recurrent layers have fused kernels that allow
# neither on some devices; elementary kernels allow both, but are slower.
MODES = (
    Mode("forward mode", True, nullcontext),
    Mode("double-backward", False, nullcontext),
    Mode("forward mode with elementary kernels", True, _torch.elementary_kernels),
    Mode("double-backward with elementary kernels", False, _torch.elementary_kernels),
)

ELEMENTARY_ATTENTION = Mode("double-backward with elementary attention", False, _torch.elementary_attention)


class EvaluatedProblem(Protocol):
    """What an evaluation asks of its `Problem`, which makes it."""

    parameters: Parameters
    model: ModelFunction
    likelihood: Likelihood
    version: Version
    facts: Any
    mode: Mode
    front: type[Calls | Kernels]
    hides: bool
    is_divided: bool

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    def isolated(self) -> AbstractContextManager[None]:
        """Evaluate inside as if nothing else ran in the process."""

    def evaluate(self, X: Any, point: Mapping[str, Tensor]) -> Evaluation:
        """Evaluate the model on the inputs of a batch with a graph."""

    def call(self, point: Mapping[str, Tensor], X: Any) -> Any:
        """Return the model's output at a point."""

    def flat(self, point: Mapping[str, Tensor], X: Any) -> Tensor:
        """Return the outputs at a point, (T, C)."""


@dataclass
class GraphFacts:
    """What was learned about differentiating graphs of one signature."""

    tolerance: float
    """Relative difference between two ways to compute the same that rounding explains."""
    mode: Mode | None = None
    """How J v is computed, once that has agreed with reverse mode."""
    linearizes: bool = False
    """Whether the derivative of u ↦ Jᵀu has agreed with reverse mode."""
    rows: dict[tuple[int, int], Any] = field(default_factory=dict)
    """By numbers of data and of rows for each: what is known of rows that have agreed with reverse mode."""
    vectorizes: dict[str, bool] = field(default_factory=dict)
    """Whether vmap can take the model, by purpose."""

    def try_vmap(self, what: str, at_once: Callable[[], Result], one_by_one: Callable[[], Result]) -> Result:
        """Run `at_once`, or `one_by_one` if vmap cannot take the model; what failed once is not tried again.

        Errors of memory say nothing of the model and are raised.
        """
        if self.vectorizes.get(what, True):
            try:
                with nullcontext() if what in self.vectorizes else _missing_batching_rules_are_errors():
                    result = at_once()
            except Exception as error:
                if isinstance(error, FloatingPointError) or is_memory_error(error):
                    raise
                self.vectorizes[what] = False
            else:
                self.vectorizes[what] = True
                return result
        return one_by_one()


class ModesError(NotImplementedError):
    """No mode of differentiation gives products with J."""

    def __init__(self, message: str, disagrees: bool) -> None:
        super().__init__(message)
        self.disagrees = disagrees
        """Whether a forward-mode rule gave something else than reverse mode, so that one of the two is wrong."""


def derivative_not_finite() -> FloatingPointError:
    """Return the error for outputs that are finite and derivatives that are not."""
    return FloatingPointError(
        "a derivative of the model's output is NaN or infinite although the output is finite: check its operations "
        "(such as a square root or a norm at zero), or pass dtype='float64'."
    )


class Evaluation:
    """The outputs of one batch at the present parameters, with their graph.

    Parameters
    ----------
    problem : Problem
    point : mapping of str to torch.Tensor
        The values of the parameters.
    X : object
        The inputs of the batch.
    records : bool
        Whether uses of parameters are recorded, to build rows from them.

    Attributes
    ----------
    outputs : torch.Tensor
        f, (T, C), without a graph.
    output : object
        What the model returned, with a graph.
    reached : frozenset of str
        The parameters that the outputs of this batch depend on.
    uses : list of (Use, tuple of str)
        What was done with parameters, and with which.
    missed : dict
        Parameters that the outputs depend on in another way, and why they were not seen.
    facts : GraphFacts
        What is known of graphs like this one.
    """

    def __init__(self, problem: EvaluatedProblem, point: Mapping[str, Tensor], X: Any, records: bool = True) -> None:
        self.problem = problem
        self.records = records
        self.point = point
        self.X = X
        self._linear: tuple[Tensor, tuple[Tensor | None, ...]] | None = None
        self.build_graph(problem.mode)

    def build_graph(self, mode: Mode) -> None:
        """Evaluate the model with the kernels of a mode, keeping the graph for reverse mode.

        Raises
        ------
        ValueError
            If a parameter reaches the outputs other than by the values given for it.
        NotImplementedError
            If the model uses reentrant checkpoints.
        """
        problem = self.problem
        leaves = problem.model.leaves(self.point)
        with torch.enable_grad(), mode.kernels(), _torch.eager():
            f, recorder = self._recorded(leaves, problem.front)
            missed = recorder.missed(f) if recorder is not None else []
            if missed and problem.front is Calls and not problem.hides:
                # A model that differentiates inside: the kernels of its backward passes are seen, but not as calls.
                again, other = self._recorded(leaves, Kernels)
                if other is not None and len(other.missed(again)) < len(missed):
                    f, recorder, missed = again, other, other.missed(again)
                    problem.front = Kernels
                else:
                    problem.hides = True
                    f, recorder = self._recorded(leaves, problem.front)
        if recorder is not None and mode.kernels is nullcontext and _torch.is_recurrent_kernel(recorder.unknown):
            problem.mode = MODES[2]
            self.build_graph(problem.mode)  # whose steps are seen
            return
        self.kernels = mode.kernels
        self._graph: tuple[Tensor, list[Tensor]] = f, list(leaves.values())
        self.outputs = f.detach()
        self.nodes = _torch.graph_nodes(f)
        reached = {id(node.variable) for node in self.nodes if hasattr(node, "variable")}
        for name, tensor in problem.parameters.tensors.items():
            if id(tensor) in reached:
                raise ValueError(
                    f"the parameter {name!r} reaches the output where other values cannot be put in its place: "
                    "through a scripted function, a custom autograd function called with a captured tensor, or a "
                    "tensor computed from it beforehand. Pass the nn.Module itself, or a callable (params, X) -> f "
                    "with `params` a mapping."
                )
        if _torch.uses_reentrant_checkpoints(self.nodes):
            raise NotImplementedError(
                "the model uses torch.utils.checkpoint in its reentrant form, which hides parameters from the graph: "
                "pass use_reentrant=False to `checkpoint`."
            )
        self.reached = frozenset(name for name, leaf in leaves.items() if id(leaf) in reached)
        self.custom_functions = _torch.custom_functions(self.nodes)
        self._note_uses(recorder, missed)
        self.facts: GraphFacts = problem.facts.of(self)

    def _recorded(self, leaves: dict[str, Tensor], front: Any) -> tuple[Tensor, Recorder | None]:
        """Evaluate the model: f with its graph, and what was recorded of the uses of parameters."""
        problem = self.problem

        def evaluate() -> Tensor:
            self.output = problem.call(leaves, self.X)
            return problem.likelihood.flatten(self.output).to(problem.parameters.dtype)

        if not self.records:
            return evaluate(), None
        recorder = Recorder(leaves, self.X, problem.version.tensors(), problem.model, RULES)
        try:
            with front(recorder):
                return evaluate(), recorder
        except Exception:
            # Some operations cannot be seen (`torch.cond`); if the model itself is at fault, it fails again.
            return evaluate(), None

    def _note_uses(self, recorder: Recorder | None, missed: list[str]) -> None:
        self.uses: list[tuple[Use, tuple[str, ...]]] = []
        self.missed: dict[str, str] = dict.fromkeys(self.reached, "the model cannot be evaluated while calls are seen")
        if recorder is not None:
            recorder.settle()
            self.uses = [(use, recorder.owners(use)) for use in recorder.uses if use.source is not None]
            self.missed = dict.fromkeys(missed, "used past the calls of torch that are seen")

    def recorded(self) -> Evaluation:
        """Return this evaluation, or the same with the uses of parameters recorded if they were not."""
        return self if self.records else self.problem.evaluate(self.X, self.point)

    @property
    def graph(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The outputs with their graph, and the leaves that stand for the parameters in it."""
        f, leaves = self._graph
        return f, dict(zip(self.point, leaves, strict=True))

    @property
    def signature(self) -> int:
        """A number that depends on the structure of the graph."""
        return _torch.signature(self.nodes, {id(leaf): name for name, leaf in self.graph[1].items()})

    def choose_mode(self) -> None:
        """Get ready for products with J, which change `outputs` where other kernels are needed for them.

        To be called before draws are made: they must see the same outputs in every product. Torch's own rules are
        trusted for graphs with which they have agreed; batches that go through custom autograd functions, whose rules
        may depend on the data, are all looked at.
        """
        if not self.reached or (self.facts.mode is not None and not self.custom_functions):
            return
        failures = []
        # The present mode first; the graph of the batch is already built for it.
        present = self.facts.mode or self.problem.mode
        for mode in sorted(MODES, key=lambda mode: mode is not present):
            try:
                if mode.kernels is not self.kernels:
                    self.build_graph(mode)
                difference = self.difference_from_reverse(mode)
            except (NotImplementedError, RuntimeError) as error:
                if is_memory_error(error):
                    raise
                failures.append(f"{mode.name}: {first_line(error)}")
                continue
            if isnan(difference):
                raise derivative_not_finite()
            if difference <= self.facts.tolerance:
                self.facts.mode = self.problem.mode = mode
                return
            failures.append(f"{mode.name}: it differs from reverse mode by {difference:.2%}, so a derivative is wrong")
        raise ModesError(
            "the model's Jacobian cannot be multiplied with vectors, because an operation allows neither forward-mode "
            "nor double-backward differentiation: replace it, or give its autograd function a jvp. "
            + (
                f"The model uses the custom autograd functions {', '.join(sorted(self.custom_functions))}. "
                if self.custom_functions
                else ""
            )
            + f"Tried {'; '.join(failures)}.",
            disagrees=any("forward" in name and "differs" in name for name in failures),
        )

    def check_custom_functions(self) -> None:
        """Compare custom autograd functions' reverse mode with the other modes that they offer, if any."""
        if self.custom_functions and not self.problem.is_divided:
            try:
                self.choose_mode()
            except ModesError as error:
                if error.disagrees:
                    raise
                self.build_graph(MODES[0])

    def compare_with_plain(self) -> None:
        """Compare the gradient of a random sum of the outputs with that of the user's own parameters by `model(X)`.

        A custom function may reach parameters past the values that are put in their place: for instance by a module
        that it evaluates again in its backward pass.

        Raises
        ------
        NotImplementedError
            If they differ.
        """
        problem = self.problem
        tensors = problem.parameters.tensors
        own = {n: t for n, t in tensors.items() if t.requires_grad and t.is_leaf and not t._backward_hooks}
        unreached = own.keys() - self.reached
        if not own or problem.is_divided or problem.model.converts or not (self.custom_functions or unreached):
            return
        generator = torch.Generator(device=self.outputs.device).manual_seed(0)
        u = torch.randn(self.outputs.shape, dtype=self.outputs.dtype, device=self.outputs.device, generator=generator)
        with problem.isolated(), _torch.fixed_randomness(problem.device, SEED), torch.enable_grad(), self.kernels():
            output = problem.model.plain(copied(self.X))
            if output is None:
                return
            f = problem.likelihood.flatten(output).to(u.dtype)
            try:
                plain = torch.autograd.grad(f, list(own.values()), u, allow_unused=True)
            except RuntimeError:  # what cannot be differentiated by the user says nothing
                return
        ours = problem.parameters.split(self.vjp(u[None]))
        for (name, p), gradient in zip(own.items(), plain, strict=True):
            expected = torch.zeros_like(p) if gradient is None else gradient.to_dense()
            difference = float((ours[name][0] - expected).norm())
            if not difference <= self.facts.tolerance * float(expected.norm()) + 1e-12 * float(u.norm()):
                raise NotImplementedError(
                    f"the gradient of parameter {name!r} is not that of plain `model(X)`: the model reaches it past "
                    "the values that are put in its place, such as by a custom autograd function that evaluates a "
                    f"module again in its backward pass ({', '.join(sorted(self.custom_functions)) or 'none seen'}). "
                    "Use an implementation that torch differentiates through, or leave the parameter out of `params`."
                )

    def linearize(self) -> bool:
        """Keep the derivative of u ↦ Jᵀu, so that J v needs no evaluation of the model; say whether there is one."""
        f, leaves = self._graph
        u = torch.zeros_like(f, requires_grad=True)
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(f, leaves, u, create_graph=True, allow_unused=True)
            self._linear = u, gradients
            trusted = self.facts.linearizes and not self.custom_functions
            if trusted or self.difference_from_reverse(MODES[0]) <= self.facts.tolerance:
                self.facts.linearizes = True
                return True
        except (NotImplementedError, RuntimeError) as error:
            if is_memory_error(error):
                raise
        self._linear = None
        return False

    def jvp(self, V: Tensor) -> Tensor:
        """Multiply J: (K, D) → (K, T, C)."""
        if not self.reached:
            return self.outputs.new_zeros(len(V), *self.outputs.shape)
        return self._jvp(V, self.facts.mode or self.problem.mode)

    def vjp(self, U: Tensor) -> Tensor:
        """Multiply Jᵀ: (K, T, C) → (K, D)."""
        if not self.reached:
            return U.new_zeros(len(U), self.problem.parameters.numel)
        f, leaves = self._graph
        gradients = self._batched_grad([f], leaves, [U])
        return self.problem.parameters.join(dict(zip(self.point, gradients, strict=True)))

    def vjp_through(self, u: Tensor, edges: Sequence[GradientEdge]) -> tuple[Tensor, list[Tensor | None]]:
        """Multiply Jᵀ with one u (T, C): (D,), and return the gradients at some edges in the same backward pass."""
        f, leaves = self._graph
        if not self.reached:
            return u.new_zeros(self.problem.parameters.numel), [None] * len(edges)
        with self.kernels():  # for what is evaluated again in a backward pass
            inputs: list[Any] = [*leaves, *edges]
            found = torch.autograd.grad([f], inputs, [u], retain_graph=True, allow_unused=True)
        pairs = zip(found[: len(leaves)], leaves, strict=True)
        own = [x.new_zeros(1, *x.shape) if g is None else g.to_dense()[None] for g, x in pairs]
        return self.problem.parameters.join(dict(zip(self.point, own, strict=True)))[0], list(found[len(leaves) :])

    def saved_bytes(self) -> int:
        """Return the memory of the tensors that the graph of the outputs has saved."""
        return _torch.saved_bytes(self.nodes)

    def linear_bytes(self) -> int:
        """Return the memory of the tensors that the linearization has saved, with those of the graph of the outputs."""
        assert self._linear is not None
        _, gradients = self._linear
        graph = _torch.graph_nodes(self._graph[0], *(g for g in gradients if g is not None))
        return _torch.saved_bytes(graph)

    def has_fused_attention(self) -> bool:
        """Whether attention kernels are used that are slow, or impossible, to differentiate twice."""
        return _torch.has_fused_attention(self.nodes)

    def difference_from_reverse(self, mode: Mode) -> float:
        """Compare ⟨u, J v⟩ with ⟨Jᵀu, v⟩ for random u, v, relative to ‖J v‖.

        If J v is wrong by d, the difference is normally distributed with standard deviation ‖d‖ / ‖J v‖.
        """
        parameters = self.problem.parameters
        generator = torch.Generator(device=parameters.device).manual_seed(0)

        def random(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, dtype=parameters.dtype, device=parameters.device, generator=generator)

        largest = 0.0
        # A custom function may be wrong for one datum only, which one number seldom shows.
        for _ in range(_PROBES if self.custom_functions else 1):
            u, v = random((1, *self.outputs.shape)), random((1, parameters.numel))
            gradient = self.vjp(u)
            if self.custom_functions:  # that of a parameter with small gradients counts as much as the others
                for start, stop in parameters.spans.values():
                    size = gradient[:, start:stop].norm()
                    v[:, start:stop] *= torch.where(size > 0, 1 / size, torch.ones_like(size))
            Jv = self._jvp(v, mode)
            forward, reverse = float((u * Jv).sum()), float((gradient * v).sum())
            scale = float(Jv.norm()) or abs(reverse)
            difference = abs(forward - reverse) / scale if scale != 0 else 0.0
            largest = difference if isnan(difference) else max(largest, difference)
        return largest

    def measure_rounding(self) -> float:
        """Return the relative rounding of the coarsest arithmetic inside the model, if it is lower than its own."""
        seen = {self.problem.likelihood.flatten(self.output).dtype}
        seen |= {m.dtype for node in self.nodes for m in getattr(node, "_input_metadata", ())}
        if self.custom_functions:  # which may compute in another precision than their outputs have
            seen |= {t.dtype for t in _torch.saved_tensors(self.nodes)}
        parameters = self.problem.parameters
        own = torch.finfo(parameters.dtype).eps
        precisions = [torch.finfo(dtype).eps for dtype in seen if dtype.is_floating_point]
        coarse = [10 * eps for eps in precisions if eps > own]
        flags: Any = torch.backends
        tf32 = "tf32" in (flags.cudnn.conv.fp32_precision, flags.cuda.matmul.fp32_precision)
        if tf32 and parameters.device.type != "cpu" and parameters.dtype == torch.float32:
            # TF32 has 10 bits of mantissa; convolutions use it unless the user switches it off.
            coarse.append(10 * 2.0**-10)
        return max(coarse, default=0.0)

    def _jvp(self, V: Tensor, mode: Mode) -> Tensor:
        tangents = self.problem.parameters.split(V)
        if self._linear is not None:
            return self._derivative(*self._linear, tangents)
        with torch.enable_grad(), mode.kernels():
            return self._forward(tangents) if mode.forward else self._double_backward(tangents)

    def _forward(self, tangents: Mapping[str, Tensor]) -> Tensor:
        def one_column(tangent: dict[str, Tensor]) -> Tensor:
            flat = self.problem.flat
            result: Tensor = jvp(lambda point: flat(point, self.X), (dict(self.point),), (tangent,))[1]
            return result

        def one_by_one() -> Tensor:
            return torch.stack([one_column({name: t[k] for name, t in tangents.items()}) for k in range(K)])

        K = len(next(iter(tangents.values())))
        with torch.no_grad():
            if K == 1:
                return one_by_one()
            at_once = vmap(one_column, randomness="same")
            return self.facts.try_vmap("jvp", lambda: at_once(dict(tangents)), one_by_one)

    def _double_backward(self, tangents: Mapping[str, Tensor]) -> Tensor:
        f, leaves = self._graph
        u = torch.zeros_like(f, requires_grad=True)
        gradients = torch.autograd.grad(f, leaves, u, create_graph=True, allow_unused=True)
        return self._derivative(u, gradients, tangents)

    def _derivative(self, u: Tensor, gradients: tuple[Tensor | None, ...], tangents: Mapping[str, Tensor]) -> Tensor:
        """Differentiate ⟨Jᵀu, v⟩ by u."""
        used = [(g, t) for g, t in zip(gradients, tangents.values(), strict=True) if g is not None and g.requires_grad]
        if not used:
            raise RuntimeError("the backward pass is not differentiable")
        return self._batched_grad([g for g, _ in used], [u], [t for _, t in used])[0]

    def _batched_grad(self, outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        """Return Σ over outputs of cotangentᵀ ∂output/∂input, for cotangents stacked along a leading axis K."""

        def grad(cotangent: list[Tensor], batched: bool) -> tuple[Tensor, ...]:
            with self.kernels():  # for what is evaluated again in a backward pass
                gradients: tuple[Tensor, ...] = torch.autograd.grad(
                    outputs, inputs, cotangent, retain_graph=True, is_grads_batched=batched, allow_unused=True,
                    materialize_grads=not batched,
                )  # fmt: skip
            return gradients

        def one_by_one() -> list[Tensor]:
            # Copies, because complex views need an even offset.
            columns = [grad([c[k].clone() for c in cotangents], batched=False) for k in range(K)]
            # Embeddings may give sparse gradients.
            return [torch.stack([g.to_dense() for g in parts]) for parts in zip(*columns, strict=True)]

        def at_once() -> list[Tensor]:
            gradients = grad(cotangents, batched=True)
            # A parameter that the model does not use has gradient None, that is zero.
            return [
                x.new_zeros(K, *x.shape) if g is None else g.to_dense() for g, x in zip(gradients, inputs, strict=True)
            ]

        K = len(cotangents[0])
        return one_by_one() if K == 1 else self.facts.try_vmap("vjp", at_once, one_by_one)


@contextmanager
def _missing_batching_rules_are_errors() -> Iterator[None]:
    """Refuse vmap's own loop over columns: it is no faster than ours, and it warns the user about torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop", UserWarning)
        yield
