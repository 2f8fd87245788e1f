"""Cuts over ranks: the ranks' slices put together are the whole model, and a rank reads its own bytes alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batchinfer_kernels.eager import EagerBackend
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from batchinfer.errors import ModelError
from batchinfer.layers.linear import Linear
from batchinfer.layers.norm import RMSNorm
from batchinfer.models import gguf, gguf_blocks
from batchinfer.models.config import load_config
from batchinfer.models.cuts import WHOLE, Cut, check_cut, fits
from batchinfer.models.decoder import Decoder
from batchinfer.models.weights import load_decoder
from batchinfer.ops.resources import HOST
from tests.models.test_gguf_blocks import write_blocks
from tests.models.tiny import build

SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 97}


def load_share(path: Path, cut: Cut = WHOLE) -> Decoder:
    """Load with the eager backend, which keeps a matrix as it is read."""
    return load_decoder(path, backend=EagerBackend(HOST), cut=cut)


def parameters_of(decoder: Decoder) -> dict[str, Tensor]:
    """Return every weight and bias by module and kind; each matrix has its layer's shape."""
    found = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Linear):
            found[f"{name}.weight"] = module.matrix.values_OI  # type: ignore[attr-defined]
            assert found[f"{name}.weight"].shape == (module.out_features, module.in_features)
            if module.bias is not None:
                found[f"{name}.bias"] = module.bias
        elif isinstance(module, RMSNorm):
            found[f"{name}.weight"] = module.weight
    return found


def put_together(name: str, pieces: list[Tensor], whole: Decoder) -> Tensor:
    """Return the whole parameter: written down again for every module, independently of models.cuts."""
    attention, size = whole.config.attention, len(pieces)
    each_kv_head_once = slice(None, None, max(1, size // attention.num_kv_heads))
    module, _, kind = name.rpartition(".")
    if module.endswith("qkv"):
        heads, kv_heads = attention.num_heads // size, max(1, attention.num_kv_heads // size)
        parts = [
            piece.split([count * attention.head_size for count in (heads, kv_heads, kv_heads)]) for piece in pieces
        ]
        q, k, v = zip(*parts, strict=True)
        return torch.cat([*q, *k[each_kv_head_once], *v[each_kv_head_once]])
    if module.endswith("gate_up"):
        gates, factors = zip(*(piece.chunk(2) for piece in pieces), strict=True)
        return torch.cat([*gates, *factors])
    if module.endswith(("out", "down")) and kind == "weight":
        return torch.cat(pieces, 1)
    if module in ("embedding", "head"):
        rows = torch.cat(pieces)
        assert not rows[whole.config.vocab_size :].any()
        return rows[: whole.config.vocab_size]
    if attention.qk_norm == "projection" and module.endswith(("q_norm", "k_norm")):
        return torch.cat(pieces[each_kv_head_once] if module.endswith("k_norm") else pieces)
    assert all(torch.equal(piece, pieces[0]) for piece in pieces)
    return pieces[0]


def assert_shares_make_the_whole(path: Path, size: int) -> None:
    whole = load_share(path)
    shares = [parameters_of(load_share(path, Cut(rank, size))) for rank in range(size)]
    for name, expected in parameters_of(whole).items():
        assert torch.equal(put_together(name, [share[name] for share in shares], whole), expected), name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "llama-biases", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "granite"]
)
def test_shares_of_two_and_four_ranks_make_the_whole(name: str, size: int, tmp_path: Path) -> None:
    """4 heads; 2 kv heads, which 4 ranks replicate, or 1 or 4."""
    build(name, tmp_path)
    assert_shares_make_the_whole(tmp_path, size)


@pytest.mark.parametrize("name", ["llama", "olmo2", "phi3"])
def test_shares_of_three_ranks_make_the_whole(name: str, tmp_path: Path) -> None:
    """One kv head is replicated on all, and 97 vocabulary rows are padded."""
    build(name, tmp_path, **SIX_HEADS)
    assert_shares_make_the_whole(tmp_path, 3)


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q8_0, GGMLType.F16, GGMLType.Q5_1])
def test_shares_of_a_gguf_file_make_the_whole(kind: GGMLType, tmp_path: Path) -> None:
    """Blocks, whose 97 vocabulary rows are padded with zeros, and de-quantised types; q and k are permuted by heads."""
    write_blocks(tmp_path / "m.gguf", {"*": kind}, feed=128)
    assert_shares_make_the_whole(tmp_path / "m.gguf", 2)


def test_columns_that_split_a_block_are_refused_with_numbers_that_would_do(tmp_path: Path) -> None:
    write_blocks(tmp_path / "m.gguf", {"*": GGMLType.Q8_0}, feed=96)
    with pytest.raises(ModelError, match=r"down_proj.* blocks of 32 of its 96 .* over 2 ranks; .* would do: 1, 3"):
        load_share(tmp_path / "m.gguf", Cut(0, 2))


@pytest.mark.parametrize(
    ("changes", "size", "would_do"),
    [({}, 3, "1, 2, 4"), (SIX_HEADS, 4, "1, 2, 3, 6"), (SIX_HEADS | {"num_key_value_heads": 2}, 3, "1, 2, 6")],
)
def test_a_model_that_cannot_be_cut_names_numbers_of_ranks(
    changes: dict[str, Any], size: int, would_do: str, tmp_path: Path
) -> None:
    build("llama", tmp_path, **changes)
    with pytest.raises(ModelError, match=f"cannot be cut over {size} ranks; numbers that would do: {would_do}$"):
        load_share(tmp_path, Cut(0, size))


@pytest.mark.parametrize("cut", [Cut(2, 2), Cut(-1, 2), Cut(0, 0)])
def test_a_rank_beyond_the_ranks_is_refused(cut: Cut, tmp_path: Path) -> None:
    build("llama", tmp_path)
    with pytest.raises(ModelError, match="is not among the"):
        check_cut(load_config(tmp_path), cut, "here")


def test_feed_forward_features_must_be_a_multiple_of_the_ranks(tmp_path: Path) -> None:
    build("llama", tmp_path)
    config = load_config(tmp_path)
    assert fits(config, 4) and not fits(replace(config, mlp=replace(config.mlp, size=50)), 4)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_a_rank_reads_the_bytes_of_its_slices_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(name, tmp_path)
    counts = []
    read = os.preadv

    def counted(*arguments: Any) -> int:
        counts.append(read(*arguments))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    for cut in (WHOLE, Cut(1, 2), Cut(3, 4)):
        counts.clear()
        numbers = sum(parameter.numel() for parameter in parameters_of(load_share(tmp_path, cut)).values())
        assert sum(counts) == 4 * numbers


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q5_1])
def test_a_rank_decodes_the_blocks_of_its_slices_alone(
    kind: GGMLType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_blocks(tmp_path / "m.gguf", {"*": kind}, feed=128)
    counts = []
    block_matrix, dequantize = gguf_blocks.block_matrix, gguf._dequantize
    monkeypatch.setattr(
        gguf_blocks, "block_matrix", lambda rows, kind: counts.append(rows.nbytes) or block_matrix(rows, kind)
    )
    monkeypatch.setattr(
        gguf, "_dequantize", lambda raw, kind, out: counts.append(raw.nbytes) or dequantize(raw, kind, out)
    )
    sizes = []
    for cut in (WHOLE, Cut(0, 2), Cut(1, 2)):
        counts.clear()
        load_share(tmp_path / "m.gguf", cut)
        sizes.append(sum(counts))
    norms_bytes = 4 * 64 * 5  # on both ranks
    assert sizes[1] + sizes[2] == sizes[0] + norms_bytes
