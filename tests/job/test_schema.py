"""Columns through whole jobs: what a row's prompt and its output hold, alone and among other rows and files."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import InputError
from batchinfer.job.inspect.preview import describe_preview, preview
from batchinfer.job.inspect.verify import audit
from batchinfer.job.retry import retry_job
from batchinfer.job.run import run_job
from batchinfer.spec import StorageSpec
from tests.job.doubles import ScriptedLLM, job, rows_of_output, run, snapshot
from tests.job.doubles import write_parquet as write_ids


def lines(path, *rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(path)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def finish(tmp_path, *paths, form="jsonl", out="out", **sections):
    """Run a job over these files; returns its rows. The output must be found right."""
    input_ = {"path": list(paths), **sections.pop("input", {})}
    output = {"path": str(tmp_path / out), "format": form, **sections.pop("output", {})}
    llm = ScriptedLLM()
    run(job(tmp_path, input=input_, output=output, **sections), llm)
    assert audit(str(tmp_path / out), StorageSpec()).differences == []
    return rows_of_output(tmp_path / out), [(*prompt.contents, None)[0] for prompt in llm.seen]


NUMBERS = [b"3", b"2.5", b"1e2", b"1.0", b"-0.0", b"1e22", b"9007199254740992", b"0.1"]


class TestNumbersOfLines:
    def test_a_rows_number_does_not_depend_on_other_rows(self, tmp_path):
        rows = [b'{"x":%s}' % number for number in NUMBERS]
        together = lines(tmp_path / "all.jsonl", *rows)
        prompt = {"template": "{{ x }}"}
        written, prompts = finish(tmp_path, together, prompt=prompt)
        for place, row in enumerate(rows):
            alone = lines(tmp_path / f"{place}.jsonl", row)
            [one], [content] = finish(tmp_path, alone, prompt=prompt, out=f"out{place}")
            assert (content, repr(one["x"])) == (prompts[place], repr(written[place]["x"]))
        files = [str(tmp_path / f"{place}.jsonl") for place in range(len(rows))]
        apart, contents = finish(tmp_path, *files, prompt=prompt, out="apart")
        assert contents == prompts == ["3", "2.5", "100.0", "1.0", "-0.0", "1e+22", "9007199254740992", "0.1"]
        assert [repr(row["x"]) for row in apart] == [repr(row["x"]) for row in written]

    def test_parquet_has_doubles_where_they_hold_the_numbers(self, tmp_path):
        path = lines(tmp_path / "a.jsonl", *(b'{"x":%s}' % number for number in NUMBERS), b'{"x":NaN}', b'{"x":null}')
        rows, _ = finish(tmp_path, path, form="parquet", prompt={"template": "p"}, output={"chunk_rows": 3})
        assert pq.read_schema(next((tmp_path / "out/parts").iterdir())).field("x").type == pa.float64()
        assert [repr(row["x"]) for row in rows] == [repr(float(n)) for n in [*NUMBERS, b"nan"]] + ["None"]
        wide = lines(tmp_path / "b.jsonl", {"x": 2**53 + 1}, {"x": 0.5})
        rows, _ = finish(tmp_path, wide, form="parquet", prompt={"template": "p"}, out="wide")
        assert [row["x"] for row in rows] == ["9007199254740993", "0.5"]

    @pytest.mark.parametrize("other", [True, "3", [3], {"a": 3}, 10**30])
    def test_mixed_columns_keep_each_value(self, tmp_path, other):
        path = lines(tmp_path / "a.jsonl", {"x": 3}, {"x": other}, {"x": 2.5})
        rows, prompts = finish(tmp_path, path, prompt={"template": "{{ x }}"})
        assert [repr(row["x"]) for row in rows] == ["3", repr(other), "2.5"]
        assert prompts[0] == "3" and prompts[2] == "2.5"


class TestFilesThatDiffer:
    def test_a_row_is_a_function_of_its_own_file(self, tmp_path):
        struct = pa.array([{"a": 1}], pa.struct({"a": pa.int32()}))
        a = parquet(
            tmp_path / "a.parquet", n=pa.array([3], pa.int32()), s=struct, t=pa.array(["x"]).dictionary_encode()
        )
        b = parquet(tmp_path / "b.parquet", n=[4], s=[{"b": "y", "a": 2}], t=pa.array(["y"], pa.large_string()))
        template = "{{ n }} {{ s | tojson }} {{ t }}"
        rows, prompts = finish(tmp_path, a, b, prompt={"template": template})
        assert prompts == ['3 {"a": 1} x', '4 {"b": "y", "a": 2} y']
        assert [row["s"] for row in rows] == [{"a": 1}, {"b": "y", "a": 2}]
        rows, prompts = finish(tmp_path, a, b, prompt={"template": template}, form="parquet", out="tables")
        assert prompts[0] == '3 {"a": 1} x'
        assert [row["s"] for row in rows] == [{"a": 1, "b": None}, {"a": 2, "b": "y"}]
        schemas = {pq.read_schema(part).to_string() for part in (tmp_path / "tables/parts").iterdir()}
        assert len(schemas) == 1

    @pytest.mark.parametrize("columns", [["id", "text"], ["text"], []])
    def test_only_what_is_needed_must_agree(self, tmp_path, columns):
        a = parquet(tmp_path / "a.parquet", id=[1], text=["a"], extra=[1], gone=[1], lang=["en"])
        b = parquet(tmp_path / "b.parquet", text=["b"], id=[2], extra=[0.5], lang=[7])
        rows, prompts = finish(tmp_path, a, b, input={"columns": columns}) if columns else ([], ["a", "b"])
        assert prompts == ["a", "b"] and all({"id", "text"} & row.keys() == set(columns) for row in rows)
        for sections in (
            {},
            {"input": {"columns": ["extra"]}},
            {"input": {"columns": ["text"]}, "prompt": {"template": "{{ gone }}"}},
            {"input": {"columns": ["text"], "where": "lang == 'en'"}},
        ):
            with pytest.raises(InputError, match=r"a\.parquet .*b\.parquet"):
                finish(tmp_path, a, b, out="refused", **sections)

    def test_another_prompt_finds_the_columns_that_the_plan_left_out(self, tmp_path):
        a = parquet(tmp_path / "a.parquet", text=["a"], extra=[1])
        b = parquet(tmp_path / "b.parquet", text=["b"], extra=[0.5])
        finish(tmp_path, a, b, input={"columns": ["text"]})
        with pytest.raises(InputError, match="column 'extra' is int64"):
            finish(tmp_path, a, b, input={"columns": ["text"]}, prompt={"template": "{{ extra }}"})


def damaged(*cells):
    binary = pa.array(cells, pa.binary())
    return pa.StringArray.from_buffers(len(binary), binary.buffers()[1], binary.buffers()[2])


@pytest.mark.parametrize("limit", [None, 2])
def test_the_filter_judges_rows_whose_other_cells_are_damaged(tmp_path, limit):
    text = damaged(b"a", b"\xff", b"\xff", b"d", b"e")
    path = parquet(tmp_path / "a.parquet", text=text, lang=damaged(b"en", b"de", b"en", b"\xff", b"en"), id=range(5))
    rows, _ = finish(tmp_path, path, input={"where": "lang == 'en'", "limit": limit}, output={"chunk_rows": 10})
    assert [(row["id"], row["status"]) for row in rows] == [(0, "ok"), (2, "error"), (3, "error"), (4, "ok")][:limit]


class TestJsonColumns:
    TEXTS = ('[{"role": "user", "content": "hi",\n "name": null}]', "no json", None)

    @pytest.mark.parametrize("form", ["jsonl", "parquet"])
    @pytest.mark.parametrize("kind", [pa.json_(), pa.json_(pa.large_string())])
    def test_they_are_values(self, tmp_path, form, kind):
        path = parquet(tmp_path / "a.parquet", m=pa.array(self.TEXTS, kind))
        rows, prompts = finish(tmp_path, path, form=form, prompt={"messages": "m", "template": None})
        assert prompts[0] == [{"role": "user", "content": "hi"}] and prompts[1:] == [None, None]
        assert [row["status"] for row in rows] == ["ok", "error", "error"]
        assert "not JSON" in rows[1]["error"]
        wanted = [json.loads(self.TEXTS[0]), "no json", None] if form == "jsonl" else list(self.TEXTS)
        assert [row["m"] for row in rows] == wanted

    def test_overrides_and_choices(self, tmp_path):
        overrides = pa.array(['{"max_tokens": 4}', None], pa.json_())
        path = parquet(tmp_path / "a.parquet", text=["a", "b"], s=overrides)
        llm = ScriptedLLM()
        run(job(tmp_path, input={"path": path}, sampling={"column": "s"}), llm)
        assert llm.seen[0].params.max_tokens == 4 and llm.seen[1].params is None


@pytest.mark.parametrize(
    "values",
    [
        pa.array([{"max_tokens": 4, "top_k": None}], pa.struct({"max_tokens": pa.int32(), "top_k": pa.int64()})),
        pa.array([[("max_tokens", 4), ("top_k", None)]], pa.map_(pa.string(), pa.int64())),
        pa.array(['{"max_tokens": 4, "top_k": null}'], pa.json_()),
        pa.array(['{"max_tokens": 4, "top_k": null}'], pa.string_view()),
        pa.array(['{"max_tokens": 4, "top_k": null}']).dictionary_encode(),
    ],
)
def test_overrides_in_every_form(tmp_path, values):
    llm = ScriptedLLM()
    path = parquet(tmp_path / "a.parquet", text=["a"], s=values)
    run(job(tmp_path, input={"path": path}, sampling={"column": "s"}), llm)
    assert llm.seen[0].error is None
    assert llm.seen[0].params == replace(llm.model_facts.defaults, max_tokens=4)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1, 2]], pa.large_list(pa.int32())),
        pa.array([[1, 2]], pa.list_view(pa.int64())),
        pa.array([[1, 2]], pa.list_(pa.uint8(), 2)),
        pa.array(["1 2"], pa.string_view()),
        pa.array(["1 2"], pa.large_string()).dictionary_encode(),
    ],
)
def test_ready_prompts_in_every_form(tmp_path, column):
    _, [prompt] = finish(tmp_path, parquet(tmp_path / "a.parquet", p=column), prompt={"column": "p", "template": None})
    assert prompt in ([1, 2], "1 2")


class TestNoRows:
    @pytest.mark.parametrize("form", ["parquet", "jsonl"])
    @pytest.mark.parametrize("rows", [0, 9])
    def test_the_output_has_a_part_that_shows_the_columns(self, tmp_path, form, rows):
        write_ids(tmp_path / "in.parquet", rows)
        spec = job(tmp_path, input={"where": "id > 100"}, output={"format": form})
        report = run_job(spec)
        assert report.outcome == "done" and report.totals["output_rows"] == 0
        [part] = (tmp_path / "out/parts").iterdir()
        assert rows_of_output(tmp_path / "out") == []
        if form == "parquet":
            assert pq.read_schema(part).names[:3] == ["id", "text", "row"]
        assert audit(spec.output.path, StorageSpec()).differences == []
        before = snapshot(tmp_path / "out")
        run_job(spec)
        retry_job(spec)
        assert snapshot(tmp_path / "out") == before
        assert "0 are selected" in describe_preview(preview(spec, 10))

    @pytest.mark.parametrize(
        "sections", [{}, {"prompt": {"messages": "m", "template": None}}, {"input": {"columns": ["id"]}}]
    )
    def test_files_without_lines(self, tmp_path, sections):
        path = lines(tmp_path / "a.jsonl")
        rows, prompts = finish(tmp_path, path, form="parquet", **sections)
        assert rows == prompts == []
        [part] = (tmp_path / "out/parts").iterdir()
        assert "response" in pq.read_schema(part).names


def test_rows_of_which_nothing_is_read(tmp_path):
    path = lines(tmp_path / "a.jsonl", {}, {})
    rows, prompts = finish(tmp_path, path, prompt={"template": "hi"})
    assert prompts == ["hi", "hi"] and [row["row"] for row in rows] == [0, 1]
    write_ids(tmp_path / "in.parquet", 9)
    assert "9 are selected" in describe_preview(preview(job(tmp_path, prompt={"template": "hi"}), 100))


class TestNumbersThatJsonLacks:
    ROWS = (b'{"text":"a","x":NaN,"n":[Infinity]}', b'{"text":"b","x":0.5,"n":["NaN"]}', b'{"text":"c","x":1}')

    def test_where_nobody_uses_them(self, tmp_path):
        rows, prompts = finish(tmp_path, lines(tmp_path / "a.jsonl", *self.ROWS))
        assert prompts == ["a", "b", "c"]
        assert [(row["x"], row["n"]) for row in rows] == [(None, [None]), (0.5, ["NaN"]), (1, None)]

    def test_in_tables(self, tmp_path):
        rows, _ = finish(tmp_path, lines(tmp_path / "a.jsonl", *self.ROWS), form="parquet")
        assert [repr(row["x"]) for row in rows] == ["nan", "0.5", "1.0"]
        assert [row["n"] for row in rows] == ["[null]", '["NaN"]', None]


def test_a_carried_column_may_be_named_as_a_column_of_another_task(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "choice": ["mine"]}), tmp_path / "in.parquet")
    run(job(tmp_path, prompt={"template": "{{ text }} more"}, sampling={"prompt_logprobs": 1}))
    [row] = rows_of_output(tmp_path / "out")
    assert row["choice"] == "mine" and row["prompt_logprobs"] is not None
