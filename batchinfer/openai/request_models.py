"""What clients send. Other fields are accepted and kept: `params` refuses those that it must not ignore."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from batchinfer.errors import InvalidInput
from batchinfer.numeric import to_integer
from batchinfer.pipeline.encoding import SpecialTokens

TruncationSide = Literal["left", "right"]
Whole = Annotated[int, BeforeValidator(to_integer)]  # 5.0 is one: JSON has but one kind of number
TokenIds = list[Annotated[int, Field(ge=0)]]


class RequestBody(BaseModel):
    """Numbers are numbers and texts are texts: nothing is converted.

    null asks for nothing where a field can ask for something (stop, logprobs, response_format, …), whatever the
    defaults of the job or the server ask for. A number that always has a value (temperature, n, …) is the default then.
    """

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class StreamOptions(RequestBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(RequestBody):
    """What completions and chat have in common. The names and meanings of sampling fields are vLLM's."""

    model: str | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    n: Whole | None = None
    best_of: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Whole] | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[Whole] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Whole | None = None
    logprob_token_ids: list[Whole] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    special_tokens: SpecialTokens | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: TruncationSide | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionRequest(SamplingBody):
    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool | None = None
    logprobs: Whole | None = None
    suffix: str | None = None


class Message(RequestBody):
    """One message of a chat; `content` is text or a list of parts of type text."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatRequest(SamplingBody):
    messages: list[Message]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class EmbeddingRequest(RequestBody):
    input: str | TokenIds | list[str] | list[TokenIds]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None
    pooling: Literal["mean", "last", "cls"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    special_tokens: SpecialTokens | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: TruncationSide | None = None
    user: str | None = None


class TokenizeRequest(RequestBody):
    """`prompt`, or `messages` through the chat template."""

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
    model: str | None = None
    tokens: TokenIds


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


def validation_error(problems: Sequence[Any]) -> InvalidInput:
    """The first of pydantic's problems with a body, path or query, as the error that names its field."""
    first = _place(problems[0])[:1]
    # of a field that can be several things, the one that fits furthest
    problem = max((other for other in problems if _place(other)[:1] == first), key=lambda other: len(_place(other)))
    if problem["type"] == "json_invalid":
        return InvalidInput(f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    path = _place(problem)
    if not path:
        return InvalidInput("the body must be a JSON object, with content type application/json")
    param = str(path[0])
    place = param + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[1:])
    others = {str(_place(other)[:1]) for other in problems} - {str(path[:1])}
    tail = f" ({len(others)} more fields are wrong)" if others else ""
    same = [other for other in problems if _place(other) == path]
    return InvalidInput(f"{place}: {_words(problem, same)}{tail}", param=param)


_WANTED = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
    "string_type": "a string",
    "list_type": "a list",
}
_SHOWN = 60  # characters of a value


def _words(problem: Any, same: Sequence[Any]) -> str:
    """What a field must be; of one that can be several things pydantic has a problem for each: `same`."""
    limits = problem.get("ctx", {})
    if problem["type"] == "missing":
        return "is required"
    wanted = [_WANTED[other["type"]] for other in same if other["type"] in _WANTED]
    if "ge" in limits or "le" in limits:
        wanted = [f"at least {limits['ge']}" if "ge" in limits else f"at most {limits['le']}"]
    elif problem["type"] == "literal_error":
        wanted = [limits["expected"]]
    if not wanted:
        return str(problem["msg"])
    got = json.dumps(problem["input"], ensure_ascii=False, default=str)
    got = got if len(got) <= _SHOWN else f"{got[:_SHOWN]}…"
    return f"must be {' or '.join(dict.fromkeys(wanted))}, got {got}"


def _place(problem: Any) -> list[Any]:
    """Field, index and so on; less where a route found the body."""
    return [part for part in problem["loc"] if part not in ("body", "query", "path") and not _is_branch(part)]


def _is_branch(part: Any) -> bool:
    """Whether a part of a problem's place is pydantic's name of a union's branch, and no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "dict", "list"))
