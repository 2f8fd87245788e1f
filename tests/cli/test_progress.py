"""Tests of progress: rates, time left, log lines, terminal line."""

from __future__ import annotations

import io
import sys

import pytest

from batchinfer.cli.progress import (
    LogProgress,
    RecentRates,
    TerminalProgress,
    cache_share,
    choose_progress,
    format_duration,
    seconds_left,
)
from batchinfer.job.report import RunSnapshot
from batchinfer.log import log


def snapshot(elapsed_s: float, rows: int = 0, **values) -> RunSnapshot:
    return RunSnapshot("running", rows_total=100, rows_done=rows, elapsed_s=elapsed_s, **values)


@pytest.fixture
def lines(capsys):
    log.configure("info", False)
    yield lambda: capsys.readouterr().err.splitlines()
    log.configure("info", None)


def test_rates_cover_the_last_seconds():
    rates = RecentRates()
    assert rates.tokens_per_s() == (0, 0)
    for second in range(201):
        slow = min(second, 100)  # nothing is generated after the first half
        rates.add(snapshot(second, computed_tokens=20 * second, reused_tokens=10 * second, generated_tokens=5 * slow))
    assert rates.tokens_per_s() == (30, 0)


def test_seconds_left_follows_the_run_so_far():
    assert seconds_left(snapshot(5)) is None
    assert seconds_left(snapshot(10, rows=20)) == 40
    assert seconds_left(snapshot(10, rows=20, rows_before=60)) == 10


def test_cache_share_of_prompt_tokens():
    assert cache_share(snapshot(1)) == 0
    assert cache_share(snapshot(1, computed_tokens=75, reused_tokens=25)) == 0.25


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 00 s"), (187, "3 min 07 s"), (7500, "2 h 05 min")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_log_line_is_written_every_ten_seconds(lines):
    progress = LogProgress()
    for tenth in range(300):
        progress.update(snapshot(tenth / 10, rows=tenth // 10, errors=2))
    progress.close()
    first, *rest = lines()
    assert first == "phase: running"
    assert [line.split("  ")[1] for line in rest] == ["rows=10", "rows=20"]
    assert "errors=2" in rest[0] and "percent=10.0" in rest[0] and "left_s=90" in rest[0]


def test_terminal_line_has_rows_rates_and_errors(lines):
    progress = TerminalProgress()
    try:
        assert progress._line(RunSnapshot("loading")).plain == "loading …"
        progress.update(snapshot(0))
        progress.update(snapshot(10, rows=25, generated_tokens=500, computed_tokens=900, reused_tokens=100, errors=3))
        text = progress._line(snapshot(10, rows=25, computed_tokens=900, reused_tokens=100, errors=3)).plain
    finally:
        progress.close()
    for part in ("25 of 100 rows 25%", "100 tokens/s in, 50 out", "cache 10%", "3 errors", "30 s left"):
        assert part in text


def test_progress_choice_follows_terminal_and_log_format(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = choose_progress()
    assert isinstance(progress, TerminalProgress)
    progress.close()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(choose_progress(), LogProgress)
