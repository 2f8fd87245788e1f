"""What one run knows about itself: totals, phases and records, and the snapshots and reports made from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchinfer.errors import Drained, StorageError
from batchinfer.io.fetch import ModelFiles
from batchinfer.io.storage import Store
from batchinfer.job.drain import Drain
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
    """What can be replaced: the store, who answers (a server has an engine already), how often the salvage is saved."""

    open_store: Callable[[JobSpec], Store] = open_store
    load_llm: Callable[[JobSpec, ModelFiles | None], Answerer] = load_llm
    salvage_every_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Worker:
    """One process's part in a job, and its surroundings."""

    shard: Shard
    spool_dir: Path | None = None
    drain: Drain = field(default_factory=Drain)
    progress: Progress = field(default_factory=Silent)
    seams: Dependencies = field(default_factory=Dependencies)


@dataclass(frozen=True, slots=True)
class Pass:
    """One go over chunks: the run itself (0) or a retry. `before` are chunks of this worker that are done already."""

    number: int
    chunks: list[int]
    before: list[int]


def _settings(spec: JobSpec | None) -> dict[str, Any]:
    """What may differ from one run of a job to the next; None of an engine's settings means chosen for the machine."""
    own = {} if spec is None else {"engine": spec.engine.model_dump(), "errors": spec.errors.model_dump()}
    return {**own, "versions": versions()}


class RunState:
    """Written by the run's own threads, each its own fields; read at any moment."""

    def __init__(self, spec: JobSpec, worker: Worker) -> None:
        self.worker = worker
        self.clock = Clock()
        self.tally = Tally(max_errors=spec.errors.max)
        self.committed = 0  # chunks, by this run
        self.work: PreparedJob | None = None
        self.todo = Pass(0, [], [])
        self._rows_before = self._rows_open = 0  # that the pass covers
        self.llm: Answerer | None = None
        self.manifest: dict[str, Any] | None = None
        self._lock = threading.Lock()

    # -- what happens -------------------------------------------------------------------------------------------

    def opened(self, finished: list[RowResult], left_out: int) -> None:
        """A chunk was read: rows that an earlier run finished, and rows that `where` leaves out."""
        self.tally.recovered_rows += len(finished)
        self.tally.recovered_errors += sum(row.failure is not None for row in finished)
        self.tally.left_out += left_out

    def begin_pass(self, todo: Pass) -> None:
        self._rows_before, self._rows_open = self._covered(todo.before), self._covered(todo.chunks)
        self.todo = todo

    def done(self) -> None:
        """A chunk was committed; called by the committing threads."""
        with self._lock:
            self.committed += 1

    # -- what is shown ------------------------------------------------------------------------------------------

    def show(self) -> None:
        self.worker.progress.update(self.snapshot())

    def snapshot(self) -> RunSnapshot:
        tally, todo = self.tally, self.todo
        stats = self.llm.stats() if self.llm is not None else None
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

    def report(self, error: BaseException | None) -> Report:
        """What report.json says if the run ends now, with this error or without."""
        tally, work = self.tally, self.work
        report = Report(
            output=work.ledger.store.url if work is not None else "",
            shard=self.worker.shard.name,
            pass_number=self.todo.number,
            complete=self.manifest is not None,
            totals={name: value for name, value in (self.manifest or {}).items() if name != "parts"},
            timing={"started": self.clock.started, **self.clock.seconds()},
            ran_with=_settings(work.spec if work is not None else None),
        )
        self._count(report)
        kinds = sorted(tally.examples)
        report.errors = {kind: {"rows": tally.errors[kind], "examples": tally.examples[kind]} for kind in kinds}
        settle(report, error)
        return report

    def _count(self, report: Report) -> None:
        snapshot, tally = self.snapshot(), self.tally
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
            "committed_before": len(self.todo.before),
            "committed": self.committed,
        }
        report.tokens = {
            "prompt": snapshot.prompt_tokens,
            "completion": snapshot.completion_tokens,
            "scored": tally.scored_tokens,
            "prompt_computed": snapshot.computed_tokens,
            "prompt_reused": snapshot.reused_tokens,
        }
        seen = snapshot.computed_tokens + snapshot.reused_tokens
        seconds = max(self.clock.seconds().get("running", 0.0), 1e-9)
        report.rates = {
            "rows_per_s": round(tally.rows / seconds, 2),
            "prompt_tokens_per_s": round(snapshot.prompt_tokens / seconds, 1),
            "completion_tokens_per_s": round(snapshot.completion_tokens / seconds, 1),
            "scored_tokens_per_s": round(tally.scored_tokens / seconds, 1),
            "cache_reuse": round(snapshot.reused_tokens / seen, 4) if seen else 0.0,
        }
        if self.llm is not None:
            stats = self.llm.stats()
            report.tokens |= {"drafted": stats.draft_tokens, "draft_accepted": stats.accepted_tokens}
            report.rates |= {"steps": stats.steps, "preemptions": stats.preemptions}

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Whatever ends the block, the report lands beside the output, if the output is known to be ours."""
        drain = self.worker.drain
        ending: BaseException | None = None
        try:
            with Repeat(_SHOW_EVERY_S, self.show, "showing progress"):
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
            self.worker.progress.close()

    def write_report(self, error: BaseException | None) -> None:
        if self.work is None:
            return
        store = self.work.ledger.store
        if isinstance(error, StorageError):
            store.retry.total_s = _LAST_WORD_S
        try:
            write_report(self.report(error), store, report_name(self.worker.shard), self.work.plan.digest)
        except Exception as problem:
            log.warning("the report could not be written", output=store.url, error=str(problem))

    def _covered(self, chunks: list[int]) -> int:
        return sum(self.work.plan.chunks[chunk].count for chunk in chunks) if self.work is not None else 0
