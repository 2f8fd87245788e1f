"""Copies of whole blocks within the KV cache, of all layers in one launch where their memory is one allocation.

C copies · L layers · N blocks · K KV heads · B slots per block · D head size · U units of 8 bytes, or of one number,
of a block
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer_kernels.contract import BlockNumbers
from batchinfer_kernels.triton.targets import AotCase, Target, config


def copy_blocks(caches: Sequence[Tensor], sources: BlockNumbers, targets: BlockNumbers) -> None:
    """Copy blocks of dense caches [N, 2, K, B, D]. A target may be a source too: all sources are read first.

    Raises IndexError for blocks that a cache does not have; numbers on the device are not checked.
    """
    if isinstance(sources, Tensor) or isinstance(targets, Tensor):
        device = caches[0].device
        from_C, to_C = torch.as_tensor(sources, device=device), torch.as_tensor(targets, device=device)
        overlap = True  # for all that the host knows
    else:
        _check_blocks(sources, targets, len(caches[0]))
        from_C, to_C = _upload([sources, targets], caches[0].device)
        overlap = not set(sources).isdisjoint(targets)
    for layers_LNU in _stacked(caches):
        if overlap:
            there_C = torch.arange(len(from_C), dtype=torch.int32, device=from_C.device)
            shape = (len(layers_LNU), len(from_C), layers_LNU.shape[2])
            read_LCU = torch.empty(shape, dtype=layers_LNU.dtype, device=layers_LNU.device)
            _copy(layers_LNU, from_C, read_LCU, there_C)
            _copy(read_LCU, there_C, layers_LNU, to_C)
        else:
            _copy(layers_LNU, from_C, layers_LNU, to_C)


def _check_blocks(sources: Sequence[int], targets: Sequence[int], blocks: int) -> None:
    lowest, highest = min(*sources, *targets), max(*sources, *targets)
    if lowest < 0 or highest >= blocks:
        raise IndexError(f"blocks {lowest} to {highest} of a cache of {blocks}")


def _upload(numbers: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Copy numbers to the device without waiting for it."""
    host = torch.tensor(numbers, dtype=torch.int32)
    return host if device.type == host.device.type else host.pin_memory().to(device, non_blocking=True)


def _stacked(caches: Sequence[Tensor]) -> list[Tensor]:
    """Return the caches as one tensor [L, N, U] if they are equal steps of one allocation, else as one for each."""
    first = caches[0]
    starts = [cache.data_ptr() for cache in caches]
    whole = all(place % 8 == 0 for place in (first[0].nbytes, *starts))
    unit = torch.int64 if whole else {1: torch.uint8, 2: torch.int16, 4: torch.int32}[first.element_size()]
    layers = [cache.view(1, len(cache), -1).view(unit) for cache in caches]
    steps = {after - before for before, after in pairwise(starts)}
    one_allocation = len({cache.untyped_storage().data_ptr() for cache in caches}) == 1
    if not one_allocation or len(steps) != 1 or min(steps) < first.nbytes:
        return layers
    step = steps.pop() // layers[0].element_size()
    return [layers[0].as_strided((len(caches), *layers[0].shape[1:]), (step, *layers[0].stride()[1:]))]


def _copy(from_LNU: Tensor, from_C: Tensor, to_LNU: Tensor, to_C: Tensor) -> None:
    layers, _, units = from_LNU.shape
    launch = config("copy_blocks", from_LNU.device)
    copy_blocks_kernel[len(from_C), layers, triton.cdiv(units, launch.block_n)](
        from_LNU,
        from_C.contiguous(),
        to_LNU,
        to_C.contiguous(),
        *from_LNU.stride()[:2],
        *to_LNU.stride()[:2],
        units,
        launch.block_n,
        **launch.options,
    )


@triton.jit
def copy_blocks_kernel(
    from_LNU: tl.tensor,
    from_C: tl.tensor,
    to_LNU: tl.tensor,
    to_C: tl.tensor,
    from_stride_L: tl.tensor,
    from_stride_N: tl.tensor,
    to_stride_L: tl.tensor,
    to_stride_N: tl.tensor,
    UNITS: tl.constexpr,
    BLOCK_U: tl.constexpr,
) -> None:
    """Copy BLOCK_U units of one block of one layer."""
    layer = tl.program_id(1).to(tl.int64)
    source = tl.load(from_C + tl.program_id(0)).to(tl.int64)
    target = tl.load(to_C + tl.program_id(0)).to(tl.int64)
    unit_U = tl.program_id(2) * BLOCK_U + tl.arange(0, BLOCK_U)
    units_U = tl.load(from_LNU + layer * from_stride_L + source * from_stride_N + unit_U, mask=unit_U < UNITS)
    tl.store(to_LNU + layer * to_stride_L + target * to_stride_N + unit_U, units_U, mask=unit_U < UNITS)


def aot_cases(target: Target) -> list[AotCase]:
    """Return copies of blocks of 64 KiB."""
    launch = config("copy_blocks", target)
    strides = ("from_stride_L", "from_stride_N", "to_stride_L", "to_stride_N")
    pointers = {"from_LNU": "*i64", "from_C": "*i32", "to_LNU": "*i64", "to_C": "*i32"}
    return [
        AotCase(
            name="copy_blocks",
            function=copy_blocks_kernel,
            signature={**pointers, **dict.fromkeys(strides, "i64")},
            constexprs={"UNITS": 8192, "BLOCK_U": launch.block_n},
            launch=launch,
            divisible=(*pointers, *strides),
        )
    ]
