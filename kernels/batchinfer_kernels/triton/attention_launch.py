"""Launches of the attention kernels: configuration, formats of products, and ahead-of-time cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl

from batchinfer_kernels.triton.targets import ATTENTION, AotCase, Launch, Target, config

_POINTERS = {
    **dict.fromkeys(("q_THD", "out_THD"), "*bf16"),
    **dict.fromkeys(("parts", "logsums"), "*fp32"),
    **dict.fromkeys(("block_tables_SW", "query_starts_X", "lengths_S", "seats_S"), "*i32"),
    "prompt_S": "*i1",
}
_STRIDES = (
    *("table_stride", "q_stride_T", "q_stride_H", "out_stride_T", "out_stride_H"),
    *("kv_stride_N", "kv_stride_2", "kv_stride_K", "kv_stride_B"),
)
_NUMBERS = {"scale": "fp32", "soft_cap": "fp32", "num_sequences": "i32", "num_slots": "i32"}
_STORED = {torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv"}


def attention_case(
    kernel: str,
    function: Any,
    target: Target,
    cache: torch.dtype,
    head_size: int,
    constants: Mapping[str, Any],
) -> AotCase:
    """Return a case of bfloat16 queries over blocks of 16 tokens; `constants` are those of this kernel alone."""
    stored = "*u8" if cache == torch.float8_e4m3fn and not target.float8_e4m3fn else _STORED[cache]
    types = _POINTERS | dict.fromkeys(_STRIDES, "i32") | _NUMBERS | {"kv_N2KBD": stored}
    launch = attention_launch(kernel, target, head_size, cache)
    shape = {"HEAD_SIZE": head_size, "HEAD_WIDTH": head_size, "BLOCK_SIZE": 16, "WINDOW": 0, "CAPPED": False}
    tile = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "DOT": dot_dtype(torch.bfloat16, cache)}
    signature = {name: types[name] for name in function.arg_names if name in types}
    return AotCase(
        name=f"{kernel} {str(cache).removeprefix('torch.')} {head_size}",
        function=function,
        signature=signature,
        constexprs=shape | tile | dict(constants),
        launch=launch,
        divisible=[name for name in signature if name not in _NUMBERS],
        needs=ATTENTION,
    )


def attention_launch(kernel: str, device: torch.device | Target, head_size: int, cache: torch.dtype) -> Launch:
    """Return the launch configuration; keys of 8 bits are converted to 16 before the products."""
    return config(kernel, device, head_size * max(2, cache.itemsize))


def dot_dtype(queries: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """Return the format of the products' factors: 16-bit queries take the format of the cache."""
    if torch.float32 in (queries, cache):
        return tl.float32
    return tl.bfloat16 if cache == torch.bfloat16 else tl.float16
