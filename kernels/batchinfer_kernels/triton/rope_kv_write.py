"""Rotary embedding of queries and keys, and the write of keys and values into the cache, in one launch.

The first programs rotate queries; each of the others rotates keys of some heads and writes them and their values.
T tokens · H query heads · K KV heads · D head size · R rotated pairs of a head · N blocks · B slots per block ·
M rows of a program: pairs of a token and a head
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer_kernels.contract import CosSin
from batchinfer_kernels.triton.float8 import to_stored
from batchinfer_kernels.triton.targets import AotCase, Target, config, target_of

TILE_NUMBERS = 2048  # of a program


def rope_kv_write(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cos_sin: CosSin | None, kv_N2KBD: Tensor, slots_T: Tensor
) -> None:
    """Rotate and write. Strides are free; nothing is written for slot -1. float8_e4m3fn saturates."""
    tokens, heads, size = q_THD.shape
    kv_heads, block_size = kv_N2KBD.shape[2:4]
    if not tokens:
        return
    if kv_N2KBD.dtype == torch.float8_e4m3fn and not target_of(kv_N2KBD.device).float8_e4m3fn:
        kv_N2KBD = kv_N2KBD.view(torch.uint8)
    cos_TR, sin_TR = (None, None) if cos_sin is None else (cos_sin[0].contiguous(), cos_sin[1].contiguous())
    pairs = 0 if cos_TR is None else cos_TR.shape[1]
    block_rows = max(1, TILE_NUMBERS // triton.next_power_of_2(size))
    programs = triton.cdiv(tokens * kv_heads, block_rows)
    if pairs:
        programs += triton.cdiv(tokens * heads, block_rows)
    rope_kv_write_kernel[(programs,)](
        q_THD,
        k_TKD,
        v_TKD,
        cos_TR,
        sin_TR,
        kv_N2KBD,
        slots_T,
        tokens,
        *q_THD.stride(),
        *k_TKD.stride(),
        *v_TKD.stride(),
        *kv_N2KBD.stride(),
        heads,
        kv_heads,
        size,
        pairs,
        block_size,
        block_rows,
        triton.next_power_of_2(max(pairs, 1)),
        triton.next_power_of_2(size),
        **config("rope_kv_write", q_THD.device).options,
    )


@triton.jit(do_not_specialize=["tokens"])
def rope_kv_write_kernel(
    q_THD: tl.tensor,
    k_TKD: tl.tensor,
    v_TKD: tl.tensor,
    cos_TR: tl.tensor,  # or None
    sin_TR: tl.tensor,
    kv_N2KBD: tl.tensor,
    slots_T: tl.tensor,
    tokens: tl.tensor,
    q_stride_T: tl.tensor,
    q_stride_H: tl.tensor,
    q_stride_D: tl.tensor,
    k_stride_T: tl.tensor,
    k_stride_K: tl.tensor,
    k_stride_D: tl.tensor,
    v_stride_T: tl.tensor,
    v_stride_K: tl.tensor,
    v_stride_D: tl.tensor,
    kv_stride_N: tl.tensor,
    kv_stride_2: tl.tensor,
    kv_stride_K: tl.tensor,
    kv_stride_B: tl.tensor,
    kv_stride_D: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Rotate BLOCK_M rows of queries, or rotate and write as many of keys and values."""
    program = tl.program_id(0)
    if PAIRS:
        q_programs = tl.cdiv(tokens * HEADS, BLOCK_M)
        if program < q_programs:
            row_M = program * BLOCK_M + tl.arange(0, BLOCK_M)
            token_M = (row_M // HEADS).to(tl.int64)
            q_at_M = q_THD + token_M * q_stride_T + (row_M % HEADS) * q_stride_H
            rotate(q_at_M, q_stride_D, cos_TR, sin_TR, token_M, token_M < tokens, PAIRS, BLOCK_R)
            return
        program -= q_programs
    row_M = program * BLOCK_M + tl.arange(0, BLOCK_M)
    token_M, head_M = (row_M // KV_HEADS).to(tl.int64), (row_M % KV_HEADS).to(tl.int64)
    real_M = token_M < tokens
    slot_M = tl.load(slots_T + token_M, mask=real_M, other=-1).to(tl.int64)
    written_M = real_M & (slot_M >= 0)
    slot_M = tl.where(written_M, slot_M, 0)
    kv_at_M = kv_N2KBD + slot_M // BLOCK_SIZE * kv_stride_N + slot_M % BLOCK_SIZE * kv_stride_B + head_M * kv_stride_K
    dtype: tl.constexpr = kv_N2KBD.dtype.element_ty
    k_at_M = k_TKD + token_M * k_stride_T + head_M * k_stride_K
    if PAIRS:
        first_MR, second_MR = rotate(k_at_M, k_stride_D, cos_TR, sin_TR, token_M, real_M, PAIRS, BLOCK_R)
        r_1R = tl.arange(0, BLOCK_R)[None, :]
        rotated_MR = written_M[:, None] & (r_1R < PAIRS)
        tl.store(kv_at_M[:, None] + r_1R * kv_stride_D, to_stored(first_MR, dtype), mask=rotated_MR)
        tl.store(kv_at_M[:, None] + (r_1R + PAIRS) * kv_stride_D, to_stored(second_MR, dtype), mask=rotated_MR)
    d_1D = tl.arange(0, BLOCK_D)[None, :]
    written_MD = written_M[:, None] & (d_1D < SIZE)
    if 2 * PAIRS < SIZE:
        kept_MD = written_MD & (d_1D >= 2 * PAIRS)
        k_MD = tl.load(k_at_M[:, None] + d_1D * k_stride_D, mask=kept_MD, other=0).to(tl.float32)
        tl.store(kv_at_M[:, None] + d_1D * kv_stride_D, to_stored(k_MD, dtype), mask=kept_MD)
    v_at_M = v_TKD + token_M * v_stride_T + head_M * v_stride_K
    v_MD = tl.load(v_at_M[:, None] + d_1D * v_stride_D, mask=written_MD, other=0).to(tl.float32)
    tl.store((kv_at_M + kv_stride_2)[:, None] + d_1D * kv_stride_D, to_stored(v_MD, dtype), mask=written_MD)


@triton.jit
def rotate(
    x_at_M: tl.tensor,
    stride_D: tl.tensor,
    cos_TR: tl.tensor,
    sin_TR: tl.tensor,
    token_M: tl.tensor,
    real_M: tl.tensor,
    PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Turn pairs (i, i + PAIRS) of each row in place (Su et al. 2021); return both halves as stored, in float32."""
    r_1R = tl.arange(0, BLOCK_R)[None, :]
    real_MR = real_M[:, None] & (r_1R < PAIRS)
    angle_at_MR = token_M[:, None] * PAIRS + r_1R
    cos_MR = tl.load(cos_TR + angle_at_MR, mask=real_MR, other=0)
    sin_MR = tl.load(sin_TR + angle_at_MR, mask=real_MR, other=0)
    first_at_MR = x_at_M[:, None] + r_1R * stride_D
    second_at_MR = first_at_MR + PAIRS * stride_D
    first_MR = tl.load(first_at_MR, mask=real_MR, other=0).to(tl.float32)
    second_MR = tl.load(second_at_MR, mask=real_MR, other=0).to(tl.float32)
    dtype: tl.constexpr = x_at_M.dtype.element_ty
    turned_MR = (first_MR * cos_MR - second_MR * sin_MR).to(dtype)
    other_MR = (second_MR * cos_MR + first_MR * sin_MR).to(dtype)
    tl.store(first_at_MR, turned_MR, mask=real_MR)
    tl.store(second_at_MR, other_MR, mask=real_MR)
    return turned_MR.to(tl.float32), other_MR.to(tl.float32)


def aot_cases(target: Target) -> list[AotCase]:
    """Return heads of 128 numbers, with each format of the cache, partial rotation, and none."""
    float8 = "*fp8e4nv" if target.float8_e4m3fn else "*u8"
    return [
        _case("rope_kv_write bfloat16", target, 64, "*bf16"),
        _case("rope_kv_write float8_e4m3fn", target, 64, float8),
        _case("rope_kv_write bfloat16 partial", target, 48, "*bf16"),
        _case("rope_kv_write bfloat16 unrotated", target, 0, "*bf16"),
    ]


def _case(name: str, target: Target, pairs: int, cache: str) -> AotCase:
    strides = [f"{x}_stride_{axis}" for x, axes in (("q", "TH"), ("k", "TK"), ("v", "TK")) for axis in axes]
    strides += [f"kv_stride_{axis}" for axis in "N2KB"]
    signature = dict.fromkeys(("q_THD", "k_TKD", "v_TKD"), "*bf16") | {"kv_N2KBD": cache, "slots_T": "*i32"}
    constants: dict[str, Any] = {"q_stride_D": 1, "k_stride_D": 1, "v_stride_D": 1, "kv_stride_D": 1}
    constants |= {"HEADS": 32, "KV_HEADS": 8, "SIZE": 128, "PAIRS": pairs, "BLOCK_SIZE": 16, "BLOCK_D": 128}
    constants |= {"BLOCK_M": TILE_NUMBERS // 128, "BLOCK_R": triton.next_power_of_2(max(pairs, 1))}
    angles = ("cos_TR", "sin_TR")
    if pairs:
        signature |= dict.fromkeys(angles, "*fp32")
    else:
        constants |= dict.fromkeys(angles)
    divisible = [*signature, *strides]
    signature |= dict.fromkeys(strides, "i32") | {"tokens": "i32"}
    return AotCase(
        name=name,
        function=rope_kv_write_kernel,
        signature=signature,
        constexprs=constants,
        launch=config("rope_kv_write", target),
        divisible=divisible,
    )
