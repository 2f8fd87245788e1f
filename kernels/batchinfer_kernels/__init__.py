"""Kernels: one op, one name, in every backend. `reference` is the specification."""
