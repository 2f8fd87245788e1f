"""Kernels: one op, one name, in every backend. The specification is the naive float64 code of tests/kernels."""
