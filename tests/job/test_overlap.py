"""Input and output lie apart: whatever takes in what a job writes is refused, the first time as the second."""

from __future__ import annotations

import pytest

from batchinfer.errors import OutputConflict
from batchinfer.job.inspect.preview import preview
from batchinfer.job.overlap import refuse_inside, refuse_overlap
from tests.job.doubles import ScriptedLLM, job, run


def check(tmp_path, patterns, output, **section):
    spec = job(tmp_path, input={"path": patterns}, output={"path": output, **section})
    refuse_overlap(spec)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make a folder with lines in it, in which the job runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("in.jsonl", "data/a.jsonl", "data/day=1/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "t"}\n')
    return tmp_path


LIE_UNDER = [
    ("data/*.jsonl", "data"),
    ("data/a.jsonl", "data/"),
    ("data", "data"),
    ("data/day=1", "data"),
    ("./data/../data/a.jsonl", "data"),
    ("in.jsonl", "."),
    ("s3://b/out/in.parquet", "s3://b/out"),
    ("s3a://b/out/x/*.parquet", "s3://b/out/"),
    ("s3://b/in.parquet", "s3://b"),
    ("gcs://b/out/in.parquet", "gs://b/out"),
    ("az://c/out/in.parquet", "abfss://c@account.dfs.core.windows.net/out"),
    ("memory://out/in.parquet", "memory:///out"),
]
TAKE_IN = [
    ("**/*.jsonl", "out"),
    ("**", "out"),
    ("**/*", "deep/er/out"),
    ("*", "out"),
    (".", "out"),
    ("data", "data/out"),
    ("data/*", "data/out"),
    ("*/parts/*", "out"),
    ("**/parts", "out"),
    ("**/plan.json", "out"),
    ("**/*.json", "out"),
    ("**/*.zst", "out"),
    ("data", "data/day=1/_x=2"),
    ("s3://b/**/*.jsonl", "s3://b/out"),
    ("s3://b", "s3://b/out"),
    ("s3://b/d*", "s3a://b/data/out"),
]
APART = [
    ("in.jsonl", "out"),
    ("*.jsonl", "out"),
    ("data", "out"),
    ("data", "database"),
    ("data/*.jsonl", "data/out"),
    ("data/*/*.jsonl", "data/out"),
    ("*/*/*.jsonl", "out_of/this/place"),
    ("data", "data/_out"),
    ("data/**", "data/.runs/out"),
    ("s3://b/in/**/*.jsonl", "s3://b/out"),
    ("s3://b/in", "gs://b/in/out"),
    ("s3://b/inner", "s3://b/in"),
]


@pytest.mark.parametrize(("pattern", "output"), LIE_UNDER)
def test_an_input_under_the_output_is_refused(place, pattern, output):
    with pytest.raises(OutputConflict, match=r"lies under output\.path"):
        check(place, [pattern], output)


@pytest.mark.parametrize(("pattern", "output"), TAKE_IN)
def test_a_pattern_that_matches_the_output_is_refused(place, pattern, output):
    with pytest.raises(OutputConflict, match="takes in what this job writes"):
        check(place, [pattern], output)


@pytest.mark.parametrize(("pattern", "output"), APART)
def test_input_and_output_apart_are_accepted(place, pattern, output):
    if "://" not in pattern:
        check(place, [pattern], output)
    else:
        check(place, ["in.jsonl", pattern], output)


def test_the_name_of_a_part_decides(place):
    check(place, ["**/*.jsonl"], "out", format="parquet")
    check(place, ["**/a.jsonl", "in.jsonl"], "out", format="jsonl")
    with pytest.raises(OutputConflict, match=r"out/parts/…\.jsonl\.gz among it"):
        check(place, ["in.jsonl", "**/*.jsonl.gz"], "out", format="jsonl", compression="gzip")


@pytest.mark.parametrize("other", ["{0}/data/a.jsonl", "file://{0}/data/a.jsonl", "link/a.jsonl", "link/*.jsonl"])
@pytest.mark.parametrize("output", ["data", "./data", "{0}/data", "file://{0}/data/", "link", "nothing/../data"])
def test_links_and_spellings_are_resolved(place, other, output):
    (place / "link").symlink_to("data")
    with pytest.raises(OutputConflict, match=r"lies under output\.path"):
        check(place, [other.format(place)], output.format(place))


def test_names_with_the_characters_of_a_glob(place):
    (place / "a[1]").mkdir()
    (place / "a[1]/x.jsonl").write_text('{"text": "t"}\n')
    for pattern in ("a[1]/x.jsonl", "a[[]1]/x.jsonl", f"file://{place}/a%5B1%5D/x.jsonl"):
        with pytest.raises(OutputConflict, match="lies under"):
            check(place, [pattern], "a[1]")
    check(place, ["a[1]/x.jsonl"], "a1")


def test_a_file_under_the_output_that_a_glob_happens_to_match(place):
    """Nothing that the job writes is called so; the file is somebody's."""
    check(place, ["*/a.jsonl"], "out")
    (place / "out").mkdir()
    (place / "out/a.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(OutputConflict, match=r"out/a\.jsonl: lies under"):
        check(place, ["*/a.jsonl"], "out")
    (place / "data/link.jsonl").symlink_to(place / "out/a.jsonl")
    with pytest.raises(OutputConflict, match=r"data/link\.jsonl: lies under"):
        refuse_inside(job(place, output={"path": "out"}), ["in.jsonl", "data/link.jsonl"])


@pytest.mark.parametrize("start", [lambda spec: run(spec, ScriptedLLM()), lambda spec: preview(spec, 10)])
def test_it_is_refused_before_anything_is_written(place, start):
    before = sorted(place.rglob("*"))
    with pytest.raises(OutputConflict, match=r"input\.path: \*\*/\*\.jsonl"):
        start(job(place, input={"path": "**/*.jsonl"}, output={"path": "out"}))
    assert sorted(place.rglob("*")) == before
