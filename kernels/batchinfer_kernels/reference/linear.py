"""Linear layers. N rows · I input features · O output features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pack_linear(weight_OI: Tensor) -> Tensor:
    return weight_OI


def linear(x_NI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    return F.linear(x_NI, packed, bias_O)


def packed_rows(packed: Tensor, rows_N: Tensor) -> Tensor:
    return F.embedding(rows_N, packed)
