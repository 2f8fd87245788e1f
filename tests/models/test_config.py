"""config.json in its old and new forms, with keys left out, and with values that cannot be."""

from __future__ import annotations

import contextlib
import json

import pytest

from batchinfer.errors import ModelError
from batchinfer.models.config import LayerConfig, load_config, parse_config, stored_dtype
from batchinfer.models.families import FAMILIES, MODEL_TYPES, architecture_of
from tests.models.tiny import LLAMA3, LONGROPE, YARN

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def _parse(**changes):
    return parse_config({**LLAMA, **changes}, "config.json")


def _old(rope, kind="rope_type"):
    """Return the form used before transformers 5."""
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": {kind: rope["rope_type"], **scaling}}


@pytest.mark.parametrize("rope", [LLAMA3, YARN, {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_in_old_and_new_form_is_the_same(rope, kind):
    new, old = _parse(rope_parameters=rope), _parse(**_old(rope, kind))
    assert new == old
    assert new.ropes[0].kind == rope["rope_type"]
    assert new.ropes[0].theta == rope["rope_theta"]


def test_keys_that_old_files_leave_out_have_their_defaults():
    config = _parse(rope_scaling=None, num_key_value_heads=None, head_dim=None)
    assert config.attention.num_kv_heads == 4
    assert config.attention.head_size == 8
    assert config.ropes[0].theta == 10_000.0
    assert config.layers == (LayerConfig(None, 0),) * 4
    assert not config.tied


def test_yarn_reaches_beyond_max_position_embeddings():
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert _parse(rope_scaling=rope).context_tokens == 512
    assert _parse(rope_scaling={**rope, "original_max_position_embeddings": 16}).context_tokens == 128


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_all_names_of_phi3s_longrope(kind):
    factors = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
    phi3 = {
        "architectures": ["Phi3ForCausalLM"],
        "rope_scaling": {"type": kind, **factors},
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
    }
    (rope,) = _parse(**phi3).ropes
    assert (rope.kind, rope.size, rope.scaling["factor"]) == ("longrope", 6, 4.0)


def test_gemma3_before_transformers_5_and_its_text_config():
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 7,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    values = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    config = parse_config(values, "config.json")
    assert (config.vocab_size, config.attention.num_heads, config.attention.head_size) == (262_208, 8, 256)
    assert config.tied
    assert [(rope.kind, rope.theta) for rope in config.ropes] == [("linear", 1e6), ("default", 1e4)]
    assert [layer.window for layer in config.layers] == [1024] * 5 + [None, 1024]
    assert [layer.rope for layer in config.layers] == [1] * 5 + [0, 1]


def test_smollm3_layers_without_position_embedding():
    config = _parse(architectures=["SmolLM3ForCausalLM"])
    assert [layer.rope for layer in config.layers] == [0, 0, 0, None]
    config = _parse(architectures=["SmolLM3ForCausalLM"], no_rope_layers=[0, 1, 1, 0])
    assert [layer.rope for layer in config.layers] == [None, 0, 0, None]


def test_gemma2_alternates_without_layer_types():
    config = _parse(architectures=["Gemma2ForCausalLM"])
    assert [layer.window for layer in config.layers] == [4096, None, 4096, None]


def test_qwen_has_no_window_unless_it_is_switched_on():
    assert all(layer.window is None for layer in _parse(architectures=["Qwen2ForCausalLM"], sliding_window=8).layers)


@pytest.mark.parametrize("named", [{"architectures": None}, {"architectures": []}, {"architectures": ["LlamaModel"]}])
def test_an_architecture_that_is_not_named_follows_from_the_model_type(named):
    assert _parse(**named, model_type="llama") == _parse()


def test_of_several_architectures_the_first_that_is_known_counts():
    assert _parse(architectures=["X", "LlamaForCausalLM"]) == _parse()


def test_every_family_has_a_model_type():
    assert {architecture_of({"model_type": kind}, "") for kind in MODEL_TYPES} == FAMILIES.keys()


def test_kv_shape_follows_the_config():
    assert _parse(num_key_value_heads=2).kv_shape == (4, 2, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", *FAMILIES]),
        ({"architectures": None}, ["config.json", "names no architecture", "model_type None", "qwen3"]),
        ({"architectures": [], "model_type": "mamba"}, ["names no architecture", "'mamba'", "qwen3"]),
        ({"architectures": ["MambaModel"], "model_type": "mamba"}, ["MambaModel", *FAMILIES]),
        ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, ["SequenceClassification"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures", "list"]),
        ({"vocab_size": None}, ["vocab_size", "missing"]),
        ({"hidden_size": "32"}, ["hidden_size", "positive integer", "'32'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "positive integer"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divisor"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps", "number"]),
        ({"hidden_act": "relu"}, ["relu", "silu"]),
        ({"rope_scaling": {"type": "spiral"}}, ["spiral", "llama3"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "object"]),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0]}}, ["short_factor", "3 numbers", "1"]),
        ({"head_dim": 5}, ["pairs", "5"]),
        ({"quantization_config": {"bits": 4}}, ["quantized", "4 bits"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantized (gptq, 4 bits)"]),
        ({"quantization": {"group_size": 64, "bits": 4}}, ["quantized (MLX, 4 bits)"]),
        ({key: {"group_size": 64, "bits": 8} for key in ("quantization", "quantization_config")}, ["(MLX, 8 bits)"]),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, ["bidirectional"]),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]}, ["layer_types", "4"]),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": 7}, ["window"]),
    ],
)
def test_impossible_configurations_are_refused_by_their_key(changes, said):
    with pytest.raises(ModelError) as caught:
        _parse(**changes)
    for part in said:
        assert part in str(caught.value)


WRONG = [0, -1, 1e999, float("nan"), 10**400, "x", [], {}, [None], {"a": 1}, True, [[]], 10**9]


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LONGROPE, {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}])
def test_whatever_a_key_holds_the_answer_is_a_configuration_or_an_error_of_ours(rope):
    """Not an exception of plain Python, and no list as long as a number in the file says."""
    keys = [*LLAMA, "rms_norm_eps", "head_dim", "query_pre_attn_scalar", "partial_rotary_factor", "hidden_act"]
    for value in WRONG:
        for key in keys:
            with contextlib.suppress(ModelError):
                _parse(**{key: value, "rope_parameters": rope})
        for key in [*rope, "full_attention", "partial_rotary_factor"]:
            with contextlib.suppress(ModelError):
                _parse(rope_parameters={**rope, key: value})


@pytest.mark.parametrize("key", ["factor", "rope_theta", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", ["8", -1, float("inf"), [8]])
def test_a_rope_s_numbers_are_numbers(key, value):
    with pytest.raises(ModelError, match=f"rope: '{key}' must be a"):
        _parse(rope_parameters={**YARN, key: value})


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_config(tmp_path)
    for content, said in (
        ("{", "not JSON"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ("\ufffd", "not JSON"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=said):
            load_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelError, match="not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load_config(tmp_path).hidden_size == 32


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"text_config": {"torch_dtype": "bfloat16"}, "torch_dtype": "float32"}, "bfloat16"),
        ({"text_config": {}, "dtype": "float32"}, "float32"),
        ({"dtype": None, "text_config": None}, None),
    ],
)
def test_the_dtype_that_a_checkpoint_names(tmp_path, values, dtype):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert stored_dtype(tmp_path) == dtype
    assert stored_dtype(tmp_path / "m.gguf") is None
