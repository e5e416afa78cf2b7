"""The score matrix G, batch by batch: one file for each way to hold it.

Every form of a batch offers the same, with vectors as rows: ``product`` (GᵀG V), ``apply`` (G V), ``apply_t`` (Gᵀ W),
``diagonal`` and ``rows``, with the rows of G ordered by block of the output factor and then by vector.
"""

from fisherops.scores.batch import MaterializedBatch
from fisherops.scores.build import PlanWarning
from fisherops.scores.cache import CACHES, BatchScores, Cache, compute
from fisherops.scores.kinds import Empirical, Exact, FactorOf, Kind, MonteCarlo
from fisherops.scores.lazy import LazyBatch
from fisherops.scores.plan import Plan
from fisherops.scores.projection import Projection
from fisherops.scores.store import InOrder

__all__ = [
    "CACHES",
    "BatchScores",
    "Cache",
    "Empirical",
    "Exact",
    "FactorOf",
    "InOrder",
    "Kind",
    "LazyBatch",
    "MaterializedBatch",
    "MonteCarlo",
    "Plan",
    "PlanWarning",
    "Projection",
    "compute",
]
