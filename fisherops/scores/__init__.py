"""The score matrix G, batch by batch: one file for each way to hold it.

Every form offers the same for one batch: ``apply`` (G V), ``apply_transposed`` (Gᵀ W) and ``rows``, with the rows of G
ordered by term (or datum) and then by vector of the output factor. Normalisation by c is not included.
"""

from fisherops.scores.jacobian import BatchJacobian, Differentiation
from fisherops.scores.recompute import RecomputedScores

__all__ = ["BatchJacobian", "Differentiation", "RecomputedScores"]
