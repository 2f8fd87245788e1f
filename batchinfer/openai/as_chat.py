"""Conversion of /v1/responses and /v1/messages bodies to chat requests: the part that both share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ValidationError

from batchinfer.errors import BadParameters, InvalidInput, format_value
from batchinfer.openai.request_models import ChatRequest, SamplingBody, validation_error

_CHANGES = "it would change the result"

UnsupportedFields = Mapping[str, tuple[tuple[Any, ...], str]]
"""Field → (values that change nothing and are accepted, as null is; why others are refused, or what to use)."""

# a response of these routes has one sample, and no field for the rest
_NO_FIELD: UnsupportedFields = {
    "n": ((1,), "an answer has one sample"),
    "best_of": ((1,), "an answer has one sample"),
    **dict.fromkeys(("prompt_logprobs", "logprob_token_ids"), ((), "an answer has no place for it")),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), ((False,), "an answer has no place for it")),
}


def result_changing(*names: str, neutral: tuple[Any, ...] = ()) -> UnsupportedFields:
    """Return unsupported fields that would change the result."""
    return dict.fromkeys(names, (neutral, _CHANGES))


class ChatLikeRequest(SamplingBody):
    """Body of another API that converts to a chat request.

    field_names: a chat's field → its name in this API. whole_answer: see `PromptOptions`.
    """

    field_names: ClassVar[Mapping[str, str]]
    unsupported: ClassVar[UnsupportedFields]
    whole_answer: ClassVar[bool] = True

    @abstractmethod
    def to_chat(self) -> ChatRequest:
        """Return the equivalent chat request. Raises BadParameters, InvalidInput."""

    def _build_chat(self, fields: Mapping[str, Any]) -> ChatRequest:
        """Return a chat request: `fields` over the body's sampling fields. Raises BadParameters, InvalidInput."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        for name, (neutral, why) in {**_NO_FIELD, **self.unsupported}.items():
            value = values.get(name)
            if value is not None and value not in neutral:
                raise BadParameters(f"{name} is not supported here: {why}", param=name)
        own = type(self).model_fields.keys() - SamplingBody.model_fields.keys()
        passed = {name: value for name, value in values.items() if name not in own}
        fixed = {"n": 1, "prompt_logprobs": None}  # whatever the defaults are
        try:
            return ChatRequest.model_validate({**passed, **fixed, **fields})
        except ValidationError as error:
            raise validation_error(error.errors()) from None


def text_parts(content: Any, kinds: Mapping[str, str], place: str, param: str) -> list[dict[str, Any]]:
    """Return content as a list of a chat's text parts. kinds: type of a part → its text field. Raises InvalidInput."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidInput(f"{place} must be text or a list, got {type(content).__name__}", param=param)
    parts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get(kinds[kind]) if isinstance(part, Mapping) and isinstance(kind, str) and kind in kinds else None
        if not isinstance(text, str):
            raise InvalidInput(f"{place}[{number}]: {format_value(kind)} is not supported; only text is", param=param)
        parts.append({"type": "text", "text": text})
    return parts


def collapse_parts(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return the content of a chat message: a string for a single part, else the parts."""
    return parts[0]["text"] if len(parts) == 1 else parts


def function_tool(name: Any, description: Any, parameters: Any, place: str) -> dict[str, Any]:
    """Return a tool of a chat request. Raises BadParameters."""
    if not isinstance(name, str) or not name:
        raise BadParameters(f"{place} needs a name", param="tools")
    if not isinstance(parameters, Mapping | None):
        raise BadParameters(f"{place}: the schema of {name!r} must be an object", param="tools")
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    return {
        "type": "function",
        "function": {**function, "parameters": parameters or {"type": "object", "properties": {}}},
    }
