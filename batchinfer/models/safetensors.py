"""Safetensors files: headers, and slices of tensors read at their offsets, through a small buffer.

Format: https://github.com/huggingface/safetensors#format: 8 bytes with the length of the header, little-endian, the
header in JSON (name → dtype, shape, offsets), the tensors' bytes. The package checks that a file is whole.
"""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchinfer.errors import ModelError
from batchinfer.models.checkpoint import StoredTensor, TensorSlice
from batchinfer.models.file_kind import said
from batchinfer.models.json_file import read_json
from batchinfer.ops.staging import Staging

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHERS = {
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_NAMES = {code: str(dtype).removeprefix("torch.") for code, dtype in _FLOATS.items()} | _OTHERS
_BUFFER_BYTES = 16 << 20


class SafetensorsFiles:
    """Tensors of model.safetensors, or of all the files that its index names. See Checkpoint."""

    def __init__(self, path: Path, staging: Staging) -> None:
        """Read the headers. Raises ModelError for files that are missing, not whole or something else."""
        self._staging = staging
        self._stored: dict[str, StoredTensor] = {}
        self._places: dict[str, tuple[torch.dtype | None, int]] = {}  # dtype if it is a float, offset in the file
        self._buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8)
        for file in _files(path):
            self._read_header(file)

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """See Checkpoint."""
        return self._stored

    def read_into(self, part: TensorSlice, out: Tensor) -> None:
        """See Checkpoint."""
        if part.num_rows == 0:
            return
        file, shape, _ = self._stored[part.name]
        dtype, offset = self._places[part.name]
        assert dtype is not None, "a scheme checks the format first"
        columns = part.columns or range(math.prod(shape[1:]))
        row_bytes, skipped = math.prod(shape[1:]) * dtype.itemsize, columns.start * dtype.itemsize
        with file.open("rb", buffering=0) as opened:
            reader = _SliceReader(opened.fileno(), f"{file} ends inside {part.name}", offset + skipped, row_bytes)
            targets = torch.split(out.view(part.num_rows, len(columns)), [len(rows) for rows in part.rows])
            for rows, target in zip(part.rows, targets, strict=True):
                self._staging.write(target, partial(self._read_range, reader, rows.start, dtype))

    def _read_range(self, reader: _SliceReader, start: int, dtype: torch.dtype, rows: range, out_NC: Tensor) -> None:
        """Read rows from `start` on: straight into the memory if that takes no conversion, else through the buffer."""
        first, columns = start + rows.start, out_NC.shape[1]
        if out_NC.dtype == dtype:
            reader.read_rows(first, out_NC)
            return
        for chunk in torch.split(out_NC, self._rows_at_once(columns * dtype.itemsize)):
            numbers = self._scratch(dtype, len(chunk), columns)
            reader.read_rows(first, numbers)
            chunk.copy_(numbers)
            first += len(chunk)

    def _rows_at_once(self, width: int) -> int:
        if width > len(self._buffer):
            self._buffer = torch.empty(width, dtype=torch.uint8)
        return len(self._buffer) // width

    def _scratch(self, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        return self._buffer[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="numpy"), file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header: dict[str, Any] = json.loads(opened.read(size))
        except (SafetensorError, OSError) as error:
            otherwise = f"is not a whole safetensors file: {error}; download it again"
            raise ModelError(f"{file} {said(file, otherwise)}") from None
        for name, facts in header.items():
            if name != "__metadata__":
                code = facts["dtype"]
                self._stored[name] = StoredTensor(file, tuple(facts["shape"]), _NAMES.get(code, code))
                self._places[name] = _FLOATS.get(code), 8 + size + facts["data_offsets"][0]


class _SliceReader:
    """Reads rows of one tensor, or the same part of each, which lie `row_bytes` apart in a file from `offset` on."""

    def __init__(self, descriptor: int, too_short: str, offset: int, row_bytes: int) -> None:
        self._descriptor = descriptor
        self._too_short = too_short
        self._offset = offset
        self._row_bytes = row_bytes

    def read_rows(self, first: int, out_NC: Tensor) -> None:
        """Fill contiguous rows, the file's row `first` and those after it: in one go if they are whole."""
        target = out_NC.view(torch.uint8).numpy().data.cast("B")
        width, offset = len(target) // len(out_NC), self._offset + first * self._row_bytes
        if width == self._row_bytes:
            self._fill(target, offset)
            return
        for row in range(len(out_NC)):
            self._fill(target[row * width : (row + 1) * width], offset + row * self._row_bytes)

    def _fill(self, target: memoryview, offset: int) -> None:
        while target:
            count = os.preadv(self._descriptor, [target], offset)
            if count == 0:
                raise ModelError(f"{self._too_short}; download it again")
            target, offset = target[count:], offset + count


def _files(path: Path) -> list[Path]:
    if (path / _INDEX).exists():
        try:
            names = sorted({str(name) for name in read_json(path / _INDEX)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path / _INDEX} is not a safetensors index: {error!r}") from None
    elif (path / _ONE_FILE).exists():
        names = [_ONE_FILE]
    else:
        raise ModelError(f"{path} holds neither {_ONE_FILE} nor {_INDEX}; other formats of weights are not read")
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{path / _INDEX} names {name}, which is not a file beside it")
        if not (path / name).is_file():
            raise ModelError(f"{path / _INDEX} names {name}, which is not there; download the model again")
    return [path / name for name in names]
