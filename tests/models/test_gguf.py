"""GGUF files that the tests write: every type, every architecture through Hugging Face and back, and damage."""

from __future__ import annotations

import gc
import math
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from batchinfer.errors import ModelError
from batchinfer.llm import LLM
from batchinfer.models import gguf as ours
from batchinfer.models import gguf_header
from batchinfer.models.gguf import GGUFFile
from batchinfer.models.gguf_header import read_header, shared_header

from .gguf_files import finish, float_weights, write_model

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3["original_max_position_embeddings"] = 64
_LONG = [1.0 + i / 4 for i in range(4)]


def llama3_divisors(scaling: dict, head_dim: int, theta: float) -> np.ndarray:
    """`generate_extra_tensors` of llama.cpp's LlamaModel."""
    divisors = []
    for frequency in 1.0 / (theta ** (np.arange(0, head_dim, 2) / head_dim)):
        wavelength = 2 * math.pi / frequency
        original, low, high = (
            scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, np.float32)


def yarn(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)


def linear(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


def granite(writer: GGUFWriter) -> None:
    writer.add_attention_scale(0.25)
    writer.add_embedding_scale(3.0)
    writer.add_residual_scale(0.5)
    writer.add_logit_scale(2.0)


def gemma2(writer: GGUFWriter) -> None:
    writer.add_sliding_window(16)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)


def phi3(writer: GGUFWriter) -> None:
    writer.add_rope_dimension_count(8)
    writer.add_rope_scaling_orig_ctx_len(64)


# name → architecture in GGUF, model_type, facts of the Hugging Face config, writer of keys, further tensors
MODELS = {
    "llama": ("llama", "llama", {"tie_word_embeddings": True}, None, {}),
    "llama-untied-bias": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, None, {}),
    "llama-linear": ("llama", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, linear, {}),
    "llama-3": (
        "llama",
        "llama",
        {"rope_theta": 500000.0, "head_dim": 32, "rope_scaling": _LLAMA3},
        None,
        {"rope_freqs.weight": llama3_divisors(_LLAMA3, 32, 500000.0)},
    ),
    "llama-3-wide": (
        "llama",
        "llama",
        {"rope_theta": 500000.0, "head_dim": 64, "rope_scaling": {**_LLAMA3, "high_freq_factor": 8.0}},
        None,
        {"rope_freqs.weight": llama3_divisors({**_LLAMA3, "high_freq_factor": 8.0}, 64, 500000.0)},
    ),
    "qwen2": ("qwen2", "qwen2", {"rope_theta": 1e6}, None, {}),
    "qwen2-yarn": (
        "qwen2",
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        yarn,
        {},
    ),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16}, None, {}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"sliding_window": 16, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0, "tie_word_embeddings": True},
        gemma2,
        {},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {"num_hidden_layers": 7, "sliding_window": 16, "query_pre_attn_scalar": 8, "rope_theta": 1e6},
        lambda writer: writer.add_sliding_window(16),
        {},
    ),
    "phi3": ("phi3", "phi3", {"sliding_window": None}, phi3, {}),
    "phi3-long": (
        "phi3",
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "longrope", "long_factor": _LONG, "short_factor": [1.0] * 4},
        },
        phi3,
        {
            "rope_factors_long.weight": np.array(_LONG, np.float32),
            "rope_factors_short.weight": np.ones(4, np.float32),
        },
    ),
    "granite": (
        "granite",
        "granite",
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
        granite,
        {},
    ),
    "olmo2": ("olmo2", "olmo2", {"rms_norm_eps": 1e-6}, None, {}),
    "smollm3": ("smollm3", "smollm3", {"tie_word_embeddings": True, "rope_theta": 2e6}, None, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_the_same(name: str, tmp_path: Path) -> None:
    """Written as llama.cpp's converter would, read back, and built again from config_dict and weights alone."""
    arch, model_type, facts, write_facts, extra = MODELS[name]
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **{**_SMALL, **facts})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms of all ones would hide a mistake
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "model.gguf"
    write_model(path, arch, model, write_facts or (lambda writer: None), extra)

    file = GGUFFile(path)
    values = file.config_dict()
    assert values["architectures"] == [type(model).__name__]
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()
    missing, unexpected = again.load_state_dict(float_weights(file), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    assert values["tie_word_embeddings"] == bool(missing)

    ids = torch.randint(3, 96, (1, 100))
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def quantized_file(path: Path, ggml_type: GGMLType, rows: int, columns: int) -> np.ndarray:
    """Write a llama file with one tensor of random bytes of this type, and return the bytes."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    rng = np.random.default_rng(int(ggml_type))
    raw = rng.integers(0, 256, (rows, columns // block * block_bytes), dtype=np.uint8)
    if ggml_type not in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        raw &= 0x3B  # keeps every float16 scale finite, wherever it stands in the block
    writer = GGUFWriter(path, "llama")
    writer.add_head_count(1)
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=ggml_type)
    finish(writer)
    return raw


@pytest.mark.parametrize("ggml_type", sorted(ours.SUPPORTED), ids=lambda ggml_type: ggml_type.name)
def test_every_type_is_dequantised_in_chunks(
    ggml_type: GGMLType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_CHUNK", 512)
    path = tmp_path / "one.gguf"
    raw = quantized_file(path, ggml_type, rows=5, columns=768)  # 7.5 chunks
    expected = gguf.dequantize(raw, ggml_type)
    [(name, tensor)] = float_weights(GGUFFile(path)).items()
    assert name == "model.layers.0.mlp.up_proj.weight"
    assert tensor.dtype == torch.float32 and tensor.shape == (5, 768)
    np.testing.assert_array_equal(tensor.numpy(), expected)


@pytest.mark.parametrize("ggml_type", sorted(ours.gguf_blocks.TYPES), ids=lambda ggml_type: ggml_type.name)
def test_any_bytes_are_dequantised_as_by_the_gguf_package(ggml_type: GGMLType) -> None:
    """Negative, infinite and undefined scales too."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    raw = np.random.default_rng(3).integers(0, 256, 30_000 * block_bytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw[None], ggml_type)[0]
    assert np.isnan(expected).any() and (expected < 0).any()
    out = torch.empty(30_000 * block)
    ours._dequantize(raw, ggml_type, out)
    np.testing.assert_array_equal(out.numpy(), expected)


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "one.gguf"
    quantized_file(path, GGMLType.Q2_K, 1, 256)
    with pytest.raises(ModelError, match=r"'blk.0.ffn_up.weight' has type Q2_K; supported are BF16, F16"):
        float_weights(GGUFFile(path))


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_head_count(1)
    writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 2), np.float32))
    finish(writer)
    with pytest.raises(ModelError, match=r"'blk\.0\.ffn_gate_exps\.weight' has no place in LlamaForCausalLM"):
        float_weights(GGUFFile(tmp_path / "x.gguf"))


def test_an_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    finish(GGUFWriter(tmp_path / "x.gguf", "mamba"))
    with pytest.raises(ModelError, match=r"'mamba' is not supported; known: llama, qwen2, .*smollm3"):
        GGUFFile(tmp_path / "x.gguf")


def test_metadata_equals_the_gguf_packages(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    theirs = gguf.GGUFReader(path)
    header = read_header(path)
    wanted = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    wanted["llama.attention.layer_norm_rms_epsilon"] = 1e-6  # the shortest decimal of that float32
    assert header.metadata == wanted
    assert list(header.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = header.tensors[tensor.name]
        assert header.data_start + info.offset == tensor.data_offset
        assert info.shape == tuple(reversed(tensor.shape.tolist()))


def tiny_llama(folder: Path) -> Path:
    path = folder / "tiny.gguf"
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**_SMALL, "num_hidden_layers": 1, "vocab_size": 16})

    def facts(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<s>", "é", "", "日本"])
        writer.add_token_types([3, 1, 1, 1])

    write_model(path, "llama", AutoModelForCausalLM.from_config(config), facts)
    return path


def load_all(path: Path) -> None:
    file = GGUFFile(path)
    file.config_dict()
    float_weights(file)


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path: Path) -> None:
    whole = tiny_llama(tmp_path).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 2000, 61), *range(2000, len(whole), 997)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            load_all(cut)
    cut.write_bytes(whole)
    load_all(cut)


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_header_is_an_error_or_harmless(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any bytes of the header may be overwritten: a ModelError, or a file that still reads."""
    folder = tmp_path_factory.getbasetemp() / "damage"
    folder.mkdir(exist_ok=True)
    if not (folder / "tiny.gguf").exists():
        tiny_llama(folder)
    rng = random.Random(seed)
    data = bytearray((folder / "tiny.gguf").read_bytes())
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(1800)] = rng.choice([0, 1, 7, 8, 9, 127, 255, rng.randrange(256)])
    (folder / "damaged.gguf").write_bytes(data)
    try:
        load_all(folder / "damaged.gguf")
    except ModelError as error:
        assert "damaged.gguf" in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04", "is a ZIP archive"),
        (b"NOTGGUF", "does not begin with the bytes GGUF"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "big-endian"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "version 1 is not supported"),
    ],
)
def test_files_that_are_not_gguf_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GGUFFile(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="No such file"):
        GGUFFile(tmp_path / "missing.gguf")


def test_split_files_are_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    finish(writer)
    with pytest.raises(ModelError, match="one of 3 split files"):
        GGUFFile(tmp_path / "x-00001-of-00003.gguf")


def test_a_header_is_parsed_once_while_somebody_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama(tmp_path)
    parsed = []
    parse = gguf_header._parse
    monkeypatch.setattr(gguf_header, "_parse", lambda *of: parsed.append(1) or parse(*of))
    with shared_header(path):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: read_header(path), range(8)))
        assert all(header is found[0] for header in found)
        assert GGUFFile(path).header is found[0] and len(parsed) == 1
        path.write_bytes(path.read_bytes() + b"\0")  # another file now
        assert read_header(path) is not found[0] and len(parsed) == 2
    gone = weakref.ref(found[0])
    del found
    gc.collect()
    assert gone() is None  # nothing keeps a vocabulary that nobody needs
    with shared_header(None), shared_header(tmp_path):
        assert len(parsed) == 2


@pytest.mark.model
def test_a_model_is_loaded_with_one_look_at_its_header(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    parse = gguf_header._parse
    monkeypatch.setattr(gguf_header, "_parse", lambda *of: parsed.append(1) or parse(*of))
    assert LLM(smollm2_gguf, kv_cache_tokens=64, max_model_len=64).model_facts.chat_template and len(parsed) == 1
    assert not gguf_header._read


@pytest.mark.model
def test_smollm2_reads_with_its_config_and_number_of_weights(smollm2_gguf: Path) -> None:
    file = GGUFFile(smollm2_gguf)
    config = file.config_dict()
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 1e5, True)
    assert sum(tensor.numel() for tensor in float_weights(file).values()) == 134_515_008
