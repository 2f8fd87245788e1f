"""The KV cache: one tensor a layer, and how large it should be.

State: the memory that the backend allocated, for as long as the engine lives. Blocks are handed out by the scheduler.
N blocks · K kv heads · B slots per block · D head size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batchinfer.engine.plan import Copy
from batchinfer.errors import ModelError
from batchinfer.ops.backend import Backend
from batchinfer.ops.resources import KV_CACHE_SHARE, free_bytes

_LEAST_TOKENS = 32  # what engine.kv_cache_tokens asks for at least


class KVCache:
    """Paged KV cache: `layers` holds kv_N2KBD of each layer, shared by all sequences.

    In a block first come the keys, then the values. The memory is not initialised: a slot is written before it is read.
    Blocks come into use in their order; `prefault` has their memory made ready before.
    """

    def __init__(
        self,
        backend: Backend,
        kv_shape: tuple[int, int, int],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        """kv_shape: layers, kv heads, head size (see ModelConfig). Raises ModelError if there is no room."""
        num_layers, kv_heads, head_size = kv_shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._backend = backend
        try:
            shape = (num_blocks, 2, kv_heads, block_size, head_size)
            memory = backend.allocate_kv(shape, num_layers, dtype)
        except RuntimeError as error:
            size = bytes_per_token(kv_shape, dtype) * num_blocks * block_size
            raise ModelError(
                f"no room for a KV cache of {num_blocks * block_size} tokens ({size / 2**30:.1f} GiB): lower "
                f"engine.kv_cache_tokens ({str(error).splitlines()[0]})"
            ) from None
        self.layers = memory.layers
        self.prefault = memory.prefault

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy whole blocks, in all layers; a target may be a source too, and is read first."""
        sources, targets = zip(*copies, strict=True)
        self._backend.copy_blocks(self.layers, sources, targets)


def bytes_per_token(kv_shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Return the bytes that one token takes in all layers, keys and values."""
    num_layers, kv_heads, head_size = kv_shape
    return 2 * num_layers * kv_heads * head_size * dtype.itemsize


def default_kv_tokens(token_bytes: int, max_num_seqs: int, max_model_len: int) -> int:
    """Return what all seats could use, or what fits into a share of the host's memory that is free, if that is less.

    token_bytes: see `bytes_per_token`. Load the weights first. Raises ModelError if next to nothing is free.
    """
    free = free_bytes()
    tokens = min(int(free * KV_CACHE_SHARE) // token_bytes, max_num_seqs * max_model_len)
    if tokens < min(_LEAST_TOKENS, max_model_len):
        raise ModelError(
            f"only {free / 2**20:.0f} MiB of memory are free, too little for a KV cache of {token_bytes} "
            "bytes per token: free some, or set engine.kv_cache_tokens"
        )
    return tokens


def whole_blocks(tokens: int, block_size: int) -> int:
    """Return the blocks that a KV cache of so many tokens has. Raises ModelError if it holds none."""
    if tokens < block_size:
        raise ModelError(f"a KV cache of {tokens} tokens holds no block of {block_size}: lower engine.block_size")
    return tokens // block_size
