"""Root-mean-square norm as a layer. N rows, E features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchinfer import ops


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last axis. Gemma stores weight - 1: offset 1."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps
        self.offset = offset

    @property
    def facts(self) -> ops.NormFacts:
        return ops.NormFacts(self.weight, self.eps, self.offset)

    def forward(self, x_NE: Tensor) -> Tensor:
        return ops.rms_norm(x_NE, self.weight, self.eps, self.offset)

    def after_adding(self, x_NE: Tensor, residual_NE: Tensor) -> Tensor:
        """residual += x, in place; the norm of the sum."""
        return ops.add_rms_norm(x_NE, residual_NE, self.weight, self.eps, self.offset)
