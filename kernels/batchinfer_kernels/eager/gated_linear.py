"""A linear layer and the gated activation after it. N rows · I input features · F feed-forward size · G = 2F"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from batchinfer_kernels.eager.activation import gelu_mul, silu_mul
from batchinfer_kernels.eager.linear import Matrix, linear, pack_linear

_ACTIVATIONS = {"silu": silu_mul, "gelu": gelu_mul}


pack_gated = pack_linear


def gated_linear(x_NI: Tensor, matrix_GI: Matrix, bias_G: Tensor | None, activation: Literal["silu", "gelu"]) -> Tensor:
    return _ACTIVATIONS[activation](linear(x_NI, matrix_GI, bias_G))
