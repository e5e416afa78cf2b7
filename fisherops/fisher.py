"""The Fisher operators: likelihood × scores × reduction over the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import likelihoods
from fisherops._data import Batch, Data
from fisherops._draws import StreamDraws
from fisherops._linop import TorchLinearOperator
from fisherops._model import as_function, fixed_randomness, module_names, watch_modules
from fisherops._params import Parameters, as_dtype, select
from fisherops._sums import CompensatedSum
from fisherops.likelihoods import Draws, OutputFactor, Terms
from fisherops.scores import Differentiation, RecomputedScores

# Columns of one product that are differentiated together; each holds the activations of a batch.
_COLUMNS = 32


class _FisherOperator(TorchLinearOperator):
    """F = (1/c) Σ_b G_bᵀ G_b over the batches b of a data set; subclasses choose the output factor."""

    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Any,
        data: Any,
        *,
        progressbar: bool,
        check_deterministic: bool,
        num_data: int | None,
        batch_size_fn: Callable[[Any], int] | None,
        dtype: Any,
        batch_size: int | None,
    ) -> None:
        self._likelihood = likelihoods.of_loss(loss_func)
        self._parameters = Parameters(select(model_func, params), as_dtype(dtype))
        self._model_func = model_func
        self._model = as_function(model_func, self._parameters, functional=isinstance(params, Mapping))
        self._differentiation = Differentiation(self._evaluate, self._likelihood.flatten, self._parameters)
        self._data = Data(
            data,
            device=self._parameters.device,
            dtype=self._parameters.dtype,
            convert=self._parameters.converts,
            batch_size=batch_size,
            batch_size_fn=batch_size_fn,
            num_data=num_data,
            verify=check_deterministic,
            progressbar=progressbar,
        )
        D = self._parameters.numel
        super().__init__((D, D), self._parameters.dtype, self._parameters.device)
        if check_deterministic:
            self._check_deterministic()

    # ---- What a subclass says -----------------------------------------------------------------

    @abstractmethod
    def _start_draws(self) -> Draws:
        """Return the sampler for one pass over the data."""

    @abstractmethod
    def _factor(self, f: Tensor, terms: Terms, draws: Draws) -> OutputFactor:
        """Return S for flattened outputs (T, C)."""

    # ---- Products -----------------------------------------------------------------------------

    def _apply(self, V: Tensor) -> Tensor:
        total = CompensatedSum()
        with self._pass("product") as batches:
            for scores in batches:
                # Columns lie one after the other in memory (hence .T), as `Parameters.split` gives and takes them.
                blocks = [
                    scores.apply_transposed(scores.apply(columns)).T for columns in torch.split(V, _COLUMNS, dim=1)
                ]
                total.add((torch.cat(blocks) if len(blocks) > 1 else blocks[0]).T)
        return total.value().div_(self._divisor)

    def todense(self) -> np.ndarray[Any, Any]:
        """Return F as a NumPy array of shape (D, D), from the rows of G."""
        total = self._sum_over_rows("dense", lambda rows: rows.T @ rows)
        return total.cpu().numpy()

    def diagonal(self) -> np.ndarray[Any, Any]:
        """Return the diagonal of F as a NumPy array of shape (D,), exactly: the squared norms of the columns of G."""
        return self._diagonal().cpu().numpy()

    def trace(self) -> float:
        """Return the trace of F, exactly: the squared Frobenius norm of G."""
        return float(self._diagonal().sum(dtype=torch.float64))

    def _diagonal(self) -> Tensor:
        return self._sum_over_rows("diagonal", lambda rows: rows.square().sum(0))

    def _sum_over_rows(self, description: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        total = CompensatedSum()
        with self._pass(description) as batches:
            for scores in batches:
                for rows in scores.rows():
                    total.add(function(rows))
        return total.value().div_(self._divisor)

    # ---- One pass over the data ---------------------------------------------------------------

    @contextmanager
    def _pass(self, description: str) -> Iterator[Iterable[RecomputedScores]]:
        """Read all batches once, as blocks of G; afterwards ``self._divisor`` is c."""
        with fixed_randomness(self.device, 0), torch.inference_mode(False):
            yield self._scores(description)

    def _scores(self, description: str) -> Iterator[RecomputedScores]:
        draws = self._start_draws()
        point = self._parameters.point()
        divisor = 0.0
        for batch in self._data.batches(f"{type(self).__name__} {description}"):
            jacobian = self._differentiation.at(point, batch.X)
            _check_finite(jacobian.outputs, batch)
            terms = self._terms(jacobian.output_shape, batch)
            divisor += float(terms.divisor)
            yield RecomputedScores(jacobian, self._factor(jacobian.outputs, terms, draws), batch.size)
        if self._likelihood.reduction == "sum":
            divisor = 1.0
        elif divisor == 0:
            raise ValueError(
                "every loss term of the data is ignored or has weight 0, so reduction='mean' divides by zero: "
                "check `ignore_index` and the class weights, or use reduction='sum'."
            )
        self._divisor = divisor

    def _evaluate(self, point: Mapping[str, Tensor], X: Any) -> Tensor:
        f = self._model(point, X)
        if not isinstance(f, Tensor):
            raise TypeError(
                f"the model must return one tensor, got {type(f).__name__}: wrap it, for example "
                "`model_func=lambda X: model(**X).logits` with `params=list(model.parameters())`."
            )
        if not f.is_floating_point():
            raise TypeError(f"the model must return real floating-point outputs, got {f.dtype}.")
        if f.ndim == 0:
            raise ValueError("the model must return outputs with a batch axis, got a 0-d tensor.")
        return f.to(self._parameters.dtype)

    def _terms(self, output_shape: torch.Size, batch: Batch) -> Terms:
        try:
            return self._likelihood.terms(output_shape, batch.y)
        except ValueError as error:
            raise ValueError(f"batch {batch.number}: {error}") from None

    # ---- Checks -------------------------------------------------------------------------------

    def _check_deterministic(self) -> None:
        """Evaluate the model twice and read the data twice, with other random numbers each time."""
        point = self._parameters.point()
        with fixed_randomness(self.device, 1), torch.inference_mode(False), torch.no_grad():
            for batch in self._data.batches(f"{type(self).__name__} check"):
                with watch_modules() as faults:
                    f = self._evaluate(point, batch.X)
                if faults:
                    raise ValueError(_describe_faults(self._model_func, faults))
                _check_finite(f, batch)
                self._likelihood.flatten(f)
                self._terms(f.shape, batch)
                with fixed_randomness(self.device, 2):
                    again = self._evaluate(point, batch.X)
                tolerance = torch.finfo(f.dtype).eps ** 0.5 * f.abs().max()
                if again.shape != f.shape or not (again - f).abs().max() <= tolerance:
                    raise RuntimeError(
                        f"the model is not deterministic: two evaluations of batch {batch.number} differ. Switch the "
                        "randomness off (`model.eval()`, no functional dropout in training mode), or pass "
                        "check_deterministic=False to take it with fixed random numbers."
                    )
        with fixed_randomness(self.device, 2):
            for _ in self._data.batches(f"{type(self).__name__} check"):
                pass


class FisherMCLinearOperator(_FisherOperator):
    r"""The Monte-Carlo Fisher information matrix of a model as a SciPy ``LinearOperator``.

    .. math::

        F = \frac{1}{c} \sum_{n,t} w_{nt}\, J_{nt}^\top
            \Big[\frac{1}{M} \sum_{m=1}^{M} s(\tilde y_{ntm})\, s(\tilde y_{ntm})^\top\Big] J_{nt},
        \qquad \tilde y_{ntm} \sim q(\cdot \mid f_{nt}),
        \quad s(y) = \nabla_f \big(-\log q(y \mid f)\big)

    for the data n, their loss terms t (one for plain classification; tokens or pixels otherwise), outputs
    :math:`f_{nt} \in \mathbb{R}^C` with Jacobians :math:`J_{nt}` (C × D) and observation weights :math:`w_{nt}`. Its
    expectation over the draws is the type-I (exact) Fisher. F is symmetric and positive semi-definite, and one fixed
    matrix as long as the parameters do not change: every product uses the same draws. It is (1/c) of the Fisher of the
    summed loss, with c = 1 for ``reduction="sum"`` and c what torch divides by, *over the whole data set*, for
    ``reduction="mean"``; splitting the data into other batches does not change c.

    Parameters
    ----------
    model_func : nn.Module or callable
        A module; a callable ``X -> f``; or, with `params` a mapping, a callable ``(params, X) -> f``. X is what `data`
        yields: a tensor, a mapping, a tuple or any object.
    loss_func : nn.Module
        ``MSELoss`` (outputs (batch, ..., C); a Gaussian of variance ½), ``CrossEntropyLoss`` (outputs
        (batch, C, ...); with ``weight`` and ``ignore_index``) or ``BCEWithLogitsLoss`` (outputs (batch, ..., C);
        targets anywhere in [0, 1]), with reduction "mean" or "sum".
    params : list of Parameter, mapping of str to Tensor, or None
        What to differentiate by; D is the number of their elements, in their order. None takes every parameter of the
        module that requires grad. Those that the model does not use have zero rows and columns in F.
    data : iterable of (X, y), or a pair of arrays (X, y)
        Mini-batches, read anew for every product, always in the same order: a list, a ``DataLoader`` without
        shuffling, any re-iterable. Or two arrays (NumPy or torch) with one row per datum. Batches are moved to the
        parameters' device; NumPy floats are converted to the compute precision.
    progressbar : bool
        Whether each pass over the data shows a tqdm bar on stderr.
    check_deterministic : bool
        Whether to check, now, that the model is deterministic and does not couple the data of a batch, and that data
        are the same on each pass (then on every pass). With False, layers such as Dropout get the same random numbers
        in every product.
    seed : int
        Seed of the draws; two operators with the same seed and data are the same matrix.
    mc_samples : int
        M, draws for each loss term.
    num_data : int or None
        Number of data, if known; checked against what `data` yields.
    batch_size_fn : callable or None
        ``X -> int``, the number of data in a batch; None takes the length of y.
    sampler : {"stream"}
        "stream" draws batch after batch from one generator, so the matrix depends on how the data are split and
        ordered: for the same seed it is the matrix of ``FisherMCLinearOperator`` of curvlinops-for-pytorch 3.0.1.
    dtype : {None, "float32", "float64"} or dtype
        Compute precision. None takes that of the parameters (float32 for half precisions). Another one is computed with
        a converted copy of the model's parameters, buffers and floating-point inputs.
    batch_size : int or None
        Rows of a batch where `data` is a pair of arrays; None takes all of them at once.

    Attributes
    ----------
    shape : tuple of int
        (D, D).
    dtype : numpy.dtype
        Compute precision.
    device : torch.device
        Where the parameters live and products are computed.

    Raises
    ------
    TypeError
        If an argument has the wrong type; if `data` can be read only once (a generator).
    ValueError
        If parameters are missing, doubled, on several devices or of several dtypes; if layers that are random or
        couple the data of a batch are in training mode; if data or targets do not fit the loss.
    NotImplementedError
        If the loss, or an operation of the model, is not supported.
    RuntimeError
        If the data or the model's outputs change from one pass to the next.
    FloatingPointError
        If an output is NaN or infinite.

    References
    ----------
    J. Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020) 1–76.
    F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation for natural gradient descent,
    NeurIPS 2019.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> from scipy.sparse.linalg import eigsh
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(4, 3)
    >>> X, y = torch.randn(100, 4), torch.randint(3, (100,))
    >>> op = fo.FisherMCLinearOperator(model, torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> op.shape, op.dtype
    ((15, 15), dtype('float32'))
    >>> eigsh(op, k=2, return_eigenvectors=False).shape
    (2,)
    """

    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Any = None,
        data: Any = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = 2147483647,
        mc_samples: int = 1,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        sampler: str = "stream",
        dtype: Any = None,
        batch_size: int | None = None,
    ) -> None:
        self._seed = _integer("seed", seed, -(2**63), 2**64 - 1)
        self._mc_samples = _integer("mc_samples", mc_samples, 1, None)
        if sampler != "stream":
            raise ValueError(f"`sampler` must be 'stream', got {sampler!r}.")
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            dtype=dtype,
            batch_size=batch_size,
        )

    def _start_draws(self) -> Draws:
        return StreamDraws(self._seed, self.device)

    def _factor(self, f: Tensor, terms: Terms, draws: Draws) -> OutputFactor:
        return self._likelihood.sample(f, terms.weights, self._mc_samples, draws)


def _check_finite(f: Tensor, batch: Batch) -> None:
    if not f.isfinite().all():
        kind = "NaN" if f.isnan().any() else "infinity"
        raise FloatingPointError(
            f"the model's output for batch {batch.number} contains {kind}: check the inputs and the parameters."
        )


def _describe_faults(model_func: Any, faults: list[tuple[torch.nn.Module, str]]) -> str:
    names = module_names(model_func, [module for module, _ in faults])
    listed = ", ".join(f"{name} {fault}" for name, (_, fault) in zip(names, faults, strict=True))
    return (
        f"the Fisher is not defined for this model as it is: {listed}. Call `model.eval()` first (a BatchNorm layer "
        "also needs running statistics), or pass check_deterministic=False to take it as it is."
    )


def _integer(name: str, value: Any, low: int, high: int | None) -> int:
    """Return an integer argument within its bounds."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    number: int = value.__index__()
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` must be {bounds}, got {number}.")
    return number
