"""GGUF matrices of types Q4_0, Q4_1 and Q8_0 as BlockMatrix, without dequantising.

O output features
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from batchinfer_kernels.formats import BLOCK, BlockMatrix
from gguf import GGMLQuantizationType as GGMLType

TYPES = {GGMLType.Q4_0: (4, False), GGMLType.Q4_1: (4, True), GGMLType.Q8_0: (8, False)}  # bits, with minima
_CHUNK_BLOCKS = 1 << 14  # that stay in the cache while their values are spread


def block_matrix(rows: np.ndarray, ggml_type: GGMLType) -> BlockMatrix | None:
    """Return a copy of rows, uint8 [O, bytes of a row]. None if a scale is not finite, as in a damaged file."""
    made = decode_blocks(torch.from_numpy(np.ascontiguousarray(rows)), ggml_type)
    parts = (made.scales_OG,) if made.mins_OG is None else (made.scales_OG, made.mins_OG)
    return made if all(bool(part.isfinite().all()) for part in parts) else None


def zero_matrix(rows: int, like: BlockMatrix) -> BlockMatrix:
    """Return rows of zeros of the kind and width of `like`."""
    parts = like.values_OI, like.scales_OG, like.mins_OG
    values, scales, mins = (None if part is None else part.new_zeros(rows, part.shape[1]) for part in parts)
    assert values is not None and scales is not None
    return BlockMatrix(values, scales, mins, like.bits)


def decode_blocks(rows: torch.Tensor, ggml_type: GGMLType) -> BlockMatrix:
    """Return a copy of rows, uint8 [O, bytes of a row], whatever the scales are."""
    bits, with_mins = TYPES[ggml_type]
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    assert block == BLOCK
    blocks = rows.view(-1, block_bytes)
    shape = (len(rows), len(blocks) // len(rows))
    scales, mins = _halves(blocks, 0).view(shape), _halves(blocks, 2).view(shape) if with_mins else None
    data = blocks[:, 4 if with_mins else 2 :]
    values = data.view(torch.int8).contiguous() if bits == 8 else _spread(data, 0 if with_mins else 8)
    return BlockMatrix(values.view(shape[0], shape[1] * block), scales, mins, bits)


def _halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    return blocks[:, at : at + 2].view(torch.float16).contiguous()


def _spread(data: torch.Tensor, zero: int) -> torch.Tensor:
    """Spread bytes to 4-bit values: low halves are values 0 to 15 of a block, high halves 16 to 31."""
    out = torch.empty(len(data), BLOCK, dtype=torch.int8)
    for part, part_data in zip(torch.split(out, _CHUNK_BLOCKS), torch.split(data, _CHUNK_BLOCKS), strict=True):
        part[:, :16] = part_data & 15
        part[:, 16:] = part_data >> 4
        if zero:
            part.sub_(zero)
    return out
