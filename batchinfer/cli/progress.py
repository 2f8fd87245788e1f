"""Display of a running job: a live line on a terminal, periodic log lines elsewhere.

Rates cover the last seconds; the time left is estimated from the whole run. Only measured values are shown.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING

from batchinfer.errors import shell_command
from batchinfer.log import log

if TYPE_CHECKING:
    from rich.console import RenderableType

    from batchinfer.job.report import Progress, Report, RunSnapshot

_WINDOW_S = 30.0
_LOG_EVERY_S = 10.0
_BAR_CELLS = 24


def choose_progress() -> Progress:
    """Return a live line if stderr is a terminal and logs are text, else log lines."""
    return TerminalProgress() if sys.stderr.isatty() and not log.as_json else LogProgress()


class RecentRates:
    """Tokens per second over the last seconds, by the engine's counts, which run ahead of finished rows."""

    def __init__(self) -> None:
        self._recent: deque[RunSnapshot] = deque()

    def add(self, snapshot: RunSnapshot) -> None:
        self._recent.append(snapshot)
        while len(self._recent) > 2 and snapshot.elapsed_s - self._recent[1].elapsed_s > _WINDOW_S:
            self._recent.popleft()

    def tokens_per_s(self) -> tuple[float, float]:
        """Return prompt tokens in (cached or computed) and generated tokens out; 0 before two snapshots."""
        if not self._recent:
            return 0.0, 0.0
        first, last = self._recent[0], self._recent[-1]
        spent = last.elapsed_s - first.elapsed_s
        if spent <= 0:
            return 0.0, 0.0
        tokens_in = last.computed_tokens + last.reused_tokens - first.computed_tokens - first.reused_tokens
        return tokens_in / spent, (last.generated_tokens - first.generated_tokens) / spent


def cache_share(snapshot: RunSnapshot) -> float:
    """Return the share of prompt tokens that the engine found in its prefix cache."""
    looked_up = snapshot.computed_tokens + snapshot.reused_tokens
    return snapshot.reused_tokens / looked_up if looked_up else 0.0


def seconds_left(snapshot: RunSnapshot) -> float | None:
    """Estimate the time left from this run's speed so far; None before the first row."""
    if not snapshot.rows_done or not snapshot.elapsed_s:
        return None
    left = snapshot.rows_total - snapshot.rows_before - snapshot.rows_done
    return left * snapshot.elapsed_s / snapshot.rows_done


def format_duration(seconds: float) -> str:
    """Format seconds as `"48 s"`, `"3 min 07 s"` or `"2 h 05 min"`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


class LogProgress:
    """Progress as log lines: at each change of phase, then every ten seconds."""

    def __init__(self) -> None:
        self._phase = ""
        self._next_s = _LOG_EVERY_S
        self._rates = RecentRates()

    def update(self, snapshot: RunSnapshot) -> None:
        self._rates.add(snapshot)
        if snapshot.phase != self._phase:
            self._phase = snapshot.phase
            log.info(f"phase: {snapshot.phase}")
        elif snapshot.elapsed_s >= self._next_s:
            self._next_s = snapshot.elapsed_s + _LOG_EVERY_S
            self._write(snapshot)

    def _write(self, snapshot: RunSnapshot) -> None:
        tokens_in, tokens_out = self._rates.tokens_per_s()
        done = snapshot.rows_before + snapshot.rows_done
        left = seconds_left(snapshot)
        log.info(
            "progress",
            rows=done,
            of=snapshot.rows_total,
            percent=round(100 * done / max(1, snapshot.rows_total), 1),
            tokens_in_per_s=round(tokens_in),
            tokens_out_per_s=round(tokens_out),
            cache_percent=round(100 * cache_share(snapshot), 1),
            errors=snapshot.errors,
            left_s=None if left is None else round(left),
        )

    def close(self) -> None:
        pass


class TerminalProgress:
    """Progress as one live line at the bottom of the terminal, below the log lines."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._rates = RecentRates()
        self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
        self._live.start()

    def update(self, snapshot: RunSnapshot) -> None:
        self._rates.add(snapshot)
        self._live.update(self._line(snapshot))

    def close(self) -> None:
        self._live.stop()

    def _line(self, snapshot: RunSnapshot) -> RenderableType:
        from rich.text import Text

        if not snapshot.rows_total or snapshot.phase in ("planning", "loading"):
            return Text(f"{snapshot.phase} …")
        done = snapshot.rows_before + snapshot.rows_done
        share = done / snapshot.rows_total
        full = int(_BAR_CELLS * share)
        tokens_in, tokens_out = self._rates.tokens_per_s()
        left = seconds_left(snapshot)
        parts = [
            f"{done:,} of {snapshot.rows_total:,} rows {share:.0%}",
            f"{tokens_in:,.0f} tokens/s in, {tokens_out:,.0f} out",
            f"cache {cache_share(snapshot):.0%}",
            f"{snapshot.errors:,} errors",
            "" if left is None else f"{format_duration(left)} left",
        ]
        bar = Text("━" * full, style="green") + Text("━" * (_BAR_CELLS - full), style="bright_black")
        text = Text(" " + " · ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis")
        if snapshot.errors:
            text.highlight_words([f"{snapshot.errors:,} errors"], style="yellow")
        return bar + text


def summary(report: Report) -> str:
    """Return the summary of a run, with commands for next steps."""
    rows, tokens = report.rows, report.tokens
    output = report.output
    if not report.chunks["committed"] and report.complete:
        lines = [f"already complete: {report.totals.get('rows', rows['covered']):,} rows"]
    else:
        seconds = report.timing.get("running", 0.0)
        lines = [f"{rows['run']:,} rows in {format_duration(seconds)}, {rows['failed']:,} failed"]
        if rows["committed_before"] + rows["recovered"]:
            lines.append(f"{rows['committed_before'] + rows['recovered']:,} rows were done before")
        lines.append(
            f"{tokens['prompt']:,} tokens in ({report.rates['cache_reuse']:.0%} from the prefix cache), "
            f"{_output_tokens(report)}"
        )
    if not report.complete:
        lines.append(f"other workers are not done; to see their progress: {shell_command('status', output)}")
    failed = [shell_command("show", output, "--errors")] if rows["failed"] else []
    commands = [shell_command("show", output), *failed, shell_command("verify", output)]
    return "\n".join([*lines, f"output: {output}", "next:", *(f"  {line}" for line in commands)])


def _output_tokens(report: Report) -> str:
    """Return the scored tokens of scoring tasks, the generated tokens of others."""
    kind, word = ("scored", "scored") if report.tokens["scored"] else ("completion", "out")
    return f"{report.tokens[kind]:,} {word}, {report.rates[f'{kind}_tokens_per_s']:,.0f} {word} per second"
