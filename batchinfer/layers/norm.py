"""Root-mean-square norm as a layer. N rows, E features."""

from __future__ import annotations

import torch
from batchinfer_kernels.formats import NormFacts
from torch import Tensor, nn

from batchinfer.ops.backend import Backend


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last axis. Gemma stores weight - 1: offset 1."""

    def __init__(self, size: int, backend: Backend, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps
        self.offset = offset

    @property
    def facts(self) -> NormFacts:
        return NormFacts(self.weight, self.eps, self.offset)

    def forward(self, x_NE: Tensor) -> Tensor:
        return self.backend.rms_norm(x_NE, self.weight, self.eps, self.offset)

    def after_adding(self, x_NE: Tensor, residual_NE: Tensor) -> Tensor:
        """Add x to the residual in place; return the norm of the sum."""
        return self.backend.add_rms_norm(x_NE, residual_NE, self.weight, self.eps, self.offset)
