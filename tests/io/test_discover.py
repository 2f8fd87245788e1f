"""Tests of file discovery by path, URL, glob or folder, alike on local disk and on object storage, with any name."""

import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError, InputMissing, SpecError, UsageError
from batchinfer.io.discover import find_files
from batchinfer.io.fetch import cache_folder
from batchinfer.io.filesystem import file_url, local_path
from batchinfer.io.source import Sources
from batchinfer.io.storage import Store
from batchinfer.spec import InputSpec, StorageSpec
from tests.io.reading import LOCAL, read_all, scan_all, write_lines

ODD = ("a.jsonl", "[a].jsonl", "a?.jsonl", "a*.jsonl", "50%.jsonl", "a%20b.jsonl", "a b.jsonl", "#1.jsonl", "é+&.jsonl")


class Place:
    """A folder on some filesystem, whose files hold their own name as their only row."""

    def __init__(self, url, storage=LOCAL, filesystem=None):
        self.url = url
        self.storage = storage
        self._filesystem = filesystem

    def write(self, *names):
        for name in names:
            data = b'{"name": "%s"}\n' % name.encode()
            if self._filesystem is None:
                path = Path(self.url, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            else:
                self._filesystem.pipe_file(f"{self.url}/{name}", data)

    def names(self, *patterns, **settings):
        """Return the files found, each by the name that is its content."""
        paths = tuple(f"{self.url}/{pattern}".rstrip("/") for pattern in patterns)
        inputs = scan_all(*paths, storage=self.storage, **settings)
        return [row["name"] for row in read_all(inputs, storage=self.storage)[0]]


def place_of(request, tmp_path):
    if request.param == "local":
        return Place(str(tmp_path))
    if request.param == "memory":
        return Place(f"memory://{tmp_path.name}", LOCAL, fsspec.filesystem("memory"))
    server = request.getfixturevalue("seaweed")
    return Place(server.bucket(), server.storage, server.filesystem())


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    return place_of(request, tmp_path)


@pytest.fixture(params=["local", "memory", "seaweed"])
def any_place(request, tmp_path):
    return place_of(request, tmp_path)


class TestNames:
    def test_exact_name_wins_over_glob(self, any_place):
        place = any_place
        place.write(*ODD, "[d]/[x].jsonl", "d/x.jsonl")
        assert place.names(*ODD) == list(ODD)
        assert place.names("") == sorted([*ODD, "[d]/[x].jsonl", "d/x.jsonl"])
        assert place.names("[d]/[x].jsonl", "[d]") == place.names("[d]/*.jsonl") == ["[d]/[x].jsonl"]
        assert place.names("[[]*.jsonl", "*.jsonl") == ["[a].jsonl", *sorted(set(ODD) - {"[a].jsonl"})]

    def test_glob_matches_expected_files(self, place):
        place.write("b.jsonl", "a.jsonl", "sub/c.jsonl", "sub/_tmp/0/d.jsonl", ".h/e.jsonl", "_f.jsonl")
        assert place.names("*.jsonl") == ["a.jsonl", "b.jsonl"]
        assert (
            place.names("**/*.jsonl") == place.names("**") == place.names("") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
        )
        assert place.names("_*.jsonl") == ["_f.jsonl"]
        assert place.names("sub/_tmp/*/*.jsonl") == place.names("sub/_tmp") == ["sub/_tmp/0/d.jsonl"]
        assert place.names("b.jsonl", "?.jsonl", "") == ["b.jsonl", "a.jsonl", "sub/c.jsonl"]
        with pytest.raises(InputMissing, match="nothing matches"):
            place.names("*.parquet")

    def test_glob_that_matches_folders_reads_their_files(self, place):
        place.write("spark.jsonl/part-0.jsonl", "spark.jsonl/_SUCCESS", "spark.jsonl/.part-0.jsonl.crc", "a.jsonl")
        assert place.names("*.jsonl") == ["a.jsonl", "spark.jsonl/part-0.jsonl"]

    def test_files_of_other_kinds_are_skipped_or_refused(self, place, capsys):
        place.write("data/README.md", "data/info.json", "data/rows.csv", "data/a/x.jsonl")
        assert place.names("data") == place.names("data/*") == ["data/a/x.jsonl"]
        error = capsys.readouterr().err
        assert "are skipped" in error and "README.md" in error
        place.write("loose/README.md", "loose/part-0.json", "loose/part-1.json")
        assert place.names("loose") == ["loose/part-0.json", "loose/part-1.json"]
        place.write("arrow/data.arrow", "arrow/state.json", "hadoop/part-00000", "hadoop/_SUCCESS", "mixed/x.txt")
        with pytest.raises(
            InputMissing, match=r"arrow.* of 2 files, such as .*data\.arrow, none has a known extension"
        ):
            place.names("arrow")
        assert place.names("hadoop", format="jsonl") == ["hadoop/part-00000"]
        assert place.names("data", format="jsonl") == ["data/a/x.jsonl"]
        with pytest.raises(SpecError, match=r"x\.txt: its name has no known extension"):
            place.names("mixed/*.txt")

    @pytest.mark.parametrize(
        ("kind", "marker"),
        [("Delta", "_delta_log/00.json"), ("Hudi", ".hoodie/x"), ("Iceberg", "metadata/v1.metadata.json")],
    )
    def test_table_folder_is_refused_with_its_format(self, place, kind, marker):
        place.write(f"t/{marker}", "t/k=1/a.parquet", "t/b.parquet", "u/t/b.parquet", f"u/t/{marker}")
        for pattern in ("t", "t/*.parquet", "t/**", "t/k=*/*.parquet", "u", "u/*/*.parquet", "*/*/*.parquet"):
            with pytest.raises(InputError, match=rf"\bt: is an? {kind} table"):
                place.names(pattern)
        paths = (f"{place.url}/t/b.parquet", f"{place.url}/t/k=1/a.parquet")
        assert len(find_files(InputSpec(path=paths), Sources(place.storage))) == 2

    def test_partition_of_a_table_is_refused(self, place):
        place.write("t/_delta_log/00.json", "t/k=1/j=2/a.parquet")
        for pattern in ("t/k=1/j=2", "t/k=1/j=2/*.parquet", "t/k=1/*/*.parquet", "t/k=1/*=2/*.parquet"):
            with pytest.raises(InputError, match=r"t: is a Delta table"):
                place.names(pattern)
        place.write("i/metadata/v1.metadata.json", "i/data/k=1/a.parquet", "i/data/b.parquet")
        for pattern in ("i/data", "i/data/*.parquet", "i/data/k=1", "i/data/k=1/*.parquet"):
            with pytest.raises(InputError, match=r"i: is an Iceberg table"):
                place.names(pattern)


class TestLocal:
    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1))
    def test_file_url_round_trips_any_path(self, path):
        assert str(local_path(file_url(f"/{path}"))) == os.path.abspath(f"/{path}")  # noqa: PTH100

    def test_file_url_forms_name_the_same_path(self, tmp_path, monkeypatch):
        for url in ("file:///a%20b%23", "file://localhost/a%20b%23", "file:/a%20b%23", "FILE://LOCALHOST/a%20b%23"):
            assert str(local_path(url)) == "/a b#"
        assert str(local_path("/a%20b")) == "/a%20b"
        assert str(local_path("local:///a%20b")) == "/a%20b"
        assert str(local_path("file://100%/a%2")) == "100%/a%2"
        assert local_path("s3://a%20b") is None
        with pytest.raises(UsageError, match="NUL"):
            local_path("file:///a%00b")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert local_path("~/x") == tmp_path / "x"
        assert str(local_path("~nobody-has-this-name/x")) == "~nobody-has-this-name/x"

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(name=st.binary(min_size=1, max_size=12).filter(lambda name: not {0, 47} & set(name)))
    def test_found_file_can_be_opened_whatever_its_name(self, tmp_path_factory, name):
        folder = tmp_path_factory.mktemp("any")
        (folder / f"x{os.fsdecode(name)}.jsonl").write_bytes(b'{"x": 1}\n')
        with (folder / f"x{os.fsdecode(name)}.parquet").open("wb") as file:
            pq.write_table(pa.table({"x": [1]}), file)
        for pattern in (str(folder), f"{folder}/*.jsonl", folder.as_uri(), f"{folder.as_uri()}/*.jsonl"):
            inputs = scan_all(pattern)
            [file.url.encode() for file in inputs.files]
            assert [row["x"] for row in read_all(inputs)[0]] == [1] * len(inputs.files)
            assert len(inputs.files) == (1 if "*" in pattern else 2)

    def test_glob_in_a_file_url_is_decoded(self, tmp_path, monkeypatch):
        place = Place(str(tmp_path))
        place.write("a b/x.jsonl", "a b/[y].jsonl", "a b/y.jsonl", "~u.jsonl")
        urls = Place(f"{tmp_path.as_uri()}")
        assert urls.names("a%20b/*.jsonl") == ["a b/[y].jsonl", "a b/x.jsonl", "a b/y.jsonl"]
        assert urls.names("a%20b/[y].jsonl") == urls.names("a%20b/%5By%5D.jsonl") == ["a b/[y].jsonl"]
        assert urls.names("a%20b/%5B*.jsonl") == ["a b/[y].jsonl"]
        monkeypatch.chdir(tmp_path)
        for pattern in ("~u.jsonl", "*.jsonl", "./~*.jsonl"):
            assert read_all(scan_all(pattern))[0] == [{"name": "~u.jsonl"}]

    def test_output_and_cache_urls_are_decoded(self, tmp_path):
        Store.open(f"{tmp_path.as_uri()}/o%5B1%5D%20x", StorageSpec()).put("a", b"x")
        assert (tmp_path / "o[1] x" / "a").read_bytes() == b"x"
        assert cache_folder(StorageSpec(cache=f"{tmp_path.as_uri()}/c%20d")) == tmp_path / "c d"
        with pytest.raises(SpecError, match=r"storage\.cache"):
            cache_folder(StorageSpec(cache="s3://bucket/cache"))

    def test_file_with_two_names_is_read_once(self, tmp_path, monkeypatch):
        write_lines(tmp_path / "a.jsonl", [{"x": 1}])
        monkeypatch.chdir(tmp_path)
        inputs = scan_all("./a.jsonl", "a.jsonl", str(tmp_path), tmp_path.as_uri())
        assert [file.url for file in inputs.files] == ["./a.jsonl"]

    def test_links_are_followed_once(self, tmp_path):
        (tmp_path / "data").mkdir()
        write_lines(tmp_path / "data" / "a.jsonl", [{"x": 1}])
        (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
        (tmp_path / "other").mkdir()
        write_lines(tmp_path / "other" / "b.jsonl", [{"x": 2}])
        (tmp_path / "data" / "more").symlink_to(tmp_path / "other")
        for pattern in (tmp_path / "data", f"{tmp_path}/data/**", f"{tmp_path}/d*"):
            assert [row["x"] for row in read_all(scan_all(pattern))[0]] == [1, 2]
        (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputMissing, match=r"gone\.jsonl"):
            scan_all(tmp_path / "data")


def test_spark_folder_reads_only_its_parquet_files(tmp_path):
    for day in ("2024-01-01", "2024-01-02"):
        (tmp_path / f"t.parquet/day={day}").mkdir(parents=True)
        pq.write_table(pa.table({"x": [day]}), tmp_path / f"t.parquet/day={day}/part-0.snappy.parquet")
    (tmp_path / "t.parquet/_SUCCESS").touch()
    (tmp_path / "t.parquet/._SUCCESS.crc").touch()
    for pattern in (tmp_path / "t.parquet", f"{tmp_path}/*.parquet", f"{tmp_path}/**", tmp_path):
        assert [row["x"] for row in read_all(scan_all(pattern))[0]] == ["2024-01-01", "2024-01-02"]
