"""Tests of message conversion to the form that each template supports."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchinfer.errors import InvalidInput
from batchinfer.text.chat import ChatTemplate, Turn

from .templates import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT_ONLY = {"chatml": CHATML, "llama 3": LLAMA3, "mistral": MISTRAL, "qwen": QWEN}
PARTS_ONLY = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_parts_are_joined_for_text_only_templates(name):
    template = ChatTemplate(TEXT_ONLY[name], SPECIAL)
    given = user(PARTS)
    assert template.render(given) == template.render(user("one \ntwo")), "as vLLM joins them"
    assert given == user(PARTS), "what the caller has stays as it is"
    for wrong in ([{"type": "image_url"}], ["text"], [{"type": "text"}]):
        with pytest.raises(InvalidInput, match=r"messages\[0\]: content part of type"):
            template.render(user(wrong))


def test_parts_only_template_gets_parts():
    assert ChatTemplate(GEMMA, SPECIAL).render(user(PARTS)).count("onetwo") == 1, "the template trims each"
    template = ChatTemplate(PARTS_ONLY, {})
    assert template.render(user("hello")) == "user:hello" and template.render(user(PARTS)) == "user:one two"


def test_parts_are_joined_if_the_template_prints_the_list():
    assert ChatTemplate("{{ messages[0].content }}", {}).render(user(PARTS)) == "one \ntwo"
    assert ChatTemplate("{{ messages[0].content | tojson }}", {}).render(user(PARTS)) == '"one \\ntwo"'


def call(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "weather", "arguments": arguments}
    said = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    return [*user("how is it?"), said, {"role": "tool", "content": "rain", "tool_call_id": "c1"}]


@pytest.mark.parametrize("name", ["llama 3", "qwen"])
def test_json_arguments_are_parsed_for_the_template(name):
    template = ChatTemplate(TEXT_ONLY[name], SPECIAL)
    arguments = {"city": "Zürich", "days": [1, 2]}
    found = template.render(call(json.dumps(arguments)))
    assert found == template.render(call(arguments))
    assert '\\"city' not in found and '"city"' in found
    assert template.render(call("")) == template.render(call({}))
    assert "{broken" in template.render(call("{broken"))


def test_null_keys_are_dropped():
    message = {"role": "user", "content": "hi", "tool_calls": None, "name": None}
    assert ChatTemplate(LLAMA3, SPECIAL).render([message]) == ChatTemplate(LLAMA3, SPECIAL).render(user("hi"))


@pytest.mark.parametrize("name", [*TEXT_ONLY, "gemma"])
def test_null_content_becomes_empty_text(name):
    template = ChatTemplate({**TEXT_ONLY, "gemma": GEMMA}[name], SPECIAL)
    for nothing in (None, []):
        assert template.render(user(nothing)) == template.render(user(""))
        assert template.render(user(nothing), Turn(continues=True)) == template.render(user(""), Turn(continues=True))
    assert "None" not in template.render([*user("hi"), {"role": "assistant", "content": None}, *user("so?")])
    with pytest.raises(InvalidInput, match=r"messages\[1\] has no content"):
        template.render([*user("hi"), {"role": "assistant"}])
    for wrong in (3, {"text": "hi"}):
        with pytest.raises(InvalidInput, match=r"messages\[0\]: content must be text or a list of parts"):
            template.render(user(wrong))


def test_empty_tools_list_equals_no_tools():
    template = ChatTemplate("{{ tools is none }}{{ tools }}", {})
    assert template.render(user("x"), tools=[]) == template.render(user("x")) == "TrueNone"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert ChatTemplate("{{ tools | tojson }}", {}).render(user("x"), tools=tools) == json.dumps(tools)
