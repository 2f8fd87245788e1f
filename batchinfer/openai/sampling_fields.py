"""Sampling parameters from the fields of a body. Unsupported fields that would change the result are refused."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, Literal, NamedTuple

from batchinfer.errors import BadParameters, InvalidInput, RowError, TooLong
from batchinfer.openai.request_models import ChatRequest, CompletionRequest, SamplingBody
from batchinfer.request import SamplingParams
from batchinfer.structured import from_response_format

# null switches these off, whatever the defaults are
_OFF_WITH_NULL = frozenset(
    {
        *("stop", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids"),
        *("seed", "logprobs", "prompt_logprobs", "logprob_token_ids"),
    }
)
COMPLETION_TOKENS = 16  # OpenAI's default max_tokens of /v1/completions
_REQUEST_ERRORS = (BadParameters.kind, InvalidInput.kind)
FIELDS = frozenset(field.name for field in fields(SamplingParams))

# field → values that change nothing and are accepted, as null is
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
    """Return the body's sampling parameters, with `defaults` for what it leaves out. Raises BadParameters."""
    overrides = _overrides(body)
    values = overrides.values
    if defaults.max_tokens is None:
        values.setdefault("max_tokens", COMPLETION_TOKENS)
    logprobs = effective_value(body, "logprobs", defaults)
    _check_token_ids(overrides, logprobs)
    if body.max_tokens == 0 and body.logprob_token_ids is None:  # the defaults name tokens of an answer
        overrides.without.add("logprob_token_ids")
    if body.echo and logprobs is not None:
        values["prompt_logprobs"] = max(logprobs, effective_value(body, "prompt_logprobs", defaults) or 0)
    if is_echo_only(body, defaults):  # the engine needs some work: it computes the prompt
        values |= {"max_tokens": 0, "min_tokens": 0, "prompt_logprobs": 0}
    return overrides.apply_to(defaults)


def is_echo_only(body: CompletionRequest, defaults: SamplingParams) -> bool:
    """Return True if the client wants the prompt echoed and nothing else."""
    logprobs = (effective_value(body, name, defaults) for name in ("logprobs", "prompt_logprobs"))
    return bool(body.echo) and body.max_tokens == 0 and all(value is None for value in logprobs)


def effective_value(
    body: CompletionRequest, name: Literal["logprobs", "prompt_logprobs"], defaults: SamplingParams
) -> Any:
    """Return the body's value, null included, or the default if the body leaves the field out."""
    return getattr(body if name in body.model_fields_set else defaults, name)


def chat_params(
    body: ChatRequest, defaults: SamplingParams, constraint: dict[str, Any] | None = None, keep_special: bool = False
) -> SamplingParams:
    """Return the chat's sampling parameters, with `defaults` for what it leaves out. Raises BadParameters.

    constraint: structured_outputs that tool_choice needs. keep_special: special tokens may mark tool calls.
    """
    overrides = _overrides(body)
    values = overrides.values
    if keep_special:
        values["skip_special_tokens"] = False
    if body.max_completion_tokens is not None:  # the newer name of max_tokens; some clients send both
        values["max_tokens"] = body.max_completion_tokens
    values["logprobs"] = _chat_logprobs(body, defaults)
    _check_token_ids(overrides, values["logprobs"])
    if values["logprobs"] is None:
        overrides.without.add("logprobs")
    if constraint is not None:
        if "structured_outputs" in values:
            problem = "tool_choice decides the form of the answer: leave response_format out"
            raise BadParameters(problem, param="tool_choice")
        values["structured_outputs"] = constraint
    return overrides.apply_to(defaults)


def _chat_logprobs(body: ChatRequest, defaults: SamplingParams) -> int | None:
    """Return the number of alternatives per token, None without logprobs; the default if the body leaves it out."""
    present = body.model_fields_set
    enabled = bool(body.logprobs) if "logprobs" in present else defaults.logprobs is not None
    if not enabled:
        if body.top_logprobs:
            raise BadParameters("top_logprobs goes with logprobs: true", param="top_logprobs")
        return None
    return (body.top_logprobs if "top_logprobs" in present else defaults.logprobs) or 0


def _check_token_ids(overrides: _Overrides, logprobs: int | None) -> None:
    """Refuse logprob_token_ids without logprobs, and drop those of the defaults. Raises BadParameters."""
    if logprobs is not None:
        return
    if "logprob_token_ids" in overrides.values:
        raise BadParameters("logprob_token_ids goes with logprobs", param="logprob_token_ids")
    overrides.without.add("logprob_token_ids")


class _Overrides(NamedTuple):
    """Sampling values of a body, and fields `without` their default: the body switches them off."""

    values: dict[str, Any]
    without: set[str]

    def apply_to(self, defaults: SamplingParams) -> SamplingParams:
        try:
            return SamplingParams.from_mapping(self.values, defaults, self.without)
        except BadParameters as error:
            raise BadParameters(str(error), param=_named_field(str(error))) from None


def _overrides(body: SamplingBody) -> _Overrides:
    _refuse_unsupported(body)
    values = body.model_dump(exclude_none=True, include=set(FIELDS))
    without = {name for name in _OFF_WITH_NULL & body.model_fields_set if getattr(body, name) is None}
    try:
        constraint = from_response_format(body.response_format)
    except BadParameters as error:
        raise BadParameters(str(error), param="response_format") from None
    if constraint is not None:
        if "structured_outputs" in values:
            raise BadParameters("give response_format or structured_outputs, not both", param="response_format")
        values["structured_outputs"] = constraint
    if {"response_format", "structured_outputs"} & body.model_fields_set:  # null, and type text, mean no constraint
        without.add("structured_outputs")
    return _Overrides(values, without)


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
    """Return the field at fault: the error's own `param`, or the first sampling parameter that its message names."""
    if error.param is not None:
        return error.param
    return (
        "prompt" if isinstance(error, TooLong) else _named_field(str(error)) if error.kind in _REQUEST_ERRORS else None
    )


def _named_field(message: str) -> str | None:
    return next((word for word in re.findall(r"\w+", message) if word in FIELDS), None)
