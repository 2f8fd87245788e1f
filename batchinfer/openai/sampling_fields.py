"""From a body's fields to sampling parameters. What would change the result and is not supported is refused."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, Literal, NamedTuple

from batchinfer.errors import BadParameters, InvalidInput, RowError, TooLong
from batchinfer.openai.request_models import ChatRequest, CompletionRequest, SamplingBody
from batchinfer.request import SamplingParams
from batchinfer.structured import from_response_format

# null takes back what the defaults ask for
_TAKEN_BACK = frozenset(
    {
        *("stop", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids"),
        *("seed", "logprobs", "prompt_logprobs", "logprob_token_ids"),
    }
)
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions, where neither the request nor the job says how many
_FAULTS = (BadParameters.kind, InvalidInput.kind)  # of the request
FIELDS = frozenset(field.name for field in fields(SamplingParams))

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
    "prompt_logprob_token_ids": (),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "chat_template": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
_INSTEAD = {name: "use structured_outputs" for name in _UNSUPPORTED if name.startswith("guided_")}
_INSTEAD |= {"functions": "use tools", "function_call": "use tool_choice"}


def completion_params(body: CompletionRequest, defaults: SamplingParams) -> SamplingParams:
    """`defaults` lie beneath what the body says. Raises BadParameters."""
    given = _common(body)
    values = given.values
    if defaults.max_tokens is None:
        values.setdefault("max_tokens", COMPLETION_TOKENS)
    logprobs = effective_value(body, "logprobs", defaults)
    _check_named(given, logprobs)
    if body.max_tokens == 0 and body.logprob_token_ids is None:  # the defaults' are about tokens of an answer
        given.without.add("logprob_token_ids")
    if body.echo and logprobs is not None:
        values["prompt_logprobs"] = max(logprobs, effective_value(body, "prompt_logprobs", defaults) or 0)
    if is_echo_only(body, defaults):  # the engine takes no request for nothing at all: it reads the prompt
        values |= {"max_tokens": 0, "min_tokens": 0, "prompt_logprobs": 0}
    return given.over(defaults)


def is_echo_only(body: CompletionRequest, defaults: SamplingParams) -> bool:
    """Whether the prompt is wanted back, and no more."""
    wanted = (effective_value(body, name, defaults) for name in ("logprobs", "prompt_logprobs"))
    return bool(body.echo) and body.max_tokens == 0 and all(value is None for value in wanted)


def effective_value(
    body: CompletionRequest, name: Literal["logprobs", "prompt_logprobs"], defaults: SamplingParams
) -> Any:
    """What the body says, null included, or else the default."""
    return getattr(body if name in body.model_fields_set else defaults, name)


def chat_params(
    body: ChatRequest, defaults: SamplingParams, forced: dict[str, Any] | None = None, keep_special: bool = False
) -> SamplingParams:
    """`forced` are structured_outputs that a tool_choice asks for; `keep_special`: special tokens may mark tool calls.

    Raises BadParameters.
    """
    given = _common(body)
    values = given.values
    if keep_special:
        values["skip_special_tokens"] = False
    if body.max_completion_tokens is not None:  # it replaced max_tokens, and some clients send both
        values["max_tokens"] = body.max_completion_tokens
    values["logprobs"] = _chat_logprobs(body, defaults)
    _check_named(given, values["logprobs"])
    if values["logprobs"] is None:
        given.without.add("logprobs")
    if forced is not None:
        if "structured_outputs" in values:
            problem = "tool_choice decides the form of the answer: leave response_format out"
            raise BadParameters(problem, param="tool_choice")
        values["structured_outputs"] = forced
    return given.over(defaults)


def _chat_logprobs(body: ChatRequest, defaults: SamplingParams) -> int | None:
    """How many alternatives each token has; None: no logprobs. The default counts where the body is silent."""
    said = body.model_fields_set
    wanted = bool(body.logprobs) if "logprobs" in said else defaults.logprobs is not None
    if not wanted:
        if body.top_logprobs:
            raise BadParameters("top_logprobs goes with logprobs: true", param="top_logprobs")
        return None
    return (body.top_logprobs if "top_logprobs" in said else defaults.logprobs) or 0


def _check_named(given: _Given, logprobs: int | None) -> None:
    """Tokens may be named where logprobs are wanted; those that the defaults name are not, where a body wants none."""
    if logprobs is not None:
        return
    if "logprob_token_ids" in given.values:
        raise BadParameters("logprob_token_ids goes with logprobs", param="logprob_token_ids")
    given.without.add("logprob_token_ids")


class _Given(NamedTuple):
    """What a body says: values, and fields `without` whose default it takes back."""

    values: dict[str, Any]
    without: set[str]

    def over(self, defaults: SamplingParams) -> SamplingParams:
        try:
            return SamplingParams.from_mapping(self.values, defaults, self.without)
        except BadParameters as error:
            raise BadParameters(str(error), param=_named_field(str(error))) from None


def _common(body: SamplingBody) -> _Given:
    _refuse_unsupported(body)
    given = body.model_dump(exclude_none=True, include=set(FIELDS))
    without = {name for name in _TAKEN_BACK & body.model_fields_set if getattr(body, name) is None}
    try:
        constraint = from_response_format(body.response_format)
    except BadParameters as error:
        raise BadParameters(str(error), param="response_format") from None
    if constraint is not None:
        if "structured_outputs" in given:
            raise BadParameters("give response_format or structured_outputs, not both", param="response_format")
        given["structured_outputs"] = constraint
    if {"response_format", "structured_outputs"} & body.model_fields_set:  # null, and text, want none
        without.add("structured_outputs")
    return _Given(given, without)


def _refuse_unsupported(body: SamplingBody) -> None:
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            tail = f": {_INSTEAD[name]}" if name in _INSTEAD else ", and it would change the result"
            raise BadParameters(f"{name} is not supported{tail}", param=name)
    extra = body.model_extra or {}
    if getattr(body, "echo", None) and "echo" in extra:
        raise BadParameters("echo is not supported in chats, and it would change the result", param="echo")
    if body.best_of not in (None, body.n or 1):
        raise BadParameters(f"best_of must equal n, got {body.best_of}: samples are not ranked", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise BadParameters("stream_options goes with stream: true", param="stream_options")


def error_param(error: RowError) -> str | None:
    """The field of a body that an error is about: as it says, or the first sampling parameter that it names."""
    if error.param is not None:
        return error.param
    return "prompt" if isinstance(error, TooLong) else _named_field(str(error)) if error.kind in _FAULTS else None


def _named_field(message: str) -> str | None:
    return next((word for word in re.findall(r"\w+", message) if word in FIELDS), None)
