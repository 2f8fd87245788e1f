"""Staging: every row arrives, a buffer is filled only after its copy, and while the copy from the other goes on."""

from __future__ import annotations

import pytest
import torch

from batchinfer.ops.pretend import PretendStreams
from batchinfer.ops.resources import HOST
from batchinfer.ops.staging import HostWrites, StagingRing, make_staging


class LateStreams(PretendStreams):
    """Streams that copy as late as they may: when a download that came after the copy is waited for."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.copies = []
        self.pinned_bytes = []

    def pinned(self, num_bytes):
        self.pinned_bytes.append(num_bytes)
        return super().pinned(num_bytes)

    def upload(self, source, target):
        self.events.append("upload")
        self.copies.append((source, target))

    def download(self, source):
        return LateDownload(self, len(self.copies))

    def finish_copies(self, count):
        for source, target in self.copies[:count]:
            target.copy_(source)
        self.copies[:count] = [(torch.empty(0), torch.empty(0))] * count


class LateDownload:
    def __init__(self, streams, count):
        self.streams = streams
        self.count = count

    def wait(self):
        self.streams.events.append("wait")
        self.streams.finish_copies(self.count)


def _write(ring, streams, values_NC):
    target_NC = torch.full(values_NC.shape, -1, dtype=values_NC.dtype)

    def fill(rows, out):
        assert out.is_contiguous() and out.dtype == values_NC.dtype and len(out) == len(rows)
        streams.events.append("fill")
        out.copy_(values_NC[rows.start : rows.stop])

    ring.write(target_NC, fill)
    return target_NC


@pytest.mark.parametrize("buffer_bytes", [1, 40, 64, 1000, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_arrive_whatever_the_buffers_hold(buffer_bytes, dtype):
    streams = LateStreams()
    ring = StagingRing(streams, HOST, buffer_bytes)
    tensors = [torch.randn(shape).to(dtype) for shape in ((23, 5), (0, 5), (1, 17), (40, 2))]
    written = [_write(ring, streams, values_NC) for values_NC in tensors]
    streams.finish_copies(len(streams.copies))
    for values_NC, target_NC in zip(tensors, written, strict=True):
        assert torch.equal(values_NC, target_NC)


def test_one_buffer_is_filled_while_the_other_is_copied():
    streams = LateStreams()
    ring = StagingRing(streams, HOST, 64)
    _write(ring, streams, torch.randn(5, 16))
    assert streams.events[:4] == ["fill", "upload"] * 2
    assert streams.events[4:] == ["wait", "fill", "upload"] * 3
    assert streams.pinned_bytes == [64, 64]
    _write(ring, streams, torch.randn(2, 40))
    assert streams.pinned_bytes == [64, 64, 160, 160]


def test_tensors_on_the_host_are_filled_where_they_lie():
    target_NC = torch.zeros(3, 2)
    filled = []
    make_staging(HOST).write(target_NC, lambda rows, out: filled.append((rows, out.data_ptr())))
    assert filled == [(range(3), target_NC.data_ptr())]
    assert isinstance(make_staging(HOST), HostWrites)
