"""Linear layers. N rows · I input features · O output features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from batchinfer_kernels.eager.block_matrix import BlockMatrix
from batchinfer_kernels.eager.quantized_linear import QuantizedMatrix, pack_quantized, quantized_linear
from batchinfer_kernels.eager.rounded_linear import RoundedMatrix, pack_rounded, rounded_linear
from batchinfer_kernels.formats import Precision, keeps_numbers

Matrix = Tensor | RoundedMatrix | QuantizedMatrix


def pack_linear(weight_OI: Tensor | BlockMatrix, precision: Precision) -> Matrix:
    if keeps_numbers(weight_OI.dtype, precision):
        return weight_OI if isinstance(weight_OI, Tensor) else weight_OI.float()
    return pack_quantized(weight_OI) if precision is Precision.INT8 else pack_rounded(weight_OI)


def linear(x_NI: Tensor, packed: Matrix, bias_O: Tensor | None) -> Tensor:
    if isinstance(packed, QuantizedMatrix):
        return quantized_linear(x_NI, packed, bias_O)
    if isinstance(packed, RoundedMatrix):
        return rounded_linear(x_NI, packed, bias_O)
    return F.linear(x_NI, packed, bias_O)


def packed_rows(packed: Tensor | RoundedMatrix, rows_N: Tensor) -> Tensor:
    return F.embedding(rows_N, packed.values_OI if isinstance(packed, RoundedMatrix) else packed)
