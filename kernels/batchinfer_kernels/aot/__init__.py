"""Gate without a GPU: compile the Triton kernels for every target and hold their static figures against bounds.

`python -m batchinfer_kernels.aot` runs it. Static figures show what cannot be fast (a spill, loads that nothing
overlaps, no tensor cores); they do not tune.
"""
