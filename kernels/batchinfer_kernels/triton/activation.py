"""Gated activations of the feed-forward block, in float32, rounded once.

N rows · F feed-forward size · M rows of a tile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer_kernels.triton.targets import AotCase, Launch, Target, config

_GELU_OUTER, _GELU_INNER = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)  # 2 * sqrt(2 / pi)


def silu_mul(x_N2F: Tensor) -> Tensor:
    return _gated(x_N2F, False)


def gelu_mul(x_N2F: Tensor) -> Tensor:
    return _gated(x_N2F, True)


def _gated(x_N2F: Tensor, gelu: bool) -> Tensor:
    """Any leading shape. Rows of two axes may lie farther apart than 2F."""
    size = x_N2F.shape[-1] // 2
    out_NF = torch.empty((*x_N2F.shape[:-1], size), dtype=x_N2F.dtype, device=x_N2F.device)
    if x_N2F.dim() != 2 or x_N2F.stride(1) != 1:
        x_N2F = x_N2F.reshape(-1, 2 * size).contiguous()
    rows = len(x_N2F)
    if rows and size:
        launch = config("activation", x_N2F.device)
        block_rows, columns = tile(size, launch)
        gated_kernel[triton.cdiv(rows, block_rows), triton.cdiv(size, columns)](
            x_N2F, out_NF, rows, x_N2F.stride(0), size, gelu, block_rows, columns, **launch.options
        )
    return out_NF


def tile(size: int, launch: Launch) -> tuple[int, int]:
    """Return rows and columns of a program's tile."""
    columns = min(launch.block_n, triton.next_power_of_2(size))
    return launch.block_n // columns, columns


@triton.jit(do_not_specialize=["rows"])
def gated_kernel(
    x_N2F: tl.tensor,
    out_NF: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    SIZE: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    """Multiply the activation of a tile of gates with its factors."""
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    f_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    real_MF = (row_M < rows)[:, None] & (f_F < SIZE)[None, :]
    gate_at_MF = x_N2F + (row_M * x_stride)[:, None] + f_F[None, :]
    gate_MF = tl.load(gate_at_MF, mask=real_MF, other=0).to(tl.float32)
    up_MF = tl.load(gate_at_MF + SIZE, mask=real_MF, other=0).to(tl.float32)
    slope_MF = gate_MF
    if GELU:  # 0.5 * (1 + tanh(a)) = sigmoid(2 * a)
        slope_MF = _GELU_OUTER * (gate_MF + _GELU_INNER * gate_MF * gate_MF * gate_MF)
    y_MF = gate_MF / (1 + tl.exp(-slope_MF)) * up_MF
    tl.store(out_NF + (row_M * SIZE)[:, None] + f_F[None, :], y_MF.to(out_NF.dtype.element_ty), mask=real_MF)


def aot_cases(target: Target) -> list[AotCase]:
    """Return both activations."""
    launch = config("activation", target)
    rows, columns = tile(14336, launch)
    return [
        AotCase(
            name=f"{name} bfloat16",
            function=gated_kernel,
            signature={"x_N2F": "*bf16", "out_NF": "*bf16", "rows": "i32", "x_stride": "i32"},
            constexprs={"SIZE": 14336, "GELU": name == "gelu_mul", "BLOCK_M": rows, "BLOCK_F": columns},
            launch=launch,
            divisible=("x_N2F", "out_NF", "x_stride"),
        )
        for name in ("silu_mul", "gelu_mul")
    ]
