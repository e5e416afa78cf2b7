"""Products with the Jacobian J of a batch's outputs, by whatever mode of differentiation the model allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import jvp, vmap

from fisherops._model import plain_kernels
from fisherops._params import Parameters

Result = TypeVar("Result")
Function = Callable[[Mapping[str, Tensor], Any], Tensor]


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


# Relative disagreement of J and Jᵀ that half precision inside a model explains (seen: up to 0.3 %).
_ROUGH = 0.02


class Differentiation:
    """The model as a differentiable function, and what was learnt about how it can be differentiated.

    Parameters
    ----------
    function : callable
        ``(point, X) -> f`` with outputs of any shape.
    flatten : callable
        Arranges outputs as (T, C), one row for each loss term.
    parameters : Parameters
    """

    def __init__(self, function: Function, flatten: Callable[[Tensor], Tensor], parameters: Parameters) -> None:
        self.function = function
        self.flatten = flatten
        self.parameters = parameters
        self.mode: _Mode | None = None
        self._vectorizes: dict[str, bool] = {}

    def flat(self, point: Mapping[str, Tensor], X: Any) -> Tensor:
        """Evaluate the model: outputs (T, C)."""
        return self.flatten(self.function(point, X))

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

    def reject(self, what: str) -> None:
        """Note that the vectorized way gave a wrong result."""
        self._vectorizes[what] = False

    def choose_mode(self, jacobian: BatchJacobian) -> _Mode:
        """Find a mode that works on a batch and agrees with reverse mode; the batch is left in that mode.

        The first that agrees to rounding is taken. Where none does, because the model itself computes in half
        precision somewhere, it is the first that agrees roughly.
        """
        failures, rough = [], None
        for mode in _MODES:
            try:
                discrepancy = _discrepancy(jacobian, mode)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                failures.append(f"{mode.name}: {_first_line(error)}")
                continue
            if discrepancy <= torch.finfo(self.parameters.dtype).eps ** 0.5:
                return mode
            if discrepancy <= _ROUGH and rough is None:
                rough = mode
            failures.append(f"{mode.name}: it differs from reverse mode by {discrepancy:.0%}, so a derivative is wrong")
        if rough is not None:
            jacobian._build_graph(rough.kernels)
            return rough
        custom = _custom_functions(jacobian)
        raise NotImplementedError(
            "the model's Jacobian cannot be multiplied with vectors, because an operation allows neither forward-mode "
            "nor double-backward differentiation: replace it, or give its autograd function a jvp. "
            + (f"The model uses the custom autograd functions {', '.join(custom)}. " if custom else "")
            + f"Tried {'; '.join(failures)}."
        )


class BatchJacobian:
    """J of one batch, (T·C) × D, at one point.

    Attributes
    ----------
    outputs : torch.Tensor
        f, (T, C), without a graph.
    output_shape : torch.Size
        Shape of the outputs before they were arranged as (T, C).
    """

    def __init__(self, differentiation: Differentiation, point: Mapping[str, Tensor], X: Any) -> None:
        self.differentiation = differentiation
        self.point = point
        self.X = X
        mode = differentiation.mode
        self._build_graph(mode.kernels if mode else nullcontext)
        f, _ = self._graph
        if not f.requires_grad:
            raise ValueError(
                "the model's output does not depend on any of `params`, so its Fisher is zero: check that the "
                "parameters are those that the model uses, and that it does not detach them."
            )
        if mode is None:
            differentiation.mode = differentiation.choose_mode(self)
        # From the kernels that were chosen: draws must see the same outputs in every product, to the last bit.
        self.outputs = self._graph[0].detach()

    def jvp(self, V: Tensor) -> Tensor:
        """Multiply J with columns: (D, K) → (K, T, C)."""
        assert self.differentiation.mode is not None
        return self._jvp(V, self.differentiation.mode)

    def vjp(self, U: Tensor) -> Tensor:
        """Multiply Jᵀ: (K, T, C) → (D, K)."""
        f, leaves = self._graph
        gradients = self._batched_grad([f], leaves, [U])
        return self.differentiation.parameters.join(dict(zip(self.point, gradients, strict=True)))

    def _jvp(self, V: Tensor, mode: _Mode) -> Tensor:
        tangents = self.differentiation.parameters.split(V)
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
        used = [(g, t) for g, t in zip(gradients, tangents.values(), strict=True) if g is not None and g.requires_grad]
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
            return [torch.stack(parts) for parts in zip(*columns, strict=True)]

        def at_once() -> list[Tensor]:
            gradients = grad(cotangents, batched=True)
            # A parameter that the model does not use has gradient None, that is zero.
            return [x.new_zeros(K, *x.shape) if g is None else g for g, x in zip(gradients, inputs, strict=True)]

        K = len(cotangents[0])
        return one_by_one() if K == 1 else self.differentiation.vectorized("vjp", at_once, one_by_one)

    def _build_graph(self, kernels: Callable[[], AbstractContextManager[None]]) -> None:
        with torch.enable_grad(), kernels():
            leaves = {name: value.detach().requires_grad_() for name, value in self.point.items()}
            f = self.differentiation.function(leaves, self.X)
            self.output_shape = f.shape
            self._graph: tuple[Tensor, list[Tensor]] = self.differentiation.flatten(f), list(leaves.values())


def _discrepancy(jacobian: BatchJacobian, mode: _Mode) -> float:
    """Compare ⟨u, J v⟩ with ⟨Jᵀu, v⟩ for u along J v, where nothing cancels; leaves the batch in this mode."""
    parameters = jacobian.differentiation.parameters
    generator = torch.Generator(device=parameters.device).manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=parameters.dtype, device=parameters.device, generator=generator)

    if mode.kernels is not nullcontext:
        jacobian._build_graph(mode.kernels)
    v = random((parameters.numel, 1))
    Jv = jacobian._jvp(v, mode)
    norm = Jv.norm()
    u = Jv / norm if norm > 0 else random(Jv.shape)
    forward, reverse = (u * Jv).sum(), (jacobian.vjp(u) * v).sum()
    larger = float(torch.maximum(forward.abs(), reverse.abs()))
    return float((forward - reverse).abs()) / larger if larger > 0 else 0.0


def _custom_functions(jacobian: BatchJacobian) -> list[str]:
    """Name the torch.autograd.Function subclasses in the graph of a batch's outputs."""
    names: set[str] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [jacobian._graph[0].grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            names.add(type(node).__name__.removesuffix("Backward"))
        waiting.extend(parent for parent, _ in node.next_functions)
    return sorted(names)


@contextmanager
def _missing_batching_rules_are_errors() -> Iterator[None]:
    """Refuse vmap's own loop over columns: it is no faster than ours, and it warns the user about torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop", UserWarning)
        yield


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
