"""Tests of directories with a tokenizer.model, a tekken.json, or older files beside tokenizer.json."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from batchinfer.errors import ModelError
from batchinfer.text.pieces import byte_level_bytes
from batchinfer.text.tokenizer import load_tokenizer

from .test_tokenizer import byte_level, save
from .texts import HOSTILE, synthetic_texts

SPECIAL = ("<s>", "</s>", "<unk>", "<turn>")
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "split_digits": True, **PLAIN},
    "nfkc": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    "no prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<mask>", "<think>"],
        "control_symbols": ["<turn>"],
        **PLAIN,
    },
    "unigram": {"model_type": "unigram", "character_coverage": 1.0},
}


# in a process and a folder of its own: transformers imports it where it can, and its wheel brings an OpenMP library
# beside torch's
_APART = Path(sys.prefix) / "apart"  # see the Makefile
_ASKED = """
import json, sys, sentencepiece
folder, options, texts = json.load(sys.stdin)
sentencepiece.SentencePieceTrainer.train(
    input=f"{folder}/corpus.txt", model_prefix=f"{folder}/tokenizer", minloglevel=2, **options
)
model = sentencepiece.SentencePieceProcessor(f"{folder}/tokenizer.model")
ids = [model.encode(text) for text in texts]
named = {name: model.piece_to_id(name) for name in ("<unk>", "<s>", "<turn>", "<mask>")}
json.dump([ids, [model.decode(one) for one in ids], named], sys.stdout)
"""


class Theirs(NamedTuple):
    """What sentencepiece makes of texts: ids, texts of these again, and the ids of special pieces."""

    ids: list[list[int]]
    texts: list[str]
    named: dict[str, int]


def train(folder: Path, texts: Sequence[str] = (), **options: Any) -> Theirs:
    """Write a small tokenizer.model; return sentencepiece's own reading of `texts` with it."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text.replace("\n", " ") for text in synthetic_texts(200)))
    options = {"vocab_size": 500, "hard_vocab_limit": False, "character_coverage": 0.99, **options}
    if not _APART.is_dir():
        pytest.skip("`make test` installs sentencepiece for this")
    asked = json.dumps([str(folder), options, texts])
    environment = {**os.environ, "PYTHONPATH": str(_APART)}
    said = subprocess.run(
        [sys.executable, "-c", _ASKED], input=asked, capture_output=True, text=True, check=True, env=environment
    )
    return Theirs(*json.loads(said.stdout))


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_model_ids_equal_sentencepiece(kind: str, tmp_path: Path) -> None:
    texts = [text for text in (*synthetic_texts(120), *HOSTILE) if not any(token in text for token in SPECIAL)]
    theirs = train(tmp_path, ["a", *texts], **KINDS[kind])
    ours = load_tokenizer(tmp_path)
    assert ours.encode_batch(["a", *texts], False) == theirs.ids
    whole = [place for place, ids in enumerate(theirs.ids) if theirs.named["<unk>"] not in ids]
    assert ours.decode_batch([theirs.ids[place] for place in whole], True) == [theirs.texts[place] for place in whole]
    assert ours.encode_batch(["a"], True) == [[theirs.named["<s>"], *theirs.ids[0]]]
    assert (ours.bos_id, ours.eos_ids) == (1, {2})
    assert ours.special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def test_control_pieces_are_special_and_user_defined_are_not(tmp_path: Path) -> None:
    theirs = train(tmp_path, ["is"], **KINDS["no prefix"])
    ours = load_tokenizer(tmp_path)
    [ids] = ours.encode_batch(["<turn>is<mask>"], False)
    assert ids == [theirs.named["<turn>"], *theirs.ids[0], theirs.named["<mask>"]]
    assert ours.decode_batch([ids], True) == ["is<mask>"]


def test_configuration_sets_bos_and_eos_of_a_sentencepiece_model(tmp_path: Path) -> None:
    train(tmp_path, **KINDS["no prefix"])
    first = load_tokenizer(tmp_path)
    config = {"add_bos_token": False, "eos_token": "<turn>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert ours.encode_batch(["a"], True) == ours.encode_batch(["a"], False)
    assert ours.special_tokens["eos_token"] == "<turn>" and ours.special_tokens["bos_token"] == "<s>"
    assert ours.identity() != first.identity()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\x0a\x05\x0a\x01", "is not a sentencepiece model"),
        (b"\xff" * 40, "is not a sentencepiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"IQ== 0\nIg== 1\n", "is a tiktoken vocabulary.*tokenizer.json"),
        (b"\xff" * 5_000_000, "is not a sentencepiece model: an unterminated number"),
        (b"\x08\x05", "is not a sentencepiece model: it has a number"),
        (b"\x0a\x05\x15\0\0\0\0", "is not a sentencepiece model: it has a piece without text"),
        (b"\x0a\x02\x08\x07", "is not a sentencepiece model"),
    ],
)
def test_file_that_is_not_a_sentencepiece_model_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=f"tokenizer.model {said}"):
        load_tokenizer(tmp_path)


def test_damaged_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path, **KINDS["nfkc"])
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for seed in range(60):
        draw = random.Random(seed)
        damaged = bytearray(whole[-3000:] if seed % 2 else whole)
        for _ in range(3):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with contextlib.suppress(ModelError):
            load_tokenizer(tmp_path).encode_batch(["a b"], True)


def test_tokenizer_json_normalizer_wins_over_the_class(tmp_path: Path) -> None:
    """Transformers 5 drops it for LlamaTokenizer; sentencepiece, from whose model the file was made, does normalize."""
    texts = ["ﬁne  Ⅷ", "a\u00a0b", "  x  "]
    (tmp_path / "model").mkdir()
    theirs = train(tmp_path / "model", texts, **KINDS["nfkc"])
    rust: RustTokenizer = load_tokenizer(tmp_path / "model")._rust  # type: ignore[attr-defined]
    folder = save(tmp_path / "json", rust, {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    assert load_tokenizer(folder).encode_batch(texts, False) == theirs.ids


def test_gemma_mask_token_is_not_special(tmp_path: Path) -> None:
    """Transformers 5 makes it special by the class's default, and an answer that holds it loses it."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"ab▁"]
    rust = RustTokenizer(BPE({token: number for number, token in enumerate(tokens)}, [], unk_token="<unk>"))
    rust.normalizer = normalizers.Replace(" ", "▁")
    rust.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    rust.add_special_tokens(tokens[:4])
    rust.add_tokens(["<mask>"])
    named = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}
    ours = load_tokenizer(save(tmp_path / "m", rust, named))
    [ids] = ours.encode_batch(["a <mask> b"], False)
    assert ids == [5, 7, 4, 7, 6]
    assert ours.decode_batch([ids], True) == ["a <mask> b"]
    assert 4 not in ours.special_ids and ours.vocab_size == len(tokens)


def test_added_tokens_json_beside_tokenizer_json_equals_transformers(tmp_path: Path) -> None:
    rust = byte_level(400)
    size = rust.get_vocab_size()
    config = {"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]}
    folder = save(tmp_path / "m", rust, config)
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1, "<pad>": size, "::": size + 2}))
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    texts = ["a <tool>b", "x::y", "<pad>", *synthetic_texts(10)]
    ids = theirs(texts)["input_ids"]
    assert ours.encode_batch(texts, True) == ids
    assert ours.decode_batch(ids, True) == theirs.batch_decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs) == size + 3
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size + 7}))
    with pytest.raises(ModelError, match=rf"'<pad>' is {size + 7} in added_tokens\.json but {size}"):
        load_tokenizer(folder)
    (folder / "added_tokens.json").write_text('{"<pad>": "x"}')
    with pytest.raises(ModelError, match=r"added_tokens\.json: token '<pad>' has the id 'x'"):
        load_tokenizer(folder)


def tekken(rust: RustTokenizer, pattern: str, special: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return a byte-level vocabulary in the form of tekken.json, with 20 special tokens first."""
    ordinary = sorted((number, token) for token, number in rust.get_vocab().items() if not token.startswith("<"))
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(byte_level_bytes(token)).decode(), "token_str": None}
        for rank, (_, token) in enumerate(ordinary)
    ]
    size = {"default_vocab_size": len(entries) + 20, "default_num_special_tokens": 20}
    cut = base64.b64encode(b"is_not").decode()  # beyond the size of the vocabulary, as in Mistral's own files
    entries.append({"rank": len(entries), "token_bytes": cut, "token_str": "is_not"})
    values = {"config": {"pattern": pattern, "version": "v3", **size}, "vocab": entries}
    return values if special is None else {**values, "special_tokens": special}


def test_tekken_vocabulary_is_loaded(tmp_path: Path) -> None:
    rust = byte_level(500)
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # byte_level's own
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(rust, pattern)))
    ours = load_tokenizer(tmp_path)
    texts = [text for text in synthetic_texts(60) if "<" not in text]
    found = ours.encode_batch(texts, False)
    assert ours.decode_batch(found, False) == texts
    ordinary = [token for _, token in sorted((n, t) for t, n in rust.get_vocab().items() if not t.startswith("<"))]
    expected = [[20 + ordinary.index(token) for token in rust.encode(text).tokens] for text in texts]
    assert found == expected
    assert ours.encode_batch(["[INST]a[/INST]</s>"], True)[0][:2] == [1, 3]
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, {2}, len(ordinary) + 20)


def test_special_tokens_listed_in_tekken_are_used(tmp_path: Path) -> None:
    listed = [{"rank": rank, "token_str": text} for rank, text in enumerate(["<unk>", "<s>", "</s>", "[THINK]"])]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(byte_level(400), r"\S+|\s+", listed)))
    ours = load_tokenizer(tmp_path)
    assert ours.encode_batch(["[THINK]<SPECIAL_7>"], False) == [[3, 7]]
    config = tekken(byte_level(400), r"\S+|\s+")["config"]
    changes = [{"default_num_special_tokens": 10**12}, {"default_vocab_size": float("inf")}, {"pattern": "("}]
    wrong = [json.dumps({"config": {**config, **change}, "vocab": []}) for change in changes]
    for damaged in ("{}", "[1]", '{"config": {}, "vocab": []}', "<html>", "[" * 100_000, *wrong):
        (tmp_path / "tekken.json").write_text(damaged)
        with pytest.raises(ModelError, match=r"tekken\.json is (not a tekken vocabulary|a web page)"):
            load_tokenizer(tmp_path)
