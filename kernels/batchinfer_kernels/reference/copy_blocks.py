"""Blocks of a KV cache copied within it. N blocks · K kv heads · B slots per block · D head size"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_blocks(caches: Sequence[tuple[Tensor, Tensor]], sources: Sequence[int], targets: Sequence[int]) -> None:
    """All [N, K, B, D]. A target may be a source too: all sources are read first."""
    device = caches[0][0].device
    from_C, to_C = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
    for pair in caches:
        for cache_NKBD in pair:
            cache_NKBD[to_C] = cache_NKBD[from_C]
