"""Batches as jobs: one at a time in the order of their creation, over an engine that others use as well.

A batch is a job whose input is the uploaded file and whose output is a folder of the catalog. So it has the job's
guarantees: plan, commit records and salvage survive any death, and the same batch goes on after a restart. Cancelling
and expiring stop the job as a signal would; then it runs to its end with an answerer that refuses what is left.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from batchinfer.batches.catalog import BatchRecord, Catalog, Problem, RequestCounts, Status
from batchinfer.batches.result_files import store_results
from batchinfer.batches.validate import check_lines
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import BatchInferError, Cancelled, DeadlineExceeded, Drained, InfrastructureError, RowError
from batchinfer.job.clear_output import clear_output
from batchinfer.job.drain import Drain
from batchinfer.job.manifest import read_manifest
from batchinfer.job.plan import load_plan
from batchinfer.job.report import RunSnapshot
from batchinfer.job.run import run_job
from batchinfer.job.run_state import Dependencies, open_store
from batchinfer.job.spool import Spool
from batchinfer.llm import Answerer
from batchinfer.log import log
from batchinfer.openai.parse import ROUTES, ModelFacts
from batchinfer.pipeline.prompt import Prompt
from batchinfer.request import Completion
from batchinfer.spec import JobSpec, parse_spec

_CHUNK_ROWS = 500
_SALVAGE_EVERY_S = 10.0  # to local disk: cheaper than the 30 s of a job on an object store
_RETRY_S = (1.0, 5.0, 30.0, 120.0, 300.0)  # waits after failures of disk or engine; then the batch fails


@dataclass(frozen=True, slots=True)
class Refusing:
    """Answers every prompt with the same error."""

    error: RowError
    model_facts: ModelFacts

    def run_prompts(self, prompts: Iterable[Prompt]) -> Generator[Completion, None, None]:
        for prompt in prompts:
            yield Completion(prompt.index, [], error=prompt.error or self.error)

    def stats(self) -> EngineStats:
        return EngineStats()


class BatchRunner:
    """Runs batches: one thread checks files as batches come, another runs one batch after the other.

    `job` holds what the jobs of all batches have in common: model, engine and so on, as a job file names them.
    `models` are the names that a request may ask for.
    """

    endpoints = ROUTES

    def __init__(self, catalog: Catalog, llm: Answerer, job: Mapping[str, Any], models: Collection[str]) -> None:
        self._catalog = catalog
        self._llm = llm
        self._job = dict(job)
        self._models = frozenset(models)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._running: tuple[str, Drain] | None = None
        self._to_check: queue.Queue[str | None] = queue.Queue()
        self._to_run: queue.Queue[str | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._work, args=(self._to_check, self._check), name="batch-check", daemon=True),
            threading.Thread(target=self._work, args=(self._to_run, self._run), name="batch-run", daemon=True),
        ]

    # -- what the server calls ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Go on with every batch that has not ended, the oldest first."""
        for record in reversed(self._catalog.batches()):
            if not record.ended:
                (self._to_check if record.status == "validating" else self._to_run).put(record.id)
            elif record.status != "failed":  # killed after its last status, before it was tidy
                self._clear(record.id)
        for thread in self._threads:
            thread.start()

    def submit(self, batch_id: str) -> None:
        """Take on a batch that the catalog has just got."""
        self._to_check.put(batch_id)

    @property
    def busy(self) -> bool:
        """Return True if a batch runs or waits to."""
        return self._running is not None or not self._to_run.empty() or not self._to_check.empty()

    def cancel(self, batch_id: str) -> BatchRecord | None:
        """Run no more of a batch. None if it has ended or is about to."""
        with self._lock:
            record = self._catalog.batch(batch_id)
            if record is not None and record.status == "cancelling":
                return record
            record = self._catalog.move(batch_id, "cancelling", "validating", "in_progress")
            if record is None:
                return None
            if self._running is not None and self._running[0] == batch_id:
                self._running[1].request("cancelled")
            elif not self._catalog.work(batch_id).exists():  # nothing of it has run
                record = self._catalog.move(batch_id, "cancelled", "cancelling")
            return record

    def close(self, grace_s: float) -> None:
        """Save what the running batch has finished and stop; `start` of a new runner goes on from there."""
        self._closing.set()
        with self._lock:
            if self._running is not None:
                self._running[1].request("the server stops")
        give_up = time.monotonic() + grace_s
        for waiting in (self._to_check, self._to_run):
            waiting.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, give_up - time.monotonic()))
        if self._running is not None:  # inside a step that takes long: what is finished is on disk
            self._running[1].wait_saved()

    # -- the two threads ----------------------------------------------------------------------------------------

    def _work(self, waiting: queue.Queue[str | None], act: Callable[[str], None]) -> None:
        while (batch_id := waiting.get()) is not None and not self._closing.is_set():
            try:
                self._persist(act, batch_id)
            except Exception as error:
                if not isinstance(error, BatchInferError | OSError):
                    traceback.print_exception(error)
                self._fail(batch_id, error)

    def _persist(self, act: Callable[[str], None], batch_id: str) -> None:
        """Again after a failure of disk or engine, a few times with longer and longer waits."""
        for wait_s in _RETRY_S:
            try:
                return act(batch_id)
            except (InfrastructureError, OSError) as error:
                log.warning("a batch could not go on; trying again", batch=batch_id, error=str(error), wait_s=wait_s)
            if self._closing.wait(wait_s):
                return None
        return act(batch_id)

    def _check(self, batch_id: str) -> None:
        record = self._record(batch_id)
        content = self._catalog.content(record.input_file_id)
        with closing(Spool(self._catalog.root / "spool")) as spool:
            found = check_lines(content, record.endpoint, self._models, spool, self._closing.is_set)
        if found is None:
            return
        if found.problems:
            self._catalog.move(batch_id, "failed", "validating", problems=found.problems)
        elif self._catalog.move(batch_id, "in_progress", "validating", counts=RequestCounts(found.rows)) is not None:
            self._to_run.put(batch_id)

    def _run(self, batch_id: str) -> None:
        while not self._closing.is_set():
            with self._lock:  # from here on `cancel` finds the job
                record = self._record(batch_id)
                if record.ended:
                    return
                drain = Drain(leave=None)
                self._running = (batch_id, drain)
            try:
                self._run_job(record, drain)
                self._finish(record)
                return
            except Drained:
                continue  # cancelled, expired, or closing
            finally:
                with self._lock:
                    self._running = None

    def _run_job(self, record: BatchRecord, drain: Drain) -> None:
        refusal = _refusal(record)
        llm = self._llm
        answerer = llm if refusal is None else Refusing(refusal, llm.model_facts)
        run_job(
            self._spec(record),
            spool_dir=self._catalog.root / "spool",
            drain=drain,
            progress=_Watch(self._catalog, record, drain if refusal is None else None),
            dependencies=Dependencies(load_llm=lambda *_: answerer, salvage_every_s=_SALVAGE_EVERY_S),
        )

    def _spec(self, record: BatchRecord) -> JobSpec:
        content = str(self._catalog.content(record.input_file_id))
        values = {
            **self._job,
            # prompts without a seed get answers of their own in every batch, and the same ones after a restart
            "seed": int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:6]),
            "input": {"path": content, "format": "openai-batch"},
            "output": {"path": str(self._catalog.work(record.id)), "format": "openai-batch", "chunk_rows": _CHUNK_ROWS},
            "errors": {"max": 1.0},  # never too many; and so the errors of earlier runs are counted
        }
        return parse_spec(values, f"batch {record.id}")

    def _finish(self, record: BatchRecord) -> None:
        """End a batch whose job is complete: write its two files, set the last status, remove the job's output."""
        store = open_store(self._spec(record))
        manifest = read_manifest(store, load_plan(store))
        assert manifest is not None, "a job of one worker that ends well has a manifest"
        counts = RequestCounts(manifest.rows, manifest.ok, manifest.error_rows)
        # cancelling and expiring end as themselves, whatever happens from here on
        if "deadline" not in manifest.errors:
            self._catalog.move(record.id, "finalizing", "in_progress")
        files = store_results(self._catalog, record.id, manifest.parts)
        changes = {**files._asdict(), "counts": counts}
        if "deadline" in manifest.errors:
            self._catalog.move(record.id, "expired", "in_progress", **changes)
        self._catalog.move(record.id, "completed", "finalizing", **changes)
        self._catalog.move(record.id, "cancelled", "cancelling", **changes)
        self._clear(record.id)
        log.info("batch ended", batch=record.id, status=self._record(record.id).status, **counts._asdict())

    def _clear(self, batch_id: str) -> None:
        try:
            clear_output(self._catalog.work(batch_id))
        except BatchInferError as error:  # the batch has ended all the same, and the next start tries again
            log.warning("the folder of a batch that has ended could not be removed", batch=batch_id, error=str(error))

    def _fail(self, batch_id: str, error: Exception) -> None:
        work = self._catalog.work(batch_id)
        kept = f"; what was finished is kept in {work} on the server" if work.exists() else ""
        text = str(error) if isinstance(error, BatchInferError | OSError) else "internal error; see the server's log"
        log.error("batch failed", batch=batch_id, error=str(error))
        problem = Problem("server_error", f"{text}{kept}")
        try:
            before: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
            self._catalog.move(batch_id, "failed", *before, problems=(problem,))
        except BatchInferError as again:
            log.error("its status could not be written; it is tried again after a restart", error=str(again))

    def _record(self, batch_id: str) -> BatchRecord:
        record = self._catalog.batch(batch_id)
        assert record is not None, batch_id
        return record


def _refusal(record: BatchRecord) -> RowError | None:
    """Return the error of requests that have not run, if no more may run."""
    if record.status == "cancelling":
        return Cancelled("the batch was cancelled before this request ran")
    if time.time() >= record.expires_at:
        return DeadlineExceeded("the completion window ended before this request ran")
    return None


class _Watch:
    """Notes how far a batch is, and stops it when its window ends (`drain` None: it is being stopped already)."""

    def __init__(self, catalog: Catalog, record: BatchRecord, drain: Drain | None) -> None:
        self._catalog = catalog
        self._record = record
        self._drain = drain

    def update(self, snapshot: RunSnapshot) -> None:
        drain, record = self._drain, self._record
        if snapshot.rows_total:
            answered = snapshot.rows_before + snapshot.rows_done - snapshot.errors
            self._catalog.count(record.id, RequestCounts(snapshot.rows_total, answered, snapshot.errors))
        if drain is not None and not drain.requested and time.time() >= record.expires_at:
            drain.request("the batch expired")

    def close(self) -> None:
        pass
