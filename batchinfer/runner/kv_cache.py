"""The KV cache: one tensor a layer, and how large it should be.

N blocks · K kv heads · B slots per block · D head size
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from batchinfer import ops
from batchinfer.engine.plan import Copy
from batchinfer.errors import ModelError

_CPU_SHARE = 0.25  # of the memory that is free: the rest is for whatever else the machine does
_GPU_SHARE = 0.85  # of what the weights leave: the rest is for activations and logits
_POPULATED_BYTES = 64 << 20  # ahead of need: a fraction of a step's time
_LEAST_TOKENS = 32  # what engine.kv_cache_tokens asks for at least


class KVCache:
    """`layers` holds kv_N2KBD of each layer: in a block first the keys, then the values.

    The memory is not initialised: a slot is written before it is read, and on CPUs a page costs nothing until then.
    Blocks come into use in their order, and before they do, `use` has pages put under them: one by one, as tokens are
    written, pages take several times as long, and threads wait for one another.
    """

    def __init__(
        self, kv_shape: tuple[int, int, int], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """kv_shape: layers, kv heads, head size (see ModelConfig). Raises ModelError if there is no room."""
        num_layers, kv_heads, head_size = kv_shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, 2, kv_heads, block_size, head_size)
        try:
            self.layers: list[Tensor] = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        except RuntimeError as error:
            size = bytes_per_token(kv_shape, dtype) * num_blocks * block_size
            raise ModelError(
                f"no room for a KV cache of {num_blocks * block_size} tokens ({size / 2**30:.1f} GiB): lower "
                f"engine.kv_cache_tokens ({str(error).splitlines()[0]})"
            ) from None
        self._in_use = 0
        self._ahead = _POPULATED_BYTES // (bytes_per_token(kv_shape, dtype) * block_size)

    def use(self, blocks: int) -> None:
        """From now on the first `blocks` blocks are written to."""
        if blocks > self._in_use:
            target = min(self.num_blocks, blocks + self._ahead)
            ops.populate(self.layers, self._in_use, target)
            self._in_use = target

    def copy(self, copies: Sequence[Copy]) -> None:
        """Whole blocks, in all layers; a target may be a source too, and is read first."""
        sources, targets = zip(*copies, strict=True)
        ops.copy_blocks(self.layers, sources, targets)


def bytes_per_token(kv_shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Bytes that one token takes in all layers, keys and values."""
    num_layers, kv_heads, head_size = kv_shape
    return 2 * num_layers * kv_heads * head_size * dtype.itemsize


def default_kv_tokens(token_bytes: int, max_num_seqs: int, max_model_len: int, device: torch.device) -> int:
    """What all seats could use, or a share of the memory that is free now (load the weights first), if that is less.

    token_bytes: see `bytes_per_token`. Raises ModelError if next to nothing is free.
    """
    free = free_bytes(device)
    share = _CPU_SHARE if device.type == "cpu" else _GPU_SHARE
    tokens = min(int(free * share) // token_bytes, max_num_seqs * max_model_len)
    if tokens < min(_LEAST_TOKENS, max_model_len):
        raise ModelError(
            f"only {free / 2**20:.0f} MiB of memory are free, too little for a KV cache of {token_bytes} bytes per "
            f"token: free some, or set engine.kv_cache_tokens"
        )
    return tokens


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that can be allocated now: the device's, or of the machine within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_machine_free_bytes(root), *_cgroup_free_bytes(root)])


def _machine_free_bytes(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    # no Linux: half of what is built in
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_free_bytes(root: Path) -> list[int]:
    """What the limits of cgroup v2 and v1 leave, as a container sees its own; page cache that can go counts as free."""
    left = []
    for limit_file, used_file, stat_file in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        folder = root / "sys/fs/cgroup"
        try:
            limit = int((folder / limit_file).read_text())
            used = int((folder / used_file).read_text())
            stat = dict(line.split() for line in (folder / stat_file).read_text().splitlines())
        except (OSError, ValueError):  # none, or the word "max"
            continue
        left.append(max(0, limit - used + int(stat.get("inactive_file", 0))))
    return left
