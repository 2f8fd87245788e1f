"""Tests of tool calls: every format, whole and streamed, malformed and forced."""

from __future__ import annotations

import itertools
import json
import random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import BadParameters
from batchinfer.structured import StructuredOutputs
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.grammar import Grammars
from batchinfer.text.tokenizer import ByteTokenizer
from batchinfer.text.tool_choice import tool_choice_schema
from batchinfer.text.tools import FORMATS, ToolCall, ToolCallParser, ToolDelta, detect_format, parse_tool_calls
from tests.text.test_grammar import EOS, allowed

from .templates import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN

ARGUMENTS = '{"city": "Z\\u00fcrich \\"}] </tool_call> {", "days": [1, {"a": null}], "x": {}}'
A, B = ToolCall("weather", ARGUMENTS), ToolCall("clock", "{}")
HERMES_A = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
HERMES_B = '<tool_call>{"name":"clock","arguments":{}}</tool_call>'
LLAMA_A = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
LLAMA_B = '{"name": "clock", "parameters": {}}'
MISTRAL_A = f'{{"name": "weather", "arguments": {ARGUMENTS}, "id": "abcdefghi"}}'
MISTRAL_B = '{"name": "clock", "arguments": {}}'

ANSWERS = [
    ("hermes", HERMES_A, None, [A]),
    ("hermes", f"I look.\n\n{HERMES_A}\n{HERMES_B}\n", "I look.", [A, B]),
    ("hermes", f"a {HERMES_B} b {HERMES_B}", "a b", [B, B]),
    ("hermes", HERMES_A.removesuffix("</tool_call>"), None, [A]),
    ("hermes", '<tool_call>{"arguments": {"a":  1}, "name": "f"}</tool_call>', None, [ToolCall("f", '{"a": 1}')]),
    ("hermes", " only text, a < b <tool \n", " only text, a < b <tool \n", []),
    ("llama3", LLAMA_A, None, [A]),
    ("llama3", f"<|python_tag|>{LLAMA_A}; {LLAMA_B}", None, [A, B]),
    ("llama3", f"\n{LLAMA_B}\n{LLAMA_B};", None, [B, B]),
    ("llama3", f"Sure.\n<|python_tag|>{LLAMA_B}", "Sure.", [B]),
    ("llama3", f"The answer is {LLAMA_B}", f"The answer is {LLAMA_B}", []),
    ("mistral", f"[TOOL_CALLS][{MISTRAL_A}, {MISTRAL_B}]", None, [A, B]),
    ("mistral", f"[TOOL_CALLS] [{MISTRAL_B}]", None, [B]),
    ("mistral", f"[{MISTRAL_A},{MISTRAL_B}]", None, [A, B]),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]clock[CALL_ID]a1B2[ARGS]{{}}", None, [A, B]),
    ("mistral", "Wait [TOOL_CALLS]clock{}", "Wait", [B]),
    ("mistral", "[1, 2] is a list", "[1, 2] is a list", []),
]
MALFORMED = [
    ("hermes", "x <tool_call>hello</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>{'name': 'f'}</tool_call> after"),
    ("hermes", '<tool_call>{"nam'),
    ("hermes", "<tool_call>"),
    ("hermes", "ends with <tool_c"),
    ("llama3", '{"answer": 42}'),
    ("llama3", "{"),
    ("llama3", "<|python_tag|>print(1)"),
    ("llama3", '{"a": 1}; {"name": "f"}'),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS][1, 2]"),
    ("mistral", '[{"a": 1}]'),
    ("mistral", "[TOOL_CALLS]some words"),
]


def in_pieces(text: str, dialect: str, cuts: list[int]) -> tuple[str | None, list[ToolCall]]:
    parser = ToolCallParser(dialect)
    borders = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    deltas = [delta for a, b in itertools.pairwise(borders) for delta in parser.feed(text[a:b])]
    deltas += parser.finish()
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for delta in deltas:
        assert delta.content or delta.name is not None or delta.arguments, "an empty piece"
        if delta.index is not None:
            assert not delta.content
            assert (delta.name is None) == (delta.index in names), "the name comes once, with the first piece"
            names.setdefault(delta.index, delta.name or "")
            arguments[delta.index] = arguments.get(delta.index, "") + delta.arguments
    assert list(names) == list(range(len(names)))
    content = "".join(delta.content for delta in deltas)
    return content or None, [ToolCall(name, arguments[index]) for index, name in names.items()]


@pytest.mark.parametrize(("dialect", "text", "content", "calls"), ANSWERS)
def test_calls_are_parsed_from_output(dialect, text, content, calls):
    assert parse_tool_calls(text, dialect) == (content, calls)
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


@pytest.mark.parametrize(("dialect", "text"), MALFORMED)
def test_malformed_call_stays_text(dialect, text):
    assert parse_tool_calls(text, dialect) == (text, [])


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([answer[:2] for answer in ANSWERS] + MALFORMED), st.lists(st.integers(0, 400), max_size=12))
def test_streamed_parse_equals_whole_parse(answer, cuts):
    dialect, text = answer
    expected = parse_tool_calls(text, dialect)
    found = in_pieces(text, dialect, cuts)
    if found != expected:
        # a call that began well is out before its end is known
        assert text in [malformed for _, malformed in MALFORMED] and found[1] and not expected[1]


@pytest.mark.parametrize("dialect", FORMATS)
def test_text_is_never_lost_in_streaming(dialect):
    for other, text, _, _ in ANSWERS:
        if other == dialect:
            assert in_pieces(text, dialect, list(range(len(text)))) == parse_tool_calls(text, dialect)
    rng = random.Random(4)
    bits = [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "[",
        "]",
        "{",
        "}",
        '"',
        "\\",
        ",",
        ";",
        " ",
    ]
    bits += ['{"name": "f", "arguments": {', '"parameters": ', "[ARGS]", "x", "é", "\n"]
    for _ in range(2000):
        text = "".join(rng.choice(bits) for _ in range(rng.randrange(12)))
        content, calls = parse_tool_calls(text, dialect)
        if not calls:
            assert content == (text or None)
        in_pieces(text, dialect, [rng.randrange(400) for _ in range(6)])


def test_arguments_are_streamed_as_they_are_written():
    parser = ToolCallParser("hermes")
    assert parser.feed('Hm. <tool_call>\n{"name": "f"') == [ToolDelta("Hm.")]
    [first] = parser.feed(', "arguments": {"a": "long ')
    assert (first.index, first.name, first.arguments) == (0, "f", '{"a": "long ')
    [second] = parser.feed('text"}')
    assert (second.index, second.name, second.arguments) == (0, None, 'text"}')
    assert parser.feed("}\n</tool_call>") == parser.finish() == []


def test_long_arguments_take_linear_time():
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "x\\n" * 100_000 + '"}}</tool_call>'
    parser = ToolCallParser("hermes")
    pieces = sum(len(delta.arguments) for at in range(0, len(text), 50) for delta in parser.feed(text[at : at + 50]))
    assert pieces == len(text) - len('<tool_call>{"name": "f", "arguments": }</tool_call>')


def test_format_is_detected_from_the_template():
    assert [detect_format(one) for one in (QWEN, LLAMA3, CHATML, GEMMA, MISTRAL)] == [
        "hermes",
        "llama3",
        None,
        None,
        None,
    ]
    assert detect_format('{{ "[TOOL_CALLS] [" }}') == "mistral"
    assert detect_format("<tool_call>\n<function=name>") is None
    with pytest.raises(ValueError, match="hermes, llama3, mistral"):
        parse_tool_calls("x", "xml")


@pytest.mark.parametrize(("template", "dialect"), [(QWEN, "hermes"), (LLAMA3, "llama3")])
def test_calls_rendered_by_a_template_parse_back(template, dialect):
    function = {"name": "weather", "arguments": {"city": "Zürich", "days": [1, None]}}
    said = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    chat = ChatTemplate(template, {"bos_token": "", "eos_token": ""})
    before = chat.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    text = chat.render([{"role": "user", "content": "x"}, said], add_generation_prompt=False).removeprefix(before)
    answer = text.split("<|im_end|>")[0].split("<|eot_id|>")[0].split("<|end_header_id|>\n\n")[-1]
    _, [call] = parse_tool_calls(answer, dialect)
    assert call.name == "weather" and json.loads(call.arguments) == function["arguments"]


# -- tool_choice

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "$defs": {"unit": {"enum": ["C", "F"]}},
                "properties": {"city": {"type": "string", "maxLength": 5}, "unit": {"$ref": "#/$defs/unit"}},
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": 'say "hi"', "parameters": {"type": "object", "maxProperties": 0}}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("dialect", FORMATS)
def test_forced_output_parses_as_a_call(dialect, choice):
    seen = set()
    for text in answers_to(tool_choice_schema(TOOLS, choice, dialect)):
        content, calls = parse_tool_calls(text, dialect)
        assert content is None and calls, text
        for call in calls:
            seen.add(call.name)
            jsonschema.validate(json.loads(call.arguments), schema_of(call.name))
    assert seen == ({"weather", 'say "hi"'} if choice == "required" else {"weather"})


def answers_to(asked, count=12):
    """Random answers that a constraint allows."""
    wanted = StructuredOutputs.of(asked)
    assert wanted is not None
    constraint = Grammars(ByteTokenizer(), 258, frozenset({EOS})).compile(wanted)
    rng = random.Random(5)
    for _ in range(count):
        matcher = constraint.matcher([])
        answer: list[int] = []
        while not matcher.complete:
            ids = allowed(constraint, [matcher])[0]
            token = EOS if EOS in ids and rng.random() < 0.6 else rng.choice(sorted(ids - {EOS} or ids))
            matcher.accept(token)
            if token != EOS:
                answer.append(token)
        yield bytes(answer).decode()


def schema_of(name):
    return next(tool["function"] for tool in TOOLS if tool["function"]["name"] == name)["parameters"]


@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_without_known_format_are_a_json_list(parallel):
    """A list of calls as JSON; references in a tool's schema are to that schema."""
    lengths, seen = set(), set()
    for text in answers_to(tool_choice_schema(TOOLS, "required", None, parallel), 20):
        calls = json.loads(text)
        lengths.add(len(calls))
        for call in calls:
            assert set(call) == {"name", "parameters"}
            seen.add(call["name"])
            jsonschema.validate(call["parameters"], schema_of(call["name"]))
    assert seen == {"weather", 'say "hi"'} and (lengths == {1} if not parallel else 2 in lengths)
    named = {"type": "function", "function": {"name": "weather"}}
    for text in answers_to(tool_choice_schema(TOOLS, named, None, parallel), 3):
        jsonschema.validate(json.loads(text), schema_of("weather"))


@pytest.mark.parametrize("dialect", ["hermes", "mistral"])
def test_parallel_false_allows_one_call(dialect):
    for text in answers_to(tool_choice_schema(TOOLS, "required", dialect, parallel=False)):
        assert len(parse_tool_calls(text, dialect)[1]) == 1


def test_tool_choice_without_force_is_none_and_invalid_is_refused():
    assert tool_choice_schema(TOOLS, "auto", "hermes") is tool_choice_schema(TOOLS, None, "hermes") is None
    for choice in ("requird", {"type": "function", "function": {"name": "wether"}}, {"type": "function"}):
        with pytest.raises(BadParameters, match='given tools: weather, say "hi"'):
            tool_choice_schema(TOOLS, choice, "hermes")
    with pytest.raises(BadParameters, match="there are no tools"):
        tool_choice_schema([], "required", "hermes")
    with pytest.raises(BadParameters, match="every tool must have a function with a name"):
        tool_choice_schema([{"type": "function"}], "required", "hermes")
