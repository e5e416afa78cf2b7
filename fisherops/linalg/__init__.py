"""Linear algebra with Fisher operators: spectra, solves, determinants, bounds.

Each routine uses one of three methods, the cheapest by predicted cost and memory unless `method` names one, and reports
it in its result: "dual" from the Gram matrix G Gᵀ (rows × rows), "dense" from F itself (D × D), both exact to rounding;
and "primal" by products with F alone. Operators are those of this package, and any other symmetric, positive
semi-definite SciPy ``LinearOperator``; those that are not a Fisher have no score matrix, hence no dual method.

Arrays go in and out as in products: a result has the library and device of the argument (`b`, `grad`), or of `like`;
NumPy otherwise.
"""

from fisherops.linalg.bounds import crlb
from fisherops.linalg.density import spectral_density
from fisherops.linalg.eigen import eigsh, eigvalsh
from fisherops.linalg.estimates import diagonal, effective_dimension, frobenius_norm, slogdet, trace
from fisherops.linalg.inv_quad import inv_quad
from fisherops.linalg.results import (
    Bounds,
    Density,
    Draws,
    Eigenpairs,
    Estimate,
    Interrupted,
    InverseForms,
    LogDeterminant,
    Solution,
)
from fisherops.linalg.sample import sample
from fisherops.linalg.solve import Inverse, inv, natural_gradient, solve

__all__ = [
    "Bounds",
    "Density",
    "Draws",
    "Eigenpairs",
    "Estimate",
    "Interrupted",
    "Inverse",
    "InverseForms",
    "LogDeterminant",
    "Solution",
    "crlb",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "eigvalsh",
    "frobenius_norm",
    "inv",
    "inv_quad",
    "natural_gradient",
    "sample",
    "slogdet",
    "solve",
    "spectral_density",
    "trace",
]
