"""Step index of the C++ ops: addresses of the step's tensors, which C++ reads as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from batchinfer_kernels.contract import AttentionFacts, StepInputs
from batchinfer_kernels.eager.step_index import EagerStepIndex

_DTYPES = {
    "slots_T": torch.int64,
    "block_tables_SW": torch.int32,
    "query_starts_X": torch.int64,
    "lengths_S": torch.int64,
    "prompt_S": torch.bool,
}


class StepSource(NamedTuple):
    """Arguments of `prepare`, from which an op that falls back has its own index made."""

    step: StepInputs
    kv_N2KBD: Tensor
    attention: AttentionFacts


@dataclass(slots=True)
class CPUStepIndex:
    """Addresses of contiguous arrays, which `held` keeps alive."""

    slots: int
    tables: int
    query_starts: int
    lengths: int
    prompts: int
    table_stride: int
    num_sequences: int
    held: list[Tensor]
    source: StepSource
    eager: EagerStepIndex | None = None  # of the same step, once an op fell back


def prepare(step: StepInputs, kv_N2KBD: Tensor, attention: AttentionFacts) -> CPUStepIndex:
    """Build the index of one step. Raises TypeError for a tensor of another dtype than StepInputs says."""
    held = []
    for name, dtype in _DTYPES.items():
        tensor = getattr(step, name).contiguous()
        if tensor.dtype != dtype:
            raise TypeError(f"StepInputs.{name} is {tensor.dtype}, not {dtype}")
        held.append(tensor)
    slots, tables, query_starts, lengths, prompts = (tensor.data_ptr() for tensor in held)
    return CPUStepIndex(
        slots,
        tables,
        query_starts,
        lengths,
        prompts,
        table_stride=held[1].shape[1],
        num_sequences=len(step.lengths_S),
        held=held,
        source=StepSource(step, kv_N2KBD, attention),
    )
