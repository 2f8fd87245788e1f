"""Token embedding, and logits from the matrix that may be the same one.

T tokens · N sampled rows · E hidden size · V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer import ops
from batchinfer.layers.linear import Linear


class Embedding(Linear):
    """Rows of the matrix times `multiplier`, which is rounded to the matrix's dtype first, as Gemma was trained."""

    def __init__(self, vocab_size: int, hidden_size: int, multiplier: float = 1.0) -> None:
        super().__init__(hidden_size, vocab_size)
        self.multiplier = multiplier

    def forward(self, tokens_T: Tensor) -> Tensor:
        matrix_VE = self.matrix
        assert not isinstance(matrix_VE, ops.Quantized), "an embedding is never quantized"
        x_TE = ops.packed_rows(matrix_VE, tokens_T)
        if self.multiplier != 1.0:
            x_TE.mul_(torch.tensor(self.multiplier, dtype=x_TE.dtype).item())
        return x_TE


def logits(hidden_NE: Tensor, matrix_VE: ops.Packed | ops.Quantized, divisor: float, soft_cap: float | None) -> Tensor:
    """float32 [N, V], divided by `divisor`, then soft_cap * tanh(logit / soft_cap)."""
    logits_NV = ops.linear(hidden_NE, matrix_VE, None).float()
    if divisor != 1.0:
        logits_NV.div_(divisor)
    if soft_cap is not None:
        logits_NV.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits_NV
