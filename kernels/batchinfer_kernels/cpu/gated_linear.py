"""Fused linear layer and gated activation: the product before the activation is never written to memory.

N rows · I input features · F feed-forward size · G = 2F, the gates and then what they multiply
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer_kernels.cpu.library import Functions
from batchinfer_kernels.cpu.linear import Panels, can_pack, multiply, pack_linear
from batchinfer_kernels.cpu.memory import empty_rows
from batchinfer_kernels.formats import Activation, BlockMatrix, Precision

ACTIVATIONS = {"silu": 1, "gelu": 2}  # csrc/elementwise.h's numbers


@dataclass(frozen=True, slots=True)
class GatedPanels:
    """Matrix [2F, I] whose rows were ordered so that each panel has as many gates as factors, those of the same F."""

    packed: Panels

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @property
    def precision(self) -> Precision:
        return self.packed.precision


def pack_gated(
    functions: Functions, weight_GI: Tensor | BlockMatrix, precision: Precision
) -> GatedPanels | Panels | None:
    """Pack into GatedPanels if F fills whole panels; otherwise as `pack_linear`, which may return None."""
    rows, panel = weight_GI.shape[0], functions.linear_panel()
    even = can_pack(weight_GI) and rows % panel == 0
    if even:
        weight_GI = weight_GI[torch.arange(rows).view(2, -1, panel // 2).transpose(0, 1).flatten()]
    packed = pack_linear(functions, weight_GI, precision)
    return GatedPanels(packed) if even and packed is not None else packed


def gated_linear(x_NI: Tensor, matrix_GI: GatedPanels, bias_G: Tensor | None, activation: Activation) -> Tensor:
    """Return [N, F]; the row stride may exceed F."""
    packed = matrix_GI.packed
    out_NF = empty_rows(len(x_NI), packed.out_features // 2)
    return multiply(x_NI, packed, bias_G, out_NF, ACTIVATIONS[activation])
