"""Benchmarks of fisherops for asv."""
