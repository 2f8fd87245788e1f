"""Root-mean-square norm (Zhang and Sennrich 2019), alone and after the residual addition. E features, N rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_NE: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
    wide = torch.promote_types(x_NE.dtype, torch.float32)
    scale_E = weight_E.to(wide)
    if offset:
        scale_E = scale_E + offset
    return F.rms_norm(x_NE.to(wide), (x_NE.shape[-1],), scale_E, eps).to(x_NE.dtype)


def add_rms_norm(x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
    return rms_norm(residual_NE.add_(x_NE), weight_E, eps, offset)
