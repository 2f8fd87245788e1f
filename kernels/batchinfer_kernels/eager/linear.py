"""Linear layers in plain torch, and the forms that matrices have here.

Int8 follows quantized_linear.py, bfloat16 of float32 activations rounded_linear.py. N rows · I, O input and output
features · F feed-forward size · G = 2F
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from batchinfer_kernels.eager.activation import gelu_mul, silu_mul
from batchinfer_kernels.eager.quantized_linear import QuantizedMatrix, pack_quantized, quantized_linear
from batchinfer_kernels.eager.rounded_linear import RoundedMatrix, pack_rounded, rounded_linear
from batchinfer_kernels.formats import Activation, BlockMatrix, PackedMatrix, Precision, ValuesMatrix, keeps_numbers

_ACTIVATIONS = {"silu": silu_mul, "gelu": gelu_mul}


@dataclass(frozen=True, slots=True)
class DenseMatrix(ValuesMatrix):
    """Weights as they are; float32 if they came in blocks."""

    @property
    def precision(self) -> Precision:
        return Precision(str(self.values_OI.dtype).removeprefix("torch."))


Matrix = DenseMatrix | RoundedMatrix | QuantizedMatrix


def pack_linear(weight_OI: Tensor | BlockMatrix, precision: Precision) -> Matrix:
    """Return the weight itself in its own precision. Raises ValueError for one that nothing rounds to."""
    if keeps_numbers(weight_OI.dtype, precision):
        return DenseMatrix(weight_OI if isinstance(weight_OI, Tensor) else weight_OI.float())
    return pack_quantized(weight_OI) if precision is Precision.INT8 else pack_rounded(weight_OI.float())


def linear(x_NI: Tensor, packed: PackedMatrix, bias_O: Tensor | None) -> Tensor:
    if isinstance(packed, QuantizedMatrix):
        return quantized_linear(x_NI, packed, bias_O)
    if isinstance(packed, RoundedMatrix):
        return rounded_linear(x_NI, packed, bias_O)
    assert isinstance(packed, DenseMatrix)
    return F.linear(x_NI, packed.values_OI, bias_O)


def gated_linear(x_NI: Tensor, matrix_GI: PackedMatrix, bias_G: Tensor | None, activation: Activation) -> Tensor:
    return _ACTIVATIONS[activation](linear(x_NI, matrix_GI, bias_G))


def packed_rows(packed: PackedMatrix, rows_N: Tensor) -> Tensor:
    assert isinstance(packed, DenseMatrix | RoundedMatrix), "an embedding is never quantized"
    return F.embedding(rows_N, packed.values_OI)
