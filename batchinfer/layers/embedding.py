"""Token embedding, and logits from the matrix that may be the same one.

T tokens · N sampled rows · E hidden size · V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Rows of the matrix times `multiplier`, which is rounded to the matrix's dtype first, as Gemma was trained."""

    def __init__(self, vocab_size: int, hidden_size: int, multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        self.multiplier = multiplier

    def forward(self, tokens_T: Tensor) -> Tensor:
        x_TE = F.embedding(tokens_T, self.weight)
        if self.multiplier != 1.0:
            x_TE.mul_(torch.tensor(self.multiplier, dtype=x_TE.dtype).item())
        return x_TE


def logits(hidden_NE: Tensor, weight_VE: Tensor, divisor: float, soft_cap: float | None) -> Tensor:
    """float32 [N, V], divided by `divisor`, then soft_cap * tanh(logit / soft_cap)."""
    logits_NV = F.linear(hidden_NE, weight_VE).float()
    if divisor != 1.0:
        logits_NV.div_(divisor)
    if soft_cap is not None:
        logits_NV.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits_NV
