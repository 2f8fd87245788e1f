"""Checkpoint protocol: tensors by Hugging Face's names, and reading of the part of one that a rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor


class StoredTensor(NamedTuple):
    """Tensor of a checkpoint, from the file's header alone. `numbers` is their format: a dtype or a GGUF type."""

    file: Path
    shape: tuple[int, ...]
    numbers: str


class TensorSlice(NamedTuple):
    """Part of a stored tensor: ranges of rows, one after the other, and of each row a range of columns.

    `shape` is that of the whole tensor, as the model's configuration has it. Vectors have no columns. `zeros` rows are
    appended: padding of the vocabulary on the last ranks.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[range, ...]
    columns: range | None
    zeros: int = 0

    @property
    def num_rows(self) -> int:
        """Return the rows that are read, without the zeros."""
        return sum(map(len, self.rows))

    @property
    def columns_are_cut(self) -> bool:
        """Return True if some columns are left out."""
        return self.columns is not None and len(self.columns) != self.shape[1]


class Checkpoint(Protocol):
    """Weights on disk. State: headers. Only the bytes of a slice are read, and held no longer than it takes to copy."""

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Return every tensor that could belong to a model: name → file, shape and format."""

    def read_into(self, part: TensorSlice, out: Tensor) -> None:
        """Copy a slice into `out`, contiguous, of the slice's shape: any floating-point dtype, any device.

        Raises ModelError if the file ends early.
        """
