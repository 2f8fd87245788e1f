"""Ops of steps whose tokens stay on the device, with torch ops alone: the specification of the Triton kernels.

State: none. No op reads a value back or has a shape that depends on values, so all of them run ahead of the device.
"""

from __future__ import annotations

from torch import Tensor

from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.eager.gather_logprobs import gather_logprobs
from batchinfer_kernels.eager.sample_rows import sample_rows
from batchinfer_kernels.eager.step_inputs import expand_step
from batchinfer_kernels.eager.update_seats import update_seats
from batchinfer_kernels.steps import LogprobRows, PackedStep, SampledRows, SampleRows, SeatState, SeatUpdates


class EagerStepKernels:
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
