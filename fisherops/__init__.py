"""The Fisher information matrix of a PyTorch model as a true SciPy ``LinearOperator``."""

from fisherops import distributed, linalg
from fisherops.operators import EmpiricalFisherLinearOperator, FisherLinearOperator, FisherMCLinearOperator
from fisherops.scores import PlanWarning

__version__ = "0.1.0"

__all__ = [
    "EmpiricalFisherLinearOperator",
    "FisherLinearOperator",
    "FisherMCLinearOperator",
    "PlanWarning",
    "__version__",
    "distributed",
    "linalg",
]
