"""Logprobs of sampled tokens and of the best or the named tokens of each row, in two launches.

The first finds the largest logit of each block of tokens. The second has one program per row: a pass for the sum, and
one block for each best token. All values of a row come from one exact sum, so equal logits have equal logprobs.

B blocks of a row · E tokens of a block · M tokens at once; letters of arguments: see batchinfer_kernels.steps
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer_kernels.eager import gather_logprobs as eager
from batchinfer_kernels.steps import LogprobRows
from batchinfer_kernels.triton.block_maxima import block_maxima, blocks_of
from batchinfer_kernels.triton.sample_rows import NO_TOKEN, SCALE
from batchinfer_kernels.triton.targets import AotCase, Target, config

LOG_SCALE = tl.constexpr(40 * math.log(2.0))
EXHAUSTED = tl.constexpr(-0x80000000)  # below the ordered bits of -inf
_MOST_BEST = 64  # more are faster selected together


def gather_logprobs(logits_NV: Tensor, tokens_N: Tensor, best: int, named_NC: Tensor | None = None) -> LogprobRows:
    """Return logprobs of the tokens, and of the `best` tokens of each row or of those that it names.

    A row whose largest logit is not finite gets any ids and values.
    """
    if best > _MOST_BEST:
        return eager.gather_logprobs(logits_NV, tokens_N, best, named_NC)
    rows, vocab = logits_NV.shape
    named = 0 if named_NC is None else named_NC.shape[1]
    width = max(best, named)
    own_N = torch.empty(rows, dtype=torch.float64, device=logits_NV.device)
    values_NC = torch.empty(rows, width, dtype=torch.float64, device=logits_NV.device)
    ids_NC = torch.empty(rows, width, dtype=torch.int32, device=logits_NV.device)
    if rows:
        launch = config("gather_logprobs", logits_NV.device)
        blocks = blocks_of(vocab, launch.block_n)
        gather_logprobs_kernel[(rows,)](
            logits_NV,
            block_maxima(logits_NV),
            tokens_N,
            named_NC,
            own_N,
            values_NC,
            ids_NC,
            min(best, vocab),
            named,
            width,
            vocab,
            logits_NV.stride(0),
            blocks.tokens,
            blocks.padded,
            blocks.at_once * blocks.tokens,
            triton.next_power_of_2(max(width, 1)),
            **launch.options,
        )
    return LogprobRows(own_N, values_NC, ids_NC)


@triton.jit(do_not_specialize=["best", "named", "width"])
def gather_logprobs_kernel(
    logits_NV: tl.tensor,
    maxima_NB: tl.tensor,
    tokens_N: tl.tensor,
    named_NC: tl.tensor,  # or None
    own_N: tl.tensor,
    values_NC: tl.tensor,
    ids_NC: tl.tensor,
    best: tl.tensor,
    named: tl.tensor,
    width: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,  # `width`, rounded up to a power of two
) -> None:
    """Gather logprobs of one row."""
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_NV + row * stride
    values_C, ids_C = values_NC + row * width, ids_NC + row * width
    block_B = tl.arange(0, BLOCKS)
    maxima_B = tl.load(maxima_NB + row * BLOCKS + block_B)
    largest = tl.max(maxima_B, axis=0)
    total_M = tl.zeros([AT_ONCE], tl.int64)
    for first in range(0, vocab, AT_ONCE):
        token_M = first + tl.arange(0, AT_ONCE)
        x_M = tl.load(logits_V + token_M, mask=token_M < vocab, other=float("-inf"))
        total_M += (tl.exp(x_M - largest) * SCALE).to(tl.int64)
    total = tl.sum(total_M, axis=0)
    norm = largest.to(tl.float64) + tl.log(total.to(tl.float64)) - LOG_SCALE
    tl.store(own_N + row, tl.load(logits_V + tl.load(tokens_N + row)).to(tl.float64) - norm)

    c_C = tl.arange(0, WIDTH)
    names = best < 0
    if named_NC is not None:
        names = tl.load(named_NC + row * named) >= 0
    if names:
        if named_NC is not None:
            id_C = tl.load(named_NC + row * named + c_C, mask=c_C < named, other=-1)
            x_C = tl.load(logits_V + id_C, mask=id_C >= 0, other=0.0)
            tl.store(ids_C + c_C, id_C, mask=c_C < width)
            tl.store(values_C + c_C, tl.where(id_C >= 0, x_C.to(tl.float64) - norm, 0.0), mask=c_C < width)
    else:
        # the best token that is left in each block
        left_B = tl.where(block_B * TOKENS < vocab, ordered(maxima_B), EXHAUSTED)
        before, token = best * 0 + NO_TOKEN, best * 0 - 1
        for place in range(best):
            value = tl.max(left_B, axis=0)
            block = tl.min(tl.where(left_B == value, block_B, BLOCKS - 1), axis=0)
            token_E = block * TOKENS + tl.arange(0, TOKENS)
            real_E = token_E < vocab
            x_E = ordered(tl.load(logits_V + token_E, mask=real_E, other=0.0))
            # of equals, those with lower ids have been taken
            taken = tl.where(value == before, token, -1)
            token = tl.min(tl.where(real_E & (x_E == value) & (token_E > taken), token_E, NO_TOKEN), axis=0)
            is_left_E = real_E & ((x_E < value) | ((x_E == value) & (token_E > token)))
            left_B = tl.where(block_B == block, tl.max(tl.where(is_left_E, x_E, EXHAUSTED), axis=0), left_B)
            before = value
            tl.store(ids_C + place, token)
            tl.store(values_C + place, unordered(value).to(tl.float64) - norm)
        is_empty_C = (c_C >= best) & (c_C < width)
        tl.store(ids_C + c_C, tl.full([WIDTH], -1, tl.int32), mask=is_empty_C)
        tl.store(values_C + c_C, tl.zeros([WIDTH], tl.float64), mask=is_empty_C)


@triton.jit
def ordered(x: tl.tensor) -> tl.tensor:
    """Return int32 in the order of the numbers; -0 is 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unordered(bits: tl.tensor) -> tl.tensor:
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


def aot_cases(target: Target) -> list[AotCase]:
    """Return best tokens alone, and with named ones."""
    launch = config("gather_logprobs", target)
    blocks = blocks_of(151_936, launch.block_n)
    constants = {
        "TOKENS": blocks.tokens,
        "BLOCKS": blocks.padded,
        "AT_ONCE": blocks.at_once * blocks.tokens,
        "WIDTH": 32,
    }
    tensors = {"logits_NV": "*fp32", "maxima_NB": "*fp32", "tokens_N": "*i32", "named_NC": "*i32"}
    tensors |= {"own_N": "*fp64", "values_NC": "*fp64", "ids_NC": "*i32"}
    scalars = dict.fromkeys(("best", "named", "width", "vocab", "stride"), "i32")
    without_names: dict[str, Any] = {"named_NC": None}
    return [
        AotCase(
            name=f"gather_logprobs {kind}",
            function=gather_logprobs_kernel,
            signature={name: of for name, of in (tensors | scalars).items() if name not in left_out},
            constexprs=constants | left_out,
            launch=launch,
            divisible=[*(name for name in tensors if name not in left_out), "vocab", "stride"],
        )
        for kind, left_out in (("best", without_names), ("named", {}))
    ]
