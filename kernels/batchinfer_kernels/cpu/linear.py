"""Linear layers over weights that were packed once (csrc/linear.h). N rows · I input features · O output features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer_kernels.cpu.library import TYPES, Functions, checked
from batchinfer_kernels.cpu.memory import empty
from batchinfer_kernels.eager.quantized_linear import pack_quantized
from batchinfer_kernels.formats import BLOCK, BlockMatrix, Precision


@dataclass(frozen=True, slots=True)
class PanelMatrix:
    """Matrix [O, I] in panels of output features, as a compiled variant reads it; `functions` are that variant's."""

    panels: Tensor
    in_features: int
    out_features: int
    functions: Functions

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    @property
    def precision(self) -> Precision:
        return Precision.FLOAT32


@dataclass(frozen=True, slots=True)
class PackedLinear(PanelMatrix):
    """Float32 matrix. panels [ceil(O / panel), I, panel], zeros beyond O; in 16 bits if that is exact."""


@dataclass(frozen=True, slots=True)
class PackedBlocks(PanelMatrix):
    """Matrix in blocks, as csrc/block_linear.h reads it: multiplied as the float32 numbers that it stands for.

    panels: uint8 [ceil(O / panel), groups of I, bytes of panel features of a group], zeros beyond O.
    """

    type: int  # csrc/ops.cpp's


@dataclass(frozen=True, slots=True)
class RoundedPanels(PanelMatrix):
    """Matrix rounded to bfloat16, as csrc/rounded_linear.h reads it.

    panels: bfloat16 [ceil(O / panel), ceil(I / together), panel, together], zeros beyond O and I.
    """

    @property
    def precision(self) -> Precision:
        return Precision.BFLOAT16


@dataclass(frozen=True, slots=True)
class QuantizedPanels(PanelMatrix):
    """Matrix in 8 bits, as csrc/quantized_linear.h reads it.

    panels: int8 [ceil(O / panel), whole groups of I / 4, panel, 4], zeros beyond O and I.
    """

    offsets: Tensor  # int32 [ceil(O / panel), groups, panel]
    scales_O: Tensor  # float32 [O]

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + self.offsets.nbytes + self.scales_O.nbytes

    @property
    def precision(self) -> Precision:
        return Precision.INT8


Panels = PackedLinear | RoundedPanels | PackedBlocks | QuantizedPanels

_COMPARED_NUMBERS = 1 << 22  # at once
_ROUNDED = 6  # csrc/ops.cpp's type
_BLOCK_TYPES = {(8, False): 3, (4, False): 4, (4, True): 5}  # (bits, with minima)


def can_pack(weight_OI: Tensor | BlockMatrix) -> bool:
    return isinstance(weight_OI, BlockMatrix) or weight_OI.dtype == torch.float32


def pack_linear(functions: Functions, weight_OI: Tensor | BlockMatrix, precision: Precision) -> Panels | None:
    """Copy a matrix into panels; return None if it is not float32 or `precision` is not for float32 activations.

    Numbers that 16 bits hold exactly (a bfloat16 checkpoint's) are kept in 16: half the memory to read.
    """
    if not can_pack(weight_OI) or precision == Precision.FLOAT16:
        return None
    if precision == Precision.INT8:
        return _pack_quantized(functions, weight_OI)
    if precision == Precision.BFLOAT16:
        return _pack_rounded(functions, weight_OI.float())
    if isinstance(weight_OI, BlockMatrix):
        return _pack_blocks(functions, weight_OI)
    panel = functions.linear_panel()
    out_features, in_features = weight_OI.shape
    panels = empty((-(-out_features // panel), in_features, panel), _smallest_exact(weight_OI))
    _fill(panels, weight_OI, TYPES[panels.dtype], functions)
    return PackedLinear(panels, in_features, out_features, functions)


def _pack_rounded(functions: Functions, weight_OI: Tensor) -> RoundedPanels:
    out_features, in_features = weight_OI.shape
    panels = rounded_panels(out_features, in_features, functions)
    _fill(panels, weight_OI, _ROUNDED, functions)
    return RoundedPanels(panels, in_features, out_features, functions)


def rounded_panels(out_features: int, in_features: int, functions: Functions) -> Tensor:
    """Allocate panels of RoundedPanels, uninitialised."""
    panel, together = functions.linear_panel(), functions.rounded_together()
    return empty((-(-out_features // panel), -(-in_features // together), panel, together), torch.bfloat16)


def _fill(panels: Tensor, weight_OI: Tensor, kind: int, functions: Functions) -> None:
    out_features, in_features = weight_OI.shape
    weights, threads = weight_OI.contiguous(), torch.get_num_threads()
    functions.pack_linear(weights.data_ptr(), in_features, out_features, panels.data_ptr(), kind, threads)


def _pack_blocks(functions: Functions, matrix: BlockMatrix) -> PackedBlocks:
    kind = _BLOCK_TYPES[matrix.bits, matrix.mins_OG is not None]
    out_features, in_features = matrix.shape
    count = -(-out_features // functions.linear_panel())
    panels = empty((count, in_features // BLOCK, functions.block_bytes(kind)), torch.uint8)
    values, scales = matrix.values_OI.contiguous(), matrix.scales_OG.contiguous()
    mins = None if matrix.mins_OG is None else matrix.mins_OG.contiguous()
    functions.pack_blocks(
        values.data_ptr(),
        scales.data_ptr(),
        None if mins is None else mins.data_ptr(),
        in_features,
        out_features,
        panels.data_ptr(),
        kind,
        torch.get_num_threads(),
    )
    return PackedBlocks(panels, in_features, out_features, functions, kind)


def _pack_quantized(functions: Functions, weight_OI: Tensor | BlockMatrix) -> QuantizedPanels:
    matrix = pack_quantized(weight_OI)
    panel = functions.linear_panel()
    out_features, in_features = weight_OI.shape
    count, groups = -(-out_features // panel), -(-in_features // functions.quantized_group())
    panels = empty((count, groups * functions.quantized_group() // 4, panel, 4), torch.int8)
    offsets = torch.empty(count, groups, panel, dtype=torch.int32)
    values, threads = matrix.values_OI.data_ptr(), torch.get_num_threads()
    functions.pack_quantized(values, in_features, out_features, panels.data_ptr(), offsets.data_ptr(), threads)
    return QuantizedPanels(panels, in_features, out_features, functions, offsets, matrix.scales_O)


def _smallest_exact(weight_OI: Tensor) -> torch.dtype:
    """Return the narrowest dtype that holds every weight. Compares chunk by chunk: no copies of the whole matrix."""
    chunks = torch.split(weight_OI, max(1, _COMPARED_NUMBERS // max(1, weight_OI.shape[1])))
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(chunk.to(dtype).float(), chunk) for chunk in chunks):
            return dtype
    return torch.float32


def linear(x_NI: Tensor, packed: Panels, bias_O: Tensor | None) -> Tensor:
    return multiply(x_NI, packed, bias_O, torch.empty(len(x_NI), packed.out_features))


def multiply(x_NI: Tensor, packed: Panels, bias_O: Tensor | None, out: Tensor, activation: int = 0) -> Tensor:
    """Write x Wᵀ + b into out [N, O], or with one of csrc/elementwise.h's activations [N, O / 2]. Returns out."""
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


def packed_rows(packed: PackedLinear | RoundedPanels | PackedBlocks, rows_N: Tensor) -> Tensor:
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
