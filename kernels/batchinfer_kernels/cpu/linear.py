"""Linear layers over weights that were packed once (csrc/linear.h). N rows · I input features · O output features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer_kernels import reference
from batchinfer_kernels.cpu.library import TYPES, Functions, checked, functions
from batchinfer_kernels.cpu.memory import empty


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
    panels = empty((-(-out_features // panel), in_features, panel), _smallest_exact(weight_OI))
    chosen.pack_linear(
        weight_OI.contiguous().data_ptr(),
        in_features,
        out_features,
        panels.data_ptr(),
        TYPES[panels.dtype],
        torch.get_num_threads(),
    )
    return PackedLinear(panels, out_features, chosen)


@dataclass(frozen=True, slots=True)
class QuantizedPanels:
    """The same in 8 bits, as csrc/quantized_linear.h reads it."""

    panels: Tensor  # int8 [ceil(O / panel), whole groups of I / 4, panel, 4], zeros beyond O and I
    offsets: Tensor  # int32 [ceil(O / panel), groups, panel]
    scales_O: Tensor  # float32 [O]
    in_features: int
    functions: Functions

    @property
    def out_features(self) -> int:
        return len(self.scales_O)


def pack_quantized(weight_OI: Tensor) -> reference.QuantizedMatrix | QuantizedPanels:
    matrix = reference.pack_quantized(weight_OI)
    if weight_OI.dtype != torch.float32:
        return matrix
    chosen = functions()
    panel = chosen.linear_panel()
    out_features, in_features = weight_OI.shape
    count, groups = -(-out_features // panel), -(-in_features // chosen.quantized_group())
    panels = empty((count, groups * chosen.quantized_group() // 4, panel, 4), torch.int8)
    offsets = torch.empty(count, groups, panel, dtype=torch.int32)
    values, threads = matrix.values_OI.data_ptr(), torch.get_num_threads()
    chosen.pack_quantized(values, in_features, out_features, panels.data_ptr(), offsets.data_ptr(), threads)
    return QuantizedPanels(panels, offsets, matrix.scales_O, in_features, chosen)


def _smallest_exact(weight_OI: Tensor) -> torch.dtype:
    sample = weight_OI[:1]
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(sample.to(dtype).float(), sample) and torch.equal(weight_OI.to(dtype).float(), weight_OI):
            return dtype
    return torch.float32


def linear(
    x_NI: Tensor, packed: Tensor | PackedLinear | reference.QuantizedMatrix | QuantizedPanels, bias_O: Tensor | None
) -> Tensor:
    if isinstance(packed, Tensor | reference.QuantizedMatrix):
        return reference.linear(x_NI, packed, bias_O)
    if x_NI.stride(-1) != 1:
        x_NI = x_NI.contiguous()
    out_NO = torch.empty(len(x_NI), packed.out_features)
    x, bias, out = x_NI.data_ptr(), None if bias_O is None else bias_O.data_ptr(), out_NO.data_ptr()
    panels, stride, threads = packed.panels.data_ptr(), x_NI.stride(0), torch.get_num_threads()
    sizes = (*x_NI.shape, packed.out_features)
    if isinstance(packed, PackedLinear):
        kind = TYPES[packed.panels.dtype]
        checked(packed.functions.linear(x, stride, panels, kind, bias, out, *sizes, threads))
    else:
        offsets, scales = packed.offsets.data_ptr(), packed.scales_O.data_ptr()
        checked(packed.functions.quantized_linear(x, stride, panels, offsets, scales, bias, out, *sizes, threads))
    return out_NO


def packed_rows(packed: Tensor | PackedLinear, rows_N: Tensor) -> Tensor:
    if isinstance(packed, Tensor):
        return reference.packed_rows(packed, rows_N)
    panel = packed.panels.shape[-1]
    return packed.panels[rows_N // panel, :, rows_N % panel].float()
