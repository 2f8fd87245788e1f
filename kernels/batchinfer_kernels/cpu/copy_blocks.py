"""Blocks of a KV cache copied within it (csrc/ops.cpp). C copies · N blocks · K kv heads · B slots · D head size"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer_kernels import eager
from batchinfer_kernels.cpu.library import checked, functions


def copy_blocks(caches: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]) -> None:
    first = caches[0]
    if not all(x.is_contiguous() and x.shape == first.shape and x.dtype == first.dtype for x in caches):
        eager.copy_blocks(caches, sources, targets)
        return
    lowest, highest = min(*sources, *targets), max(*sources, *targets)
    if lowest < 0 or highest >= len(first):
        raise IndexError(f"blocks {lowest} to {highest} of a cache of {len(first)}")
    blocks_C = ctypes.c_int64 * len(sources)
    status = functions().copy_blocks(
        (ctypes.c_void_p * len(caches))(*(x.data_ptr() for x in caches)),
        len(caches),
        first[0].nbytes,
        blocks_C(*sources),
        blocks_C(*targets),
        len(sources),
        torch.get_num_threads(),
    )
    checked(status)
