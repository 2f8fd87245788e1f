"""Token embedding, and logits from the matrix that may be the same one.

T tokens · N sampled rows · E hidden size · V vocabulary
"""

from __future__ import annotations

import torch
from batchinfer_kernels.formats import BlockMatrix, PackedMatrix, Precision, keeps_numbers
from torch import Tensor

from batchinfer.layers.linear import Linear
from batchinfer.ops.backend import Backend


class Embedding(Linear):
    """Rows of the matrix times `multiplier`, which is rounded to the dtype of activations first, as Gemma was trained.

    `tied`: the matrix is the LM head as well, so it is packed to be multiplied with.
    """

    def __init__(
        self, backend: Backend, vocab_size: int, hidden_size: int, multiplier: float = 1.0, tied: bool = True
    ) -> None:
        super().__init__(backend, hidden_size, vocab_size)
        self.multiplier = multiplier
        self.tied = tied

    def _pack(self, weight_OI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        self.multiplier = torch.tensor(self.multiplier, dtype=weight_OI.dtype).item()
        if self.tied or not keeps_numbers(weight_OI.dtype, precision):
            return self.backend.pack(weight_OI, precision)
        return self.backend.pack_rows(weight_OI)

    def forward(self, tokens_T: Tensor) -> Tensor:
        x_TE = self.backend.packed_rows(self.matrix, tokens_T)
        return x_TE if self.multiplier == 1.0 else x_TE.mul_(self.multiplier)


def logits(hidden_NE: Tensor, head: Linear, divisor: float, soft_cap: float | None) -> Tensor:
    """Return float32 [N, V], divided by `divisor`, then soft_cap * tanh(logit / soft_cap)."""
    logits_NV = head.backend.linear(hidden_NE, head.matrix, None).float()
    if divisor != 1.0:
        logits_NV.div_(divisor)
    if soft_cap is not None:
        logits_NV.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits_NV
