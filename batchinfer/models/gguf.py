"""GGUF files read as Hugging Face models: config, and weights by Hugging Face name, dequantised or in blocks.

llama.cpp's converter changes tensors on the way in (rows of q and k permuted for its rope, Gemma's norms stored as
1 + w); reading undoes that. Sizes and layouts of the types are the `gguf` package's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from batchinfer_kernels.formats import BlockMatrix, stacked_blocks
from gguf import GGMLQuantizationType as GGMLType

from batchinfer.errors import ModelError
from batchinfer.models import gguf_blocks, gguf_config
from batchinfer.models.checkpoint import StoredTensor, TensorSlice
from batchinfer.models.gguf_header import TensorInfo, read_header
from batchinfer.ops.staging import HOST_WRITES, Staging

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
    """Checkpoint in a GGUF file. Tensor bytes are memory-mapped and read lazily."""

    def __init__(self, path: str | Path, staging: Staging = HOST_WRITES) -> None:
        """Open the file. Raises ModelError if it is missing, truncated, damaged or of an unknown architecture."""
        self.path = Path(path)
        self._staging = staging
        self.header = read_header(self.path)
        self.metadata = self.header.metadata
        self.tensors = self.header.tensors
        self.family = gguf_config.family(self.header)
        # "c": private, and writable for numpy, without which torch warns; nothing writes to it
        self._data = np.memmap(self.path, dtype=np.uint8, mode="c")

    def config_dict(self) -> dict[str, Any]:
        """Return the model's facts with the keys of a Hugging Face config.json."""
        factors = {name: self.tensor(name) for name in self.tensors if gguf_config.is_rope_factors(name)}
        try:
            return gguf_config.config_dict(self.header, factors)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{self.path}: the metadata is damaged: {type(error).__name__}: {error}") from None

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """See Checkpoint. Raises ModelError for a tensor without a place in the model, of another type or cut off."""
        found = {}
        for hf_name, name in self._names.items():
            info = self.tensors[name]
            ggml_type = self._type(info)
            self._raw(info, ggml_type)
            found[hf_name] = StoredTensor(self.path, info.shape, ggml_type.name)
        return found

    @cached_property
    def _names(self) -> dict[str, str]:
        """Return Hugging Face's name → the name here, of every tensor of the model."""
        names = (name for name in self.tensors if not gguf_config.is_rope_factors(name))
        return {gguf_config.hf_name(self.header, name): name for name in names}

    def tensor(self, name: str) -> np.ndarray:
        """Return float32 values of one tensor by its name here, as they stand in the file: no permutation undone."""
        info = self.tensors[name]
        ggml_type = self._type(info)
        raw = self._raw(info, ggml_type)
        out = torch.empty(math.prod(info.shape), dtype=torch.float32)
        _dequantize(raw, ggml_type, out)
        return out.view(info.shape).numpy()

    def block_size(self, hf_name: str) -> int:
        """Return the number of input features that a block of the tensor's type holds; 1 for plain numbers."""
        block, _ = gguf.GGML_QUANT_SIZES[self._type(self.tensors[self._names[hf_name]])]
        return int(block)

    def read_into(self, part: TensorSlice, out: torch.Tensor) -> None:
        """See Checkpoint. Columns are cut on the borders of blocks."""
        name = self._names[part.name]
        if part.columns is None:
            out.copy_(self._vector(name, part))
            return
        ggml_type, first = self._type(self.tensors[name]), 0
        for raw_rows in self._raw_rows(name, part):
            self._staging.write(out[first : first + len(raw_rows)], partial(_fill_rows, raw_rows, ggml_type))
            first += len(raw_rows)

    def read_blocks(self, part: TensorSlice) -> BlockMatrix | None:
        """Return a slice as it is stored, zeros appended, if BlockMatrix holds it exactly."""
        name = self._names[part.name]
        ggml_type = self._type(self.tensors[name])
        if ggml_type not in gguf_blocks.TYPES:
            return None
        matrices = [gguf_blocks.block_matrix(raw_rows, ggml_type) for raw_rows in self._raw_rows(name, part)]
        found = [matrix for matrix in matrices if matrix is not None]
        if len(found) < len(matrices):
            return None
        if part.zeros:
            found.append(gguf_blocks.zero_matrix(part.zeros, found[0]))
        return stacked_blocks(found)

    def _vector(self, name: str, part: TensorSlice) -> torch.Tensor:
        values = self._unpermuted(name, self.tensor(name))
        if self.family.norm_plus_one and name.endswith("norm.weight"):
            values -= 1.0
        return torch.from_numpy(np.concatenate([values[rows.start : rows.stop] for rows in part.rows]))

    def _raw_rows(self, name: str, part: TensorSlice) -> Iterator[np.ndarray]:
        """Yield uint8 [rows, bytes of the columns] of each range of rows, in Hugging Face's order. May be a copy."""
        info = self.tensors[name]
        ggml_type = self._type(info)
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        whole = self._raw(info, ggml_type).reshape(info.shape[0], info.shape[1] // block * block_bytes)
        assert part.columns is not None and part.columns.start % block == 0, "the scheme checks the cut"
        columns = slice(part.columns.start // block * block_bytes, part.columns.stop // block * block_bytes)
        for rows in part.rows:
            yield self._unpermuted(name, whole[rows.start : rows.stop, columns])

    def _unpermuted(self, name: str, values: np.ndarray) -> np.ndarray:
        """Reorder each head's rows from interleaved pairs to halves: the inverse of llama.cpp's `LlamaModel.permute`.

        `values` are rows of whole heads, all of them or a rank's.
        """
        if not (self.family.permuted and (".attn_q." in name or ".attn_k." in name)):
            return values
        heads, rows = gguf_config.head_counts(self.header)[".attn_k." in name], self.tensors[name].shape[0]
        if rows % (2 * heads):
            raise ModelError(
                f"{self.path}: tensor {name!r} has {rows} rows, not an even number for each of {heads} heads"
            )
        paired = values.reshape(-1, rows // heads // 2, 2, *values.shape[1:])
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


def _fill_rows(raw_rows: np.ndarray, ggml_type: GGMLType, rows: range, out: torch.Tensor) -> None:
    _dequantize(raw_rows[rows.start : rows.stop].reshape(-1), ggml_type, out.view(-1))


def _dequantize(raw: np.ndarray, ggml_type: GGMLType, out: torch.Tensor) -> None:
    """Fill `out`, a vector, from contiguous blocks. Blocks know nothing of rows: chunks may end between any two."""
    if ggml_type not in gguf_blocks.TYPES:  # for those, three times as fast as numpy and equal to the last bit
        _dequantize_in_numpy(raw, ggml_type, out)
        return
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    bytes_ = torch.from_numpy(raw).view(-1, block_bytes)
    for chunk, raw_chunk in zip(torch.split(out, _CHUNK), torch.split(bytes_, _CHUNK // block), strict=True):
        chunk.view(-1, block).copy_(gguf_blocks.decode_blocks(raw_chunk, ggml_type).float())


def _dequantize_in_numpy(raw: np.ndarray, ggml_type: GGMLType, out: torch.Tensor) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    step_bytes = _CHUNK // block * block_bytes

    def fill(start: int) -> None:
        with np.errstate(all="ignore"):  # a scale may be infinite or nan in a damaged file
            values = gguf.dequantize(raw[start // _CHUNK * step_bytes :][:step_bytes][None], ggml_type)[0]
        out[start : start + _CHUNK].copy_(torch.from_numpy(values))

    starts = range(0, len(out), _CHUNK)
    if len(starts) == 1:
        fill(0)
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, starts))
