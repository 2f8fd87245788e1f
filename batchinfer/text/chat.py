"""Rendering of the model's chat template."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2

from batchinfer.errors import RowError, TemplateError
from batchinfer.text.control import ControlTokens, texts_of, unused_character
from batchinfer.text.messages import ContentForms, content_forms, cut_open, opened, shape_messages
from batchinfer.text.sandbox import Sandbox, compile_template, json_filter, reason


class Turn(NamedTuple):
    """End of a prompt, and the meaning of control tokens in its data.

    continues: the last message stays open and generation continues it. control: control tokens spelled in messages,
    tools and documents are parsed as such.
    """

    continues: bool = False
    control: bool = False


class ChatTemplate:
    """A chat template, rendered as transformers does (`apply_chat_template` without tokenizing)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], control: ControlTokens | None = None) -> None:
        """Compile a template.

        `special_tokens` are template variables (bos_token, …), `control` finds the control tokens in a text. Raises
        SpecError for bad syntax, with its line.
        """
        self.source = source
        self._template: jinja2.Template = compile_template(_CHAT.from_string, source, "chat template")
        self._variables = {"tools": None, "documents": None, "add_generation_prompt": True, **special_tokens}
        self._control = control or ControlTokens()

    def render(
        self,
        messages: list[dict[str, Any]],
        turn: Turn = Turn(),  # noqa: B008 (a constant)
        defaults: Mapping[str, Any] = {},
        /,
        **kwargs: Any,
    ) -> str:
        """Return the prompt. `kwargs` are template variables: tools as in OpenAI's chat requests, enable_thinking, ….

        Content may be text or a list of text parts, and a tool call's arguments a mapping or JSON text; both are
        converted to the form that the template supports. Control tokens written by the template and by `defaults`,
        which belong to it, are parsed; in all other data they are text, unless `turn` says otherwise. Raises
        InvalidInput for messages that are not a list of objects with a role, TemplateError if the template refuses the
        messages or fails.
        """
        shaped = shape_messages(messages, self._forms)
        end = ""
        if turn.continues:
            kwargs["add_generation_prompt"] = False
            end = unused_character([self.source, *texts_of(shaped)])
            shaped = opened(shaped, end)

        def write(data: dict[str, Any]) -> str:
            text = self._template.render({**self._variables, **defaults, **data})
            return cut_open(text, data["messages"][-1], end) if end else text

        data = {**kwargs, "messages": shaped}
        if not data.get("tools"):  # templates treat an empty list as tools
            data.pop("tools", None)
        try:
            return write(data) if turn.control else self._control.write(data, write, self.source)
        except RowError:
            raise
        except Exception as error:  # any failure of a template ends this row, not the job
            raise TemplateError(f"chat template: {reason(error)}") from None

    @functools.cached_property
    def _forms(self) -> ContentForms:
        return content_forms(lambda messages: self._template.render({**self._variables, "messages": messages}))


_CHAT = Sandbox()
_CHAT.filters["tojson"] = json_filter()
