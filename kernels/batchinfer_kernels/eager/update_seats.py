"""Changes of the state by seat: appended blocks and joining sequences.

Letters: see batchinfer_kernels.steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer_kernels.steps import SeatState, SeatUpdates

_LOW = 0xFFFF_FFFF


def update_seats(updates: SeatUpdates, state: SeatState) -> None:
    """Write appended blocks and joining sequences into the state."""
    seats_U, index_U, blocks_U = updates.blocks_U3.unbind(1)
    state.block_tables_PW.index_put_((seats_U.long(), index_U.long()), blocks_U)
    words_12J = updates.joins_J12.t().contiguous()
    seats_J = words_12J[0].long()
    state.prompt_tokens_P[seats_J] = words_12J[1]
    state.keys_P[seats_J] = _joined(words_12J[2], words_12J[3])
    state.temperature_P[seats_J] = words_12J[4].view(torch.float32)
    state.top_k_P[seats_J] = words_12J[5]
    state.log_min_p_P[seats_J] = words_12J[6].view(torch.float32)
    state.top_p_P[seats_J] = _joined(words_12J[7], words_12J[8]).view(torch.float64)


def _joined(low_J: Tensor, high_J: Tensor) -> Tensor:
    """Return the int64 whose halves are two int32 words."""
    return (low_J.long() & _LOW) | (high_J.long() << 32)
