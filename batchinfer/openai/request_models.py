"""Request bodies: the fields of each route and their types.

Unknown fields are accepted and kept; `sampling_fields` refuses unsupported ones that would change the result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from batchinfer.errors import InvalidInput
from batchinfer.numeric import to_integer
from batchinfer.pipeline.encoding import SpecialTokens

TruncationSide = Literal["left", "right"]
WholeNumber = Annotated[int, BeforeValidator(to_integer)]  # 5.0 is one: JSON has but one kind of number
TokenIds = list[Annotated[int, Field(ge=0)]]


class RequestBody(BaseModel):
    """Base of all bodies: strict types, nothing is converted.

    null switches off an optional feature (stop, logprobs, response_format, …), even if the defaults of the job or the
    server switch it on. For a number that always has a value (temperature, n, …) null means the default.
    """

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class StreamOptions(RequestBody):
    """Options of a streamed reply: `usage` in the last chunk, or in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(RequestBody):
    """Fields that completions and chats share. Names and meanings of sampling fields are vLLM's."""

    model: str | None = None
    max_tokens: WholeNumber | None = None
    min_tokens: WholeNumber | None = None
    n: WholeNumber | None = None
    best_of: WholeNumber | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: WholeNumber | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: WholeNumber | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[WholeNumber] | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[WholeNumber] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: WholeNumber | None = None
    logprob_token_ids: list[WholeNumber] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    special_tokens: SpecialTokens | None = None
    truncate_prompt_tokens: WholeNumber | None = None
    truncation_side: TruncationSide | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionRequest(SamplingBody):
    """Body of /v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool | None = None
    logprobs: WholeNumber | None = None
    suffix: str | None = None


class Message(RequestBody):
    """Chat message; `content` is text or a list of parts of type text."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatRequest(SamplingBody):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: WholeNumber | None = None
    logprobs: bool | None = None
    top_logprobs: WholeNumber | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class EmbeddingRequest(RequestBody):
    """Body of /v1/embeddings. input: a text, token ids, or a list of either."""

    input: str | TokenIds | list[str] | list[TokenIds]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: WholeNumber | None = None
    pooling: Literal["mean", "last", "cls"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    special_tokens: SpecialTokens | None = None
    truncate_prompt_tokens: WholeNumber | None = None
    truncation_side: TruncationSide | None = None
    user: str | None = None


class TokenizeRequest(RequestBody):
    """Body of /tokenize: either `prompt`, or `messages`, which go through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    special_tokens: SpecialTokens | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(RequestBody):
    """Body of /detokenize."""

    model: str | None = None
    tokens: TokenIds


class ErrorDetail(BaseModel):
    """Error object. param: the field at fault. code: the error's name for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every response with status 400 or higher."""

    error: ErrorDetail


def validation_error(problems: Sequence[Any]) -> InvalidInput:
    """Return the error for the first invalid field of a body, path or query, from pydantic's list of problems."""
    first = _place(problems[0])[:1]
    # a field of a union type has a problem per branch: report the one that got furthest into the value
    problem = max((other for other in problems if _place(other)[:1] == first), key=lambda other: len(_place(other)))
    if problem["type"] == "json_invalid":
        return InvalidInput(f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    path = _place(problem)
    if not path:
        return InvalidInput("the body must be a JSON object, with content type application/json")
    param = str(path[0])
    place = param + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[1:])
    other_fields = {str(_place(other)[:1]) for other in problems} - {str(path[:1])}
    tail = f" ({len(other_fields)} more fields are wrong)" if other_fields else ""
    same = [other for other in problems if _place(other) == path]
    return InvalidInput(f"{place}: {_explain(problem, same)}{tail}", param=param)


_EXPECTED = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
    "string_type": "a string",
    "list_type": "a list",
}
_MAX_VALUE_CHARS = 60  # of a value in a message


def _explain(problem: Any, same: Sequence[Any]) -> str:
    """Return what a field must be. same: the problems of all branches of a union at this field."""
    limits = problem.get("ctx", {})
    if problem["type"] == "missing":
        return "is required"
    expected = [_EXPECTED[other["type"]] for other in same if other["type"] in _EXPECTED]
    if "ge" in limits or "le" in limits:
        expected = [f"at least {limits['ge']}" if "ge" in limits else f"at most {limits['le']}"]
    elif problem["type"] == "literal_error":
        expected = [limits["expected"]]
    if not expected:
        return str(problem["msg"])
    got = json.dumps(problem["input"], ensure_ascii=False, default=str)
    got = got if len(got) <= _MAX_VALUE_CHARS else f"{got[:_MAX_VALUE_CHARS]}…"
    return f"must be {' or '.join(dict.fromkeys(expected))}, got {got}"


def _place(problem: Any) -> list[Any]:
    """Return the path to the value (field, index, …), without the parts that FastAPI and pydantic add."""
    return [part for part in problem["loc"] if part not in ("body", "query", "path") and not _is_branch(part)]


def _is_branch(part: Any) -> bool:
    """Return True if a part of a path is pydantic's name for a branch of a union, not a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "dict", "list"))
