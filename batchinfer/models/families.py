"""Table of dense families: facts of config.json and of the weights in which a family differs from Llama.

Everything that is the same for all (names of sizes, of projections, of activations) is in models.config and
models.places. A new family is a new entry in FAMILIES; it needs code only if it has a fact that no family had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from batchinfer.errors import ModelError

HFConfig = Mapping[str, Any]
"""Values of config.json with the family's defaults filled in."""

# Norms of a layer: ours → Hugging Face's. Which of them a family has is where it places its norms.
_BEFORE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_AFTER = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_AROUND = {**_AFTER, "attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}

_SEPARATE = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
_STACKED = {"attention.qkv": ("self_attn.qkv_proj",), "mlp.gate_up": ("mlp.gate_up_proj",)}


def _nowhere(config: HFConfig) -> list[bool]:
    return [False] * config["num_hidden_layers"]


def _everywhere(config: HFConfig) -> list[bool]:
    return [True] * config["num_hidden_layers"]


def _by_type(config: HFConfig, otherwise: Callable[[int], bool]) -> list[bool]:
    """Return `layer_types` if the file has it; older files leave it to a rule of the family."""
    if config.get("layer_types") is not None:
        return [kind == "sliding_attention" for kind in config["layer_types"]]
    return [otherwise(layer) for layer in range(config["num_hidden_layers"])]


def _qwen_windows(config: HFConfig) -> list[bool]:
    if not config.get("use_sliding_window"):
        return _nowhere(config)
    return _by_type(config, lambda layer: layer >= config["max_window_layers"])


def _gemma2_windows(config: HFConfig) -> list[bool]:
    return _by_type(config, lambda layer: layer % 2 == 0)


def _gemma3_windows(config: HFConfig) -> list[bool]:
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return _by_type(config, lambda layer: (layer + 1) % pattern != 0)


def _smollm3_windows(config: HFConfig) -> list[bool]:
    if not config.get("use_sliding_window"):
        return _nowhere(config)
    rope = _smollm3_rope(config)
    return _by_type(config, lambda layer: not rope[layer])


def _smollm3_rope(config: HFConfig) -> list[bool]:
    """Return the layers with a rotary embedding; `no_rope_layers` holds 1 for a layer that has one."""
    if config.get("no_rope_layers") is not None:
        return [bool(uses) for uses in config["no_rope_layers"]]
    interval = config.get("no_rope_layer_interval") or 4
    return [(layer + 1) % interval != 0 for layer in range(config["num_hidden_layers"])]


@dataclass(frozen=True)
class Family:
    """Entry of the table. `defaults`: config.json keys that a file may leave out, with Hugging Face's values."""

    norms: Mapping[str, str] = field(default_factory=lambda: _BEFORE)
    norm_offset: float = 0.0
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _SEPARATE)
    qk_norm: Literal["head", "projection"] | None = None
    qkv_bias: bool = False  # always; attention_bias in config.json gives all four projections one
    windows: Callable[[HFConfig], list[bool]] = _nowhere
    rope_layers: Callable[[HFConfig], list[bool]] = _everywhere
    scale_embedding: bool = False  # by the square root of the hidden size
    prefixes: tuple[str, ...] = ("model.",)  # of the text model's weights; the first that a file has
    ignored: tuple[str, ...] = ()  # prefixes of weights that the text model does not have
    text_config: bool = False  # the facts are in config.json's text_config
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
}
_GEMMA3 = Family(
    norms=_AROUND,
    norm_offset=1.0,
    qk_norm="head",
    windows=_gemma3_windows,
    scale_embedding=True,
    defaults=_GEMMA3_DEFAULTS,
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}),
    "SmolLM3ForCausalLM": Family(
        windows=_smollm3_windows,
        rope_layers=_smollm3_rope,
        defaults={"rope_theta": 2_000_000.0, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "MistralForCausalLM": Family(windows=_everywhere, defaults={"num_key_value_heads": 8}),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows=_qwen_windows, defaults={"max_window_layers": 28}),
    "Qwen3ForCausalLM": Family(
        qk_norm="head", windows=_qwen_windows, defaults={"max_window_layers": 28, "head_dim": 128}
    ),
    "Gemma2ForCausalLM": Family(
        norms=_AROUND,
        norm_offset=1.0,
        windows=_gemma2_windows,
        scale_embedding=True,
        defaults={
            "head_dim": 256,
            "num_key_value_heads": 4,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": Family(
        norms=_AROUND,
        norm_offset=1.0,
        qk_norm="head",
        windows=_gemma3_windows,
        scale_embedding=True,
        prefixes=("model.language_model.", "language_model.model."),
        ignored=(
            "model.vision_tower.",
            "model.multi_modal_projector.",
            "vision_tower.",
            "multi_modal_projector.",
        ),
        text_config=True,
        defaults=_GEMMA3_DEFAULTS,
    ),
    "Phi3ForCausalLM": Family(
        stacks=_STACKED, windows=_everywhere, defaults={"original_max_position_embeddings": 4096}
    ),
    "Olmo2ForCausalLM": Family(norms=_AFTER, qk_norm="projection"),
    "GraniteForCausalLM": Family(defaults={"attention_multiplier": 1.0}),
}


# model_type of config.json → the architecture that it is generated with; directories often lack `architectures`
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
}


def architecture_of(values: HFConfig, where: str) -> str:
    """Return the architecture that config.json names: by `architectures`, else by `model_type`.

    A base class such as LlamaModel counts as no name. `where` names the file in errors. Raises ModelError where neither
    key names one that is supported.
    """
    named = values.get("architectures") or []
    if not isinstance(named, list):
        raise ModelError(f"{where}: 'architectures' must be a list of names, got {named!r}")
    found = next((str(name) for name in named if isinstance(name, str) and name in FAMILIES), None)
    bare = all(str(name).endswith("Model") for name in named)
    if found is None and bare:
        found = MODEL_TYPES.get(str(values.get("model_type")))
    if found is not None:
        return found
    if not named:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ModelError(
            f"{where}: names no architecture, and model_type {values.get('model_type')!r} is not supported; "
            f"supported are {known}"
        )
    raise ModelError(f"{where}: {_unsupported(str(named[0]))}")


def _unsupported(architecture: str) -> str:
    return f"architecture {architecture!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"


def family_of(architecture: str) -> Family:
    """Raise ModelError with the list of known architectures."""
    family = FAMILIES.get(architecture)
    if family is None:
        raise ModelError(_unsupported(architecture))
    return family
