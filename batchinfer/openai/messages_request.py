"""Requests of /v1/messages, converted to chats: https://docs.anthropic.com/en/api/messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from batchinfer.errors import BadParameters, InvalidInput, format_value
from batchinfer.openai.as_chat import (
    ChatLikeRequest,
    UnsupportedFields,
    collapse_parts,
    function_tool,
    result_changing,
    text_parts,
)
from batchinfer.openai.request_models import ChatRequest

_ROLES = ("user", "assistant", "system")
_TEXT = {"text": "text"}
_THINKING = ("thinking", "redacted_thinking")  # left out of the prompt: of earlier turns
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class CountRequest(ChatLikeRequest):
    """Body of /v1/messages/count_tokens: the fields that decide the prompt.

    Cache breakpoints are accepted and ignored: the prefix cache needs none.
    """

    field_names: ClassVar[Mapping[str, str]] = {
        "prompt": "messages",
        "stop": "stop_sequences",
        "response_format": "output_config",
        "reasoning_effort": "output_config",
        "continue_final_message": "messages",
        "add_generation_prompt": "messages",
    }
    unsupported: ClassVar[UnsupportedFields] = {
        **result_changing("container", "prompt"),
        **result_changing("mcp_servers", neutral=([],)),
        **dict.fromkeys(("logprobs", "top_logprobs"), ((False, 0), "an answer has no place for it")),
        "stop": (([],), "use stop_sequences"),
        "max_completion_tokens": ((), "use max_tokens"),
        "response_format": ((), "use output_config.format"),
    }
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def to_chat(self) -> ChatRequest:
        return self._build_chat(self._chat_fields())

    def _chat_fields(self) -> dict[str, Any]:
        choice, config = self.tool_choice or {}, self.output_config or {}
        if (self.thinking or {}).get("type") == "enabled":
            raise BadParameters("thinking is not supported: no answer has thinking blocks", param="thinking")
        messages = _messages(self)
        fields = {
            "messages": messages,
            "logprobs": False,
            "tools": [_tool(tool, f"tools[{number}]") for number, tool in enumerate(self.tools or ())] or None,
            "tool_choice": _tool_choice(choice) if choice else None,
            "parallel_tool_calls": not choice.get("disable_parallel_tool_use", False),
            "reasoning_effort": config.get("effort"),
        }
        if config.get("format") is not None:
            fields["response_format"] = _response_format(config["format"])
        if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:  # the answer continues it
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        return fields


class MessagesRequest(CountRequest):
    """Body of /v1/messages. `max_tokens` is required; an answer ends earlier if the context is full."""

    whole_answer: ClassVar[bool] = False
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = None

    def to_chat(self) -> ChatRequest:
        if self.max_tokens is None or self.max_tokens < 1:
            got = "it is missing" if self.max_tokens is None else f"got {self.max_tokens}"
            raise BadParameters(f"max_tokens must be at least 1: {got}", param="max_tokens")
        if not all(self.stop_sequences or ()):
            raise BadParameters("stop_sequences holds an empty text", param="stop_sequences")
        fields = self._chat_fields()
        if self.stop_sequences is not None:
            fields["stop"] = self.stop_sequences
        return self._build_chat(fields)


def _messages(body: CountRequest) -> list[dict[str, Any]]:
    if not body.messages:
        raise InvalidInput("messages is empty", param="messages")
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append(
            {"role": "system", "content": collapse_parts(text_parts(body.system, _TEXT, "system", "system"))}
        )
    for number, message in enumerate(body.messages):
        place, role = f"messages[{number}]", message.get("role")
        if role not in _ROLES:
            raise InvalidInput(
                f"{place}: role must be one of {', '.join(_ROLES)}, got {format_value(role)}", param="messages"
            )
        content = message.get("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif not isinstance(content, list) or not content:
            raise InvalidInput(f"{place}: content must be text or a list of blocks", param="messages")
        elif role == "assistant":
            messages.append(_assistant_message(content, f"{place}.content"))
        else:
            messages += _split_tool_results(role, content, f"{place}.content")
    return messages


def _assistant_message(blocks: Sequence[Any], place: str) -> dict[str, Any]:
    """Return an assistant message: its text and its tool calls."""
    parts, calls = [], []
    for number, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_use":
            if not all(isinstance(block.get(name), str) for name in ("id", "name")):
                raise InvalidInput(f"{place}[{number}]: a tool_use has id and name, both text", param="messages")
            named = {"name": block["name"], "arguments": block.get("input") or {}}
            calls.append({"id": block["id"], "type": "function", "function": named})
        elif kind not in _THINKING:
            parts += text_parts([block], _TEXT, place, "messages")
    message: dict[str, Any] = {
        "role": "assistant",
        "content": collapse_parts(parts) if parts else None if calls else "",
    }
    return {**message, "tool_calls": calls} if calls else message


def _split_tool_results(role: str, blocks: Sequence[Any], place: str) -> list[dict[str, Any]]:
    """Return a user message as a message per tool result and per text between them, in order."""
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        if not (isinstance(block, Mapping) and block.get("type") == "tool_result"):
            parts += text_parts([block], _TEXT, place, "messages")
            continue
        if not isinstance(block.get("tool_use_id"), str):
            raise InvalidInput(f"{place}[{number}]: a tool_result has the tool_use_id of its call", param="messages")
        if parts:
            messages.append({"role": role, "content": collapse_parts(parts)})
            parts = []
        content = block.get("content")
        texts = text_parts("" if content is None else content, _TEXT, f"{place}[{number}].content", "messages")
        result = {
            "role": "tool",
            "tool_call_id": block["tool_use_id"],
            "content": collapse_parts(texts) if texts else "",
        }
        messages.append(result)
    return [*messages, {"role": role, "content": collapse_parts(parts)}] if parts else messages


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise BadParameters(
            f"{place}: a tool of type {tool['type']!r} is not supported; custom ones are", param="tools"
        )
    return function_tool(tool.get("name"), tool.get("description"), tool.get("input_schema"), place)


def _tool_choice(choice: Mapping[str, Any]) -> str | dict[str, Any]:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise BadParameters(
            f"tool_choice.type must be auto, any, tool or none, got {format_value(kind)}", param="tool_choice"
        )
    return _CHOICES[kind]


def _response_format(form: Any) -> dict[str, Any]:
    schema = form.get("schema") if isinstance(form, Mapping) else None
    if not isinstance(schema, Mapping) or form.get("type") != "json_schema":
        raise BadParameters("output_config.format must be of type json_schema, with a schema", param="output_config")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
