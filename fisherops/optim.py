"""Natural-gradient descent: a step on a fresh batch by the Fisher matrix of that batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisherops import _arrays, linalg
from fisherops._checks import integer
from fisherops._data import Batch
from fisherops._processes import ONE, Processes
from fisherops._tree import leaves
from fisherops.fisher import FisherOperator
from fisherops.likelihoods import Likelihood
from fisherops.linalg.dense import cholesky_in_place
from fisherops.operators import EmpiricalFisherLinearOperator, FisherLinearOperator, FisherMCLinearOperator
from fisherops.parallel.group import Group, group_of
from fisherops.parallel.scores import DistributedScores
from fisherops.problem import Evaluation
from fisherops.score_matrix import ScoreMatrix
from fisherops.scores.kinds import FactorOf

_KINDS: dict[str, Any] = {
    "exact": FisherLinearOperator,
    "mc": FisherMCLinearOperator,
    "empirical": EmpiricalFisherLinearOperator,
}

# Levenberg-Marquardt: the damping is doubled or halved if the loss fell by less or more than these parts of what F
# predicts, and quadrupled if it did not fall.
_POOR, _GOOD, _FACTOR = 0.25, 0.75, 2.0
_START = 1e-2

# Rows whose Gram matrix is always cheaper than conjugate gradients, and the relative error of steps by rounding beyond
# which it is factorized in float64.
_MOST_ROWS = 4096
_ROUNDING = 1e-3

# What a copy of an optimizer takes over besides groups and states.
_OWN = ("_schedule", "_is_adaptive", "_trust", "_loss_func", "_model_func", "_method", "_kind", "_seed", "_options")
_ALONE = {"_process_group": None, "_group": None}


class NaturalGradient(torch.optim.Optimizer):
    r"""Natural-gradient descent, θ ← θ − s with s = η (F + λI)⁻¹ g.

    g is the gradient of the loss of a batch and F its Fisher matrix. One forward pass gives the loss, g and the score
    matrix G, F = GᵀG. What is learned about the model on the first batch is used for all others; batches may have other
    sizes. The system is solved as in `fisherops.linalg.solve`: by the Gram matrix of the rows of G, by F itself, or by
    conjugate gradients, whichever is the cheapest.

    For least squares with ``kind="exact"`` this is the Gauss-Newton method, and that of Levenberg and Marquardt with
    ``damping="auto"``.

    Parameters
    ----------
    params_or_model : nn.Module or iterable
        The model, whose parameters that require gradients are optimized; or parameters or groups of them as for any
        optimizer of PyTorch, with `model_func`.
    loss_func : nn.Module, Likelihood, mapping, tuple or None
        The loss, as for `fisherops.FisherMCLinearOperator`.
    model_func : callable, optional
        ``model_func(X)`` returns the outputs. Default: the model.
    lr : float
        η > 0. Groups may have their own.
    damping : float, callable or "auto"
        λ > 0, in the units of F's eigenvalues; or ``damping(k)`` of the number k of steps done, from 0. "auto" adapts λ
        by the ratio of the actual to the predicted reduction of the batch's loss, for one more forward pass, and takes
        back a step that increases the loss. Default: "auto".
    kind : {"exact", "mc", "empirical"}
        Which Fisher matrix. With "mc" and few draws the gradient leaves the range of F, where it is multiplied by 1/λ:
        take a larger damping, or `trust`. Default: "exact".
    momentum : float
        μ in [0, 1): s = η (F + λI)⁻¹ g + μ λ (F + λI)⁻¹ s', with the previous step s', which is so kept outside of the
        range of the new rows [1]_. It is forgotten when a step is taken back. Default: 0.
    mc_samples, seed : int
        As for `fisherops.FisherMCLinearOperator`, for kind "mc"; each step has draws of its own.
    rows : {"term", "datum"}
        As for `fisherops.FisherMCLinearOperator`, for the kinds "mc" and "empirical". Default: "term".
    trust : float, optional
        Largest length √(sᵀ F s) of a step. Longer ones are shortened. Default: no bound.
    dtype : dtype, optional
        Compute precision. Default: that of the parameters.
    max_memory : int or str, optional
        Memory for the rows of a batch, as for `fisherops.FisherMCLinearOperator`.
    method : {"auto", "dual", "dense", "primal"}
        How the system is solved, see `fisherops.linalg.solve`. Default: "auto".
    process_group : torch.distributed.ProcessGroup, DeviceMesh or None
        The processes among which each batch is divided. All make the optimizer and its steps together, with the same
        parameters and options; each passes its own part of the batch, which may have no examples. All get the loss of
        the whole batch, and make the same step to the bit. Default: None, one process.

    Raises
    ------
    ValueError, TypeError
        If an option does not fit.
    NotImplementedError
        If parameters are sharded.

    Notes
    -----
    The damping, the previous step and the number of steps are part of ``state_dict()``. ``p.grad`` is neither read nor
    written. The model must be deterministic: layers such as Dropout and BatchNorm in training mode are refused.

    References
    ----------
    .. [1] G. Goldshlager, N. Abrahamsen, L. Lin, A Kaczmarz-inspired approach to accelerate the optimization of neural
       network wavefunctions, J. Comput. Phys. 516 (2024) 113351, doi:10.1016/j.jcp.2024.113351.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X = torch.linspace(-1, 1, 50)[:, None]
    >>> y = torch.sin(3 * X)
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> optimizer = fo.optim.NaturalGradient(model, torch.nn.MSELoss(), lr=1.0)
    >>> losses = [float(optimizer.step((X, y))) for _ in range(30)]
    >>> losses[-1] < 1e-3 * losses[0]
    True
    """

    def __init__(
        self,
        params_or_model: nn.Module | Iterable[Any],
        loss_func: Any,
        *,
        model_func: Callable[[Any], Any] | None = None,
        lr: float = 1.0,
        damping: float | Callable[[int], float] | str = "auto",
        kind: str = "exact",
        momentum: float = 0.0,
        mc_samples: int = 1,
        seed: int = 0,
        rows: str = "term",
        trust: float | None = None,
        dtype: Any = None,
        max_memory: int | str | None = None,
        method: str = "auto",
        process_group: Any = None,
    ) -> None:
        if isinstance(params_or_model, nn.Module):
            model_func = params_or_model if model_func is None else model_func
            params_or_model = [p for p in params_or_model.parameters() if p.requires_grad]
        if model_func is None:
            raise TypeError(
                "`params_or_model` must be an nn.Module, or parameters with a `model_func`, got parameters alone. Pass "
                "model_func=model."
            )
        if kind not in _KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}.")
        if isinstance(damping, str) and damping != "auto":
            raise ValueError(f"`damping` must be a positive number, a function of the step or 'auto', got {damping!r}.")
        self._schedule, self._is_adaptive = damping if callable(damping) else None, damping == "auto"
        first = _START if self._is_adaptive or callable(damping) else _positive("damping", damping)
        if not 0 <= _arrays.real("momentum", momentum) < 1:
            raise ValueError(f"`momentum` must be at least 0 and below 1, got {momentum!r}.")
        if method not in ("auto", "dual", "dense", "primal"):
            raise ValueError(f"`method` must be 'auto', 'dual', 'dense' or 'primal', got {method!r}.")
        self._trust = inf if trust is None else _positive("trust", trust)
        self._loss_func, self._model_func, self._method = loss_func, model_func, method
        self._kind, self._seed = kind, integer("seed", seed, -(2**63), 2**63)
        self._options: dict[str, Any] = {"dtype": dtype, "max_memory": max_memory}
        if kind == "mc":
            self._options["mc_samples"] = mc_samples
        if kind != "exact":
            self._options["rows"] = rows
        self._scores: Any = None
        super().__init__(params_or_model, {"lr": _positive("lr", lr)})
        self.param_groups[0].update(damping=first, momentum=float(momentum), steps=0)
        self._process_group = process_group
        self._group: Group | None = group_of(process_group, self.param_groups[0]["params"][0].device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; the next step is made with the score matrix of all of them."""
        super().add_param_group(param_group)
        self._scores = None

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch copies groups and states alone; what was learned about the model is found again.
        if self._group is not None:
            raise TypeError(
                "an optimizer with a process group belongs to its processes: it cannot be pickled or copied. Save its "
                "state_dict()."
            )
        return super().__getstate__() | {name: getattr(self, name) for name in _OWN} | {"_scores": None} | _ALONE

    # ---- A step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any) -> Tensor:  # type: ignore[override]
        """Make a step, and return the loss before it.

        Parameters
        ----------
        closure : (X, y) or callable
            The batch, or a function that returns it; with a process group this process's part of it.

        Returns
        -------
        torch.Tensor
            The loss of the batch at the parameters before the step, a scalar.

        Raises
        ------
        FloatingPointError
            If the loss, its gradient or the step is NaN or infinite. The parameters are those before the step.
        fisherops.distributed.RankError
            If another process of the group failed, is gone, or has other parameters or options. The parameters of this
            one are those before the step.
        """
        processes, state = self._processes(), self.param_groups[0]
        with processes.guard("the batch of a step"):
            batch = closure() if callable(closure) else closure
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TypeError(
                    f"`closure` must be a batch (X, y) or a function that returns one, got {type(batch).__name__}. "
                    "Pass optimizer.step((X, y))."
                )
            damping = state["damping"]
            if self._schedule is not None:
                damping = _positive("damping(k)", self._schedule(state["steps"]))
        own = {"damping": damping, "momentum": state["momentum"], "trust": self._trust, "method": self._method}
        with processes.step("options", steps=state["steps"], lr=[float(g["lr"]) for g in self.param_groups], **own):
            state["damping"] = damping
        evaluated = self._evaluated(batch)
        s, predicted = self._step_of(evaluated)
        if not s.isfinite().all():
            raise FloatingPointError(
                "the step contains NaN or infinity. The parameters are those before it: take a larger `damping`."
            )
        self._apply(evaluated, s, predicted)
        state["steps"] += 1
        if evaluated.G is self._scores:
            self._scores.refresh()  # the first batch is kept as an example of the data, without its rows
        return evaluated.loss

    def _processes(self) -> Processes:
        """Return the processes that make the steps; after an error all of them make their group again."""
        if self._group is not None and self._group.is_broken:
            self._scores = None
            self._group = group_of(self._process_group, self.param_groups[0]["params"][0].device)
        return ONE if self._group is None else self._group

    def _evaluated(self, batch: Any) -> _Evaluated:
        """Return the loss of a batch, its gradient, and G, by one forward pass."""
        G, found = self._scores_of(batch), list[tuple[Tensor, Tensor | None, Tensor | None]]()
        processes, reader = G.processes, _local(G).reader
        is_late, shares = reader.finds_c_late, list[float]()
        by_coordinates = self._kind == "exact" and self._method in ("auto", "dual")

        def see(batch: Batch, evaluation: Evaluation, factor_of: FactorOf) -> None:
            shares[:] = _shares(factor_of, reader.reductions, is_whole=processes is ONE)
            W = _coordinates(evaluation, factor_of) if by_coordinates else None
            with torch.enable_grad():
                value = _value(self._loss_func, evaluation.output, batch.y, shares)
                g = _flat_gradient(value, list(evaluation.graph[1].values())) if W is None else W
            loss = value.detach()
            if not (loss.isfinite() and g.isfinite().all()):
                raise FloatingPointError(
                    f"the loss and its gradient must be finite, and the loss of the batch is {float(loss)}. The "
                    "parameters are those before the step: check the data, or take a smaller `lr` or a larger "
                    "`damping`."
                )
            found.append((loss, g if W is None else None, W))

        G.find(see)
        if is_late:
            # What was found so far is for c = 1, but G has been divided by √c, and the loss of one process is a mean.
            c = float(reader.divisor())
            found = [(loss, g, None if W is None else W / c**0.5) for loss, g, W in found]
            if processes is not ONE:
                found = [(loss / c, None if g is None else g / c, W) for loss, g, W in found]
                shares = [share / c for share in shares]
        loss, g, W = found[0] if processes is ONE else _joined(G, found)
        return _Evaluated(G, loss, g, None if W is None else W.reshape(1, -1), shares)

    def _scores_of(self, batch: Any) -> Any:
        """Return G of a batch; nothing of the model is learned twice."""
        steps = self.param_groups[0]["steps"]
        seed = {"seed": self._seed + steps} if self._kind == "mc" else {}
        data = [batch] if self._group is None or _size(batch) else []
        if self._scores is None:
            params = [p for group in self.param_groups for p in group["params"]]
            own = self._options | seed | {"process_group": self._process_group}
            op = _KINDS[self._kind](self._model_func, self._loss_func, params, data, **own)
            if op.score_matrix.is_divided:
                raise NotImplementedError(
                    "sharded parameters are not supported by the optimizer. Pass whole parameters on every rank."
                )
            if len(set(op.reductions)) > 1:
                raise ValueError(
                    f"`loss_func` must have one reduction, got {op.reductions}. Use 'mean' or 'sum' for all its parts."
                )
            self._scores = op.score_matrix
            self._structure = _local(self._scores).problem.version.structure
            return self._scores
        problem = _local(self._scores).problem
        G = self._scores.on(data, reduction=self._scores.reductions[0], **seed, max_memory=self._options["max_memory"])
        problem.look()
        if problem.version.structure != self._structure:
            G.check()
            self._structure = problem.version.structure
        return G

    def _step_of(self, batch: _Evaluated) -> tuple[Tensor, float]:
        """Return s = η (F + λI)⁻¹ g + μ λ (F + λI)⁻¹ s', (D,), and the reduction of the loss that F predicts."""
        G, W, state = batch.G, batch.coordinates, self.param_groups[0]
        tensors = list(G.parameters.tensors.values())
        damping, momentum = state["damping"], state["momentum"]
        before = [self.state[p]["previous"].reshape(-1) for p in tensors if momentum and self.state[p]]
        previous = torch.cat(before).to(G.torch_dtype) if before else None
        if W is not None and G.num_rows <= _MOST_ROWS:
            direction, kept = _by_rows(G, W, previous, damping)
        else:
            g = G._mul_t(W)[0] if W is not None else batch.gradient
            b = g[:, None] if previous is None else torch.stack([g, previous], 1)
            x = linalg.solve(FisherOperator(G), b, damping, method=self._method).x
            direction, kept = x[:, 0], None if previous is None else damping * x[:, 1]
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        pieces = zip(direction.split([p.numel() for p in tensors]), tensors, strict=True)
        s = torch.cat([rates[id(p)] * piece for piece, p in pieces]) + (0 if kept is None else momentum * kept)
        if not self._is_adaptive and self._trust == inf:
            return s, 0.0
        Gs = G._mul(s[None])
        length = float(torch.linalg.vector_norm(Gs, dtype=torch.float64))
        scale = min(1.0, self._trust / length) if length else 1.0
        slope = float((Gs * W).sum(dtype=torch.float64)) if W is not None else float(s @ g)
        return s * scale, scale * slope - (scale * length) ** 2 / 2

    def _apply(self, batch: _Evaluated, s: Tensor, predicted: float) -> None:
        """Subtract s from the parameters, all at once; adapt the damping if that is asked for."""
        tensors = list(batch.G.parameters.tensors.values())
        pieces = s.split([p.numel() for p in tensors])
        steps = [piece.view(p.shape).to(p) for piece, p in zip(pieces, tensors, strict=True)]
        copies = [p.clone() for p in tensors] if self._is_adaptive else []
        # One call, which a KeyboardInterrupt does not divide.
        torch._foreach_sub_(tensors, steps)
        state = self.param_groups[0]
        if self._is_adaptive:
            try:
                actual = float(batch.loss) - self._loss_at(batch)
            except BaseException:
                torch._foreach_copy_(tensors, copies)
                raise
            if not actual >= 0:
                torch._foreach_copy_(tensors, copies)
                state["damping"] *= _FACTOR**2
                # A larger damping shortens the direction of the gradient, but not the previous step.
                for p in tensors:
                    self.state[p].clear()
                return
            ratio = actual / max(predicted, 1e-300)
            state["damping"] *= _FACTOR if ratio < _POOR else 1 / _FACTOR if ratio > _GOOD else 1.0
        if state["momentum"]:
            for p, step in zip(tensors, steps, strict=True):
                self.state[p]["previous"] = step  # PyTorch moves what it loads, but not what is named "step"

    def _loss_at(self, batch: _Evaluated) -> float:
        """Return the loss at the present parameters."""
        G, total = _local(batch.G), torch.zeros((), dtype=torch.float64, device=batch.G.device)
        with batch.G.processes.step("loss after the step"):
            with G.reader.reading("loss") as batches:
                for own in batches:
                    output = G.problem.call(G.parameters.point(), own.X)
                    total += _value(self._loss_func, output, own.y, batch.shares)
            return float(batch.G.processes.sum(total))


class _Evaluated(NamedTuple):
    """A batch at the parameters before the step; with several processes the one of all of them."""

    G: Any
    """Its score matrix, (rows, D)."""
    loss: Tensor
    """A scalar."""
    gradient: Any
    """g of the loss, (D,), or None if there are coordinates."""
    coordinates: Tensor | None
    """w with g = Gᵀw, (1, rows)."""
    shares: list[float]
    """What the loss of each head on this process counts in that of the batch."""


def _local(G: ScoreMatrix | DistributedScores) -> ScoreMatrix:
    """Return the score matrix of the examples of this process."""
    return G.local if isinstance(G, DistributedScores) else G


def _size(batch: Any) -> int:
    """Return the number of examples of (X, y)."""
    return len(leaves(batch[0] if batch[1] is None else batch[1])[0])


def _shares(factor_of: FactorOf, reductions: tuple[str, ...], is_whole: bool) -> list[float]:
    """Return what the loss of each head counts in that of all processes: its part of the divisor of a mean."""
    if is_whole:
        return [1.0] * len(reductions)
    own = torch.as_tensor(factor_of.terms.divisor, dtype=torch.float64, device="cpu").reshape(-1) / factor_of.c
    return [float(part) if kind == "mean" else 1.0 for part, kind in zip(own, reductions, strict=True)]


def _joined(G: DistributedScores, found: list[Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss, the gradient (D,) and the coordinates (rows, 1) of all processes, from this one's."""
    zero = torch.zeros((), dtype=torch.float64, device=G.device)
    with G.group.step("loss and gradient"):
        loss, g, W = found[0] if found else (zero, None, None)
        kinds = set(G.group.share((W is not None) if found else None)) - {None}
        if not kinds:
            raise ValueError("the batch must have examples on one process at least, got none. Leave such batches out.")
        total = G.group.sum(loss.double())
        # In the dtype of the parameters' loss, which a process without examples has not seen.
        if False not in kinds:
            own = torch.zeros(0, 1, dtype=G.torch_dtype, device=G.device) if W is None else W.reshape(-1, 1)
            return total.to(G.torch_dtype), None, torch.cat(G.group.gather(own))
        if W is not None:
            g = G.local._mul_t(W.reshape(1, -1))[0]
        own = torch.zeros(G.parameters.numel, dtype=G.torch_dtype, device=G.device) if g is None else g
        return total.to(G.torch_dtype), G.group.sum(own.to(G.torch_dtype)), None


def _coordinates(evaluation: Evaluation, factor_of: FactorOf) -> Tensor | None:
    """Return W (B, R) with g = Gᵀw for the gradient of the loss, None if there is no closed form."""
    q, f, terms = factor_of.likelihood.bind(evaluation.output), evaluation.outputs, factor_of.terms
    root = q.scale(f, terms, factor_of.c)
    observed = q.scores(f, q.observed(terms)).scaled(root).scaled(root)
    U = observed.apply(f.new_ones(1, observed.blocks, observed.rank))[0]
    return factor_of(evaluation).coordinates(U)


def _by_rows(G: Any, w: Tensor, previous: Tensor | None, damping: float) -> tuple[Tensor, Tensor | None]:
    """Return (F + λI)⁻¹ Gᵀw = Gᵀ (K + λI)⁻¹ w with K = G Gᵀ, and λ (F + λI)⁻¹ s' = s' − Gᵀ (K + λI)⁻¹ G s'."""
    K = G.gram_tensor()
    # Rounding of K is relative to its largest eigenvalue, and what is solved for to λ.
    wide = torch.float64 if float(K.trace()) * torch.finfo(K.dtype).eps > _ROUNDING * damping else K.dtype
    K = K.to(wide)
    K.diagonal().add_(damping)
    b = w if previous is None else torch.cat([w, G._mul(previous[None])])

    def solved() -> Tensor:
        factor, is_found = cholesky_in_place(K)
        if not is_found:
            raise FloatingPointError(
                "the Gram matrix of the rows with the damping is not positive definite in the compute precision. The "
                "parameters are those before the step: take a larger `damping`, or dtype='float64'."
            )
        return torch.cholesky_solve(b.T.to(wide), factor).T.to(w.dtype).contiguous()

    # Processes with other processors or numbers of threads may round in other ways.
    images = G._mul_t(G.processes.from_leader(solved))
    return images[0], None if previous is None else previous - images[1]


def _flat_gradient(value: Tensor, leaves: list[Tensor]) -> Tensor:
    """Return the gradient by all parameters, (D,); zero for those that are not used."""
    if not value.requires_grad:  # no head has a term
        return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves])
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in found])


def _value(loss_func: Any, output: Any, y: Any, shares: list[float]) -> Tensor:
    """Return the loss, the sum over the heads that have a share, each times its share."""
    values = list(_values(loss_func, output, y))
    for value in values:
        if not isinstance(value, Tensor) or value.ndim:
            raise ValueError("`loss_func` must return a scalar. Use reduction='mean' or 'sum'.")
    # The mean over no term is NaN.
    terms = [share * value for share, value in zip(shares, values, strict=True) if share]
    return torch.stack(terms).sum() if terms else values[0].new_zeros(())


def _values(loss_func: Any, output: Any, y: Any) -> Iterator[Any]:
    """List the losses of all heads; of distributions the negative log-density."""
    if loss_func is None:
        yield -output.log_prob(y).sum()
    elif isinstance(loss_func, Mapping):
        for key, loss in loss_func.items():
            yield from _values(loss, output[key], y[key])
    elif isinstance(loss_func, tuple | list):
        for loss, f, own in zip(loss_func, output, y, strict=True):
            yield from _values(loss, f, own)
    elif isinstance(loss_func, Likelihood):
        yield _negative_log_density(loss_func, output, y)
    else:
        yield loss_func(output, y)


def _negative_log_density(likelihood: Likelihood, output: Any, y: Any) -> Tensor:
    """Return −Σ w log q(y | f), divided as the likelihood's mean if it is one."""
    q = likelihood.bind(output)
    terms = q.terms(output, y)
    values = q.log_prob(q.flatten(output), q.observed(terms)).reshape(-1)
    total = -(values if terms.weights is None else values * terms.weights.reshape(-1)).sum()
    return total / float(terms.divisor) if likelihood.reduction == "mean" else total


def _positive(name: str, value: Any) -> float:
    number = float(_arrays.real(name, value))
    if not (number > 0 and isfinite(number)):
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")
    return number


__all__ = ["NaturalGradient"]
