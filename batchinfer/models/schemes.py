"""Schemes: how a checkpoint stores the weight of a linear layer, and how its tensors become one matrix.

A scheme says which tensors there are for a weight, refuses formats that it does not read, and reads a matrix that is
stacked of several weights. A quantized format is one more class and one more line in SCHEMES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from batchinfer_kernels.formats import BlockMatrix, stacked_blocks
from torch import Tensor

from batchinfer.errors import ModelError
from batchinfer.models.checkpoint import Checkpoint, StoredTensor, TensorSlice

if TYPE_CHECKING:
    from batchinfer.models.gguf import GGUFFile

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_NARROW_FLOATS = ("float8", "F8", "F6", "F4")  # meaningless without a scale


class Scheme(Protocol):
    """Storage of linear layers in one checkpoint."""

    def tensors(self, weight: TensorSlice) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that stores the weight."""

    def check(self, part: TensorSlice, stored: StoredTensor) -> None:
        """Raise ModelError for a format that is not read, or columns that cannot be cut so."""

    def read_matrix(self, weights: Sequence[TensorSlice], empty: Callable[[], Tensor]) -> Tensor | BlockMatrix:
        """Read the weights, stacked by rows, padding included. `empty` allocates the matrix on its device."""


class PlainScheme:
    """Floating-point numbers of any size, one tensor for a weight. Also reads vectors: norms and biases."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def tensors(self, weight: TensorSlice) -> dict[str, tuple[int, ...]]:
        """See Scheme."""
        return {weight.name: weight.shape}

    def check(self, part: TensorSlice, stored: StoredTensor) -> None:
        """See Scheme."""
        if stored.numbers.startswith(_NARROW_FLOATS):
            raise ModelError(
                f"{stored.file}: {part.name} holds {stored.numbers} numbers, and no quantization_config in config.json "
                "says which scale they are multiplied with; use the unquantized model, or a GGUF file"
            )
        if stored.numbers not in _FLOATS:
            raise ModelError(f"{stored.file}: {part.name} holds {stored.numbers}, not floating-point numbers")

    def read_matrix(self, weights: Sequence[TensorSlice], empty: Callable[[], Tensor]) -> Tensor | BlockMatrix:
        """See Scheme."""
        return self.read_floats(weights, empty())

    def read_floats(self, parts: Sequence[TensorSlice], out: Tensor) -> Tensor:
        """Read slices one below the other into `out`, and return it."""
        first = 0
        for part in parts:
            self._checkpoint.read_into(part, out[first : first + part.num_rows])
            first += part.num_rows + part.zeros
            out[first - part.zeros : first].zero_()
        return out


class GGUFScheme(PlainScheme):
    """Types of GGUF, de-quantised; with `keep_blocks` a matrix stays in blocks if they hold it exactly.

    That takes a type that BlockMatrix knows, the same for all weights that are stacked.
    """

    def __init__(self, file: GGUFFile, keep_blocks: bool) -> None:
        super().__init__(file)
        self._file = file
        self._keep_blocks = keep_blocks

    def check(self, part: TensorSlice, stored: StoredTensor) -> None:
        """See Scheme."""
        block = self._file.block_size(part.name)
        if part.columns is None or not (part.columns.start % block or part.columns.stop % block):
            return
        if part.columns_are_cut:  # else the file is damaged, which reading says
            whole, ranks = part.shape[1], part.shape[1] // len(part.columns)
            would_do = [count for count in range(1, whole // block + 1) if whole % (count * block) == 0]
            raise ModelError(
                f"{stored.file}: {part.name} stores blocks of {block} of its {whole} input features, which cannot be "
                f"cut over {ranks} ranks; numbers that would do: {', '.join(map(str, would_do))}"
            )

    def read_matrix(self, weights: Sequence[TensorSlice], empty: Callable[[], Tensor]) -> Tensor | BlockMatrix:
        """See Scheme."""
        whole = self._read_blocks(weights) if self._keep_blocks else None
        return super().read_matrix(weights, empty) if whole is None else whole

    def _read_blocks(self, weights: Sequence[TensorSlice]) -> BlockMatrix | None:
        if len({self._file.stored[weight.name].numbers for weight in weights}) > 1:
            return None
        blocks = [matrix for weight in weights if (matrix := self._file.read_blocks(weight)) is not None]
        return stacked_blocks(blocks) if len(blocks) == len(weights) else None


SCHEMES: dict[str | None, Callable[[Checkpoint], Scheme]] = {None: PlainScheme}
"""`quant_method` of config.json's quantization_config (None: there is none) → scheme of a directory's checkpoint."""


def quant_method(values: Mapping[str, Any], where: str) -> str | None:
    """Return the key of SCHEMES that config.json names; `where` names the file in errors.

    Raises ModelError with the format's name if it is not supported. MLX alone writes `quantization`, which has no
    method's name.
    """
    mlx = values.get("quantization")
    written = mlx or values.get("quantization_config")
    if not written:
        return None
    facts = written if isinstance(written, dict) else {}
    method = "MLX" if mlx else facts.get("quant_method")
    if isinstance(method, str) and method in SCHEMES:
        return method
    bits = f", {facts['bits']} bits" if "bits" in facts else ""
    raise ModelError(
        f"{where}: the checkpoint is quantized ({method or 'an unnamed method'}{bits}), which is not supported; use "
        "the unquantized model, or a GGUF file"
    )
