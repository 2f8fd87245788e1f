"""Tool calls parsed from generated text, whole and streamed."""

from __future__ import annotations

import pytest

from batchinfer.openai.tools import ToolStream, ToolUse

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_in_the_models_own_format_are_parsed_from_chunks_of_any_size(size):
    tool_use = ToolUse("auto", "hermes")
    text = f"Let me see. {CALL}\n{CALL}"
    answer = tool_use.parse_answer(text)
    assert answer.content.strip() == "Let me see."
    assert answer.calls == [("add", '{"a": 1}')] * 2
    assert len(ToolUse("auto", "hermes", only_first=True).parse_answer(text).calls) == 1
    for only_first in (False, True):
        stream = ToolStream(ToolUse("auto", "hermes", only_first=only_first), lambda: "call_1")
        parts = [text[start : start + size] for start in range(0, len(text), size)]
        deltas = [
            delta for number, part in enumerate(parts, 1) for delta in stream.push_text(part, number == len(parts))
        ]
        content = "".join(delta.get("content", "") for delta in deltas)
        pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert content.strip() == "Let me see." and stream.called
        assert {piece["index"] for piece in pieces} == ({0} if only_first else {0, 1})
        for index in {piece["index"] for piece in pieces}:
            own = [piece for piece in pieces if piece["index"] == index]
            assert own[0]["function"]["name"] == "add" and own[0]["type"] == "function" and own[0]["id"]
            assert "".join(piece["function"]["arguments"] for piece in own) == '{"a": 1}'


def test_large_integers_of_a_forced_call_stay_exact():
    text = '[{"name": "add", "parameters": {"a": 1180591620717411303424, "b": "é"}}]'
    (call,) = ToolUse("many").parse_answer(text).calls
    assert call == ("add", '{"a":1180591620717411303424,"b":"é"}')
