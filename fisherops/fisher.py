"""F = GᵀG + λI, the Fisher information matrix of a score matrix G, with a multiple of the identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherops import _arrays
from fisherops._linop import TorchLinearOperator, Vectors, add_shift, check_result, opaque
from fisherops._processes import Processes
from fisherops._ranks import Alone
from fisherops._sharding import Sharding, is_sharded
from fisherops.score_matrix import ScoreMatrix
from fisherops.stacked import StackedScores


class FisherOperator(TorchLinearOperator):
    """GᵀG + shift · I, symmetric and positive semi-definite; its positive multiples and sums are of this class too.

    With a vector as shift, its entries are added to the diagonal.

    Parameters
    ----------
    scores : ScoreMatrix or StackedScores
        G.
    shift : float or torch.Tensor
        λ ≥ 0, or (D,).
    """

    score_matrix: ScoreMatrix | StackedScores

    def __init__(self, scores: ScoreMatrix | StackedScores, shift: float | Tensor = 0.0) -> None:
        D = scores.parameters.numel
        super().__init__((D, D), scores.torch_dtype, scores.device)
        self.score_matrix, self.shift = scores, shift

    @property
    @opaque
    def scores(self) -> ScoreMatrix | StackedScores:
        """The score matrix G, F = GᵀG, as an operator (rows, D): :class:`fisherops.score_matrix.ScoreMatrix`.

        Always the same object. Reads the data if nothing is cached yet, because the rows must have an order.
        """
        self.score_matrix.require_order()
        return self.score_matrix

    # ---- Products -----------------------------------------------------------------------------

    def _mul(self, V: Tensor) -> Tensor:
        return add_shift(self.score_matrix.product(V), V, self.shift)

    def multiply(self, V: Tensor) -> Tensor:
        """Multiply with torch vectors (K, D); with DTensors or this rank's pieces (K, d) of sharded parameters."""
        if self.sharding is None or (not is_sharded(V) and V.shape[1] == self.sharding.numel):
            return super().multiply(V)
        local = self.sharding.local(V.T).T.to(self.torch_dtype)
        return self.sharded(check_result(self._mul(local), local).T).T  # type: ignore[no-any-return]

    @opaque
    def todense(self) -> np.ndarray[Any, Any]:
        """Return F as a NumPy array of shape (D, D), from the rows of G."""
        F = self.score_matrix.dense()
        F.diagonal().add_(self.shift)
        return F.cpu().numpy()

    @opaque
    def diagonal(self) -> np.ndarray[Any, Any]:
        """Return the diagonal of F as a NumPy array of shape (D,), exactly: the squared norms of the columns of G.

        A DTensor where the parameters are sharded.
        """
        diagonal: Any = self.score_matrix.col_norms() + self.shift
        return self.sharded(diagonal) if self.sharding is not None else diagonal.cpu().numpy()  # type: ignore[no-any-return]

    @opaque
    def trace(self) -> float:
        """Return the trace of F, exactly: the squared Frobenius norm of G."""
        total = self.shift.double().sum() if isinstance(self.shift, Tensor) else self.shift * self.shape[0]
        return float(self.score_matrix.square_norm() + total)

    def damped(self, damping: Any) -> FisherOperator:  # noqa: D102 (that of the base class)
        return FisherOperator(self.score_matrix, self.shift + self._as_shift(damping))

    @property
    def undamped(self) -> FisherOperator:
        """GᵀG alone."""
        return self if isinstance(self.shift, float) and self.shift == 0 else FisherOperator(self.score_matrix)

    def _enter(self, x: Any, name: str) -> Vectors:
        if self.sharding is None:
            return super()._enter(x, name)
        self._check_shape(_arrays.enter(x)[0], name)
        local = self.sharding.local(x)
        is_single = local.ndim == 1
        rows = (local.unsqueeze(0) if is_single else local.T).to(self.torch_dtype)
        return Vectors(
            rows,
            is_single,
            lambda V: self.sharded(V[0] if is_single else V.T),
            lambda values: values[0] if is_single else values,
        )

    def enter_pieces(self, tensors: Mapping[str, Tensor]) -> tuple[Any, Callable[[Any], dict[str, Tensor]]]:
        """Return one vector (D,) for tensors of the parameters' shapes, and how a vector becomes such tensors again.

        The vector has the widest of their precisions, so that a solver sees which elements its own cannot represent.
        """
        sharding = self.sharding
        if sharding is not None:
            local = [sharding.piece(t) for t in tensors.values()]

            def leave(x: Any) -> dict[str, Tensor]:
                pieces = x.to_local().split([len(piece) for piece in local])
                return {name: sharding.like(t, piece) for (name, t), piece in zip(tensors.items(), pieces, strict=True)}

            return self.sharded(torch.cat(local)), leave
        flat = torch.cat([t.reshape(-1).to(self.device) for t in tensors.values()])

        def split(x: Tensor) -> dict[str, Tensor]:
            pieces = x.split([t.numel() for t in tensors.values()])
            return {name: piece.view(t.shape) for (name, t), piece in zip(tensors.items(), pieces, strict=True)}

        return flat if flat.is_floating_point() else flat.to(self.torch_dtype), split

    def _scaled(self, alpha: Any) -> TorchLinearOperator:
        if isinstance(alpha, complex) or not 0 < alpha < float("inf") or self.sharding is not None:
            return super()._scaled(alpha)
        return FisherOperator(StackedScores([(alpha * a, G) for a, G in self.score_matrix.parts]), alpha * self.shift)

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        if not isinstance(other, FisherOperator) or not StackedScores.fits(self.score_matrix, other.score_matrix):
            return super()._plus(other)
        return FisherOperator(
            StackedScores(self.score_matrix.parts + other.score_matrix.parts), self.shift + other.shift
        )

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
        if self.sharding is None:
            raise ValueError("the parameters are not sharded: vectors are plain arrays.")
        if local.ndim not in (1, 2) or len(local) != self.sharding.numel:
            raise ValueError(f"got shape {tuple(local.shape)}, and this rank has {self.sharding.numel} numbers.")
        return self.sharding.whole(local.to(self.device, self.torch_dtype), self.shape[0])

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
        return self.score_matrix.shape[0]

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
    def ranks(self) -> Alone:
        """The processes among which the data are divided; all of them make the same calls (see `process_group`)."""
        return self.score_matrix.ranks

    @property
    def processes(self) -> Processes:
        """The processes that multiply together, for linear algebra."""
        return self.ranks if self.sharding is None else self.sharding.processes

    @property
    def sharding(self) -> Sharding | None:
        """How the parameters are divided among the ranks; None where each rank has all of them."""
        return self.score_matrix.sharding
