"""Templates: equal to transformers' rendering, safe from hostile ones, and exact about rows."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from batchinfer.errors import InvalidInput, SpecError, TemplateError
from batchinfer.text.chat import ChatTemplate, RowFilter, RowTemplate
from batchinfer.text.tokenizer import ByteTokenizer

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


def test_the_templates_own_words_reach_the_error() -> None:
    with pytest.raises(TemplateError, match=r"^chat template: conversation roles must alternate user/assistant$"):
        ChatTemplate(MISTRAL, SPECIAL).render(CHATS["wrong order"])


def test_the_date_is_todays() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([USER]) == str(datetime.datetime.now().year)


def test_the_byte_tokenizer_has_a_template() -> None:
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
        ([{"role": 3, "content": "x"}], r"messages\[0\] has no role, or one that is not text"),
    ],
)
def test_what_are_no_messages(messages: Any, message: str) -> None:
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
def test_a_hostile_template_reaches_nothing(source: str, kind: str) -> None:
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


# ---- rows


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        ("{{ question }} {{ a.b }} {{ c['d'] }}", {"question", "a", "c"}),
        ("{% for i in range(3) %}{{ i }}{{ items[i] }}{% endfor %}", {"items"}),
        ("{% set x = y %}{{ x }}", {"y"}),
        ("{{ range }}", {"range"}),
        ("{{ dict }} {{ namespace }} {{ lipsum }} {{ cycler }}", {"dict", "namespace", "lipsum", "cycler"}),
        ("{{ range }} {{ range(3) }}", {"range"}),
        ("{% if loop is defined %}{{ z }}{% endif %}", {"loop", "z"}),
        ("no columns", set()),
    ],
)
def test_columns_of_a_template(source: str, columns: set[str]) -> None:
    assert RowTemplate(source, "prompt.template").columns == columns


def test_columns_with_the_names_of_jinjas_own() -> None:
    template = RowTemplate("{{ range }}, {{ dict }}, {{ cycler.next }}, {{ item }}", "prompt.template")
    row = {"range": 1, "dict": {"a": 1}, "cycler": {"next": 2}, "item": "x", "unused": None}
    assert template.render(row) == "1, {'a': 1}, 2, x"
    called = RowTemplate("{% for i in range(2) %}{{ i }}{% endfor %}", "prompt.template")
    assert called.render({"range": "a column that the template does not name"}) == "01"


def test_blocks_leave_no_lines_and_text_is_not_escaped() -> None:
    template = RowTemplate("Q: {{ q }}\n{% if c %}\n  C: {{ c }}\n{% endif %}\nA:\n", "prompt.template")
    assert template.render({"q": "<b> & 'x'", "c": "日本\n"}) == "Q: <b> & 'x'\n  C: 日本\n\nA:"
    assert template.render({"q": "{{ c }}", "c": ""}) == "Q: {{ c }}\nA:"  # a cell is never a template


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ a or 'none given' }}", "none given"),
        ("{{ a | default('none given') }}", "none given"),
        ("{% if a %}{{ a }}{% else %}-{% endif %}", "-"),
        ("{{ 'null' if a is none else a }}", "null"),
        ("{{ 'null' if a == none else a }}", "null"),
        ("{{ a is not none }}", "False"),
        ("{{ a | tojson }}", "null"),
        ("{{ {'a': a, 'b': b} | tojson }}", '{"a": null, "b": 1}'),
    ],
)
def test_a_null_cell_may_be_tested(source: str, expected: str) -> None:
    assert RowTemplate(source, "prompt.user").render({"a": None, "b": 1}) == expected


@pytest.mark.parametrize(
    "source",
    [
        *("{{ a }}", "{{ a | trim }}", "{{ a | upper }}", "{{ 'x' ~ a }}", "{{ '%s' % a }}", "{{ '{}'.format(a) }}"),
        *("{{ a.b }}", "{{ a[0] }}", "{{ a + 1 }}", "{{ a > 1 }}", "{{ a | length }}", "{{ [a, 'x'] | join }}"),
        *("{% for x in a %}{{ x }}{% endfor %}", "{{ 'x' in a }}", "{{ a | string }}", "{{ a | replace('x', 'y') }}"),
    ],
)
def test_a_null_cell_that_is_used_is_the_rows_error(source: str) -> None:
    with pytest.raises(InvalidInput, match=r"^prompt\.user: column 'a' is null$"):
        RowTemplate(source, "prompt.user").render({"a": None})


def test_a_null_inside_a_nested_value() -> None:
    template = RowTemplate("{{ meta.author }}", "prompt.user")
    assert template.render({"meta": {"author": "x"}}) == "x"
    with pytest.raises(InvalidInput, match="an expression of the template is null"):
        template.render({"meta": {"author": None}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ meta.missing }}", "has no attribute 'missing'"),
        ("{{ 1 // n }}", "ZeroDivisionError"),
        ("{{ raise_exception('too short') }}", "prompt.user: too short$"),
        ("{{ meta | tojson }}", "a value of type object cannot be written as JSON"),
        ("{{ n | nonexistent }}", None),
    ],
)
def test_a_template_that_fails_on_a_row(source: str, message: str | None) -> None:
    if message is None:
        with pytest.raises(SpecError, match=r"prompt\.user: line 1: No filter named 'nonexistent'"):
            RowTemplate(source, "prompt.user")
        return
    with pytest.raises(TemplateError, match=message):
        RowTemplate(source, "prompt.user").render({"n": 0, "meta": {"x": object()}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ a", r"line 1: unexpected end of template"),
        ("a\nb\n{% if x %}\nc", r"line 4: Unexpected end of template"),
        ("a\n{% endif %}", r"line 2: .*endif"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", r"cannot be compiled"),
    ],
)
def test_bad_syntax_names_the_template_and_its_line(source: str, message: str) -> None:
    with pytest.raises(SpecError, match=rf"^prompt\.user: {message}"):
        RowTemplate(source, "prompt.user")
    with pytest.raises(SpecError, match=rf"^chat template: {message}"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("expression", "row", "expected"),
    [
        ("lang == 'en' and score > 0.5", {"lang": "en", "score": 0.7}, True),
        ("lang == 'en' and score > 0.5", {"lang": "de", "score": None}, False),
        ("text | length > 3", {"text": "four"}, True),
        ("'x' in tags", {"tags": ["x"]}, True),
        ("meta.ok", {"meta": {"ok": 0}}, False),
        ("flag", {"flag": None}, False),
        ("score is not none and score > 3", {"score": None}, False),
        ("range == 5", {"range": 5}, True),
    ],
)
def test_filters(expression: str, row: dict[str, Any], expected: bool) -> None:
    found = RowFilter(expression)
    assert found.matches(row) is expected
    assert found.columns == row.keys()


def test_filters_that_fail() -> None:
    with pytest.raises(InvalidInput, match="where: column 'score' is null"):
        RowFilter("score > 3").matches({"score": None})
    with pytest.raises(TemplateError, match="where: TypeError"):
        RowFilter("score > 3").matches({"score": "high"})
    with pytest.raises(SpecError, match=r"^where: line 1: "):
        RowFilter("score >")
    with pytest.raises(SpecError, match=r"^where: line 1: "):
        RowFilter("a }} {{ b")


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=50))
def test_a_cell_arrives_as_it_is(text: str) -> None:
    assert RowTemplate("[{{ a }}]", "t").render({"a": text}) == f"[{text}]"
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": text}]) == text
