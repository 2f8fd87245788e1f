"""Linear layers. N rows · I input features · O output features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from batchinfer_kernels.reference.block_matrix import BlockMatrix
from batchinfer_kernels.reference.quantized_linear import QuantizedMatrix, quantized_linear


def pack_linear(weight_OI: Tensor | BlockMatrix) -> Tensor:
    return weight_OI if isinstance(weight_OI, Tensor) else weight_OI.float()


def linear(x_NI: Tensor, packed: Tensor | QuantizedMatrix, bias_O: Tensor | None) -> Tensor:
    if isinstance(packed, QuantizedMatrix):
        return quantized_linear(x_NI, packed, bias_O)
    return F.linear(x_NI, packed, bias_O)


def packed_rows(packed: Tensor, rows_N: Tensor) -> Tensor:
    return F.embedding(rows_N, packed)
