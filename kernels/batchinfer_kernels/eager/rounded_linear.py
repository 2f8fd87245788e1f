"""Linear layers in bfloat16: weights and activations are rounded to it, and products are summed in float32.

N rows · I input features · O output features
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer_kernels.formats import Precision, ValuesMatrix


@dataclass(frozen=True, slots=True)
class RoundedMatrix(ValuesMatrix):
    """Weights rounded to bfloat16, multiplied with activations that are rounded as well.

    values_OI: float32 numbers that bfloat16 holds.
    """

    @property
    def precision(self) -> Precision:
        return Precision.BFLOAT16


def pack_rounded(weight_OI: Tensor) -> RoundedMatrix:
    return RoundedMatrix(_rounded(weight_OI))


def rounded_linear(x_NI: Tensor, matrix: RoundedMatrix, bias_O: Tensor | None) -> Tensor:
    bias_O = None if bias_O is None else bias_O.float()
    return F.linear(_rounded(x_NI), matrix.values_OI, bias_O).to(x_NI.dtype)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
