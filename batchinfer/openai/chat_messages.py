"""Chat messages and tools of a request, validated for the chat template.

Content that a template cannot show is refused, not dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from batchinfer.errors import BadParameters, InvalidInput
from batchinfer.openai.request_models import ChatRequest, Message, TokenizeRequest
from batchinfer.pipeline.encoding import PromptOptions
from batchinfer.text.messages import normalize_messages


def parse_conversation(
    body: ChatRequest | TokenizeRequest, messages: Sequence[Message], chat_template: str | None
) -> tuple[list[dict[str, Any]], PromptOptions]:
    """Return the normalised messages, and the prompt options with the template's variables.

    chat_template: its Jinja source. Raises InvalidInput, BadParameters.
    """
    if chat_template is None:
        raise InvalidInput(
            "this model has no chat template: use /v1/completions, or serve it with prompt.chat_template"
        )
    variables = dict(body.chat_template_kwargs or {})
    for name in ("messages", "add_generation_prompt", "continue_final_message"):
        if name in variables:
            raise BadParameters(f"chat_template_kwargs cannot hold {name}", param="chat_template_kwargs")
    for name in ("documents", "reasoning_effort", "tool_choice"):
        if getattr(body, name, None) is not None:
            variables[name] = getattr(body, name)
    if body.tools and getattr(body, "tool_choice", None) != "none":
        variables["tools"] = _check_tools(chat_template, body.tools)
    normalized = normalize_messages([message.model_dump(exclude_unset=True) for message in messages])
    for number, message in enumerate(normalized):
        for call in message.get("tool_calls", []):
            _check_call(call, f"messages[{number}]")
    if body.add_generation_prompt is not None:
        variables["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message and body.add_generation_prompt:
        problem = "continue_final_message and add_generation_prompt exclude each other: the last message stays open"
        raise BadParameters(problem, param="continue_final_message")
    # the template writes the special tokens
    special, continues = body.add_special_tokens is True, bool(body.continue_final_message)
    return normalized, PromptOptions(special, variables, special_tokens=body.special_tokens, continues=continues)


def _check_tools(chat_template: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if "tools" not in chat_template:
        raise BadParameters("this model's chat template takes no tools", param="tools")
    for number, tool in enumerate(tools):
        function = tool.get("function")
        named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
        if tool.get("type") != "function" or not isinstance(function, dict) or not named:
            raise BadParameters(
                f"tools[{number}] must be of type function, with a function that has a name", param="tools"
            )
        if not isinstance(function.get("parameters", {}), dict | None):
            raise BadParameters(f"tools[{number}].function.parameters must be a JSON schema (an object)", param="tools")
    return tools


def _check_call(call: dict[str, Any], place: str) -> None:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidInput(f"{place}: a tool call must have a function with a name", param="messages")
    arguments = function.get("arguments", {})
    try:
        valid = isinstance(orjson.loads(arguments or "{}") if isinstance(arguments, str) else arguments, dict)
    except ValueError:
        valid = False
    if not valid:
        raise InvalidInput(
            f"{place}: arguments of tool call {function['name']!r} are not JSON of an object", param="messages"
        )
