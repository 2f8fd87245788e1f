"""Benchmark of other engines on the same workloads: `make peers`."""
