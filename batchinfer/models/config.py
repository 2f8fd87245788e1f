"""Architecture of a model: facts from a Hugging Face config.json, or from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from batchinfer.errors import ModelError, format_value
from batchinfer.layers.attention import AttentionConfig
from batchinfer.layers.mlp import ACTIVATIONS, MLPConfig
from batchinfer.layers.rotary import SCALINGS, RopeConfig
from batchinfer.models.families import Family, HFConfig, architecture_of, family_of
from batchinfer.models.json_file import read_object
from batchinfer.models.schemes import quant_method

_TOO_LARGE = 1e30  # for every number of a configuration; infinity and NaN are no smaller
_MOST_LAYERS = 10_000


class LayerConfig(NamedTuple):
    """Facts that differ between layers: attention window in tokens, and index of the rotary embedding, if any."""

    window: int | None
    rope: int | None


class Multipliers(NamedTuple):
    """Scale factors of Granite and Gemma: embedding and branches are multiplied, logits divided, then soft-capped."""

    embedding: float = 1.0
    residual: float = 1.0
    logits_divisor: float = 1.0
    logits_soft_cap: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """All facts that decide the computation. `context_tokens`: length of the longest sequence it is run on."""

    architecture: str
    family: Family
    vocab_size: int
    hidden_size: int
    context_tokens: int
    tied: bool
    norm_eps: float
    attention: AttentionConfig
    mlp: MLPConfig
    layers: tuple[LayerConfig, ...]
    ropes: tuple[RopeConfig, ...]
    multipliers: Multipliers
    quant_method: str | None = None  # a key of schemes.SCHEMES

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Return (layers, kv heads, head size), the shape of one token's keys and of its values."""
        return len(self.layers), self.attention.num_kv_heads, self.attention.head_size


def load_config(path: Path) -> ModelConfig:
    """Read the config of a directory with config.json, or of a .gguf file. Raises ModelError."""
    if path.suffix == ".gguf":
        from batchinfer.models.gguf import GGUFFile  # a configuration alone needs no package of formats

        return parse_config(GGUFFile(path).config_dict(), str(path))
    file = path / "config.json"
    if not file.exists():
        raise ModelError(f"{path} holds no config.json: not a Hugging Face model directory")
    return parse_config(read_object(file), str(file))


def stored_dtype(path: Path) -> str | None:
    """Return the dtype that a directory's config.json names; None if it names none, and for a .gguf file."""
    if path.suffix == ".gguf":
        return None
    values = read_object(path / "config.json")
    text = values.get("text_config")
    for facts in (text if isinstance(text, dict) else {}, values):
        dtype = facts.get("dtype") or facts.get("torch_dtype")
        if dtype is not None:
            return str(dtype).removeprefix("torch.")
    return None


def parse_config(values: HFConfig, where: str) -> ModelConfig:
    """Parse the content of a config.json; `where` names it in errors. Raises ModelError."""
    architecture = architecture_of(values, where)
    family = family_of(architecture)
    method = quant_method(values, where)
    text = values["text_config"] if family.text_config and isinstance(values.get("text_config"), dict) else values
    facts = _Facts({**family.defaults, **text}, where)
    ropes, rope_of = _ropes(facts, family)
    return ModelConfig(
        architecture=architecture,
        family=family,
        vocab_size=facts.size("vocab_size"),
        hidden_size=facts.size("hidden_size"),
        context_tokens=_context_tokens(facts, ropes),
        tied=bool(facts.values.get("tie_word_embeddings", False)),
        norm_eps=facts.number("rms_norm_eps", 1e-6),
        attention=_attention(facts, family),
        mlp=_mlp(facts),
        layers=_layers(facts, family, rope_of),
        ropes=ropes,
        multipliers=_multipliers(facts, family),
        quant_method=method,
    )


class _Facts:
    """Typed access to the values of a config.json. null counts as left out."""

    def __init__(self, values: HFConfig, where: str) -> None:
        self.values = {key: value for key, value in values.items() if value is not None}
        self.where = where

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _TOO_LARGE:
            raise self.wrong(key, "a number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, "a positive number")
        return value

    def size(self, key: str, default: int | None = None, most: int = 1 << 31) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.wrong(key, f"a positive integer of at most {most}")
        return value

    def optional(self, key: str) -> float | None:
        return self.number(key) if key in self.values else None

    def wrong(self, key: str, wanted: str) -> ModelError:
        got = f"got {format_value(self.values[key])}" if key in self.values else "it is missing"
        return ModelError(f"{self.where}: {key!r} must be {wanted}; {got}")


def _head_size(facts: _Facts) -> int:
    if "head_dim" in facts.values:
        return facts.size("head_dim")
    return facts.size("hidden_size") // facts.size("num_attention_heads")


def _attention(facts: _Facts, family: Family) -> AttentionConfig:
    num_heads = facts.size("num_attention_heads")
    num_kv_heads = facts.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise facts.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    if facts.values.get("use_bidirectional_attention"):
        raise ModelError(f"{facts.where}: a model with bidirectional attention generates no text")
    scale = float(_head_size(facts) ** -0.5)
    if "query_pre_attn_scalar" in facts.values:
        scale = facts.positive("query_pre_attn_scalar") ** -0.5
    bias = bool(facts.values.get("attention_bias"))
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=_head_size(facts),
        scale=facts.number("attention_multiplier", scale),
        soft_cap=facts.optional("attn_logit_softcapping"),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias or bias,
        out_bias=bias,
    )


def _mlp(facts: _Facts) -> MLPConfig:
    activation = facts.values.get("hidden_activation") or facts.values.get("hidden_act") or "silu"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ModelError(f"{facts.where}: activation {activation!r} is not supported; supported are {known}")
    return MLPConfig(facts.size("intermediate_size"), activation, bool(facts.values.get("mlp_bias")))


def _multipliers(facts: _Facts, family: Family) -> Multipliers:
    return Multipliers(
        embedding=facts.size("hidden_size") ** 0.5
        if family.scale_embedding
        else facts.number("embedding_multiplier", 1.0),
        residual=facts.number("residual_multiplier", 1.0),
        logits_divisor=facts.number("logits_scaling", 1.0),
        logits_soft_cap=facts.optional("final_logit_softcapping"),
    )


def _layers(facts: _Facts, family: Family, rope_of: Mapping[bool, int]) -> tuple[LayerConfig, ...]:
    count = facts.size("num_hidden_layers", most=_MOST_LAYERS)
    try:
        windowed, turned = family.windows(facts.values), family.rope_layers(facts.values)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{facts.where}: cannot tell which layers have a window: {error!r}") from None
    if len(windowed) < count or len(turned) < count:
        raise ModelError(f"{facts.where}: layer_types or no_rope_layers name fewer than {count} layers")
    window = facts.size("sliding_window") if "sliding_window" in facts.values else None
    return tuple(
        LayerConfig(window if windowed[layer] else None, rope_of[windowed[layer]] if turned[layer] else None)
        for layer in range(count)
    )


def _ropes(facts: _Facts, family: Family) -> tuple[tuple[RopeConfig, ...], dict[bool, int]]:
    """Return the rotary embeddings of the model, and the index that layers with (True) and without a window use.

    transformers 5 writes `rope_parameters`, one dict or one per layer type; before, `rope_scaling` stood beside
    `rope_theta`, and Gemma 3's windowed layers had `rope_local_base_freq` without scaling.
    """
    written = facts.values.get("rope_parameters") or facts.values.get("rope_scaling") or {}
    if not isinstance(written, dict):
        raise facts.wrong("rope_parameters" if "rope_parameters" in facts.values else "rope_scaling", "an object")
    theta = facts.number("rope_theta", 10_000.0)
    local_theta = facts.optional("rope_local_base_freq")
    if "full_attention" in written or "sliding_attention" in written:
        full = _rope(facts, written.get("full_attention") or {}, theta)
        windowed = _rope(facts, written.get("sliding_attention") or {}, local_theta or theta)
    elif local_theta is not None:
        full, windowed = _rope(facts, written, theta), _rope(facts, {}, local_theta)
    else:
        full = windowed = _rope(facts, written, theta)
    return ((full,), {False: 0, True: 0}) if full == windowed else ((full, windowed), {False: 0, True: 1})


def _rope(facts: _Facts, written: Mapping[str, Any], theta: float) -> RopeConfig:
    if not isinstance(written, dict):
        raise ModelError(f"{facts.where}: a rope must be an object, got {format_value(written)}")
    rope = _Facts(written, f"{facts.where}: rope")
    values = rope.values
    kind = values.get("rope_type") or values.get("type") or "default"
    # Phi-3's first files said "su", and "yarn" for what became longrope
    if kind == "su" or (kind == "yarn" and "short_factor" in values):
        kind = "longrope"
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ModelError(f"{facts.where}: rope type {kind!r} is not supported; supported are {', '.join(SCALINGS)}")
    context = facts.size("max_position_embeddings", 2048)
    original = facts.values.get("original_max_position_embeddings")
    values["original_max_position_embeddings"] = original or values.get("original_max_position_embeddings") or context
    rope.positive("original_max_position_embeddings")
    if kind in ("yarn", "longrope"):
        values.setdefault("factor", context / values["original_max_position_embeddings"])
    missing = [key for key in SCALINGS[kind].needs if key not in values]
    if missing:
        raise ModelError(f"{facts.where}: rope type {kind!r} needs {', '.join(missing)}")
    size = _rope_size(facts, rope)
    used = {key: value for key, value in values.items() if SCALINGS[kind].needs and key not in _NOT_SCALING}
    _check_scaling(rope, used, size)
    return RopeConfig(size, rope.positive("rope_theta", theta), kind, used)


_NOT_SCALING = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_PER_PAIR = frozenset({"short_factor", "long_factor"})
_POSITIVE = frozenset({"factor", "low_freq_factor", "high_freq_factor"})
_NUMBERS = _POSITIVE | {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"}


def _rope_size(facts: _Facts, rope: _Facts) -> int:
    """Return how many numbers of a head are rotated."""
    part = rope.number("partial_rotary_factor", facts.number("partial_rotary_factor", 1.0))
    size = int(_head_size(facts) * part)
    if size % 2 or size < 2:
        raise ModelError(f"{facts.where}: rope turns pairs of numbers, but {size} numbers of a head were asked for")
    return size


def _check_scaling(rope: _Facts, used: Mapping[str, Any], size: int) -> None:
    """Raise ModelError for values that no computation is possible with."""
    for key in used.keys() & _NUMBERS:
        rope.positive(key) if key in _POSITIVE else rope.number(key)
    for key in used.keys() & _PER_PAIR:
        value = used[key]
        numbers = isinstance(value, list) and all(type(one) in (int, float) and 0 < one < _TOO_LARGE for one in value)
        if not numbers:
            raise rope.wrong(key, "a list of positive numbers")
        if len(value) != size // 2:
            raise ModelError(f"{rope.where}'s {key} must hold {size // 2} numbers, it has {len(value)}")


def _context_tokens(facts: _Facts, ropes: tuple[RopeConfig, ...]) -> int:
    """Return max_position_embeddings, or YaRN's reach if longer: files often add YaRN without raising the limit."""
    context = facts.size("max_position_embeddings", 2048)
    for rope in ropes:
        if rope.kind == "yarn":
            reach = rope.scaling["factor"] * rope.scaling["original_max_position_embeddings"]
            context = max(context, int(reach))
    return context
