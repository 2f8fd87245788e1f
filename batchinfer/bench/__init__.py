"""Measurements: throughput, latency, host work and kernels, each beside the limit of the machine it ran on."""
