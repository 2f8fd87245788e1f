"""The job file: parsed once into frozen values. Unknown keys are errors that name file, line and the nearest key.

Relative paths in a job file are relative to the working directory, as in a shell command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from batchinfer.errors import BadParameters, SpecError, format_value
from batchinfer.log import log
from batchinfer.numeric import to_integer
from batchinfer.ops.devices import AUTO, BACKENDS, check_device
from batchinfer.request import SamplingParams
from batchinfer.spec_problems import Problem, unknown_keys, wrong_value
from batchinfer.yaml_text import MAX_BYTES, Document, Place, dotted, read_yaml

FAKE_MODEL = "fake"
_INT64 = 1 << 63
ANCHORS = "x-"  # prefix of top-level keys that only hold anchors
_TEMPLATES = (
    *(("prompt", name) for name in ("template", "system", "user")),
    *(("score", name) for name in ("continuation", "choices")),
)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _to_int64(value: Any) -> Any:
    value = to_integer(value)
    if type(value) is int and not -_INT64 <= value < _INT64:
        raise ValueError(f"must fit 64 bits, got {value}")
    return value


Section = TypeVar("Section", bound=BaseModel)
StringList = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Integer = Annotated[int, BeforeValidator(_to_int64)]
"""A 64-bit integer: 5.0 is accepted; 5.5, true and "5" are not."""


class _Section(BaseModel):
    """Base of all sections, in strict mode: text is not a number, and true is not 1.

    Lists become tuples: see `StringList`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class InputSpec(_Section):
    """Input files and row selection.

    Formats follow the file name (.parquet, .jsonl, .json, with .gz or .zst) unless given.
    """

    path: StringList = Field(description="path, folder, glob or URL, or a list of them")
    format: Literal["parquet", "jsonl", "openai-batch"] | None = Field(None, description="default: from the file name")
    columns: StringList | None = Field(None, description="input columns that the output carries; default all")
    where: str | None = Field(None, description="Jinja expression over columns; rows where it is false are left out")
    limit: Integer | None = Field(None, ge=1, description="stop after this many selected rows")

    @field_validator("path")
    @classmethod
    def _require_path(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("needs at least one path")
        return value


class PromptSpec(_Section):
    """Construction of a prompt from a row: exactly one of `template`, `user`, `messages`, `column`."""

    template: str | None = Field(
        None, description="Jinja template over columns; the result is the prompt, without a chat template"
    )
    system: str | None = Field(None, description="Jinja template of the system message; goes with `user`")
    user: str | None = Field(None, description="Jinja template of the user message; formatted by the chat template")
    messages: str | None = Field(None, description="column that holds chat messages (a list, or JSON text)")
    column: str | None = Field(None, description="column that holds a ready prompt (text, or a list of token ids)")
    chat_template: str | None = Field(None, description="a Jinja chat template instead of the model's")
    chat_template_kwargs: dict[str, Any] = Field({}, description="extra variables for the chat template")
    continue_final_message: bool = Field(
        False, description="the last of `messages` stays open, and generation continues it"
    )
    special_tokens: Literal["text", "allow"] | None = Field(
        None,
        description="control tokens in row text: kept as text, or parsed (allow); default text, allow in `column`",
    )
    add_special_tokens: bool | None = Field(
        None,
        description="add BOS and similar tokens; default: only without a chat template (`template`, `column`)",
    )

    @model_validator(mode="after")
    def _require_one_source(self) -> PromptSpec:
        ways = [name for name in ("template", "user", "messages", "column") if getattr(self, name) is not None]
        if len(ways) != 1:
            got = " and ".join(ways) or "none"
            raise ValueError(f"needs exactly one of template, user, messages, column; got {got}")
        if self.system is not None and self.user is None:
            raise ValueError("system goes with user")
        if self.continue_final_message and self.messages is None:
            raise ValueError("continue_final_message goes with messages")
        if self.continue_final_message and self.chat_template_kwargs.get("add_generation_prompt"):
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self


class ScoreSpec(_Section):
    """Settings of `task: score` and `task: choose`. Without a continuation, `score` scores the whole prompt."""

    continuation: str | None = Field(None, description="task score: Jinja template of the text after the prompt")
    choices: StringList | None = Field(None, description="task choose: list of Jinja templates")
    choices_column: str | None = Field(None, description="task choose: column that holds a list of texts")
    measure: Literal["sum", "tokens", "characters"] = Field(
        "sum", description="task choose: compare summed logprobs, or per token or per character"
    )


class EmbedSpec(_Section):
    """Settings of `task: embed`: pooling of a prompt's hidden states."""

    pooling: Literal["mean", "last", "cls"] = Field(
        "mean", description="mean of all tokens' hidden states, or the last or first token's"
    )
    normalize: bool = Field(True, description="scale vectors to length 1")


class OutputSpec(_Section):
    """Output location, format and columns."""

    path: str = Field(description="directory or URL prefix; parts land in its parts/ folder")
    format: Literal["parquet", "jsonl", "openai-batch"] | None = Field(None, description="default: the input's")
    compression: Literal["zstd", "snappy", "gzip", "none"] | None = Field(
        None, description="default zstd for parquet, none for lines"
    )
    token_ids: bool = Field(False, description="add prompt_token_ids and token_ids")
    samples: Literal["list", "rows"] = Field("list", description="n > 1 as list columns, or one row per sample")
    prefix: str = Field("", description="prefix for the names of all added columns")
    file_column: str | None = Field(
        None, min_length=1, description="name of a column for the input file of each row; `row` restarts per file"
    )
    chunk_rows: Integer = Field(1000, ge=1, le=1_000_000, description="rows per part, the unit of commit")


class EngineSpec(_Section):
    """Limits and precision of the engine. None means: chosen for the model and the machine, and logged."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="type of weights and activations; default float32, on GPUs the checkpoint's. On CPUs bfloat16 is "
        "faster with AMX or AVX512_BF16",
    )
    kv_cache_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the KV cache; default: dtype. 16 bits hold twice the tokens, rounded"
    )
    quantization: Literal["int8"] | None = Field(
        None, description="int8: weights and inputs of the linear layers in 8 bits, faster and rounded"
    )
    kv_cache_tokens: Integer | None = Field(None, ge=32, description="KV cache size in tokens")
    max_num_seqs: Integer = Field(256, ge=1, le=65536, description="sequences that run concurrently")
    max_step_tokens: Integer = Field(2048, ge=1, description="tokens per step; longer prompts are prefilled in chunks")
    speculative_tokens: Integer = Field(
        4,
        ge=0,
        le=16,
        description="speculative decoding: tokens drafted per sequence and step by prompt lookup; 0: off",
    )
    max_model_len: Integer | None = Field(None, ge=1, description="context limit; default the model's")
    enable_prefix_caching: bool = Field(True, description="reuse KV blocks of shared prefixes")
    block_size: Integer = Field(16, ge=1, le=1024, description="tokens per KV block")
    device: str = Field(
        AUTO, description=f"device that computes: {AUTO} (the best that there is), {', '.join(BACKENDS)}"
    )
    num_threads: Integer | None = Field(
        None, ge=1, description="CPU threads of the model; default: cores, limited by the container's quota"
    )

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        check_device(value)
        return value


class StorageSpec(_Section):
    """Access to object storage.

    Credentials come from the environment or the usual AWS files, never from the job file.
    """

    endpoint: str | None = Field(None, description="S3 endpoint URL, for stores that are not AWS")
    region: str | None = Field(None, description="S3 region")
    anonymous: bool = Field(False, description="unsigned requests, for public buckets")
    requester_pays: bool = Field(False, description="accept the charges of requester-pays buckets")
    cache: str | None = Field(None, description="directory for copies of models from URLs; default ~/.cache/batchinfer")
    options: dict[str, Any] = Field({}, description="further keyword arguments of the fsspec filesystem")


class ErrorsSpec(_Section):
    """Error limit of a job."""

    max: int | float | None = Field(
        None,
        description="stop after more than this many failed rows (whole number) or this share of rows "
        "(up to 1.0, or '5%'); default: a job fails only if every row failed",
    )

    @field_validator("max", mode="before")
    @classmethod
    def _parse_limit(cls, value: Any) -> Any:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
        limit = float(match[1]) / 100 if match else value
        valid = type(limit) in (int, float) and 0 <= limit <= (1 if type(limit) is float else _INT64)
        if not valid and value is not None:
            raise ValueError("must be a whole number of rows, a share in [0.0, 1.0], or a percentage")
        return limit


class FakeSpec(_Section):
    """Settings of `model: fake` and `run --rehearse`: generated text depends on the request alone."""

    answer_tokens: int | tuple[int, int] = Field(40, description="tokens per answer, or [shortest, longest]")
    step_s: float = Field(0.0, ge=0, description="duration of each step, seconds")

    @field_validator("answer_tokens", mode="before")
    @classmethod
    def _parse_lengths(cls, value: Any) -> Any:
        lengths = (
            [to_integer(length) for length in value] if isinstance(value, list | tuple) else [to_integer(value)] * 2
        )
        if len(lengths) != 2 or any(type(length) is not int for length in lengths) or not 1 <= lengths[0] <= lengths[1]:
            raise ValueError("must be a positive integer, or [shortest, longest]")
        return tuple(lengths) if isinstance(value, list | tuple) else lengths[0]


class JobSpec(_Section):
    """A whole job. `sampling` takes the fields of SamplingParams, and `column`: a column of per-row overrides."""

    model: str = Field(description="directory, .gguf file, URL or Hugging Face id; 'fake' rehearses without a model")
    tokenizer: str | None = Field(None, description="tokenizer of another model; default the model's own")
    task: Literal["generate", "score", "choose", "embed"] = Field(
        "generate",
        description="generate text, score texts (logprobs), choose the best of several texts, or embed prompts",
    )
    seed: Integer = Field(0, description="seed of the job's random numbers")
    input: InputSpec
    prompt: PromptSpec | None = Field(None, description="not for openai-batch input, whose lines are requests")
    sampling: dict[str, Any] = Field({}, description="sampling parameters; the model's own defaults come first")
    score: ScoreSpec = ScoreSpec()
    embed: EmbedSpec = EmbedSpec()
    output: OutputSpec
    engine: EngineSpec = EngineSpec()
    errors: ErrorsSpec = ErrorsSpec()
    storage: StorageSpec = StorageSpec()
    fake: FakeSpec = FakeSpec()

    @field_validator("sampling")
    @classmethod
    def _check_sampling(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("column", ""), str):
            raise ValueError(f"column must be a column name, got {format_value(value['column'])}")
        try:
            SamplingParams.from_mapping({k: v for k, v in value.items() if k != "column"})
        except BadParameters as error:
            raise ValueError(str(error)) from None
        return value

    @property
    def sampling_values(self) -> dict[str, Any]:
        return {name: value for name, value in self.sampling.items() if name != "column"}

    @property
    def sampling_column(self) -> str | None:
        return self.sampling.get("column")


def load_spec(path: str | Path, overrides: dict[str, Any] | None = None) -> JobSpec:
    """Read a job file. `overrides` maps dotted keys to values, as `--set engine.max_num_seqs=64` gives them.

    Raises SpecError with file, line and key of everything that is wrong in it.
    """
    document = _read(path)
    if not isinstance(document.value, dict):
        what = "is empty" if document.value is None else f"holds {format_value(document.value)}"
        raise SpecError(f"{path}: {what}; a job file is a mapping with model, input, prompt and output")
    for place, comment in document.comments.items():
        if place[:2] in _TEMPLATES:
            key = f"{path}:{document.line(place)}: {dotted(place)}"
            log.warning(
                f"{key}: ends before {comment!r}, which YAML reads as a comment; quote the text if it is part of it"
            )
    # anchors may be defined below keys of their own
    values = {key: value for key, value in document.value.items() if not key.startswith(ANCHORS)}
    settings = overrides or {}
    for key, value in settings.items():
        _assign(values, key, value)
    return parse_spec(values, str(path), lambda place: _where(path, document, place, settings))


def parse_spec(values: dict[str, Any], source: str = "job", where: Callable[[Place], str] | None = None) -> JobSpec:
    """Validate plain values. `where` returns the position of a key for messages; default `source`. Raises SpecError."""
    at = where or (lambda _: source)
    # a section whose lines are all comments is null
    given = {key: value for key, value in values.items() if value is not None or key not in JobSpec.model_fields}
    spec = parse_section(JobSpec, given, at)
    problem = _mismatch(spec)
    if problem is not None:
        raise SpecError(_format_problems([problem], at))
    return spec


def parse_section(kind: type[Section], values: dict[str, Any], at: Callable[[Place], str]) -> Section:
    """Validate the values of one section.

    Raises SpecError with one line per problem, each prefixed with `at(place)`.
    """
    problems = list(unknown_keys(kind, values))
    if problems:
        raise SpecError(_format_problems(problems, at))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SpecError(
            _format_problems([wrong_value(kind, problem, values) for problem in error.errors()], at)
        ) from None


def _format_problems(problems: list[Problem], at: Callable[[Place], str]) -> str:
    return "\n".join(f"{at(place)}: {dotted(place) or 'job'}: {text}" for place, text in problems)


def _mismatch(spec: JobSpec) -> Problem | None:
    """Return the first key that conflicts with another key, and the reason."""
    batch = spec.input.format == "openai-batch"
    if spec.prompt is None and not batch:
        return ("prompt",), "missing; give template, user, messages or column"
    if spec.prompt is not None and batch:
        return ("prompt",), "openai-batch lines are requests already; leave it out"
    if spec.output.format == "openai-batch" and not batch:
        return ("output", "format"), "openai-batch goes with openai-batch input"
    return _task_problem(spec)


def _task_problem(spec: JobSpec) -> Problem | None:
    """Return the first key that conflicts with the task, and the reason."""
    task, score = spec.task, spec.score
    for section, tasks in (("sampling", ("generate",)), ("score", ("score", "choose")), ("embed", ("embed",))):
        if task not in tasks and getattr(spec, section) != JobSpec.model_fields[section].default:
            return (section,), f"does not go with task {task}"
    if task != "generate" and spec.input.format == "openai-batch":
        return ("task",), f"{task} does not go with openai-batch input, whose lines ask for answers"
    if task != "generate" and spec.output.samples == "rows":
        return ("output", "samples"), f"does not go with task {task}"
    ways = [name for name in ("choices", "choices_column") if getattr(score, name) is not None]
    if task == "choose" and (len(ways) != 1 or score.continuation is not None):
        return ("score",), "task choose needs exactly one of choices, choices_column, and no continuation"
    ways += ["measure"] if score.measure != "sum" else []
    if task == "score" and ways:
        return ("score", ways[0]), "goes with task choose"
    return None


def locate(path: str | Path, key: str, settings: Collection[str] = ()) -> str:
    """Return the position of a dotted key in a job file, such as `"job.yaml:12"`.

    If the file lacks the key, the position is that of its deepest parent in the file. `settings` are the keys that were
    set on top of the file; the position of such a key is `"--set"`.
    """
    try:
        document = _read(path)
    except SpecError:  # read once already: it is a pipe, or has changed since
        document = None
    return _where(path, document, tuple(re.sub(r"\[(\d+)\]", r".\1", key).split(".")), settings)


def _where(path: str | Path, document: Document | None, place: Place, settings: Collection[str]) -> str:
    key = ".".join(map(str, place))
    setting = max((one for one in settings if f"{key}.".startswith(f"{one}.")), key=len, default=None)
    if setting is None and (document is None or tuple(map(str, place)) not in document.lines):
        setting = next(
            (one for one in settings if one.startswith(f"{key}.")), None
        )  # the section exists only because of --set
    if setting is None:
        return str(path) if document is None else f"{path}:{document.line(place)}"
    return "--set" if setting == key else f"--set {setting}"


def _read(path: str | Path) -> Document:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    return read_yaml(data, str(path))


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        child = values.get(name)
        if child is None:
            child = values[name] = {}
        if not isinstance(child, dict):
            raise SpecError(f"--set {key}: {name} is not a section")
        values = child
    values[last] = value
