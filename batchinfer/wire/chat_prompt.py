"""Chat messages and tools as chat templates take them. What a template could not show is refused, not dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from batchinfer.server.errors import bad_request
from batchinfer.server.frontend import ServedModel
from batchinfer.server.schemas import ChatRequest, Message, TokenizeRequest


def render(model: ServedModel, body: ChatRequest | TokenizeRequest, messages: Sequence[Message]) -> str:
    """The prompt, with the template's own special tokens. Raises ApiError, InvalidInput, TemplateError."""
    chat = model.parts.chat
    if chat is None:
        raise bad_request("this model has no chat template: use /v1/completions, or serve it with prompt.chat_template")
    if not messages:
        raise bad_request("messages is empty", "messages")
    values = dict(model.chat_kwargs) | (body.chat_template_kwargs or {})
    for name in ("messages", "add_generation_prompt"):
        if name in values:
            raise bad_request(f"chat_template_kwargs cannot hold {name}", "chat_template_kwargs")
    for name in ("documents", "reasoning_effort", "tool_choice"):
        if getattr(body, name, None) is not None:
            values[name] = getattr(body, name)
    if body.tools and getattr(body, "tool_choice", None) != "none":
        values["tools"] = _tools(model, body.tools)
    return chat.render([_message(message, number) for number, message in enumerate(messages)], **values)


def _tools(model: ServedModel, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if "tools" not in (model.chat_template or ""):
        raise bad_request("this model's chat template takes no tools", "tools")
    for number, tool in enumerate(tools):
        function = tool.get("function")
        named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
        if tool.get("type") != "function" or not isinstance(function, dict) or not named:
            raise bad_request(f"tools[{number}] must be of type function, with a function that has a name", "tools")
        if not isinstance(function.get("parameters", {}), dict | None):
            raise bad_request(f"tools[{number}].function.parameters must be a JSON schema (an object)", "tools")
    return tools


def _message(message: Message, number: int) -> dict[str, Any]:
    """Checked; the template's own form of content and calls is found by `ChatTemplate`."""
    place = f"messages[{number}]"
    if isinstance(message.content, list):
        for part in message.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type")
                raise bad_request(f"{place}: content part of type {kind!r}; only text is supported", "messages")
    elif message.content is None and not message.tool_calls:
        raise bad_request(f"{place} has no content", "messages")
    for call in message.tool_calls or []:
        _check_call(call, place)
    return message.model_dump(exclude_unset=True)


def _check_call(call: dict[str, Any], place: str) -> None:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"{place}: a tool call must have a function with a name", "messages")
    arguments = function.get("arguments", {})
    try:
        sound = isinstance(orjson.loads(arguments or "{}") if isinstance(arguments, str) else arguments, dict)
    except ValueError:
        sound = False
    if not sound:
        raise bad_request(f"{place}: arguments of tool call {function['name']!r} are not JSON of an object", "messages")
