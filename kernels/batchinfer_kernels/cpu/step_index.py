"""The reference's index, and the same facts as arrays that C++ reads. T tokens · S sequences · B blocks per table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from batchinfer_kernels import reference
from batchinfer_kernels.reference.step_index import StepIndex


@dataclass(slots=True, kw_only=True)
class CPUStepIndex(StepIndex):
    """Serves the reference's ops as well: they take what C++ does not know."""

    slots_T: Tensor  # int64, contiguous
    int32_tables_SB: npt.NDArray[np.int32]  # contiguous
    addresses: tuple[int, int, int]  # of int32_tables_SB, query_starts_X and lengths_S


def step_index(
    slots_T: Tensor, block_tables_SB: Tensor, query_starts: list[int], lengths: list[int], kv_N2KBD: Tensor
) -> CPUStepIndex:
    made = reference.step_index(slots_T, block_tables_SB, query_starts, lengths, kv_N2KBD)
    tables_SB = np.ascontiguousarray(block_tables_SB.numpy(), dtype=np.int32)
    return CPUStepIndex(
        write_T=made.write_T,
        tables_SB=made.tables_SB,
        query_starts_X=made.query_starts_X,
        lengths_S=made.lengths_S,
        num_kv_heads=made.num_kv_heads,
        block_size=made.block_size,
        head_size=made.head_size,
        device=made.device,
        slots_T=slots_T.contiguous(),
        int32_tables_SB=tables_SB,
        addresses=(tables_SB.ctypes.data, made.query_starts_X.ctypes.data, made.lengths_S.ctypes.data),
    )
