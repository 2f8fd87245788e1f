"""Tests of job files: unknown keys and wrong values are reported with file, line, key and a suggestion."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.cli.options import parse_settings
from batchinfer.errors import BatchInferError, SpecError, UsageError
from batchinfer.request import SamplingParams
from batchinfer.spec import JobSpec, load_spec, locate, parse_spec
from batchinfer.spec_problems import OTHER_NAMES, OTHER_VALUES

JOB = {"model": "fake", "input": {"path": "i"}, "prompt": {"user": "x"}, "output": {"path": "o"}}
TEXT = 'model: fake\ninput: {path: in.jsonl}\nprompt: {user: "{{ text }}"}\noutput: {path: out}\n'


def error_of(extra) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec({**JOB, **extra})
    return str(caught.value)


@pytest.fixture
def job(tmp_path):
    """Return a function that writes a job file and loads it."""

    def load(text, overrides=None, head=TEXT):
        path = tmp_path / "job.yaml"
        path.write_bytes(text if isinstance(text, bytes) else (head + text).encode())
        return load_spec(path, overrides)

    return load


# -- unknown keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "key", "meant"),
    [
        ("Max-Tokens: 5", "Max-Tokens", "sampling.max_tokens"),
        ("max_tokens: 5", "max_tokens", "sampling.max_tokens"),
        ("prompt2: 1", "prompt2", "prompt"),
        ("Seed: 1", "Seed", "seed"),
        ("engine: {max-num-seqs: 4}", "engine.max-num-seqs", "max_num_seqs"),
        ("engine: {maxNumSeqs: 4}", "engine.maxNumSeqs", "max_num_seqs"),
        ("engine.maxNumSeqs: 4", "'engine.maxNumSeqs'", "engine.max_num_seqs"),
        ("sampling: {topP: 0.9}", "sampling.topP", "top_p"),
        ("sampling: {max_num_seqs: 9}", "sampling.max_num_seqs", "engine.max_num_seqs"),
        ("engine: {temperature: 1}", "engine.temperature", "sampling.temperature"),
        ("sampling: {max_new_tokens: 1}", "sampling.max_new_tokens", "max_tokens"),
        ("engine: {batch_size: 1}", "engine.batch_size", "max_num_seqs"),
        ("storage: {endpoint_url: 1}", "storage.endpoint_url", "endpoint"),
        ("1: 2", "1", None),
        ("on: 1", "on", None),
        ('"": 1', "''", None),
        ("größe: 1", "größe", None),
        ("engine: {x-common: 1}", "engine.x-common", None),
        ('"a.b c": 1', "'a.b c'", None),
    ],
)
def test_unknown_key_is_reported_with_line_and_suggestion(job, line, key, meant):
    with pytest.raises(SpecError) as caught:
        job(line)
    message = str(caught.value)
    assert f"job.yaml:5: {key}: unknown key" in message
    assert (f"; did you mean {meant!r}" if meant else "unknown key (known: ") in message


def test_several_unknown_keys_are_all_reported(job):
    with pytest.raises(SpecError) as caught:
        job("engine:\n  a: 1\n  b: 2\nc: 3\n")
    assert [line.split(": unknown")[0].rpartition("/")[2] for line in str(caught.value).splitlines()] == [
        "job.yaml:6: engine.a",
        "job.yaml:7: engine.b",
        "job.yaml:8: c",
    ]


def test_every_synonym_maps_to_an_existing_key_or_value():
    for key in OTHER_NAMES.values():
        section, _, name = key.partition(".")
        assert name in f"{list(SamplingParams.__match_args__)}" if section == "sampling" else (section, name) in FIELDS
    literals = str([field.annotation for _, model in SECTIONS for field in model.model_fields.values()])
    assert all(repr(value) in literals for value in OTHER_VALUES.values())


def test_key_without_space_after_colon_is_explained():
    assert "a key ends with a colon and a space" in error_of({"seed:1": None})


ODD = st.text(max_size=8) | st.integers() | st.none() | st.floats() | st.booleans() | st.tuples(st.integers())


@given(ODD, st.sampled_from([(), ("engine",), ("input",), ("sampling",), ("errors",)]))
@settings(max_examples=150, deadline=None)
def test_any_odd_key_is_accepted_or_reported_by_name(key, parents):
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in JOB.items()}
    inner = values
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[key] = 1
    try:
        parse_spec(values)
    except SpecError as error:
        assert "unknown key" in str(error) or isinstance(key, str)
        assert all(name in str(error) for name in parents)
    else:
        assert isinstance(key, str)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
SECTIONS = [(name, f.annotation) for name, f in JobSpec.model_fields.items() if hasattr(f.annotation, "model_fields")]
FIELDS = [
    (name, key)
    for name, field in JobSpec.model_fields.items()
    for key in getattr(field.annotation, "model_fields", [None])
]


@given(st.sampled_from(FIELDS), VALUES)
@settings(max_examples=400, deadline=None)
def test_any_value_is_accepted_or_refused_by_its_key(field, value):
    name, key = field
    inner = JOB.get(name) if isinstance(JOB.get(name), dict) else {}
    try:
        parse_spec({**JOB, name: value if key is None else {**inner, key: value}})
    except SpecError as error:
        assert name in str(error) and "Input should" not in str(error)


# -- wrong values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"engine": 5}, "engine: must be a mapping with dtype, "),
        ({"engine": [1]}, "engine: must be a mapping with dtype, "),
        ({"sampling": 5}, "sampling: must be a mapping, got 5"),
        ({"seed": 1.5}, "seed: must be an integer, got 1.5"),
        ({"seed": True}, "seed: must be an integer, got true"),
        ({"seed": "5"}, "seed: must be an integer, got '5'; without quotes it is a number"),
        ({"seed": 1 << 63}, "seed: must fit 64 bits"),
        ({"seed": math.inf}, "seed: must be an integer, got inf"),
        (
            {"engine": {"dtype": "fp16"}},
            "must be one of float32, bfloat16, float16, got 'fp16'; did you mean 'float16'?",
        ),
        ({"engine": {"dtype": "Float16"}}, "did you mean 'float16'?"),
        ({"engine": {"max_num_seqs": 0}}, "engine.max_num_seqs: must be an integer in [1, 65536], got 0"),
        ({"engine": {"kv_cache_tokens": 1}}, "engine.kv_cache_tokens: must be an integer, at least 32, got 1"),
        (
            {"fake": {"step_s": "1"}},
            "fake.step_s: must be a number, at least 0, got '1'; without quotes it is a number",
        ),
        ({"output": {"path": "o", "token_ids": "yes"}}, "must be true or false, got 'yes'; write true"),
        ({"output": {"path": "o", "token_ids": 1}}, "output.token_ids: must be true or false, got 1"),
        ({"output": {"path": 5}}, "output.path: must be text, got 5; put it in quotes to make it text"),
        ({"output": {"path": None}}, "output.path: must be text, got null"),
        ({"output": {"path": "o", "format": "json"}}, "did you mean 'jsonl'?"),
        ({"output": {}}, "output.path: missing"),
        ({"input": None}, "input: missing"),
        ({"input": {"path": ["a", 5]}}, "input.path.1: must be text, got 5"),
        ({"input": {"path": 5}}, "input.path: must be text, or a list of texts, got 5"),
        ({"input": {"path": "i", "limit": 0}}, "input.limit: must be an integer, at least 1, got 0"),
        ({"errors": {"max": 2.5}}, "errors.max: must be a whole number of rows"),
        ({"errors": {"max": True}}, "errors.max: must be a whole number of rows"),
        ({"fake": {"answer_tokens": [3, 1]}}, "fake.answer_tokens: must be a positive integer, or [shortest, longest]"),
        ({"fake": {"answer_tokens": [True, 2]}}, "fake.answer_tokens: must be a positive integer"),
        ({"sampling": {"max_tokens": 5.5}}, "sampling.max_tokens: must be an integer, got 5.5"),
        ({"sampling": {"stop": [None]}}, "sampling.stop: holds null; every item must be"),
        ({"sampling": {"logit_bias": {"a": None}}}, "to numbers, got 'a': null"),
        ({"sampling": {"structured_outputs": {"choice": ["a", False]}}}, "holds false; every choice"),
        ({"sampling": {"max_tokens": -1}}, "sampling.max_tokens: must be at least 0, got -1"),
        ({"sampling": {"column": 5}}, "sampling.column: must be a column name"),
        ({"sampling": {"structured_outputs": {"json": 5}}}, "sampling.structured_outputs.json: must be a schema"),
        ({"prompt": {"user": {"text": None}}}, "prompt.user: must be text, got a mapping"),
    ],
)
def test_wrong_value_is_reported_with_key_and_expected_type(extra, message):
    assert message in error_of(extra)


def test_integral_floats_and_lists_are_converted():
    spec = parse_spec(
        {
            **JOB,
            "seed": 7.0,
            "engine": {"max_num_seqs": 64.0},
            "fake": {"answer_tokens": [1.0, 2]},
            "errors": {"max": 5},
            "sampling": {"max_tokens": 5.0},
        }
    )
    assert (spec.seed, spec.engine.max_num_seqs, spec.fake.answer_tokens, spec.errors.max) == (7, 64, (1, 2), 5)
    assert type(spec.seed) is int and type(spec.errors.max) is int
    assert type(parse_spec({**JOB, "errors": {"max": 1.0}}).errors.max) is float


def test_dumped_spec_parses_to_an_equal_spec():
    spec = parse_spec({**JOB, "score": {"choices": ["a", "b"]}, "task": "choose", "fake": {"answer_tokens": [1, 2]}})
    assert parse_spec(spec.model_dump(mode="json")) == spec


# -- files -----------------------------------------------------------------------------------------------------------


def test_empty_section_and_null_mean_defaults(job):
    spec = job("engine:\n  # max_num_seqs: 4\nseed: null\n")
    assert spec.engine.max_num_seqs == 256 and spec.seed == 0


def test_x_keys_hold_anchors_and_are_ignored(job):
    spec = job("x-common: &common {max_tokens: 5}\nsampling: {<<: *common, temperature: 0}\n")
    assert spec.sampling == {"max_tokens": 5, "temperature": 0}


def test_override_of_an_aliased_section_leaves_the_other_unchanged(job):
    spec = job(
        "x-a: &a {path: i}\ninput: *a\noutput: *a\n", {"output.path": "p"}, head="model: fake\nprompt: {user: x}\n"
    )
    assert (spec.input.path, spec.output.path) == (("i",), "p")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "job.yaml: is empty; a job file is a mapping"),
        (b"# nothing\n", "job.yaml: is empty"),
        (b"- a\n", "job.yaml: holds a list; a job file is a mapping"),
        (b"model", "job.yaml: holds 'model'"),
        (b"PAR1\0\0", "job.yaml:1: not text"),
    ],
)
def test_file_without_a_job_mapping_is_refused(job, data, message):
    with pytest.raises(SpecError, match=message):
        job(data)


def test_directory_as_job_file_is_refused(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)


def test_error_in_a_setting_is_located_at_set(job):
    for overrides, message in (
        ({"engine.max_num_sqes": 4}, "--set: engine.max_num_sqes: unknown key"),
        ({"sampling": {"topP": 1}}, "--set sampling: sampling.topP: unknown key"),
        ({"seed.x": 1}, "--set seed.x: seed is not a section"),
        ({"x-a": 1}, "--set: x-a: unknown key"),
    ):
        with pytest.raises(SpecError) as caught:
            job("seed: 1\n", overrides)
        assert message in str(caught.value)


def test_comment_that_cuts_a_template_is_warned_about(job, capfd):
    job("", head=TEXT.replace('"{{ text }}"', "be brief # {{ text }}\n  "))
    assert "job.yaml:3: prompt.user: ends before '# {{ text }}'" in capfd.readouterr().err.replace('\\"', '"')
    job("score: {choices: [a, b # c\n]}\ntask: choose\n")
    assert "score.choices.1: ends before '# c'" in capfd.readouterr().err.replace('\\"', '"')
    job("seed: 5 # why not\n")
    assert capfd.readouterr().err == ""


def test_locate_returns_the_line_of_the_deepest_existing_key(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("\ufeffmodel: fake\nx-a: &a\n  max_tokens: 5\nsampling:\n  <<: *a\n  stop: [a,\n    b]\n", "utf-8")
    lines = {
        "model": 1,
        "sampling.max_tokens": 3,
        "sampling.top_p": 4,
        "sampling.stop": 6,
        "sampling.stop.1": 7,
        "sampling.stop[1]": 7,
        "x": 1,
    }
    for key, line in lines.items():
        assert locate(path, key) == f"{path}:{line}"
    set_on_top = ["sampling.max_tokens", "sampling.stop", "input.path", "score"]
    lines |= {"input.path": "--set", "input": "--set input.path", "score.choices[1]": "--set score", "seed": 1}
    lines |= {
        "sampling.max_tokens": "--set",
        "sampling.stop": "--set",
        **dict.fromkeys(("sampling.stop.1", "sampling.stop[1]"), "--set sampling.stop"),
    }
    for key, line in lines.items():
        assert locate(path, key, set_on_top) == (line if isinstance(line, str) else f"{path}:{line}")
    path.write_text("a: [")
    assert locate(path, "a") == str(path)
    assert locate(tmp_path / "gone.yaml", "a") == str(tmp_path / "gone.yaml")


# -- settings --------------------------------------------------------------------------------------------------------


def test_setting_is_parsed_as_yaml_or_kept_as_text():
    cases = {
        "a": ("1e-3", 0.001),
        "b": ("no", "no"),
        "c": ("{{ text }}", "{{ text }}"),
        "stdin": ("-", "-"),
        "d": ("Question: {{ text }}", "Question: {{ text }}"),
        "e": ("Item # {{ n }}", "Item # {{ n }}"),
        "f": ("# Title", "# Title"),
        "g": ("*.jsonl", "*.jsonl"),
        "h": ('{"a":\t[1, 2.5]}', {"a": [1, 2.5]}),
        "i": ("", None),
        "j": ("a=b", "a=b"),
        "k": ("@x", "@x"),
    }
    assert parse_settings([f"{key}={text}" for key, (text, _) in cases.items()]) == {
        k: v for k, (_, v) in cases.items()
    }


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (["a=1", "a=2"], "--set a: given twice"),
        (["a.b=1", " a =2"], "--set a: given twice, or after a key below it"),
        (['a={"b": 1, "b": 2}'], "b: given twice"),
        (["a={b: !!python/none x}"], "the tag"),
        (["=1"], "must be KEY=VALUE"),
    ],
)
def test_invalid_setting_is_refused(settings_, message):
    with pytest.raises((UsageError, SpecError), match=message):
        parse_settings(settings_)
    assert parse_settings(["a={}", "a.b=1"]) == {"a": {}, "a.b": 1}


@given(st.text(max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_setting_is_accepted_or_refused_by_its_key(text):
    try:
        parse_settings([f"a={text}"])
    except BatchInferError as error:
        assert "--set a" in str(error)


def test_job_dumped_by_pyyaml_in_flow_style_loads(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(yaml.safe_dump(JOB, default_flow_style=True))
    assert load_spec(path) == parse_spec(JOB)
