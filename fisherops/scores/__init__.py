"""The score matrix G, batch by batch: one file for each way to hold it.

Every form offers the same for one batch: ``product`` (GᵀG V), ``apply`` (G V), ``apply_transposed`` (Gᵀ W), ``rows``,
with the rows of G ordered by block of the output factor and then by vector.
"""

from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.build import PlanWarning
from fisherops.scores.plan import CACHES, Keeper, Plan, Scores, compute
from fisherops.scores.recompute import RecomputedScores
from fisherops.scores.spill import InOrder

__all__ = [
    "CACHES",
    "InOrder",
    "Keeper",
    "MaterializedBatch",
    "Plan",
    "PlanWarning",
    "RecomputedScores",
    "Scores",
    "compute",
]
