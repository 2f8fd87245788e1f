"""Tests of scanning many files, unifying their schemas, and streaming from S3 through faults and changes."""

import json
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import AccessDenied, InputError, InputMissing, SpecError, StorageError
from batchinfer.io import filesystem
from batchinfer.io.rows import InputFile, Inputs, RowSpan, scan_inputs, stream_rows
from batchinfer.spec import InputSpec, StorageSpec
from tests.io.reading import LOCAL, read_all, scan_all, spans_of, write_lines, write_parquet


def urls(inputs):
    return [file.url.rpartition("/")[2] for file in inputs.files]


class TestExpanding:
    def test_missing_path_is_reported(self, tmp_path):
        for pattern in (tmp_path / "a.jsonl", f"{tmp_path}/*.parquet", tmp_path):
            with pytest.raises(InputMissing, match=str(tmp_path)):
                scan_all(pattern)

    def test_format_follows_the_extension(self, tmp_path):
        path = write_lines(tmp_path / "a.txt", [{"x": 1}])
        with pytest.raises(SpecError, match=r"a\.txt: its name has no known extension.*input\.format"):
            scan_all(path)
        assert scan_all(path, format="jsonl").files[0].format == "jsonl"

    def test_unreadable_file_is_access_denied(self, tmp_path, monkeypatch):
        path = write_lines(tmp_path / "a.jsonl", [{"x": 1}])

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("os.open", refuse)
        with pytest.raises(AccessDenied, match=r"a\.jsonl"):
            scan_all(path)

    def test_limit_stops_the_scan(self, tmp_path):
        a = write_lines(tmp_path / "a.jsonl", [{"x": i} for i in range(10)])
        b = write_lines(tmp_path / "b.jsonl", [{"x": i} for i in range(10)] + [{"x": "drift"}])
        (tmp_path / "c.jsonl").write_text("never read")
        inputs = scan_all(a, b, tmp_path / "c.jsonl", limit=15)
        assert [file.rows for file in inputs.files] == [10, 5]
        assert len(read_all(inputs)[0]) == 15
        with pytest.raises(InputError):
            scan_all(a, b, tmp_path / "c.jsonl", limit=15, where="x > 1")
        p = write_parquet(tmp_path / "p.parquet", pa.table({"x": range(10)}))
        assert [file.rows for file in scan_all(p, a, limit=3).files] == [3]

    def test_empty_files_have_no_rows(self, tmp_path):
        a = write_lines(tmp_path / "a.jsonl", [])
        b = write_lines(tmp_path / "b.jsonl", [{"x": 1}])
        inputs = scan_all(a, b)
        assert [file.rows for file in inputs.files] == [0, 1]
        assert read_all(inputs)[0] == [{"x": 1}]
        assert read_all(scan_all(a)) == ([], {})


class TestSchemas:
    def test_conflicting_types_in_lines_are_refused(self, tmp_path):
        a = write_lines(tmp_path / "a.jsonl", [{"x": None}, {"x": 1}])
        b = write_lines(tmp_path / "b.jsonl", [{"x": None}, {}, {"x": "one"}])
        with pytest.raises(InputError, match=r"column 'x' is int64 in .*a\.jsonl:2 but string in .*b\.jsonl:3"):
            scan_all(a, b)
        c = write_lines(tmp_path / "c.jsonl", [{"x": {"y": 1}}])
        with pytest.raises(InputError, match=r"int64 in .*a\.jsonl:2 but a nested value in .*c\.jsonl:1"):
            scan_all(a, c)

    @pytest.mark.parametrize(
        ("first", "second", "kind", "text"),
        [
            ([None], [1], pa.int64(), False),
            ([1], [None], pa.int64(), False),
            ([1], [0.5], pa.float64(), True),
            ([0.5], [1], pa.float64(), True),
            ([2**60], [0.5], pa.string(), True),
            ([[1]], [{}], pa.string(), True),
            ([None], [[1]], pa.string(), True),
            ([[1]], [None], pa.string(), True),
            ([1, "a"], [2], pa.string(), True),
            ([2], [1, "a"], pa.string(), True),
        ],
    )
    def test_compatible_types_in_lines_are_unified(self, tmp_path, first, second, kind, text):
        a = write_lines(tmp_path / "a.jsonl", [{"x": value} for value in first])
        b = write_lines(tmp_path / "b.jsonl", [{"x": value} for value in second])
        inputs = scan_all(a, b)
        assert inputs.schema.field("x").type == kind
        assert inputs.text_json == (frozenset("x") if text else frozenset())
        assert list(map(repr, [row["x"] for row in read_all(inputs)[0]])) == list(map(repr, first + second))

    def test_key_missing_in_a_file_of_lines_is_null_and_logged(self, tmp_path, capsys):
        a = write_lines(tmp_path / "a.jsonl", [{"x": 1, "y": 2}])
        b = write_lines(tmp_path / "b.jsonl", [{"x": 1}])
        assert [row["y"] for row in read_all(scan_all(a, b))[0]] == [2, None]
        assert "b.jsonl" in capsys.readouterr().err

    def test_conflicting_parquet_schemas_are_refused(self, tmp_path):
        a = write_parquet(tmp_path / "a.parquet", pa.table({"x": [1], "y": ["a"]}))
        for name, table in {
            "type": pa.table({"x": ["1"], "y": ["a"]}),
            "more": pa.table({"x": [1], "y": ["a"], "z": [1]}),
            "fewer": pa.table({"x": [1]}),
            "double": pa.table({"x": [1.0], "y": ["a"]}),
        }.items():
            b = write_parquet(tmp_path / f"{name}.parquet", table)
            with pytest.raises(InputError, match=rf"column '[xyz]'.*(a|{name})\.parquet.*(a|{name})\.parquet"):
                scan_all(a, b)
            with pytest.raises(InputError, match=r"column '[xyz]'"):
                scan_all(b, a)

    def test_compatible_parquet_schemas_are_unified(self, tmp_path):
        a = write_parquet(tmp_path / "a.parquet", pa.table({"x": [1], "y": ["a"], "n": pa.nulls(1)}))
        large = pa.table({"y": pa.array(["b"], pa.large_string()), "n": [0.5], "x": pa.nulls(1)})
        b = write_parquet(tmp_path / "b.parquet", large)
        inputs = scan_all(a, b)
        assert inputs.schema.types == [pa.int64(), pa.string(), pa.float64()]
        assert read_all(inputs)[0] == [{"x": 1, "y": "a", "n": None}, {"x": None, "y": "b", "n": 0.5}]

    def test_select_reads_only_these_columns(self, tmp_path):
        path = write_lines(tmp_path / "a.jsonl", [{"a": 1, "b": [2], "c": [3]}])
        inputs = scan_all(path)
        chosen = inputs.select(["c", "a"])
        assert chosen.schema.names == ["a", "c"]
        assert chosen.text_json == {"c"}
        assert read_all(chosen)[0] == [{"a": 1, "c": [3]}]
        with pytest.raises(SpecError, match="column 'cc' is not in the input; did you mean 'c'"):
            inputs.select(["cc"])
        nothing = inputs.select([])
        assert [batch.table.num_rows for _, batch in stream_rows(nothing, spans_of(nothing), LOCAL)] == [1]
        parquet = scan_all(write_parquet(tmp_path / "p.parquet", pa.table({"x": range(7)}))).select([])
        assert [batch.table.num_rows for _, batch in stream_rows(parquet, spans_of(parquet, 5), LOCAL)] == [5, 2]

    def test_inputs_round_trip_through_the_plans_json(self, tmp_path):
        a = write_parquet(tmp_path / "a.parquet", pa.table({"x": [1]}).replace_schema_metadata({"k": "v"}))
        b = write_lines(tmp_path / "b.jsonl", [{"x": i} for i in range(9000)])
        inputs = scan_all(a, b)
        again = Inputs.from_dict(json.loads(json.dumps(inputs.to_dict())))
        assert again == inputs
        assert again.schema.equals(inputs.schema, check_metadata=True)
        assert InputFile.from_dict(json.loads(json.dumps(inputs.files[1].to_dict()))) == inputs.files[1]


class TestChanges:
    @pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
    def test_file_changed_between_plan_and_reading_is_refused(self, tmp_path, name):
        path = tmp_path / name
        _write(path, 10)
        inputs = scan_all(path)
        _write(path, 11)
        with pytest.raises(InputError, match=rf"{name}: changed since the job was planned"):
            read_all(inputs)
        path.unlink()
        with pytest.raises(InputMissing, match=name):
            read_all(inputs)

    @pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
    def test_file_changed_while_read_is_refused(self, tmp_path, name):
        path = tmp_path / name
        _write(path, 50_000)
        inputs = scan_all(path)
        reading = stream_rows(inputs, spans_of(inputs), LOCAL)
        next(reading)
        _write(path, 40_000)
        with pytest.raises(InputError, match=rf"{name}: changed while it was read"):
            list(reading)


def _write(path, rows):
    time.sleep(0.01)  # a new modification time, however coarse the clock
    if path.suffix == ".parquet":
        write_parquet(path, pa.table({"x": range(rows), "t": [f"text {i}" for i in range(rows)]}))
    else:
        write_lines(path, [{"x": i, "t": f"text {i}"} for i in range(rows)])


class TestReadAhead:
    def test_read_ahead_is_bounded_and_stops(self, tmp_path):
        inputs = scan_all(write_parquet(tmp_path / "a.parquet", pa.table({"x": range(1000)})))
        pulled = []

        def spans():
            for span in spans_of(inputs, 10):
                pulled.append(span)
                yield span

        reading = stream_rows(inputs, spans(), LOCAL, read_ahead=3)
        next(reading)
        time.sleep(0.3)
        assert len(pulled) <= 6
        assert any(thread.name == "read-ahead" for thread in threading.enumerate())
        reading.close()
        assert not any(thread.name == "read-ahead" for thread in threading.enumerate())

    def test_error_of_the_spans_iterator_is_raised(self, tmp_path):
        inputs = scan_all(write_parquet(tmp_path / "a.parquet", pa.table({"x": range(10)})))

        def spans():
            yield RowSpan(0, 0, 5)
            raise KeyError("spans")

        reading = stream_rows(inputs, spans(), LOCAL)
        next(reading)
        with pytest.raises(KeyError, match="spans"):
            next(reading)


@pytest.fixture(params=["parquet", "jsonl"])
def remote_file(request, faults):
    """Return (URL of a file of 20,000 rows behind the proxy, its storage options)."""
    bucket = faults.bucket()
    url = f"{bucket}/in/a.{request.param}"
    _upload(faults, url, 20_000)
    return url, faults.storage


def _upload(server, url, rows):
    table = pa.table({"x": range(rows), "t": [f"text {i * 7919}" for i in range(rows)]})
    with server.filesystem().open(url, "wb") as file:
        if url.endswith("parquet"):
            pq.write_table(table, file, row_group_size=rows)
        else:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in table.to_pylist()))


class TestRemote:
    def test_glob_on_s3_matches_expected_files(self, seaweed):
        bucket = seaweed.bucket()
        for name in ("b.parquet", "a.parquet", "_SUCCESS", "sub/c.parquet"):
            _upload(seaweed, f"{bucket}/in/{name}", 10) if "parquet" in name else seaweed.filesystem().touch(
                f"{bucket}/in/{name}"
            )
        for pattern in (f"{bucket}/in/*.parquet", f"{bucket}/in", f"{bucket}/in/"):
            found = ["a.parquet", "b.parquet", "c.parquet"]
            assert urls(scan_all(pattern, storage=seaweed.storage)) == (found[:2] if "*" in pattern else found)
        assert len(scan_all(f"{bucket}/in/**/*.parquet", storage=seaweed.storage).files) == 3
        for pattern in (f"{bucket}/in/*.jsonl", f"{bucket}/none.parquet", "s3://never-was/a.parquet"):
            with pytest.raises(InputMissing, match=seaweed.endpoint):
                scan_all(pattern, storage=seaweed.storage)

    def test_rows_are_complete_despite_faults(self, remote_file, faults):
        url, storage = remote_file
        faults.rate = 0.3
        inputs = scan_all(url, storage=storage)
        found, errors = read_all(inputs, storage=storage)
        assert [row["x"] for row in found] == list(range(20_000))
        assert errors == {}
        assert len(faults.seen) > 5

    def test_object_changed_while_read_is_refused(self, remote_file, faults):
        url, storage = remote_file
        inputs = scan_all(url, storage=storage)
        reading = stream_rows(inputs, spans_of(inputs), storage, read_ahead=1)
        next(reading)
        _upload(faults, url, 19_000)
        with pytest.raises(InputError, match="changed while it was read"):
            list(reading)
        with pytest.raises(InputError, match="changed since the job was planned"):
            read_all(inputs, storage=storage)

    def test_deleted_object_is_missing_input(self, remote_file, faults):
        url, storage = remote_file
        inputs = scan_all(url, storage=storage)
        faults.filesystem().rm(url)
        with pytest.raises(InputMissing, match=url):
            read_all(inputs, storage=storage)

    def test_unreachable_store_is_a_storage_error(self, remote_file, faults, monkeypatch):
        url, storage = remote_file
        inputs = scan_all(url, storage=storage)
        monkeypatch.setattr(filesystem, "RETRY_S", 0.5)
        faults.add("status", times=1000)
        with pytest.raises(StorageError, match=url):
            read_all(inputs, storage=storage)

    def test_wrong_secret_is_access_denied(self, remote_file):
        url, storage = remote_file
        wrong = storage.model_copy(update={"options": {"key": "tester", "secret": "no"}})
        with pytest.raises(AccessDenied, match="check key, secret"):
            scan_inputs(InputSpec(path=(url,)), wrong)


def test_only_needed_columns_and_row_groups_are_fetched(faults):
    url = f"{faults.bucket()}/a.parquet"
    text = [f"{i * 7919:0500}" for i in range(20_000)]
    table = pa.table({"big": text, "x": range(20_000), "large": text})
    with faults.filesystem().open(url, "wb") as file:
        pq.write_table(table, file, row_group_size=10_000, compression="none", use_dictionary=False)
    inputs = scan_all(url, storage=faults.storage)
    assert _fetched(faults) < 3 << 20
    read_all(inputs.select(["x"]), storage=faults.storage)
    assert _fetched(faults) < 5 << 20
    read_all(inputs.select(["big"]), [RowSpan(0, 19_990, 10)], faults.storage)
    assert _fetched(faults) < 8 << 20
    read_all(inputs, storage=faults.storage)
    assert _fetched(faults) > 20_000_000


def _fetched(faults):
    """Return the bytes requested by range since the last call."""
    ranges = [
        seen.headers["Range"].removeprefix("bytes=").split("-") for seen in faults.seen if "Range" in seen.headers
    ]
    faults.seen.clear()
    return sum(int(last) - int(first) + 1 for first, last in ranges)


def test_local_scan_ignores_storage_options(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"x": 1}])
    assert scan_inputs(InputSpec(path=(path,)), StorageSpec(endpoint="http://elsewhere")).files[0].rows == 1
