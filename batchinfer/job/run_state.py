"""State of one run: what is fixed (`Worker`, `Pass`), what is counted (`RunCounts`), and its reports (`Reporter`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchinfer.engine.stats import EngineStats
from batchinfer.errors import Drained, StorageError
from batchinfer.io.fetch import ModelFiles
from batchinfer.io.storage import Store
from batchinfer.job.drain import Drain
from batchinfer.job.manifest import Manifest
from batchinfer.job.plan import JobPlan
from batchinfer.job.prepare import PreparedJob
from batchinfer.job.repeat import Repeat
from batchinfer.job.report import (
    Clock,
    Progress,
    Report,
    RunSnapshot,
    Silent,
    Tally,
    report_name,
    settle,
    versions,
    write_report,
)
from batchinfer.job.results import RowResult
from batchinfer.job.shard import Shard
from batchinfer.llm import LLM, Answerer
from batchinfer.log import log
from batchinfer.spec import JobSpec

_SHOW_EVERY_S = 0.25
_LAST_WORD_S = 5.0  # for a report to a store that has just failed for a minute


def load_llm(spec: JobSpec, files: ModelFiles | None) -> LLM:
    return LLM.from_spec(spec, files)


def open_store(spec: JobSpec) -> Store:
    return Store.open(spec.output.path, spec.storage)


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Replaceable parts of a run: store, model (a server has an engine already), time between two salvages."""

    open_store: Callable[[JobSpec], Store] = open_store
    load_llm: Callable[[JobSpec, ModelFiles | None], Answerer] = load_llm
    salvage_every_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Worker:
    """Process that runs a share of a job, and its surroundings."""

    shard: Shard
    spool_dir: Path | None = None
    drain: Drain = field(default_factory=Drain)
    progress: Progress = field(default_factory=Silent)
    dependencies: Dependencies = field(default_factory=Dependencies)


@dataclass(frozen=True, slots=True)
class Pass:
    """Pass over chunks: the run itself (0) or a retry. `before` are chunks of this worker that are done already."""

    number: int
    chunks: list[int]
    before: list[int]


class RunCounts:
    """Counters and phases of a run. Each field is written by one of the run's threads and read at any moment."""

    def __init__(self, max_errors: int | float | None) -> None:
        self.clock = Clock()
        self.tally = Tally(max_errors=max_errors)
        self.committed = 0  # chunks, by this run
        self.todo = Pass(0, [], [])
        self.manifest: Manifest | None = None
        self.engine_stats: Callable[[], EngineStats] | None = None  # once the model is loaded
        self._rows_before = self._rows_open = 0  # rows that the pass covers
        self._lock = threading.Lock()

    def begin_pass(self, todo: Pass, plan: JobPlan) -> None:
        covered = [sum(plan.chunks[chunk].count for chunk in chunks) for chunks in (todo.before, todo.chunks)]
        self._rows_before, self._rows_open = covered
        self.todo = todo

    def count_opened(self, finished: list[RowResult], left_out: int) -> None:
        """Count the rows of a chunk that an earlier run finished, and those that `where` leaves out."""
        self.tally.recovered_rows += len(finished)
        self.tally.recovered_errors += sum(result.failure is not None for result in finished)
        self.tally.left_out += left_out

    def count_committed(self) -> None:
        """Count a committed chunk; called by the committing threads."""
        with self._lock:
            self.committed += 1

    def snapshot(self) -> RunSnapshot:
        tally, todo = self.tally, self.todo
        stats = self.engine_stats() if self.engine_stats is not None else None
        return RunSnapshot(
            phase=self.clock.phase,
            rows_total=self._rows_open + self._rows_before,
            rows_before=self._rows_before,
            rows_done=tally.rows + tally.recovered_rows + tally.left_out,
            errors=tally.all_errors,
            chunks_total=len(todo.chunks) + len(todo.before),
            chunks_done=len(todo.before) + self.committed,
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            computed_tokens=stats.prompt_tokens_computed if stats is not None else 0,
            reused_tokens=stats.prompt_tokens_reused if stats is not None else 0,
            generated_tokens=stats.generated_tokens if stats is not None else 0,
            elapsed_s=self.clock.since("running"),
        )


class Reporter:
    """Shows a run's progress and writes its report. `job` is set once the plan is on storage: the output is ours."""

    def __init__(self, worker: Worker, counts: RunCounts) -> None:
        self.job: PreparedJob | None = None
        self._worker = worker
        self._counts = counts

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Write the report beside the output, however the block ends, if the output is known to be ours."""
        drain = self._worker.drain
        ending: BaseException | None = None
        try:
            with Repeat(_SHOW_EVERY_S, self.show_progress, "showing progress"):
                yield
        except BaseException as error:
            ending = error
            raise
        finally:
            drained = isinstance(ending, Drained)
            if drained:
                drain.wait_saved()  # it writes the report as well
            else:
                drain.on_request(None)
                self.write_report(ending)
            self._worker.progress.close()

    def show_progress(self) -> None:
        self._worker.progress.update(self._counts.snapshot())

    def write_report(self, error: BaseException | None) -> None:
        if self.job is None:
            return
        store = self.job.ledger.store
        if isinstance(error, StorageError):
            store.retry.total_s = _LAST_WORD_S
        try:
            write_report(self.report(error), store, report_name(self._worker.shard), self.job.plan.digest)
        except Exception as problem:
            log.warning("the report could not be written", output=store.url, error=str(problem))

    def report(self, error: BaseException | None) -> Report:
        """Return the content of report.json if the run ends now, with this error or without."""
        counts, job = self._counts, self.job
        tally, manifest = counts.tally, counts.manifest
        report = Report(
            output=job.ledger.store.url if job is not None else "",
            shard=self._worker.shard.name,
            pass_number=counts.todo.number,
            complete=manifest is not None,
            totals=manifest.totals() if manifest is not None else {},
            timing={"started": counts.clock.started, **counts.clock.seconds()},
            ran_with=_settings(job.spec if job is not None else None),
        )
        _add_counts(report, counts)
        kinds = sorted(tally.examples)
        report.errors = {kind: {"rows": tally.errors[kind], "examples": tally.examples[kind]} for kind in kinds}
        settle(report, error)
        return report


def _settings(spec: JobSpec | None) -> dict[str, Any]:
    """Return what may differ between runs of a job; None in an engine's settings means chosen for the machine."""
    own = {} if spec is None else {"engine": spec.engine.model_dump(), "errors": spec.errors.model_dump()}
    return {**own, "versions": versions()}


def _add_counts(report: Report, counts: RunCounts) -> None:
    snapshot, tally = counts.snapshot(), counts.tally
    report.rows = {
        "covered": snapshot.rows_total,
        "committed_before": snapshot.rows_before,
        "recovered": tally.recovered_rows,
        "left_out": tally.left_out,
        "run": tally.rows,
        "failed": tally.all_errors,
    }
    report.chunks = {
        "total": snapshot.chunks_total,
        "committed_before": len(counts.todo.before),
        "committed": counts.committed,
    }
    report.tokens = {
        "prompt": snapshot.prompt_tokens,
        "completion": snapshot.completion_tokens,
        "scored": tally.scored_tokens,
        "prompt_computed": snapshot.computed_tokens,
        "prompt_reused": snapshot.reused_tokens,
    }
    seen = snapshot.computed_tokens + snapshot.reused_tokens
    seconds = max(counts.clock.seconds().get("running", 0.0), 1e-9)
    report.rates = {
        "rows_per_s": round(tally.rows / seconds, 2),
        "prompt_tokens_per_s": round(snapshot.prompt_tokens / seconds, 1),
        "completion_tokens_per_s": round(snapshot.completion_tokens / seconds, 1),
        "scored_tokens_per_s": round(tally.scored_tokens / seconds, 1),
        "cache_reuse": round(snapshot.reused_tokens / seen, 4) if seen else 0.0,
    }
    if counts.engine_stats is not None:
        stats = counts.engine_stats()
        report.tokens |= {"drafted": stats.draft_tokens, "draft_accepted": stats.accepted_tokens}
        report.rates |= {"steps": stats.steps, "preemptions": stats.preemptions}
