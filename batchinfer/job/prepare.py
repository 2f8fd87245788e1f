"""From a job spec to its plan on storage: everything that can be wrong is found here, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from batchinfer.errors import InputMissing
from batchinfer.io.fetch import ModelFiles, fetch_model
from batchinfer.io.rows import Inputs, Span, scan, stream
from batchinfer.io.storage import Store
from batchinfer.job.columns import Layout, output_layout
from batchinfer.job.ledger import Ledger, save_spec
from batchinfer.job.plan import JobPlan, make_plan, save_plan
from batchinfer.job.prompts import RowPrompts
from batchinfer.log import log
from batchinfer.spec import FAKE_MODEL, JobSpec

_FILTER_ROWS = 1000  # read at once while `where` and `limit` are applied together


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan that is not on storage yet."""

    spec: JobSpec
    plan: JobPlan
    layout: Layout
    rows: RowPrompts
    files: ModelFiles | None


@dataclass(frozen=True, slots=True)
class Work:
    """A job whose plan stands on storage."""

    spec: JobSpec
    plan: JobPlan
    layout: Layout
    rows: RowPrompts
    ledger: Ledger
    files: ModelFiles | None  # None for the fake model


def draft_plan(spec: JobSpec, weights: bool = False) -> Draft:
    """Compile the templates, scan the inputs, check one against the other, and plan. Writes nothing.

    The model's files come last; without `weights` only its configuration and tokenizer are fetched, and the plan's
    fingerprint may then lack them. Raises SpecError, InputError, InputMissing, ModelError.
    """
    rows = RowPrompts(spec)
    inputs = scan(spec.input, spec.storage)
    if not any(file.rows for file in inputs.files):
        names = ", ".join(file.url for file in inputs.files[:3])
        raise InputMissing(f"input.path: no rows in {names}{' …' if len(inputs.files) > 3 else ''}")
    rows.check(inputs)
    layout = output_layout(spec, inputs)
    taken = rows_taken(spec, rows, inputs)
    files = None if spec.model == FAKE_MODEL else fetch_model(spec.model, spec.storage, weights)
    identities = {"model": files.identity if files is not None else FAKE_MODEL}
    if spec.tokenizer is not None:
        identities["tokenizer"] = fetch_model(spec.tokenizer, spec.storage, weights=False).identity
    return Draft(spec, make_plan(spec, inputs, layout, identities, taken), layout, rows, files)


def prepare(spec: JobSpec, open_store: Callable[[], Store]) -> Work:
    """Draft the plan and put it on storage, or agree with the one that is there. Raises OutputConflict as well."""
    draft = draft_plan(spec, weights=True)
    store = open_store()
    if not store.probe_conditional():
        log.warning(
            "this store does not refuse to replace an object: commits are checked and then written, so never let two "
            "workers have the same shard; readers still see one result per row",
            output=store.url,
        )
    save_plan(draft.plan, store)
    save_spec(spec, store)
    return Work(spec, draft.plan, draft.layout, draft.rows, Ledger(store, draft.plan), draft.files)


def rows_taken(spec: JobSpec, rows: RowPrompts, inputs: Inputs) -> tuple[int, ...]:
    """How many rows of each file the job covers. With `where` and `limit`, up to the row that fills the limit."""
    counts = [file.rows for file in inputs.files]
    limit = spec.input.limit
    if limit is None or not rows.filters:
        return tuple(counts)
    narrow = inputs.select(rows.columns["input.where"])
    spans = [
        Span(number, start, min(_FILTER_ROWS, count - start))
        for number, count in enumerate(counts)
        for start in range(0, count, _FILTER_ROWS)
    ]
    batches: Any = stream(narrow, spans, spec.storage)
    try:
        for span, batch in batches:
            kept = rows.select(batch, narrow.text_json)
            if len(kept) >= limit:
                last = span.start + kept[limit - 1] + 1
                return (*counts[: span.file], last, *(0 for _ in counts[span.file + 1 :]))
            limit -= len(kept)
    finally:
        batches.close()
    return tuple(counts)
