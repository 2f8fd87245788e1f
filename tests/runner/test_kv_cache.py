from __future__ import annotations

import platform
import re
import resource

import pytest
import torch

from batchinfer.engine.plan import Copy
from batchinfer.errors import ModelError
from batchinfer.ops.choose import load_backend
from batchinfer.ops.resources import free_bytes
from batchinfer.runner.kv_cache import KVCache, bytes_per_token, default_kv_tokens

GIB = 2**30


def test_a_kv_cache_has_the_shape_and_bytes_of_its_model():
    cache = KVCache(load_backend(), (3, 2, 8), 5, 4, torch.float16)
    assert len(cache.layers) == 3
    assert all(layer.shape == (5, 2, 2, 4, 8) and layer.dtype == torch.float16 for layer in cache.layers)
    held = sum(layer.nbytes for layer in cache.layers)
    assert held == bytes_per_token((3, 2, 8), torch.float16) * 5 * 4
    storages = {layer.untyped_storage().data_ptr() for layer in cache.layers}
    assert len(storages) == 3, "no two layers share memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copied_blocks_are_what_their_sources_were(dtype):
    """Also where a source is a target, of another copy or of its own."""
    cache = KVCache(load_backend(), (2, 2, 8), 6, 4, dtype)
    before = [layer.copy_(torch.randn(layer.shape)).clone() for layer in cache.layers]
    cache.copy([Copy(0, 1), Copy(1, 2), Copy(3, 3), Copy(0, 4)])
    for old, new in zip(before, cache.layers, strict=True):
        assert torch.equal(new, old[[0, 0, 1, 3, 0, 5]])


def test_pages_are_there_before_they_are_written(plain_torch: bool):
    release = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    if plain_torch or platform.system() != "Linux" or release < (5, 14):
        pytest.skip("the system or the backend puts no pages under memory in advance")
    cache = KVCache(load_backend(), (1, 2, 64), 1024, 16, torch.float32)
    cache.prefault(1)  # and 64 MiB ahead
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cache.layers[0].fill_(1.0)  # 16 MiB: 4,096 pages
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000


def test_no_room_is_an_error_that_says_what_to_lower():
    with pytest.raises(ModelError, match=r"1048576000000 tokens .* lower engine.kv_cache_tokens"):
        KVCache(load_backend(), (30, 8, 128), 65_536_000_000, 16, torch.float32)


def machine(root, available_kib: int, **files: str):
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_free_memory_of_a_machine_and_of_containers(tmp_path):
    for folder in "abcd":
        (tmp_path / folder).mkdir()
    stat = "anon 5\ninactive_file 1073741824\n"
    plain = machine(tmp_path / "a", 8 * 2**20)
    open_v2 = machine(
        tmp_path / "b", 8 * 2**20, memory_DOT_max="max\n", memory_DOT_current=f"{GIB}\n", memory_DOT_stat=stat
    )
    limited_v2 = machine(
        tmp_path / "c",
        8 * 2**20,
        memory_DOT_max=f"{4 * GIB}\n",
        memory_DOT_current=f"{2 * GIB}\n",
        memory_DOT_stat=stat,
    )
    limited_v1 = machine(
        tmp_path / "d",
        8 * 2**20,
        memory__memory_DOT_limit_in_bytes=f"{4 * GIB}",
        memory__memory_DOT_usage_in_bytes=f"{5 * GIB}",
        memory__memory_DOT_stat="cache 1\n",
    )
    assert free_bytes(plain) == free_bytes(open_v2) == 8 * GIB
    assert free_bytes(limited_v2) == 3 * GIB  # page cache that can go counts as free
    assert free_bytes(limited_v1) == 0
    (tmp_path / "empty").mkdir()
    assert 0 < free_bytes(tmp_path / "empty") < 2**50


def test_default_size_is_a_share_of_free_memory_or_what_the_seats_can_use(monkeypatch):
    monkeypatch.setattr("batchinfer.runner.kv_cache.free_bytes", lambda: 4_000_000)
    assert default_kv_tokens(1000, 256, 2048) == 1000
    assert default_kv_tokens(1000, 2, 100) == 200
    with pytest.raises(ModelError, match=r"4 MiB of memory are free.*engine.kv_cache_tokens"):
        default_kv_tokens(100_000, 256, 2048)
    assert default_kv_tokens(100_000, 1, 8) == 8
