"""Tests of model files: local, on S3 with faults, and from the Hub (a fake client, because tests have no network)."""

import os

import huggingface_hub
import pytest

from batchinfer.errors import AccessDenied, ModelError, StorageError
from batchinfer.io import fetch
from batchinfer.io.fetch import fetch_model
from batchinfer.io.source import RemoteSource
from batchinfer.spec import StorageSpec

LOCAL = StorageSpec()


def make_model(folder, weights=3_000_000):
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text(f'{{"name": "{name}"}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(os.urandom(weights))
    (folder / "README.md").write_text("about")
    return folder


def upload(server, folder):
    bucket = server.bucket()
    filesystem = server.filesystem()
    for path in folder.iterdir():
        filesystem.put_file(str(path), f"{bucket}/models/{folder.name}/{path.name}")
    return f"{bucket}/models/{folder.name}"


class TestLocal:
    def test_identity_changes_only_with_files_that_decide_the_output(self, tmp_path):
        folder = make_model(tmp_path / "m")
        files = fetch_model(str(folder), LOCAL)
        assert files.path == folder
        (folder / "README.md").write_text("other")
        (folder / "trainer_state.json").write_text("{}")
        assert fetch_model(str(folder), LOCAL) == files
        assert fetch_model(str(folder), LOCAL, weights=False) == files
        seen = {files.identity}
        for name in ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
            (folder / name).write_text("changed")
            seen.add(fetch_model(str(folder), LOCAL).identity)
        weights = folder / "model.safetensors"
        data = weights.read_bytes()
        for changed in (b"\x00" + data[1:], data[:-1] + b"\x00", data + b"\x00"):
            weights.write_bytes(changed)
            seen.add(fetch_model(str(folder), LOCAL).identity)
        assert len(seen) == 8

    def test_gguf(self, tmp_path):
        path = tmp_path / "d" / "m.gguf"
        path.parent.mkdir()
        path.write_bytes(b"GGUF" + bytes(1000))
        files = fetch_model(str(path), LOCAL)
        assert files.path == path
        assert fetch_model(str(path.parent), LOCAL) == files
        moved = tmp_path / "renamed.gguf"
        path.rename(moved)
        assert fetch_model(str(moved), LOCAL).identity == files.identity

    def test_directory_without_a_usable_model_is_refused(self, tmp_path):
        folder = make_model(tmp_path / "m")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"no safetensors weights; pytorch_model\.bin is a pickle"):
            fetch_model(str(folder), LOCAL)
        fetch_model(str(folder), LOCAL, weights=False)
        (folder / "config.json").unlink()
        with pytest.raises(ModelError, match=r"holds no config\.json"):
            fetch_model(str(folder), LOCAL)
        with pytest.raises(ModelError, match=r"a model is a directory or a \.gguf file"):
            fetch_model(str(folder / "tokenizer.json"), LOCAL)
        with pytest.raises(ModelError, match="nowhere: no such file or directory"):
            fetch_model(str(tmp_path / "nowhere"), LOCAL)


class TestUrl:
    def test_url_is_copied_once_despite_faults(self, faults, tmp_path):
        folder = make_model(tmp_path / "m")
        url = upload(faults, folder)
        faults.rate = 0.25
        files = fetch_model(url, faults.storage, cache_dir=tmp_path / "cache")
        faults.rate = 0.0
        assert files.identity == fetch_model(str(folder), LOCAL).identity
        names = sorted(path.name for path in files.path.iterdir())
        assert names == sorted(path.name for path in folder.iterdir() if path.name != "README.md")
        assert all((files.path / name).read_bytes() == (folder / name).read_bytes() for name in names)
        (files.path / "tokenizer.json").touch()
        before = (files.path / "model.safetensors").stat().st_mtime_ns
        assert fetch_model(url, faults.storage, cache_dir=tmp_path / "cache") == files
        assert (files.path / "model.safetensors").stat().st_mtime_ns == before

    def test_fetch_without_weights_has_the_same_identity(self, faults, tmp_path):
        folder = make_model(tmp_path / "m")
        url = upload(faults, folder)
        files = fetch_model(url, faults.storage, weights=False, cache_dir=tmp_path / "cache")
        assert not (files.path / "model.safetensors").exists()
        assert files.identity == fetch_model(str(folder), LOCAL).identity

    def test_interrupted_copy_is_resumed(self, faults, tmp_path, monkeypatch):
        monkeypatch.setattr(fetch, "_TRANSFER_BYTES", 1 << 20)
        folder = make_model(tmp_path / "m", weights=5 << 20)
        url = upload(faults, folder)
        original = RemoteSource.read_at

        def read_at(self, offset, length):
            if self.url.endswith(".safetensors") and offset >= 3 << 20:
                raise StorageError("the connection is gone")
            return original(self, offset, length)

        with monkeypatch.context() as patch:
            patch.setattr(RemoteSource, "read_at", read_at)
            with pytest.raises(StorageError, match="connection is gone"):
                fetch_model(url, faults.storage, cache_dir=tmp_path / "cache")
        assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == [".partial"]
        faults.seen.clear()
        files = fetch_model(url, faults.storage, cache_dir=tmp_path / "cache")
        assert (files.path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        large = [s for s in faults.requests("GET", "model.safetensors") if _length(s) == 1 << 20]
        assert len(large) == 2

    def test_changed_object_is_copied_anew(self, faults, tmp_path):
        folder = make_model(tmp_path / "m")
        url = upload(faults, folder)
        first = fetch_model(url, faults.storage, cache_dir=tmp_path / "cache")
        faults.filesystem().pipe_file(f"{url}/config.json", b"{}")
        second = fetch_model(url, faults.storage, cache_dir=tmp_path / "cache")
        assert second.path != first.path
        assert (second.path / "config.json").read_bytes() == b"{}"
        assert second.identity != first.identity

    def test_gguf(self, seaweed, tmp_path):
        url = f"{seaweed.bucket()}/m.gguf"
        seaweed.filesystem().pipe_file(url, b"GGUF" + bytes(100))
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
        files = fetch_model(url, seaweed.storage, cache_dir=tmp_path / "cache")
        assert files.path.name == "m.gguf"
        assert files.path.read_bytes() == b"GGUF" + bytes(100)
        assert files.identity == fetch_model(str(tmp_path / "m.gguf"), LOCAL).identity

    def test_missing_url_is_a_model_error(self, seaweed, tmp_path):
        bucket = seaweed.bucket()
        for url in (f"{bucket}/nothing", "s3://never-was/m"):
            with pytest.raises(ModelError, match=f"{url}: no model there"):
                fetch_model(url, seaweed.storage, cache_dir=tmp_path)
        seaweed.filesystem().pipe_file(f"{bucket}/m/config.json", b"{}")
        with pytest.raises(ModelError, match="no safetensors"):
            fetch_model(f"{bucket}/m", seaweed.storage, cache_dir=tmp_path)
        wrong = seaweed.storage.model_copy(update={"options": {"key": "tester", "secret": "no"}})
        with pytest.raises(AccessDenied):
            fetch_model(f"{bucket}/m", wrong, cache_dir=tmp_path)


def _length(seen):
    first, last = seen.headers["Range"].removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


class TestHub:
    def test_hub_id_is_split_into_repo_file_and_revision(self, tmp_path, monkeypatch):
        folder = make_model(tmp_path / "m")
        (folder / "x.gguf").write_bytes(b"GGUF")
        asked = []

        def snapshot(repo, *, revision, allow_patterns, ignore_patterns):
            asked.append((repo, revision, "*.safetensors" in allow_patterns))
            assert not {"*.bin", "*.pth", "*"} & set(allow_patterns)
            return str(folder)

        def download(repo, file, *, revision):
            asked.append((repo, revision, file))
            return str(folder / "x.gguf")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.chdir(tmp_path)
        assert fetch_model("org/name", LOCAL).path == folder
        fetch_model("org/name.v2@refs/pr/1", LOCAL, weights=False)
        assert fetch_model("org/name/q4/x.gguf@main", LOCAL).path.name == "x.gguf"
        assert asked == [
            ("org/name", None, True),
            ("org/name.v2", "refs/pr/1", False),
            ("org/name", "main", "q4/x.gguf"),
        ]

    def test_hub_error_offline_names_the_id(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            ModelError,
            match="org/no-such-model: no such file or directory here, and the Hugging Face Hub does not provide it",
        ):
            fetch_model("org/no-such-model", LOCAL)

    def test_existing_path_wins_over_hub_id(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("./org/name", "/org/name", "a/b/c", "name"):
            with pytest.raises(ModelError, match="no such file or directory, and not a Hugging Face id"):
                fetch_model(name, LOCAL)
