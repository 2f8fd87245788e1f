"""Linear layers over weights that were packed once (csrc/linear.h). N rows · I input features · O output features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer_kernels import eager
from batchinfer_kernels.cpu.library import TYPES, Functions, checked, functions
from batchinfer_kernels.cpu.memory import empty
from batchinfer_kernels.formats import Precision, keeps_numbers


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A matrix [O, I] as the compiled variant in use reads it; `functions` are that variant's."""

    panels: Tensor  # [ceil(O / panel), I, panel], zeros beyond O
    in_features: int
    out_features: int
    functions: Functions


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """A matrix in blocks, as csrc/block_linear.h reads it: multiplied as the float32 numbers that it stands for."""

    panels: Tensor  # uint8 [ceil(O / panel), groups of I, bytes of panel features of a group], zeros beyond O
    type: int  # csrc/ops.cpp's
    in_features: int
    out_features: int
    functions: Functions


@dataclass(frozen=True, slots=True)
class RoundedPanels:
    """A matrix rounded to bfloat16, as csrc/rounded_linear.h reads it."""

    panels: Tensor  # bfloat16 [ceil(O / panel), ceil(I / together), panel, together], zeros beyond O and I
    in_features: int
    out_features: int
    functions: Functions


def known(weight_OI: Tensor | eager.BlockMatrix) -> bool:
    return isinstance(weight_OI, eager.BlockMatrix) or weight_OI.dtype == torch.float32


_ROUNDED = 6  # csrc/ops.cpp's type
_BLOCK_TYPES = {(8, False): 3, (4, False): 4, (4, True): 5}  # (bits, with minima)


def pack_linear(weight_OI: Tensor | eager.BlockMatrix, precision: Precision) -> Matrix:
    """Copies. Numbers that 16 bits hold exactly (a bfloat16 checkpoint's) are kept in 16: half the memory to read."""
    if not known(weight_OI):
        return eager.pack_linear(weight_OI, precision)
    if not keeps_numbers(weight_OI.dtype, precision):
        return _pack_quantized(weight_OI) if precision is Precision.INT8 else _pack_rounded(weight_OI.float())
    if isinstance(weight_OI, eager.BlockMatrix):
        return _pack_blocks(weight_OI)
    chosen = functions()
    panel = chosen.linear_panel()
    out_features, in_features = weight_OI.shape
    panels = empty((-(-out_features // panel), in_features, panel), _smallest_exact(weight_OI))
    _fill(panels, weight_OI, TYPES[panels.dtype], chosen)
    return PackedLinear(panels, in_features, out_features, chosen)


def _pack_rounded(weight_OI: Tensor) -> RoundedPanels:
    chosen = functions()
    out_features, in_features = weight_OI.shape
    panels = rounded_panels(out_features, in_features, chosen)
    _fill(panels, weight_OI, _ROUNDED, chosen)
    return RoundedPanels(panels, in_features, out_features, chosen)


def rounded_panels(out_features: int, in_features: int, chosen: Functions) -> Tensor:
    """As RoundedPanels has them, not filled yet."""
    panel, together = chosen.linear_panel(), chosen.rounded_together()
    return empty((-(-out_features // panel), -(-in_features // together), panel, together), torch.bfloat16)


def _fill(panels: Tensor, weight_OI: Tensor, kind: int, chosen: Functions) -> None:
    out_features, in_features = weight_OI.shape
    weights, threads = weight_OI.contiguous(), torch.get_num_threads()
    chosen.pack_linear(weights.data_ptr(), in_features, out_features, panels.data_ptr(), kind, threads)


def _pack_blocks(matrix: eager.BlockMatrix) -> PackedBlocks:
    chosen, kind = functions(), _BLOCK_TYPES[matrix.bits, matrix.mins_OG is not None]
    out_features, in_features = matrix.shape
    count = -(-out_features // chosen.linear_panel())
    panels = empty((count, in_features // eager.BLOCK, chosen.block_bytes(kind)), torch.uint8)
    values, scales = matrix.values_OI.contiguous(), matrix.scales_OG.contiguous()
    mins = None if matrix.mins_OG is None else matrix.mins_OG.contiguous()
    chosen.pack_blocks(
        values.data_ptr(),
        scales.data_ptr(),
        None if mins is None else mins.data_ptr(),
        in_features,
        out_features,
        panels.data_ptr(),
        kind,
        torch.get_num_threads(),
    )
    return PackedBlocks(panels, kind, in_features, out_features, chosen)


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


def _pack_quantized(weight_OI: Tensor | eager.BlockMatrix) -> QuantizedPanels:
    matrix = eager.pack_linear(weight_OI, Precision.INT8)
    assert isinstance(matrix, eager.QuantizedMatrix)
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


Panels = PackedLinear | RoundedPanels | PackedBlocks | QuantizedPanels
Matrix = eager.Matrix | Panels


def linear(x_NI: Tensor, packed: Matrix, bias_O: Tensor | None) -> Tensor:
    if isinstance(packed, eager.Matrix):
        return eager.linear(x_NI, packed, bias_O)
    return multiply(x_NI, packed, bias_O, torch.empty(len(x_NI), packed.out_features))


def multiply(x_NI: Tensor, packed: Panels, bias_O: Tensor | None, out: Tensor, activation: int = 0) -> Tensor:
    """Into out: [N, O], or with one of csrc/elementwise.h's activations [N, O / 2]. Returns it."""
    if x_NI.stride(-1) != 1:
        x_NI = x_NI.contiguous()
    x, bias = x_NI.data_ptr(), None if bias_O is None else bias_O.data_ptr()
    panels, stride, threads = packed.panels.data_ptr(), x_NI.stride(0), torch.get_num_threads()
    result, sizes = (out.data_ptr(), out.stride(0), activation), (*x_NI.shape, packed.out_features)
    if isinstance(packed, QuantizedPanels):
        offsets, scales = packed.offsets.data_ptr(), packed.scales_O.data_ptr()
        checked(packed.functions.quantized_linear(x, stride, panels, offsets, scales, bias, *result, *sizes, threads))
    else:
        checked(packed.functions.linear(x, stride, panels, type_of(packed), bias, *result, *sizes, threads))
    return out


def type_of(packed: PackedLinear | RoundedPanels | PackedBlocks) -> int:
    if isinstance(packed, PackedLinear):
        return TYPES[packed.panels.dtype]
    return _ROUNDED if isinstance(packed, RoundedPanels) else packed.type


def packed_rows(
    packed: Tensor | eager.RoundedMatrix | PackedLinear | RoundedPanels | PackedBlocks, rows_N: Tensor
) -> Tensor:
    if isinstance(packed, Tensor | eager.RoundedMatrix):
        return eager.packed_rows(packed, rows_N)
    if isinstance(packed, PackedLinear | RoundedPanels):
        panel = packed.panels.shape[2]
        found = packed.panels[rows_N // panel, :, rows_N % panel].flatten(1)
        return found[:, : packed.in_features].float()
    rows_N = rows_N.to(torch.int64).contiguous()
    if len(rows_N) and not 0 <= int(rows_N.min()) <= int(rows_N.max()) < packed.out_features:
        raise IndexError(f"rows {rows_N.min()} to {rows_N.max()} of a matrix of {packed.out_features}")
    out_NI = torch.empty(len(rows_N), packed.in_features)
    panels, sizes = packed.panels.data_ptr(), (packed.type, packed.in_features)
    rows, threads = (rows_N.data_ptr(), len(rows_N)), torch.get_num_threads()
    packed.functions.block_rows(panels, *sizes, *rows, out_NI.data_ptr(), threads)
    return out_NI
