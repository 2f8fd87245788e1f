"""Copies of whole blocks within a KV cache.

C copies · N blocks · K kv heads · B slots per block · D head size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer_kernels.contract import BlockNumbers


def copy_blocks(caches: Sequence[Tensor], sources: BlockNumbers, targets: BlockNumbers) -> None:
    """Copy blocks of caches [N, 2, K, B, D]. A target may be a source too: all sources are read first."""
    device = caches[0].device
    from_C, to_C = torch.as_tensor(sources, device=device), torch.as_tensor(targets, device=device)
    for kv_N2KBD in caches:
        kv_N2KBD[to_C] = kv_N2KBD[from_C]
