"""The distribution of the eigenvalues."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fisherops import _arrays
from fisherops._torch import outside_of_autocast
from fisherops.linalg.lanczos import Matrix
from fisherops.linalg.methods import EIGENVALUES, EXACT, Task, as_operator, choose
from fisherops.linalg.results import Density

_BINS = 60


@outside_of_autocast
def spectral_density(
    op: Any, grid: Any = None, *, method: str = "auto", probes: int = 20, steps: int = 80, seed: int = 0
) -> Density:
    """Count the eigenvalues of F in the bins of a grid.

    Parameters
    ----------
    op : LinearOperator
        F, symmetric and positive semi-definite, (D, D).
    grid : array, optional
        (n + 1,), ascending edges of the bins. None makes 60 bins of equal width in log λ, from the size below which
        eigenvalues are zero to rounding, about λ_max · n · eps for a matrix of size n, to just above λ_max.
    method : {"auto", "dual", "dense", "primal"}
        "dual" and "dense" count all eigenvalues; "primal" is stochastic Lanczos quadrature, whose mean over random
        vectors has a standard error. It resolves the upper end of the spectrum to single eigenvalues, and in the bulk
        as many bins as it has steps. The standard error is that of the random vectors, not of this resolution.
        Default: the cheapest.
    probes, steps : int
        Number of random vectors of the primal method, at least 2, and number of products with each. Default: 20 and 80.
    seed : int
        Seed of the probes. Default: 0.

    Returns
    -------
    Density
        The edges of the bins, the expected number of eigenvalues in each, and its standard error.

    Raises
    ------
    TypeError
        If `op` is not a real LinearOperator.
    ValueError
        If `op` is not square, an argument is out of range, or `method` is not available for `op` within its
        ``max_memory``.

    Examples
    --------
    >>> import torch, fisherops as fo
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 4), torch.randint(3, (50,))
    >>> op = fo.FisherMCLinearOperator(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=(X, y))
    >>> density = fo.linalg.spectral_density(op, [1e-6, 1e-2, 1.0])
    >>> density.counts.shape
    (2,)
    """
    A = as_operator(op)
    task = Task(EXACT * probes * steps, EIGENVALUES, is_spectrum=True)
    chosen = choose(A, task, method, probes=probes, steps=steps, seed=seed)
    if grid is None:
        top = chosen.largest_eigenvalue() + chosen.shift
        edges = _default_grid(top, chosen.zero(top))
    else:
        edges = np.asarray(_arrays.enter(grid)[0].cpu(), dtype=float)
        if edges.ndim != 1 or len(edges) < 2 or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
            raise ValueError(f"`grid` must be at least two ascending, finite edges, got {grid!r}.")

    def in_bins(nodes: Matrix) -> Matrix:
        """Return (m, n + 2): below, in each bin, above."""
        nodes = nodes.clip(min=0) if edges[0] >= 0 else nodes
        bins = np.searchsorted(edges, nodes, side="right")
        bins[nodes == edges[-1]] = len(edges) - 1
        return np.asarray(np.eye(len(edges) + 1)[bins])

    counts, errors = chosen.spectral_sum(in_bins)
    return Density(edges, counts[1:-1], errors[1:-1], float(counts[0]), float(counts[-1]), chosen.name)


def _default_grid(top: float, threshold: float) -> Matrix:
    if not top > 0:
        return np.linspace(0.0, 1.0, _BINS + 1)
    eps = float(torch.finfo(torch.float32).eps)
    return np.asarray(np.geomspace(max(threshold, 1e-300), top * (1 + 1000 * eps), _BINS + 1))
