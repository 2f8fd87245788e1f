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
    values = message.model_dump(exclude_none=True)
    place = f"messages[{number}]"
    if isinstance(message.content, list):
        values["content"] = "".join(_text_part(part, place) for part in message.content)
    elif message.content is None:
        if not message.tool_calls:
            raise bad_request(f"{place} has no content", "messages")
        values["content"] = ""
    if message.tool_calls:
        values["tool_calls"] = [_tool_call(call, place) for call in message.tool_calls]
    return values


def _text_part(part: dict[str, Any], place: str) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise bad_request(f"{place}: content part of type {part.get('type')!r}; only text is supported", "messages")
    return text


def _tool_call(call: dict[str, Any], place: str) -> dict[str, Any]:
    """Templates take arguments as an object; on the wire they are its JSON text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"{place}: a tool call must have a function with a name", "messages")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except ValueError:
            raise bad_request(
                f"{place}: arguments of tool call {function['name']!r} are not JSON", "messages"
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}
