"""Values of steps whose tokens stay on the device: state by seat, one upload per step, and sampled rows.

A runner that launches step n + 1 before it has read the tokens of step n keeps all that a step needs in device memory:
`SeatState` holds one row per seat, and a further last row for the dummy seat that padding points at. Each step uploads
one int32 buffer, whose views are `SeatUpdates`, `PackedStep` and `SampleRows`; every view begins at a multiple of four
words. `batchinfer.ops.step_kernels` has the ops over these values.

P seats and the dummy seat · W blocks per table · S sequences · X = S + 1 · T tokens · N rows that are sampled ·
U appended blocks · J sequences that join · C best or named tokens of a row · V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

JOIN_WORDS = 12
"""int32 words of a row of `SeatUpdates.joins_J12`; words 9 to 11 are zero."""

SAMPLED, NOT_FINITE = 0, 1
"""Values of `SampledRows.status_N`: the token is sound; the row's largest logit is NaN or infinite."""


class SeatState(NamedTuple):
    """State by seat on the device, for as long as the runner lives. Row P - 1 is the dummy seat."""

    block_tables_PW: Tensor  # int32
    last_tokens_P: Tensor  # int32, sampled last
    prompt_tokens_P: Tensor  # int32, length of the prompt
    keys_P: Tensor  # int64, bits of the request's unsigned random key
    temperature_P: Tensor  # float32; 0: greedy
    top_k_P: Tensor  # int32; 0: off
    log_min_p_P: Tensor  # float32; -inf: off
    top_p_P: Tensor  # float64; 1: off


class SeatUpdates(NamedTuple):
    """Changes of `SeatState` that come before a step. No seat joins twice, no table entry is written twice."""

    blocks_U3: Tensor  # int32: seat, index in its table, block
    joins_J12: Tensor  # int32: seat, prompt tokens, key (low, high), bits of temperature, top_k, bits of log min_p,
    # bits of top_p (low, high), 0, 0, 0


class PackedStep(NamedTuple):
    """A step as it is uploaded, without padding. Token -1 is the one that was sampled last at the sequence's seat."""

    seats_S: Tensor  # int32
    starts_S: Tensor  # int32, position of the first token
    query_starts_X: Tensor  # int32, from 0 to T
    tokens_T: Tensor  # int32


class SampleRows(NamedTuple):
    """Rows to sample from, int32 each. Rows of one seat (a verified draft) have different positions."""

    rows_N: Tensor  # index among the step's tokens
    seats_N: Tensor
    positions_N: Tensor  # that the sampled token gets in its sequence
    targets_N: Tensor  # seat whose last token the sampled one becomes; -1: none


class SampledRows(NamedTuple):
    """Result of sampling. A token whose status is not SAMPLED is 0."""

    tokens_N: Tensor  # int32
    status_N: Tensor  # int32


class LogprobRows(NamedTuple):
    """Logprobs: of each row's token, and of its best or named tokens (ids -1 and values 0 where it names none)."""

    own_N: Tensor  # float64
    values_NC: Tensor  # float64
    ids_NC: Tensor  # int32
