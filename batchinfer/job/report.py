"""Running totals of a run, the snapshots that a progress display shows, and report.json.

report.json lands whether a run ends well, is drained or fails; with several workers each writes its own.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, Protocol

from batchinfer import __version__
from batchinfer.errors import BatchInferError, TooManyRowErrors
from batchinfer.io.storage import Store
from batchinfer.job.fingerprint import begins_with, document
from batchinfer.job.shard import Shard
from batchinfer.log import log
from batchinfer.request import Completion

_EXAMPLES = 3  # of each kind of error
_SHARE_FROM_ROWS = 200  # a share of fewer rows says nothing
_VERSIONED = ("torch", "pyarrow", "tokenizers", "fsspec", "s3fs")


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """Snapshot of a run. Rows and tokens are this worker's; `rows_before` were done when it started."""

    phase: str  # planning, loading, running, finishing
    rows_total: int = 0  # that this worker's chunks cover; `where` may leave some out
    rows_before: int = 0
    rows_done: int = 0  # in this run, rows that `where` left out included
    errors: int = 0
    chunks_total: int = 0
    chunks_done: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    computed_tokens: int = 0  # prompt tokens that the engine computed
    reused_tokens: int = 0  # prompt tokens that it found in its cache
    generated_tokens: int = 0  # of finished and unfinished rows, by the engine
    elapsed_s: float = 0.0  # since the first prompt was read


class Progress(Protocol):
    """Shows snapshots. Called a few times a second, from one thread that is not the main one."""

    def update(self, snapshot: RunSnapshot) -> None: ...

    def close(self) -> None: ...


class Silent:
    """A progress display that shows nothing."""

    def update(self, snapshot: RunSnapshot) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Tally:
    """Running totals of this run, against `errors.max`.

    `recovered` rows came from the salvage, `before` are committed rows of earlier runs (counted only if a threshold
    needs them).
    """

    max_errors: int | float | None = None
    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scored_tokens: int = 0  # of continuations and texts, by the tasks that score
    recovered_rows: int = 0
    recovered_errors: int = 0
    before_rows: int = 0
    before_errors: int = 0
    left_out: int = 0  # by `where`

    def add_completion(self, completion: Completion) -> None:
        self.rows += 1
        self.prompt_tokens += len(completion.prompt_token_ids)
        for output in completion.outputs:
            self.completion_tokens += len(output.token_ids)
        for score in completion.scores or ():
            self.scored_tokens += len(score.token_ids)
        if completion.error is not None:
            self.errors[completion.error.kind] += 1
            examples = self.examples.setdefault(completion.error.kind, [])
            if len(examples) < _EXAMPLES:
                examples.append({"row": completion.index, "error": str(completion.error)})

    @property
    def all_rows(self) -> int:
        return self.rows + self.recovered_rows + self.before_rows

    @property
    def all_errors(self) -> int:
        return self.errors.total() + self.recovered_errors + self.before_errors

    @property
    def too_many(self) -> bool:
        """Return True if the job should stop now. A share is judged once enough rows are done."""
        if self.max_errors is None or not self.errors:
            return False
        early = isinstance(self.max_errors, float) and self.all_rows < _SHARE_FROM_ROWS
        return not early and self.exceeds(self.all_rows, self.all_errors)

    def exceeds(self, rows: int, errors: int) -> bool:
        """Return True if these errors are too many; without `errors.max`, if there are rows and no answer."""
        if self.max_errors is None:
            return 0 < rows == errors
        allowed = self.max_errors if isinstance(self.max_errors, int) else self.max_errors * rows
        return errors > allowed

    def refusal(self, rows: int, errors: int, ending: str, first: str = "") -> TooManyRowErrors:
        """Return the error of a job that failed too often.

        `ending`: what became of the job. `first`: an error of the output, for a run that has seen none.
        """
        kinds = ", ".join(f"{kind}: {number}" for kind, number in self.errors.most_common())
        seen = next((f"row {e[0]['row']}: {e[0]['error']}" for e in self.examples.values()), first)
        limit = "errors.max is not set" if self.max_errors is None else f"errors.max is {self.max_errors}"
        every = "the only row" if rows == 1 else f"all {rows} rows"
        which = every if rows == errors else f"{errors} of {rows} rows"
        return TooManyRowErrors(
            f"{which} failed ({kinds or 'in earlier runs'}), {limit}; {ending}{'; ' * bool(seen)}{seen}"
        )


@dataclass
class Report:
    """The content of report.json. `outcome` is done, drained, too_many_errors or failed."""

    outcome: str = "failed"
    exit_code: int = 70
    message: str = ""
    output: str = ""
    shard: str = ""
    pass_number: int = 0
    complete: bool = False  # whether the whole job, all shards, is done
    rows: dict[str, int] = field(default_factory=dict)
    chunks: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)  # of the whole output, once complete
    timing: dict[str, Any] = field(default_factory=dict)  # start, and seconds of each phase
    ran_with: dict[str, Any] = field(default_factory=dict)  # settings of this run alone, and versions

    def to_bytes(self, fingerprint: str) -> bytes:
        values = asdict(self)
        values["pass"] = values.pop("pass_number")
        return document(fingerprint, values)


class Clock:
    """Start times of the phases of a run."""

    def __init__(self) -> None:
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._began = time.monotonic()
        self._phases: dict[str, float] = {}
        self.phase = ""

    def enter(self, phase: str) -> None:
        self._phases[phase] = time.monotonic()
        self.phase = phase

    def since(self, phase: str) -> float:
        """Seconds since a phase began; 0 if it did not."""
        return time.monotonic() - self._phases[phase] if phase in self._phases else 0.0

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase so far, and in all."""
        now = time.monotonic()
        phases = list(self._phases.items())
        ends = [*(begin for _, begin in phases[1:]), now]
        spent = {name: round(end - begin, 3) for (name, begin), end in zip(phases, ends, strict=True)}
        return {**spent, "total": round(now - self._began, 3)}


def report_name(shard: Shard) -> str:
    return "report.json" if shard.count == 1 else f"report-{shard.name}.json"


def write_report(report: Report, store: Store, name: str, fingerprint: str) -> None:
    """Write it, unless something that is not of the job with this fingerprint stands under its name."""
    there = store.read(name)
    if there is None or begins_with(there, fingerprint):
        store.put(name, report.to_bytes(fingerprint))
    else:
        log.warning("the report is not written: something else stands under its name", object=f"{store.url}/{name}")


def settle(report: Report, error: BaseException | None) -> None:
    """Fill in how a run ended."""
    if error is None:
        report.outcome, report.exit_code = "done", 0
        return
    known = isinstance(error, BatchInferError)
    report.exit_code = error.exit_code if isinstance(error, BatchInferError) else 70
    report.outcome = {10: "too_many_errors", 33: "drained"}.get(report.exit_code, "failed")
    report.message = str(error) if known else f"{type(error).__name__}: {error}"


@cache
def versions() -> dict[str, str]:
    found = {"batchinfer": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
