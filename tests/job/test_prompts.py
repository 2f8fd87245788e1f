"""Rows into prompts: what is a row's error, what is the job file's, and openai-batch bodies."""

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import BadParameters, InputError, InvalidInput, SpecError
from batchinfer.job.bodies import chat_messages, parse_body, ready_prompt
from batchinfer.job.prepare import draft_plan
from batchinfer.request import SamplingParams
from batchinfer.structured import StructuredOutputs
from tests.job.doubles import ScriptedLLM, job, rows_of_output, run

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def draft(tmp_path, columns, **sections):
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    return draft_plan(job(tmp_path, **sections))


@pytest.mark.parametrize(
    ("sections", "error", "words"),
    [
        ({"prompt": {"template": "{{ txet }}"}}, SpecError, ["prompt.template", "'txet'", "in.parquet", "'text'"]),
        (
            {"prompt": {"template": None, "user": "{{ text }}", "system": "{{ x }}"}},
            SpecError,
            ["prompt.system", "'x'"],
        ),
        ({"prompt": {"template": None, "column": "prompt"}}, SpecError, ["prompt.column", "'prompt'"]),
        ({"prompt": {"template": None, "column": "score"}}, InputError, ["prompt.column", "double", "text or lists"]),
        ({"prompt": {"template": None, "messages": "score"}}, InputError, ["prompt.messages", "double"]),
        ({"input": {"where": "sorce > 1"}}, SpecError, ["input.where", "'sorce'", "'score'"]),
        ({"input": {"columns": ["text", "nope"]}}, SpecError, ["input.columns", "'nope'"]),
        ({"sampling": {"column": "score"}}, InputError, ["sampling.column", "mappings"]),
        ({"sampling": {"column": "over"}}, SpecError, ["sampling.column", "'over'"]),
        ({"prompt": {"template": "{% if %}"}}, SpecError, ["prompt.template"]),
        ({"output": {"format": "jsonl", "compression": "snappy"}}, SpecError, ["output.compression"]),
    ],
)
def test_mistakes_of_the_job_file_are_found_before_anything_runs(tmp_path, sections, error, words):
    with pytest.raises(error) as caught:
        draft(tmp_path, {"text": ["a"], "score": [1.0]}, **sections)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_clash_of_columns_suggests_a_prefix(tmp_path):
    columns = {"text": ["a"], "response": ["b"], "status": ["c"]}
    with pytest.raises(SpecError, match=r"'response', 'status'.*output\.prefix"):
        draft(tmp_path, columns)
    draft(tmp_path, columns, output={"prefix": "m_"})
    draft(tmp_path, columns, input={"columns": ["text"]})


def test_messages_columns_of_every_shape(tmp_path):
    columns = {
        "structs": [[{"role": "user", "content": "a", "name": None}], None, []],
        "json": [orjson.dumps(USER).decode(), "{", '[{"role": "user"}]'],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    for column in columns:
        llm = ScriptedLLM()
        out = {"path": str(tmp_path / column)}
        run(job(tmp_path, prompt={"template": None, "messages": column}, output=out), llm)
        assert [row["error_type"] for row in rows_of_output(tmp_path / column)] == [None, *["invalid_input"] * 2]
        first = llm.seen[0].content
        assert first == ([{"role": "user", "content": "a"}] if column == "structs" else USER)


def test_system_and_user_templates_and_ready_prompts(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "ids": [[5, 6]], "words": ["go"]}), tmp_path / "in.parquet")
    seen = []
    for prompt in (
        {"template": None, "system": "be {{ words }}", "user": "{{ text }}"},
        {"template": None, "column": "ids"},
        {"template": None, "column": "words"},
    ):
        llm = ScriptedLLM()
        run(job(tmp_path, prompt=prompt, output={"path": str(tmp_path / f"o{len(seen)}")}), llm)
        seen.append(llm.seen[0].content)
    assert seen[0] == [{"role": "system", "content": "be go"}, {"role": "user", "content": "a"}]
    assert seen[1:] == [[5, 6], "go"]


def test_n_of_a_row_needs_a_place(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "over": ['{"n": 2}', None]}), tmp_path / "in.parquet")
    run(job(tmp_path, sampling={"column": "over"}), ScriptedLLM())
    assert [row["error_type"] for row in rows_of_output(tmp_path / "out")] == ["bad_parameters", None]
    exploded = job(tmp_path, sampling={"column": "over"}, output={"samples": "rows", "path": str(tmp_path / "e")})
    run(exploded, ScriptedLLM())
    rows = rows_of_output(tmp_path / "e")
    assert [(row["row"], row["sample"], row["response"]) for row in rows] == [(0, 0, "a!"), (0, 1, "a!1"), (1, 0, "b!")]


def test_hostile_lines_hurt_no_other_row(tmp_path):
    lines = [orjson.dumps({"id": n, "text": f"t{n}"}) for n in range(10)]
    lines[6] = b'{"id": 6, "text": '
    lines[2] = b'{"id": 2, "text": "\\ud800"}'
    lines[4] = b"[1]"
    lines[5] = orjson.dumps({"id": 5, "text": "x" * 1_000_000})
    lines[8] = b'{"id": 8, "text": "\xff"}'
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    run(job(tmp_path, input={"path": str(tmp_path / "in.jsonl")}), ScriptedLLM())
    rows = rows_of_output(tmp_path / "out")
    bad = [row["row"] for row in rows if row["status"] == "error"]
    assert bad == [2, 4, 6, 8] and {row["error_type"] for row in rows} == {None, "invalid_input"}
    assert "in.jsonl" in rows[6]["error"] and "7" in rows[6]["error"]
    assert len(rows[5]["response"]) == 1_000_001


def test_a_row_that_cannot_be_judged_by_where_is_an_error_row(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b", "c"], "score": [1.0, None, 3.0]}), tmp_path / "in.parquet")
    run(job(tmp_path, input={"where": "score > 2"}), ScriptedLLM())
    rows = rows_of_output(tmp_path / "out")
    assert [(row["row"], row["status"]) for row in rows] == [(1, "error"), (2, "ok")]


def test_overrides_from_maps_and_structs(tmp_path):
    overrides = pa.array([[("temperature", 0.5)], None], pa.map_(pa.string(), pa.float64()))
    pq.write_table(pa.table({"text": ["a", "b"], "over": overrides}), tmp_path / "in.parquet")
    llm = ScriptedLLM()
    run(job(tmp_path, sampling={"column": "over"}), llm)
    assert llm.seen[0].params.temperature == 0.5 and llm.seen[1].params is None


def test_structured_outputs_of_job_and_rows(tmp_path):
    overrides = [
        {"structured_outputs": {"choice": ["x", "y"], "regex": None}},
        {"structured_outputs": {"choice": None, "regex": "[0-9]"}},
        {"structured_outputs": {"choice": ["x"], "regex": "[0-9]"}},
        None,
    ]
    pq.write_table(pa.table({"text": ["a", "b", "c", "d"], "over": overrides}), tmp_path / "in.parquet")
    llm = ScriptedLLM()
    run(job(tmp_path, sampling={"column": "over", "structured_outputs": {"json_object": True}}), llm)
    values = [prompt.params and prompt.params.structured_outputs for prompt in llm.seen if prompt.error is None]
    assert values == [StructuredOutputs("choice", ("x", "y")), StructuredOutputs("regex", "[0-9]"), None]
    errors = [row["error_type"] for row in rows_of_output(tmp_path / "out")]
    assert errors == [None, None, "bad_parameters", None]
    wrong = job(tmp_path, sampling={"structured_outputs": {"json": {"type": "objec"}}})
    with pytest.raises(SpecError, match=r"sampling\.structured_outputs: .*Invalid type: objec"):
        draft_plan(wrong)


# -- openai-batch bodies

DEFAULTS = SamplingParams(max_tokens=16)
ANY_OBJECT = StructuredOutputs("json_object", "")


@pytest.mark.parametrize(
    ("url", "body", "field", "value"),
    [
        (CHAT, {"max_completion_tokens": 5}, "max_tokens", 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", 5),
        (CHAT, {"stop": "x"}, "stop", ("x",)),
        (CHAT, {"logprobs": True, "top_logprobs": 3}, "logprobs", 3),
        (CHAT, {"logprobs": True}, "logprobs", 0),
        (CHAT, {"logprobs": False}, "logprobs", None),
        (TEXT, {"logprobs": 2}, "logprobs", 2),
        (CHAT, {"logit_bias": {"7": -100}}, "logit_bias", {7: -100.0}),
        (CHAT, {"seed": 4, "n": 2, "top_k": 5, "temperature": None}, "top_k", 5),
        (CHAT, {"response_format": {"type": "json_object"}}, "structured_outputs", ANY_OBJECT),
        (TEXT, {"structured_outputs": {"json_object": True}}, "structured_outputs", ANY_OBJECT),
        (CHAT, {"tools": [], "response_format": {"type": "text"}, "user": "me", "stream": True}, "max_tokens", 16),
    ],
)
def test_bodies_that_are_understood(url, body, field, value):
    content, params = parse_body(url, {"messages": USER, "prompt": "hi", "model": "m", **body}, DEFAULTS)
    assert getattr(params, field) == value
    assert content == (USER if url == CHAT else "hi")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type must be"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "give one"),
        ({"structured_outputs": {"chioce": ["a"]}}, "did you mean 'choice'"),
        ({"guided_json": {}}, "guided_json"),
        ({"temprature": 1}, "temperature"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"temperature": "hot"}, "temperature"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"n": 0}, "n must be"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(body, name):
    with pytest.raises(BadParameters, match=name):
        parse_body(CHAT, {"messages": USER, **body}, DEFAULTS)


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/embeddings", {"input": "x"}),
        (None, {}),
        (CHAT, {}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": "hi"}),
        (CHAT, "{nonsense"),
        (CHAT, None),
        (CHAT, [1]),
        (TEXT, {"prompt": ["a", "b"]}),
        (TEXT, {"prompt": ""}),
        (TEXT, {"prompt": [True]}),
    ],
)
def test_bodies_that_are_no_requests(url, body):
    with pytest.raises(InvalidInput):
        parse_body(url, body, DEFAULTS)


def test_content_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat_messages([{"role": "user", "content": parts}], "m") == [{"role": "user", "content": "ab"}]
    with pytest.raises(InvalidInput, match="message 1: content part of type 'image_url'"):
        chat_messages([{"role": "user", "content": [{"type": "image_url"}]}], "m")
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert chat_messages([called], "m") == [called]
    assert ready_prompt([1, 2], "p") == [1, 2]


def test_logprobs_of_prompts_have_no_column(tmp_path):
    with pytest.raises(SpecError, match="unknown sampling parameter 'prompt_logprobs'"):
        job(tmp_path, sampling={"prompt_logprobs": 1})
