"""From a request's fields to sampling parameters. What would change the result and is not supported is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from batchinfer.errors import BadParameters
from batchinfer.request import SamplingParams
from batchinfer.server.errors import ApiError, bad_request, of_row
from batchinfer.server.schemas import ChatRequest, CompletionRequest, SamplingBody
from batchinfer.structured import from_response_format

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
FIELDS = frozenset(field.name for field in fields(SamplingParams))
_PARAMS = (*FIELDS, "max_completion_tokens", "top_logprobs", "response_format")

# field → the values that ask for nothing (null never does); anything else would change the result
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
_INSTEAD = {name: "use structured_outputs" for name in _UNSUPPORTED if name.startswith("guided_")}
_INSTEAD |= {"functions": "use tools", "function_call": "use tool_choice"}


def completion_params(body: CompletionRequest, defaults: SamplingParams) -> SamplingParams:
    """Raises ApiError."""
    values = _common(body)
    values["max_tokens"] = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if body.echo and body.logprobs is not None:
        values["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return _make(values, defaults)


def chat_params(
    body: ChatRequest, defaults: SamplingParams, forced: dict[str, Any] | None = None, keep_special: bool = False
) -> SamplingParams:
    """`forced` are structured_outputs that a tool_choice asks for; `keep_special`: special tokens may mark tool calls.

    Raises ApiError.
    """
    values = _common(body)
    if keep_special:
        values["skip_special_tokens"] = False
    if body.max_completion_tokens is not None:  # it replaced max_tokens, and some clients send both
        values["max_tokens"] = body.max_completion_tokens
    values.pop("logprobs", None)
    if body.logprobs:
        values["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise bad_request("top_logprobs goes with logprobs: true", "top_logprobs")
    if forced is not None:
        if "structured_outputs" in values:
            raise bad_request("tool_choice decides the form of the answer: leave response_format out", "tool_choice")
        values["structured_outputs"] = forced
    return _make(values, defaults)


def _common(body: SamplingBody) -> dict[str, Any]:
    given = body.model_dump(exclude_none=True, include=set(FIELDS))
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            tail = f": {_INSTEAD[name]}" if name in _INSTEAD else ", and it would change the result"
            raise bad_request(f"{name} is not supported{tail}", name)
    extra = body.model_extra or {}
    if getattr(body, "echo", None) and "echo" in extra:
        raise bad_request("echo is not supported in chats, and it would change the result", "echo")
    if body.best_of not in (None, body.n or 1):
        raise bad_request(f"best_of must equal n, got {body.best_of}: samples are not ranked", "best_of")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options goes with stream: true", "stream_options")
    try:
        constraint = from_response_format(body.response_format)
    except BadParameters as error:
        raise bad_request(str(error), "response_format") from None
    if constraint is not None:
        if "structured_outputs" in given:
            raise bad_request("give response_format or structured_outputs, not both", "response_format")
        given["structured_outputs"] = constraint
    return given


def _make(values: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    try:
        return SamplingParams.from_mapping(values, defaults)
    except BadParameters as error:
        raise of_row(error, _PARAMS) from None


def check_room(params: SamplingParams, prompt_tokens: int, context: int) -> None:
    """An answer that was asked for must fit: it is not shortened in silence. Raises ApiError."""
    if params.max_tokens is not None and prompt_tokens + params.max_tokens > context:
        raise ApiError(
            400,
            f"this model's context is {context} tokens; the prompt has {prompt_tokens} and max_tokens asks for "
            f"{params.max_tokens} more",
            param="max_tokens",
            code="context_length_exceeded",
        )
