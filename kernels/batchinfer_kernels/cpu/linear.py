"""Linear layers over weights that were packed once (csrc/linear.h). N rows · I input features · O output features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer_kernels import reference
from batchinfer_kernels.cpu.library import TYPES, Functions, checked, functions


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A matrix [O, I] as the compiled variant in use reads it; `functions` are that variant's."""

    panels: Tensor  # [ceil(O / panel), I, panel], zeros beyond O
    out_features: int
    functions: Functions


def pack_linear(weight_OI: Tensor) -> Tensor | PackedLinear:
    """Copies. Numbers that 16 bits hold exactly (a bfloat16 checkpoint's) are kept in 16: half the memory to read."""
    if weight_OI.dtype != torch.float32:
        return reference.pack_linear(weight_OI)
    chosen = functions()
    panel = chosen.linear_panel()
    out_features, in_features = weight_OI.shape
    panels = torch.empty(-(-out_features // panel), in_features, panel, dtype=_smallest_exact(weight_OI))
    chosen.pack_linear(
        weight_OI.contiguous().data_ptr(),
        in_features,
        out_features,
        panels.data_ptr(),
        TYPES[panels.dtype],
        torch.get_num_threads(),
    )
    return PackedLinear(panels, out_features, chosen)


def _smallest_exact(weight_OI: Tensor) -> torch.dtype:
    sample = weight_OI[:1]
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(sample.to(dtype).float(), sample) and torch.equal(weight_OI.to(dtype).float(), weight_OI):
            return dtype
    return torch.float32


def linear(x_NI: Tensor, packed: Tensor | PackedLinear, bias_O: Tensor | None) -> Tensor:
    if isinstance(packed, Tensor):
        return reference.linear(x_NI, packed, bias_O)
    if x_NI.stride(-1) != 1:
        x_NI = x_NI.contiguous()
    rows, in_features = x_NI.shape
    out_NO = torch.empty(rows, packed.out_features)
    checked(
        packed.functions.linear(
            x_NI.data_ptr(),
            x_NI.stride(0),
            packed.panels.data_ptr(),
            TYPES[packed.panels.dtype],
            None if bias_O is None else bias_O.data_ptr(),
            out_NO.data_ptr(),
            rows,
            in_features,
            packed.out_features,
            torch.get_num_threads(),
        )
    )
    return out_NO


def packed_rows(packed: Tensor | PackedLinear, rows_N: Tensor) -> Tensor:
    if isinstance(packed, Tensor):
        return reference.packed_rows(packed, rows_N)
    panel = packed.panels.shape[-1]
    return packed.panels[rows_N // panel, :, rows_N % panel].float()
