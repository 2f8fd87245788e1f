"""Values of steps on a device for tests: seats with parameters, and rows that sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from batchinfer_kernels.steps import SampledRows, SampleRows, SeatState
from torch import Tensor


class Seat(NamedTuple):
    """Parameters of one sequence."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    key: int = 0  # unsigned
    prompt_tokens: int = 1
    last_token: int = 0
    blocks: tuple[int, ...] = ()


GREEDY = Seat(temperature=0.0)


def seat_state(seats: Sequence[Seat], table_width: int = 1) -> SeatState:
    """Return the state of these seats and of the dummy seat, which is last."""
    seats = [*seats, GREEDY]
    tables_PW = torch.full((len(seats), table_width), -7, dtype=torch.int32)
    for row_W, seat in zip(tables_PW, seats, strict=True):
        row_W[: len(seat.blocks)] = torch.tensor(seat.blocks, dtype=torch.int32)
    with np.errstate(divide="ignore"):
        log_min_p = np.log([seat.min_p for seat in seats])
    return SeatState(
        tables_PW,
        torch.tensor([seat.last_token for seat in seats], dtype=torch.int32),
        torch.tensor([seat.prompt_tokens for seat in seats], dtype=torch.int32),
        torch.from_numpy(np.array([seat.key for seat in seats], dtype=np.uint64).view(np.int64)),
        torch.tensor([seat.temperature for seat in seats], dtype=torch.float32),
        torch.tensor([seat.top_k for seat in seats], dtype=torch.int32),
        torch.from_numpy(log_min_p.astype(np.float32)),
        torch.tensor([seat.top_p for seat in seats], dtype=torch.float64),
    )


def ints(values: Sequence[int] | np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def sample_rows_of(seats: Sequence[int], positions: Sequence[int], targets: Sequence[int] | None = None) -> SampleRows:
    """Return rows that sample, in the step's order; without `targets` each becomes its own seat's last token."""
    return SampleRows(
        ints(np.arange(len(seats))), ints(seats), ints(positions), ints(seats if targets is None else targets)
    )


def sampled_rows(count: int) -> SampledRows:
    """Return memory for a result, filled with what no kernel writes."""
    return SampledRows(*torch.full((2, count), -9, dtype=torch.int32))
