"""Cramér-Rao bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays
from fisherops.fisher import FisherOperator
from fisherops.linalg._results import Bounds
from fisherops.linalg._ways import EIGEN, choose, dense_matrix, outside_of_autocast, zero_threshold

_NAMED_DIRECTIONS, _NAMED_ENTRIES = 10, 4

# Parameters up to which F itself is looked at, which tells scales from ranks.
_DENSE = 2000


@outside_of_autocast
def crlb(op: Any, of: Any = None, *, method: str = "auto") -> Bounds:
    r"""Return Cramér-Rao bounds: the least covariance of unbiased estimates of the parameters, or of functions of them.

    .. math:: \operatorname{Cov}(\hat\psi) \succeq A^\top F^{+} A, \qquad \psi = A^\top \theta,

    with F the Fisher information of all data, so of an operator with ``reduction="sum"`` (or ``loss_func=None``).

    Parameters
    ----------
    op : FisherOperator
        An exact Fisher for the bound itself; with ``dtype="float64"`` where it is to have more than a few digits.
    of : None, str, list of str, mapping or array
        None: every element of every parameter. Names of parameters: all their elements. An array (D,) or (D, p): linear
        functions, as columns A. A mapping from the name of a function to a mapping from names of parameters to
        coefficients: likewise, by name. For a function that is not linear pass its gradient.
    method : {"auto", "dual", "dense"}
        "dense" decides the rank of F in units in which each parameter has unit information; "dual" in the user's.

    Returns
    -------
    Bounds
        Where F is singular, functions that depend on directions without information have infinite bounds, and
        `unidentifiable` names these directions.

    Raises
    ------
    ValueError
        If the operator is of a mean; if names or shapes do not fit.

    References
    ----------
    P. Stoica, T. Marzetta, Parameter estimation problems with singular information matrices, IEEE Trans. Signal
    Process. 49 (2001) 87–90, doi:10.1109/78.890346.

    Examples
    --------
    The mean of ten observations of standard deviation √½ has a variance of ½ / 10:

    >>> import torch, fisherops as fo
    >>> X, y = torch.ones(10, 1), torch.zeros(10, 1)
    >>> mean = torch.nn.Linear(1, 1, bias=False)
    >>> op = fo.FisherLinearOperator(mean, torch.nn.MSELoss(reduction="sum"), data=(X, y))
    >>> fo.linalg.crlb(op).covariance.round(3)
    array([[0.05]])
    """
    if not isinstance(op, FisherOperator):
        raise TypeError(f"the Cramér-Rao bound is of a Fisher operator, got {type(op).__name__}.")
    if "mean" in op.reductions:
        raise ValueError(
            "the Cramér-Rao bound needs the information of all data, and this operator is of a mean: use a loss with "
            "reduction='sum'."
        )
    if method == "primal":
        raise ValueError("a singular F is told from a regular one by its eigenvalues: use method='dual' or 'dense'.")
    A, names = _functions(op, of)
    if not names:
        raise ValueError("`of` names no function.")
    if not bool(A.isfinite().all()):
        raise ValueError("`of` contains NaN or infinity.")
    way = choose(op, method, products=float("inf"), dense_flops=EIGEN, dual=op.shape[0] > _DENSE or method == "dual")
    if way == "primal":
        raise ValueError("neither the Gram matrix nor F fits max_memory: raise it.")
    matrix = dense_matrix(op, way)
    scale = None
    if way == "dense":
        # In units in which each parameter has unit information, so that rank does not depend on the user's.
        diagonal = matrix.diagonal()
        scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
        matrix = matrix * scale * scale[:, None]
    values, U = torch.linalg.eigh(matrix)
    positive = values > zero_threshold(op, float(values[-1]), len(values))
    values, U = values[positive], U[:, positive]
    if scale is not None:
        A = A * scale[:, None]
        inner = U.T @ A
        inside = U @ inner
        scaled = inner / values.sqrt()[:, None]
    else:  # eigenvectors of F are Gᵀu / √λ
        scores = op.scores
        inner = U.T @ scores._times(A.to(op.torch_dtype)).double()
        inside = scores.T._times((U @ (inner / values[:, None])).to(op.torch_dtype)).double()
        scaled = inner / values[:, None]
    covariance = (scaled.T @ scaled).cpu().numpy()
    # The part of a function outside of the range of F is rounding, or it is not.
    lost = (A - inside).norm(dim=0) > float(torch.finfo(op.torch_dtype).eps) ** 0.5 * A.norm(dim=0)
    infinite = lost.cpu().numpy()
    covariance[infinite] = covariance[:, infinite] = np.inf
    nullity = op.shape[0] - len(values)
    directions = _name_directions(op, scale, values, U, nullity)
    return Bounds(covariance, np.sqrt(np.diag(covariance)), tuple(names), directions, nullity, way)


def _functions(op: FisherOperator, of: Any) -> tuple[Tensor, list[str]]:
    """Return the coefficients A (D, p) in float64, and names."""
    D, entries = op.shape[0], _entry_names(op)
    shapes, spans = op.parameter_shapes, op.parameter_spans

    def check(name: Any) -> str:
        if name not in shapes:
            raise ValueError(f"`of` names {name!r}, which is no parameter: they are {list(shapes)}.")
        return str(name)

    def zeros(p: int) -> Tensor:
        if 16 * D * p > op.max_memory:
            raise ValueError(f"{p} functions of {D} parameters take {16 * D * p} bytes: pass fewer as `of`.")
        return torch.zeros(D, p, dtype=torch.float64, device=op.device)

    if of is None or isinstance(of, str) or (isinstance(of, list) and of and all(isinstance(n, str) for n in of)):
        names = list(shapes) if of is None else [of] if isinstance(of, str) else of
        chosen = [k for name in names for k in range(*spans[check(name)])]
        A = zeros(len(chosen))
        A[chosen, list(range(len(chosen)))] = 1
        return A, [entries[k] for k in chosen]
    if isinstance(of, Mapping):
        A = zeros(len(of))
        for column, function in enumerate(of.values()):
            if not isinstance(function, Mapping):
                raise TypeError(
                    f"`of` maps the name of a function to a mapping of coefficients by parameter, got {function!r}."
                )
            for name, coefficients in function.items():
                shape = shapes[check(name)]
                values = coefficients.detach() if isinstance(coefficients, Tensor) else coefficients
                values = torch.as_tensor(values, dtype=torch.float64, device=op.device)
                if values.shape not in ((), shape):
                    raise ValueError(
                        f"the coefficients of {name!r} have shape {tuple(values.shape)}, the parameter {tuple(shape)}."
                    )
                A[slice(*spans[name]), column] = values.expand(shape).reshape(-1)
        return A, [str(name) for name in of]
    A = _arrays.enter(of)[0]
    op._check_shape(A, "crlb")
    if A.is_complex():
        raise TypeError("real functions are taken, got complex coefficients: pass their parts.")
    A = A.to(op.device, torch.float64)
    A = A[:, None] if A.ndim == 1 else A
    return A, [f"function {k}" for k in range(A.shape[1])]


def _entry_names(op: FisherOperator) -> list[str]:
    names = []
    for name, shape in op.parameter_shapes.items():
        places = np.ndindex(*shape)
        names += [f"{name}[{', '.join(map(str, place))}]" if place else name for place in places]
    return names


def _name_directions(
    op: FisherOperator, scale: Tensor | None, values: Tensor, U: Tensor, nullity: int
) -> tuple[str, ...]:
    """Describe some directions of the null space by their largest entries."""
    if nullity == 0:
        return ()
    D = op.shape[0]
    if scale is None:
        V = op.scores.T._times(U.to(op.torch_dtype)).double() / values.sqrt()
    else:  # the null space in the user's units is that of U scaled, and orthogonal to U over the scale
        V = torch.linalg.qr(U / scale[:, None])[0]
    # The projector onto the null space; its pivoted columns are the directions nearest to single parameters.
    entries = _entry_names(op)
    remaining = 1 - V.square().sum(1)
    found: list[Tensor] = []
    texts = []
    for _ in range(min(nullity, _NAMED_DIRECTIONS)):
        pivot = int(remaining.argmax())
        direction = -(V @ V[pivot])
        direction[pivot] += 1
        for other in found:
            direction -= (other @ direction) * other
        direction /= direction.norm()
        found.append(direction)
        remaining = remaining - direction.square()
        largest = direction.abs().argsort(descending=True)[:_NAMED_ENTRIES].tolist()
        terms = [(float(direction[k]), entries[k]) for k in largest if abs(float(direction[k])) > 1e-6]
        more = " + …" if len(terms) < D and float(direction.abs().sort().values[-len(terms) - 1 :][0]) > 1e-6 else ""
        texts.append(" ".join(f"{value:+.3g} {name}" for value, name in terms).removeprefix("+") + more)
    return tuple(texts)
