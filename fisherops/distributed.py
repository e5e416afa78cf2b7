"""Data divided among the processes of torch.distributed; operators take the parts with ``process_group=``."""

from fisherops.parallel.abort import RankError
from fisherops.parallel.shard import shard

__all__ = ["RankError", "shard"]
