"""Linear layers in 8 bits: weights scaled per output feature, activations per row and group of features as they come.

Both are symmetric. A scale for each group keeps an outlier among the activations (LLM.int8(), Dettmers et al., 2022)
from rounding all others away. N rows · I input features · O output features · G groups
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer_kernels.formats import BlockMatrix, Precision, ValuesMatrix

STEPS = 127  # of either sign
GROUP = 64  # input features that share a scale
_NOTHING = 1e-30  # smaller inputs count as zero: their reciprocal would not be finite


@dataclass(frozen=True, slots=True)
class QuantizedMatrix(ValuesMatrix):
    """Weights in 8 bits: values * scales, by row.

    values_OI: int8, -127 .. 127.
    """

    scales_O: Tensor  # float32

    @property
    def nbytes(self) -> int:
        return self.values_OI.nbytes + self.scales_O.nbytes

    @property
    def precision(self) -> Precision:
        return Precision.INT8


def pack_quantized(weight_OI: Tensor | BlockMatrix) -> QuantizedMatrix:
    """Round to the nearest of 255 values between the largest weight of each row and its negative."""
    weights_OI = weight_OI.float()
    scales_O = weights_OI.abs().amax(1) * (1 / STEPS)
    divisors_O = scales_O.clamp(min=_NOTHING)
    values_OI = (weights_OI / divisors_O[:, None]).round_().clamp_(-STEPS, STEPS).to(torch.int8)
    return QuantizedMatrix(values_OI, scales_O)


def quantized_linear(x_NI: Tensor, matrix: QuantizedMatrix, bias_O: Tensor | None) -> Tensor:
    """Return x Wᵀ + b. A group's sums are exact integers, the rest float32. Rows with NaN or infinity stay so."""
    x_NGI, values_OGI = (_in_groups(rows) for rows in (x_NI.float(), matrix.values_OI))
    largest_NG = x_NGI.abs().amax(2)
    known_NG = (largest_NG > _NOTHING) & largest_NG.isfinite()
    factors_NG = torch.where(
        known_NG, torch.full_like(largest_NG, STEPS) / largest_NG, 0.0
    )  # 127 / x is not a division
    steps_NGI = (x_NGI * factors_NG[:, :, None]).round_()
    sums_NGO = torch.einsum("ngi,ogi->ngo", steps_NGI.double(), values_OGI.double()).float()
    out_NO = (sums_NGO * (largest_NG * (1 / STEPS))[:, :, None]).sum(1) * matrix.scales_O
    return (out_NO if bias_O is None else out_NO + bias_O).to(x_NI.dtype)


def _in_groups(rows_NI: Tensor) -> Tensor:
    padded = F.pad(rows_NI, (0, -rows_NI.shape[1] % GROUP))
    return padded.view(len(padded), padded.shape[1] // GROUP, GROUP)
