"""Tests of compressed files with any number of members and frames, padding or trailing data; and of pipes."""

import gzip
import os
import struct

import pytest
import zstandard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError, UsageError
from batchinfer.io.source import Sources
from tests.io.reading import LOCAL, read_all, scan_all

CODECS = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}
SKIPPED = struct.pack("<II", 0x184D2A53, 300) + b"\x1f\x8b" * 150


def lines(first, count):
    return b"".join(b'{"x": %d}\n' % number for number in range(first, first + count))


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(list(CODECS)),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    gaps=st.lists(st.integers(0, 700), min_size=5, max_size=5),
    feed=st.integers(1, 50),
)
def test_members_frames_and_padding_are_read_through(tmp_path, kind, counts, gaps, feed):
    """Empty members, zeros after gzip members and skippable zstd frames anywhere are skipped."""
    data, total = b"", 0
    for count, gap in zip(counts, gaps, strict=False):
        data += SKIPPED if kind == "zstd" and gap % 2 else b""
        data += CODECS[kind](lines(total, count))
        data += bytes(gap) if kind == "gzip" else b""
        total += count
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batchinfer.io.packed._FEED_BYTES", feed)
        assert [row["x"] for row in read_all(scan_all(path))[0]] == list(range(total))


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("rest", [b"x", b"{}", b"more\n", b"\x00\x01", b"\x28\xb5\x2f", b"\x1f\x8b\x08"])
def test_data_after_the_compressed_part_is_an_error(tmp_path, kind, rest):
    packed = CODECS[kind](lines(0, 3))
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed + rest)
    own = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f"}[kind]
    said = (
        "the file is truncated" if rest == own else rf"{kind} data ends at byte {len(packed)}, and other data follows"
    )
    with pytest.raises(InputError, match=said):
        scan_all(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(list(CODECS)), cut=st.integers(4, 10_000))
def test_truncated_file_is_an_error(tmp_path, kind, cut):
    packed = CODECS[kind](lines(0, 30)) + CODECS[kind](lines(30, 30))
    first = len(CODECS[kind](lines(0, 30)))
    cut %= len(packed)
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed[: max(cut, 4)])
    assume(cut != first)  # a whole member
    with pytest.raises(InputError, match="truncated"):
        scan_all(path)


def test_pipe_is_refused_before_reading(tmp_path):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    reader, writer = os.pipe()
    try:
        for path in (pipe, f"{tmp_path}/*.jsonl", tmp_path, f"/dev/fd/{reader}", "/dev/null", "-"):
            for form in ("jsonl", None):
                with pytest.raises(UsageError, match=r"can be read only once.*write the rows to a file"):
                    scan_all(path, format=form)
        with pytest.raises(UsageError, match="only once"):
            Sources(LOCAL).open(str(pipe))
    finally:
        os.close(reader)
        os.close(writer)


def test_file_named_dash_is_read(tmp_path, monkeypatch):
    (tmp_path / "-").write_bytes(lines(0, 2))
    monkeypatch.chdir(tmp_path)
    assert len(read_all(scan_all("-", format="jsonl"))[0]) == 2
