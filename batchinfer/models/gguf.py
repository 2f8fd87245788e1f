"""GGUF files as Hugging Face models: configuration, and weights de-quantised under Hugging Face names.

llama.cpp's converter changes tensors on the way in (rows of q and k permuted for its rope, Gemma's norms stored as
1 + w); `weights` undoes that. Sizes and layouts of the types are the `gguf` package's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from batchinfer_kernels.formats import BlockMatrix
from gguf import GGMLQuantizationType as GGMLType

from batchinfer.errors import ModelError
from batchinfer.models import gguf_blocks, gguf_config
from batchinfer.models.gguf_header import TensorInfo, read_header

SUPPORTED = frozenset(
    {
        *(GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0),
        *(GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1),
        *(GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K),
    }
)
# Elements that one call de-quantises: large enough that numpy's calls do not count, small enough for the cache.
_CHUNK = 1 << 19
_THREADS = 2  # numpy releases the GIL here; more threads only share the memory bandwidth


class GGUFFile:
    """An open GGUF file. Tensor bytes are memory-mapped and read when asked for."""

    def __init__(self, path: str | Path) -> None:
        """Raises ModelError for a missing, truncated or damaged file and for an architecture that is not known."""
        self.path = Path(path)
        self.header = read_header(self.path)
        self.metadata = self.header.metadata
        self.tensors = self.header.tensors
        self.family = gguf_config.family(self.header)
        # "c": private, and writable for numpy, without which torch warns; nothing writes to it
        self._data = np.memmap(self.path, dtype=np.uint8, mode="c")

    def config_dict(self) -> dict[str, Any]:
        """The model's facts with the keys of a Hugging Face config.json."""
        factors = {name: self.tensor(name) for name in self.tensors if gguf_config.is_rope_factors(name)}
        try:
            return gguf_config.config_dict(self.header, factors)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{self.path}: the metadata is damaged: {type(error).__name__}: {error}") from None

    def tensor(self, name: str) -> np.ndarray:
        """float32 values of one tensor, as they stand in the file: no permutation undone."""
        info = self.tensors[name]
        ggml_type = self._type(info)
        raw = self._raw(info, ggml_type)
        return _dequantize(raw, ggml_type, math.prod(info.shape)).reshape(info.shape)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, float32 tensor) in file order, one in memory at a time.

        Raises ModelError for a tensor that has no place in the model, or a type that is not supported.
        """
        for name, hf_name in self._names():
            yield hf_name, self._weight(name)

    def weights_in_blocks(self) -> Iterator[tuple[str, torch.Tensor | BlockMatrix]]:
        """The same, but matrices of a type that `BlockMatrix` holds exactly are that."""
        for name, hf_name in self._names():
            blocks = self._blocks(name)
            yield hf_name, self._weight(name) if blocks is None else blocks

    def _names(self) -> Iterator[tuple[str, str]]:
        """Here, and at Hugging Face."""
        for name in self.tensors:
            if not gguf_config.is_rope_factors(name):
                yield name, gguf_config.hf_name(self.header, name)

    def _weight(self, name: str) -> torch.Tensor:
        values = self._unpermuted(name, self.tensor(name))
        if self.family.norm_plus_one and name.endswith("norm.weight"):
            values -= 1.0
        return torch.from_numpy(values)

    def _blocks(self, name: str) -> BlockMatrix | None:
        info = self.tensors[name]
        ggml_type = self._type(info)
        if len(info.shape) != 2 or ggml_type not in gguf_blocks.TYPES:
            return None
        rows = self._raw(info, ggml_type).reshape(info.shape[0], -1)
        return gguf_blocks.matrix(self._unpermuted(name, rows), ggml_type)

    def _unpermuted(self, name: str, values: np.ndarray) -> np.ndarray:
        """Rows of each head from interleaved pairs to two halves: the inverse of llama.cpp's `LlamaModel.permute`."""
        if not (self.family.permuted and (".attn_q." in name or ".attn_k." in name)):
            return values
        heads = gguf_config.head_counts(self.header)[".attn_k." in name]
        rows = values.shape[0]
        if rows % (2 * heads):
            raise ModelError(
                f"{self.path}: tensor {name!r} has {rows} rows, not an even number for each of {heads} heads"
            )
        paired = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
        return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)

    def _type(self, info: TensorInfo) -> GGMLType:
        try:
            ggml_type = GGMLType(info.ggml_type)
        except ValueError:
            ggml_type = None
        if ggml_type not in SUPPORTED:
            name = ggml_type.name if ggml_type is not None else f"number {info.ggml_type}"
            known = ", ".join(sorted(t.name for t in SUPPORTED))
            raise ModelError(f"{self.path}: tensor {info.name!r} has type {name}; supported are {known}")
        return ggml_type

    def _raw(self, info: TensorInfo, ggml_type: GGMLType) -> np.ndarray:
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        if not info.shape or info.shape[-1] % block:
            raise ModelError(
                f"{self.path}: tensor {info.name!r} has shape {info.shape}, not whole blocks of {ggml_type.name}"
            )
        start = self.header.data_start + info.offset
        end = start + math.prod(info.shape) // block * block_bytes
        if end > self._data.size:
            raise ModelError(
                f"{self.path}: ends at byte {self._data.size}, inside tensor {info.name!r} (bytes {start} to {end}); "
                "the file is truncated, download it again"
            )
        return self._data[start:end]


def _dequantize(raw: np.ndarray, ggml_type: GGMLType, count: int) -> np.ndarray:
    """`count` float32 values of contiguous blocks. Blocks know nothing of rows, so chunks may cut anywhere between."""
    if ggml_type not in gguf_blocks.TYPES:  # for those, three times as fast as numpy and equal to the last bit
        return _dequantize_in_numpy(raw, ggml_type, count)
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    out = torch.empty(count // block, block, dtype=torch.float32)
    bytes_ = torch.from_numpy(raw).view(-1, block_bytes)
    for part, part_bytes in zip(torch.split(out, _CHUNK // block), torch.split(bytes_, _CHUNK // block), strict=True):
        part.copy_(gguf_blocks.decoded(part_bytes, ggml_type).float())
    return out.view(-1).numpy()


def _dequantize_in_numpy(raw: np.ndarray, ggml_type: GGMLType, count: int) -> np.ndarray:
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    out = np.empty(count, np.float32)
    step_bytes = _CHUNK // block * block_bytes

    def fill(start: int) -> None:
        with np.errstate(all="ignore"):  # a scale may be infinite or nan in a damaged file
            out[start : start + _CHUNK] = gguf.dequantize(
                raw[start // _CHUNK * step_bytes :][:step_bytes][None], ggml_type
            )[0]

    starts = range(0, count, _CHUNK)
    if len(starts) == 1:
        fill(0)
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, starts))
    return out
