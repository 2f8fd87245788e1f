"""CPU backend: C++ (kernels/csrc) for float32 on CPUs. Installed where a compiler is."""

from batchinfer_kernels.cpu.backend import CPUBackend, make_backend, problem

__all__ = ["CPUBackend", "make_backend", "problem"]
