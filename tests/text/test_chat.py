"""Tests of chat templates: equal to transformers' rendering, and safe against hostile templates."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from batchinfer.errors import InvalidInput, SpecError, TemplateError
from batchinfer.job.prompt_cells import chat_messages
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.row_template import RowTemplate
from batchinfer.text.tokenizer import ByteTokenizer
from batchinfer.values.number import Number

from .templates import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "qwen": QWEN}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "<b>Wetter & Zeit</b> für é",
        "parameters": {"city": {"type": "string"}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "a": [1, None, True]}}}
USER = {"role": "user", "content": "  What is <b>2 & 2</b>?\n "}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be 'brief'."}, USER],
    "turns": [USER, {"role": "assistant", "content": "<think>\nhm</think>\n4"}, {"role": "user", "content": "日本?"}],
    "tool call": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "name": "weather"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}
    ],
    "wrong order": [{"role": "assistant", "content": "I begin"}],
    "two calls": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}],
}
KWARGS: list[dict[str, Any]] = [
    {},
    {"tools": [TOOL]},
    {"add_generation_prompt": False},
    {"enable_thinking": False, "date_string": "1 Jan 2026"},
]


@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_render_as_in_transformers(template: str, chat: str, kwargs: dict[str, Any]) -> None:
    """The same text, or an error in both."""
    source, messages = TEMPLATES[template], CHATS[chat]
    if chat == "parts":  # an image
        with pytest.raises(InvalidInput, match="part of type 'image'"):
            ChatTemplate(source, SPECIAL).render(messages, **kwargs)
        return
    try:
        [[expected], _] = render_jinja_template(
            [messages], chat_template=source, **{"add_generation_prompt": True, **SPECIAL, **kwargs}
        )
    except Exception:
        with pytest.raises(TemplateError, match="chat template: "):
            ChatTemplate(source, SPECIAL).render(messages, **kwargs)
    else:
        assert ChatTemplate(source, SPECIAL).render(messages, **kwargs) == expected


def test_template_error_has_the_templates_message() -> None:
    with pytest.raises(TemplateError, match=r"^chat template: conversation roles must alternate user/assistant$"):
        ChatTemplate(MISTRAL, SPECIAL).render(CHATS["wrong order"])


def test_strftime_now_is_today() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([USER]) == str(datetime.datetime.now().year)


def test_byte_tokenizer_has_a_chat_template() -> None:
    source = ByteTokenizer().chat_template
    assert source is not None
    text = ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a non-empty list, got 'hello'"),
        ([], "messages must be a non-empty list"),
        (None, "messages must be a non-empty list, got None"),
        ([USER, "hello"], r"messages\[1\] must be an object with role and content, got 'hello'"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] has no role, or its role is not text"),
    ],
)
def test_invalid_messages_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ChatTemplate(CHATML, SPECIAL).render(messages)


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns }}",
    "{{ dict.fromkeys.__self__ }}",
    "{{ dict.__base__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ loop.__class__ }}{% for a in 'x' %}{{ loop.__class__.__init__ }}{% endfor %}",
    "{{ (messages.append)(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '%s'.__mod__(1) }}",
    "{{ range(10000000) | list }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ caller.__globals__ }}",
]


@pytest.mark.parametrize("source", HOSTILE)
@pytest.mark.parametrize("kind", ["chat", "row"])
def test_hostile_template_cannot_escape_the_sandbox(source: str, kind: str) -> None:
    """It ends in an error of the row, or renders to nothing; the messages are as they were."""
    messages = [{"role": "user", "content": "x"}]
    try:
        if kind == "chat":
            text = ChatTemplate(source, {}).render(messages)
        else:
            text = RowTemplate(source, "prompt.user").render({"messages": messages})
    except (TemplateError, SpecError):
        text = ""
    assert not any(word in text for word in ("<class", "<module", "<function", "{'__", "root:", "uid="))
    assert messages == [{"role": "user", "content": "x"}]


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=50))
def test_message_content_is_unchanged(text: str) -> None:
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": text}]) == text


@pytest.mark.parametrize("source", ["{{ a", "a\n{% endif %}"])
def test_invalid_chat_template_syntax_is_a_spec_error(source: str) -> None:
    with pytest.raises(SpecError, match=r"^chat template: line \d: "):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Number("12345678901234567890.5"), "12345678901234567890.5"),
        ([Number("1.50"), Number("3.00")], "[1.5, 3]"),
        ({"x": float("nan")}, None),
        ([float("-inf")], None),
    ],
)
def test_tojson_keeps_all_digits_of_numbers(value: Any, expected: str | None) -> None:
    template = ChatTemplate("{{ messages[0].x | tojson }}", {})
    messages = chat_messages([{"role": "user", "content": "", "x": value}], "column 'm'")
    if expected is not None:
        assert template.render(messages) == expected
        return
    with pytest.raises(InvalidInput, match="JSON has no NaN"):
        template.render(messages)
    assert ChatTemplate("{{ messages[0].role }}", {}).render(messages) == "user", "nobody minds what nobody uses"
