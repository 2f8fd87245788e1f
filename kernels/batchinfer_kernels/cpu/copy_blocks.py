"""Copies of whole blocks within a KV cache (csrc/ops.cpp).

C copies · N blocks · K kv heads · B slots · D head size
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer_kernels.contract import BlockNumbers
from batchinfer_kernels.cpu.library import Functions, checked


def copy_blocks(functions: Functions, caches: Sequence[Tensor], sources: BlockNumbers, targets: BlockNumbers) -> bool:
    """Copy blocks of dense caches of one shape and dtype; return False, with nothing done, for others."""
    sources, targets = (one.tolist() if isinstance(one, Tensor) else one for one in (sources, targets))
    first = caches[0]
    if not all(x.is_contiguous() and x.shape == first.shape and x.dtype == first.dtype for x in caches):
        return False
    lowest, highest = min(*sources, *targets), max(*sources, *targets)
    if lowest < 0 or highest >= len(first):
        raise IndexError(f"blocks {lowest} to {highest} of a cache of {len(first)}")
    blocks_C = ctypes.c_int64 * len(sources)
    status = functions.copy_blocks(
        (ctypes.c_void_p * len(caches))(*(x.data_ptr() for x in caches)),
        len(caches),
        first[0].nbytes,
        blocks_C(*sources),
        blocks_C(*targets),
        len(sources),
        torch.get_num_threads(),
    )
    checked(status)
    return True
