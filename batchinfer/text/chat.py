"""The model's chat template."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from batchinfer.errors import TemplateError
from batchinfer.text.messages import ContentForms, content_forms, shape_messages
from batchinfer.text.sandbox import Sandbox, compile_template, reason


class ChatTemplate:
    """A chat template as transformers renders it (`apply_chat_template` without tokenizing)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are template variables (bos_token, …). Raises SpecError for bad syntax, with its line."""
        self.source = source
        self._template: jinja2.Template = compile_template(_CHAT.from_string, source, "chat template")
        self._variables = {"tools": None, "documents": None, "add_generation_prompt": True, **special_tokens}

    def render(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any
    ) -> str:
        """The prompt. tools: as in OpenAI's chat requests. `kwargs` are further variables (enable_thinking, …).

        Content may be text or a list of text parts, and a tool call's arguments a mapping or JSON text, whatever of it
        the template takes. Raises InvalidInput for messages that are not a list of objects with a role, TemplateError
        where the template refuses them or fails.
        """
        shaped = shape_messages(messages, self._forms)
        try:
            return self._write(shaped, tools=list(tools) if tools else None, **kwargs)
        except Exception as error:  # whatever a template does ends this row, not the job
            raise TemplateError(f"chat template: {reason(error)}") from None

    def _write(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        return self._template.render({**self._variables, **kwargs, "messages": messages})

    @functools.cached_property
    def _forms(self) -> ContentForms:
        return content_forms(self._write)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's HTML escapes, as transformers has it."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_json_default,
    )


def _json_default(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__} cannot be written as JSON")


_CHAT = Sandbox()
_CHAT.filters["tojson"] = _tojson
