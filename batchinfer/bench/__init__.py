"""Benchmarks: throughput, latency, host work and kernels, each compared with the limit of the machine."""
