"""Forms of weights and facts of layers that every backend knows, as values without a backend.

O, I output and input features · G = I / BLOCK blocks of a row · E hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Activation = Literal["silu", "gelu"]


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


BLOCK = 32  # input features that share a scale and a minimum


class PackedMatrix(Protocol):
    """Matrix [O, I] in the form of the backend that packed it. Only that backend multiplies with it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int:
        """Return the bytes that a product reads: values, scales and padding."""

    @property
    def precision(self) -> Precision: ...


@dataclass(frozen=True, slots=True)
class ValuesMatrix:
    """Base of matrices that are held as rows of values, for any backend to read."""

    values_OI: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values_OI.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        return self.values_OI.nbytes


@dataclass(frozen=True, slots=True)
class BlockMatrix(ValuesMatrix):
    """Weights in 4 or 8 bits as GGUF files hold them: values * scales + mins per block, exactly, in float32.

    values_OI: int8, -128 .. 127; in 4 bits 0 .. 15 with minima, -8 .. 7 without.
    """

    scales_OG: Tensor  # float16, finite
    mins_OG: Tensor | None  # float16, finite
    bits: int  # 4 or 8

    @property
    def nbytes(self) -> int:
        """Return the bytes of values, scales and minima."""
        return sum(x.nbytes for x in (self.values_OI, self.scales_OG, self.mins_OG) if x is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that holds the matrix's numbers exactly."""
        return torch.float32

    def __getitem__(self, rows_O: Tensor) -> BlockMatrix:
        mins = None if self.mins_OG is None else self.mins_OG[rows_O]
        return BlockMatrix(self.values_OI[rows_O], self.scales_OG[rows_O], mins, self.bits)

    def float(self) -> Tensor:
        """Return float32 [O, I]."""
        rows, columns = self.shape
        out_OGB = self.values_OI.float().view(rows, columns // BLOCK, BLOCK).mul_(self.scales_OG.float()[:, :, None])
        if self.mins_OG is not None:
            out_OGB.add_(self.mins_OG.float()[:, :, None])
        return out_OGB.view(rows, columns)


def stacked_blocks(pieces: Sequence[BlockMatrix]) -> BlockMatrix | None:
    """Stack the rows of all pieces into one matrix. Return None if bits differ or only some have minima."""
    mins = [piece.mins_OG for piece in pieces if piece.mins_OG is not None]
    if len({piece.bits for piece in pieces}) > 1 or len(mins) not in (0, len(pieces)):
        return None
    if len(pieces) == 1:
        return pieces[0]
    values, scales = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("values_OI", "scales_OG"))
    return BlockMatrix(values, scales, torch.cat(mins) if mins else None, pieces[0].bits)


class NormFacts(NamedTuple):
    """Arguments of `rms_norm`."""

    weight_E: Tensor
    eps: float
    offset: float


class LinearWeights(NamedTuple):
    """Arguments of `linear`, or of `gated_linear` if there is an activation."""

    matrix: PackedMatrix
    bias_O: Tensor | None
    activation: Activation | None = None


class LayerFacts(NamedTuple):
    """One decoder layer. Norms stand before each branch, over queries and keys, and after each branch; None: absent."""

    attention_norm: NormFacts | None
    q_norm: NormFacts | None
    k_norm: NormFacts | None
    attention_post_norm: NormFacts | None
    mlp_norm: NormFacts | None
    mlp_post_norm: NormFacts | None
    qkv: LinearWeights
    out: LinearWeights
    gate_up: LinearWeights
    down: LinearWeights
    window: int | None
    rope: int | None  # index among the model's rotary embeddings


class DecoderFacts(NamedTuple):
    """All layers of a decoder. `scale` and `soft_cap` are those of attention scores."""

    layers: Sequence[LayerFacts]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    soft_cap: float | None
    residual_multiplier: float
