"""Where packed weights lie (cpu/memory.py)."""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels.cpu.memory import empty


def test_tensors_lie_side_by_side_and_never_overlap():
    tensors = [empty((n, 3), dtype) for n in (1, 5, 1000) for dtype in (torch.float32, torch.bfloat16, torch.int8)]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
    for i, tensor in enumerate(tensors):
        assert tensor.shape[1] == 3 and tensor.data_ptr() % 64 == 0
        assert (tensor == i).all()


def test_a_tensor_outlives_its_neighbours_and_may_be_larger_than_a_chunk():
    first, large = empty((64,), torch.float32), empty((70 << 20,), torch.int8)
    first.fill_(7)
    large[-1] = 1
    del large
    assert (first == 7).all()


def test_nothing_takes_no_memory():
    assert empty((0, 8), torch.float32).shape == (0, 8)


def test_want_of_memory_names_the_bytes():
    with pytest.raises(MemoryError, match="bytes"):
        empty((1 << 60,), torch.int8)
