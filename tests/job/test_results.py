"""Lines of the spool into parts and back: nothing is lost, whatever text, errors and samples there are."""

import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import ROW_ERRORS
from batchinfer.io.rows import InputFile, Inputs
from batchinfer.job.columns import output_layout
from batchinfer.job.openai_lines import build_lines, results_of_lines
from batchinfer.job.part_table import build_table, results_of_part
from batchinfer.job.result_encoder import ResultEncoder
from batchinfer.job.results import RowFailure, count_results, decode_results, encode_result
from batchinfer.job.row_prompts import LineRequest, parse_line
from batchinfer.openai.parse import ModelFacts
from batchinfer.request import Completion, CompletionOutput, SamplingParams, TokenLogprob
from batchinfer.spec import parse_spec
from batchinfer.text.tokenizer import ByteTokenizer

INPUTS = Inputs((InputFile("in.parquet", "parquet", 9, "e", 99),), pa.schema([("id", pa.int64())]))
BATCH = Inputs(
    (InputFile("in.jsonl", "openai-batch", 9, "e", 99),),
    pa.schema([(name, pa.string()) for name in ("custom_id", "method", "url", "body")]),
    frozenset({"body"}),
)


def layout_of(inputs=INPUTS, sampling=None, **output):
    values = {"model": "fake", "input": {"path": "x"}, "prompt": {"template": "x"}, "sampling": sampling or {}}
    if inputs is BATCH:
        values["input"]["format"] = "openai-batch"
        del values["prompt"]
    return output_layout(parse_spec({**values, "output": {"path": "o", **output}}), inputs)


MODEL = ModelFacts(("m",), ByteTokenizer(), ByteTokenizer.chat_template, SamplingParams())
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5)
LOGPROBS = st.lists(
    st.builds(
        TokenLogprob,
        st.integers(0, 99),
        st.floats(-50, 0),
        st.lists(st.tuples(st.integers(0, 99), st.floats(-50, 0)), max_size=2, unique_by=lambda pair: pair[0]).map(
            tuple
        ),
    ),
    max_size=3,
)
OUTPUTS = st.builds(
    CompletionOutput, st.text(max_size=20), TOKENS, st.sampled_from(["stop", "length"]), st.none() | LOGPROBS
)


def completions(samples):
    outputs = st.lists(OUTPUTS, min_size=samples, max_size=samples)
    of_prompt = st.none() | LOGPROBS.map(lambda entries: [None, *entries])
    fine = st.builds(Completion, st.just(0), TOKENS, outputs, st.none(), of_prompt)
    errors = st.sampled_from(ROW_ERRORS).flatmap(lambda kind: st.builds(kind, st.text(max_size=10)))
    failed = st.builds(Completion, st.just(0), TOKENS, st.just([]), errors)
    return st.lists(st.tuples(fine | failed), min_size=1, max_size=6).map(lambda rows: [row for (row,) in rows])


LAYOUTS = {
    "plain": (1, layout_of()),
    "all": (1, layout_of(token_ids=True, prefix="m_", sampling={"logprobs": 2, "prompt_logprobs": 1})),
    "list": (2, layout_of(token_ids=True, sampling={"n": 2, "logprobs": 2, "prompt_logprobs": 0})),
    "rows": (2, layout_of(token_ids=True, samples="rows", sampling={"n": 2, "logprobs": 2, "prompt_logprobs": 2})),
}


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_part_gives_back_the_rows_it_was_made_from(name, data):
    samples, layout = LAYOUTS[name]
    answers = data.draw(completions(samples))
    encoder = ResultEncoder(layout, MODEL)
    lines = [encode_result(encoder.result(3 * place, 0, answer, None)) for place, answer in enumerate(answers)]
    rows = decode_results(b"\n".join(reversed(lines)) + b"\n")
    assert [row.offset for row in rows] == [3 * place for place in range(len(answers))]
    assert [encode_result(row) for row in rows] == lines
    carried = pa.table({"id": range(len(rows))})
    table = build_table(layout, rows, carried, 100)
    assert table.schema == layout.schema
    counts = count_results(rows, layout.exploded)
    assert counts.output_rows == table.num_rows and counts.ok + sum(counts.errors.values()) == len(rows)
    back = results_of_part(layout, table.to_pylist(), 100)
    assert build_table(layout, back, carried, 100) == table
    assert count_results(back, layout.exploded) == counts


@settings(max_examples=60, deadline=None)
@given(answers=completions(2), chat=st.booleans())
def test_batch_lines_give_back_the_rows_they_were_made_from(answers, chat):
    layout = layout_of(BATCH)
    encoder = ResultEncoder(layout, MODEL)
    url = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    asked = orjson.dumps({**body, "n": 2, "logprobs": True if chat else 2}).decode()
    request = LineRequest(url, parse_line({"url": url, "body": asked}, MODEL))
    results = [encoder.result(place, 7 + place, answer, request) for place, answer in enumerate(answers)]
    rows = decode_results(b"\n".join(map(encode_result, results)))
    carried = pa.table({"custom_id": [f"c{n}" for n in range(len(rows))]})
    table = build_lines(layout, rows, carried, 7)
    lines = [
        {**line, "response": orjson.loads(line["response"]), "error": line["error"] and orjson.loads(line["error"])}
        for line in table.to_pylist()
    ]
    assert [line["custom_id"] for line in lines] == carried.column("custom_id").to_pylist()
    back = results_of_lines(lines, 7)
    assert build_lines(layout, back, carried, 7) == table and count_results(back, False) == count_results(rows, False)
    assert decode_results(b"\n".join(map(encode_result, back))) == back


@pytest.mark.parametrize(
    "line", [b"5", b"null", b"{}", b'{"offset":0,"prompt_tokens":1}', b"[0,1]", b"[]", b'"samples"']
)
def test_damaged_lines_raise_what_salvage_catches(line: bytes):
    with pytest.raises((ValueError, TypeError)):
        decode_results(line + b"\n")


def test_surrogates_in_an_error_do_not_stop_a_job():
    completion = Completion(0, [], error=ROW_ERRORS[0]("bad \ud800 text"))
    line = encode_result(ResultEncoder(layout_of(), MODEL).result(0, 0, completion, None))
    assert decode_results(line)[0].failure == RowFailure("invalid_input", "bad ? text")


def test_layout_follows_what_was_asked():
    assert "logprobs" not in layout_of().schema.names and "token_ids" not in layout_of().schema.names
    assert "logprobs" in layout_of(sampling={"column": "over"}).schema.names
    assert layout_of(sampling={"n": 2}).schema.field("response").type == pa.list_(pa.string())
    assert "sample" in layout_of(samples="rows").schema.names
    assert layout_of(format="jsonl", compression="zstd").suffix == ".jsonl.zst"
    assert layout_of(BATCH).suffix == ".jsonl" and layout_of().suffix == ".parquet"
