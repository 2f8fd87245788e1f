"""Configurations of known models, for rooflines and random weights: what their config.json says of shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batchinfer.errors import ModelError, suggest
from batchinfer.io.fetch import fetch_model
from batchinfer.io.filesystem import local_path
from batchinfer.models.config import ModelConfig, load_config, parse_config
from batchinfer.models.json_file import read_object
from batchinfer.spec import StorageSpec


def _config(architecture: str, sizes: tuple[int, int, int, int], heads: tuple[int, int], **more: Any) -> dict[str, Any]:
    """Return the content of a config.json.

    sizes: hidden size, layers, feed-forward size, vocabulary. heads: of queries, and of keys and values. more: further
    keys.
    """
    hidden, layers, feed_forward, vocabulary = sizes
    return {
        "architectures": [architecture],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": feed_forward,
        "vocab_size": vocabulary,
        **more,
    }


_LLAMA, _QWEN3 = "LlamaForCausalLM", "Qwen3ForCausalLM"
_TIED = {"tie_word_embeddings": True}
_LONG = {"max_position_embeddings": 131_072}
_QWEN3_LONG = {"max_position_embeddings": 40_960, "rope_theta": 1_000_000.0, "head_dim": 128}
_LLAMA3 = {"max_position_embeddings": 8192, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}

PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _config(
        _LLAMA, (576, 30, 1536, 49_152), (9, 3), **_TIED, max_position_embeddings=8192, rope_theta=100_000.0
    ),
    "qwen3-0.6b": _config(_QWEN3, (1024, 28, 3072, 151_936), (16, 8), **_TIED, **_QWEN3_LONG),
    "qwen3-4b": _config(_QWEN3, (2560, 36, 9728, 151_936), (32, 8), **_TIED, **_QWEN3_LONG),
    "qwen3-8b": _config(_QWEN3, (4096, 36, 12_288, 151_936), (32, 8), **_QWEN3_LONG),
    "qwen3-14b": _config(_QWEN3, (5120, 40, 17_408, 151_936), (40, 8), **_QWEN3_LONG),
    "qwen3-32b": _config(_QWEN3, (5120, 64, 25_600, 151_936), (64, 8), **_QWEN3_LONG),
    "llama-3.2-1b": _config(_LLAMA, (2048, 16, 8192, 128_256), (32, 8), **_TIED, **{**_LLAMA3, **_LONG}),
    "llama-3-8b": _config(_LLAMA, (4096, 32, 14_336, 128_256), (32, 8), **_LLAMA3),
    "llama-3-70b": _config(_LLAMA, (8192, 80, 28_672, 128_256), (64, 8), **_LLAMA3),
}


def preset_config(name: str) -> ModelConfig:
    """Return the configuration of an entry of PRESETS."""
    return parse_config(PRESETS[name], name)


def find_config(model: str, storage: StorageSpec) -> ModelConfig:
    """Return the configuration of a preset, a config.json file, or a model whose weights are not read.

    Raises ModelError.
    """
    if model in PRESETS:
        return preset_config(model)
    path = local_path(model)
    if path is not None and path.suffix == ".json" and path.is_file():
        return parse_config(read_object(path), model)
    if path is not None and not path.exists() and "/" not in model and Path(model).suffix != ".gguf":
        raise ModelError(f"{model}: no file, and no preset{suggest(model, PRESETS)} (presets: {', '.join(PRESETS)})")
    return load_config(fetch_model(model, storage, weights=False).path)
