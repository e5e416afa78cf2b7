"""Damped systems and inverses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._linop import TorchLinearOperator, Vectors, as_damping
from fisherops._torch import outside_of_autocast, quiet
from fisherops.linalg.dense import SINGULAR
from fisherops.linalg.iteration import Iteration
from fisherops.linalg.methods import CHOLESKY, EIGEN, Method, Task, as_operator, cholesky_memory, choose
from fisherops.linalg.preconditioners import PRECONDITIONERS
from fisherops.linalg.primal import jacobi
from fisherops.linalg.results import HaltedError, Interrupted, Solution, Solved

# Relative residual of a product with an inverse that rounding may excuse.
_LEAST_DIGITS = 1e-2

NO_LEAST_NORM = (
    "`method` must be 'dual' or 'dense' for least_norm=True, which needs all eigenvalues, and neither matrix was "
    "chosen. Raise max_memory, or leave out method='primal'."
)


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
    M : {"jacobi", "kfac", "ekfac", "nystrom", "auto", None} or LinearOperator
        Preconditioner of conjugate gradients, an approximation of (F + λI)⁻¹. "jacobi" takes the exact diagonal of a
        Fisher operator, and nothing for others. The next three are the inverses of `approximate.kfac`,
        `approximate.ekfac` and `approximate.nystrom` of a Fisher operator with the damping; they are built in each
        call. "auto" predicts the products that the iterations with "jacobi" and the rank for "nystrom" cost, from
        the trace and the number of rows, and takes the less. Default: "jacobi".
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
    A, damping = as_operator(op), as_damping(damping)
    vectors, B = _right_hand_sides(A, b)
    if not (0 <= rtol < 1 and 0 <= atol < float("inf")):
        raise ValueError(
            f"`rtol` must be at least 0 and below 1, and `atol` finite and at least 0, got {rtol!r} and {atol!r}."
        )
    targets = (rtol * A.processes.norms(B)).clamp_min(atol)
    if not least_norm:
        refuse_singular(A, damping)
    task = Task(100.0 * len(B) ** 0.5, CHOLESKY, needs_damping=True, memory=cholesky_memory)
    if least_norm:
        task = Task(float("inf"), EIGEN, refusals=(NO_LEAST_NORM, NO_LEAST_NORM))
    start = None if x0 is None else _right_hand_sides(A, x0)[1]
    if start is not None and start.shape != B.shape:
        raise ValueError(
            f"`x0` must have the shape of `b`, {_shape(vectors, B)}, got {tuple(_arrays.enter(x0)[0].shape)}."
        )
    report = None if callback is None else _reporting(callback, vectors)
    iteration = Iteration(report, progressbar, checkpoint)
    chosen = choose(
        A, task, method, damping, iteration=iteration, maxiter=maxiter, x0=start, precondition=preconditioner_of(A, M)
    )
    if least_norm and least(chosen.total) == 0:
        return _solution(chosen.solve_least_norm(B, targets), vectors, chosen.name)
    try:
        return _solution(chosen.solve(B, targets), vectors, chosen.name)
    except HaltedError as halt:
        raise Interrupted(_solution(halt.found, vectors, chosen.name)) from None


@outside_of_autocast
def inv(op: Any, damping: float, *, method: str = "auto", rtol: float = 1e-5, maxiter: int | None = None) -> Inverse:
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
    Inverse
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
    A, damping = as_operator(op), as_damping(damping)
    refuse_singular(A, damping)
    task = Task(300.0, CHOLESKY, needs_damping=True)
    chosen = choose(A, task, method, damping, maxiter=maxiter, precondition=jacobi)
    return Inverse(chosen, A.shift + damping, rtol)


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
    A = as_operator(op)
    if A.score_matrix is None:
        raise TypeError(
            f"`op` must be a Fisher operator if `grad` is a {type(grad).__name__}, because only it has parameters, got "
            f"{type(op).__name__}. Pass one flat vector."
        )
    shapes = A.score_matrix.parameters.shapes
    gradients = {
        name: torch.zeros(shapes[name], dtype=A.torch_dtype, device=A.device) if g is None else g
        for name, g in _by_name(grad, shapes).items()
    }
    entered = {name: _arrays.enter(g) for name, g in gradients.items()}
    for name, (g, _) in entered.items():
        if g.shape != shapes[name]:
            raise ValueError(
                f"`grad[{name!r}]` must have the parameter's shape {tuple(shapes[name])}, got {tuple(g.shape)}."
            )
    pieces: Any = A
    flat, split = pieces.enter_pieces({name: g for name, (g, _) in entered.items()})
    steps = split(_converged(solve(op, flat, damping, **options)).x)
    for name, (g, leave) in entered.items():
        step = steps[name].to(torch.promote_types(A.torch_dtype, _real(g.dtype))).clone()
        steps[name] = _arrays.no_narrower(gradients[name], g, leave, A.torch_dtype)(step)
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


class Inverse(TorchLinearOperator):
    """(F + λI)⁻¹ as an operator; made by `inv`.

    Attributes
    ----------
    method : str
        "dual", "dense" or "primal".
    damping : float
        λ, with what the operator itself was damped by; (D,) if each parameter has its own.
    """

    def __init__(self, method: Method, damping: Any, rtol: float) -> None:
        op = method.op
        super().__init__(op.shape, op.torch_dtype, op.device)
        self.method, self.damping = method.name, damping
        self._op, self._method, self._rtol = op, method, rtol
        method.prepare()

    def _mul(self, V: Tensor) -> Tensor:
        norms_of = self._op.processes.norms
        with quiet():
            targets = self._rtol * norms_of(V)
            solved = self._method.solve(V, targets)
            # Or as small as the rounding of products with F lets it be, while that leaves some digits.
            rounding = 10 * float(torch.finfo(V.dtype).eps) * solved.size * norms_of(solved.X)
            allowed = targets.maximum(rounding.minimum(_LEAST_DIGITS * norms_of(V)))
        if not bool((solved.norms <= allowed).all()):
            raise _unsolved(solved.iterations, float(solved.norms.max()))
        return solved.X

    def _product_of_pieces(self, X: Any, name: str) -> Any:
        vectors = self._op._enter(X, name)
        return vectors.leave(self.multiply(vectors.rows))

    def _enter(self, x: Any, name: str) -> Vectors:
        return self._op._enter(x, name)

    @property
    def is_exact(self) -> bool:
        """Whether there is a factorization, from which diagonal and trace are exact."""
        return self._method.is_exact

    @property
    def _exact(self) -> Any:
        if not self.is_exact:
            raise ValueError(
                "`method` must be 'dual' or 'dense' for the diagonal and the trace of an inverse, got "
                f"{self.method!r}. Pass it to `inv`, or use `linalg.diagonal` and `linalg.trace`."
            )
        return self._method

    def diagonal(self) -> Tensor:
        """Return the diagonal in float64, (D,), exactly."""
        with quiet():
            diagonal: Tensor = self._exact.inverse_diagonal()
        return diagonal

    def trace(self) -> float:
        """Return the trace, exactly."""
        with quiet():
            trace: float = self._exact.inverse_trace()
        return trace


def preconditioner_of(A: TorchLinearOperator, M: Any) -> Callable[..., Callable[[Tensor], Tensor]] | None:
    """Return what makes the preconditioner for an operator and its damping; None if there is none."""
    if M is None:
        return None
    if isinstance(M, str):
        if M not in PRECONDITIONERS:
            names = ", ".join(map(repr, PRECONDITIONERS))
            raise ValueError(f"`M` must be {names}, None or a LinearOperator, got {M!r}.")
        return PRECONDITIONERS[M]

    def make(_: TorchLinearOperator, __: Any) -> Callable[[Tensor], Tensor]:
        operator = as_operator(M)
        if operator.shape != A.shape:
            raise ValueError(f"`M` must have the shape of the operator, {A.shape}, got {operator.shape}.")
        return lambda R: operator.multiply(R.to(operator.device)).to(R)

    return make


def refuse_singular(A: TorchLinearOperator, damping: float) -> None:
    """Raise ValueError if F + λI is singular because G has too few rows."""
    if damping > 0 or A.score_matrix is None:
        return
    D, rows = A.shape[0], A.score_matrix.shape[0]
    regular = int((A.shift > 0).sum()) if isinstance(A.shift, Tensor) else D * (A.shift > 0)
    if rows + regular < D:
        raise ValueError(SINGULAR.format(f"its rank is at most {rows + regular} of {D}"))


def least(damping: Any) -> float:
    """Return the smallest entry of a damping, a number or (D,)."""
    return float(damping.min()) if isinstance(damping, Tensor) else float(damping)


def _right_hand_sides(A: TorchLinearOperator, b: Any) -> tuple[Vectors, Tensor]:
    """Return right-hand sides as they entered, and in the compute precision, (K, D)."""
    vectors = A._enter(b, "solve")
    B = vectors.rows
    if B.is_complex():
        raise TypeError("`b` must be real, got a complex array. Solve for its real and imaginary parts.")
    if not bool(B.isfinite().all()):
        raise ValueError("`b` must be finite, got NaN or infinity. Check the gradients that it is made of.")
    return vectors, A._narrowed(B)


def _shape(vectors: Vectors, B: Tensor) -> tuple[int, ...]:
    return tuple(B.shape[1:] if vectors.is_single else B.T.shape)


def _reporting(callback: Callable[[int, Any], object], vectors: Vectors) -> Callable[[int, Tensor], None]:
    """Return the callback for residual norms (K,), which it gets in the library of the right-hand sides."""

    def report(done: int, norms: Tensor) -> None:
        callback(done, vectors.leave_numbers(norms))

    return report


def _solution(solved: Solved, vectors: Vectors, method: str) -> Solution:
    """Return solutions in the library of the right-hand sides."""
    X, norms = solved.X, solved.norms
    residual = float(norms[0]) if vectors.is_single else vectors.leave_numbers(norms.to(X.dtype))
    if not bool(X.isfinite().all()):
        raise FloatingPointError(
            f"the solution must be within the range of {str(X.dtype).removeprefix('torch.')}, got NaN or infinity. "
            "Scale `b`, raise the damping, or pass dtype='float64' to the operator."
        )
    return Solution(vectors.leave(X), residual, solved.iterations, solved.converged, method)


def _converged(solution: Solution) -> Solution:
    if not solution.converged:
        raise _unsolved(solution.iterations, solution.residual)
    return solution


def _unsolved(iterations: int, residual: Any) -> RuntimeError:
    return RuntimeError(
        f"the system was not solved to its tolerance in {iterations} iterations (residual {residual}). Raise the "
        "damping or `rtol`, or pass dtype='float64' to the operator."
    )
