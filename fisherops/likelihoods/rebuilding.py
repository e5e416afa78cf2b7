"""Reading the parameters of distributions, and checking that they can be rebuilt from them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import probs_to_logits

from fisherops.likelihoods.base import refuse
from fisherops.likelihoods.families import FAMILIES


def known(dist: Any) -> type | None:
    """Return the class of a family from which a distribution is derived."""
    return next((kind for kind in type(dist).__mro__ if kind in FAMILIES), None)


def overridden(dist: Any, kind: type) -> bool:
    """Return whether a class derived from `kind` may have another density."""
    derived = type(dist).__mro__[: type(dist).__mro__.index(kind)]
    decisive = {"log_prob", "__getattr__", "__getattribute__", *rules(dist, kind)}
    decisive |= {"base_dist", "transforms", "mixture_distribution", "component_distribution"}
    return any(decisive & vars(each).keys() for each in derived)


def rules(dist: Any, kind: type) -> dict[str, Any]:
    """Return the constraints on the parameters of a class, which some classes know from the instance only."""
    named: Any = getattr(kind, "arg_constraints", None)
    return dict(dist.arg_constraints if kind is type(dist) or not isinstance(named, dict) else named)


def holds(rule: Any, value: Tensor) -> Tensor:
    """Return which values satisfy a constraint, as far as it can be checked."""
    if constraints.is_dependent(rule):
        return torch.ones_like(value, dtype=torch.bool)
    satisfied: Tensor = rule.check(value)
    return satisfied


def parameter(dist: Any, name: str) -> Tensor:
    """Return a parameter of a distribution as a floating-point tensor."""
    value = getattr(dist, name, None)
    if not isinstance(value, Tensor):
        raise NotImplementedError(cannot_rebuild(type(dist), f"it has no tensor `{name}`"))
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def is_given_by_probs(dist: Any) -> bool:
    """Return whether a distribution of probabilities or logits was made of the former."""
    held = vars(getattr(dist, "_categorical", dist))
    # torch adds the other attribute when it is asked for.
    return "probs" in held and (held.get("_param") is held["probs"] or "logits" not in held)


def check_probabilities(dist: Any, binary: bool) -> None:
    """Refuse probabilities without digits: 0, next to 1 if there are two classes, or clamped by torch."""
    continuous = isinstance(dist, td.ContinuousBernoulli)
    if "probs" in vars(getattr(dist, "_categorical", dist)):
        p, kind = dist.probs.detach(), type(dist).__name__
        eps = torch.finfo(p.dtype).eps
        if is_given_by_probs(dist):
            wrong = p <= (eps if continuous else 0)
            if binary:
                wrong |= p >= 1 - eps
        else:  # copies made by `expand` may have clamped logits only
            wrong = (p < eps) & (dist.logits.detach() == probs_to_logits(p, is_binary=binary))
        if wrong.any():
            limits = f"above {eps:.2g}" if continuous else "above 0"
            limits += f" and below 1 - {eps:.2g}" if binary else ""
            refuse(f"the probs of {kind} must be {limits} in {p.dtype}", p, wrong, "make it with logits=")
    if continuous and (large := dist.logits.detach().abs() > 30).any():
        refuse(
            "torch's density of ContinuousBernoulli is accurate for logits up to 30", dist.logits, large,
            "limit the model's output",
        )  # fmt: skip


def in_support(dist: Any, y: Tensor) -> Tensor:
    """Return which targets are in the support, as far as the distribution defines one."""
    try:
        support = dist.support
    except NotImplementedError:
        support = None
    if support is None or constraints.is_dependent(support):
        return torch.ones((), dtype=torch.bool, device=y.device)
    inside: Tensor = support.check(y)
    return inside


def constant(dist: Any, name: str) -> Any:
    """Return an argument of the class that is no parameter: one number."""
    value = getattr(dist, name)
    if isinstance(value, Tensor):
        if value.requires_grad or value.numel() != 1:
            raise NotImplementedError(cannot_rebuild(type(dist), f"its {name} is not one fixed number"))
        return value.detach().reshape(())
    return value


def check_rebuilt(dist: Any, structure: Any, y: Tensor) -> None:
    """Make sure that the coordinates say everything about a distribution of an unknown class.

    Its density, and the gradient of that by all parameters, must be those of the distribution built from them.
    """
    f = structure.coordinates(dist)
    with torch.no_grad():
        drawn = dist.sample()
    # Observed targets may miss where the two differ.
    for targets in (y.to(f.dtype), drawn):
        values = [each.log_prob(targets).sum() for each in (dist, structure.build(f))]
        parameters = _leaves(values)
        gradients = [_gradient(value, parameters) for value in values]
        if not all(found.isfinite().all() for found in (*values, *gradients)):
            raise ValueError(
                f"the log_prob of {type(dist).__name__}, or its gradient, is NaN or infinite at the targets or at "
                "draws: check the model's output and the density."
            )
        for a, b in (values, gradients):
            if (a - b).detach().norm() > 1e-3 * a.detach().norm():
                raise NotImplementedError(cannot_rebuild(type(dist), "it depends on more than those"))


def _leaves(values: list[Tensor]) -> list[Tensor]:
    """List the parameters that values depend on."""
    found, seen, waiting = [], set(), [value.grad_fn for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
            if hasattr(node, "variable"):
                found.append(node.variable)
    return found


def _gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    if not parameters or not value.requires_grad:
        return value.new_zeros(sum(p.numel() for p in parameters))
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def no_exact(what: str) -> str:
    """Return the text of an error."""
    return (
        f"the exact Fisher of {what} is not known in closed form: take its Monte-Carlo estimate, "
        "FisherMCLinearOperator."
    )


def cannot_rebuild(kind: type, reason: str) -> str:
    """Return the text of an error."""
    return (
        f"{kind.__name__} cannot be rebuilt from the parameters that it names (`arg_constraints`): {reason}. Write a "
        "fisherops.likelihoods.Likelihood with its `log_prob` and `sample`."
    )
