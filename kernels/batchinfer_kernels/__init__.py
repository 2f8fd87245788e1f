"""Kernels: one op, one name, in every backend. The specification is the naive float64 code of tests/kernels/naive.py.

Each folder is a backend: `problem(device)` says why it cannot serve here, `make_backend(device, report)` makes one that
satisfies the protocol of batchinfer.ops.backend. `formats` and `contract` hold what all of them know.
"""
