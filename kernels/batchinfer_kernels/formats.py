"""Forms of weights that every backend knows, as values without a device or a backend."""

from __future__ import annotations

from enum import StrEnum

import torch


class Precision(StrEnum):
    """Number format that a weight matrix is held in and multiplied with. Values are the names that job files use.

    A matrix comes in the dtype of the activations. If that is its precision too, its numbers stay as they are: a
    backend may hold them in fewer bytes only where no bit is lost (the float32 form of a bfloat16 checkpoint).
    Otherwise they are rounded once, when the matrix is packed:

    - BFLOAT16: weights to bfloat16, activations as they come; products are summed in float32.
    - INT8: weights to 8 bits, symmetric, one float32 scale per output feature; activations as they come to 8 bits,
      symmetric, one scale per row and group of 64 input features; a group's products are summed exactly.
    - FLOAT32 and FLOAT16 only exist for activations of the same dtype; packing raises ValueError for others.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"

    @property
    def dtype(self) -> torch.dtype:
        """Return torch's dtype of the same name."""
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


def keeps_numbers(held: torch.dtype, precision: Precision) -> bool:
    """Return True if a matrix held in `held` has `precision` already, False if it is to be rounded.

    Raises ValueError for a precision that nothing rounds to.
    """
    if held == precision.dtype:
        return True
    if precision in (Precision.BFLOAT16, Precision.INT8):
        return False
    raise ValueError(f"a {str(held).removeprefix('torch.')} matrix is not rounded to {precision}")
