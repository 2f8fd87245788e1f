"""Weights of 4 or 8 bits in blocks that share a scale, as in GGUF files. O, I features · G = I / 32 blocks of a row"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # input features that share a scale and a minimum


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """values * scales + mins, by block, in float32: the matrix is these numbers exactly."""

    values_OI: Tensor  # int8: -128 .. 127; of 4 bits 0 .. 15 with minima, -8 .. 7 without
    scales_OG: Tensor  # float16, finite
    mins_OG: Tensor | None  # the same
    bits: int  # 4 or 8

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values_OI.shape
        return rows, columns

    @property
    def device(self) -> torch.device:
        return self.values_OI.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that holds the matrix's numbers exactly."""
        return torch.float32

    @property
    def is_cpu(self) -> bool:
        return self.values_OI.is_cpu

    def __getitem__(self, rows_O: Tensor) -> BlockMatrix:
        mins = None if self.mins_OG is None else self.mins_OG[rows_O]
        return BlockMatrix(self.values_OI[rows_O], self.scales_OG[rows_O], mins, self.bits)

    def float(self) -> Tensor:
        """float32 [O, I]."""
        rows, columns = self.shape
        out_OGB = self.values_OI.float().view(rows, columns // BLOCK, BLOCK).mul_(self.scales_OG.float()[:, :, None])
        if self.mins_OG is not None:
            out_OGB.add_(self.mins_OG.float()[:, :, None])
        return out_OGB.view(rows, columns)


def stacked_blocks(parts: Sequence[BlockMatrix]) -> BlockMatrix | None:
    """One matrix of the rows of all; None where they are not of one kind."""
    mins = [part.mins_OG for part in parts if part.mins_OG is not None]
    if len({part.bits for part in parts}) > 1 or len(mins) not in (0, len(parts)):
        return None
    if len(parts) == 1:
        return parts[0]
    values, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("values_OI", "scales_OG"))
    return BlockMatrix(values, scales, torch.cat(mins) if mins else None, parts[0].bits)
