"""Models whose matrices stay in GGUF's blocks compute what they do with the same matrices in float32, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from batchinfer_kernels.cpu.gated_linear import GatedPanels
from batchinfer_kernels.cpu.linear import PackedBlocks
from batchinfer_kernels.eager.linear import DenseMatrix
from batchinfer_kernels.formats import Precision
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFWriter

from batchinfer.layers.linear import Linear
from batchinfer.models import gguf_blocks
from batchinfer.models.gguf import GGUFFile
from batchinfer.models.precision import WeightPrecision
from batchinfer.models.weights import load_decoder
from tests.models.gguf_files import finish, float_weights, whole_slice
from tests.models.tiny import Paged

TOKENS = [5, 17, 40, 3, 90, 41, 7]
_HIDDEN, _FEED, _VOCABULARY = 64, 96, 97


def write_blocks(path, types, tied=False, scale=None, feed=_FEED):
    """Write a random llama of two layers: `types` gives the type of each matrix by its GGUF name's last word.

    `scale` replaces the scale of the first block of every matrix that has one.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    generator = np.random.default_rng(0)

    def add(name, *shape):
        values = (generator.standard_normal(shape) * 0.3).astype(np.float32)
        kind = types.get(name.split(".")[-1], types["*"]) if len(shape) == 2 else GGMLType.F32
        raw = gguf.quantize(values, kind)
        if scale is not None and kind in gguf_blocks.TYPES:
            raw[0, :2] = np.array([scale], np.float16).view(np.uint8)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)

    add("token_embd", _VOCABULARY, _HIDDEN)
    add("output_norm", _HIDDEN)
    if not tied:
        add("output", _VOCABULARY, _HIDDEN)
    for layer in range(2):
        shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        shapes |= {
            "ffn_gate": (feed, 64),
            "ffn_up": (feed, 64),
            "ffn_down": (64, feed),
            "attn_norm": (64,),
            "ffn_norm": (64,),
        }
        for name, shape in shapes.items():
            add(f"blk.{layer}.{name}", *shape)
    finish(writer)


def _logits(decoder):
    return Paged(decoder, sequences=1).step({0: TOKENS})


def _with_and_without(path, monkeypatch):
    """Return decoders of the same file: as loaded, and from float32 weights."""
    kept = load_decoder(path)
    monkeypatch.setattr(GGUFFile, "read_blocks", lambda file, part: None)
    return kept, load_decoder(path)


def _in_blocks(decoder):
    """Return the names of the matrices that are."""
    if isinstance(decoder.embedding.matrix, DenseMatrix):
        pytest.skip("the eager backend keeps float32")
    linears = {name: module.matrix for name, module in decoder.named_modules() if isinstance(module, Linear)}
    held = {name: each.packed if isinstance(each, GatedPanels) else each for name, each in linears.items()}
    return {name for name, each in held.items() if isinstance(each, PackedBlocks)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", gguf_blocks.TYPES, ids=lambda kind: kind.name)
def test_logits_are_those_of_float32_weights(kind, tied, tmp_path, monkeypatch):
    write_blocks(tmp_path / "m.gguf", {"*": kind, "token_embd": GGMLType.Q8_0}, tied)
    kept, floats = _with_and_without(tmp_path / "m.gguf", monkeypatch)
    assert torch.equal(_logits(kept), _logits(floats)) and _logits(kept).std() > 0.1
    layers = {
        f"layers.{i}.{name}" for i in (0, 1) for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    }
    assert _in_blocks(kept) == layers | {"embedding"} | (set() if tied else {"head"})
    assert not _in_blocks(floats)


def test_every_matrix_is_that_of_the_file(tmp_path):
    write_blocks(
        tmp_path / "m.gguf",
        {"*": GGMLType.Q4_0, "ffn_up": GGMLType.Q4_1, "attn_v": GGMLType.Q8_0, "output": GGMLType.F16},
    )
    file = GGUFFile(tmp_path / "m.gguf")
    kinds = set()
    for name, floats in float_weights(file).items():
        weight = None if floats.ndim == 1 else file.read_blocks(whole_slice(file, name))
        if weight is not None:
            assert torch.equal(weight.float(), floats), name
            kinds.add((weight.bits, weight.mins_OG is not None))
    assert kinds == {(4, False), (4, True), (8, False)}


@pytest.mark.parametrize("other", [GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.F32, GGMLType.F16])
def test_a_stack_of_several_types_is_float32(other, tmp_path, monkeypatch):
    write_blocks(tmp_path / "m.gguf", {"*": GGMLType.Q4_1, "attn_k": other, "ffn_gate": other})
    kept, floats = _with_and_without(tmp_path / "m.gguf", monkeypatch)
    assert torch.equal(_logits(kept), _logits(floats))
    alone = {f"layers.{i}.{name}" for i in (0, 1) for name in ("attention.out", "mlp.down")}
    assert _in_blocks(kept) == alone | {"embedding", "head"}


def test_blocks_with_an_infinite_scale_become_float32(tmp_path):
    write_blocks(tmp_path / "m.gguf", {"*": GGMLType.Q4_0}, scale=np.inf)
    file = GGUFFile(tmp_path / "m.gguf")
    matrices = [name for name, stored in file.stored.items() if len(stored.shape) == 2]
    assert all(file.read_blocks(whole_slice(file, name)) is None for name in matrices)
    assert not _in_blocks(load_decoder(tmp_path / "m.gguf"))


def test_other_types_of_numbers_take_the_weights_as_before(tmp_path):
    write_blocks(tmp_path / "m.gguf", {"*": GGMLType.Q4_1})
    for precision in (WeightPrecision.of_all(Precision.BFLOAT16), WeightPrecision(layers=Precision.INT8)):
        decoder = load_decoder(tmp_path / "m.gguf", precision)
        assert _logits(decoder).std() > 0.1
        assert not isinstance(decoder.embedding.matrix, PackedBlocks)


@pytest.mark.model
def test_smollm2_in_blocks_computes_the_logits_of_its_float32_weights(smollm2_gguf, monkeypatch):
    kept, floats = _with_and_without(smollm2_gguf, monkeypatch)
    assert torch.equal(_logits(kept), _logits(floats))
    assert len(_in_blocks(kept)) == 4 * 30 + 1
    held = sum(linear.matrix.nbytes for linear in kept.modules() if isinstance(linear, Linear))
    # panels of at most 32 output features, which all sizes of this model are multiples of
    layers = 30 * (576 * (960 + 576 + 3072) + 1536 * 576)
    assert held == layers * 5 / 8 + 49152 * 576 * 8.5 / 8
    assert held < smollm2_gguf.stat().st_size
