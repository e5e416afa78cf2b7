"""Products with the Jacobian J of a batch's outputs, by whatever mode of differentiation the model allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import isnan
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherops._checks import first_line
from fisherops._model import detached_leaves, plain_kernels
from fisherops._params import Parameters

Result = TypeVar("Result")
Function = Callable[[Mapping[str, Tensor], Any], Any]


class _Mode(NamedTuple):
    """One way to compute J v."""

    name: str
    forward: bool
    """Forward-mode differentiation; otherwise the derivative of u ↦ Jᵀu, by a second backward pass."""
    kernels: Callable[[], AbstractContextManager[None]]


# Forward mode costs about half of double-backward. Attention and recurrent layers have fused kernels that allow
# neither on some devices; elementary kernels allow both, but are slower.
_MODES = (
    _Mode("forward mode", True, nullcontext),
    _Mode("double-backward", False, nullcontext),
    _Mode("forward mode with elementary kernels", True, plain_kernels),
    _Mode("double-backward with elementary kernels", False, plain_kernels),
)

ELEMENTARY_ATTENTION = _Mode("double-backward with elementary attention", False, lambda: sdpa_kernel(SDPBackend.MATH))


class Differentiation:
    """The model as a differentiable function, and what was learnt about how it can be differentiated.

    Parameters
    ----------
    function : callable
        ``(point, X) -> output``, whatever the model returns.
    flatten : callable
        Arranges an output as a tensor (T, C), one row for each loss term.
    parameters : Parameters
    leaves : callable or None
        ``point -> leaves``, the tensors that stand for the parameters in a graph; None makes them of the point.
    sharded : bool
        Whether the parameters are divided among processes, so that there is reverse mode only.
    """

    def __init__(
        self,
        function: Function,
        flatten: Callable[[Any], Tensor],
        parameters: Parameters,
        leaves: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = detached_leaves,
        sharded: bool = False,
    ) -> None:
        self.function, self.leaves, self.sharded = function, leaves, sharded
        self.flatten = flatten
        self.parameters = parameters
        self.mode: _Mode | None = None
        self.tolerance = torch.finfo(parameters.dtype).eps ** 0.5
        """Relative difference between two ways to compute the same that rounding explains."""
        self.linearizes = False
        """Whether a linearization that is kept has agreed with reverse mode; then torch's own rules are trusted."""
        self._rounding_is_known = False
        self._vectorizes: dict[str, bool] = {}

    def flat(self, point: Mapping[str, Tensor], X: Any) -> Tensor:
        """Evaluate the model: outputs (T, C)."""
        return self.flatten(self.function(point, X)).to(self.parameters.dtype)

    def at(self, point: Mapping[str, Tensor], X: Any) -> BatchJacobian:
        """Evaluate the model on a batch at `point`, ready to multiply with its Jacobian."""
        return BatchJacobian(self, point, X)

    def vectorized(self, what: str, at_once: Callable[[], Result], one_by_one: Callable[[], Result]) -> Result:
        """Run `at_once`, or `one_by_one` where vmap cannot take the model; what failed once is not tried again."""
        if self._vectorizes.get(what, True):
            try:
                with nullcontext() if what in self._vectorizes else _missing_batching_rules_are_errors():
                    result = at_once()
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError, ValueError, IndexError, UserWarning):
                self._vectorizes[what] = False
            else:
                self._vectorizes[what] = True
                return result
        return one_by_one()

    @property
    def kernels(self) -> Callable[[], AbstractContextManager[None]]:
        """The kernels that the model is evaluated with."""
        return (self.mode or _MODES[0]).kernels

    def note_rounding(self, jacobian: BatchJacobian) -> None:
        """Widen the tolerance where the model computes in half precision inside; found once, from its graph."""
        if not self._rounding_is_known:
            self.tolerance = max(self.tolerance, jacobian.rounding())
            self._rounding_is_known = True

    def settle(self, jacobian: BatchJacobian) -> None:
        """Make sure that the mode works on a batch and agrees with reverse mode there.

        Torch's own rules are trusted once they have agreed; batches that go through custom autograd functions, whose
        rules may depend on the data, are all looked at.
        """
        custom = jacobian.custom_functions()
        if self.mode is not None and not custom:
            return
        failures = []
        # The present mode first; the graph of the batch is already built for it.
        for mode in sorted(_MODES, key=lambda mode: mode is not self.mode):
            try:
                if mode is not self.mode:
                    jacobian.build_graph(mode)
                difference = jacobian.difference_from_reverse(mode)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                failures.append(f"{mode.name}: {first_line(error)}")
                continue
            if isnan(difference):
                raise derivative_not_finite()
            if difference <= self.tolerance:
                self.mode = mode
                return
            failures.append(f"{mode.name}: it differs from reverse mode by {difference:.2%}, so a derivative is wrong")
        raise ModesError(
            "the model's Jacobian cannot be multiplied with vectors, because an operation allows neither forward-mode "
            "nor double-backward differentiation: replace it, or give its autograd function a jvp. "
            + (f"The model uses the custom autograd functions {', '.join(sorted(custom))}. " if custom else "")
            + f"Tried {'; '.join(failures)}.",
            disagrees=any("forward" in name and "differs" in name for name in failures),
        )


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


class BatchJacobian:
    """J of one batch, (T·C) × D, at one point.

    Attributes
    ----------
    outputs : torch.Tensor
        f, (T, C), without a graph.
    output : object
        What the model returned, with a graph.
    reached : frozenset of str
        The parameters that the outputs of this batch depend on.
    """

    def __init__(self, differentiation: Differentiation, point: Mapping[str, Tensor], X: Any) -> None:
        self.differentiation = differentiation
        self.point = point
        self.X = X
        self._linear: tuple[Tensor, tuple[Tensor | None, ...]] | None = None
        self.build_graph(differentiation.mode or _MODES[0])
        differentiation.note_rounding(self)

    @property
    def graph(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The outputs with their graph, and the leaves that stand for the parameters in it."""
        f, leaves = self._graph
        return f, dict(zip(self.point, leaves, strict=True))

    def settle(self) -> None:
        """Get ready for products with J, which change `outputs` where other kernels are needed for them.

        To be called before draws are made: they must see the same outputs in every product.
        """
        if self.reached:
            self.differentiation.settle(self)

    def check_custom_functions(self) -> None:
        """Compare custom autograd functions' reverse mode with the other modes that they offer, if any."""
        if self.custom_functions() and not self.differentiation.sharded:
            try:
                self.settle()
            except ModesError as error:
                if error.disagrees:
                    raise
                self.build_graph(_MODES[0])

    def linearize(self) -> bool:
        """Keep the derivative of u ↦ Jᵀu, so that J v needs no evaluation of the model; say whether there is one."""
        f, leaves = self._graph
        u = torch.zeros_like(f, requires_grad=True)
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(f, leaves, u, create_graph=True, allow_unused=True)
            self._linear = u, gradients
            trusted = self.differentiation.linearizes and not self.custom_functions()
            if trusted or self.difference_from_reverse(_MODES[0]) <= self.differentiation.tolerance:
                self.differentiation.linearizes = True
                return True
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            pass
        self._linear = None
        return False

    def jvp(self, V: Tensor) -> Tensor:
        """Multiply J with columns: (D, K) → (K, T, C)."""
        if not self.reached:
            return self.outputs.new_zeros(V.shape[1], *self.outputs.shape)
        return self._jvp(V, self.differentiation.mode or _MODES[0])

    def vjp(self, U: Tensor) -> Tensor:
        """Multiply Jᵀ: (K, T, C) → (D, K)."""
        if not self.reached:
            return U.new_zeros(self.differentiation.parameters.numel, len(U))
        f, leaves = self._graph
        gradients = self._batched_grad([f], leaves, [U])
        return self.differentiation.parameters.join(dict(zip(self.point, gradients, strict=True)))

    def build_graph(self, mode: _Mode) -> None:
        """Evaluate the model with the kernels of a mode, keeping the graph for reverse mode.

        Raises
        ------
        ValueError
            If a parameter reaches the outputs other than by the values given for it.
        """
        leaves = self.differentiation.leaves(self.point)
        with torch.enable_grad(), mode.kernels():
            self.output = self.differentiation.function(leaves, self.X)
            f = self.differentiation.flatten(self.output).to(self.differentiation.parameters.dtype)
            self._graph: tuple[Tensor, list[Tensor]] = f, list(leaves.values())
        self.outputs = f.detach()
        reached = {id(node.variable) for node in self._nodes() if hasattr(node, "variable")}
        for name, tensor in self.differentiation.parameters.tensors.items():
            if id(tensor) in reached:
                raise ValueError(
                    f"the parameter {name!r} reaches the output where other values cannot be put in its place: "
                    "through a scripted function, a custom autograd function called with a captured tensor, or a "
                    "tensor computed from it beforehand. Pass the nn.Module itself, or a callable (params, X) -> f "
                    "with `params` a mapping."
                )
        self.reached = frozenset(name for name, leaf in leaves.items() if id(leaf) in reached)

    def difference_from_reverse(self, mode: _Mode) -> float:
        """Compare ⟨u, J v⟩ with ⟨Jᵀu, v⟩ for random u, v, relative to ‖J v‖.

        If J v is wrong by d, the difference is normally distributed with standard deviation ‖d‖ / ‖J v‖.
        """
        parameters = self.differentiation.parameters
        generator = torch.Generator(device=parameters.device).manual_seed(0)

        def random(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, dtype=parameters.dtype, device=parameters.device, generator=generator)

        v = random((parameters.numel, 1))
        Jv = self._jvp(v, mode)
        u = random(Jv.shape)
        forward, reverse = float((u * Jv).sum()), float((self.vjp(u) * v).sum())
        scale = float(Jv.norm()) or abs(reverse)
        return abs(forward - reverse) / scale if scale != 0 else 0.0

    def custom_functions(self) -> frozenset[str]:
        """Name the torch.autograd.Function subclasses in the graph of the outputs."""
        custom = (n for n in self._nodes() if isinstance(n, torch.autograd.function.BackwardCFunction))
        return frozenset(type(node).__name__.removesuffix("Backward") for node in custom)

    def rounding(self) -> float:
        """Return the relative rounding of the coarsest arithmetic inside the model, where it is lower than its own."""
        seen = {self.differentiation.flatten(self.output).dtype}
        for node in self._nodes():
            saved = (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
            seen |= {t.dtype for t in saved if isinstance(t, Tensor)}
        parameters = self.differentiation.parameters
        own = torch.finfo(parameters.dtype).eps
        precisions = [torch.finfo(dtype).eps for dtype in seen if dtype.is_floating_point]
        coarse = [10 * eps for eps in precisions if eps > own]
        tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        if tf32 and parameters.device.type == "cuda" and parameters.dtype == torch.float32:
            # TF32 has 10 bits of mantissa; convolutions use it unless the user switches it off.
            coarse.append(10 * 2.0**-10)
        return max(coarse, default=0.0)

    def _jvp(self, V: Tensor, mode: _Mode) -> Tensor:
        tangents = self.differentiation.parameters.split(V)
        if self._linear is not None:
            return self._derivative(*self._linear, tangents)
        with torch.enable_grad(), mode.kernels():
            return self._forward(tangents) if mode.forward else self._double_backward(tangents)

    def _forward(self, tangents: Mapping[str, Tensor]) -> Tensor:
        def one_column(tangent: dict[str, Tensor]) -> Tensor:
            flat = self.differentiation.flat
            result: Tensor = jvp(lambda point: flat(point, self.X), (dict(self.point),), (tangent,))[1]
            return result

        def one_by_one() -> Tensor:
            return torch.stack([one_column({name: t[k] for name, t in tangents.items()}) for k in range(K)])

        K = len(next(iter(tangents.values())))
        with torch.no_grad():
            if K == 1:
                return one_by_one()
            at_once = vmap(one_column, randomness="same")
            return self.differentiation.vectorized("jvp", lambda: at_once(dict(tangents)), one_by_one)

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
            gradients: tuple[Tensor, ...] = torch.autograd.grad(
                outputs, inputs, cotangent, retain_graph=True, is_grads_batched=batched, allow_unused=True,
                materialize_grads=not batched,
            )  # fmt: skip
            return gradients

        def one_by_one() -> list[Tensor]:
            columns = [grad([c[k] for c in cotangents], batched=False) for k in range(K)]
            # Embeddings may give sparse gradients.
            return [torch.stack([g.to_dense() for g in parts]) for parts in zip(*columns, strict=True)]

        def at_once() -> list[Tensor]:
            gradients = grad(cotangents, batched=True)
            # A parameter that the model does not use has gradient None, that is zero.
            return [
                x.new_zeros(K, *x.shape) if g is None else g.to_dense() for g, x in zip(gradients, inputs, strict=True)
            ]

        K = len(cotangents[0])
        return one_by_one() if K == 1 else self.differentiation.vectorized("vjp", at_once, one_by_one)

    def _nodes(self) -> list[Any]:
        """List the nodes of the autograd graph of the outputs."""
        found: list[Any] = []
        seen: set[Any] = {None}
        waiting: list[Any] = [self._graph[0].grad_fn]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                found.append(node)
                waiting.extend(parent for parent, _ in node.next_functions)
        return found


@contextmanager
def _missing_batching_rules_are_errors() -> Iterator[None]:
    """Refuse vmap's own loop over columns: it is no faster than ours, and it warns the user about torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop", UserWarning)
        yield
