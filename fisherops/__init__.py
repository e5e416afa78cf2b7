"""The Fisher information matrix of a PyTorch model as a true SciPy ``LinearOperator``."""

import time

_begun = time.perf_counter()

from fisherops import approximate, distributed, linalg, optim
from fisherops.fisher import FisherOperator
from fisherops.operators import EmpiricalFisherLinearOperator, FisherLinearOperator, FisherMCLinearOperator
from fisherops.scores import PlanWarning
from fisherops.stored import load_scores

__version__ = "0.1.0"

IMPORT_SECONDS = time.perf_counter() - _begun
"""Seconds that this import took, which are part of the total that the command line prints."""

__all__ = [
    "EmpiricalFisherLinearOperator",
    "FisherLinearOperator",
    "FisherMCLinearOperator",
    "FisherOperator",
    "PlanWarning",
    "__version__",
    "approximate",
    "distributed",
    "linalg",
    "load_scores",
    "optim",
]
