"""Tests of `structured_outputs` and `response_format` as values: accepted forms, and errors that name the field."""

from __future__ import annotations

import json

import pytest

from batchinfer import SamplingParams
from batchinfer.errors import BadParameters, SpecError
from batchinfer.spec import parse_spec
from batchinfer.structured import MAX_CHARACTERS, StructuredOutputs, from_response_format

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "required": ["b"]}


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ({"json": SCHEMA}, "json", json.dumps(SCHEMA, separators=(",", ":"))),
        ({"json": json.dumps(SCHEMA, indent=3)}, "json", json.dumps(SCHEMA, separators=(",", ":"))),
        ({"json_object": True}, "json_object", ""),
        ({"regex": "a+", "json": None, "json_object": False}, "regex", "a+"),
        ({"choice": ["yes", "no"]}, "choice", ("yes", "no")),
        ({"grammar": 'start: "x"'}, "grammar", 'start: "x"'),
    ],
)
def test_mapping_is_parsed_to_a_hashable_value(given, kind, value):
    params = SamplingParams(structured_outputs=given)
    assert params.structured_outputs == StructuredOutputs(kind, value)
    assert hash(params) == hash(SamplingParams(structured_outputs=dict(given)))
    again = SamplingParams.from_mapping({"temperature": 0.5}, params)
    assert again.structured_outputs == params.structured_outputs


@pytest.mark.parametrize("given", [None, {"json": None, "regex": None}, {"json_object": False}])
def test_mapping_without_constraint_is_none(given):
    assert SamplingParams(structured_outputs=given).structured_outputs is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of json, json_object, regex, choice, grammar; got none"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"jsn": {}}, "unknown key 'jsn'; did you mean 'json'"),
        ({"guided_regex": "a"}, "unknown key 'guided_regex'; did you mean 'regex'"),
        ("json", "must be a mapping"),
        ({"json": "{"}, "structured_outputs.json is not JSON"),
        ({"json": [1]}, "structured_outputs.json must be a schema"),
        ({"json": {"const": float("nan")}}, "structured_outputs.json is not JSON"),
        ({"json": {"const": object()}}, "structured_outputs.json is not JSON"),
        ({"json": "[" * 100_000}, "nested too deeply"),
        ({"json_object": "yes"}, "json_object must be true"),
        ({"choice": []}, "choice must be a list"),
        ({"choice": "yes"}, "choice must be a list"),
        ({"choice": ["a", 3]}, "choice holds 3"),
        ({"choice": ["a", ""]}, "choice holds ''"),
        ({"choice": ["a", "\ud800"]}, "choice is not valid Unicode"),
        ({"json": {"const": "\udc00"}}, "json is not valid Unicode"),
        ({"regex": "\ud800"}, "regex is not valid Unicode"),
        ({"regex": ""}, "regex must be a non-empty text"),
        ({"grammar": 3}, "grammar must be a non-empty text"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, f"at most {MAX_CHARACTERS}"),
        ({"choice": ["a" * 1000] * 200}, "choice has 200000 characters"),
    ],
)
def test_invalid_constraint_is_refused_by_name(given, message):
    with pytest.raises(BadParameters, match=message.replace("(", r"\(")):
        SamplingParams(structured_outputs=given)


def test_response_format_is_parsed_or_refused():
    schema = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}
    assert from_response_format(schema) == StructuredOutputs.of({"json": SCHEMA})
    assert from_response_format({"type": "json_object"}) == StructuredOutputs("json_object", "")
    assert from_response_format({"type": "text"}) is None and from_response_format(None) is None
    for wrong in ({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "n"}}, {"type": "xml"}, "x"):
        with pytest.raises(BadParameters, match="response_format"):
            from_response_format(wrong)


def test_job_file_accepts_structured_outputs_and_reports_unknown_keys():
    job = {"model": "fake", "input": {"path": "x"}, "prompt": {"column": "c"}, "output": {"path": "o"}}
    spec = parse_spec({**job, "sampling": {"structured_outputs": {"choice": ["a"]}}})
    assert spec.sampling_values["structured_outputs"] == {"choice": ["a"]}
    with pytest.raises(SpecError, match=r"sampling\.structured_outputs: unknown key 'chioce'; did you mean 'choice'"):
        parse_spec({**job, "sampling": {"structured_outputs": {"chioce": ["a"]}}})
