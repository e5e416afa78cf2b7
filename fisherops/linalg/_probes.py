"""Random probes: means and standard errors of quadratic forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fisherops._linop import TorchLinearOperator
from fisherops.linalg._lanczos import Matrix, quadrature


def rademacher(A: TorchLinearOperator, count: int, seed: int) -> Tensor:
    """Return random signs (D, count), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(2, (A.shape[0], count), generator=generator, device="cpu", dtype=torch.int8)
    return signs.to(A.device, A.torch_dtype).mul_(2).sub_(1)


def spectral_sums(
    A: TorchLinearOperator, function: Callable[[Matrix], Matrix], probes: int, steps: int, seed: int
) -> tuple[Matrix, Matrix]:
    """Estimate tr f(F), for functions with several values too, and its standard error.

    Parameters
    ----------
    A : TorchLinearOperator
    function : callable
        Takes nodes (m,) and returns values (m, ...).
    probes : int
        Random vectors, at least 2.
    steps : int
        Products with each.
    seed : int

    Notes
    -----
    The standard error is that of the probes, not of the quadrature, which is exact for polynomials of degree
    2 · steps − 1.
    """
    D, sums = A.shape[0], []
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(probes):
        # In all directions alike: random signs would show no variance at all for a diagonal F.
        z = torch.randn(D, generator=generator, dtype=torch.float64, device="cpu").to(A.device, A.torch_dtype)
        nodes, weights = quadrature(lambda v: A.times_columns(v[:, None])[:, 0], z, steps)
        sums.append(D * np.tensordot(weights, function(nodes.clip(min=0)), 1))
    samples = np.asarray(sums, dtype=float)
    return samples.mean(0), samples.std(0, ddof=1) / probes**0.5
