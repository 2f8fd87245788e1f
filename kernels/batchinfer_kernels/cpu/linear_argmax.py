"""The largest output feature of a linear layer (csrc/argmax.h). N rows · I input features · O output features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer_kernels.cpu.library import checked
from batchinfer_kernels.cpu.linear import PackedBlocks, PackedLinear, rounded_panels, type_of

_LONGEST = 1e18  # products of two such lengths are finite


@dataclass(frozen=True, slots=True)
class ArgmaxBounds:
    """What tells where the largest output feature can be, beside the matrix that says which it is."""

    packed: PackedLinear | PackedBlocks
    panels: Tensor  # bfloat16, as RoundedPanels has them
    lengths_O: Tensor  # float32: of each output feature's weights
    errors_O: Tensor  # float32: of what rounding them takes off


def screen(packed: Any) -> ArgmaxBounds | None:
    """None where it would gain nothing: rounded products must be the faster ones, and the matrix a float32 one."""
    if not isinstance(packed, PackedLinear | PackedBlocks) or packed.functions.rounded_together() == 1:
        return None
    return make_screen(packed)


def make_screen(packed: PackedLinear | PackedBlocks) -> ArgmaxBounds | None:
    """None for weights that are not finite, or so large that their products may not be."""
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


def linear_argmax(x_NI: Tensor, screen: ArgmaxBounds) -> tuple[Tensor, Tensor]:
    if x_NI.stride(-1) != 1:
        x_NI = x_NI.contiguous()
    packed = screen.packed
    values_N = torch.empty(len(x_NI))
    ids_N = torch.empty(len(x_NI), dtype=torch.int64)
    checked(
        packed.functions.linear_argmax(
            x_NI.data_ptr(),
            x_NI.stride(0),
            screen.panels.data_ptr(),
            screen.lengths_O.data_ptr(),
            screen.errors_O.data_ptr(),
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
