"""Requests of /v1/responses, converted to chats: https://platform.openai.com/docs/api-reference/responses.

Nothing is stored, so a request must hold the whole conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from batchinfer.openai.request_models import ChatRequest, WholeNumber

_ROLES = ("user", "assistant", "system", "developer")
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_LOGPROBS = "message.output_text.logprobs"


class ResponseRequest(ChatLikeRequest):
    """Body of /v1/responses. `store` and other fields that do not change the answer are accepted."""

    field_names: ClassVar[Mapping[str, str]] = {
        "messages": "input",
        "prompt": "input",
        "max_tokens": "max_output_tokens",
        "logprobs": "top_logprobs",
        "response_format": "text",
        "verbosity": "text",
    }
    unsupported: ClassVar[UnsupportedFields] = {
        **dict.fromkeys(("previous_response_id", "conversation"), ((), "nothing is stored, send all items as input")),
        "background": ((False,), "nothing is stored"),
        **result_changing("prompt", "moderation"),
        **result_changing("truncation", neutral=("disabled",)),
        **result_changing("context_management", neutral=([],)),
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), ((), "use max_output_tokens")),
        "messages": ((), "use input"),
        "response_format": ((), "use text.format"),
        "logprobs": ((False,), "use top_logprobs"),
    }
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: WholeNumber | None = None
    include: list[str] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: WholeNumber | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def to_chat(self) -> ChatRequest:
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            problem = f"max_output_tokens must be at least 1, got {self.max_output_tokens}"
            raise BadParameters(problem, param="max_output_tokens")
        wants_logprobs = bool(self.top_logprobs) or _LOGPROBS in (self.include or ())
        text = self.text or {}
        fields = {
            "messages": _messages(self),
            "max_tokens": self.max_output_tokens,
            "logprobs": wants_logprobs,
            "top_logprobs": self.top_logprobs if wants_logprobs else None,
            "tools": [_tool(tool, f"tools[{number}]") for number, tool in enumerate(self.tools or ())] or None,
            "tool_choice": _tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": (self.reasoning or {}).get("effort"),
            "verbosity": text.get("verbosity"),
        }
        if text.get("format") is not None:
            fields["response_format"] = _response_format(text["format"])
        return self._build_chat(fields)


def _messages(body: ResponseRequest) -> list[dict[str, Any]]:
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    if not body.input:
        raise InvalidInput("input is empty", param="input")
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    for number, item in enumerate(items):
        _add_item(messages, item, f"input[{number}]")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    kind = item.get("type") or "message"
    if kind == "message":
        _add_message(messages, item, place)
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        if not all(isinstance(value, str) for value in (item.get("call_id"), *function.values())):
            raise InvalidInput(f"{place}: a function_call has call_id, name and arguments, all text", param="input")
        if not (messages and messages[-1]["role"] == "assistant"):  # text and calls of one turn are one message
            messages.append({"role": "assistant", "content": None})
        call = {"id": item["call_id"], "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        if not isinstance(item.get("call_id"), str):
            raise InvalidInput(f"{place}: a function_call_output has the call_id of its call", param="input")
        content = collapse_parts(text_parts(item.get("output"), _PARTS, f"{place}.output", "input"))
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
    elif kind != "reasoning":  # reasoning of earlier turns is left out of the prompt
        raise InvalidInput(f"{place}: an item of type {format_value(kind)} is not supported", param="input")


def _add_message(messages: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidInput(f"{place}: role must be one of {', '.join(_ROLES)}, got {format_value(role)}", param="input")
    parts = text_parts(item.get("content"), _PARTS, f"{place}.content", "input")
    if role in ("system", "developer"):
        role = "system"  # `developer` is its newer name
        if len(messages) == 1 and messages[0]["role"] == "system":  # many templates take a single one, at the start
            before = text_parts(messages[0]["content"], _PARTS, place, "input")
            parts = [{"type": "text", "text": "\n\n".join(part["text"] for part in (*before, *parts))}]
            messages.clear()
    messages.append({"role": role, "content": collapse_parts(parts)})


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        problem = f"{place}: a tool of type {format_value(tool.get('type'))} is not supported; functions are"
        raise BadParameters(problem, param="tools")
    return function_tool(tool.get("name"), tool.get("description"), tool.get("parameters"), place)


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        kind = format_value(choice.get("type"))
        problem = f"tool_choice of type {kind} is not supported; auto, none, required and a function are"
        raise BadParameters(problem, param="tool_choice")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _response_format(form: Any) -> dict[str, Any]:
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind in ("text", "json_object"):
        return {"type": kind}
    if kind != "json_schema" or not isinstance(form.get("schema"), Mapping):
        problem = "text.format must be of type text, json_object, or json_schema with a schema"
        raise BadParameters(problem, param="text")
    return {"type": kind, "json_schema": {"name": form.get("name"), "schema": form["schema"]}}
