"""Job spec to plan on storage: finds everything that can be wrong before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from batchinfer.errors import BadParameters, BatchInferError, SpecError
from batchinfer.io.fetch import ModelFiles, fetch_model
from batchinfer.io.rows import Inputs, RowSpan, scan_inputs, stream_rows
from batchinfer.io.storage import Store
from batchinfer.job.columns import OutputLayout, output_layout
from batchinfer.job.ledger import Ledger, save_spec
from batchinfer.job.output_claim import find_plan
from batchinfer.job.overlap import refuse_inside, refuse_overlap
from batchinfer.job.plan import PLAN, JobPlan, make_plan, save_plan
from batchinfer.job.row_prompts import RowPrompts
from batchinfer.job.same_inputs import same_inputs
from batchinfer.log import log
from batchinfer.ops.fingerprint_device import fingerprint_device
from batchinfer.spec import FAKE_MODEL, JobSpec
from batchinfer.structured import StructuredOutputs
from batchinfer.text.grammar import validate
from batchinfer.text.row_names import spelling

_FILTER_ROWS = 1000  # read at once while `where` and `limit` are applied together


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan that is not on storage yet."""

    spec: JobSpec
    plan: JobPlan
    layout: OutputLayout
    rows: RowPrompts
    files: ModelFiles | None


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job whose plan stands on storage."""

    spec: JobSpec
    plan: JobPlan
    layout: OutputLayout
    rows: RowPrompts
    ledger: Ledger
    files: ModelFiles | None  # None for the fake model


def draft_plan(spec: JobSpec, weights: bool = False, known: JobPlan | None = None) -> Draft:
    """Compile the templates, scan the inputs, check one against the other, and plan. Writes nothing.

    The model's files come last; without `weights` only its configuration and tokenizer are fetched, and the plan's
    fingerprint may then lack them. The scan of a `known` plan is used again if its files did not change.
    Raises SpecError, InputError, InputMissing, ModelError.
    """
    rows = _compiled(spec)
    _check_grammar(spec)
    used = rows.read_columns
    kept = same_inputs(spec, known) if known and used <= {*known.inputs.schema.names} else None
    asked = spec.input.model_copy(update={"columns": None}) if rows.whole else spec.input
    inputs = kept or scan_inputs(asked, spec.storage, used)
    rows.check(inputs)
    layout = output_layout(spec, inputs)
    taken = known.taken if known is not None and kept is not None else rows_taken(spec, rows, inputs)
    files = None if spec.model == FAKE_MODEL else fetch_model(spec.model, spec.storage, weights)
    identities = {"model": files.identity if files is not None else FAKE_MODEL}
    if spec.tokenizer is not None:
        identities["tokenizer"] = fetch_model(spec.tokenizer, spec.storage, weights=False).identity
    device = fingerprint_device(spec.engine.device) if files is not None else None
    if device is not None:
        identities["engine.device"] = device
    return Draft(spec, make_plan(spec, inputs, layout, identities, taken), layout, rows, files)


def prepare(spec: JobSpec, open_store: Callable[[JobSpec], Store], report: str) -> PreparedJob:
    """Draft the plan and put it on storage, or agree with the one that is there. Raises OutputConflict as well.

    `report`: the name of this worker's report. Nothing is written before it is known that all its objects have a place.
    """
    refuse_overlap(spec)
    store = open_store(spec)
    draft = draft_plan(spec, weights=True, known=find_plan(store, report))
    refuse_inside(spec, (file.url for file in draft.plan.inputs.files))
    plan = save_plan(draft.plan, store)
    if not store.is_conditional(PLAN):
        log.warning(
            "this store does not refuse to replace an object: commits are checked and then written, so never let two "
            "workers have the same shard; readers still see one result per row",
            output=store.url,
        )
    save_spec(spec, store)
    return PreparedJob(spec, plan, draft.layout, draft.rows, Ledger(store, plan), draft.files)


def _compiled(spec: JobSpec) -> RowPrompts:
    """Compile the templates. Raises SpecError, which says how a column is to be written."""
    try:
        return RowPrompts(spec)
    except SpecError as error:
        try:
            names = scan_inputs(spec.input.model_copy(update={"limit": 1, "where": None}), spec.storage).schema.names
        except BatchInferError:
            raise error from None
        section, _, field = error.key.partition(".")
        source = getattr(getattr(spec, section), field.partition("[")[0])
        hint = spelling(source if isinstance(source, str) else "\n".join(source), names)
        raise SpecError(f"{str(error).removeprefix(f'{error.key}: ')}{hint}", key=error.key) from None


def _check_grammar(spec: JobSpec) -> None:
    """Check the job's own schema or grammar, before every row fails because of it."""
    wanted = StructuredOutputs.of(spec.sampling_values.get("structured_outputs"))
    try:
        if wanted is not None:
            validate(wanted)
    except BadParameters as error:
        raise SpecError(str(error), key="sampling.structured_outputs") from None


def rows_taken(spec: JobSpec, rows: RowPrompts, inputs: Inputs) -> tuple[int, ...]:
    """Return the rows of each file that are covered. With `where` and `limit`, up to the row that fills the limit."""
    counts = [file.rows for file in inputs.files]
    limit = spec.input.limit
    if limit is None or not rows.filters:
        return tuple(counts)
    narrow = inputs.select(rows.columns["input.where"])
    spans = [
        RowSpan(number, start, min(_FILTER_ROWS, count - start))
        for number, count in enumerate(counts)
        for start in range(0, count, _FILTER_ROWS)
    ]
    batches: Any = stream_rows(narrow, spans, spec.storage)
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
