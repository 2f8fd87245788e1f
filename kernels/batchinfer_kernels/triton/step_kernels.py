"""Ops of steps whose tokens stay on the device, as Triton kernels.

State: none. Grids depend on shapes alone, and numbers that change with every step do not specialise a kernel, so no
step compiles anything that an earlier one of its shapes has not.
"""

from __future__ import annotations

from torch import Tensor

from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.steps import LogprobRows, PackedStep, SampledRows, SampleRows, SeatState, SeatUpdates
from batchinfer_kernels.triton.gather_logprobs import gather_logprobs
from batchinfer_kernels.triton.sample_rows import sample_rows
from batchinfer_kernels.triton.step_inputs import expand_step
from batchinfer_kernels.triton.update_seats import update_seats


class TritonStepKernels:
    """See batchinfer.ops.step_kernels.StepKernels for what each op means."""

    def update_seats(self, updates: SeatUpdates, state: SeatState) -> None:
        update_seats(updates, state)

    def expand_step(self, step: PackedStep, state: SeatState, block_size: int, out: StepInputs) -> None:
        expand_step(step, state, block_size, out)

    def sample_rows(self, logits_NV: Tensor, rows: SampleRows, state: SeatState, out: SampledRows) -> None:
        sample_rows(logits_NV, rows, state, out)

    def gather_logprobs(
        self, logits_NV: Tensor, tokens_N: Tensor, best: int, named_NC: Tensor | None = None
    ) -> LogprobRows:
        return gather_logprobs(logits_NV, tokens_N, best, named_NC)
