"""Rows into prompts: templates, message and prompt columns, openai-batch bodies, and per-row sampling parameters.

Whatever is wrong with a row becomes that row's error; nothing that a row holds raises out of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from batchinfer.errors import BadParameters, InvalidInput, RowError, TemplateError
from batchinfer.io.rows import Inputs, RowBatch, rows_of
from batchinfer.job.plan import check_columns, check_type
from batchinfer.job.prompt_cells import chat_messages, parse_json, ready_prompt
from batchinfer.openai.parse import ModelFacts, ParsedRequest, parse_body, parse_request
from batchinfer.pipeline.encoding import Content, PromptOptions
from batchinfer.pipeline.prompt import Prompt, mix
from batchinfer.pipeline.scoring import Continuations, Measure, Pooled, Read, Rolling
from batchinfer.request import SamplingParams
from batchinfer.spec import JobSpec, PromptSpec
from batchinfer.text.control import ControlTokens
from batchinfer.text.row_template import RowFilter, RowTemplate
from batchinfer.values.plain import to_json_value

Row = Mapping[str, Any]
_SLICE_ROWS = 256  # rows that are Python objects at once
_NO_CONTROL = ControlTokens()
_REMEMBERED = 1024  # distinct per-row overrides whose parsed form is kept


class RowContext(NamedTuple):
    """Facts that the rows of a batch share. base: index in the job of the row at offset 0. seed: the job's."""

    text_json: frozenset[str]
    model: ModelFacts
    base: int = 0
    seed: int = 0


class LineRequest(NamedTuple):
    """The request of an openai-batch row: its url and, if the row is right, the parsed body."""

    url: Any
    parsed: ParsedRequest | None


class RowPrompts:
    """The compiled prompt section of a job. `columns`: job key → columns that it reads, once the input is known.

    Raises SpecError for a template that does not compile.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._where = RowFilter(spec.input.where, "input.where") if spec.input.where is not None else None
        self._sampling_column = spec.sampling_column
        self._many = spec.output.samples == "rows" or spec.sampling_values.get("n", 1) > 1
        self._remembered: dict[str, SamplingParams] = {}
        self.columns: dict[str, frozenset[str]] = {"input.columns": frozenset(spec.input.columns or ())}
        self._over_row: dict[str, RowTemplate | RowFilter] = {}
        if self._where is not None:
            self._add("input.where", self._where)
        if self._sampling_column is not None:
            self.columns["sampling.column"] = frozenset({self._sampling_column})
        self._types: dict[str, str] = {"sampling.column": "tm"}
        self._content, self._reads_body = self._compile(spec)
        self._read = self._compile_read(spec)
        self._options = _prompt_options(spec.prompt)
        self._allows_control = spec.prompt is not None and spec.prompt.special_tokens == "allow"

    @property
    def read_columns(self) -> frozenset[str]:
        """Columns that prompts and overrides need, not those that are only carried or filtered by."""
        return frozenset().union(*(self.columns[key] for key in self.columns if key not in ("input.columns",)))

    @property
    def whole(self) -> bool:
        """Return True if prompts may need any column of the input."""
        return any(template.whole for template in self._over_row.values())

    @property
    def filters(self) -> bool:
        return self._where is not None

    def check(self, inputs: Inputs) -> None:
        """Check that every column exists and holds what it is used for. Raises SpecError or InputError."""
        for key, template in self._over_row.items():
            self.columns[key] = template.columns(inputs.schema.names)
        check_columns(self.columns, inputs, {key: template.source for key, template in self._over_row.items()})
        any_rows = any(file.rows for file in inputs.files)
        for key, allowed in self._types.items():
            for column in self.columns.get(key, ()) if any_rows else ():
                if column not in inputs.text_json:
                    check_type(key, column, inputs, allowed)

    def select(self, batch: RowBatch, text_json: frozenset[str]) -> list[int]:
        """Offsets of the rows that `where` keeps. A row that cannot be judged is kept: its error must be seen."""
        if self._where is None:
            return list(range(batch.table.num_rows))
        kept = []
        judged = self.columns["input.where"]
        unjudged = batch.without(judged)
        for offset, row in _rows(batch.table, judged, text_json):
            if offset in unjudged:
                kept.append(offset)
                continue
            try:
                if self._where.matches(row):
                    kept.append(offset)
            except RowError as error:
                batch.errors[offset] = error
                kept.append(offset)
        return kept

    def prompts(
        self, batch: RowBatch, wanted: list[int], context: RowContext, requests: dict[int, LineRequest]
    ) -> Iterator[Prompt]:
        """Yield one prompt per row at the `wanted` offsets (ascending). Python rows exist a slice at a time.

        requests: gets the request of each openai-batch row under its index, before its prompt is yielded.
        """
        table = batch.table if len(wanted) == batch.table.num_rows else batch.table.take(pa.array(wanted, pa.int64()))
        for place, row in _rows(table, self.read_columns, context.text_json):
            index = context.base + wanted[place]
            try:
                error = batch.errors.get(wanted[place])
                if error is not None:
                    raise error
                parsed = parse_line(row, context.model) if self._reads_body else None
                prompt = self._prompt(row, index, context) if parsed is None else _body_prompt(parsed, index, context)
            except RowError as problem:
                parsed, prompt = None, Prompt(index, (), error=problem)
            except (TypeError, ValueError, OverflowError, RecursionError) as problem:
                parsed, prompt = None, Prompt(index, (), error=InvalidInput(f"cannot be read: {problem}"))
            if self._reads_body:
                requests[index] = LineRequest(row.get("url"), parsed)
            yield prompt

    def _prompt(self, row: Row, index: int, context: RowContext) -> Prompt:
        params: SamplingParams | None = None
        control = _NO_CONTROL if self._allows_control else context.model.tokenizer.control
        content = self._content(row, control)
        if self._sampling_column is not None:
            params = self._override(row[self._sampling_column], context.model.defaults)
        if params is not None and params.n > 1 and not self._many:
            raise BadParameters("n of a row above 1 needs output.samples: rows, or n above 1 in the job's sampling")
        read = None if self._read is None else self._read(row, control)
        key = mix(context.seed, index)
        return Prompt(index, [content], params, key, read=read, options=self._options)

    def _override(self, value: Any, defaults: SamplingParams) -> SamplingParams | None:
        if value is None:
            return None
        what = f"column {self._sampling_column!r}"
        value = to_json_value(value, what)
        key = repr(value)  # as JSON, values of several types would be one
        if key in self._remembered:
            return self._remembered[key]
        values = parse_json(value, what) if isinstance(value, str) else value
        if not isinstance(values, dict):
            raise BadParameters(f"{what} must hold a mapping of sampling parameters")
        params = SamplingParams.from_mapping(values, defaults)
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        self._remembered[key] = params
        return params

    def _compile(self, spec: JobSpec) -> tuple[Callable[[Row, ControlTokens], Content], bool]:
        """Return the function from a row to its content, and True if rows are openai-batch lines instead."""
        prompt = spec.prompt
        if prompt is None:
            self.columns["input.format"] = frozenset({"url", "body"})
            return _no_content, True
        if prompt.template is not None:
            return self._ready_text("prompt.template", prompt.template), False
        if prompt.user is not None:
            user = self._text("prompt.user", prompt.user)
            if prompt.system is None:
                return lambda row, _: [{"role": "user", "content": user(row)}], False
            system = self._text("prompt.system", prompt.system)
            return _with_system(system, user), False
        if prompt.messages is not None:
            column = prompt.messages
            self.columns["prompt.messages"], self._types["prompt.messages"] = frozenset({column}), "tl"
            return lambda row, _: chat_messages(row[column], f"column {column!r}"), False
        name = str(prompt.column)
        self.columns["prompt.column"], self._types["prompt.column"] = frozenset({name}), "ti"
        return lambda row, _: ready_prompt(row[name], f"column {name!r}"), False

    def _compile_read(self, spec: JobSpec) -> Callable[[Row, ControlTokens], Read] | None:
        """Return how a row's prompt is scored or embedded; None if it is answered."""
        if spec.task == "generate":
            return None
        score, embed = spec.score, spec.embed
        if spec.task == "embed":
            pooled = Pooled(embed.pooling, embed.normalize)
            return lambda row, _: pooled
        if spec.task == "score":
            if score.continuation is None:
                return lambda row, _: Rolling()
            continuation = self._ready_text("score.continuation", score.continuation)
            return lambda row, control: Continuations((continuation(row, control),))
        if score.choices is not None:
            choices = [self._ready_text(f"score.choices[{number}]", text) for number, text in enumerate(score.choices)]
            return lambda row, control: Continuations(tuple(one(row, control) for one in choices), score.measure)
        column = str(score.choices_column)
        self.columns["score.choices_column"] = frozenset({column})
        self._types["score.choices_column"] = "tl"
        return lambda row, control: _choices(row[column], column, score.measure, control)

    def _ready_text(self, key: str, source: str) -> Callable[[Row, ControlTokens], str]:
        """Compile a template whose text is tokenized as it is: control tokens in it count, those in a row are text."""
        render = self._text(key, source)
        return lambda row, control: control.write(row, render, source)

    def _add(self, key: str, template: RowTemplate | RowFilter) -> None:
        self._over_row[key] = template
        self.columns[key] = template.columns(())

    def _text(self, key: str, source: str) -> Callable[[Row], str]:
        template = RowTemplate(source, key)
        self._add(key, template)

        def render(row: Row) -> str:
            text: str = template.render(row)
            if not text.strip():
                nulls = sorted(column for column in self.columns[key] if row[column] is None)
                why = f": column {nulls[0]!r} is null" if nulls else ""
                what = "prompt" if key.startswith("prompt") else "text"
                raise InvalidInput(f"{key}: the {what} is empty{why}")
            return text

        return render


def _body_prompt(parsed: ParsedRequest, index: int, context: RowContext) -> Prompt:
    key = mix(context.seed, index)
    return Prompt(index, parsed.contents, parsed.params, key, read=parsed.pooling, options=parsed.options)


def parse_line(row: Row, model: ModelFacts) -> ParsedRequest:
    """Return what an openai-batch line asks for. Raises InvalidInput, BadParameters."""
    body = row["body"]
    return parse_request(parse_body(row["url"], parse_json(body, "body") if isinstance(body, str) else body), model)


def _choices(value: Any, column: str, measure: Measure, control: ControlTokens) -> Continuations:
    """Return the choices that a column holds: a list of texts, or its JSON text."""
    value = to_json_value(value, f"column {column!r}")
    if isinstance(value, str):
        value = parse_json(value, f"column {column!r}")
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise InvalidInput(f"column {column!r} must hold a list of texts, none of them empty")
    return Continuations(tuple(map(control.literal, value)), measure)


def _prompt_options(prompt: PromptSpec | None) -> PromptOptions | None:
    """Return the options that the job sets for its prompts; None if it sets none."""
    if prompt is None:
        return None
    ready = prompt.template is not None or prompt.column is not None
    special = ready if prompt.add_special_tokens is None else prompt.add_special_tokens
    # a row fills in a template: that the text as a whole is none would be the template's control tokens as well
    tokens = prompt.special_tokens if prompt.template is None else None
    options = PromptOptions(special, special_tokens=tokens, continues=prompt.continue_final_message)
    return None if options == PromptOptions(ready) else options


def _with_system(system: Callable[[Row], str], user: Callable[[Row], str]) -> Callable[[Row, ControlTokens], Content]:
    def messages(row: Row, _: ControlTokens) -> Content:
        return [{"role": "system", "content": system(row)}, {"role": "user", "content": user(row)}]

    return messages


def _no_content(row: Row, _: ControlTokens) -> Content:
    raise TemplateError("an openai-batch line has no template")


def _rows(table: pa.Table, columns: frozenset[str], text_json: frozenset[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    names = [name for name in table.column_names if name in columns]
    for start in range(0, table.num_rows, _SLICE_ROWS):
        piece = table.slice(start, min(_SLICE_ROWS, table.num_rows - start))  # not cut to a table without columns
        yield from enumerate(rows_of(piece, names, text_json), start)
