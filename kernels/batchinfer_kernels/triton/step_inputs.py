"""Inputs of a step from what was uploaded of it and the state by seat, in one launch, padding included.

Letters: see batchinfer_kernels.steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.steps import PackedStep, SeatState
from batchinfer_kernels.triton.targets import AotCase, Target, config

_BLOCK = 128  # tokens and sequences of a program


def expand_step(step: PackedStep, state: SeatState, block_size: int, out: StepInputs) -> None:
    """Fill the tensors of `out`. `out.seats_S` may not be None; `out.block_tables_SW` is the state's."""
    room_T, room_S = len(out.tokens_T), len(out.lengths_S)
    expand_step_kernel[(triton.cdiv(max(room_T, room_S + 1), _BLOCK),)](
        *step,
        len(step.seats_S),
        len(step.tokens_T),
        state.block_tables_PW,
        state.last_tokens_P,
        state.prompt_tokens_P,
        state.block_tables_PW.stride(0),
        len(state.last_tokens_P) - 1,
        out.tokens_T,
        out.positions_T,
        out.slots_T,
        out.query_starts_X,
        out.lengths_S,
        out.prompt_S,
        out.seats_S,
        room_T,
        room_S,
        block_size,
        _BLOCK,
        **config("step_inputs", out.tokens_T.device).options,
    )


@triton.jit(do_not_specialize=["sequences", "tokens", "dummy", "room_T", "room_S"])
def expand_step_kernel(
    step_seats_S: tl.tensor,
    starts_S: tl.tensor,
    step_query_starts_X: tl.tensor,
    step_tokens_T: tl.tensor,
    sequences: tl.tensor,
    tokens: tl.tensor,
    block_tables_PW: tl.tensor,
    last_tokens_P: tl.tensor,
    prompt_tokens_P: tl.tensor,
    table_stride: tl.tensor,
    dummy: tl.tensor,
    tokens_T: tl.tensor,
    positions_T: tl.tensor,
    slots_T: tl.tensor,
    query_starts_X: tl.tensor,
    lengths_S: tl.tensor,
    prompt_S: tl.tensor,
    seats_S: tl.tensor,
    room_T: tl.tensor,
    room_S: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Fill BLOCK tokens and BLOCK sequences."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = n < sequences
    query_start = tl.load(step_query_starts_X + n, mask=n <= sequences, other=0)
    tl.store(query_starts_X + n, tl.where(n <= sequences, query_start, tokens), mask=n <= room_S)
    seat = tl.load(step_seats_S + n, mask=real, other=0)
    start = tl.load(starts_S + n, mask=real, other=0)
    count = tl.load(step_query_starts_X + n + 1, mask=real, other=0) - query_start
    is_prompt = real & (start < tl.load(prompt_tokens_P + seat, mask=real, other=0))
    tl.store(seats_S + n, tl.where(real, seat, dummy), mask=n < room_S)
    tl.store(lengths_S + n, tl.where(real, start + count, 0), mask=n < room_S)
    tl.store(prompt_S + n, is_prompt, mask=n < room_S)

    # the last sequence that starts at or before the token: between `low` and `high`
    real = n < tokens
    low, high = tl.zeros_like(n), tl.zeros_like(n) + sequences
    remaining = sequences
    while remaining > 1:
        middle = (low + high) // 2
        is_before = tl.load(step_query_starts_X + middle, mask=real, other=0) <= n
        low, high = tl.where(is_before, middle, low), tl.where(is_before, high, middle)
        remaining = (remaining + 1) // 2
    seat = tl.load(step_seats_S + low, mask=real, other=0)
    position = tl.load(starts_S + low, mask=real, other=0) + n
    position -= tl.load(step_query_starts_X + low, mask=real, other=0)
    token = tl.load(step_tokens_T + n, mask=real, other=0)
    token = tl.where(token < 0, tl.load(last_tokens_P + seat, mask=real, other=0), token)
    table_W = block_tables_PW + seat.to(tl.int64) * table_stride
    block = tl.load(table_W + position // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
    tl.store(tokens_T + n, tl.where(real, token, 0), mask=n < room_T)
    tl.store(positions_T + n, tl.where(real, position, 0), mask=n < room_T)
    tl.store(slots_T + n, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=n < room_T)


def aot_cases(target: Target) -> list[AotCase]:
    uploaded = dict.fromkeys(("step_seats_S", "starts_S", "step_query_starts_X", "step_tokens_T"), "*i32")
    state = dict.fromkeys(("block_tables_PW", "last_tokens_P", "prompt_tokens_P"), "*i32")
    out = dict.fromkeys(("tokens_T", "positions_T", "slots_T", "query_starts_X", "lengths_S", "seats_S"), "*i32")
    out["prompt_S"] = "*i1"
    scalars = dict.fromkeys(("sequences", "tokens", "table_stride", "dummy", "room_T", "room_S"), "i32")
    return [
        AotCase(
            name="expand_step",
            function=expand_step_kernel,
            signature=uploaded | state | out | scalars,
            constexprs={"BLOCK_SIZE": 16, "BLOCK": _BLOCK},
            launch=config("step_inputs", target),
            divisible=[*uploaded, *state, *out],
        )
    ]
