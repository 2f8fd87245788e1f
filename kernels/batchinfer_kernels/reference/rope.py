"""Rotary position embedding (Su et al. 2021), half-split pairs. T tokens, H heads, D head size, R rotated pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    pairs = cos_TR.shape[-1]
    wide = torch.promote_types(x_THD.dtype, cos_TR.dtype)
    first_THR, second_THR = x_THD[..., :pairs], x_THD[..., pairs : 2 * pairs]
    first, second = first_THR.to(wide), second_THR.to(wide)
    cos_T1R, sin_T1R = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    turned = torch.mul(first, cos_T1R).sub_(second * sin_T1R)
    second_THR.copy_(torch.mul(second, cos_T1R).add_(first * sin_T1R))
    first_THR.copy_(turned)
