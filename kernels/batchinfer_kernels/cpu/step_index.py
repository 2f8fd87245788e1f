"""The eager index, in a form that C++ reads as well. T tokens · S sequences · X = S + 1 · B blocks per table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from batchinfer_kernels.eager.step_index import StepIndex


@dataclass(slots=True, kw_only=True)
class CPUStepIndex(StepIndex):
    """Serves the eager ops as well: they take what C++ does not know. All arrays are contiguous."""

    prompt_S: npt.NDArray[np.bool_]
    addresses: tuple[int, int, int, int]  # of tables_SB, query_starts_X, lengths_S and prompt_S


def step_index(
    slots_T: Tensor,
    block_tables_SB: Tensor,
    query_starts_X: npt.ArrayLike,
    lengths_S: npt.ArrayLike,
    kv_N2KBD: Tensor,
    prompt_S: npt.ArrayLike | None = None,
) -> CPUStepIndex:
    num_kv_heads, block_size, head_size = kv_N2KBD.shape[2:]
    tables_SB = np.ascontiguousarray(block_tables_SB.numpy(), dtype=np.int32)
    starts_X, ends_S = (np.ascontiguousarray(x, dtype=np.int64) for x in (query_starts_X, lengths_S))
    prompts_S = np.ascontiguousarray(np.diff(starts_X) > 1 if prompt_S is None else prompt_S, dtype=np.bool_)
    return CPUStepIndex(
        slots_T=slots_T.contiguous(),
        tables_SB=tables_SB,
        query_starts_X=starts_X,
        lengths_S=ends_S,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_size=head_size,
        device=slots_T.device,
        prompt_S=prompts_S,
        addresses=(tables_SB.ctypes.data, starts_X.ctypes.data, ends_S.ctypes.data, prompts_S.ctypes.data),
    )
