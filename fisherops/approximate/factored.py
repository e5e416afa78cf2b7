"""Kronecker-factored approximations: KFAC, EKFAC and the nearest Kronecker products."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._linop import check_result
from fisherops._torch import outside_of_autocast
from fisherops.approximate.assembly import scores_of, shifted
from fisherops.approximate.model import Model, Part
from fisherops.approximate.structured import Eigen, Kronecker, StructuredOperator, from_left, from_right
from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.columns import Factors, summed
from fisherops.scores.protocol import Key, Scores

SHARINGS = ("expand", "reduce")

# Passes over the batches for the nearest Kronecker products, and the relative gain of the norm at which they end.
_PASSES = 200
_GAIN = 16.0


# ---- The public functions -----------------------------------------------------------------------------


@outside_of_autocast
def kfac(op: Any, sharing: str = "expand", *, separate_bias: bool = False) -> StructuredOperator:
    """Return the Kronecker-factored approximation (KFAC) of a Fisher matrix.

    The block of a layer with inputs a and gradients b at its outputs is the product of the second moments of both,
    E[b bᵀ] ⊗ E[a aᵀ]. Weight and bias of a layer are one block.

    Parameters
    ----------
    op : FisherOperator
        F, of any kind: Monte-Carlo, exact or empirical. One pass over its batches; cached factors are read.
    sharing : {"expand", "reduce"}
        What a layer does with the T positions of an example that share its weight, such as tokens or pixels. "expand":
        each is an example of its own. "reduce": inputs are averaged and gradients summed over them. Default: "expand".
    separate_bias : bool
        Whether weight and bias have blocks of their own. Default: False.

    Returns
    -------
    StructuredOperator
        K, (D, D), with the order of the parameters of `op`. `K.plan` describes each block. Convolutions have factors of
        their windows, and groups factors of their own; embeddings counts and a covariance. Parameters whose uses have
        no factors, such as gains, biases of normalization layers and parameters that are derived from others, have
        exact blocks, or diagonals above 2,048 elements. If one weight has several uses, its factors are the nearest
        Kronecker product to the sum of theirs, which for uses of one form adds them.

    Raises
    ------
    TypeError
        If `op` has no score matrix.
    ValueError
        If `sharing` is not an option, or is "reduce" and no layer has shared positions.
    NotImplementedError
        If parameters are sharded, or rows do not belong to examples.

    References
    ----------
    J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015,
    arXiv:1503.05671. R. Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network
    architectures, NeurIPS 2023, arXiv:2311.00636.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> K = fo.approximate.kfac(op)
    >>> K.plan
    {'weight, bias': 'Kronecker product'}
    >>> (K.inv(0.1) @ torch.ones(15)).shape
    torch.Size([15])
    """
    G, shift = scores_of(op)
    model = _modelled(G, sharing, separate_bias, keeps=False)
    return shifted(model.operator(map(_kronecker, model.parts)), shift)


@outside_of_autocast
def ekfac(op: Any, sharing: str = "expand", *, separate_bias: bool = False) -> StructuredOperator:
    """Return the eigenvalue-corrected Kronecker-factored approximation (EKFAC) of a Fisher matrix.

    In the basis of the eigenvectors of KFAC's factors, the diagonal of F is exact. No other diagonal matrix in this
    basis is nearer to F in the Frobenius norm, KFAC included.

    Parameters
    ----------
    op : FisherOperator
        F. Two passes over its batches; without a cache, batches are kept between them if they fit into ``max_memory``.
    sharing : {"expand", "reduce"}
        As for `kfac`. The corrected eigenvalues are those of whole examples with either. Default: "expand".
    separate_bias : bool
        As for `kfac`. Default: False.

    Returns
    -------
    StructuredOperator
        K, (D, D).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `kfac`.

    References
    ----------
    T. George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis, NeurIPS 2018,
    arXiv:1806.03884.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> K, E = fo.approximate.kfac(op), fo.approximate.ekfac(op)
    >>> fo.approximate.error(op, E) <= fo.approximate.error(op, K)
    True
    """
    G, shift = scores_of(op)
    model = _modelled(G, sharing, separate_bias)
    bases = [_kronecker(part).eigen for part in model.parts]
    sums = model.over_parts(lambda number, part, batch, found: squares(part, bases[number], batch, found))
    values = [sums.get(Key(number, "values", True), torch.zeros_like(own.values)) for number, own in enumerate(bases)]
    pairs = zip(bases, values, strict=True)
    K = model.operator(Eigen(own.left, own.right, check_result(corrected)) for own, corrected in pairs)
    factored = {part.label for part in model.parts}
    K.plan = {
        label: f"{text}, eigenvalues corrected" if label in factored else text for label, text in model.plan.items()
    }
    return shifted(K, shift)


@outside_of_autocast
def kronecker(op: Any, *, separate_bias: bool = False, tol: float | None = None) -> StructuredOperator:
    """Return the nearest Kronecker product to each layer's block of a Fisher matrix, in the Frobenius norm.

    By power iterations on the rearranged block, L ← Σ Gₙ R Gₙᵀ and R ← Σ Gₙᵀ L Gₙ for the rows Gₙ of a layer as
    matrices (o, i), from KFAC's factors. Each is positive semi-definite, and so is the limit.

    Parameters
    ----------
    op : FisherOperator
        F. Two passes over its batches for each iteration; without a cache, batches are kept between them if they fit
        into ``max_memory``.
    separate_bias : bool
        As for `kfac`.
    tol : float, optional
        Relative gain of the norm of the product at which iterations end. Default: 16 times the rounding of the dtype.

    Returns
    -------
    StructuredOperator
        K, (D, D), of which no block is further from F than that of `kfac` with either sharing.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `kfac`.

    References
    ----------
    C. F. Van Loan, N. Pitsianis, Approximation with Kronecker products, Linear Algebra for Large Scale and Real-Time
    Applications (1993) 293–314, doi:10.1007/978-94-015-8196-7_17.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> K, nearest = fo.approximate.kfac(op), fo.approximate.kronecker(op)
    >>> fo.approximate.error(op, nearest) <= fo.approximate.error(op, K)
    True
    """
    G, shift = scores_of(op)
    least = _GAIN * torch.finfo(G.torch_dtype).eps
    if tol is not None and not 0 <= (tol := _arrays.real("tol", tol)) < 1:
        raise ValueError(f"`tol` must be at least 0 and below 1, got {tol!r}. Pass a small number such as 1e-6.")
    tol = least if tol is None else max(tol, least)
    model = Model(G, False, separate_bias)
    gains = torch.zeros(len(model.parts), dtype=torch.float64)
    for _ in range(_PASSES):
        before = gains.clone()
        for of_left in (True, False):
            for part in model.parts:
                _normalize(part, of_left)
            sums = model.over_parts(partial(contracted, of_left))
            for number, part in enumerate(model.parts):
                value = sums.get(Key(number, "values", True))
                if value is None:
                    continue
                if of_left:
                    part.left = value
                else:
                    part.right = value
                gains[number] = float(value.double().norm())
        if bool((gains - before <= tol * gains).all()):
            break
    K = model.operator(map(_kronecker, model.parts))
    K.plan = {
        label: text.replace("Kronecker product", "nearest Kronecker product") for label, text in model.plan.items()
    }
    return shifted(K, shift)


def _modelled(G: Scores, sharing: str, separate_bias: bool, keeps: bool = True) -> Model:
    if sharing not in SHARINGS:
        raise ValueError(f"`sharing` must be 'expand' or 'reduce', got {sharing!r}.")
    model = Model(G, sharing == "reduce", separate_bias, keeps)
    if sharing == "reduce" and not model.is_shared:
        raise ValueError(
            "`sharing` must be 'expand' for a model without shared positions, got 'reduce': every layer sees each "
            "example once. Leave it out."
        )
    return model


def _kronecker(part: Part) -> Kronecker:
    return Kronecker(check_result(part.left), check_result(part.right))


# ---- Terms of single batches --------------------------------------------------------------------------


def squares(part: Part, basis: Eigen, batch: MaterializedBatch, found: Any) -> Tensor | None:
    """Return the squares of the rows in a basis, summed, (g, o, i)."""
    factors = part.piece.factors(batch, found)
    if factors is not None:
        return summed(_squares_of_factors(A, B, basis) for A, B in factors)
    total: Tensor | None = None
    for rows in part.piece.rows(batch, found):
        rows = rows if basis.left is None else from_left(basis.left.mT, rows)
        rows = rows if basis.right is None else from_right(rows, basis.right)
        own = rows.square().sum(0)
        total = own if total is None else total + own
    return total


def _squares_of_factors(A: Tensor, B: Tensor, basis: Eigen) -> Tensor:
    """Return the same of factors A (n, T, g, i) and B (n, T, q, g, o)."""
    A = A if basis.right is None else torch.einsum("ntgi,gij->ntgj", A, basis.right)
    B = B if basis.left is None else torch.einsum("ntqgo,gop->ntqgp", B, basis.left)
    return Factors(A, B).col_squares()


def _normalize(part: Part, of_left: bool) -> None:
    """Divide the factor that the next one is computed from by its norm."""
    x = check_result(part.right if of_left else part.left)
    norm = x.double().norm()
    if float(norm) > 0:
        x = (x.double() / norm).to(x.dtype)
    part.left, part.right = (part.left, x) if of_left else (x, part.right)


def contracted(of_left: bool, _: int, part: Part, batch: MaterializedBatch, found: Any) -> Tensor | None:
    """Return Σ G R Gᵀ, (g, o, o), or Σ Gᵀ L G, (g, i, i), of the rows G; large ones as diagonals."""
    factors = part.piece.factors(batch, found)
    if factors is not None:
        of_factors = _of_terms if part.piece.terms(found) > 1 else _of_single_terms
        return summed(of_factors(A, B, part, of_left) for A, B in factors)
    total: Tensor | None = None
    for rows in part.piece.rows(batch, found):
        if of_left:
            other, X, is_diagonal = from_right(rows, part.right), rows, part.left.ndim == 2
            own = (other * X).sum((0, 3)) if is_diagonal else torch.einsum("rgoi,rgpi->gop", other, X)
        else:
            other, X, is_diagonal = from_left(part.left, rows), rows, part.right.ndim == 2
            own = (other * X).sum((0, 2)) if is_diagonal else torch.einsum("rgoi,rgoj->gij", other, X)
        total = own if total is None else total + own
    return _symmetric(total)


def _of_single_terms(A: Tensor, B: Tensor, part: Part, of_left: bool) -> Tensor:
    """Return the same of factors A (n, 1, g, i) and B (n, 1, q, g, o)."""
    A, B = A[:, 0], B[:, 0]
    if of_left:
        weights = _forms(A, part.right)
        return _weighted(B.flatten(0, 1), weights.repeat_interleave(B.shape[1], 0), part.left.ndim == 2)
    weights = _forms(B.flatten(0, 1), part.left).view(*B.shape[:2], -1).sum(1)
    return _weighted(A, weights, part.right.ndim == 2)


def _of_terms(A: Tensor, B: Tensor, part: Part, of_left: bool) -> Tensor:
    """Return the same of factors A (n, T, g, i) and B (n, T, q, g, o) of several positions, by pairs of them."""
    if of_left:
        pairs = torch.einsum("ntgi,nsgi->ngts", _times(A, part.right), A)
        other, own = torch.einsum("ngts,nsqgo->ntqgo", pairs, B), B
        equation = "ntqgo,ntqgo->go" if part.left.ndim == 2 else "ntqgo,ntqgp->gop"
    else:
        pairs = torch.einsum("ntqgo,nsqgo->ngts", _times(B, part.left), B)
        other, own = torch.einsum("ngts,nsgi->ntgi", pairs, A), A
        equation = "ntgi,ntgi->gi" if part.right.ndim == 2 else "ntgi,ntgj->gij"
    total = _symmetric(torch.einsum(equation, other, own))
    assert total is not None
    return total


def _times(X: Tensor, M: Tensor) -> Tensor:
    """Multiply the last axis of X (..., g, k) by M (g, k, k) or a diagonal (g, k)."""
    return X * M if M.ndim == 2 else torch.einsum("...gk,gkl->...gl", X, M)


def _symmetric(total: Tensor | None) -> Tensor | None:
    return total if total is None or total.ndim == 2 else (total + total.mT) / 2


def _forms(X: Tensor, M: Tensor) -> Tensor:
    """Return xᵀ M x, (n, g), for X (n, g, k) and M (g, k, k) or a diagonal (g, k)."""
    Y = X * M if M.ndim == 2 else torch.matmul(X.transpose(0, 1), M).transpose(0, 1)
    return (X * Y).sum(2).clamp_min_(0)


def _weighted(X: Tensor, weights: Tensor, is_diagonal: bool) -> Tensor:
    """Return Σ w x xᵀ, (g, k, k), or its diagonal, for X (n, g, k) and weights (n, g)."""
    Y = (X * weights.sqrt()[:, :, None]).transpose(0, 1)
    return Y.square().sum(1) if is_diagonal else torch.matmul(Y.mT, Y)
