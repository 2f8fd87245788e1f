"""Eager backend: every op in tuned torch, on every device."""

from batchinfer_kernels.eager.backend import EagerBackend, make_backend, problem

__all__ = ["EagerBackend", "make_backend", "problem"]
