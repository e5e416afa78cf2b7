"""The Fisher information matrix of a PyTorch model as a true SciPy ``LinearOperator``."""

from fisherops.fisher import FisherMCLinearOperator

__version__ = "0.1.0"

__all__ = ["FisherMCLinearOperator", "__version__"]
