"""Tests of stores: one contract on local disk, in memory and on S3, and each store's behaviour under faults."""

import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from botocore.utils import parse_timestamp

from batchinfer.errors import (
    AccessDenied,
    InputMissing,
    OutputConflict,
    SpecError,
    StorageError,
    UserError,
)
from batchinfer.io import filesystem, storage
from batchinfer.io.storage import Store
from batchinfer.spec import StorageSpec


@pytest.fixture(params=["local", "memory", "seaweed"])
def store(request, tmp_path):
    if request.param == "local":
        return Store.open(str(tmp_path / "out"), StorageSpec())
    if request.param == "memory":
        return Store.open(f"memory://{tmp_path.name}/out", StorageSpec())
    server = request.getfixturevalue("seaweed")
    return Store.open(f"{server.bucket()}/some/out", server.storage)


def remote(server, bucket=None, retry_s=20.0):
    opened = Store.open(f"{bucket or server.bucket()}/out", server.storage)
    opened.retry.total_s = retry_s
    return opened


class TestContract:
    def test_objects_are_written_listed_and_deleted(self, store, tmp_path):
        assert store.find() == {}
        assert store.read("a/b") is None
        store.put("a/b", b"one")
        store.put("a/b", b"two")
        store.put("a/bc/d", b"")
        source = tmp_path / "source"
        source.write_bytes(b"x" * 100_000)
        store.put_file("parts/p", source)
        assert store.read("a/b") == b"two"
        assert store.find() == {"a/b": 3, "a/bc/d": 0, "parts/p": 100_000}
        assert list(store.find("a/")) == ["a/b", "a/bc/d"]
        assert list(store.find("a/bc")) == ["a/bc/d"]
        assert store.find("nothing/") == {}
        store.get_file("parts/p", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == source.read_bytes()
        store.delete(["a/b", "never/was"])
        assert list(store.find()) == ["a/bc/d", "parts/p"]

    def test_get_file_of_missing_object_raises(self, store, tmp_path):
        with pytest.raises(InputMissing, match="nope"):
            store.get_file("nope", tmp_path / "copy")

    def test_put_if_absent_keeps_the_first_content(self, store):
        assert store.put_if_absent("commits/1", b"mine")
        assert store.put_if_absent("commits/1", b"mine")
        assert not store.put_if_absent("commits/1", b"theirs")
        assert store.read("commits/1") == b"mine"
        assert list(store.find()) == ["commits/1"]

    def test_is_conditional_changes_nothing(self, store):
        store.put("a", b"one")
        assert store.is_conditional("a")
        assert store.read("a") == b"one" and list(store.find()) == ["a"]

    def test_put_if_absent_from_many_threads_has_one_winner(self, store):
        if isinstance(store, storage.RemoteStore) and store._protocol == "memory":
            pytest.skip("fsspec's memory filesystem is not atomic between threads")
        won = []
        threads = [
            threading.Thread(target=lambda i=i: store.put_if_absent("claim", b"%d" % i) and won.append(i))
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read("claim") == b"%d" % won[0]


class TestLocal:
    def test_failed_write_leaves_the_old_object(self, tmp_path, monkeypatch):
        store = Store.open(str(tmp_path), StorageSpec())
        store.put("a", b"old")

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        for write in (store.put, store.put_if_absent):
            with pytest.raises(StorageError, match="no space left"):
                write("a" if write == store.put else "b", b"new")
        monkeypatch.undo()
        assert store.read("a") == b"old"
        assert list(store.find()) == ["a"]
        assert list((tmp_path / ".tmp").iterdir()) == []

    def test_put_if_absent_works_without_hard_links(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
        store = Store.open(str(tmp_path), StorageSpec())
        assert store.put_if_absent("a", b"mine")
        assert not store.put_if_absent("a", b"theirs")
        assert store.is_conditional("a")

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(storage, "_write", lambda *_: None)  # the temporary file
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="no space left"):
            store.put_if_absent("b", b"x")
        assert store.read("b") is None  # a short one would be there for ever

    def test_temporary_files_of_killed_processes_are_removed(self, tmp_path):
        (tmp_path / ".tmp").mkdir()
        old, young = (f"batchinfer-{digit * 32}" for digit in "0a")
        theirs = ("0" * 32, f"batchinfer-{'0' * 31}", f"{old}.jsonl", f"batchinfer-{'A' * 32}", "notes.txt")
        for name in (old, young, *theirs):
            path = tmp_path / ".tmp" / name
            path.write_bytes(b"x")
            os.utime(path, (time.time() - (0 if name == young else 10_000),) * 2)
        store = Store.open(str(tmp_path), StorageSpec())
        store.put("a", b"x")
        assert {path.name for path in (tmp_path / ".tmp").iterdir()} == {young, *theirs}
        assert list(store.find()) == ["a"]

    def test_link_is_not_replaced(self, tmp_path):
        store = Store.open(str(tmp_path), StorageSpec())
        for place in ("nothing", tmp_path / "file"):
            (tmp_path / "a").symlink_to(place)
            with pytest.raises(OutputConflict, match=r"a: another file or folder is in the way \(a link\)"):
                store.put("a", b"x")
            assert not store.put_if_absent("a", b"x") and (tmp_path / "a").readlink() == Path(place)
            (tmp_path / "a").unlink()
            (tmp_path / "file").write_bytes(b"theirs")

    def test_root_that_is_a_file_is_an_output_conflict(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        store = Store.open(str(tmp_path / "file" / "out"), StorageSpec())
        assert store.read("a") is None
        assert store.find() == {}
        with pytest.raises(OutputConflict, match=r"in the way \(Not a directory\)"):
            store.put("a", b"x")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_unwritable_root_is_access_denied(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(AccessDenied):
            Store.open(str(tmp_path / "out"), StorageSpec()).put("a", b"x")

    def test_file_url_and_home_are_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        Store.open("~/out", StorageSpec()).put("a", b"x")
        assert Store.open(f"file://{tmp_path}/out", StorageSpec()).read("a") == b"x"


class TestFaults:
    """Each test must end in the same result as without the fault."""

    def test_slow_down_and_resets_are_retried(self, faults, tmp_path):
        store = remote(faults)
        path = tmp_path / "part"
        path.write_bytes(bytes(200_000))
        for kind in ("status", "reset"):
            faults.add(kind, times=4)
            store.put("a", kind.encode())
            faults.add(kind, times=4)
            assert store.read("a") == kind.encode()
            faults.add(kind, times=4)
            assert list(store.find("a")) == ["a"]
            faults.add(kind, times=4)
            store.put_file("part", path)
            faults.add(kind, times=4)
            store.delete(["a"])
        assert store.find() == {"part": 200_000}

    def test_half_a_body_is_read_again(self, faults, tmp_path):
        store = remote(faults)
        data = os.urandom(300_000)
        store.put("a", data)
        faults.add("half", method="GET", times=3)
        assert store.read("a") == data
        faults.add("half", method="GET", times=3)
        store.get_file("a", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data

    @pytest.mark.parametrize("times", [1, 4])
    def test_conditional_put_with_lost_response_succeeds(self, faults, times):
        store = remote(faults)
        faults.add("lose", method="PUT", times=times)
        assert store.put_if_absent("commits/1", b"mine")
        assert faults.faults[0].times == 0
        assert len(faults.requests("PUT", "commits/1")) > 1
        assert store.read("commits/1") == b"mine"

    def test_conditional_put_with_lost_response_loses_to_other_content(self, faults):
        store = remote(faults)
        store.put("commits/1", b"theirs")
        faults.add("lose", method="PUT", times=2)
        assert not store.put_if_absent("commits/1", b"mine")
        assert store.read("commits/1") == b"theirs"

    def test_objects_are_intact_after_random_faults(self, faults):
        store = remote(faults)
        faults.rate = 0.4
        for i in range(12):
            assert store.put_if_absent(f"c/{i}", b"%d" % i)
            assert not store.put_if_absent(f"c/{i}", b"other")
        assert list(store.find("c/")) == sorted(f"c/{i}" for i in range(12))

    def test_retries_end_in_time_and_name_the_endpoint(self, faults):
        store = remote(faults, retry_s=2.0)
        faults.add("status", times=1000)
        began = time.monotonic()
        with pytest.raises(StorageError, match=rf"s3://tests/.*/out/a \(endpoint {faults.endpoint}\).*attempts"):
            store.put("a", b"x")
        assert time.monotonic() - began < 15

    def test_hanging_store_times_out(self, faults, monkeypatch):
        monkeypatch.setattr(filesystem, "READ_TIMEOUT_S", 0.3)
        store = remote(faults, faults.bucket(), retry_s=0.5)
        faults.add("hang", times=1000)
        began = time.monotonic()
        with pytest.raises(StorageError):
            store.read("a")
        assert time.monotonic() - began < 15

    def test_closed_port_is_a_storage_error(self, seaweed):
        options = seaweed.storage.model_copy(update={"endpoint": "http://127.0.0.1:9"})
        store = Store.open("s3://bucket/out", options)
        store.retry.total_s = 0.5
        with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
            store.find()


class TestRefusals:
    def test_wrong_secret_is_access_denied(self, seaweed):
        options = seaweed.storage.model_copy(update={"options": {"key": "tester", "secret": "wrong"}})
        store = Store.open(f"{seaweed.bucket()}/out", options)
        for call in (
            store.find,
            lambda: store.is_conditional("a"),
            lambda: store.read("a"),
            lambda: store.put("a", b"x"),
        ):
            with pytest.raises(AccessDenied, match="signature"):
                call()

    def test_missing_credentials_are_access_denied(self, seaweed, monkeypatch, tmp_path):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        store = Store.open(f"{seaweed.bucket()}/out", StorageSpec(endpoint=seaweed.endpoint))
        with pytest.raises(AccessDenied, match=r"storage\.anonymous: true"):
            store.find()

    def test_missing_bucket_is_input_missing(self, seaweed, tmp_path):
        store = Store.open("s3://never-was/out", seaweed.storage)
        calls = (
            store.find,
            lambda: store.read("a"),
            lambda: store.put("a", b"x"),
            lambda: store.put_if_absent("a", b"x"),
            lambda: store.get_file("a", tmp_path / "a"),
        )
        for call in calls:
            with pytest.raises(InputMissing, match=f"never-was.*{seaweed.endpoint}.*bucket does not exist"):
                call()

    def test_store_that_ignores_the_condition_is_not_conditional(self, moto, unconditional):
        for server, conditional in ((moto, True), (unconditional, False)):
            store = remote(server)
            store.put("a", b"one")
            assert store.is_conditional("a") == conditional
            assert store.read("a") == b"one" and list(store.find()) == ["a"]
        assert any("If-None-Match" in seen.headers for seen in unconditional.seen)

    def test_check_then_write_filesystem_is_not_conditional(self, tmp_path, monkeypatch):
        monkeypatch.setattr(storage, "_CONDITIONAL", frozenset())
        store = Store.open(f"memory://{tmp_path.name}", StorageSpec())
        store.put("a", b"one")
        assert not store.is_conditional("a")

    def test_missing_package_is_named(self, monkeypatch):
        import fsspec

        def missing(*_, **__):
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec, "filesystem", missing)
        for url, package in (("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("abfs://b/x", "adlfs")):
            with pytest.raises(UserError, match=f"pip install {package}$"):
                Store.open(url, StorageSpec())

    def test_unknown_protocol_and_misplaced_options_are_refused(self):
        with pytest.raises(SpecError, match="sss://b/x"):
            Store.open("sss://b/x", StorageSpec())
        with pytest.raises(SpecError, match=r"storage.endpoint: goes with s3://"):
            Store.open("memory://b", StorageSpec(endpoint="http://x"))
        with pytest.raises(SpecError):
            Store.open("s3://b/x", StorageSpec(endpoint="no-scheme")).find()


def test_s3_options_are_sent_with_requests(faults):
    bucket = faults.bucket()
    options = faults.storage.model_copy(update={"requester_pays": True, "region": "eu-north-1"})
    Store.open(f"{bucket}/out", options).put("a", b"x")
    [seen] = faults.requests("PUT", "out/a")
    assert seen.headers["x-amz-request-payer"] == "requester"
    assert "/eu-north-1/s3/" in seen.headers["Authorization"]
    merged = {**faults.storage.options, "client_kwargs": {"use_ssl": False}, "config_kwargs": {"user_agent": "me"}}
    Store.open(f"{bucket}/out", options.model_copy(update={"options": merged})).put("b", b"x")
    [seen] = faults.requests("PUT", "out/b")
    assert "/eu-north-1/s3/" in seen.headers["Authorization"]
    assert seen.headers["User-Agent"].startswith("me ")
    anonymous = faults.storage.model_copy(update={"anonymous": True, "options": {}})
    with pytest.raises(AccessDenied):
        Store.open(f"{bucket}/out", anonymous).read("a")
    assert "Authorization" not in faults.requests("GET", "out/a")[-1].headers


def test_large_upload_is_sent_in_parts(faults, tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        for i in range(40):
            file.write(bytes([i]) * (1 << 20))
    store = remote(faults)
    faults.add("status", method="PUT", contains="partNumber=2", times=2)
    store.put_file("parts/large", path)
    assert store.find() == {"parts/large": 40 << 20}
    # 40 MB in parts of 16 are three; the second needs three attempts, two of them within one upload
    assert len(faults.requests("PUT", "partNumber=")) <= 6
    store.get_file("parts/large", tmp_path / "copy")
    assert Path(tmp_path / "copy").read_bytes() == path.read_bytes()


def test_object_written_by_another_client_is_visible(seaweed):
    bucket = seaweed.bucket()
    ours, theirs = remote(seaweed, bucket), remote(seaweed, bucket)
    assert ours.find() == {}
    theirs.put("a", b"x")
    assert ours.find() == {"a": 1}
    theirs.put("b", b"x")
    theirs.delete(["a"])
    assert ours.find() == {"b": 1}


def test_relative_root_lists_its_objects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in (".", "x/..", "out"):
        store = Store.open(root, StorageSpec())
        store.put("commits/a", b"1")
        assert store.find("commits/") == store.find("commits/a") == {"commits/a": 1}


def test_listing_of_several_pages_has_every_object_and_mark(seaweed):
    """More objects than one page: each once, with the hash of its bytes as its mark if the store has one."""
    url = seaweed.bucket()
    store = Store.open(url, seaweed.storage)
    keys = {f"c/{number:04d}": b"%d" % number for number in range(1003)}
    seaweed.filesystem().pipe({f"{url}/{name}": data for name, data in keys.items()})
    found = list(store.scan("c/"))
    assert {entry.name: entry.mark for entry in found} == {n: hashlib.md5(d).hexdigest() for n, d in keys.items()}
    assert len(found) == 1003 and [entry.size for entry in store.scan("c/0007")] == [1]


@pytest.mark.parametrize(
    "text", ["2026-12-01T03:10:26.123Z", "2026-12-01T03:10:26+00:00", "Tue, 01 Dec 2026 03:10:26 GMT"]
)
def test_times_parse_as_in_botocore(text):
    assert filesystem._timestamp(text) == parse_timestamp(text)
    assert filesystem._timestamp(1796094626) == parse_timestamp(1796094626)


def test_read_many_returns_objects_in_order(store):
    for number in range(20):
        store.put(f"[c]/{number}", b"%d" % number)
    names = [f"[c]/{number}" for number in (7, 99, 0, 19, 7)]
    assert store.read_many(names) == [b"7", None, b"0", b"19", b"7"]
    assert store.read_many([]) == []


def test_failed_reads_of_read_many_are_retried(faults):
    store = remote(faults)
    names = [f"c/{number}" for number in range(20)]
    for name in names:
        store.put(name, name.encode())
    for kind in ("status", "half", "reset"):
        faults.add(kind, times=4, method="GET", contains="/c/1")
    assert store.read_many(names) == [name.encode() for name in names]
    faults.add("status", times=99, status=403, contains="/c/3")
    with pytest.raises(AccessDenied, match="c/3"):
        store.read_many(names)
