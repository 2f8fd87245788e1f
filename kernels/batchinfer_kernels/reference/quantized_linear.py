"""Linear layers in 8 bits: weights per output feature, activations per row as they come, both symmetric.

As LLM.int8() (Dettmers et al., 2022) does without its outliers. N rows · I input features · O output features
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 127  # of either sign
_NOTHING = 1e-30  # rows that are smaller are zero; their reciprocal would not be finite


class QuantizedMatrix(NamedTuple):
    """values * scales, by row."""

    values_OI: Tensor  # int8, -127 .. 127
    scales_O: Tensor  # float32


def quantize(weight_OI: Tensor) -> QuantizedMatrix:
    """To the nearest of 255 values between the largest weight of each row and its negative."""
    weight_OI = weight_OI.float()
    scales_O = weight_OI.abs().amax(1) * (1 / STEPS)
    divisors_O = scales_O.clamp(min=_NOTHING)
    values_OI = (weight_OI / divisors_O[:, None]).round_().clamp_(-STEPS, STEPS).to(torch.int8)
    return QuantizedMatrix(values_OI, scales_O)


def quantized_linear(x_NI: Tensor, matrix: QuantizedMatrix, bias_O: Tensor | None) -> Tensor:
    """The sums are exact integers; the rest is float32. Rows with NaN or infinity come out not finite."""
    wide_NI = x_NI.float()
    largest_N1 = wide_NI.abs().amax(1, keepdim=True)
    known_N1 = (largest_N1 > _NOTHING) & largest_N1.isfinite()
    steps_NI = (wide_NI * torch.where(known_N1, STEPS / largest_N1, 0.0)).round_()
    sums_NO = (steps_NI.double() @ matrix.values_OI.double().T).float()
    out_NO = sums_NO * (matrix.scales_O * (largest_N1 * (1 / STEPS)))
    return (out_NO if bias_O is None else out_NO + bias_O).to(x_NI.dtype)
