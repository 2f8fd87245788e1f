"""Tests of tokenizers against transformers': a model directory, SmolLM2's GGUF, and bytes."""

from __future__ import annotations

import builtins
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from batchinfer.errors import InvalidInput, ModelError
from batchinfer.text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

from .texts import HOSTILE, real_texts, synthetic_texts

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(vocab_size: int = 600) -> RustTokenizer:
    """Train a byte-level BPE on the synthetic texts."""
    rust = RustTokenizer(BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(synthetic_texts(50), trainer)
    return rust


def sentencepiece() -> RustTokenizer:
    """Byte fallback with a space before the text, as Llama 2's."""
    pairs = [("▁", "a"), ("▁a", "b"), ("l", "l"), ("ll", "o"), ("h", "e"), ("he", "llo"), ("▁", "hello"), ("▁", "▁")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abehlo wr"]
    tokens += [a + b for a, b in pairs]
    rust = RustTokenizer(
        BPE({t: i for i, t in enumerate(tokens)}, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    return rust


def save(folder: Path, rust: RustTokenizer, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **(config or {})}))
    return folder


@pytest.mark.model
def test_smollm2_equals_transformers_on_real_texts(smollm2_gguf: Path) -> None:
    """Transformers' own reading of the file forgets to split digits; with that put right, every text must agree."""
    texts = [*(real_texts() or synthetic_texts(800)), *HOSTILE]
    theirs = AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    ours = load_tokenizer(smollm2_gguf)
    found = ours.encode_batch(texts, add_special_tokens=True)
    assert found != theirs(texts)["input_ids"], "the trap is gone: the next line is no longer needed"
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    assert len(texts) >= 700
    assert found == theirs(texts)["input_ids"]
    assert ours.decode_batch(found, skip_special_tokens=False) == texts
    assert ours.decode_batch(found, skip_special_tokens=True) == theirs.batch_decode(found, skip_special_tokens=True)


@pytest.mark.model
def test_smollm2_special_tokens_and_template(smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_ids == {0, 2}  # <|im_end|>, and llama.cpp ends at <|endoftext|> as well
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.encode_batch(["year 2024"], True) == tokenizer.encode_batch(["year 2024"], False)
    assert tokenizer.chat_template is not None and "SmolLM" in tokenizer.chat_template


def bos(rust: RustTokenizer) -> None:
    rust.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", rust.token_to_id("<s>"))])


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bos": {"bos_token": "<s>"},
    "bos whatever the config says": {"bos_token": "<s>", "add_bos_token": False},
    "more tokens": {"added_tokens_decoder": [{"content": "<tool>", "special": True}, {"content": "::"}]},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_directory_tokenizer_equals_transformers(name: str, make: Callable[[], RustTokenizer], tmp_path: Path) -> None:
    rust = make()
    if name.startswith("bos"):
        bos(rust)
    config = dict(CONFIGS[name])
    if "added_tokens_decoder" in config:
        base = rust.get_vocab_size()
        config["added_tokens_decoder"] = {str(base + i): e for i, e in enumerate(config["added_tokens_decoder"])}
    ours = load_tokenizer(save(tmp_path / "m", rust, config))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "m"))
    texts = [*synthetic_texts(40), *HOSTILE[:16], "a <tool> b::c"]
    for add in (True, False):
        assert ours.encode_batch(texts, add) == theirs(texts, add_special_tokens=add)["input_ids"]
    ids = theirs(texts)["input_ids"]
    for skip in (True, False):
        clean = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        assert ours.decode_batch(ids, skip) == theirs.batch_decode(ids, **clean)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.special_tokens["eos_token"] == "</s>" and theirs.eos_token_id in ours.eos_ids


def test_conflicting_token_id_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", byte_level(400), {"added_tokens_decoder": {"9999": {"content": "<new>"}}})
    with pytest.raises(ModelError, match=r"'<new>' is 9999 in tokenizer_config\.json but 400 in the vocabulary"):
        load_tokenizer(folder)


def test_truncation_and_padding_of_tokenizer_json_are_off(tmp_path: Path) -> None:
    rust = byte_level()
    rust.enable_truncation(4)
    rust.enable_padding(length=100)
    tokenizer = load_tokenizer(save(tmp_path / "m", rust))
    [short, long] = tokenizer.encode_batch(["a", "b c d e f g h " * 20], True)
    assert len(short) == 1 and len(long) > 100


def test_end_of_sequence_ids_come_from_all_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", byte_level())
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(folder).eos_ids == {1, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 9]}')
    assert load_tokenizer(folder).eos_ids == {1, 3, 9}


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ({"chat_template": "T"}, None, "T"),
        ({"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]}, None, "D"),
        ({"chat_template": "T"}, "F\n", "F\n"),
        ({}, None, None),
    ],
)
def test_chat_template_precedence(config: dict, file: str | None, expected: str | None, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", byte_level(), config)
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    assert load_tokenizer(folder).chat_template == expected


def test_identity_changes_with_files_that_decide_the_ids(tmp_path: Path) -> None:
    first = load_tokenizer(save(tmp_path / "a", byte_level())).identity()
    assert load_tokenizer(save(tmp_path / "b", byte_level())).identity() == first
    assert load_tokenizer(save(tmp_path / "b", byte_level(), {"add_bos_token": True})).identity() != first
    assert load_tokenizer(save(tmp_path / "b", byte_level(400))).identity() != first


BOTH: dict[str, Callable[[Path], Tokenizer]] = {
    "bytes": lambda path: ByteTokenizer(),
    "byte level": lambda path: load_tokenizer(save(path / "m", byte_level())),
    "sentencepiece": lambda path: load_tokenizer(save(path / "m", sentencepiece())),
}


@pytest.mark.parametrize("name", BOTH)
def test_lone_surrogate_fails_only_its_own_text(name: str, tmp_path: Path) -> None:
    tokenizer = BOTH[name](tmp_path)
    texts = ["before", "bad \ud83d here", "", "\udcff", "after"]
    found = tokenizer.encode_batch(texts, False)
    assert isinstance(found[1], InvalidInput) and "U+D83D at character 4" in str(found[1])
    assert isinstance(found[3], InvalidInput)
    assert [found[0], found[2], found[4]] == tokenizer.encode_batch(["before", "", "after"], False)
    assert found[2] == []


def test_text_without_tokens_fails_only_itself(tmp_path: Path) -> None:
    rust = RustTokenizer(WordLevel({"yes": 0, "no": 1}))
    tokenizer = load_tokenizer(save(tmp_path / "m", rust, {"eos_token": None}))
    [yes, maybe, no] = tokenizer.encode_batch(["yes", "maybe", "no"], False)
    assert (yes, no) == ([0], [1])
    assert isinstance(maybe, InvalidInput) and "cannot be tokenized" in str(maybe)


@pytest.mark.parametrize("name", BOTH)
def test_megabyte_text_encodes(name: str, tmp_path: Path) -> None:
    tokenizer = BOTH[name](tmp_path)
    text = "hello a\x00b " * 100_000
    [ids] = tokenizer.encode_batch([text], False)
    assert tokenizer.decode_batch([ids], False) == [text]


@pytest.mark.parametrize("name", BOTH)
def test_unknown_ids_are_skipped_in_decoding(name: str, tmp_path: Path) -> None:
    tokenizer = BOTH[name](tmp_path)
    [ids] = tokenizer.encode_batch(["hello"], False)
    assert tokenizer.decode_batch([[*ids, 123_456]], True) == ["hello"]


@settings(deadline=None)
@given(texts=st.lists(st.text(), max_size=5))
def test_bytes_round_trip(texts: list[str]) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_batch(texts, True)
    assert ids == [list(text.encode()) for text in texts]
    assert tokenizer.decode_batch(ids, True) == texts


def test_byte_tokenizer_special_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_batch([[256, 104, 105, 257]], False) == ["<bos>hi<eos>"]
    assert tokenizer.decode_batch([[256, 104, 105, 257], [0xE2, 0x82]], True) == ["hi", "\ufffd"]
    assert tokenizer.encode_batch(["<bos>"], True) == [list(b"<bos>")]


def test_encoding_does_not_hold_the_gil(tmp_path: Path) -> None:
    """Tokenizing runs ahead of the engine in a thread: the engine's thread must get its turns meanwhile."""
    tokenizer = load_tokenizer(save(tmp_path / "m", byte_level()))
    texts = ["The quick brown fox 3.14159 " * 20_000] * 4
    worker = threading.Thread(target=tokenizer.encode_batch, args=(texts, False))
    turns = 0
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10  # one or two if it were held


def test_path_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        load_tokenizer(tmp_path / "missing")
    folder = save(tmp_path / "m", byte_level())
    (folder / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a usable tokenizer"):
        load_tokenizer(folder)
    save(tmp_path / "m", byte_level())
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: must hold a JSON object"):
        load_tokenizer(folder)


def test_vocab_json_is_converted_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of GPT-2 before tokenizer.json; without transformers the error says what to install."""
    rust = byte_level()
    rust.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    texts = [text for text in synthetic_texts(40) if "<" not in text]
    assert tokenizer.encode_batch(texts, False) == [e.ids for e in rust.encode_batch(texts, add_special_tokens=False)]

    real_import = builtins.__import__

    def without_transformers(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_transformers)
    with pytest.raises(ModelError, match=r"has no tokenizer\.json.*pip install transformers"):
        load_tokenizer(tmp_path)


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<end>", special=False),
        AddedToken("<end>", special=True, rstrip=True),
        AddedToken("<end>", special=True, lstrip=True, normalized=False),
        AddedToken("<end>", single_word=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "named only"])
def test_flags_of_added_tokens_are_kept(token: AddedToken, listed: bool, tmp_path: Path) -> None:
    """Phi-3's tokens swallow the spaces after them; naming one in tokenizer_config.json must not lose that."""
    rust = byte_level()
    rust.add_tokens([token])
    flags = {name: getattr(token, name) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
    entry = {str(rust.token_to_id("<end>")): {"content": "<end>", **flags}}
    save(tmp_path / "m", rust, {"eos_token": "<end>", **({"added_tokens_decoder": entry} if listed else {})})
    ours = load_tokenizer(tmp_path / "m")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "m"))
    texts = ["a<end>", "a <end> b", "x<end>\n\nb", "<end><end>", "a<end>b"]
    found = ours.encode_batch(texts, True)
    assert found == theirs(texts)["input_ids"]
    assert ours.decode_batch(found, True) == theirs.batch_decode(found, skip_special_tokens=True)


def test_damaged_added_tokens_are_refused(tmp_path: Path) -> None:
    for damaged in ([1], {"x": {"content": "a"}}, {"600": {"content": 3}}, {"600": "a"}, {"600": {}}):
        folder = save(tmp_path / "m", byte_level(), {"added_tokens_decoder": damaged})
        with pytest.raises(ModelError, match="added_tokens_decoder is damaged"):
            load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "added_tokens.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [("[" * 100_000, "nested too deeply"), ('{"bos_token": "\\ud800"}', "is not JSON"), ("[]", "object")],
)
def test_misplaced_file_content_is_described(name: str, content: str, said: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", byte_level(), {})
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=rf"{name}.*{said}"):
        load_tokenizer(folder)


def test_template_that_is_a_web_page_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", byte_level(), {})
    (folder / "chat_template.jinja").write_text("<!DOCTYPE html><html>{{ nothing }}</html>")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is a web page"):
        load_tokenizer(folder)


def test_invalid_eos_ids_are_skipped(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", byte_level(), {})
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, -1, "7", null, true, 2.0]}')
    assert load_tokenizer(folder).eos_ids == {1, 3}
