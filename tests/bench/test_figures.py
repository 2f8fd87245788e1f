"""Times, columns, the description of the machine and the JSON file: what every benchmark is made of."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch

from batchinfer.bench import machine, session
from batchinfer.bench.json_file import json_file
from batchinfer.bench.machine import Bandwidth, Machine, describe, look_at, size
from batchinfer.bench.session import OtherLoad, Session
from batchinfer.bench.table import facts, number, table
from batchinfer.bench.timing import percentile, time_in_turn
from batchinfer.errors import UsageError


def test_percentile_is_linear_between_neighbours():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    assert percentile([7.0], 0.99) == 7.0
    assert percentile(range(101), 1.0) == 100


def test_works_take_turns():
    calls: list[str] = []
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = time_in_turn(works, budget_s=0.0)
    assert timings["a"].samples == timings["b"].samples == 5
    assert "".join(calls) == "ab" + "aabb" * 5
    assert all(0 <= timing.min_s <= timing.median_s for timing in timings.values())
    calls.clear()
    timings = time_in_turn(works, budget_s=0.0, least=2, uncounted=3)
    assert timings["a"].samples == timings["b"].samples == 10
    assert "".join(calls) == "ab" + ("a" * 5 + "b" * 5) * 5


def test_samples_continue_until_the_budget_is_spent():
    assert time_in_turn({"a": lambda: None}, budget_s=0.0)["a"].samples == 5
    works = {"a": lambda: time.sleep(0.001), "b": lambda: time.sleep(0.1)}
    began = time.perf_counter()
    timings = time_in_turn(works, budget_s=0.2)
    assert timings["b"].samples == 5 < timings["a"].samples <= 100
    assert time.perf_counter() - began - 11 * 0.1 >= 0.1  # b's calls; a's share of the budget


def test_table_columns_are_aligned():
    assert table(("op", "ms"), [("rope", "1"), ("x", "1,000")]) == "op       ms\nrope      1\nx     1,000"
    assert facts([("a", "one"), ("long", "two"), ("", "three")]) == "a     one\nlong  two\n      three"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (1234.5, "1,234"),
        (-2.5, "-2.50"),
    ],
)
def test_number_has_three_significant_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("count", "text"), [(100, "100 B"), (48 << 10, "48.0 KiB"), (3 << 30, "3.00 GiB")])
def test_size_has_a_unit(count, text):
    assert size(count) == text


def test_machine_description_has_its_measurements(quick_machine):
    found = look_at()
    assert found.gemm_per_s > 0 and found.read_bytes_per_s > 0 and found.copy_bytes_per_s > 0
    assert found.threads == torch.get_num_threads() and found.dtype == "float32"
    assert found.buffer_bytes == 1 << 16 and found.torch == torch.__version__
    text = describe(found)
    assert found.cpu in text and "GFLOP/s in float32" in text and "64.0 KiB" in text
    assert json.loads(json.dumps(found.as_json()))["threads"] == found.threads


def make_machine(**changes) -> Machine:
    values: dict = dict.fromkeys(("cpu", "kernels", "torch", "batchinfer", "date"), "x")
    values |= {"cores": 4, "threads": 2, "dtype": "float32", "buffer_bytes": 1 << 20, "caches": {}, "load_average": 0.0}
    values |= {"gemm_per_s": 1e9, "read_bytes_per_s": 1e8, "copy_bytes_per_s": 1e8}
    return Machine(**(values | changes))


def test_a_busy_machine_is_noted():
    assert make_machine(load_average=1.0).notes == [] == make_machine(load_average=None).notes
    busy = make_machine(load_average=1.01)
    assert "load average 1.01 on 4 cores" in busy.notes[0] and f"note: {busy.notes[0]}" in describe(busy)


@pytest.mark.parametrize("why", [None, "the C++ avx2 kernels have no VNNI instructions"])
def test_int8_is_said_to_be_no_faster_if_the_backend_says_so(monkeypatch, why):
    backend = SimpleNamespace(capabilities=SimpleNamespace(slow_int8=why))
    monkeypatch.setattr(machine, "available_backends", lambda: [backend])
    said = "no faster than float32: the C++ avx2 kernels have no VNNI instructions" in describe(make_machine())
    assert said == (why is not None)


def test_speed_change_during_the_session_is_noted(monkeypatch):
    monkeypatch.setattr(session, "look_at", lambda dtype, int8: make_machine(load_average=4.0))
    for rate, cores, count in ((1.05e9, 0.1, 0), (2e9, 0.1, 1), (1e9, 0.2, 1), (0.5e9, None, 1), (2e9, 2.0, 2)):
        monkeypatch.setattr(session, "gemm_rate", lambda dtype, rate=rate: rate)
        one = Session()
        monkeypatch.setattr(one._others, "cores", lambda cores=cores: cores)
        values, notes = one.end()
        assert len(notes) == count and values["notes"] == [*one.machine.notes, *notes]
        assert (values["gemm_per_s_after"], values["other_cores"]) == (rate, cores)
    assert "2.0 cores busy" in notes[0] and "1 GFLOP/s before, 2 after" in notes[1]


def test_other_load_excludes_this_process(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    tick = os.sysconf("SC_CLK_TCK")
    now, used = [10.0], [1.0]
    monkeypatch.setattr(session, "perf_counter", lambda: now[0])
    monkeypatch.setattr(os, "times", lambda: SimpleNamespace(user=used[0], system=0.5))
    stat.write_text(f"cpu  {2 * tick} 0 {tick} 999 999 0 0 0 7 7\ncpu0 1 1\n")
    load = OtherLoad(stat)
    now[0], used[0] = 14.0, 4.0
    stat.write_text(f"cpu  {5 * tick} {tick} {2 * tick} 9999 9999 0 {tick} {2 * tick} 70 70\n")
    assert load.cores() == pytest.approx((8 - 3) / 4)
    assert OtherLoad(tmp_path / "nothing").cores() is None


def test_small_weights_are_read_at_cache_speed(monkeypatch):
    monkeypatch.setattr(machine, "_rates", lambda size: (5.0, 6.0))
    found = make_machine(read_bytes_per_s=2.0)
    assert machine.weight_bandwidth(found, 1 << 20) == 2.0
    assert machine.weight_bandwidth(found, (1 << 20) - 1) == 6.0


def test_instruction_caches_are_excluded(tmp_path):
    levels = {"index0": ("1", "Data", "48K"), "index1": ("1", "Instruction", "32K"), "index2": ("3", "Unified", "2M")}
    for name, values in levels.items():
        (tmp_path / name).mkdir()
        for file, value in zip(("level", "type", "size"), values, strict=True):
            (tmp_path / name / file).write_text(value + "\n")
    (tmp_path / "index3").mkdir()  # tells nothing
    assert machine._caches(tmp_path) == {"L1": 48 << 10, "L3": 2 << 20}


def test_bandwidth_is_measured_once_for_sizes_of_one_kind(quick_machine, monkeypatch):
    measured: list[int] = []
    monkeypatch.setattr(machine, "_rates", lambda size: measured.append(size) or (1.0, 2.0))
    bandwidth = Bandwidth()
    assert [bandwidth.of(wanted) for wanted in (5000, 5120, 8192, 8193, 1, 1 << 40)] == [2.0] * 6
    assert measured == [5120, 8192, 10240, 4096, 1 << 16]


def test_readings_read_the_whole_next_buffer(quick_machine, monkeypatch):
    made = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape: made.append(ones(*shape)) or made[-1])
    ways, read_bytes = machine.readings(10_000, turns=3)
    data = made[0]
    assert read_bytes == 12288 == 4 * data[0].numel() and len(data) == 3
    data *= torch.tensor([[1.0], [2.0], [3.0]])
    assert [float(ways["sum"]()) for _ in range(4)] == [3072, 6144, 9216, 3072]
    assert float(ways["dot"]()) == 1536
    assert ways["matrix times vector"]().tolist() == [[1024.0] * 3]
    least, most = machine.readings(1), machine.readings(1 << 40, turns=9)
    assert (least[1], most[1], len(made[-2])) == (4096, 1 << 16, 1)


# -- the JSON file -------------------------------------------------------------------------------------------------


def test_json_file_is_written_atomically(tmp_path):
    path = tmp_path / "found.json"
    path.write_text("old")
    with pytest.raises(KeyError), json_file(path):
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with json_file(path) as write:
        write({"a": [1]})
        assert json.loads(path.read_text()) == {"a": [1]}
    assert list(tmp_path.iterdir()) == [path]
    before = os.umask(0o027)
    try:
        with json_file(path) as write:
            write({})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_without_json_option_nothing_is_written():
    with json_file(None) as write:
        write({"a": 1})


@pytest.mark.parametrize("where", ["no/such/folder/x.json", "."])
def test_unwritable_json_path_is_refused_before_measuring(tmp_path, where):
    with pytest.raises(UsageError, match="--json"), json_file(tmp_path / where):
        pytest.fail("measured before the path was tried")
