"""Tests of Parquet: streaming within one huge row group, damage, round trips."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError, SpoolError
from batchinfer.io import parquet
from batchinfer.io.rows import RowSpan, rows_of, stream_rows, write_rows
from batchinfer.io.types import fit_to_type
from tests.io.reading import LOCAL, read_all, scan_all, write_parquet


def numbered(rows, start=0):
    return pa.table({"i": pa.array(range(start, start + rows)), "t": [f"text {i}" for i in range(start, start + rows)]})


class TestReading:
    @pytest.mark.parametrize("group", [100_000, 1000, 37])
    def test_rows_do_not_depend_on_spans(self, tmp_path, group):
        table = numbered(5000)
        inputs = scan_all(write_parquet(tmp_path / "a.parquet", table, row_group_size=group))
        assert inputs.files[0].rows == 5000
        spans = [RowSpan(0, 0, 1), RowSpan(0, 36, 3), RowSpan(0, 39, 1500), RowSpan(0, 3001, 999), RowSpan(0, 4999, 1)]
        found, errors = read_all(inputs, spans)
        assert [row["i"] for row in found] == [i for span in spans for i in range(span.start, span.start + span.count)]
        assert errors == {}

    def test_spans_of_several_files_may_come_in_any_order(self, tmp_path):
        paths = [write_parquet(tmp_path / f"{n}.parquet", numbered(100, n * 100)) for n in range(3)]
        inputs = scan_all(*paths)
        found, _ = read_all(inputs, [RowSpan(2, 5, 2), RowSpan(0, 1, 1), RowSpan(2, 0, 1), RowSpan(1, 99, 1)])
        assert [row["i"] for row in found] == [205, 206, 1, 200, 199]

    def test_large_cells_are_decoded_in_small_batches(self, tmp_path):
        inputs = scan_all(
            write_parquet(tmp_path / "a.parquet", pa.table({"t": [f"{i}" * 500_000 for i in range(10, 74)]}))
        )
        with pq.ParquetFile(inputs.files[0].url) as file:
            assert parquet._ParquetRows(file, ["t"])._batch_rows <= 8
        assert sum(len(row["t"]) for row in read_all(inputs, [RowSpan(0, 28, 4)])[0]) == 4_000_000

    def test_invalid_utf8_is_a_row_error(self, tmp_path):
        binary = pa.array([b"fine", b"\xed\xa0\x80", None, b"\xff", b"fine"])
        strings = pa.StringArray.from_buffers(5, binary.buffers()[1], binary.buffers()[2], binary.buffers()[0], 1)
        path = write_parquet(tmp_path / "a.parquet", pa.table({"i": range(5), "t": strings}))
        found, errors = read_all(scan_all(path), [RowSpan(0, 0, 2), RowSpan(0, 2, 3)])
        assert [row["t"] for row in found] == ["fine", None, None, None, "fine"]
        assert [row["i"] for row in found] == [0, 1, 2, 3, 4]
        assert errors == {
            1: f"{path}: row 1: column 't' is not valid UTF-8",
            3: f"{path}: row 3: column 't' is not valid UTF-8",
        }

    @pytest.mark.parametrize(
        "form", ["dictionary", "list", "struct", "list of dictionaries", "large", "view", "json", "map"]
    )
    def test_damaged_text_in_any_type_fails_only_its_row(self, tmp_path, form):
        binary = pa.array([b"ok", b"\xff", b"fine", b"\xc3", b"x"])
        text = pa.StringArray.from_buffers(5, binary.buffers()[1], binary.buffers()[2])
        coded = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3, 4]), text)
        offsets = pa.array([0, 1, 2, 3, 4, 5], pa.int32())
        column = {
            "dictionary": lambda: coded,
            "list": lambda: pa.ListArray.from_arrays(offsets, text),
            "struct": lambda: pa.StructArray.from_arrays([pa.array(range(5)), text], ["n", "t"]),
            "list of dictionaries": lambda: pa.ListArray.from_arrays(
                offsets, pa.StructArray.from_arrays([coded], ["t"])
            ),
            "large": lambda: binary.cast(pa.large_binary()).view(pa.large_string()),
            "view": lambda: binary.cast(pa.binary_view()).view(pa.string_view()),
            "json": lambda: pa.ExtensionArray.from_storage(pa.json_(), text),
            "map": lambda: pa.MapArray.from_arrays(offsets, pa.array(list("abcde")), text),
        }[form]()
        spans = pa.array(range(5), pa.duration("s"))  # a type that only Arrow's note in the file tells
        table = pa.table({"i": range(5), "t": column, "d": spans})
        path = write_parquet(tmp_path / "a.parquet", table, row_group_size=3)
        inputs = scan_all(path)
        for cut in ([RowSpan(0, 0, 5)], [RowSpan(0, 0, 1), RowSpan(0, 1, 3), RowSpan(0, 4, 1)]):
            found, errors = read_all(inputs, cut)
            assert [row["i"] for row in found] == [0, 1, 2, 3, 4]
            assert [row["d"] for row in found] == spans.to_pylist()
            assert errors == {n: f"{path}: row {n}: column 't' is not valid UTF-8" for n in (1, 3)}
            good = [row["t"] is None for row in found]
            assert good == [False, True, False, True, False]
        part = stream_rows(inputs, [RowSpan(0, 0, 5)], LOCAL)
        write_rows(tmp_path / "out.parquet", next(part)[1].table, "parquet", None)
        assert pq.read_table(tmp_path / "out.parquet").num_rows == 5

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all, but long enough for a footer"])
    def test_file_that_is_not_parquet_is_refused(self, tmp_path, content):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file"):
            scan_all(tmp_path / "a.parquet")

    def test_truncated_file_is_refused(self, tmp_path):
        path = tmp_path / "a.parquet"
        write_parquet(path, numbered(1000))
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match="not a readable Parquet file"):
            scan_all(path)

    def test_damaged_page_is_an_error_that_names_the_rows(self, tmp_path):
        path = tmp_path / "a.parquet"
        write_parquet(path, numbered(3000), row_group_size=1000, compression="zstd")
        data = bytearray(path.read_bytes())
        offset = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
        data[offset : offset + 400] = bytes(400)
        path.write_bytes(data)
        inputs = scan_all(path)
        with pytest.raises(InputError, match=r"a\.parquet: rows \d+ to \d+ cannot be read"):
            read_all(inputs)

    def test_duplicate_or_missing_columns_are_refused(self, tmp_path):
        twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
        with pytest.raises(InputError, match="column 'x' exists twice"):
            scan_all(write_parquet(tmp_path / "a.parquet", twice))
        with pytest.raises(InputError, match="no columns"):
            scan_all(write_parquet(tmp_path / "b.parquet", pa.table({})))

    def test_file_without_rows_is_read(self, tmp_path):
        inputs = scan_all(write_parquet(tmp_path / "a.parquet", numbered(0)))
        assert inputs.files[0].rows == 0
        assert read_all(inputs) == ([], {})

    @pytest.mark.parametrize("form", ["parquet", "jsonl"])
    def test_row_groups_may_have_different_dictionaries(self, tmp_path, form):
        """Dictionaries with more values than one index type can address, at any depth."""

        def group(number):
            texts = pa.array([f"{number} {n}" for n in range(100)])
            coded = pa.DictionaryArray.from_arrays(pa.array(range(100), pa.int8()), texts)
            listed = pa.ListArray.from_arrays(pa.array(range(101), pa.int32()), coded)
            return pa.table({"d": coded, "s": pa.StructArray.from_arrays([coded], ["d"]), "l": listed})

        with pq.ParquetWriter(tmp_path / "a.parquet", group(0).schema) as writer:
            for number in range(3):
                writer.write_table(group(number))
        inputs = scan_all(tmp_path / "a.parquet")
        found, errors = read_all(inputs, [RowSpan(0, 0, 250), RowSpan(0, 250, 50)])
        values = [f"{number} {n}" for number in range(3) for n in range(100)]
        assert errors == {} and found == [{"d": text, "s": {"d": text}, "l": [text]} for text in values]
        [(_, batch)] = stream_rows(inputs, [RowSpan(0, 0, 300)], LOCAL)
        held = [fit_to_type(batch.table.column(field.name), field.type) for field in inputs.schema]
        write_rows(tmp_path / "out", pa.table(held, schema=inputs.schema), form, None)
        if form == "parquet":
            back = pq.read_table(tmp_path / "out")
            assert back.to_pylist() == found and back.schema.types == inputs.schema.types
            assert back.schema.field("d").type == pa.dictionary(pa.int32(), pa.string())

    def test_damaged_cell_of_a_non_null_column_becomes_null(self, tmp_path):
        schema = pa.schema([pa.field("t", pa.string(), nullable=False)])
        inputs = scan_all(write_parquet(tmp_path / "a.parquet", pa.table({"t": ["a"]}, schema=schema)))
        assert inputs.schema.field("t").nullable


class TestValues:
    def test_json_text_is_parsed(self):
        table = pa.table({"j": ['{"a":[1]}', None, '"x"', "100000000000000000000000000001"]})
        assert [row["j"] for row in rows_of(table, ["j"], {"j"})] == [{"a": [1]}, None, "x", 10**29 + 1]

    def test_table_without_columns_keeps_its_number_of_rows(self):
        assert rows_of(numbered(3), []) == [{}, {}, {}]


def arrays(cells, kind):
    return st.lists(st.none() | cells, min_size=1, max_size=30).map(lambda values: pa.array(values, kind))


columns = st.one_of(
    arrays(st.text(max_size=8), pa.string()),
    arrays(st.integers(-(2**63), 2**63 - 1), pa.int64()),
    arrays(st.floats(allow_nan=False), pa.float64()),
    arrays(st.lists(st.none() | st.text(max_size=3), max_size=3), pa.list_(pa.string())),
    arrays(st.sampled_from(["a", "b"]), pa.string()).map(lambda array: array.dictionary_encode()),
    arrays(st.fixed_dictionaries({"x": st.none() | st.integers(0, 9)}), pa.struct({"x": pa.int32()})),
)


@st.composite
def tables(draw):
    drawn = draw(st.lists(columns, min_size=1, max_size=4))
    rows = min(len(column) for column in drawn)
    fields = [
        pa.field(f"c{i}", column.type, metadata={b"unit": b"%d" % i, b"who": b"\xff"}) for i, column in enumerate(drawn)
    ]
    return pa.Table.from_arrays([c.slice(0, rows) for c in drawn], schema=pa.schema(fields, metadata={b"k": b"v"}))


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=tables(),
    cut=st.integers(1, 7),
    group=st.integers(1, 9),
    compression=st.sampled_from([None, "none", "snappy"]),
)
def test_written_table_reads_back_equal_and_rewrites_to_equal_bytes(tmp_path, table, cut, group, compression):
    """Write, stream in spans, write again: equal values, schema, metadata and bytes."""
    source, out, again = (tmp_path / name for name in ("in.parquet", "out.parquet", "again.parquet"))
    pq.write_table(table, source, row_group_size=group)
    inputs = scan_all(source)
    batches = [
        batch.table
        for _, batch in stream_rows(
            inputs, [RowSpan(0, s, min(cut, len(table) - s)) for s in range(0, len(table), cut)], LOCAL
        )
    ]
    rows = pa.concat_tables(batches)
    streamed = pa.table(
        [fit_to_type(rows.column(field.name), field.type) for field in inputs.schema], schema=inputs.schema
    )
    write_rows(out, streamed, "parquet", compression)
    write_rows(again, table.cast(inputs.schema).combine_chunks(), "parquet", compression)
    assert out.read_bytes() == again.read_bytes()
    back = pq.read_table(out)
    assert back.schema.equals(inputs.schema, check_metadata=True)
    assert back.schema.metadata == table.schema.metadata
    assert [field.metadata for field in back.schema] == [field.metadata for field in table.schema]
    assert [field.type for field in back.schema] == [field.type for field in table.schema]
    assert back.to_pylist() == table.to_pylist()


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_disk_full_is_a_spool_error(tmp_path, form):
    # through a link, since what cannot be written is removed: that must never be the device itself
    path = tmp_path / "part"
    path.symlink_to("/dev/full")
    with pytest.raises(SpoolError, match=r"part: cannot be written: .*No space left"):
        write_rows(path, numbered(100_000), form, None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SpoolError, match="cannot be written"):
        write_rows(tmp_path / "nowhere" / "part", numbered(1), form, None)


_MEMORY = """
import sys
from batchinfer.io.rows import RowSpan, rows_of, scan_inputs, stream_rows
from batchinfer.spec import InputSpec, StorageSpec
inputs = scan_inputs(InputSpec(path=(sys.argv[1],)), StorageSpec())
rows = inputs.files[0].rows
total = 0
for span, batch in stream_rows(inputs, (RowSpan(0, start, 1000) for start in range(0, rows, 1000)), StorageSpec()):
    total += len(rows_of(batch.table, inputs.schema.names))
assert total == rows
# not ru_maxrss: a child inherits its parent's
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_peak_memory_does_not_grow_with_the_file(tmp_path, form):
    """One row group holds all rows, as most writers do. Without streaming the larger file needs 70 MB more."""
    peaks = []
    for rows in (50_000, 600_000):
        text = [f"some words that make a prompt of a usual length, number {i * 7919}" for i in range(rows)]
        table = pa.table({"i": range(rows), "a": text, "b": text})
        path = tmp_path / f"{rows}.{form}"
        if form == "parquet":
            pq.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
        else:
            write_rows(path, table, "jsonl", None)
        command = [sys.executable, "-c", _MEMORY, str(path)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
        peaks.append(min(int(run.stdout) for run in runs) / 1024)  # the allocator alone makes 20 MB of difference
    assert peaks[1] < peaks[0] + 30, peaks
    assert peaks[1] < 250
