"""Weights land where they belong, from every layout on disk; what is wrong is named with tensor, file and shapes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from batchinfer_kernels.formats import Precision
from safetensors.torch import load_file, save_file

from batchinfer.errors import ModelError
from batchinfer.layers.linear import Linear
from batchinfer.models.config import load_config
from batchinfer.models.precision import EXACT, WeightPrecision
from batchinfer.models.weights import load_decoder
from tests.models.gguf_files import write_model
from tests.models.tiny import Paged, build

IN_BFLOAT16 = WeightPrecision.of_all(Precision.BFLOAT16)
TOKENS = [5, 17, 40, 3, 90, 41]


def _logits(path, precision=EXACT):
    return Paged(load_decoder(path, precision), sequences=1).step({0: TOKENS})


def _rewrite(folder, change):
    """Change the tensors of a saved model; `change` gets the dict."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma3"])
def test_a_sharded_index_is_read_like_one_file(name, tmp_path):
    model = build(name, tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(_logits(tmp_path / "many"), _logits(tmp_path / "one"))


def test_a_gguf_file_is_read_like_the_directory(tmp_path):
    model = build("llama", tmp_path)
    file = tmp_path / "model.gguf"
    write_model(file, "llama", model)
    assert load_config(file).kv_shape == load_config(tmp_path).kv_shape == (4, 2, 8)
    torch.testing.assert_close(_logits(file), _logits(tmp_path), atol=1e-5, rtol=0)
    short = tmp_path / "short.gguf"
    del model.model.layers[3:]
    write_model(short, "llama", model)
    with pytest.raises(ModelError, match=r"short\.gguf: model\.layers\.3\..* missing"):
        load_decoder(short)


def test_dtypes_are_converted_while_reading(tmp_path):
    model = build("llama", tmp_path / "32")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "16")
    exact = _logits(tmp_path / "32")
    widened = _logits(tmp_path / "16")
    narrow = load_decoder(tmp_path / "32", IN_BFLOAT16)
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}
    assert 1e-4 < (widened - exact).abs().max() < 0.1
    assert torch.equal(Paged(narrow, sequences=1).step({0: TOKENS}), _logits(tmp_path / "16", IN_BFLOAT16))


def test_loading_imports_nothing_slow(tmp_path):
    """Symbolic shapes of torch and sympy take half a second, and some innocent functions of torch import them."""
    build("llama", tmp_path)
    script = (
        "import pathlib, sys, torch; from batchinfer.models.weights import load_decoder; "
        f"load_decoder(pathlib.Path({str(tmp_path)!r})); print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"sympy", "torch._dynamo", "torch._inductor"} & set(result.stdout.split())


def test_the_default_dtype_is_left_as_it_was(tmp_path):
    build("llama", tmp_path)
    assert load_decoder(tmp_path, IN_BFLOAT16).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_tied_weights_are_one_matrix(tmp_path):
    build("llama-tied", tmp_path)
    decoder = load_decoder(tmp_path)
    linears = [module for module in decoder.modules() if isinstance(module, Linear)]
    assert decoder.head is None and decoder.embedding in linears
    norms = sum(weight.numel() for weight in decoder.parameters() if weight.ndim == 1)
    matrices = sum(linear.in_features * linear.out_features for linear in linears)
    whole = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert norms + matrices == whole


def test_a_tied_head_in_the_file_that_is_the_embedding_changes_nothing(tmp_path):
    build("llama-tied", tmp_path)
    before = _logits(tmp_path)
    _rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(_logits(tmp_path), before)
    assert load_decoder(tmp_path).head is None


def test_a_tied_model_whose_file_has_another_head_uses_the_file_s(tmp_path, capfd):
    build("llama-tied", tmp_path)
    _rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).contiguous()}))
    found = _logits(tmp_path)
    assert "tie_word_embeddings" in capfd.readouterr().err
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert torch.equal(found, _logits(tmp_path))


def test_weights_without_the_model_prefix_give_the_same_logits(tmp_path):
    """A base class saves them so; the head lies beside them."""
    build("llama", tmp_path)
    expected = _logits(tmp_path)

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _rewrite(tmp_path, bare)
    assert torch.equal(_logits(tmp_path), expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n", "a Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(60), "a ZIP archive"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_another_kind_is_named_as_such(content, expected, name, tmp_path):
    build("llama", tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} is {expected}"):
        load_decoder(tmp_path)


def test_buffers_of_old_llama_files_are_left_out(tmp_path):
    build("llama", tmp_path)
    _rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_decoder(tmp_path)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_gemma3_with_images_loads_its_text_half(prefix, tmp_path):
    build("gemma3", tmp_path)
    expected = _logits(tmp_path)

    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.x"] = tensors["multi_modal_projector.y"] = torch.ones(2)
        tensors["multi_modal_projector.y"] = torch.ones(3)

    _rewrite(tmp_path, rename)
    text = json.loads((tmp_path / "config.json").read_text())
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(_logits(tmp_path), expected)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "llama",
            lambda t: t.pop("model.layers.2.self_attn.k_proj.weight"),
            ["model.layers.2.self_attn.k_proj.weight", "[16, 32]", "missing", "LlamaForCausalLM"],
        ),
        (
            "qwen2",
            lambda t: [t.pop(f"model.layers.{i}.self_attn.v_proj.bias") for i in range(4)],
            ["model.layers.0.self_attn.v_proj.bias", "3 more", "missing"],
        ),
        ("llama", lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "[96, 32]", "missing"]),
        (
            "llama",
            lambda t: t.update({"model.layers.0.mlp.gate_proj.weigth": torch.ones(3)}),
            ["model.layers.0.mlp.gate_proj.weigth [3]", "no place", "'model.layers.0.mlp.gate_proj.weight'"],
        ),
        ("llama", lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.ones(48, 32)}), ["layers.4", "place"]),
        (
            "llama",
            lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(16, 32)}),
            ["model.layers.1.self_attn.q_proj.weight", "[16, 32]", "[32, 32]"],
        ),
        (
            "phi3",
            lambda t: t.update({"model.layers.1.self_attn.qkv_proj.weight": torch.ones(63, 32)}),
            ["qkv_proj", "[63, 32]", "[64, 32]"],
        ),
        (
            "llama",
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            ["model.norm.weight", "int8"],
        ),
    ],
)
def test_wrong_tensors_are_named(name, change, said, tmp_path):
    build(name, tmp_path)
    _rewrite(tmp_path, change)
    with pytest.raises(ModelError) as caught:
        load_decoder(tmp_path)
    for part in [*said, str(tmp_path)]:
        assert part in str(caught.value)


def test_missing_and_cut_weight_files_are_errors(tmp_path):
    model = build("llama", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    shard = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for cut in (content[:4], content[:-10], b"\xff" * 100):
        shard.write_bytes(cut)
        with pytest.raises(ModelError, match=f"{shard.name} is not a whole safetensors file"):
            load_decoder(tmp_path / "many")
    shard.unlink()
    with pytest.raises(ModelError, match=f"names {shard.name}, which is not there"):
        load_decoder(tmp_path / "many")
    (tmp_path / "many" / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ModelError, match="not a safetensors index"):
        load_decoder(tmp_path / "many")
    (tmp_path / "one" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds neither"):
        load_decoder(tmp_path / "one")


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    model = build("llama", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    index = {"weight_map": {"lm_head.weight": "../one/model.safetensors"}}
    (tmp_path / "many" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"\.\./one"):
        load_decoder(tmp_path / "many")


def test_max_model_len_shortens_the_context_and_never_stretches_it(tmp_path):
    build("llama", tmp_path)
    assert load_decoder(tmp_path).config.context_tokens == 128
    assert load_decoder(tmp_path, max_model_len=50).config.context_tokens == 50
    with pytest.raises(ModelError, match="129 is above the model's context of 128"):
        load_decoder(tmp_path, max_model_len=129)
