"""The stand-in for a backend on a GPU passes results, changes and aliases back, shown with a CPU as the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batchinfer_kernels.eager import EagerBackend

from tests.kernels.cases import ATTENTION, seeded
from tests.kernels.on_device import OnDevice
from tests.kernels.test_ops import Batch


class Recorder:
    """Backend of one op, which keeps what it was given."""

    given: tuple[Any, ...]

    def double(self, *tensors):
        self.given = tensors
        for tensor in tensors:
            tensor.mul_(2)
        return tensors[0], tensors[-1][:1], tensors[0] + 1


@pytest.mark.parametrize("name", ["mixed", "soft-cap-window", "block-size-7"])
def test_attention_equals_that_of_the_backend_itself(name):
    backend = EagerBackend(torch.device("cpu"))
    case = ATTENTION[name]
    plain, moved = Batch(case, torch.float32), Batch(case, torch.float32)
    expected = plain.write_and_attend(backend)
    assert torch.equal(moved.write_and_attend(OnDevice(backend, "cpu")), expected)
    assert torch.equal(moved.cache.nan_to_num(9.0), plain.cache.nan_to_num(9.0))


def test_changes_come_back_to_views_of_one_memory():
    whole = seeded(6, 8, seed=0)
    before = whole.clone()
    recorder = Recorder()
    first, last = whole[:2, 1::2], whole[3:, :4].t()
    result = OnDevice(recorder, "cpu").double(first, last)
    assert [tensor.stride() for tensor in recorder.given] == [first.stride(), last.stride()]
    assert recorder.given[0].untyped_storage().data_ptr() == recorder.given[1].untyped_storage().data_ptr()
    assert recorder.given[0].untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    expected = before.clone()
    expected[:2, 1::2] *= 2
    expected[3:, :4] *= 2
    assert torch.equal(whole, expected)
    assert result[0] is first
    assert result[1].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert torch.equal(result[1], last[:1])
    assert torch.equal(result[2], first + 1)
