"""Changes of the state by seat: appended blocks and joining sequences, in one launch.

Letters: see batchinfer_kernels.steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer_kernels.steps import JOIN_WORDS, SeatState, SeatUpdates
from batchinfer_kernels.triton.targets import AotCase, Target, config

_BLOCK = 128  # blocks and sequences of a program


def update_seats(updates: SeatUpdates, state: SeatState) -> None:
    """Write appended blocks and joining sequences into the state."""
    blocks_U3, joins_J12 = updates
    most = max(len(blocks_U3), len(joins_J12))
    if most == 0:
        return
    update_seats_kernel[(triton.cdiv(most, _BLOCK),)](
        blocks_U3,
        joins_J12,
        len(blocks_U3),
        len(joins_J12),
        *state,
        state.block_tables_PW.stride(0),
        JOIN_WORDS,
        _BLOCK,
        **config("update_seats", joins_J12.device).options,
    )


@triton.jit(do_not_specialize=["appended", "joining"])
def update_seats_kernel(
    blocks_U3: tl.tensor,
    joins_J12: tl.tensor,
    appended: tl.tensor,
    joining: tl.tensor,
    block_tables_PW: tl.tensor,
    last_tokens_P: tl.tensor,
    prompt_tokens_P: tl.tensor,
    keys_P: tl.tensor,
    temperature_P: tl.tensor,
    top_k_P: tl.tensor,
    log_min_p_P: tl.tensor,
    top_p_P: tl.tensor,
    table_stride: tl.tensor,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write BLOCK appended blocks and BLOCK joining sequences."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = n < appended
    seat = tl.load(blocks_U3 + n * 3, mask=real, other=0).to(tl.int64)
    index = tl.load(blocks_U3 + n * 3 + 1, mask=real, other=0)
    block = tl.load(blocks_U3 + n * 3 + 2, mask=real, other=0)
    tl.store(block_tables_PW + seat * table_stride + index, block, mask=real)

    real = n < joining
    word = joins_J12 + n * WORDS
    seat = tl.load(word, mask=real, other=0)
    tl.store(prompt_tokens_P + seat, tl.load(word + 1, mask=real, other=0), mask=real)
    tl.store(keys_P + seat, _joined(word + 2, real), mask=real)
    tl.store(temperature_P + seat, tl.load(word + 4, mask=real, other=0).to(tl.float32, bitcast=True), mask=real)
    tl.store(top_k_P + seat, tl.load(word + 5, mask=real, other=0), mask=real)
    tl.store(log_min_p_P + seat, tl.load(word + 6, mask=real, other=0).to(tl.float32, bitcast=True), mask=real)
    tl.store(top_p_P + seat, _joined(word + 7, real).to(tl.float64, bitcast=True), mask=real)


@triton.jit
def _joined(word: tl.tensor, real: tl.tensor) -> tl.tensor:
    """Return the int64 whose halves are two int32 words."""
    low = tl.load(word, mask=real, other=0).to(tl.int64) & 0xFFFFFFFF
    return low | (tl.load(word + 1, mask=real, other=0).to(tl.int64) << 32)


STATE = {
    "block_tables_PW": "*i32",
    "last_tokens_P": "*i32",
    "prompt_tokens_P": "*i32",
    "keys_P": "*i64",
    "temperature_P": "*fp32",
    "top_k_P": "*i32",
    "log_min_p_P": "*fp32",
    "top_p_P": "*fp64",
}
"""Types of the state's tensors, for compilation ahead of time."""


def aot_cases(target: Target) -> list[AotCase]:
    uploaded = {"blocks_U3": "*i32", "joins_J12": "*i32"}
    return [
        AotCase(
            name="update_seats",
            function=update_seats_kernel,
            signature=uploaded | {"appended": "i32", "joining": "i32"} | STATE | {"table_stride": "i32"},
            constexprs={"WORDS": JOIN_WORDS, "BLOCK": _BLOCK},
            launch=config("update_seats", target),
            divisible=[*uploaded, *STATE],
        )
    ]
