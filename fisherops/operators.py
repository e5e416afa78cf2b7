"""The three Fisher operators of a model and its data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._checks import integer
from fisherops._data import Data, place_alone
from fisherops._linop import Vectors
from fisherops._torch import opaque
from fisherops.fisher import FisherOperator
from fisherops.parallel.fsdp import ShardedScores, group_for, make_problem, scores_of
from fisherops.parallel.scores import DistributedScores
from fisherops.parallel.shard import Placement, with_indices
from fisherops.score_matrix import ScoreMatrix
from fisherops.scores import Empirical, Exact, Kind, MonteCarlo, Plan
from fisherops.scores.kinds import as_seed
from fisherops.scores.reader import Reader, as_weights, name_of_loss


class ShardableFisherOperator(FisherOperator):
    """F, with a method that makes vectors where they are divided among processes."""

    score_matrix: ScoreMatrix | DistributedScores

    def _shifted(self, shift: float | Tensor) -> ShardableFisherOperator:
        return ShardableFisherOperator(self.score_matrix, shift)

    def _as_shift(self, damping: Any) -> float | Tensor:
        shift = super()._as_shift(damping)
        if isinstance(shift, Tensor) and self.score_matrix.is_divided:
            raise NotImplementedError("damping by a vector is not supported for sharded parameters. Pass a number.")
        return shift

    @opaque
    def diagonal(self) -> Any:  # noqa: D102 (that of the base class)
        G = self.score_matrix
        return G.whole(G.col_squares() + self.shift) if isinstance(G, ShardedScores) else super().diagonal()

    def _enter(self, x: Any, name: str) -> Vectors:
        G = self.score_matrix
        if not isinstance(G, ShardedScores):
            return super()._enter(x, name)
        X = _arrays.enter(x)[0]
        self._check_shape(X, name)
        single = X.ndim == 1
        return Vectors(
            G.pieces(X.unsqueeze(0) if single else X.T),
            single,
            lambda V: G.whole(V[0] if single else V.T),
            lambda values: values[0] if single else values,
        )

    def _product_of_pieces(self, X: Any, name: str) -> Any:
        vectors = self._enter(X, name)
        return vectors.leave(self.multiply(vectors.rows))

    def enter_pieces(self, tensors: Mapping[str, Tensor]) -> tuple[Any, Callable[[Any], dict[str, Tensor]]]:
        """Return one vector (D,) for tensors of the parameters' shapes, and how it becomes such tensors again."""
        G = self.score_matrix
        if not isinstance(G, ShardedScores):
            return super().enter_pieces(tensors)
        return G.join(tensors), lambda x: G.split(x, tensors)

    def sharded(self, local: Tensor) -> Any:
        """Return a vector of this operator from each rank's own part of it, where the parameters are sharded (FSDP2).

        Parameters
        ----------
        local : torch.Tensor
            (d,) or (d, K), d the numbers of this rank's pieces of all parameters: these pieces (``p.to_local()``), flat
            and one after the other in the order of the parameters.

        Returns
        -------
        torch.distributed.tensor.DTensor
            (D,) or (D, K), which products take and give.

        Raises
        ------
        ValueError
            If the parameters are not sharded, or the length is not d.
        """
        if not isinstance(self.score_matrix, ShardedScores):
            raise ValueError("the parameters are not sharded: vectors are plain arrays.")
        return self.score_matrix.sharded(local)


class ModelFisherOperator(ShardableFisherOperator):
    """F of one model and one data set; subclasses choose the output factor."""

    _kind: Kind
    """Which vectors make the output factor."""

    @opaque
    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Any = None,
        data: Any = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        rows: str = "term",
        dtype: Any = None,
        batch_size: int | None = None,
        cache: str = "auto",
        max_memory: int | str | None = None,
        spill: Any = None,
        sample_weight: Any = None,
        process_group: Any = None,
    ) -> None:
        problem = make_problem(model_func, loss_func, params, dtype=dtype, any_loss=self._kind.any_loss)
        group = group_for(problem, process_group)
        own = Data(
            data if group is None else with_indices(data, group),
            device=problem.device,
            dtype=problem.parameters.dtype,
            convert=problem.model.converts,
            batch_size=batch_size,
            batch_size_fn=batch_size_fn,
            num_data=num_data,
            verify=check_deterministic,
            order=self._kind.order if sample_weight is None else self._kind.order_with_weights,
            progressbar=progressbar and (group is None or group.leads),
            place=place_alone if group is None else Placement(group),
        )
        self._loss_name, self._num_data, self._cache_name = name_of_loss(loss_func), num_data, cache
        shared: dict[str, Any] = {} if group is None else {"stream": group.rank, "total": group.sum}
        reader = Reader(
            problem,
            own,
            self._kind,
            name=type(self).__name__,
            rows=rows,
            checks=check_deterministic,
            weights=None if sample_weight is None else as_weights(sample_weight),
            **shared,
        )
        local = ScoreMatrix(reader, cache=cache, max_memory=max_memory, spill=spill)
        super().__init__(scores_of(local, group))

    def __repr__(self) -> str:
        N, processes = self.score_matrix.num_data or self._num_data, self.processes
        data = "number of examples unknown before the first pass" if N is None else f"{N:,} examples"
        if processes.size > 1:
            data += f" on rank {processes.rank} of {processes.size}"
        return (
            f"<{type(self).__name__}: D={self.shape[0]}, kind={self.score_matrix.kind.description}, "
            f"loss={self._loss_name}, {data}, {self.device}, {self.dtype.name}, cache={self._cache_name!r}>"
        )

    @property
    def plan(self) -> Plan:
        """What is cached between products, its memory and why; made by a pass over the data if there was none."""
        return self.score_matrix.plan

    @opaque
    def gradient(self) -> np.ndarray[Any, Any]:
        """Return the gradient of the loss over the whole data set as a NumPy array of shape (D,).

        The gradient is at the observed targets for all three operators, in the compute precision. Its divisor is that
        of F: with ``reduction="mean"`` the loss is the mean over the whole data set, however it is split into batches.
        With ``loss_func=None`` it is the gradient of the summed negative log-likelihood. Parameters that the model does
        not use have zeros.

        Raises
        ------
        NotImplementedError
            If the parameters are sharded.
        FloatingPointError
            If a derivative is NaN or infinite.

        Examples
        --------
        >>> import torch, fisherops as fo
        >>> X, y = torch.ones(10, 1), torch.ones(10, 1)
        >>> model = torch.nn.Linear(1, 1)
        >>> _ = [p.data.fill_(1.0) for p in model.parameters()]
        >>> op = fo.FisherLinearOperator(model, torch.nn.MSELoss(), data=(X, y))
        >>> op.gradient().round(3)
        array([2., 2.], dtype=float32)
        """
        return _arrays.to_numpy(self.score_matrix.gradient())


class FisherMCLinearOperator(ModelFisherOperator):
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
    loss_func : nn.Module, Likelihood, mapping, tuple or None
        A loss that stands for a likelihood, with reduction "mean" or "sum": ``MSELoss`` (a Gaussian of variance ½),
        ``GaussianNLLLoss`` (the model returns (mean, var)), ``L1Loss``, ``HuberLoss``, ``SmoothL1Loss`` (the densities
        ∝ exp(−loss)), ``PoissonNLLLoss``, ``BCEWithLogitsLoss``, ``BCELoss``, all for outputs (batch, ..., C); and
        ``CrossEntropyLoss``, ``NLLLoss`` for outputs (batch, C, ...). All with their options: class weights,
        ``ignore_index``, ``weight`` and ``pos_weight`` weight the observations. Or a likelihood of one's own, see
        :class:`fisherops.likelihoods.Likelihood`. Or a mapping or tuple of these, for a model that returns one, with
        targets alike; outputs without a loss are left out. Or None, for a model that returns a
        ``torch.distributions.Distribution``: the Fisher of the sum of its ``log_prob`` over the data, see
        :class:`fisherops.likelihoods.DistributionLikelihood`.
    params : list of Parameter, mapping of str to Tensor, or None
        What to differentiate by; D is the number of their elements, in their order. None takes every parameter of the
        module that requires grad. Those that the model does not use have zero rows and columns in F.
    data : iterable of (X, y) or (X, y, index), or a pair of arrays (X, y)
        Mini-batches, read again for every product: a list, a ``DataLoader``, any re-iterable. Or two arrays with one
        row per example. The order must be the same in every pass, unless batches have an `index` (see `sampler`); the
        exact and the empirical Fisher accept every order, in batches of the same shapes. Batches are moved to the
        parameters' device. NumPy floats are converted to the compute precision, and unsigned integers of 16 bits or
        more to int64. y may be None, except for the empirical Fisher and for losses that weight an observation by its
        target.
    progressbar : bool
        Whether each pass over the data shows a tqdm bar on stderr.
    check_deterministic : bool
        Whether to check, now, that the model is deterministic; and, in every pass over the data, that no layer is
        random (Dropout) or couples the data of a batch (BatchNorm in training mode), and that the data are the same as
        before (arrays in mappings, tuples and lists are compared, the contents of other objects are not). Products from
        the cache read no data. With False, random layers get the same random numbers in every evaluation.
    seed : int
        Seed of the draws; two operators with the same seed and data are the same matrix.
    mc_samples : int
        M, draws for each loss term.
    num_data : int or None
        Number of data, if known; checked against what `data` yields.
    batch_size_fn : callable or None
        ``X -> int``, the number of data in a batch; None takes the length of y.
    rows : {"term", "datum"}
        Whether each loss term has rows of its own in the score matrix (what other libraries compute), or the would-be
        gradients of a datum's terms are summed into one row for each draw: the score of the datum's joint likelihood.
        Both have the same expectation.
    sampler : {"counter", "stream"}
        "counter": each draw is a function of (seed, datum, term, sample, class) alone, by Philox4x32-10 and inverse
        distribution functions. So F does not depend on how the data are split into batches, nor on the device or the
        precision (up to rounding, which may change a draw near a boundary), and the first m of M samples are those of
        ``mc_samples=m`` (but see `fisherops.likelihoods.DistributionLikelihood`). A datum is known by its place in the
        data, or by `index` where batches are (X, y, index); then their order does not matter either, and a loader may
        shuffle.
        "stream": draws batch after batch from one generator, so the matrix depends on how the data are split and
        ordered, on the device and, for MSE and BCE, on the precision. For the same seed it is the matrix of
        ``FisherMCLinearOperator`` of curvlinops-for-pytorch 3.0.1.
    dtype : {None, "float32", "float64"} or dtype
        Compute precision. None takes that of the parameters (float32 for half precisions). Another one is computed with
        a converted copy of the model's parameters, buffers and floating-point inputs.
    batch_size : int or None
        Rows of a batch where `data` is a pair of arrays; None takes all of them at once.
    cache : {"auto", "scores", "factors", "linearization", "none"}
        What is kept between products: the cheapest for each batch and parameter; rows of the score matrix; rows, with
        the weights of dense layers as factors; the linearized model; or nothing. The matrix is the same to rounding.
        See `plan`, and docs/explanation/performance.
    max_memory : int, str or None
        How much may be kept, in bytes or as "4GiB"; None is half of what is free. Batches that do not fit are computed
        anew in every product, or kept in files.
    spill : path or None
        A folder. Rows of the score matrix that do not fit `max_memory`, dense or as factors, are kept in files there
        and mapped into memory batch by batch; they are removed with the operator. One batch must fit `max_memory`.
    sample_weight : array or None
        Weights w_n ≥ 0 of the examples, (N,), which multiply those of their loss terms (w in the formula). An example
        is known by its index in the data set, with `process_group` too, so a loader that shuffles must yield
        (X, y, index). In the exact and, in expectation, the Monte-Carlo Fisher of a sum a weight of k equals k copies
        of an example; in the empirical Fisher weights multiply gradients.
        ``reduction="mean"`` divides as the loss with a ``weight`` does: by the sum of the weights, but ``BCELoss``,
        ``BCEWithLogitsLoss``, ``HuberLoss`` and ``SmoothL1Loss`` by their number.
    process_group : torch.distributed.ProcessGroup, DeviceMesh or None
        The processes among which the data are divided: each passes its own part as `data`, see
        :func:`fisherops.distributed.shard`, and F is that of all data, on every one of them. Without indices, the data
        of a rank follow those of the ranks before. All ranks make the same calls; those that compute wait for each
        other, at most for the time limit of the group, and a rank that is missing or does something else ends the
        others with :class:`fisherops.distributed.RankError`. Sums are the same bits on every rank.

    Attributes
    ----------
    shape : tuple of int
        (D, D).
    dtype : numpy.dtype
        Compute precision.
    device : torch.device
        Where the parameters live and products are computed.
    plan : Plan
        What is kept between products and why; print it.

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
    fisherops.distributed.RankError
        If the processes of `process_group` do not do the same, or one of them is gone.
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
        rows: str = "term",
        sampler: str = "counter",
        dtype: Any = None,
        batch_size: int | None = None,
        cache: str = "auto",
        max_memory: int | str | None = None,
        spill: Any = None,
        sample_weight: Any = None,
        process_group: Any = None,
    ) -> None:
        kind = MonteCarlo(integer("mc_samples", mc_samples, 1), as_seed(seed), stream=sampler == "stream")
        if sampler not in ("counter", "stream"):
            raise ValueError(f"`sampler` must be 'counter' or 'stream', got {sampler!r}.")
        self._kind = kind
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            rows=rows,
            dtype=dtype,
            batch_size=batch_size,
            cache=cache,
            max_memory=max_memory,
            spill=spill,
            sample_weight=sample_weight,
            process_group=process_group,
        )

    @opaque
    def resample(self, seed: int) -> FisherMCLinearOperator:
        """Return the operator with other draws for the same model and data; what was learnt about those is shared.

        Parameters
        ----------
        seed : int
            As of the operator.

        Returns
        -------
        FisherMCLinearOperator
            The operator that would have been made with this seed, without checking model and data again. Where the
            linearized model is kept, both share it; rows depend on the draws and are made anew.
        """
        other = copy.copy(self)
        assert isinstance(self.score_matrix.kind, MonteCarlo)
        other._kind = self.score_matrix.kind.with_seed(as_seed(seed))
        other.score_matrix = self.score_matrix.redrawn(other._kind)
        return other

    @opaque
    def standard_error(self, v: Any) -> Any:
        r"""Estimate the standard error of vᵀFv that the draws cause, from the spread of the M samples of each row.

        .. math::

            \widehat{\mathrm{se}}^2 = \frac{1}{c^2} \sum_{n,t} \frac{1}{M (M - 1)}
                \sum_{m=1}^{M} \big(x_{ntm} - \bar x_{nt}\big)^2,
            \qquad x_{ntm} = w_{nt} \big(s(\tilde y_{ntm})^\top J_{nt} v\big)^2

        It is the error against the exact Fisher of the same data: vᵀFv is a sum over independent terms, so for many of
        them, and about M ≥ 8 if likelihoods have heavy tails, it lies within 1.96 standard errors of its expectation
        in about 95 % of cases. With ``rows="datum"`` n, t is a datum.

        If all M samples of every term agree to rounding, they have no spread to estimate an error from: a rare target
        may have a large score and never have been drawn. The result is then NaN, unless vᵀFv is zero.

        Parameters
        ----------
        v : array
            (D,) or (D, K), of any library that products take; real.

        Returns
        -------
        float or array
            A number for (D,); for (D, K) an array (K,) of the library of `v`. NaN if all samples agree.

        Raises
        ------
        ValueError
            If M = 1, or the shape does not fit.
        """
        M = self.score_matrix.kind.samples
        if M < 2:
            raise ValueError(
                "the standard error is estimated from the spread of the samples, and mc_samples is 1: use mc_samples=2 "
                "or more."
            )
        x, leave = _arrays.enter(v)
        self._check_shape(x, "standard_error")
        if x.is_complex():
            raise TypeError("the standard error of a quadratic form takes a real vector, got a complex one.")
        V = self._narrowed((x.T if x.ndim == 2 else x.unsqueeze(0)).to(self.device))
        if len(V) == 0:
            return leave(V[:, 0].clone())
        variance, second = self.score_matrix.moments_of_forms(V) * M
        # Samples that agree differ by rounding only, because kernels round equal rows in different ways.
        agree = variance.sqrt() <= 16 * torch.finfo(self.torch_dtype).eps * second.sqrt()
        error = torch.where(agree & (second > 0), torch.nan, variance.sqrt())
        return float(error) if x.ndim == 1 else leave(error.to(self.torch_dtype))


class FisherLinearOperator(ModelFisherOperator):
    r"""The exact (type-I) Fisher information matrix of a model as a SciPy ``LinearOperator``.

    .. math::

        F = \frac{1}{c} \sum_{n,t} w_{nt}\, J_{nt}^\top B_{nt} J_{nt},
        \qquad B_{nt} = \mathbb{E}_{y \sim q(\cdot \mid f_{nt})} \big[ s(y)\, s(y)^\top \big],

    with closed-form square roots of B: √2 I for ``MSELoss``, diag √(σ(1 − σ)) for ``BCEWithLogitsLoss`` and
    diag √p − p √pᵀ for ``CrossEntropyLoss``, which is never written out. For these three (and ``NLLLoss``,
    ``PoissonNLLLoss(log_input=True)``) it is the generalized Gauss-Newton matrix of the (weighted) loss over the whole
    data set. It does not depend on how the data are split or ordered, and it is the expectation of
    `FisherMCLinearOperator`. Where no closed form is known (and the targets are not finitely many), products raise
    NotImplementedError.

    Parameters
    ----------
    model_func, loss_func, params, data, progressbar, check_deterministic, num_data, batch_size_fn
        As for `FisherMCLinearOperator`.
    dtype, batch_size, cache, max_memory, spill, sample_weight, process_group
        As for `FisherMCLinearOperator`.

    See Also
    --------
    FisherMCLinearOperator : the Monte-Carlo estimate; its page describes the arguments, attributes and errors.
    EmpiricalFisherLinearOperator : the scores at the observed targets.

    References
    ----------
    J. Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020) 1–76.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> X, y = torch.ones(10, 1), torch.zeros(10, 1)
    >>> op = fo.FisherLinearOperator(torch.nn.Linear(1, 1), torch.nn.MSELoss(), data=(X, y))
    >>> op.todense().round(3)
    array([[2., 2.],
           [2., 2.]], dtype=float32)
    """

    _kind = Exact()

    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Any = None,
        data: Any = None,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        dtype: Any = None,
        batch_size: int | None = None,
        cache: str = "auto",
        max_memory: int | str | None = None,
        spill: Any = None,
        sample_weight: Any = None,
        process_group: Any = None,
    ) -> None:
        # Without `rows`: the terms of a datum are independent, so its joint likelihood has the same Fisher.
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            num_data,
            batch_size_fn,
            dtype=dtype,
            batch_size=batch_size,
            cache=cache,
            max_memory=max_memory,
            spill=spill,
            sample_weight=sample_weight,
            process_group=process_group,
        )


class EmpiricalFisherLinearOperator(ModelFisherOperator):
    r"""The empirical Fisher matrix of a model as a SciPy ``LinearOperator``.

    .. math::

        F = \frac{1}{c} \sum_{n,t} g_{nt}\, g_{nt}^\top,
        \qquad g_{nt} = w_{nt}\, J_{nt}^\top s(y_{nt}),

    with g the gradient of a loss term at its observed target, before ``reduction="mean"`` divides by c. For
    ``rows="datum"`` g is the gradient of an example, the sum over its terms. F is the second moment of these gradients,
    and in general neither the Fisher nor an approximation of it. Class weights, ``weight`` and ``pos_weight`` multiply
    gradients, so w enters F squared; in the other two operators w is the weight of an observation. Label smoothing and
    soft targets change s.

    Parameters
    ----------
    model_func, params, data, progressbar, check_deterministic, num_data, batch_size_fn
        As for `FisherMCLinearOperator`.
    loss_func : nn.Module, Likelihood, callable, mapping, tuple or None
        As for `FisherMCLinearOperator`, or any callable of the outputs (batch, ...) and the targets that returns the
        mean or the sum of the losses of single examples, such as ``nn.KLDivLoss(reduction="batchmean")`` or a function.
        Each example is then one term, g is the gradient of the loss of this example alone, and c is the number of
        examples for a mean. That examples are not coupled is checked in every batch.
    dtype, batch_size, cache, max_memory, spill, sample_weight, process_group
        As for `FisherMCLinearOperator`.
    rows : {"term", "datum"}
        Whether each loss term has a row of its own in the score matrix, or the gradients of a datum's terms are summed
        into one.

    See Also
    --------
    FisherMCLinearOperator : its page describes the arguments, attributes and errors.

    References
    ----------
    F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation for natural gradient descent,
    NeurIPS 2019.
    """

    _kind = Empirical()
