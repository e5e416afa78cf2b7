"""Damped systems and inverses."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fisherops import _arrays
from fisherops._checks import integer
from fisherops._linop import TorchLinearOperator, as_damping, identity
from fisherops.fisher import FisherOperator
from fisherops.linalg._checkpoint import Checkpoint
from fisherops.linalg._results import Interrupted, Solution
from fisherops.linalg._ways import (
    CHOLESKY,
    EIGEN,
    as_operator,
    choose,
    dense_matrix,
    outside_of_autocast,
    quiet,
    undamped,
    zero_threshold,
)

# Relative residual of a product with an inverse that rounding may excuse.
_LEAST_DIGITS = 1e-2

# Steps of refinement after a direct solve; each gains all the digits that the first one had.
_REFINEMENTS = 5


@outside_of_autocast
def solve(
    op: Any,
    b: Any,
    damping: float = 0.0,
    *,
    method: str = "auto",
    x0: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = "jacobi",
    least_norm: bool = False,
    callback: Callable[[int, Any], object] | None = None,
    progressbar: bool = False,
    checkpoint: Any = None,
) -> Solution:
    """Solve (F + λI) x = b.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    b : array
        (D,) or (D, K), real, of any library that products accept.
    damping : float
        λ ≥ 0, in the units of F's eigenvalues. Default: 0.
    method : {"auto", "dual", "dense", "primal"}
        "dual": by Woodbury's identity x = (b − Gᵀ(G Gᵀ + λI)⁻¹G b) / λ; "dense": Cholesky; both refined by products
        with F until the tolerance is met. "primal": conjugate gradients, all columns at once.
    x0 : array, optional
        Where conjugate gradients start; zero otherwise.
    rtol, atol : float
        For each column ‖b − (F + λI) x‖ ≤ max(rtol ‖b‖, atol).
    maxiter : int, optional
        Iterations of conjugate gradients at most, ``10 * D`` otherwise.
    M : {"jacobi", None} or LinearOperator
        Preconditioner of conjugate gradients, an approximation of (F + λI)⁻¹. "jacobi" takes the exact diagonal of a
        Fisher operator, and nothing for others.
    least_norm : bool
        With λ = 0: x = F⁺ b, the shortest of those that minimize ‖F x − b‖, also where F is singular; not in the primal
        way.
    callback : callable, optional
        ``callback(iterations, residuals)`` after each iteration of conjugate gradients.
    progressbar : bool
        Whether conjugate gradients show their iterations and largest relative residual on stderr.
    checkpoint : path, optional
        Where conjugate gradients keep their state, every 20 iterations and when they are interrupted; if the file is
        there, they go on from it, to the same result. Written whole or not at all.

    Returns
    -------
    Solution
        The solution, in the wider of the dtype of `b` and ``op.dtype``, its residual, and whether that meets the
        tolerance.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator, or `b` is complex.
    ValueError
        If λ is negative, or zero and F is singular; if shapes do not fit; if a checkpoint is damaged or of another
        problem.
    FloatingPointError
        If `b` or the solution exceeds the range of ``op.dtype``.
    Interrupted
        At a KeyboardInterrupt in the primal way; `result` holds the best solution so far.

    Notes
    -----
    If refinement stalls (for example in float32 with λ far below λ_max · eps), no error is raised and ``converged`` is
    False. Check it.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> solution = fo.linalg.solve(op, torch.ones(15), damping=0.1)
    >>> solution.converged, solution.x.shape
    (True, torch.Size([15]))
    """
    A, damping = undamped(as_operator(op), as_damping(damping))
    B, leave = _columns(A, b)
    single = B.ndim == 1
    B = B[:, None] if single else B
    if not (0 <= rtol < 1 and 0 <= atol < float("inf")):
        raise ValueError(
            f"`rtol` must be at least 0 and below 1, and `atol` finite and at least 0, got {rtol!r} and {atol!r}."
        )
    targets = (rtol * _norms(A, B)).clamp_min(atol)
    if damping == 0 and not least_norm:
        _refuse_singular(A)
    products = float("inf") if least_norm else 100.0 * B.shape[1] ** 0.5
    flops = EIGEN if least_norm else CHOLESKY
    way = choose(A, method, products, flops, dual=damping > 0 or least_norm or method == "dual")
    inverse: Any = None
    if way == "primal":
        if least_norm:
            raise ValueError(
                "`method` must be 'dual' or 'dense' for least_norm=True, which needs all eigenvalues, and neither "
                "matrix was chosen. Raise max_memory, or leave out method='primal'."
            )
        start = None if x0 is None else _columns(A, x0)[0]
        if start is not None:
            start = start[:, None] if start.ndim == 1 else start
            if start.shape != B.shape:
                raise ValueError(f"`x0` must have the shape of `b`, {tuple(B.shape)}, got {tuple(start.shape)}.")

        def report(done: int, norms: Tensor) -> None:
            if callback is not None:
                with A.processes.guard("the callback of solve"):
                    callback(done, leave(norms[0] if single else norms))

        try:
            X, R, iterations = _conjugate_gradients(
                A, B, damping, start, targets, maxiter, M, report, progressbar, checkpoint
            )
        except _HaltedError as halt:
            raise Interrupted(_solution(halt.X, halt.norms, False, halt.iterations, way, leave, single)) from None
    else:
        inverse = _Pseudoinverse(A, way) if least_norm and damping == 0 else DampedInverse(A, damping, way)
        X, R, iterations = _refined(A, B, damping, inverse, targets)
    norms = reached = _norms(A, R)
    if isinstance(inverse, _Pseudoinverse):
        reached = _norms(A, A.times_columns(R)) / max(inverse.largest, torch.finfo(B.dtype).tiny)
    return _solution(X, norms, bool((reached <= targets).all()), iterations, way, leave, single)


@outside_of_autocast
def inv(
    op: Any, damping: float, *, method: str = "auto", rtol: float = 1e-5, maxiter: int | None = None
) -> DampedInverse:
    """Return (F + λI)⁻¹ as an operator, whose factorization is kept for further products.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    damping : float
        λ > 0, in the units of F's eigenvalues; 0 where F is not singular.
    method : {"auto", "dual", "dense", "primal"}
        "dual" and "dense" keep a Cholesky factor, and refine each product by products with F; "primal" runs conjugate
        gradients in each product.
    rtol : float
        Relative residual that each product comes to. Where rounding of products with F does not allow that, it may be
        larger, up to 0.01; otherwise the product raises RuntimeError.
    maxiter : int, optional
        Maximal number of iterations of conjugate gradients. Default: ``10 * D``.

    Returns
    -------
    DampedInverse
        A SciPy ``LinearOperator``. Like a Fisher operator it follows parameters that are changed in place: the factor
        is then computed again.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator.
    ValueError
        If λ is negative, or zero and F is singular; or if `method` is not available for `op` within its ``max_memory``.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> inverse = fo.linalg.inv(op, damping=0.1)
    >>> bool(torch.allclose(inverse @ (op.damped(0.1) @ torch.ones(15)), torch.ones(15), atol=1e-4))
    True
    """
    A, damping = undamped(as_operator(op), as_damping(damping))
    if damping == 0:
        _refuse_singular(A)
    way = choose(A, method, products=300.0, dense_flops=CHOLESKY, dual=damping > 0 or method == "dual")
    return DampedInverse(A, damping, way, rtol, maxiter)


@outside_of_autocast
def natural_gradient(op: Any, grad: Any, damping: float, **options: Any) -> Any:
    """Return the natural gradient (F + λI)⁻¹ g in the structure of the parameters.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D). A Fisher operator if `grad` is a list or a mapping.
    grad : array, sequence of (array or None), or mapping of str to (array or None)
        A flat vector (D,), such as ``op.gradient()``; one array per parameter in the order of the operator's
        parameters, as ``torch.autograd.grad(loss, params, allow_unused=True)`` returns them; or by name, such as
        ``{name: p.grad for name, p in model.named_parameters()}``. None is the gradient of a parameter that the loss
        does not use.
    damping : float
        λ > 0, in the units of F's eigenvalues.
    **options
        Keyword arguments of `solve`.

    Returns
    -------
    array, list, tuple or dict
        In the structure of `grad`; zeros instead of None. Each array has the library and device of its gradient, and
        the wider of its dtype and ``op.dtype``: steps for half-precision gradients are float32.

    Raises
    ------
    TypeError
        If `grad` has a structure and `op` is not a Fisher operator.
    ValueError
        If names, numbers or shapes do not fit the parameters.
    RuntimeError
        If the system is not solved to its tolerance.
    FloatingPointError
        If the step exceeds the range of its dtype.

    See Also
    --------
    solve : the linear solver, with its options.

    References
    ----------
    S. Amari, Natural gradient works efficiently in learning, Neural Computation 10 (1998) 251–276,
    doi:10.1162/089976698300017746.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> model, loss_func = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(model, loss_func, data=(X, y))
    >>> params = list(model.parameters())
    >>> steps = fo.linalg.natural_gradient(op, torch.autograd.grad(loss_func(model(X), y), params), damping=1e-3)
    >>> [tuple(step.shape) for step in steps]
    [(3, 4), (3,)]
    """
    if not isinstance(grad, Mapping) and not _is_list_of_gradients(grad):
        return _converged(solve(op, grad, damping, **options)).x
    if not isinstance(op, FisherOperator):
        raise TypeError(
            f"`op` must be a Fisher operator if `grad` is a {type(grad).__name__}, because only it has parameters, got "
            f"{type(op).__name__}. Pass one flat vector."
        )
    shapes = op.parameter_shapes
    by_name = _by_name(grad, shapes)
    gradients = {
        name: torch.zeros(shapes[name], dtype=op.torch_dtype, device=op.device) if g is None else g
        for name, g in by_name.items()
    }
    entered = {name: _arrays.enter(g) for name, g in gradients.items()}
    for name, (g, _) in entered.items():
        if g.shape != shapes[name]:
            raise ValueError(
                f"`grad[{name!r}]` must have the parameter's shape {tuple(shapes[name])}, got {tuple(g.shape)}."
            )
    if op.score_matrix.is_divided:
        pieces = {name: g for name, (g, _) in entered.items()}
        x = _converged(solve(op, op.score_matrix.join(pieces), damping, **options)).x
        steps = op.score_matrix.split(x, pieces)
    else:
        # In the widest of their precisions, so that the solver sees which numbers the operator's cannot represent.
        flat = torch.cat([g.reshape(-1).to(op.device) for g, _ in entered.values()])
        if not flat.is_floating_point():
            flat = flat.to(op.torch_dtype)
        x = _converged(solve(op, flat, damping, **options)).x
        pieces = x.split([shape.numel() for shape in shapes.values()])
        steps = {}
        for (name, (g, leave)), piece in zip(entered.items(), pieces, strict=True):
            step = piece.reshape(shapes[name]).to(torch.promote_types(op.torch_dtype, _real(g.dtype))).clone()
            steps[name] = _no_narrower(gradients[name], g, leave, op.torch_dtype)(step)
    if isinstance(grad, Mapping):
        return steps
    return list(steps.values()) if isinstance(grad, list) else tuple(steps.values())


def _real(dtype: torch.dtype) -> torch.dtype:
    """Return a floating-point dtype as it is, and the narrowest one for integers."""
    return dtype if dtype.is_floating_point else torch.float16


def _is_list_of_gradients(grad: Any) -> bool:
    """Return whether a sequence holds one array per parameter, and is not a vector written as a list of numbers."""
    return isinstance(grad, list | tuple) and any(g is None or _arrays.is_array(g) for g in grad)


def _by_name(grad: Any, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Return the gradients by the names of the parameters, in their order."""
    if isinstance(grad, Mapping):
        if set(grad) != set(shapes):
            raise ValueError(
                f"`grad` must have the names of the operator's parameters, {sorted(shapes)}, got {sorted(grad)}. Pass "
                "one gradient for each."
            )
        return {name: grad[name] for name in shapes}
    if len(grad) != len(shapes):
        raise ValueError(
            f"`grad` must have one gradient for each of the operator's {len(shapes)} parameters, got {len(grad)}. Pass "
            "None for a parameter that the loss does not use."
        )
    return dict(zip(shapes, grad, strict=True))


class DampedInverse(TorchLinearOperator):
    """(F + λI)⁻¹ as an operator; made by `inv`.

    Attributes
    ----------
    method : str
        "dual", "dense" or "primal".
    damping : float
        λ, with what the operator itself was damped by.
    """

    def __init__(
        self, op: TorchLinearOperator, damping: float, way: str, rtol: float = 1e-5, maxiter: int | None = None
    ) -> None:
        super().__init__(op.shape, op.torch_dtype, op.device)
        self.method, self.damping = way, damping
        self._op, self._rtol, self._maxiter = op, rtol, maxiter
        if way == "dual" and damping == 0:
            raise ValueError(_SINGULAR.format("or Woodbury's identity has no meaning for it"))
        if way != "primal":
            self._factorize()

    def _factorize(self) -> None:
        op, damping = self._op, self.damping
        self._version = op.version
        matrix = dense_matrix(op, self.method)
        self._norm = float(torch.linalg.matrix_norm(matrix))
        matrix.diagonal().add_(damping)
        self._factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) and damping > 0:  # below the rounding of F; refinement finds what can be found
            matrix.diagonal().add_(zero_threshold(op, self._norm))
            self._factor, info = torch.linalg.cholesky_ex(matrix)
        pivots = self._factor.diagonal()
        eps = float(torch.finfo(op.torch_dtype).eps)
        if int(info) or (damping == 0 and float(pivots.min()) ** 2 <= len(matrix) * eps * float(pivots.max()) ** 2):
            raise ValueError(
                _SINGULAR.format("it has eigenvalues that are zero to rounding")
                if damping == 0
                else f"`damping` must make F + λI positive definite to rounding, got {damping:g}. Pass a larger one."
            )

    def _mul(self, V: Tensor) -> Tensor:
        V = V.T
        with quiet():
            if self.method == "primal":
                solution = solve(self._op, V, self.damping, method="primal", rtol=self._rtol, maxiter=self._maxiter)
            else:
                targets = self._rtol * _norms(self._op, V)
                X, R, steps = _refined(self._op, V, self.damping, self, targets)
                norms = _norms(self._op, R)
                # Or as small as the rounding of products with F lets it be, while that leaves some digits.
                rounding = 10 * float(torch.finfo(V.dtype).eps) * (self._norm + self.damping) * _norms(self._op, X)
                targets = targets.maximum(rounding.minimum(_LEAST_DIGITS * _norms(self._op, V)))
                solution = Solution(X, norms, steps, bool((norms <= targets).all()), self.method)
            product: Tensor = _converged(solution).x
        return product.T

    def diagonal(self) -> Tensor:
        """Return the diagonal in float64, (D,): (1 − ‖L⁻¹ G e_i‖²) / λ from the Cholesky factor L of G Gᵀ + λI."""
        op, L = self._op, self._present_factor()
        if self.method == "dense":
            return torch.cholesky_inverse(L).diagonal()
        assert isinstance(op, FisherOperator)
        scores = op.scores.T
        norms = torch.zeros(op.shape[0], dtype=torch.float64, device=op.device)
        for rows in identity(len(L), torch.float64, op.device):
            # Rows of L⁻¹ are columns of L⁻ᵀ.
            W = torch.linalg.solve_triangular(L.T, rows.T, upper=True).T
            norms += scores.multiply(W.to(op.torch_dtype)).double().square().sum(0)
        return (1 - norms).div_(self.damping)

    def trace(self) -> float:
        """Return the trace, which is (D − n)/λ + tr (G Gᵀ + λI)⁻¹ for n rows of G."""
        L = self._present_factor()
        inverse = float(torch.cholesky_inverse(L).diagonal().sum())
        return inverse if self.method == "dense" else (self.shape[0] - len(L)) / self.damping + inverse

    def _present_factor(self) -> Tensor:
        if self._op.version != self._version:
            self._factorize()
        factor: Tensor = self._factor
        return factor

    def direct(self, V: Tensor) -> Tensor:
        """Multiply by the factor alone, without refinement."""
        op = self._op
        self._present_factor()
        if self.method == "dense":
            return torch.cholesky_solve(V.double(), self._factor).to(V.dtype)
        assert isinstance(op, FisherOperator)
        scores = op.scores
        inner: Tensor = torch.cholesky_solve(scores.times_columns(V).double(), self._factor).to(V.dtype)
        return V.sub(scores.T.times_columns(inner)).div_(self.damping)


class _Pseudoinverse:
    """F⁺, by eigenvalues above rounding."""

    def __init__(self, op: Any, way: str) -> None:
        self._op, self._way = op, way
        values, self._U = torch.linalg.eigh(dense_matrix(op, way))
        self.largest = float(values[-1])
        positive = values > zero_threshold(op, self.largest)
        # F⁺ = Gᵀ (G Gᵀ)⁺² G.
        powers = values.clamp_min(1e-300) ** (-2.0 if way == "dual" else -1.0)
        self._inverse = torch.where(positive, powers, torch.zeros_like(powers))

    def direct(self, V: Tensor) -> Tensor:
        """Multiply F⁺."""
        W = V if self._way == "dense" else self._op.scores.times_columns(V)
        W = (self._U @ (self._inverse[:, None] * (self._U.T @ W.double()))).to(V.dtype)
        result: Tensor = W if self._way == "dense" else self._op.scores.T.times_columns(W)
        return result


def _refined(
    A: TorchLinearOperator, B: Tensor, damping: float, inverse: Any, targets: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Solve directly, and again for the residual as long as that helps."""
    X = inverse.direct(B)
    R = B - A.times_columns(X).add_(X, alpha=damping)
    for step in range(_REFINEMENTS):
        if bool((_norms(A, R) <= targets).all()):
            return X, R, step
        better = X + inverse.direct(R)
        left = B - A.times_columns(better).add_(better, alpha=damping)
        improved = _norms(A, left) < _norms(A, R)
        if not bool(improved.any()):
            return X, R, step
        X, R = torch.where(improved, better, X), torch.where(improved, left, R)
    return X, R, _REFINEMENTS


def _conjugate_gradients(
    A: TorchLinearOperator,
    B: Tensor,
    damping: float,
    x0: Tensor | None,
    targets: Tensor,
    maxiter: int | None,
    M: Any,
    report: Callable[[int, Tensor], None],
    progressbar: bool,
    checkpoint: Any,
) -> tuple[Tensor, Tensor, int]:
    """Return x, the true residual and the iterations of preconditioned conjugate gradients for all columns of B.

    References
    ----------
    M. Hestenes, E. Stiefel, Methods of conjugate gradients for solving linear systems, J. Res. NBS 49 (1952) 409–436.
    """
    maxiter = 10 * A.shape[0] if maxiter is None else integer("maxiter", maxiter, 0)
    # Columns of norm 1, so that squares stay in the range of the precision.
    scales = _norms(A, B)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    B, targets = (B / scales).to(B.dtype), targets / scales
    x0 = None if x0 is None else (x0 / scales).to(B.dtype)
    precondition = _preconditioner(A, damping, M)

    def multiply(V: Tensor) -> Tensor:
        return A.times_columns(V).add_(V, alpha=damping)

    file = (
        None
        if checkpoint is None
        else Checkpoint(checkpoint, "solve", A, damping=damping, b=scales.cpu(), directions=_crc(B))
    )
    state = file.load() if file is not None else None
    if state is not None:
        X, R, P, rho = (torch.as_tensor(state[name]).to(B) for name in ("X", "R", "P", "rho"))
        done = int(state["done"])
    else:
        X = torch.zeros_like(B) if x0 is None else x0.clone()
        R = B.clone() if x0 is None else B - multiply(X)
        P = precondition(R)
        rho, done = _dots(A, R, P), 0

    def save() -> None:
        if file is not None:
            file.save(
                **{name: t.cpu() for name, t in zip(("X", "R", "P", "rho"), (X, R, P, rho), strict=True)}, done=done
            )

    replacements = 0
    bar = tqdm(
        desc="solve", unit=" iterations", initial=done, leave=False, disable=not progressbar or not A.processes.leads
    )
    with bar:
        try:
            while done < maxiter:
                if bool((_norms(A, R) <= targets).all()):
                    # The residual of the recursion drifts from the true one; where that matters, start from it.
                    R = B - multiply(X)
                    if replacements == _REFINEMENTS or bool((_norms(A, R) <= targets).all()):
                        break
                    P = precondition(R)
                    rho, replacements = _dots(A, R, P), replacements + 1
                product = multiply(P)
                curvature = _dots(A, P, product)
                active = curvature > 0  # columns that are solved exactly have no direction left
                if not bool(active.any()):
                    break
                alpha = torch.where(active, rho / curvature, torch.zeros_like(rho))
                step = X + alpha * P, R - alpha * product
                Z = precondition(step[1])
                following = _dots(A, step[1], Z)
                beta = torch.where(rho > 0, following / rho, torch.zeros_like(rho))
                # All at once, so that an interrupt finds one state or the next.
                X, R, P, rho, done = *step, Z + beta * P, following, done + 1
                norms = _norms(A, R)
                bar.update()
                bar.set_postfix_str(f"residual {float((norms / _norms(A, B)).nan_to_num().max()):.1e}", refresh=False)
                report(done, (norms * scales).to(B.dtype))
                if done % 20 == 0:
                    save()
            save()
            R = B - multiply(X)
            return (X * scales).to(B.dtype), (R * scales).to(B.dtype), done
        except KeyboardInterrupt:
            save()
            raise _HaltedError((X * scales).to(B.dtype), _norms(A, R) * scales, done) from None


class _HaltedError(Exception):
    """Conjugate gradients were interrupted: what they had found."""

    def __init__(self, X: Tensor, norms: Tensor, iterations: int) -> None:
        super().__init__()
        self.X, self.norms, self.iterations = X, norms, iterations


def _preconditioner(A: TorchLinearOperator, damping: float, M: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(M, str) and M == "jacobi":
        if not isinstance(A, FisherOperator):
            return lambda R: R
        diagonal = torch.as_tensor(A.diagonal(), device=A.device) + damping
        # Of parameters that have no effect; without damping their entries of b cannot be met anyway.
        inverse = torch.where(diagonal > 0, 1 / diagonal, torch.ones_like(diagonal))[:, None]
        return lambda R: inverse * R
    if M is None:
        return lambda R: R
    operator = as_operator(M)
    if operator.shape != A.shape:
        raise ValueError(f"`M` must have the shape of the operator, {A.shape}, got {operator.shape}.")
    return lambda R: operator.times_columns(R.to(operator.device)).to(R)


_SINGULAR = (
    "`damping` must be positive, because F is singular ({}): F x = b has no solution for most b and no unique one for "
    "others. Pass damping > 0, or least_norm=True to `solve` for F⁺ b."
)


def _refuse_singular(A: TorchLinearOperator) -> None:
    if isinstance(A, FisherOperator) and A.scores.shape[0] < A.shape[0]:
        raise ValueError(_SINGULAR.format(f"its rank is at most {A.scores.shape[0]} of {A.shape[0]}"))


def _columns(A: TorchLinearOperator, b: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return right-hand sides in the compute precision, and a function that converts the solution back.

    A solution has at least the compute precision: in a narrower one it would neither meet the tolerance that was
    checked, nor be sure to be finite.
    """
    B, leave = _arrays.enter(b)
    A._check_shape(B, "solve")
    if B.is_complex():
        raise TypeError("`b` must be real, got a complex array. Solve for its real and imaginary parts.")
    if not bool(B.isfinite().all()):
        raise ValueError("`b` must be finite, got NaN or infinity. Check the gradients that it is made of.")
    rows = A._narrowed((B.unsqueeze(0) if B.ndim == 1 else B.T).to(A.device))
    return rows.squeeze(0) if B.ndim == 1 else rows.T, _no_narrower(b, B, leave, A.torch_dtype)


def _no_narrower(x: Any, entered: Tensor, leave: _arrays.Leave, dtype: torch.dtype) -> _arrays.Leave:
    """Return how results go to the library of `x`: in its dtype, or in `dtype` if that is wider."""
    narrower = entered.is_floating_point() and torch.promote_types(entered.dtype, dtype) != entered.dtype
    return _arrays.leave_like(x) if narrower else leave


def _solution(
    X: Tensor, norms: Tensor, converged: bool, iterations: int, way: str, leave: Callable[[Tensor], Any], single: bool
) -> Solution:
    residual = float(norms[0]) if single else leave(norms.to(X.dtype))
    if not bool(X.isfinite().all()):
        raise FloatingPointError(
            f"the solution must be within the range of {str(X.dtype).removeprefix('torch.')}, got NaN or infinity. "
            "Scale `b`, raise the damping, or pass dtype='float64' to the operator."
        )
    return Solution(leave(X[:, 0] if single else X), residual, iterations, converged, way)


def _crc(X: Tensor) -> int:
    return zlib.crc32(X.cpu().contiguous().numpy().tobytes())


def _norms(A: TorchLinearOperator, X: Tensor) -> Tensor:
    """Return the norms of columns in float64, also where their squares are out of the range of the precision."""
    if type(X) is Tensor:
        norms: Tensor = torch.linalg.vector_norm(X, dim=0, dtype=torch.float64)
        return norms
    wide = X.double().T
    return A.processes.inner(wide, wide).sqrt()


def _dots(A: TorchLinearOperator, X: Tensor, Y: Tensor) -> Tensor:
    """Return the scalar products of columns."""
    return A.processes.inner(X.T, Y.T)


def _converged(solution: Solution) -> Solution:
    if not solution.converged:
        raise RuntimeError(
            f"the system was not solved to its tolerance in {solution.iterations} iterations (residual "
            f"{solution.residual}). Raise the damping or `rtol`, or pass dtype='float64' to the operator."
        )
    return solution
