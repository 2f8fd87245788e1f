"""Linear layers in bfloat16: weights and activations are rounded to it, and their products added up in float32.

N rows · I input features · O output features
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer_kernels.eager.block_matrix import BlockMatrix


class RoundedMatrix(NamedTuple):
    """Multiplied with what is rounded as well."""

    values_OI: Tensor  # float32 numbers that bfloat16 holds


def pack_rounded(weight_OI: Tensor | BlockMatrix) -> RoundedMatrix:
    return RoundedMatrix(_rounded(weight_OI.float()))


def rounded_linear(x_NI: Tensor, matrix: RoundedMatrix, bias_O: Tensor | None) -> Tensor:
    bias_O = None if bias_O is None else bias_O.float()
    return F.linear(_rounded(x_NI), matrix.values_OI, bias_O).to(x_NI.dtype)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
