"""A linear layer and the gated activation after it. N rows · I input features · F feed-forward size · G = 2F"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from batchinfer_kernels.reference.activation import gelu_mul, silu_mul
from batchinfer_kernels.reference.block_matrix import BlockMatrix
from batchinfer_kernels.reference.linear import linear, pack_linear
from batchinfer_kernels.reference.quantized_linear import QuantizedMatrix, pack_quantized

_ACTIVATIONS = {"silu": silu_mul, "gelu": gelu_mul}


def pack_gated(weight_GI: Tensor | BlockMatrix, quantize: bool) -> Tensor | QuantizedMatrix:
    return pack_quantized(weight_GI) if quantize else pack_linear(weight_GI)


def gated_linear(
    x_NI: Tensor, matrix_GI: Tensor | QuantizedMatrix, bias_G: Tensor | None, activation: Literal["silu", "gelu"]
) -> Tensor:
    return _ACTIVATIONS[activation](linear(x_NI, matrix_GI, bias_G))
