"""Preview of a job: its files and chunks, and statistics of a sample of its prompts. Loads no weights.

Everything shown was counted or measured on the sample; nothing is extrapolated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from batchinfer.errors import OutputConflict
from batchinfer.io.fetch import ModelFiles, fetch_model
from batchinfer.io.rows import RowSpan, stream_rows
from batchinfer.io.storage import Store
from batchinfer.job.ledger import Ledger
from batchinfer.job.output_claim import find_plan
from batchinfer.job.overlap import refuse_inside, refuse_overlap
from batchinfer.job.plan import PLAN, JobPlan, refuse_other
from batchinfer.job.prepare import Draft, draft_plan
from batchinfer.job.report import report_name
from batchinfer.job.row_prompts import RowContext
from batchinfer.job.shard import Shard
from batchinfer.openai.parse import ModelFacts
from batchinfer.pipeline.load import FAKE_CONTEXT_TOKENS, load_text
from batchinfer.pipeline.prepare import ModelLimits, Preparer
from batchinfer.pipeline.prompt import Refused
from batchinfer.request import SamplingParams
from batchinfer.spec import FAKE_MODEL, JobSpec

_SPANS = 10  # places of the input that the sample is taken from
_EXAMPLES = 3
_FILES_SHOWN = 10


@dataclass
class Sample:
    """Measured on some rows. `lengths` are prompt lengths in tokens, ascending."""

    rows: int = 0
    selected: int = 0
    lengths: list[int] = field(default_factory=list)
    cut_short: int = 0  # prompts that leave less room in the context than max_tokens asks for
    repeated: int = 0  # prompts equal to an earlier one of the sample
    prefix_tokens: int = 0  # tokens that some other prompt of the sample begins with as well
    errors: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def count_error(self, url: str, refused: Refused) -> None:
        self.errors[refused.error.kind] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{url} row {refused.index}: {refused.error}")


@dataclass(frozen=True)
class Preview:
    """`committed` chunks of `draft`'s plan are done already; `conflict` says why the output would refuse the job."""

    draft: Draft
    output: str
    context_tokens: int
    sample: Sample
    exists: bool
    committed: int
    conflict: OutputConflict | None


def preview(spec: JobSpec, sample_rows: int) -> Preview:
    """Plan without writing.

    Raises what `run` raises before it loads the model, except for an output that is not free for this job.
    """
    refuse_overlap(spec)
    draft = draft_plan(spec)
    refuse_inside(spec, (file.url for file in draft.plan.inputs.files))
    store = Store.open(spec.output.path, spec.storage)
    theirs, committed, conflict = None, 0, None
    try:
        theirs = find_plan(store, report_name(Shard()))
        if theirs is not None:
            refuse_other(draft.plan, theirs, f"{store.url}/{PLAN}")
            committed = len(Ledger(store, theirs).listing().in_effect())
    except OutputConflict as error:
        conflict = error
    measure = _Measure(spec, draft)
    sample = measure.measure_rows(sample_rows)
    return Preview(draft, store.url, measure.context_tokens, sample, theirs is not None, committed, conflict)


class _Measure:
    """Renders and tokenizes sampled rows as the job would."""

    def __init__(self, spec: JobSpec, draft: Draft) -> None:
        self._spec = spec
        self._draft = draft
        defaults = SamplingParams.from_mapping(spec.sampling_values)
        tokenizer, chat = load_text(_text_files(spec), spec.prompt.chat_template if spec.prompt else None)
        self.context_tokens = _context_tokens(spec)
        limits = ModelLimits(self.context_tokens, tokenizer.vocab_size, tokenizer.eos_ids)
        said = (spec.prompt.chat_template_kwargs, spec.prompt.special_tokens) if spec.prompt else ()
        self._preparer = Preparer(tokenizer, limits, defaults, chat, *said)
        self._model = ModelFacts((spec.model,), tokenizer, chat.source if chat else None, defaults)

    def measure_rows(self, rows: int) -> Sample:
        """Measure about `rows` rows."""
        plan, readers = self._draft.plan, self._draft.rows
        inputs = plan.inputs.select(readers.read_columns)
        sample = Sample()
        prompts: list[list[int]] = []
        for span, batch in stream_rows(inputs, _spans(plan, rows), self._spec.storage):
            wanted = readers.select(batch, inputs.text_json)
            sample.rows += span.count
            sample.selected += len(wanted)
            context = RowContext(inputs.text_json, self._model, span.start)
            for result in self._preparer.prepare(readers.prompts(batch, wanted, context, {})):
                if isinstance(result, Refused):
                    sample.count_error(inputs.files[span.file].url, result)
                    continue
                prompts.append(result.ids)
                asked = result.params.max_tokens
                sample.cut_short += asked is not None and result.requests[0].max_tokens < asked
        sample.lengths = sorted(map(len, prompts))
        sample.repeated = len(prompts) - len(set(map(tuple, prompts)))
        sample.prefix_tokens = _shared(prompts)
        return sample


def _text_files(spec: JobSpec) -> ModelFiles | None:
    if spec.tokenizer is None and spec.model == FAKE_MODEL:
        return None
    return fetch_model(spec.tokenizer or spec.model, spec.storage, weights=False)


def _context_tokens(spec: JobSpec) -> int:
    if spec.model == FAKE_MODEL:
        return spec.engine.max_model_len or FAKE_CONTEXT_TOKENS
    from batchinfer.models.config import load_config  # imports torch, which takes a second

    own = load_config(fetch_model(spec.model, spec.storage, weights=False).path).context_tokens
    return min(own, spec.engine.max_model_len or own)


def _spans(plan: JobPlan, rows: int) -> list[RowSpan]:
    """`rows` rows in a few stretches, evenly over what the job covers; all of it if that is no more."""
    if rows >= plan.rows:
        return list(plan.chunks)
    count = min(_SPANS, rows)
    spans: list[RowSpan] = []
    for place in range(count):
        index = place * plan.rows // count
        chunk = plan.chunk_of(index)
        file, start = plan.chunks[chunk].file, plan.chunks[chunk].start + index - plan.bases[chunk]
        spans.append(RowSpan(file, start, min(-(-rows // count), plan.taken[file] - start)))
    return spans


def _shared(prompts: list[list[int]]) -> int:
    """Tokens of all prompts less those of the trie that holds them: what an ideal prefix cache would reuse."""
    ordered = sorted(prompts)
    return sum(_common(left, right) for left, right in pairwise(ordered))


def _common(left: list[int], right: list[int]) -> int:
    length = min(len(left), len(right))
    return next((place for place in range(length) if left[place] != right[place]), length)


def describe_preview(found: Preview) -> str:
    """Return the preview as lines for a person."""
    plan, sample = found.draft.plan, found.sample
    files = plan.inputs.files
    size = sum(file.size for file in files)
    rows = sum(file.rows for file in files)
    noun = "file" if len(files) == 1 else "files"
    lines = [("input", f"{len(files):,} {noun}, {rows:,} rows, {size:,} bytes")]
    lines += [("", f"{file.url}  {file.format}, {file.rows:,} rows") for file in files[:_FILES_SHOWN]]
    if len(files) > _FILES_SHOWN:
        lines.append(("", f"and {len(files) - _FILES_SHOWN:,} more"))
    lines.append(("job", f"{plan.rows:,} rows in {len(plan.chunks):,} chunks of at most {max(plan.chunk_rows):,}"))
    lines += [("output", f"{found.output}  {found.draft.layout.format}, {_state(found)}")]
    lines += [("columns", ", ".join(found.draft.layout.schema.names)), *_sample_lines(sample, found.context_tokens)]
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def _state(found: Preview) -> str:
    if found.conflict is not None:
        return "exists and belongs to another job" if found.exists else "holds what is not this job's"
    if not found.exists:
        return "does not exist yet"
    return f"exists and is of this job: {found.committed:,} of {len(found.draft.plan.chunks):,} chunks committed"


def _sample_lines(sample: Sample, context: int) -> Iterator[tuple[str, str]]:
    yield "sample", f"{sample.rows:,} rows, of which {sample.selected:,} are selected"
    tokens = sum(sample.lengths)
    if sample.lengths:
        last = len(sample.lengths) - 1
        middle, high = sample.lengths[last // 2], sample.lengths[last * 95 // 100]
        yield "prompts", f"{tokens:,} tokens; shortest {sample.lengths[0]:,}, median {middle:,}, 95 % up to {high:,},"
        yield "", f"longest {sample.lengths[-1]:,}, of a context of {context:,}"
        yield (
            "too long",
            f"{sample.errors.get('too_long', 0):,} rows; {sample.cut_short:,} more get fewer than max_tokens",
        )
        yield "repeated", f"{100 * sample.repeated / len(sample.lengths):.1f} % of prompts equal an earlier one"
        yield "prefixes", f"{100 * sample.prefix_tokens / tokens:.1f} % of prompt tokens begin another prompt as well"
    errors = ", ".join(f"{kind} {count:,}" for kind, count in sample.errors.most_common())
    yield "errors", errors or "none"
    yield from (("", example) for example in sample.examples)
