"""Step index of the Triton backend: the step's own tensors, and bounds that decide which kernels run on which grid.

Kernels find their sequence, positions and blocks in device memory, so that one captured graph serves every step that
its buffers hold. Making the index launches nothing and waits for nothing.

S sequences · W blocks per table
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from batchinfer_kernels.contract import AttentionFacts, StepInputs

SPLIT_TOKENS = 256  # the least, a power of two; of 8-bit keys twice as many, as what a split writes counts double
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class TritonStepIndex:
    """Step and the splits of its decodes' contexts.

    Split i of a context is its tokens i * split_tokens .. (i + 1) * split_tokens - 1. The size depends on the width of
    the block tables and the cache's dtype alone, which an engine keeps, so that a row's bits depend on its sequence and
    not on the batch; `num_splits`, the bound of the grid, follows the longest context of the step.
    """

    step: StepInputs
    split_tokens: int
    num_splits: int


def prepare(step: StepInputs, kv_N2KBD: Tensor, attention: AttentionFacts) -> TritonStepIndex:
    """Return the index of one step. Of `kv_N2KBD`, any layer's cache, only shape and dtype count."""
    capacity_tokens = step.block_tables_SW.shape[1] * kv_N2KBD.shape[3]
    split_tokens = SPLIT_TOKENS * 2 if kv_N2KBD.dtype.itemsize == 1 else SPLIT_TOKENS
    while split_tokens * MAX_SPLITS < capacity_tokens:
        split_tokens *= 2
    return TritonStepIndex(step, split_tokens, max(1, -(-step.max_length // split_tokens)))
