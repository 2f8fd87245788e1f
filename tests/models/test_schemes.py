"""Storage of weights: number formats that are read, formats that are refused by name, and reading through a buffer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from batchinfer_kernels.eager import EagerBackend
from safetensors.torch import load_file, save_file

from batchinfer.errors import ModelError
from batchinfer.models import safetensors
from batchinfer.models.checkpoint import TensorSlice
from batchinfer.models.safetensors import SafetensorsFiles
from batchinfer.models.weights import load_decoder
from batchinfer.ops.resources import HOST
from batchinfer.ops.staging import HOST_WRITES
from tests.models.tiny import build

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def _convert(folder: Path, dtype: torch.dtype, name: str | None = None) -> None:
    """Convert one tensor of a saved model, or all."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({each: tensor.to(dtype) if name in (None, each) else tensor for each, tensor in tensors.items()}, file)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_without_a_scale_is_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    build("llama", tmp_path)
    _convert(tmp_path, dtype, Q_PROJ)
    number_format = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=rf"model\.safetensors: {Q_PROJ} holds {number_format} numbers, .* scale"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight"])
def test_integers_are_refused_by_name(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    build("llama", tmp_path)
    _convert(tmp_path, dtype, name)
    number_format = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=f"{name} holds {number_format}, not floating-point numbers"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_floating_point_format_is_converted_to_that_of_activations(dtype: torch.dtype, tmp_path: Path) -> None:
    build("llama", tmp_path)
    _convert(tmp_path, dtype)
    decoder = load_decoder(tmp_path, backend=EagerBackend(HOST))
    stored = load_file(tmp_path / "model.safetensors")
    matrix = decoder.layers[0].attention.out.matrix.values_OI
    assert torch.equal(matrix, stored["model.layers.0.self_attn.o_proj.weight"].float())
    assert torch.equal(decoder.norm.weight, stored["model.norm.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("buffer_bytes", [1, 100, 1000])
def test_slices_are_read_through_a_buffer_of_any_size(
    buffer_bytes: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "_BUFFER_BYTES", buffer_bytes)
    tensor = torch.randn(23, 17).to(dtype)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path, HOST_WRITES)
    for columns in (range(17), range(3, 4), range(9, 17)):
        for rows in ((range(23),), (range(2, 5), range(20, 23)), (range(4, 4),)):
            expected = torch.cat([tensor[part.start : part.stop, columns.start : columns.stop] for part in rows])
            for out_dtype in (torch.float32, torch.bfloat16):
                out = torch.full(expected.shape, torch.nan, dtype=out_dtype)
                files.read_into(TensorSlice("x", (23, 17), rows, columns), out)
                assert torch.equal(out, expected.to(out_dtype))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path, HOST_WRITES)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(ModelError, match=r"model\.safetensors ends inside x"):
        files.read_into(TensorSlice("x", (4, 4), (range(4),), range(4)), torch.empty(4, 4))
