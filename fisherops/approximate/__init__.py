"""Structured approximations of a Fisher matrix F = GᵀG, made from G, each a SciPy operator.

:func:`kfac`, :func:`ekfac`, :func:`kronecker`, :func:`layers`, :func:`diagonal` and :func:`nystrom` return a
:class:`StructuredOperator` K with inverses, roots, determinants and spectra in closed form. :func:`error` returns its
distance from F, and :func:`compare` its error, memory, time and worth as a preconditioner.
"""

from fisherops.approximate.distance import Comparison, Error, compare, error
from fisherops.approximate.exact import diagonal, layers
from fisherops.approximate.factored import ekfac, kfac, kronecker
from fisherops.approximate.lowrank import nystrom
from fisherops.approximate.structured import (
    BlockDiagonal,
    Eigen,
    Kronecker,
    LowRank,
    SlogDet,
    StructuredOperator,
    load,
)

__all__ = [
    "BlockDiagonal",
    "Comparison",
    "Eigen",
    "Error",
    "Kronecker",
    "LowRank",
    "SlogDet",
    "StructuredOperator",
    "compare",
    "diagonal",
    "ekfac",
    "error",
    "kfac",
    "kronecker",
    "layers",
    "load",
    "nystrom",
]
