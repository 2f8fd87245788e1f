"""What /v1/responses and /v1/messages have in common: they ask for a chat in words of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ValidationError

from batchinfer.errors import BadParameters, InvalidInput, format_value
from batchinfer.openai.request_models import ChatRequest, SamplingBody, validation_error

_CHANGES = "it would change the result"

UnsupportedFields = Mapping[str, tuple[tuple[Any, ...], str]]
"""Field → the values that ask for nothing (null never does), and why no other is taken, or what to use."""

# answers of these routes have one sample, and no place for the rest
_NO_PLACE: UnsupportedFields = {
    "n": ((1,), "an answer has one sample"),
    "best_of": ((1,), "an answer has one sample"),
    **dict.fromkeys(("prompt_logprobs", "logprob_token_ids"), ((), "an answer has no place for it")),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), ((False,), "an answer has no place for it")),
}


def result_changing(*names: str, neutral: tuple[Any, ...] = ()) -> UnsupportedFields:
    """Fields that would change the result, and are not supported."""
    return dict.fromkeys(names, (neutral, _CHANGES))


class ChatLikeRequest(SamplingBody):
    """A chat that is asked for in words of its own.

    names: a chat's field → what it is called here. whole_answer: see `Framing`.
    """

    field_names: ClassVar[Mapping[str, str]]
    unsupported: ClassVar[UnsupportedFields]
    whole_answer: ClassVar[bool] = True

    @abstractmethod
    def to_chat(self) -> ChatRequest:
        """The same in a chat's words. Raises BadParameters, InvalidInput."""

    def _build_chat(self, said: Mapping[str, Any]) -> ChatRequest:
        """Sampling fields that `said` does not name are passed on as they are. Raises BadParameters, InvalidInput."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        for name, (neutral, why) in {**_NO_PLACE, **self.unsupported}.items():
            value = given.get(name)
            if value is not None and value not in neutral:
                raise BadParameters(f"{name} is not supported here: {why}", param=name)
        own = type(self).model_fields.keys() - SamplingBody.model_fields.keys()
        passed = {name: value for name, value in given.items() if name not in own}
        alone = {"n": 1, "prompt_logprobs": None}  # whatever the defaults ask for
        try:
            return ChatRequest.model_validate({**passed, **alone, **said})
        except ValidationError as error:
            raise validation_error(error.errors()) from None


def text_parts(content: Any, kinds: Mapping[str, str], place: str, param: str) -> list[dict[str, Any]]:
    """Content as a list of a chat's text parts. kinds: type of a part → where its text is. Raises InvalidInput."""
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


def plain(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Content of a chat's message: one text as it is."""
    return parts[0]["text"] if len(parts) == 1 else parts


def function(name: Any, description: Any, parameters: Any, place: str) -> dict[str, Any]:
    """A chat's tool. Raises BadParameters."""
    if not isinstance(name, str) or not name:
        raise BadParameters(f"{place} needs a name", param="tools")
    if not isinstance(parameters, Mapping | None):
        raise BadParameters(f"{place}: the schema of {name!r} must be an object", param="tools")
    made: dict[str, Any] = {"name": name}
    if description is not None:
        made["description"] = description
    return {"type": "function", "function": {**made, "parameters": parameters or {"type": "object", "properties": {}}}}
