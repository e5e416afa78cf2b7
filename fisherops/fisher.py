"""F = GᵀG + λI, the Fisher information matrix of a score matrix G, with a multiple of the identity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._linop import TorchLinearOperator, add_shift
from fisherops._processes import Processes
from fisherops._torch import opaque
from fisherops.scores import Kind
from fisherops.scores.protocol import Scores
from fisherops.scores.selected import SelectedScores, selected
from fisherops.stacked import StackedScores


class FisherOperator(TorchLinearOperator):
    """GᵀG + shift · I, symmetric and positive semi-definite; its positive multiples and sums are of this class too.

    With a vector as shift, its entries are added to the diagonal.

    Parameters
    ----------
    scores : ScoreMatrix or StoredScores
        G, such as ``op.scores``, ``G.on(data)`` or ``load_scores(path)``.
    shift : float or torch.Tensor
        λ ≥ 0, or (D,). Default: 0.
    """

    score_matrix: Scores

    def __init__(self, scores: Scores, shift: float | Tensor = 0.0) -> None:
        if not isinstance(scores, Scores):
            raise TypeError(f"`scores` must be a score matrix, got {type(scores).__name__}. Pass `op.scores`.")
        D = scores.parameters.numel
        super().__init__((D, D), scores.torch_dtype, scores.device)
        self.score_matrix, self.shift = scores, shift

    @property
    @opaque
    def scores(self) -> Scores:
        """The score matrix G, F = GᵀG, as an operator (rows, D): :class:`fisherops.score_matrix.ScoreMatrix`.

        Always the same object. Reads the data if nothing is cached yet, because the rows must have an order. That of a
        sum, a multiple or a submatrix has products, `gram`, `rows` and `row_norms`, but no `on`, `datum` and `plan`.
        """
        self.score_matrix.require_order()
        return self.score_matrix

    # ---- Products -----------------------------------------------------------------------------

    def _mul(self, V: Tensor) -> Tensor:
        return add_shift(self.score_matrix.product(V), V, self.shift)

    @opaque
    def todense(self) -> np.ndarray[Any, Any]:
        """Return F as a NumPy array of shape (D, D), from the rows of G."""
        F = self.score_matrix.dense()
        F.diagonal().add_(self.shift)
        return _arrays.to_numpy(F)

    @opaque
    def diagonal(self) -> np.ndarray[Any, Any]:
        """Return the diagonal of F as a NumPy array of shape (D,), exactly: the squared norms of the columns of G."""
        diagonal: Tensor = self.score_matrix.col_squares() + self.shift
        return _arrays.to_numpy(diagonal)

    @opaque
    def trace(self) -> float:
        """Return the trace of F, exactly: the squared Frobenius norm of G."""
        total = self.shift.double().sum() if isinstance(self.shift, Tensor) else self.shift * self.shape[0]
        return float(self.score_matrix.square_norm() + total)

    def damped(self, damping: Any) -> FisherOperator:  # noqa: D102 (that of the base class)
        return self._shifted(self.shift + self._as_shift(damping))

    @property
    def undamped(self) -> FisherOperator:
        """GᵀG alone."""
        return self if isinstance(self.shift, float) and self.shift == 0 else self._shifted(0.0)

    def _shifted(self, shift: float | Tensor) -> FisherOperator:
        """Return GᵀG + shift · I."""
        return FisherOperator(self.score_matrix, shift)

    @opaque
    def submatrix(self, which: Any) -> FisherOperator:
        """Return the rows and columns of some parameters, as an operator (d, d) of the same kind.

        Its products, diagonal, spectra, solves and inverse are those of the submatrix, from the same cached rows.

        Parameters
        ----------
        which : str, sequence of str, slice or array
            Names of parameters, for their blocks in this order; or indices into the flat vector, (d,) of integers, or a
            mask (D,) of booleans.

        Raises
        ------
        KeyError
            If there is no parameter of a name.
        IndexError
            If an index is out of range.
        ValueError
            If nothing is selected.

        Examples
        --------
        >>> import torch, fisherops as fo
        >>> _ = torch.manual_seed(0)
        >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
        >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
        >>> op.submatrix("bias").todense().shape
        (3, 3)
        """
        index, parameters = selected(self.score_matrix.parameters, which)
        index = index.to(self.device)
        shift = self.shift[index] if isinstance(self.shift, Tensor) else self.shift
        return FisherOperator(SelectedScores(self.score_matrix, index, parameters=parameters), shift)

    @opaque
    def to(self, device: Any) -> FisherOperator:
        """Return the same matrix, to rounding, as an operator on another device.

        The model is used as it is if it was moved there (``model.to(device)``); otherwise it is copied, with the loss,
        and later changes of the original are not followed. Draws are the same; what is cached is computed anew.

        Parameters
        ----------
        device : torch.device or str

        Returns
        -------
        FisherOperator
            Of the same class, with the same damping.

        Raises
        ------
        ValueError
            If the draws are those of ``sampler="stream"``, or the model is a callable ``X -> f``.
        NotImplementedError
            If several processes share the data.

        Examples
        --------
        >>> import torch, fisherops as fo
        >>> X, y = torch.ones(10, 4), torch.zeros(10, dtype=torch.int64)
        >>> op = fo.FisherLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
        >>> op.to("cpu").device
        device(type='cpu')
        """
        other = copy.copy(self)
        other.score_matrix = self.score_matrix.to(device)
        other.device = other.score_matrix.device
        if isinstance(self.shift, Tensor):
            other.shift = self.shift.to(other.device)
        return other

    def enter_pieces(self, tensors: Mapping[str, Tensor]) -> tuple[Any, Callable[[Any], dict[str, Tensor]]]:
        """Return one vector (D,) for tensors of the parameters' shapes, and how a vector becomes such tensors again.

        The vector has the widest of their precisions, so that a solver sees which elements its own cannot represent.
        """
        flat = torch.cat([t.reshape(-1).to(self.device) for t in tensors.values()])

        def split(x: Tensor) -> dict[str, Tensor]:
            pieces = x.split([t.numel() for t in tensors.values()])
            return {name: piece.view(t.shape) for (name, t), piece in zip(tensors.items(), pieces, strict=True)}

        return flat if flat.is_floating_point() else flat.to(self.torch_dtype), split

    def _scaled(self, alpha: Any) -> TorchLinearOperator:
        if isinstance(alpha, complex) or not 0 < alpha < float("inf") or self.score_matrix.is_divided:
            return super()._scaled(alpha)
        return FisherOperator(StackedScores([(alpha * a, G) for a, G in self.score_matrix.parts]), alpha * self.shift)

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        if not isinstance(other, FisherOperator) or not StackedScores.fits(self.score_matrix, other.score_matrix):
            return super()._plus(other)
        return FisherOperator(
            StackedScores(self.score_matrix.parts + other.score_matrix.parts), self.shift + other.shift
        )

    @property
    def kinds(self) -> frozenset[Kind]:
        """Which vectors make the rows of G."""
        return self.score_matrix.kinds

    # ---- What it is -------------------------------------------------------------------------------

    @property
    def parameter_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters by name, in the order of the flat vector."""
        return dict(self.score_matrix.parameters.shapes)

    @property
    def parameter_spans(self) -> dict[str, tuple[int, int]]:
        """Where each parameter lies in the flat vector: the first place, and the first after it."""
        return self.score_matrix.parameters.spans

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reduction, "mean" or "sum", of each head of the loss."""
        return self.score_matrix.reductions

    @property
    def num_rows(self) -> int:
        """Rows of the score matrix, of all ranks."""
        return self.score_matrix.num_rows

    @property
    def version(self) -> int:
        """A number that grows whenever the model, its tensors or the loss were seen to change."""
        return self.score_matrix.version

    def refresh(self) -> None:
        """Forget what is cached, and compute it anew in the next product.

        Changes of the model, its tensors and the loss are noticed without it, except those that
        docs/explanation/limits lists.
        """
        self.score_matrix.refresh()

    @property
    def processes(self) -> Processes:
        """The processes among which the data are divided; all of them make the same calls (see `process_group`)."""
        return self.score_matrix.processes
