"""The columns of an output: which input columns ride along, which are added, and what their types are.

Added columns, each with `output.prefix` before its name: `row` (ordinal in the input file), `sample` (with
`output.samples: rows`), the answer or what was read of the prompt, its counts, the row's status and error, and where
asked token ids and logprobs.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from batchinfer.errors import SpecError
from batchinfer.io.rows import Inputs
from batchinfer.spec import JobSpec

# what reading a prompt adds, by task
READ_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "score": {"logprob": pa.float64(), "num_tokens": pa.int32(), "is_greedy": pa.bool_()},
    "choose": {"choice": pa.string(), "choice_index": pa.int32(), "scores": pa.list_(pa.float64())},
    "embed": {"embedding": pa.list_(pa.float32())},
}
BODY = "response_body"  # of openai-batch input: an answer that the other columns have no place for
_LINE_COLUMNS = ("custom_id",)
OK = "ok"
ERROR = "error"
LINE_SUFFIX = {"none": "", "gzip": ".gz", "zstd": ".zst"}


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """Columns and form of a part.

    `listed`: n samples of a row are one row of lists; `exploded`: each is a row of its own.
    """

    format: str  # parquet, jsonl or openai-batch
    compression: str  # zstd, snappy, gzip or none
    carried: tuple[str, ...]  # columns that a part has as they are: of the input, and the one of the input file
    needed: tuple[str, ...]  # input columns that a part is made from
    schema: pa.Schema  # all columns of a part, in order
    text_json: frozenset[str]  # string columns whose text is JSON
    prefix: str
    listed: bool
    exploded: bool
    file_column: str | None = None

    def has(self, name: str) -> bool:
        """Return True if this output adds the column `name` (without prefix); a carried one may have the name."""
        full = self.prefix + name
        return full in self.schema.names and full not in self.carried

    @property
    def suffix(self) -> str:
        return ".parquet" if self.format == "parquet" else ".jsonl" + LINE_SUFFIX[self.compression]

    @property
    def file_format(self) -> str:
        """Return the format for io: openai-batch lines are JSON lines whose columns the job builds."""
        return "parquet" if self.format == "parquet" else "jsonl"


def output_layout(spec: JobSpec, inputs: Inputs) -> OutputLayout:
    """Return the layout that a job asks for. Raises SpecError for a name clash or a compression that does not fit."""
    format_ = spec.output.format or inputs.files[0].format
    compression = spec.output.compression or ("zstd" if format_ == "parquet" else "none")
    if format_ != "parquet" and compression == "snappy":
        raise SpecError("snappy is for parquet; JSON lines take zstd, gzip or none", key="output.compression")
    exploded = spec.output.samples == "rows"
    listed = not exploded and spec.sampling_values.get("n", 1) > 1
    file_column = spec.output.file_column
    if format_ == "openai-batch" and file_column is not None:
        raise SpecError("lines of openai-batch have no column for it; set output.format", key="output.file_column")
    if format_ == "openai-batch":
        names = ("id", "custom_id", "response", "error")
        schema = pa.schema([(name, pa.string()) for name in names])
        json_lines = frozenset({"response", "error"})
        return OutputLayout(format_, compression, (), _LINE_COLUMNS, schema, json_lines, "", False, False)
    carried = spec.input.columns or tuple(inputs.schema.names)
    added = _added(spec, listed, exploded)
    _refuse_clash(carried, added, inputs)
    fields = [inputs.schema.field(name) for name in carried]
    if file_column is not None:
        if file_column in {field.name for field in (*fields, *added)}:
            raise SpecError(f"the output has a column {file_column!r} already", key="output.file_column")
        fields.append(pa.field(file_column, pa.string()))
    schema = pa.schema([*fields, *added])
    tables = {spec.output.prefix + name for name in ("logprobs", "prompt_logprobs", BODY)}
    json_columns = frozenset((inputs.text_json & set(carried)) | tables)
    names = tuple(field.name for field in fields)
    prefix = spec.output.prefix
    return OutputLayout(
        format_, compression, names, carried, schema, json_columns, prefix, listed, exploded, file_column
    )


def _added(spec: JobSpec, listed: bool, exploded: bool) -> list[pa.Field]:
    text = pa.list_(pa.string()) if listed else pa.string()
    ids = pa.list_(pa.int32())
    fields = [("row", pa.int64())]
    if exploded:
        fields.append(("sample", pa.int32()))
    read = READ_COLUMNS.get(spec.task)
    fields += [("response", text), ("finish_reason", text)] if read is None else list(read.items())
    fields += [("prompt_tokens", pa.int32()), ("completion_tokens", pa.int32())]
    fields += [("status", pa.string()), ("error_type", pa.string()), ("error", pa.string())]
    if spec.output.token_ids:
        fields.append(("prompt_token_ids", ids))
    if spec.output.token_ids and read is None:
        fields.append(("token_ids", pa.list_(ids) if listed else ids))
    # rows may ask for logprobs of their own through their overrides or bodies
    rows_may_ask = spec.sampling_column is not None or spec.input.format == "openai-batch"
    asked = any(spec.sampling_values.get(name) is not None for name in ("logprobs", "logprob_token_ids"))
    if asked or rows_may_ask:
        fields.append(("logprobs", pa.string()))
    if spec.sampling_values.get("prompt_logprobs") is not None or rows_may_ask:
        fields.append(("prompt_logprobs", pa.string()))
    if spec.input.format == "openai-batch":
        fields.append((BODY, pa.string()))
    return [pa.field(spec.output.prefix + name, kind) for name, kind in fields]


def _refuse_clash(carried: tuple[str, ...], added: list[pa.Field], inputs: Inputs) -> None:
    clashes = sorted(set(carried) & {field.name for field in added})
    if clashes:
        names = ", ".join(repr(name) for name in clashes)
        raise SpecError(
            f"the input already has {'columns' if len(clashes) > 1 else 'a column'} named {names} "
            f"({inputs.files[0].url}), which this job would add; set output.prefix (for example 'model_'), "
            "or leave them out with input.columns",
            key="output",
        )
