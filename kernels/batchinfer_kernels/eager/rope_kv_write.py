"""Rotary embedding of queries and keys, and the write of keys and values into the cache.

T tokens, H query heads, K kv heads, D head size, R rotated pairs of a head, N blocks, B slots per block
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer_kernels.eager.step_index import EagerStepIndex


def rope_kv_write(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    kv_N2KBD: Tensor,
    index: EagerStepIndex,
) -> None:
    if cos_sin is not None:
        _turn(q_THD, *cos_sin)
        _turn(k_TKD, *cos_sin)
    blocks_T, offsets_T = index.places_T
    for number, new_TKD in enumerate((k_TKD, v_TKD)):
        kv_N2KBD[blocks_T, number, :, offsets_T] = _stored(new_TKD, kv_N2KBD.dtype)


def _stored(x_TKD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return keys or values in the cache's dtype. float8_e4m3fn saturates, as on GPUs; NaN stays NaN."""
    if dtype == torch.float8_e4m3fn:
        largest = torch.finfo(dtype).max
        x_TKD = x_TKD.clamp(-largest, largest)
    return x_TKD.to(dtype)


def _turn(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    """Apply rotary position embedding (Su et al. 2021) in place, to half-split pairs."""
    pairs = cos_TR.shape[-1]
    wide = torch.promote_types(x_THD.dtype, cos_TR.dtype)
    first_THR, second_THR = x_THD[..., :pairs], x_THD[..., pairs : 2 * pairs]
    first, second = first_THR.to(wide), second_THR.to(wide)
    cos_T1R, sin_T1R = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    turned = torch.mul(first, cos_T1R).sub_(second * sin_T1R)
    second_THR.copy_(torch.mul(second, cos_T1R).add_(first * sin_T1R))
    first_THR.copy_(turned)
