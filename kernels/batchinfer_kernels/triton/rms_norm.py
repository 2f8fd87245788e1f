"""Root-mean-square norm (Zhang and Sennrich 2019): alone, after the residual addition, and with 8-bit output.

A program has a tile of whole rows in registers: each number is read once and written once. How rows are put together
depends on E alone, so a row's result does not depend on the rows beside it. N rows · E features · M rows of a program
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer_kernels.triton.float8 import LARGEST_FLOAT8, LARGEST_INT8, nearest_int8, to_stored
from batchinfer_kernels.triton.targets import AotCase, Target, config

TILE_NUMBERS = 2048  # of a program with several rows

_LARGEST = {torch.float8_e4m3fn: LARGEST_FLOAT8.value, torch.int8: LARGEST_INT8.value}


def rms_norm(x_NE: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
    out_NE = torch.empty(x_NE.shape, dtype=x_NE.dtype, device=x_NE.device)
    _launch(x_NE, None, weight_E, out_NE, None, eps, offset)
    return out_NE


def add_rms_norm(x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
    """Add x to the residual in place, rounded to the residual's dtype; return the norm of what is stored."""
    out_NE = torch.empty(residual_NE.shape, dtype=residual_NE.dtype, device=x_NE.device)
    _launch(x_NE, residual_NE, weight_E, out_NE, None, eps, offset)
    return out_NE


def rms_norm_quantized(
    x_NE: Tensor, residual_NE: Tensor | None, weight_E: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the norm in float8_e4m3fn or int8, [N, E], and each row's scale, float32 [N]. x, residual: [N, E].

    A row's largest number becomes ±448 or ±127: values * scale is the norm. A residual changes as in `add_rms_norm`.
    """
    out_NE = torch.empty(x_NE.shape, dtype=dtype, device=x_NE.device)
    scales_N = torch.empty(x_NE.shape[0], dtype=torch.float32, device=x_NE.device)
    _launch(x_NE, residual_NE, weight_E, out_NE, scales_N, eps, offset)
    return out_NE, scales_N


def _launch(
    x_NE: Tensor,
    residual_NE: Tensor | None,
    weight_E: Tensor,
    out_NE: Tensor,
    scales_N: Tensor | None,
    eps: float,
    offset: float,
) -> None:
    features = x_NE.shape[-1]
    rows = x_NE.numel() // features
    if not rows:
        return
    x_NE, (stride, stride_in_group, group) = _as_rows(x_NE)
    residual_NE = None if residual_NE is None else residual_NE.view(-1, features)
    width = triton.next_power_of_2(features)
    block_rows = max(1, TILE_NUMBERS // width)
    launch = config("rms_norm", x_NE.device, features * x_NE.element_size())
    rms_norm_kernel[(triton.cdiv(rows, block_rows),)](
        x_NE,
        residual_NE,
        weight_E,
        out_NE,
        scales_N,
        rows,
        stride,
        stride_in_group,
        features if residual_NE is None else residual_NE.stride(0),
        eps,
        offset,
        group,
        features,
        None if scales_N is None else _LARGEST[out_NE.dtype],
        block_rows,
        width,
        **launch.options,
    )


def _as_rows(x_NE: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return x, or a dense copy, with strides of groups and of rows in a group, and rows per group.

    Heads of a fused projection, [T, H, D], are groups.
    """
    if x_NE.stride(-1) != 1 or x_NE.dim() > 3:
        x_NE = x_NE.reshape(-1, x_NE.shape[-1]).contiguous()
    if x_NE.dim() == 3:
        return x_NE, (x_NE.stride(0), x_NE.stride(1), x_NE.shape[1])
    return x_NE, (x_NE.stride(0) if x_NE.dim() == 2 else 0, 0, 1)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_NE: tl.tensor,
    residual_NE: tl.tensor,  # or None
    weight_E: tl.tensor,
    out_NE: tl.tensor,
    scales_N: tl.tensor,  # or None
    rows: tl.tensor,
    x_stride: tl.tensor,
    x_stride_in_group: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    LARGEST: tl.constexpr,  # of the 8-bit format
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Compute BLOCK_M rows."""
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    e_E = tl.arange(0, BLOCK_E)
    real_ME = (row_M < rows)[:, None] & (e_E < FEATURES)[None, :]
    start_M = row_M // GROUP * x_stride + row_M % GROUP * x_stride_in_group
    x_ME = tl.load(x_NE + start_M[:, None] + e_E[None, :], mask=real_ME, other=0).to(tl.float32)
    if residual_NE is not None:
        residual_at_ME = residual_NE + (row_M * residual_stride)[:, None] + e_E[None, :]
        total_ME = x_ME + tl.load(residual_at_ME, mask=real_ME, other=0).to(tl.float32)
        stored_ME = total_ME.to(residual_NE.dtype.element_ty)
        tl.store(residual_at_ME, stored_ME, mask=real_ME)
        x_ME = stored_ME.to(tl.float32)
    scale_M = tl.rsqrt(tl.sum(x_ME * x_ME, 1) / FEATURES + eps)
    weight_E1 = tl.load(weight_E + e_E, mask=e_E < FEATURES, other=0).to(tl.float32) + offset
    y_ME = x_ME * scale_M[:, None] * weight_E1[None, :]
    out_at_ME = out_NE + (row_M * FEATURES)[:, None] + e_E[None, :]
    if scales_N is None:
        tl.store(out_at_ME, y_ME.to(out_NE.dtype.element_ty), mask=real_ME)
    else:
        largest_M = tl.max(tl.abs(y_ME), 1)
        tl.store(scales_N + row_M, largest_M / LARGEST, mask=row_M < rows)
        y_ME *= (LARGEST / tl.maximum(largest_M, 1e-30))[:, None]
        if out_NE.dtype.element_ty == tl.int8:
            tl.store(out_at_ME, nearest_int8(y_ME), mask=real_ME)
        else:
            tl.store(out_at_ME, to_stored(y_ME, out_NE.dtype.element_ty), mask=real_ME)


def aot_cases(target: Target) -> list[AotCase]:
    """Return norms of hidden states, of heads of a fused projection, and with 8-bit output."""
    plain = {"residual_NE": None, "scales_N": None, "LARGEST": None}
    added = {"scales_N": None, "LARGEST": None}
    int8 = {"LARGEST": LARGEST_INT8.value}
    cases = [
        _case("rms_norm bfloat16 128", target, plain | {"GROUP": 32, "FEATURES": 128}),
        _case("rms_norm bfloat16 1024", target, plain | {"GROUP": 1, "FEATURES": 1024}),
        _case("add_rms_norm bfloat16 4096", target, added | {"GROUP": 1, "FEATURES": 4096}),
        _case("add_rms_norm bfloat16 16384", target, added | {"GROUP": 1, "FEATURES": 16384}),
        _case("rms_norm_quantized int8 4096", target, int8 | {"GROUP": 1, "FEATURES": 4096}, "*i8"),
    ]
    if target.float8_e4m3fn:
        float8 = {"LARGEST": LARGEST_FLOAT8.value, "GROUP": 1, "FEATURES": 4096}
        cases.append(_case("rms_norm_quantized float8 4096", target, float8, "*fp8e4nv"))
    return cases


def _case(name: str, target: Target, constants: dict[str, Any], out: str = "*bf16") -> AotCase:
    width = triton.next_power_of_2(constants["FEATURES"])
    signature = {"x_NE": "*bf16", "residual_NE": "*bf16", "weight_E": "*bf16", "out_NE": out, "scales_N": "*fp32"}
    signature |= dict.fromkeys(("rows", "x_stride", "x_stride_in_group", "residual_stride"), "i32")
    signature |= {"eps": "fp32", "offset": "fp32"}
    return AotCase(
        name=name,
        function=rms_norm_kernel,
        signature={argument: kind for argument, kind in signature.items() if argument not in constants},
        constexprs={**constants, "BLOCK_M": max(1, TILE_NUMBERS // width), "BLOCK_E": width},
        launch=config("rms_norm", target, 2 * constants["FEATURES"]),
        divisible=[name for name in signature if name not in ("rows", "eps", "offset", *constants)],
    )
