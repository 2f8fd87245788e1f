"""Header of a GGUF file: metadata and the table of tensors. Imports neither numpy nor torch.

Follows https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The `gguf` package
reads the same, but takes 4 s for a vocabulary of 49,152 tokens; this takes 0.1 s.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from weakref import WeakValueDictionary

from batchinfer.errors import ModelError
from batchinfer.models.file_kind import said

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


class TensorInfo(NamedTuple):
    """Entry of the tensor table: `shape` row-major as in torch, `offset` in bytes from `data_start`."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensor table of a GGUF file; `data_start` is the byte offset of the tensor data."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_start: int

    def need(self, key: str) -> Any:
        """Return the metadata value of `key`. Raises ModelError if it is missing."""
        if key not in self.metadata:
            raise ModelError(f"{self.path}: the GGUF metadata has no {key!r}; convert the model again")
        return self.metadata[key]


# path and state of a file → its header, as long as somebody has it: a vocabulary is megabytes
_read: WeakValueDictionary[tuple[str, int, int, int], GGUFHeader] = WeakValueDictionary()
_turn = threading.Lock()  # of whoever parses: the next one finds it parsed


def read_header(path: Path) -> GGUFHeader:
    """Return the header of a file, parsed once while anybody holds it; do not change it.

    Raises ModelError for a file that is missing, not GGUF, truncated or damaged.
    """
    try:
        with _turn, path.open("rb") as file:
            state = os.fstat(file.fileno())
            key = (str(path), state.st_ino, state.st_size, state.st_mtime_ns)
            header = _read[key] = _read.get(key) or _mapped(path, file)
            return header
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # mmap of an empty file, and every damage that _Reader finds
        raise ModelError(f"{path} {said(path, f'is not a usable GGUF file: {error}')}") from None


def _mapped(path: Path, file: BinaryIO) -> GGUFHeader:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(path, data)


@contextmanager
def shared_header(path: Path | None) -> Iterator[None]:
    """Keep the header of a GGUF file parsed within the context. None and directories have no header."""
    header = read_header(path) if path is not None and path.is_file() else None
    try:
        yield
    finally:
        del header


def _parse(path: Path, data: mmap.mmap) -> GGUFHeader:
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with the bytes GGUF")
    reader = _HeaderReader(data, 4)
    version = reader.scalar("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = "it is big-endian" if swapped in (2, 3) else f"GGUF version {version} is not supported"
        raise ValueError(f"{why}; convert the model again")
    num_tensors, num_values = reader.scalar("Q"), reader.scalar("Q")
    metadata = {}
    for _ in range(num_values):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("I"))
    tensors = {}
    for _ in range(num_tensors):
        info = reader.tensor()
        tensors[info.name] = info
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ValueError(f"it is one of {parts} split files; join them with `llama-gguf-split --merge` first")
    return GGUFHeader(path, metadata, tensors, -(-reader.position // alignment) * alignment)


class _HeaderReader:
    """Cursor over the file. Raises ValueError at a read past the end."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self._size = len(data)
        self.position = position

    def scalar(self, code: str) -> Any:
        value = self._unpack(f"<{code}")[0]
        return _shortest(value) if code == "f" else value

    def string(self) -> str:
        return self._strings(1)[0]

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"metadata value of unknown type {kind} at byte {self.position}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            self._check(count * struct.calcsize(_SCALARS[item]))
            return list(self._unpack(f"<{count}{_SCALARS[item]}"))
        if item == _STRING:
            return self._strings(count)
        raise ValueError(f"metadata array of unknown type {item} at byte {self.position}")

    def tensor(self) -> TensorInfo:
        name = self.string()
        num_dims = self.scalar("I")
        if num_dims > _MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
        # the file has the fastest-moving dimension first
        shape = tuple(reversed(self._unpack(f"<{num_dims}Q")))
        ggml_type, offset = self._unpack("<IQ")
        return TensorInfo(name, shape, ggml_type, offset)

    def _strings(self, count: int) -> list[str]:
        """Read strings in one loop without calls: a vocabulary has 150,000 of them."""
        self._check(count * 8)
        data, position, size = self._data, self.position, self._size
        strings = []
        for _ in range(count):
            start = position + 8
            position = start + int.from_bytes(data[position:start], "little")
            if position > size:
                raise ValueError(f"it ends inside a string at byte {start} of {size}; it is truncated")
            strings.append(data[start:position].decode("utf-8", "replace"))
        self.position = position
        return strings

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        length = struct.calcsize(layout)
        self._check(length)
        values = struct.unpack_from(layout, self._data, self.position)
        self.position += length
        return values

    def _check(self, length: int) -> None:
        if self.position + length > self._size:
            raise ValueError(f"it ends at byte {self._size}, inside its header; it is truncated")


def _shortest(value: float) -> float:
    """Return the shortest decimal that is this float32: 1e-05 was written, not 9.999999747378752e-06."""
    if not abs(value) < 1e38:  # infinite, not a number, or where a rounded decimal could overflow
        return value
    packed = struct.pack("<f", value)
    decimals = (float(f"{value:.{digits}g}") for digits in range(6, 9))
    return next((decimal for decimal in decimals if struct.pack("<f", decimal) == packed), value)
