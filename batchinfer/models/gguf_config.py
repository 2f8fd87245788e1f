"""Translation of llama.cpp's metadata keys and tensor names to Hugging Face's, per architecture.

Source: llama.cpp's convert_hf_to_gguf.py read backwards; facts that it does not store are the constants that
llama.cpp's own model code has for them (Gemma's window pattern and local rope base, SmolLM3's layers without rope).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchinfer.errors import ModelError
from batchinfer.models.gguf_header import GGUFHeader

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}

_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

Factors = Mapping[str, np.ndarray]
Extra = Callable[[GGUFHeader, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class GGUFFamily:
    """Value of general.architecture. `extra` adds the keys that only this architecture has."""

    architecture: str
    model_type: str
    permuted: bool = False  # rows of q and k are permuted
    norm_plus_one: bool = False  # norm weights are stored as 1 + w
    names: Mapping[str, str] = field(default_factory=dict)
    extra: Extra = lambda header, config: {}


def _value(header: GGUFHeader, name: str, default: Any = None) -> Any:
    return header.metadata.get(f"{header.metadata['general.architecture']}.{name}", default)


def _llama(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in header.tensors, "mlp_bias": "blk.0.ffn_up.bias" in header.tensors}


def _qwen3(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in header.tensors}


def _smollm3(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    # every fourth layer goes without rope
    layers = [int((index + 1) % 4 != 0) for index in range(config["num_hidden_layers"])]
    return {**_llama(header, config), "no_rope_layers": layers, "use_sliding_window": False}


def _granite(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_llama(header, config),
        "attention_multiplier": _value(header, "attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": _value(header, "embedding_scale", 1.0),
        "residual_multiplier": _value(header, "residual_scale", 1.0),
        "logits_scaling": _value(header, "logit_scale", 1.0),
    }


def _phi3(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    rotary = _value(header, "rope.dimension_count", config["head_dim"])
    original = _value(header, "rope.scaling.original_context_length", config["max_position_embeddings"])
    return {
        "partial_rotary_factor": rotary / config["head_dim"],
        "original_max_position_embeddings": original,
        "sliding_window": _value(header, "attention.sliding_window") or None,
    }


def _olmo2(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    if _value(header, "attention.sliding_window"):
        raise ModelError(f"{header.path}: OLMo 3 (olmo2 with a sliding window) is not supported")
    return {}


def _gemma(header: GGUFHeader, config: dict[str, Any], pattern: int, largest: int) -> dict[str, Any]:
    """Return Gemma's extra keys: full attention in every `pattern`-th layer; `largest` layers scale by hidden/heads."""
    layers = config["num_hidden_layers"]
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == largest else config["head_dim"]
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": _value(header, "attention.sliding_window", 4096),
        "attn_logit_softcapping": _value(header, "attn_logit_softcapping"),
        "final_logit_softcapping": _value(header, "final_logit_softcapping"),
        "layer_types": ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)],
    }


def _gemma2(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    return _gemma(header, config, pattern=2, largest=46)


def _gemma3(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    pattern = _value(header, "attention.sliding_window_pattern", 6)
    local = {"rope_local_base_freq": _value(header, "rope.freq_base_swa", 10000.0)}
    return {**_gemma(header, config, pattern=pattern if isinstance(pattern, int) else 6, largest=62), **local}


FAMILIES: dict[str, GGUFFamily] = {
    "llama": GGUFFamily("LlamaForCausalLM", "llama", permuted=True, extra=_llama),
    "qwen2": GGUFFamily("Qwen2ForCausalLM", "qwen2"),
    "qwen3": GGUFFamily("Qwen3ForCausalLM", "qwen3", extra=_qwen3),
    "gemma2": GGUFFamily("Gemma2ForCausalLM", "gemma2", norm_plus_one=True, names=_SANDWICH, extra=_gemma2),
    "gemma3": GGUFFamily("Gemma3ForCausalLM", "gemma3_text", norm_plus_one=True, names=_SANDWICH, extra=_gemma3),
    "phi3": GGUFFamily("Phi3ForCausalLM", "phi3", names=_PHI3, extra=_phi3),
    "granite": GGUFFamily("GraniteForCausalLM", "granite", permuted=True, extra=_granite),
    "olmo2": GGUFFamily("Olmo2ForCausalLM", "olmo2", names=_SANDWICH, extra=_olmo2),
    "smollm3": GGUFFamily("SmolLM3ForCausalLM", "smollm3", permuted=True, extra=_smollm3),
}


def family(header: GGUFHeader) -> GGUFFamily:
    """Raise ModelError, with the list of known ones, for an architecture that is not in the table."""
    name = header.need("general.architecture")
    if name not in FAMILIES:
        raise ModelError(f"{header.path}: GGUF architecture {name!r} is not supported; known: {', '.join(FAMILIES)}")
    if _value(header, "expert_count"):
        raise ModelError(f"{header.path}: mixtures of experts are not supported")
    return FAMILIES[name]


def is_rope_factors(name: str) -> bool:
    """Return the names of tensors that are configuration, not weights."""
    return name in _ROPE_FACTORS


def hf_name(header: GGUFHeader, name: str) -> str:
    """Map `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`. Raises ModelError if unknown."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP and kind in ("weight", "bias"):
        return f"{_TOP[stem]}.{kind}"
    match = _NAME.fullmatch(name)
    known = {**_BLOCK, **family(header).names}
    if match is None or match[2] not in known:
        raise ModelError(
            f"{header.path}: tensor {name!r} has no place in {family(header).architecture}; "
            "the file is of a model that this architecture does not cover"
        )
    return f"model.layers.{match[1]}.{known[match[2]]}.{match[3]}"


def head_counts(header: GGUFHeader) -> tuple[int, int]:
    """Return (query heads, key-value heads)."""
    heads = _one(header, "attention.head_count")
    kv_heads = _value(header, "attention.head_count_kv", heads)
    return heads, _one(header, "attention.head_count_kv") if kv_heads != heads else heads


def config_dict(header: GGUFHeader, factors: Factors) -> dict[str, Any]:
    """Return the keys of config.json. `factors`: the file's rope factor tensors, dequantised."""
    facts = family(header)
    heads, kv_heads = head_counts(header)
    hidden = _one(header, "embedding_length")
    if "token_embd.weight" not in header.tensors:
        raise ModelError(f"{header.path}: has no tensor 'token_embd.weight'; it is not a whole model")
    config = {
        "architectures": [facts.architecture],
        "model_type": facts.model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": _one(header, "feed_forward_length"),
        "num_hidden_layers": _one(header, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": _value(header, "attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": _one(header, "context_length"),
        "rms_norm_eps": header.need(f"{header.metadata['general.architecture']}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _value(header, "rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header, factors),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {**config, **facts.extra(header, config)}


def _one(header: GGUFHeader, name: str) -> int:
    """Return an integer fact; a list with one entry per layer is accepted if all are equal."""
    value = header.need(f"{header.metadata['general.architecture']}.{name}")
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1 or not isinstance(one := values.pop(), int) or one < 1:
        raise ModelError(f"{header.path}: {name} is {value!r}; one positive number for all layers is supported")
    return one


def _rope_scaling(header: GGUFHeader, factors: Factors) -> dict[str, Any] | None:
    if "rope_factors_long.weight" in factors:
        scaling = {
            "rope_type": "longrope",
            "long_factor": factors["rope_factors_long.weight"].tolist(),
            "short_factor": factors["rope_factors_short.weight"].tolist(),
        }
        attention = _value(header, "rope.scaling.attn_factor")
        return scaling if attention is None else {**scaling, "attention_factor": attention}
    if "rope_freqs.weight" in factors:
        return _llama3_scaling(header, factors["rope_freqs.weight"])
    kind = _value(header, "rope.scaling.type", "none")
    factor = _value(header, "rope.scaling.factor") or _value(header, "rope.scale_linear") or 1.0
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        length = _value(header, "rope.scaling.original_context_length", _one(header, "context_length") / factor)
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(length)}
    raise ModelError(f"{header.path}: rope scaling {kind!r} is not supported; known: linear, yarn, longrope, llama3")


def _llama3_scaling(header: GGUFHeader, divisors: np.ndarray) -> dict[str, Any]:
    """Recover Llama 3's four rope parameters from the divisors that the converter made of them.

    Between the two wavelengths, 1/divisor = (1 - s)/factor + s with s = (original/wavelength - low)/(high - low):
    linear in 1/wavelength. Scaling (original, low, high) together changes nothing, so low = 1 is free to choose.
    """
    dims = 2 * len(divisors)
    theta = _value(header, "rope.freq_base", 10000.0)
    frequency = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims) / (2 * math.pi)
    factor = float(divisors.max())
    if factor == 1.0:
        return {"rope_type": "default"}
    smooth = (1.0 / divisors.astype(np.float64) - 1.0 / factor) / (1.0 - 1.0 / factor)
    inside = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    low, high, original = 1.0, 4.0, 8192.0
    if inside.sum() >= 2:
        slope, offset = np.polyfit(frequency[inside], smooth[inside], 1)
        high = _whole(1.0 - 1.0 / float(offset), within=0.01)
        original = _whole(float(slope) * (high - low), within=1.0)
    elif inside.sum() == 1:  # not enough for both: every published model has high = 4
        original = _whole(float((low + (high - low) * smooth[inside][0]) / frequency[inside][0]), within=1.0)
    expected = np.clip((original * frequency - low) / (high - low), 0.0, 1.0)
    if np.abs(expected - smooth).max() > 1e-3:
        raise ModelError(f"{header.path}: tensor 'rope_freqs.weight' is not a Llama 3 rope scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": round(original),
    }


def _whole(value: float, within: float) -> float:
    """Round to the whole number that was published, if the fitted one is close to it."""
    return float(round(value)) if abs(value - round(value)) < within else value
