"""Resolution of a model's files: a local path, a URL (copied into a cache directory) or a Hugging Face id."""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.errors import InputMissing, ModelError, SpecError
from batchinfer.io.filesystem import local_path, translate
from batchinfer.io.source import Source, Sources
from batchinfer.log import log
from batchinfer.spec import StorageSpec

CACHE_DIR = "~/.cache/batchinfer"
_SAFETENSORS = ("*.safetensors",)
_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_WEIGHTS = (*_SAFETENSORS, "*.gguf")
# a second copy of the weights in a vendor's own format
_NEVER = ("consolidated*",)
# files that decide the output; other JSON files, such as a trainer's state, may change
_DECISIVE = (
    *_WEIGHTS,
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "tekken.json",
)
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<file>/[\w./-]+\.gguf)?(?:@(?P<revision>[\w./-]+))?")
_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10
_TRANSFER_BYTES = 16 << 20


@dataclass(frozen=True)
class ModelFiles:
    """Local files of a model. `path` is a directory or a .gguf file.

    `identity` is a hash of everything that decides the model's output: the content of configuration, tokenizer and
    templates; names, sizes and 16 samples of 64 KB each of the weights.
    """

    path: Path
    identity: str


def fetch_model(model: str, storage: StorageSpec, weights: bool = True, cache_dir: Path | None = None) -> ModelFiles:
    """Return the local files of a model.

    `model`: a path, a URL of a directory or .gguf file, or `org/name[/file.gguf][@revision]`.

    URLs are copied into `cache_dir` (default `storage.cache`); interrupted copies are resumed, and changed objects are
    copied anew. The Hub keeps its own cache. Without `weights` only configuration and tokenizer are fetched; a URL's
    identity is the same either way, a Hub id's identity then omits weights that are not in the cache. Raises
    ModelError, and AccessDenied or StorageError for URLs.
    """
    path = local_path(model)
    if path is None:
        return _from_url(model, storage, weights, cache_dir or cache_folder(storage))
    if not path.exists() and (hub_id := _HUB_ID.fullmatch(model)):
        path = _from_hub(model, hub_id, weights)
    return _local(model, path, weights)


def cache_folder(storage: StorageSpec) -> Path:
    """Return the folder for copies of models. Raises SpecError for a URL that is not local."""
    path = local_path(storage.cache or CACHE_DIR)
    if path is None:
        raise SpecError(f"{storage.cache}: must be a directory on this machine", key="storage.cache")
    return path


def _local(model: str, path: Path, weights: bool) -> ModelFiles:
    if not path.exists():
        raise ModelError(f"{model}: no such file or directory, and not a Hugging Face id (org/name)")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{model}: a model is a directory or a .gguf file")
        return ModelFiles(path, _identity([str(path)], Sources(StorageSpec())))
    names = [entry.name for entry in path.iterdir() if entry.is_file()]
    single = [name for name in names if name.lower().endswith(".gguf")]
    if "config.json" not in names and len(single) == 1:
        return _local(model, path / single[0], weights)
    if weights:
        _check_complete(model, names)
    return ModelFiles(path, _identity([str(path / name) for name in names], Sources(StorageSpec())))


def _check_complete(model: str, names: list[str]) -> None:
    if "config.json" not in names:
        raise ModelError(f"{model}: holds no config.json; a model directory has config.json, tokenizer and safetensors")
    if not any(_matches(name, _SAFETENSORS) for name in names):
        pickled = [name for name in names if name.endswith((".bin", ".pth", ".pt"))]
        hint = f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors" if pickled else ""
        raise ModelError(f"{model}: holds no safetensors weights{hint}")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and not fnmatch.fnmatch(name, _NEVER[0])


def _identity(urls: list[str], sources: Sources) -> str:
    whole = hashlib.sha256()
    for url in sorted(urls, key=_name):
        if not _matches(_name(url), _DECISIVE):
            continue
        with sources.open(url) as source:
            size = source.opened.size
            pieces = _samples(source, size) if _matches(_name(url), _WEIGHTS) else source.blocks()
            content = hashlib.sha256()
            for piece in pieces:
                content.update(piece)
        # the name of a single .gguf file is not part of its identity
        name = _name(url) if len(urls) > 1 else ""
        whole.update(f"{name}\0{size}\0{content.hexdigest()}\n".encode())
    return whole.hexdigest()


def _samples(source: Source, size: int) -> Iterator[bytes]:
    """Yield evenly spaced samples, including the first and the last bytes."""
    last = max(size - _SAMPLE_BYTES, 0)
    for offset in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
        yield source.read_at(offset, _SAMPLE_BYTES)


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _from_hub(model: str, hub_id: re.Match[str], weights: bool) -> Path:
    import huggingface_hub

    repo, file, revision = hub_id["repo"], hub_id["file"], hub_id["revision"]
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file.lstrip("/"), revision=revision))
        patterns = [*_TEXTS, *(_SAFETENSORS if weights else ())]
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", *_NEVER]
        )
        return Path(folder)
    except Exception as error:  # the Hub's errors (HTTP, offline, gated, validation) have no common base class
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{model}: no such file or directory here, and the Hugging Face Hub does not provide it: {reason}"
        ) from error


def _from_url(url: str, storage: StorageSpec, weights: bool, cache_dir: Path) -> ModelFiles:
    sources = Sources(storage)
    try:
        files = _list_files(url, sources)
    except InputMissing as error:
        raise ModelError(f"{url}: no model there: {error}") from None
    if not files:
        raise ModelError(f"{url}: no model there: nothing with this name exists{sources.tree(url).place}")
    cache = cache_dir / "models"
    if files == [url]:
        if not url.lower().endswith(".gguf"):
            raise ModelError(f"{url}: a model is a directory or a .gguf file")
        path = _copy(url, files, sources, cache) / _name(url)
        return ModelFiles(path, _identity([str(path)], sources))
    if weights:
        _check_complete(url, [_name(file) for file in files])
    relevant = [file for file in files if _matches(_name(file), (*_TEXTS, *_SAFETENSORS))]
    copied = [file for file in relevant if weights or not _matches(_name(file), _SAFETENSORS)]
    folder = _copy(url, copied, sources, cache)
    return ModelFiles(folder, _identity([str(folder / _name(f)) if f in copied else f for f in relevant], sources))


def _list_files(url: str, sources: Sources) -> list[str]:
    """Return the URL itself for a file, or the URLs of the files directly in a folder."""
    tree = sources.tree(url)
    path = tree.path(url)
    if tree.kind(path) != "folder":
        return [url] if tree.kind(path) else []
    return [tree.url(f"{path}/{name}") for name in tree.below(path) if "/" not in name]


def _copy(url: str, files: list[str], sources: Sources, cache: Path) -> Path:
    """Copy exactly these objects into a directory, which is renamed to its final name once it is complete."""
    version = hashlib.sha256()
    for file in files:
        with sources.open(file) as source:
            version.update(f"{file}\0{source.opened}\n".encode())
    final = cache / f"{_name(url.rstrip('/'))}-{version.hexdigest()[:16]}"
    partial = final.with_name(f"{final.name}.partial")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive_lock(final.with_name(f"{final.name}.lock")):
            if final.exists():
                return final
            partial.mkdir(exist_ok=True)
            log.info("copying the model", url=url, to=str(final), files=len(files))
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda file: _download(sources, file, partial / _name(file)), files))
            partial.rename(final)
    except OSError as error:
        raise translate(error, str(final)) from error
    return final


def _download(sources: Sources, url: str, path: Path) -> None:
    """Download a file, resuming a partial one: the directory's name pins the version, so its bytes are still valid."""
    with sources.open(url) as source, path.open("ab") as file:
        done = file.tell()
        while done < source.opened.size and (piece := source.read_at(done, _TRANSFER_BYTES)):
            file.write(piece)
            done += len(piece)
        file.flush()
        os.fsync(file.fileno())
        source.check(source.opened, "changed while it was copied")


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[Any]:
    """Hold a lock file, so that other processes on this machine wait and then find the files complete."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
