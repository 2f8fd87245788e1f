"""Largest logit of each block of a vocabulary: one pass over logits, spread over many programs.

Greedy tokens, filters and best tokens need large logits alone: they read only the blocks that have these.

N rows · V vocabulary · B blocks of a row, rounded up to a power of two · E tokens of a block
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer_kernels.triton.targets import AotCase, Target, config

_BLOCK_TOKENS = 128
_MOST_BLOCKS = 2048  # that a program holds in registers


class Blocks(NamedTuple):
    """Division of a vocabulary into blocks."""

    tokens: int  # of a block
    padded: int  # number of blocks, rounded up to a power of two
    at_once: int  # blocks that a program loads together


def blocks_of(vocab: int, tokens_at_once: int) -> Blocks:
    """Return the division of a vocabulary for programs that load so many tokens together."""
    tokens = max(_BLOCK_TOKENS, triton.next_power_of_2(triton.cdiv(vocab, _MOST_BLOCKS)))
    count = triton.next_power_of_2(triton.cdiv(vocab, tokens))
    return Blocks(tokens, count, max(1, min(count, tokens_at_once // tokens)))


def block_maxima(logits_NV: Tensor) -> Tensor:
    """Return float32 [N, B], -inf beyond the vocabulary; NaN where a block has one. The last axis must be dense."""
    rows, vocab = logits_NV.shape
    launch = config("sample_rows", logits_NV.device)
    blocks = blocks_of(vocab, launch.block_n)
    maxima_NB = torch.empty(rows, blocks.padded, dtype=torch.float32, device=logits_NV.device)
    if rows:
        block_maxima_kernel[(rows, blocks.padded // blocks.at_once)](
            logits_NV, maxima_NB, vocab, logits_NV.stride(0), *blocks, **launch.options
        )
    return maxima_NB


@triton.jit
def block_maxima_kernel(
    logits_NV: tl.tensor,
    maxima_NB: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Store the maxima of AT_ONCE blocks of one row."""
    row = tl.program_id(0).to(tl.int64)
    block_B = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    token_BE = block_B[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    x_BE = tl.load(logits_NV + row * stride + token_BE, mask=token_BE < vocab, other=float("-inf"))
    # tl.max may return the other one of a number and NaN
    has_nan_B = tl.max((x_BE != x_BE).to(tl.int32), axis=1) > 0
    largest_B = tl.max(tl.where(x_BE != x_BE, float("-inf"), x_BE), axis=1)
    tl.store(maxima_NB + row * BLOCKS + block_B, tl.where(has_nan_B, float("nan"), largest_B))


def aot_cases(target: Target) -> list[AotCase]:
    """Return a vocabulary whose rows are aligned, and an odd one."""
    launch = config("sample_rows", target)
    logits = {"logits_NV": "*fp32", "maxima_NB": "*fp32", "vocab": "i32", "stride": "i32"}
    return [
        AotCase(
            name=f"block_maxima {vocab}",
            function=block_maxima_kernel,
            signature=logits,
            constexprs=dict(zip(("TOKENS", "BLOCKS", "AT_ONCE"), blocks_of(vocab, launch.block_n), strict=True)),
            launch=launch,
            divisible=["logits_NV", "maxima_NB", *(["vocab", "stride"] if vocab % 16 == 0 else [])],
        )
        for vocab in (151_936, 50_257)
    ]
