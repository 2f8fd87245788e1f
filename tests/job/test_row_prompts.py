"""Rows into prompts: what is a row's error, what is the job file's, and openai-batch bodies."""

import math
from dataclasses import replace

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import InputError, InvalidInput, SpecError
from batchinfer.job.prepare import draft_plan
from batchinfer.job.prompt_cells import chat_messages, ready_prompt
from batchinfer.llm import LLM
from batchinfer.openai.parse import ModelFacts, parse_body, parse_request
from batchinfer.request import SamplingParams
from batchinfer.structured import StructuredOutputs
from batchinfer.text.tokenizer import ByteTokenizer
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
        first = llm.seen[0].contents[0]
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
        seen.append(llm.seen[0].contents[0])
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


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_an_override_is_its_own_rows_whatever_other_rows_ask(tmp_path, order):
    """What is kept of parsed overrides tells apart values that JSON writes alike: no number is no null."""
    values = [{"temperature": None}, {"temperature": math.nan}, {"temperature": 0.0}, {"temperature": math.inf}]
    table = pa.table({"text": list("abcd"), "over": [values[i] for i in order]})
    pq.write_table(table, tmp_path / "in.parquet")
    run(job(tmp_path, sampling={"column": "over"}), ScriptedLLM())
    errors = [row["error_type"] for row in rows_of_output(tmp_path / "out")]
    assert errors == [[None, "bad_parameters", None, "bad_parameters"][i] for i in order]


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


@pytest.mark.parametrize(
    ("grammar", "problem", "when"),
    [
        ({"regex": "a{1000000000}"}, "regex: too large", draft_plan),  # written out, it ends the process that tries
        ({"grammar": "start: A\nA: /a{1000000000}/"}, "grammar: too large", draft_plan),
        ({"regex": "a{150000}"}, "regex: too (slow to follow|large)", draft_plan),
        ({"regex": "[^\\s\\S]"}, "regex: no answer can follow it", run),  # found with the model's tokens
    ],
)
def test_a_hostile_grammar_of_the_job_is_its_own_error(tmp_path, grammar, problem, when):
    """Tried in a process of its own, before any row."""
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "in.parquet")
    with pytest.raises(SpecError, match=rf"sampling\.structured_outputs: structured_outputs\.{problem}") as caught:
        when(job(tmp_path, sampling={"structured_outputs": grammar}))
    assert caught.value.exit_code == 78
    assert not (tmp_path / "out/parts").exists()


# -- openai-batch bodies: what each means is tested beside the endpoint, in tests/server/test_batch_rows


def test_the_jobs_sampling_lies_beneath_a_body(tmp_path):
    defaults = SamplingParams(max_tokens=40, temperature=0.5, logprobs=1)
    model = ModelFacts(("m",), ByteTokenizer(), ByteTokenizer.chat_template, defaults)
    for url, asked in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": USER})):
        params = parse_request(parse_body(url, {**asked, "temperature": 0.25, "n": None}), model).params
        assert (params.max_tokens, params.temperature, params.logprobs, params.n) == (40, 0.25, 1, 1)
        assert parse_request(parse_body(url, {**asked, "max_tokens": 3}), model).params.max_tokens == 3
    bare = replace(model, defaults=SamplingParams())
    assert parse_request(parse_body(TEXT, {"prompt": "a"}), bare).params.max_tokens == 16
    assert parse_request(parse_body(CHAT, {"messages": USER}), bare).params.max_tokens is None


SOME = SamplingParams(
    n=2,
    temperature=0.5,
    presence_penalty=1.0,
    frequency_penalty=1.0,
    repetition_penalty=1.2,
    logit_bias={5: 1.0},
    seed=3,
    max_tokens=40,
    min_tokens=2,
    stop=("x",),
    stop_token_ids=(7,),
    bad_words=("y",),
    allowed_token_ids=(1, 2),
    ignore_eos=True,
    logprobs=2,
    prompt_logprobs=1,
    skip_special_tokens=False,
    structured_outputs=StructuredOutputs("json_object", ""),
)
NO_GRAMMAR = {"structured_outputs": None}
NO_LOGPROBS = {"logprobs": None}
UNDONE = [
    (CHAT, {"logprobs": False}, NO_LOGPROBS),
    (CHAT, {"logprobs": False, "top_logprobs": 0}, NO_LOGPROBS),
    (CHAT, {"logprobs": None}, NO_LOGPROBS),
    (CHAT, {"logprobs": True}, {}),
    (CHAT, {"top_logprobs": None}, {"logprobs": 0}),
    (CHAT, {"top_logprobs": 0}, {"logprobs": 0}),
    (CHAT, {"top_logprobs": 5}, {"logprobs": 5}),
    (CHAT, {"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
    (CHAT, {"tool_choice": "none"}, {}),
    (TEXT, {"logprobs": None}, NO_LOGPROBS),
    (TEXT, {"logprobs": 0}, {"logprobs": 0}),
    (TEXT, {"logprobs": None, "echo": True}, NO_LOGPROBS),
    (TEXT, {"logprobs": None, "prompt_logprobs": None, "echo": True}, {**NO_LOGPROBS, "prompt_logprobs": None}),
    *(
        (url, body, values)
        for url in (CHAT, TEXT)
        for body, values in (
            ({"response_format": {"type": "text"}}, NO_GRAMMAR),
            ({"response_format": None}, NO_GRAMMAR),
            ({"structured_outputs": None}, NO_GRAMMAR),
            ({"structured_outputs": {"json": None}}, NO_GRAMMAR),
            ({"prompt_logprobs": None}, {"prompt_logprobs": None}),
            ({"stop": None, "stop_token_ids": None}, {"stop": (), "stop_token_ids": ()}),
            ({"stop": [], "bad_words": []}, {"stop": (), "bad_words": ()}),
            ({"bad_words": None, "seed": None}, {"bad_words": (), "seed": None}),
            ({"logit_bias": None, "allowed_token_ids": None}, {"logit_bias": None, "allowed_token_ids": None}),
            ({"logit_bias": {}}, {"logit_bias": {}}),
            ({"n": 1, "temperature": 0, "min_tokens": 0}, {"n": 1, "temperature": 0, "min_tokens": 0}),
            ({"presence_penalty": 0, "frequency_penalty": 0}, {"presence_penalty": 0, "frequency_penalty": 0}),
            ({"ignore_eos": False, "skip_special_tokens": True}, {"ignore_eos": False, "skip_special_tokens": True}),
            # these always have a value: null means the default
            ({"n": None, "temperature": None, "max_tokens": None, "presence_penalty": None}, {}),
        )
    ),
]


@pytest.mark.parametrize(("url", "body", "values"), UNDONE)
def test_a_body_takes_back_what_the_job_asks_for(url, body, values):
    model = ModelFacts(("m",), ByteTokenizer(), ByteTokenizer.chat_template, SOME)
    prompt = {"messages": USER} if url == CHAT else {"prompt": "a"}
    assert parse_request(parse_body(url, prompt), model).params == SOME
    asked = parse_request(parse_body(url, {**prompt, **body}), model)
    assert asked.params == replace(SOME, **values)
    assert asked.returns_prompt_logprobs == (asked.params.prompt_logprobs is not None)


def test_logprobs_taken_back_leave_nothing_of_a_prompt():
    """The default asks for the prompt's, and the body for no tokens and no logprobs."""
    defaults = SamplingParams(max_tokens=0, prompt_logprobs=1, logprobs=1)
    model = ModelFacts(("m",), ByteTokenizer(), None, defaults)
    body = {"prompt": "a", "echo": True, "max_tokens": 0}
    assert not parse_request(parse_body(TEXT, body), model).echo_only
    asked = parse_request(parse_body(TEXT, {**body, "logprobs": None, "prompt_logprobs": None}), model)
    assert asked.echo_only and asked.params.max_tokens == 0 and not asked.returns_prompt_logprobs


def test_content_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [{"role": "user", "content": [{**part, "image_url": None} for part in parts], "name": None}]
    assert chat_messages(given, "m") == [{"role": "user", "content": parts}], "the template's form is the template's"
    with pytest.raises(InvalidInput, match=r"m: messages\[0\]: content part of type 'image_url'"):
        chat_messages([{"role": "user", "content": [{"type": "image_url"}]}], "m")
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert chat_messages([called], "m") == [{**called, "content": ""}]
    assert chat_messages('[{"role": "user", "content": null}]', "m") == [{"role": "user", "content": ""}]
    with pytest.raises(InvalidInput, match=r"m: messages\[0\] has no content"):
        chat_messages([{"role": "user", "text": "hi"}], "m")
    assert ready_prompt([1, 2], "p") == [1, 2]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_logprobs_of_prompts_have_a_column(tmp_path, form):
    """As `LLM.generate` gives them; rows may ask for themselves."""
    overrides = ['{"prompt_logprobs": 2}', None]
    pq.write_table(pa.table({"text": ["abc", "de"], "over": overrides}), tmp_path / "in.parquet")
    sampling = {"prompt_logprobs": 0, "max_tokens": 0, "column": "over"}
    spec = job(tmp_path, sampling=sampling, output={"format": form})
    run(spec)
    for row, text, count in zip(rows_of_output(tmp_path / "out"), ("abc", "de"), (2, 0), strict=True):
        (expected,) = LLM("fake").generate([text], SamplingParams(max_tokens=0, prompt_logprobs=count))
        found = row["prompt_logprobs"]
        found = orjson.loads(found) if form == "parquet" else found
        assert row["status"] == "ok" and row["response"] == "" and found[0] is None
        for entry, own in zip(found[1:], expected.prompt_logprobs[1:], strict=True):
            top = [{"token_id": token, "logprob": value} for token, value in own.top]
            assert entry == {"token_id": own.token_id, "logprob": own.logprob, "top": top} and len(top) == count
