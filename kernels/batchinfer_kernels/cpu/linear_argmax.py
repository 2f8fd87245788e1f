"""Argmax of a linear layer's output, found by bounds (csrc/argmax.h). N rows · I input features · O output features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer_kernels.cpu.library import checked
from batchinfer_kernels.cpu.linear import PackedBlocks, PackedLinear, rounded_panels, type_of
from batchinfer_kernels.formats import PackedMatrix

_LONGEST = 1e18  # products of two such lengths are finite


@dataclass(frozen=True, slots=True)
class ArgmaxBounds:
    """bfloat16 copy and error bounds of a matrix, used to find each row's argmax, beside the exact matrix."""

    packed: PackedLinear | PackedBlocks
    panels: Tensor  # bfloat16, as RoundedPanels has them
    lengths_O: Tensor  # float32: norm of each output feature's weights
    errors_O: Tensor  # float32: norm of what rounding takes off them


def bounds_pay(packed: PackedMatrix) -> bool:
    """Return True if bounds save time: rounded products must be the faster ones, and the matrix a float32 one."""
    return isinstance(packed, PackedLinear | PackedBlocks) and packed.functions.rounded_together() > 1


def make_bounds(packed: PackedLinear | PackedBlocks) -> ArgmaxBounds | None:
    """Return None for weights that are not finite, or so large that their products may not be."""
    panels = rounded_panels(packed.out_features, packed.in_features, packed.functions)
    lengths_O, errors_O = torch.empty(2, panels.shape[0] * panels.shape[2])
    packed.functions.make_screen(
        packed.panels.data_ptr(),
        type_of(packed),
        packed.in_features,
        packed.out_features,
        panels.data_ptr(),
        lengths_O.data_ptr(),
        errors_O.data_ptr(),
        torch.get_num_threads(),
    )
    if not bool((lengths_O < _LONGEST).all()):
        return None
    return ArgmaxBounds(packed, panels, lengths_O, errors_O)


def linear_argmax(x_NI: Tensor, bounds: ArgmaxBounds) -> tuple[Tensor, Tensor]:
    if x_NI.stride(-1) != 1:
        x_NI = x_NI.contiguous()
    packed = bounds.packed
    values_N = torch.empty(len(x_NI))
    ids_N = torch.empty(len(x_NI), dtype=torch.int64)
    checked(
        packed.functions.linear_argmax(
            x_NI.data_ptr(),
            x_NI.stride(0),
            bounds.panels.data_ptr(),
            bounds.lengths_O.data_ptr(),
            bounds.errors_O.data_ptr(),
            packed.panels.data_ptr(),
            type_of(packed),
            values_N.data_ptr(),
            ids_N.data_ptr(),
            len(x_NI),
            packed.in_features,
            packed.out_features,
            torch.get_num_threads(),
        )
    )
    return values_N, ids_N
