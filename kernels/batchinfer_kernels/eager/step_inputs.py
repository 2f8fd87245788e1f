"""Inputs of a step from what was uploaded of it and the state by seat.

Letters: see batchinfer_kernels.steps.
"""

from __future__ import annotations

import torch

from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.steps import PackedStep, SeatState


def expand_step(step: PackedStep, state: SeatState, block_size: int, out: StepInputs) -> None:
    """Fill the tensors of `out`, padding included. `out.seats_S` may not be None."""
    assert out.seats_S is not None
    count, tokens = len(step.seats_S), len(step.tokens_T)
    seats_S, starts_S, queries_X = step.seats_S.long(), step.starts_S.long(), step.query_starts_X.long()

    out.seats_S[:count] = step.seats_S
    out.seats_S[count:] = len(state.last_tokens_P) - 1
    out.query_starts_X[: count + 1] = step.query_starts_X
    out.query_starts_X[count + 1 :] = tokens
    out.lengths_S[:count] = starts_S + queries_X.diff()
    out.lengths_S[count:] = 0
    out.prompt_S[:count] = starts_S < state.prompt_tokens_P[seats_S]
    out.prompt_S[count:] = False

    token_T = torch.arange(tokens, device=queries_X.device)
    sequence_T = torch.searchsorted(queries_X[1:], token_T, right=True)
    seat_T = seats_S[sequence_T]
    position_T = starts_S[sequence_T] + token_T - queries_X[sequence_T]
    block_T = state.block_tables_PW[seat_T, position_T // block_size].long()
    out.tokens_T[:tokens] = torch.where(step.tokens_T < 0, state.last_tokens_P[seat_T], step.tokens_T)
    out.tokens_T[tokens:] = 0
    out.positions_T[:tokens] = position_T
    out.positions_T[tokens:] = 0
    out.slots_T[:tokens] = block_T * block_size + position_T % block_size
    out.slots_T[tokens:] = -1
