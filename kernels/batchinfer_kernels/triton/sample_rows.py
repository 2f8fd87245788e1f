"""Sampling: greedy, or min_p, top_k, top_p and the draw, for rows of any mix of parameters, in two launches.

The first finds the largest logit of each block of tokens, in which a greedy row's token is found at once. The second
has one program per row. Semantics are those of batchinfer.runner.sample_tokens: integer weights, filters that are
thresholds on scaled logits, inverse CDF in order of ids. So sums are exact in any order, and no sort is needed:

- A scaled logit is at most 0, so its bits without the sign, the *magnitude*, order tokens from best to worst.
- top_k and top_p are found by bisection on the magnitude. A pass counts or weighs the tokens up to the middle, in the
  blocks that have tokens between the bounds alone; the search then continues between magnitudes that occur.
- The draw weighs the blocks that have tokens left, finds the block, then the token in it.

B blocks of a row · A blocks at once · E tokens of a block; letters of arguments: see batchinfer_kernels.steps
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer_kernels.steps import NOT_FINITE as _NOT_FINITE
from batchinfer_kernels.steps import SAMPLED as _SAMPLED
from batchinfer_kernels.steps import SampledRows, SampleRows, SeatState
from batchinfer_kernels.triton.block_maxima import block_maxima, blocks_of
from batchinfer_kernels.triton.targets import AotCase, Target, config
from batchinfer_kernels.triton.update_seats import STATE

SAMPLED, NOT_FINITE = tl.constexpr(_SAMPLED), tl.constexpr(_NOT_FINITE)
SCALE = tl.constexpr(float(1 << 40))  # of integer weights
INFINITE = tl.constexpr(0x7F800000)  # magnitude of tokens that are masked
WEIGHTLESS = tl.constexpr(0x41E00000)  # magnitude of -28: exp(-28) * 2^40 < 1
NO_TOKEN = tl.constexpr(0x7FFFFFFF)


def sample_rows(logits_NV: Tensor, rows: SampleRows, state: SeatState, out: SampledRows) -> None:
    """Sample one token per row with its seat's parameters, and store it as its target's last token."""
    count, vocab = logits_NV.shape
    if count == 0:
        return
    launch = config("sample_rows", logits_NV.device)
    blocks = blocks_of(vocab, launch.block_n)
    maxima_NB = block_maxima(logits_NV)
    listed_NB = torch.empty_like(maxima_NB, dtype=torch.int32)
    sums_NB = torch.empty_like(maxima_NB, dtype=torch.int64)
    sample_rows_kernel[(count,)](
        logits_NV,
        maxima_NB,
        listed_NB,
        sums_NB,
        rows.seats_N,
        rows.positions_N,
        rows.targets_N,
        *state[1:2],
        *state[3:],
        out.tokens_N,
        out.status_N,
        vocab,
        logits_NV.stride(0),
        *blocks,
        **launch.options,
    )


@triton.jit
def sample_rows_kernel(
    logits_NV: tl.tensor,
    maxima_NB: tl.tensor,
    listed_NB: tl.tensor,  # scratch
    sums_NB: tl.tensor,  # scratch
    seats_N: tl.tensor,
    positions_N: tl.tensor,
    targets_N: tl.tensor,
    last_tokens_P: tl.tensor,
    keys_P: tl.tensor,
    temperature_P: tl.tensor,
    top_k_P: tl.tensor,
    log_min_p_P: tl.tensor,
    top_p_P: tl.tensor,
    tokens_N: tl.tensor,
    status_N: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Sample one row."""
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_NV + row * stride
    listed_B, sums_B = listed_NB + row * BLOCKS, sums_NB + row * BLOCKS
    block_B = tl.arange(0, BLOCKS)
    maxima_B = tl.load(maxima_NB + row * BLOCKS + block_B)
    has_nan = tl.max((maxima_B != maxima_B).to(tl.int32), axis=0) > 0
    largest = tl.max(tl.where(maxima_B != maxima_B, float("-inf"), maxima_B), axis=0)
    is_finite = (tl.abs(largest) < float("inf")) & (not has_nan)
    seat = tl.load(seats_N + row)
    temperature = tl.load(temperature_P + seat)
    token = tl.full([], 0, tl.int32)
    if is_finite & (temperature == 0):
        block = tl.min(tl.where(maxima_B == largest, block_B, BLOCKS), axis=0)
        token_E = block * TOKENS + tl.arange(0, TOKENS)
        x_E = tl.load(logits_V + token_E, mask=token_E < vocab, other=float("-inf"))
        token = tl.min(tl.where(x_E == largest, token_E, NO_TOKEN), axis=0)
    if is_finite & (temperature > 0):
        best_B = magnitudes(maxima_B, largest, temperature)
        limit = tl.minimum(tl.abs(tl.load(log_min_p_P + seat)).to(tl.int32, bitcast=True), WEIGHTLESS)
        top_k, top_p = tl.load(top_k_P + seat), tl.load(top_p_P + seat)
        if (top_k > 0) & (top_k < vocab):
            limit = find_threshold(
                logits_V,
                listed_B,
                sums_B,
                best_B,
                largest,
                temperature,
                limit,
                top_k,
                vocab,
                True,
                TOKENS,
                BLOCKS,
                AT_ONCE,
            )
        total = weigh_blocks(
            logits_V, listed_B, sums_B, best_B, largest, temperature, limit, vocab, TOKENS, BLOCKS, AT_ONCE
        )
        if top_p < 1:
            limit = find_threshold(
                logits_V,
                listed_B,
                sums_B,
                best_B,
                largest,
                temperature,
                limit,
                top_p * total.to(tl.float64),
                vocab,
                False,
                TOKENS,
                BLOCKS,
                AT_ONCE,
            )
            total = weigh_blocks(
                logits_V, listed_B, sums_B, best_B, largest, temperature, limit, vocab, TOKENS, BLOCKS, AT_ONCE
            )
        target = (uniform(tl.load(keys_P + seat), tl.load(positions_N + row)) * total.to(tl.float64)).to(tl.int64)
        token = find_token(
            logits_V, listed_B, sums_B, best_B, largest, temperature, limit, target, vocab, TOKENS, BLOCKS
        )
    tl.store(tokens_N + row, token)
    tl.store(status_N + row, tl.where(is_finite, SAMPLED, NOT_FINITE))
    seat = tl.load(targets_N + row)
    tl.store(last_tokens_P + seat, token, mask=seat >= 0)


@triton.jit
def magnitudes(x: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Return the bits of scaled logits without their sign, as int32: 0 is the best token's."""
    return tl.abs(tl.div_rn(x - largest, temperature)).to(tl.int32, bitcast=True)


@triton.jit
def weights_of(magnitude: tl.tensor) -> tl.tensor:
    """Return int64 weights: probability relative to the most probable token, times 2^40."""
    return (tl.exp(-magnitude.to(tl.float32, bitcast=True)) * SCALE).to(tl.int64)


@triton.jit
def uniform(key: tl.tensor, position: tl.tensor) -> tl.tensor:
    """Return a float64 in [0, 1), a multiple of 2^-53: two words of Philox 4x32-10."""
    zero = position * 0
    high, low, _, _ = tl.philox(key, position, zero, zero, zero)
    return ((high.to(tl.int64) << 21) | (low >> 11).to(tl.int64)).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def list_blocks(listed_B: tl.tensor, best_B: tl.tensor, limit: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """Store the blocks that have tokens up to a magnitude, in ascending order; return how many these are."""
    is_in_B = (best_B <= limit).to(tl.int32)
    # a barrier orders global memory too: bar.sync by definition, s_barrier because a program stays on one CU
    tl.debug_barrier()  # the list before may still be read
    tl.store(listed_B + tl.cumsum(is_in_B, axis=0) - 1, tl.arange(0, BLOCKS), mask=is_in_B > 0)
    tl.debug_barrier()
    return tl.sum(is_in_B, axis=0)


@triton.jit
def load_blocks(
    logits_V: tl.tensor,
    block_A: tl.tensor,
    real_A: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    vocab: tl.tensor,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """Return the magnitudes of the tokens of blocks, [A, E]; INFINITE where there are none."""
    token_AE = block_A[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    x_AE = tl.load(logits_V + token_AE, mask=real_A[:, None] & (token_AE < vocab), other=float("-inf"))
    return magnitudes(x_AE, largest, temperature)


@triton.jit
def find_threshold(
    logits_V: tl.tensor,
    listed_B: tl.tensor,
    halves_B: tl.tensor,
    best_B: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    limit: tl.tensor,
    wanted: tl.tensor,
    vocab: tl.tensor,
    BY_COUNT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> tl.tensor:
    """Return the smallest magnitude up to which tokens have the count or weight that is wanted, `limit` at most.

    best_B: each block's smallest magnitude between `low` and `high`; blocks without one are not read again. `halves_B`
    is scratch for what it becomes: in its low and high 32 bits, if the search continues up to or beyond the middle.
    """
    low, high = limit * 0, limit
    before = tl.full([], 0, tl.int64)  # of the tokens better than `low`
    while low < high:
        middle = low + (high - low) // 2
        count = list_blocks(listed_B, best_B, middle, BLOCKS)
        total, worst = before, limit * 0
        for first in range(0, count, AT_ONCE):
            place_A = first + tl.arange(0, AT_ONCE)
            block_A = tl.load(listed_B + place_A, mask=place_A < count, other=0)
            m_AE = load_blocks(logits_V, block_A, place_A < count, largest, temperature, vocab, TOKENS)
            is_in_AE = (m_AE >= low) & (m_AE <= middle)
            if BY_COUNT:
                total += tl.sum(is_in_AE.to(tl.int32))
            else:
                total += tl.sum(tl.where(is_in_AE, weights_of(m_AE), 0))
            worst = tl.maximum(worst, tl.max(tl.where(is_in_AE, m_AE, 0)))
            inside_A = tl.min(tl.where(is_in_AE, m_AE, INFINITE), axis=1).to(tl.int64)
            beyond_A = tl.min(tl.where(m_AE > middle, m_AE, INFINITE), axis=1).to(tl.int64)
            tl.store(halves_B + block_A, inside_A | (beyond_A << 32), mask=place_A < count)
        tl.debug_barrier()
        is_listed_B = best_B <= middle
        halves = tl.load(halves_B + tl.arange(0, BLOCKS), mask=is_listed_B, other=0)
        if total.to(tl.float64) >= wanted:
            high = worst
            best_B = tl.where(is_listed_B, halves.to(tl.int32), INFINITE)
        else:
            best_B = tl.where(is_listed_B, (halves >> 32).to(tl.int32), best_B)
            low = tl.minimum(tl.min(best_B, axis=0), high)
            before = total
    return high


@triton.jit
def weigh_blocks(
    logits_V: tl.tensor,
    listed_B: tl.tensor,
    sums_B: tl.tensor,
    best_B: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    limit: tl.tensor,
    vocab: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> tl.tensor:
    """List the blocks that have tokens up to a magnitude, store the weight of these tokens; return the whole weight."""
    count = list_blocks(listed_B, best_B, limit, BLOCKS)
    total = tl.full([], 0, tl.int64)
    for first in range(0, count, AT_ONCE):
        place_A = first + tl.arange(0, AT_ONCE)
        block_A = tl.load(listed_B + place_A, mask=place_A < count, other=0)
        m_AE = load_blocks(logits_V, block_A, place_A < count, largest, temperature, vocab, TOKENS)
        sum_A = tl.sum(tl.where(m_AE <= limit, weights_of(m_AE), 0), axis=1)
        tl.store(sums_B + place_A, sum_A, mask=place_A < count)
        total += tl.sum(sum_A, axis=0)
    tl.debug_barrier()
    return total


@triton.jit
def find_token(
    logits_V: tl.tensor,
    listed_B: tl.tensor,
    sums_B: tl.tensor,
    best_B: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    limit: tl.tensor,
    target: tl.tensor,
    vocab: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """Return the first token, by id, up to which tokens together weigh more than the target."""
    count = tl.sum((best_B <= limit).to(tl.int32), axis=0)
    place_B = tl.arange(0, BLOCKS)
    sum_B = tl.load(sums_B + place_B, mask=place_B < count, other=0)
    up_to_B = tl.cumsum(sum_B, axis=0)
    place = tl.sum((up_to_B <= target).to(tl.int32), axis=0)
    target -= tl.sum(tl.where(place_B < place, sum_B, 0), axis=0)
    token_E = tl.load(listed_B + place) * TOKENS + tl.arange(0, TOKENS)
    x_E = tl.load(logits_V + token_E, mask=token_E < vocab, other=float("-inf"))
    m_E = magnitudes(x_E, largest, temperature)
    up_to_E = tl.cumsum(tl.where(m_E <= limit, weights_of(m_E), 0), axis=0)
    return tl.min(tl.where(up_to_E > target, token_E, NO_TOKEN), axis=0)


def aot_cases(target: Target) -> list[AotCase]:
    """Return a vocabulary whose rows are aligned, and an odd one."""
    launch = config("sample_rows", target)
    tensors = {"logits_NV": "*fp32", "maxima_NB": "*fp32", "listed_NB": "*i32", "sums_NB": "*i64"}
    tensors |= dict.fromkeys(("seats_N", "positions_N", "targets_N", "tokens_N", "status_N"), "*i32")
    tensors |= {name: kind for name, kind in STATE.items() if name not in ("block_tables_PW", "prompt_tokens_P")}
    cases = []
    for vocab in (151_936, 50_257):
        blocks: dict[str, Any] = dict(
            zip(("TOKENS", "BLOCKS", "AT_ONCE"), blocks_of(vocab, launch.block_n), strict=True)
        )
        cases.append(
            AotCase(
                name=f"sample_rows {vocab}",
                function=sample_rows_kernel,
                signature=tensors | {"vocab": "i32", "stride": "i32"},
                constexprs=blocks,
                launch=launch,
                divisible=[*tensors, *(["vocab", "stride"] if vocab % 16 == 0 else [])],
            )
        )
    return cases
