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


def rms_norm_quantized(
    x_NE: Tensor, residual_NE: Tensor | None, weight_E: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the norm in float8_e4m3fn or int8, [N, E], and each row's scale, float32 [N]: values * scale is the norm.

    A row's largest number becomes ±448 or ±127. A residual changes as in `add_rms_norm`.
    """
    total_NE = x_NE if residual_NE is None else residual_NE.add_(x_NE)
    y_NE = rms_norm(total_NE.float(), weight_E, eps, offset)
    largest = float(torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max)
    peak_N = y_NE.abs().amax(-1)
    y_NE *= (largest / peak_N.clamp(min=1e-30))[:, None]
    values_NE = y_NE.round_() if dtype == torch.int8 else y_NE.clamp_(-largest, largest)
    return values_NE.to(dtype), peak_N / largest
