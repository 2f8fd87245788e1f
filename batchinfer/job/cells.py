"""Chat messages and openai-batch bodies: from what a row holds to a prompt and its sampling parameters.

A field that would change the result and is not supported is a BadParameters error of that row, as is an unknown one:
a misspelled `temperature` must not pass in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from batchinfer.errors import BadParameters, InvalidInput, suggest
from batchinfer.request import SamplingParams
from batchinfer.structured import StructuredOutputs, from_response_format
from batchinfer.text.messages import text_of

Content = str | list[int] | list[dict[str, Any]]
CHAT = "/chat/completions"
COMPLETIONS = "/completions"

_SAMPLING = frozenset(SamplingParams.__dataclass_fields__) - {"logprobs", "prompt_logprobs"}
# how an answer is delivered, billed or labelled, never what it is
_HARMLESS = frozenset(
    {"model", "messages", "prompt", "user", "metadata", "store", "service_tier", "stream", "stream_options"}
    | {"safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}
)
# field → the values that ask for nothing special
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_RENAMED = frozenset({"max_completion_tokens", "logprobs", "top_logprobs", "response_format"})
_KNOWN = _SAMPLING | _HARMLESS | _RENAMED | frozenset(_NEUTRAL)


def parse_json(text: str, what: str) -> Any:
    """Raises InvalidInput."""
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{what} is not JSON: {error}") from None


def chat_messages(value: Any, what: str) -> list[dict[str, Any]]:
    """Messages as chat templates take them: content parts of type text joined, absent keys left out.

    `value` is a list of mappings, or its JSON text. Raises InvalidInput that names the message.
    """
    if isinstance(value, str):
        value = parse_json(value, what)
    if value is None:
        raise InvalidInput(f"{what} is null")
    if not isinstance(value, list) or not value:
        raise InvalidInput(f"{what} must be a non-empty list of messages")
    return [_message(message, f"{what}, message {number}") for number, message in enumerate(value, 1)]


def _message(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidInput(f"{what}: must be a mapping with role and content")
    kept = {name: value for name, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str):
        raise InvalidInput(f"{what}: has no role")
    content = kept.get("content")
    if isinstance(content, list):
        kept["content"] = "".join(text_of(part, what) for part in content)
    elif content is None and (kept.get("tool_calls") or kept.get("function_call")):
        kept["content"] = None
    elif not isinstance(content, str):
        raise InvalidInput(f"{what}: content must be text, got {'null' if content is None else type(content).__name__}")
    return kept


def parse_body(url: Any, body: Any, defaults: SamplingParams) -> tuple[Content, SamplingParams]:
    """The request of one openai-batch line. Raises InvalidInput or BadParameters."""
    if not isinstance(url, str) or not url.endswith(COMPLETIONS):
        raise InvalidInput(f"url {url!r} is not supported: /v1/chat/completions and /v1/completions are")
    if isinstance(body, str):
        body = parse_json(body, "body")
    if not isinstance(body, dict):
        raise InvalidInput("body must be a JSON object")
    chat = url.endswith(CHAT)
    content: Content = chat_messages(body.get("messages"), "messages") if chat else _ready_prompt(body.get("prompt"))
    return content, SamplingParams.from_mapping(_sampling_values(body, chat), defaults)


def _ready_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    return ready_prompt(prompt, "prompt")


def ready_prompt(value: Any, what: str) -> str | list[int]:
    """A prompt as it is: text, or token ids. Raises InvalidInput."""
    if value is None:
        raise InvalidInput(f"{what} is null")
    if isinstance(value, str):
        if not value.strip():
            raise InvalidInput(f"{what}: the prompt is empty")
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        if not value:
            raise InvalidInput(f"{what}: the prompt is empty")
        return value
    raise InvalidInput(f"{what} must be text or a list of token ids, got {type(value).__name__}")


def _sampling_values(body: dict[str, Any], chat: bool) -> dict[str, Any]:
    for name, value in body.items():
        if name not in _KNOWN:
            raise BadParameters(f"unknown field {name!r} in body{suggest(name, _KNOWN)}")
        if value is not None and name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise BadParameters(f"{name} is not supported: it would change the result")
    values = {name: value for name, value in body.items() if name in _SAMPLING and value is not None}
    limit = body.get("max_completion_tokens")
    if limit is not None:
        if values.get("max_tokens", limit) != limit:
            raise BadParameters(f"max_tokens {values['max_tokens']} and max_completion_tokens {limit} differ")
        values["max_tokens"] = limit
    format_ = from_response_format(body.get("response_format"))
    if format_ is not None:
        if StructuredOutputs.of(values.get("structured_outputs")) is not None:
            raise BadParameters(
                "response_format and structured_outputs both say what the answer must look like: give one"
            )
        values["structured_outputs"] = format_
    logprobs, top = body.get("logprobs"), body.get("top_logprobs")
    if chat:
        if logprobs not in (None, True, False):
            raise BadParameters(f"logprobs must be true or false, got {logprobs!r}")
        if logprobs:
            values["logprobs"] = 0 if top is None else top
        elif top:
            raise BadParameters("top_logprobs goes with logprobs: true")
    elif logprobs is not None:
        values["logprobs"] = logprobs
    return values
