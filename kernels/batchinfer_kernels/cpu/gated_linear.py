"""A linear layer and the gated activation after it in one: what lies between is never written to memory.

N rows · I input features · F feed-forward size · G = 2F, the gates and then what they multiply
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from batchinfer_kernels import eager
from batchinfer_kernels.cpu.activation import gelu_mul, silu_mul
from batchinfer_kernels.cpu.library import functions
from batchinfer_kernels.cpu.linear import (
    Matrix,
    Panels,
    known,
    linear,
    multiply,
    pack_linear,
)
from batchinfer_kernels.cpu.memory import empty_rows
from batchinfer_kernels.formats import Precision

ACTIVATIONS = {"silu": (1, silu_mul), "gelu": (2, gelu_mul)}  # csrc/elementwise.h's number, the op


@dataclass(frozen=True, slots=True)
class GatedPanels:
    """A matrix [2F, I] whose rows were ordered so that each panel has as many gates as factors, those of the same F."""

    packed: Panels


def pack_gated(weight_GI: Tensor | eager.BlockMatrix, precision: Precision) -> Matrix | GatedPanels:
    """GatedPanels of float32 or blocks, where panels come out even; otherwise what pack_linear makes."""
    rows, panel = weight_GI.shape[0], functions().linear_panel()
    even = known(weight_GI) and rows % panel == 0
    if even:
        weight_GI = weight_GI[torch.arange(rows).view(2, -1, panel // 2).transpose(0, 1).flatten()]
    packed = pack_linear(weight_GI, precision)
    return GatedPanels(packed) if even and isinstance(packed, Panels) else packed


def gated_linear(
    x_NI: Tensor, matrix_GI: Matrix | GatedPanels, bias_G: Tensor | None, activation: Literal["silu", "gelu"]
) -> Tensor:
    number, op = ACTIVATIONS[activation]
    if not isinstance(matrix_GI, GatedPanels):
        return op(linear(x_NI, matrix_GI, bias_G))
    packed = matrix_GI.packed
    return multiply(x_NI, packed, bias_G, empty_rows(len(x_NI), packed.out_features // 2), number)
