"""GGUF files as llama.cpp's converter writes them, from tiny Hugging Face models. Names come from the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFWriter

from batchinfer.models.checkpoint import TensorSlice
from batchinfer.models.gguf import GGUFFile

PERMUTED = {"llama", "granite", "smollm3"}
Writer = Callable[[GGUFWriter], None]


def write_model(
    path: Path, arch: str, model: Any, facts: Writer = lambda writer: None, extra: dict | None = None
) -> None:
    """`facts` writes the keys that only this architecture has, `extra` are tensors beside the model's."""
    config = model.config
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(theta(config))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    facts(writer)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    for name, values in converted(arch, model):
        writer.add_tensor(name, values)
    finish(writer)


def theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    return float(parameters.get("rope_theta", 10000.0))


def converted(arch: str, model: Any) -> list[tuple[str, np.ndarray]]:
    """convert_hf_to_gguf.py: names of its tensor map, q and k permuted, Gemma's norms plus one."""
    config = model.config
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = []
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.to(torch.float32).numpy()
        if arch in PERMUTED and "q_proj" in name:
            values = permute(values, config.num_attention_heads)
        if arch in PERMUTED and "k_proj" in name:
            values = permute(values, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        tensors.append((new, np.ascontiguousarray(values)))
    return tensors


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp."""
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def float_weights(file: GGUFFile) -> dict[str, torch.Tensor]:
    """Return every weight of a file in float32, by Hugging Face's name."""
    return {name: read_whole(file, name) for name in file.stored}


def whole_slice(file: GGUFFile, name: str) -> TensorSlice:
    shape = file.stored[name].shape
    return TensorSlice(name, shape, (range(shape[0]),), range(shape[1]) if len(shape) == 2 else None)


def read_whole(file: GGUFFile, name: str) -> torch.Tensor:
    out = torch.empty(file.stored[name].shape)
    file.read_into(whole_slice(file, name), out)
    return out
