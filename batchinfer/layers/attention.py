"""Attention over the paged cache: fused QKV, optional QK norm, rope or none, window, soft cap.

T tokens of a step · S sequences · N sampled rows, or blocks of the cache · B blocks per table, or slots per block ·
H query heads · K kv heads · D head size · E hidden size
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's flat batch. All tensors on the decoder's device; the lists are on the host, so nothing ever syncs.

    Sequence s owns tokens query_starts[s] .. query_starts[s + 1] - 1: the last ones of its context, which has
    lengths[s] tokens, these included. Its context's position p lies in slot p % block_size of block
    block_tables[s, p // block_size]. Every sequence has at least one token here. Entries of a table beyond the
    context are never used, and may be anything.
    """

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64
    slots_T: Tensor  # int64, block * block_size + offset: where the token's key and value go
    block_tables_SB: Tensor  # int32, B ≥ ceil(max(lengths) / block_size)
    query_starts: list[int]  # [S + 1], from 0 to T
    lengths: list[int]  # [S]
    sample_rows_N: Tensor  # int64, indices into T: the rows that reach the LM head
