"""Triton backend: GPU kernels, one file per op, and the vendor's matrix products."""
