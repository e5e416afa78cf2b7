"""Operators whose data, or parameters too, are divided among the processes of torch.distributed.

Each process has a score matrix of its own part of the data; `DistributedScores` and `ShardedScores` wrap it, and offer
the same as a score matrix of all data. One process alone goes through none of it.
"""
