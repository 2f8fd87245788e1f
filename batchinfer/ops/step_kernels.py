"""Ops of steps whose tokens stay on the device, beside those of a forward pass. Nothing here waits for the device.

State: none; callers own `SeatState` and every buffer. Flow of a step: `update_seats` and `expand_step` after the
upload, the forward pass, then `sample_rows` and `gather_logprobs`. Failure: torch's errors; a row that cannot be
sampled says so in its status.

Letters: see batchinfer_kernels.steps.
"""

from __future__ import annotations

from typing import Protocol

from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.steps import LogprobRows, PackedStep, SampledRows, SampleRows, SeatState, SeatUpdates
from torch import Tensor


class StepKernels(Protocol):
    """Kernels of one device that a captured graph or a runner ahead of the device needs."""

    def update_seats(self, updates: SeatUpdates, state: SeatState) -> None:
        """Write appended blocks and joining sequences into the state."""

    def expand_step(self, step: PackedStep, state: SeatState, block_size: int, out: StepInputs) -> None:
        """Fill the tensors of `out`, which may have room for more tokens and sequences than the step.

        `out.block_tables_SW` is the state's and is not written. Padding: tokens 0 at position 0 in slot -1; sequences
        at the dummy seat without tokens (query start T, length 0, no prompt). A sequence is a prompt if its first token
        lies in its prompt.
        """

    def sample_rows(self, logits_NV: Tensor, rows: SampleRows, state: SeatState, out: SampledRows) -> None:
        """Sample one token per row with its seat's parameters, and store it as its target's last token.

        Semantics: batchinfer.runner.sample_tokens and philox, integer weights included, so a row's token depends on its
        logits, parameters, key and position alone. logits_NV: float32, not changed; row n belongs to rows_N[n].
        """

    def gather_logprobs(
        self, logits_NV: Tensor, tokens_N: Tensor, best: int, named_NC: Tensor | None = None
    ) -> LogprobRows:
        """Return logprobs of the tokens, and of the `best` tokens of each row or of those that it names.

        Best tokens are in descending order, equals by ascending id. named_NC: int32, -1 for none; a row whose first
        entry is -1 names none and gets its best tokens. C = max(best, named_NC.shape[1]).
        """
