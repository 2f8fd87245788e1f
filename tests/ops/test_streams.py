"""Uploads and downloads on the pretend device: values arrive, and memory that changes too early is noticed."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
import torch

from batchinfer.ops.pretend import PretendStreams
from batchinfer.ops.streams import UploadBuffer, UploadRing

HOST = torch.device("cpu")


@pytest.fixture
def streams() -> PretendStreams:
    return PretendStreams()


def test_placed_arrays_arrive_in_their_dtypes_and_shapes(streams):
    buffer = UploadBuffer(streams, HOST)
    arrays = [
        np.arange(5, dtype=np.int32),
        np.zeros((0, 3), dtype=np.float32),
        np.linspace(0, 1, 6).reshape(2, 3),
        np.array([7], dtype=np.uint8),
        np.arange(4, dtype=np.int64)[::2],
    ]
    placed = [buffer.place(one) for one in arrays]
    for array, tensor in zip(arrays, placed, strict=True):
        assert np.array_equal(tensor.numpy(), array) and tensor.numpy().dtype == array.dtype
        assert tensor.data_ptr() % 16 == 0


def test_a_buffer_grows_and_keeps_what_was_placed(streams):
    buffer = UploadBuffer(streams, HOST)
    arrays = [np.full(9000 * (1 + number), number, dtype=np.int32) for number in range(6)]
    placed = [buffer.place(one) for one in arrays]
    assert all(np.array_equal(tensor.numpy(), array) for array, tensor in zip(arrays, placed, strict=True))
    streams.synchronize()


def test_a_ring_reuses_buffers_of_steps_that_are_done(streams):
    ring = UploadRing(streams, HOST)
    first = ring.take()
    second = ring.take()
    assert first is not second
    first.place(np.arange(3))
    done = streams.download(torch.zeros(1))
    done.wait()
    ring.give_back(first)
    again = ring.take()
    assert again is first
    again.place(np.arange(3) + 1)
    streams.synchronize()


def test_a_buffer_given_back_too_early_is_noticed(streams):
    ring = UploadRing(streams, HOST)
    buffer = ring.take()
    buffer.place(np.arange(3))
    early = streams.download(torch.zeros(1))
    ring.give_back(buffer)
    ring.take().place(np.arange(3) + 1)
    with pytest.raises(AssertionError, match="written before its upload was done"):
        early.wait()


def test_a_download_has_the_values_of_its_time_and_retires_the_uploads_before_it(streams):
    buffer = UploadBuffer(streams, HOST)
    values = torch.arange(4)
    buffer.place(np.arange(3))
    first = streams.download(values)
    values += 1
    second = streams.download(values)
    buffer.place(np.arange(3))
    assert second.wait().tolist() == [1, 2, 3, 4]
    assert first.wait().tolist() == [0, 1, 2, 3]
    assert len(streams._uploads) == 1
    streams.synchronize()
    assert not streams._uploads


def test_the_clock_of_the_device(streams):
    """Work waits for work before it; a download is ready when the work before it is done."""
    start = perf_counter()
    streams.occupy(0.02)
    streams.occupy(0.02)
    download = streams.download(torch.zeros(1))
    assert perf_counter() - start < 0.02
    download.wait()
    assert perf_counter() - start >= 0.04
    streams.occupy(0.0)
    assert len(streams.gaps_s) == 2 and streams.gaps_s[0] == 0.0 and streams.gaps_s[1] > 0.0
