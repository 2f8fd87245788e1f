"""Tests of tokenizers from GGUF metadata, against llama.cpp's two algorithms written out naively."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from batchinfer.errors import ModelError
from batchinfer.text.gguf_tokenizer import _PRE
from batchinfer.text.pieces import BYTE_ALPHABET
from batchinfer.text.tokenizer import Tokenizer, load_tokenizer

from .texts import HOSTILE, synthetic_texts

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def write(path: Path, values: dict[str, Any]) -> Path:
    """Write a GGUF file that holds only a tokenizer."""
    writer = GGUFWriter(path, "llama")
    for name, value in values.items():
        key = name if name.startswith(("general.", "tokenizer.")) else f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# ---- sentencepiece

PIECES = [
    "▁",
    *"abcdnorté",
    "▁a",
    "ab",
    "ba",
    "abc",
    "▁▁",
    "▁ab",
    "an",
    "and",
    "▁and",
    "or",
    "nor",
    "▁nor",
    "to",
    "▁to",
    "cab",
]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<|user|>", "::"]
SPM_TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), CONTROL, USER]
# scores that do not follow the order of the ids, none twice
SPM_SCORES = [0.0] * 259 + [-float((7 * i) % 31) - i / 100 for i in range(len(PIECES))] + [0.0, 0.0]


def spm_file(folder: Path, **values: Any) -> Path:
    base = {"model": "llama", "pre": "default", "tokens": SPM_TOKENS, "token_type": SPM_TYPES, "scores": SPM_SCORES}
    return write(folder / "spm.gguf", {**base, "bos_token_id": 1, "eos_token_id": 2, **values})


def naive_spm(text: str, prefix: bool) -> list[int]:
    """llm_tokenizer_spm of llama.cpp: always the adjacent pair with the best score, the leftmost of equals."""
    ids = {token: i for i, token in enumerate(SPM_TOKENS)}
    found = []
    for part in regex.split(r"(<unk>|<s>|</s>|<\|user\|>|::)", text):
        if part in ids and SPM_TYPES[ids[part]] in (UNKNOWN, CONTROL, USER):
            found.append(ids[part])
            continue
        symbols = list(("▁" if prefix and part else "") + part.replace(" ", "▁"))
        while True:
            pairs = [(SPM_SCORES[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
            if not pairs:
                break
            at = -max(pairs)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            found.extend([ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()])
    return found


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Tokenizer]:
    folder = tmp_path_factory.mktemp("spm")
    return {prefix: load_tokenizer(spm_file(folder, add_space_prefix=prefix)) for prefix in (True, False)}


@settings(deadline=None, max_examples=200)
@given(
    text=st.lists(
        st.sampled_from(["a", "b", "c", "an", "d", " ", "  ", "or", "nor", "to", "é", "中", "<|user|>", "::", "\n"])
    ).map("".join),
    prefix=st.booleans(),
)
def test_sentencepiece_equals_the_naive_algorithm(spm: dict[bool, Tokenizer], text: str, prefix: bool) -> None:
    tokenizer = spm[prefix]
    assert tokenizer.encode_batch([text], False) == [naive_spm(text, prefix)]
    assert tokenizer.encode_batch([text], True) == [[1, *naive_spm(text, prefix)]]


def test_sentencepiece_bos_and_eos_flags_are_applied(tmp_path: Path) -> None:
    assert load_tokenizer(spm_file(tmp_path, add_bos_token=False)).encode_batch(["ab"], True) == [naive_spm("ab", True)]
    both = load_tokenizer(spm_file(tmp_path, add_eos_token=True))
    assert both.encode_batch(["ab"], True) == [[1, *naive_spm("ab", True), 2]]
    assert both.encode_batch(["ab"], False) == [naive_spm("ab", True)]


def test_sentencepiece_decodes_bytes_and_spaces(spm: dict[bool, Tokenizer]) -> None:
    for prefix, tokenizer in spm.items():
        # llama.cpp puts the space of the prefix after user-defined tokens as well, and so the text has it
        texts = ["ab  cab", "中a", " and", "\n", *([] if prefix else ["a::b"])]
        assert tokenizer.decode_batch(tokenizer.encode_batch(texts, False), False) == texts  # type: ignore[arg-type]
        ids = SPM_TOKENS.index("▁and")
        assert tokenizer.decode_batch([[1, ids, 2]], True) == ["and" if prefix else " and"]


# ---- byte-level BPE

BYTE_CHARS = {byte: char for char, byte in BYTE_ALPHABET.items()}
MERGES = [
    "h e",
    "l l",
    "he ll",
    "hell o",
    "Ġ hello",
    "1 2",
    "12 3",
    "3 4",
    "Ġ 1",
    "Ġ Ġ",
    "Ċ Ċ",
    "' s",
    "Ġ t",
    "Ġt he",
    "! !",
]
BPE_TOKENS = [
    *BYTE_CHARS.values(),
    *(merge.replace(" ", "") for merge in MERGES),
    "Ġhello",
    "<|eot|>",
    "<|im_end|>",
    "<think>",
]
BPE_TOKENS = list(dict.fromkeys(BPE_TOKENS))
BPE_TYPES = [CONTROL if t in ("<|eot|>", "<|im_end|>") else USER if t == "<think>" else NORMAL for t in BPE_TOKENS]


def bpe_file(folder: Path, pre: str, **values: Any) -> Path:
    ids = {"bos_token_id": BPE_TOKENS.index("<|eot|>"), "eos_token_id": BPE_TOKENS.index("<|eot|>")}
    base = {"model": "gpt2", "pre": pre, "tokens": BPE_TOKENS, "token_type": BPE_TYPES, "merges": MERGES, **ids}
    return write(folder / "bpe.gguf", {**base, **values})


def naive_words(text: str, splits: tuple[str, ...]) -> list[str]:
    """unicode_regex_split of llama.cpp: each expression splits what the one before left, matches and gaps alike."""
    words = [text]
    for split in splits:
        cut = []
        for word in words:
            position = 0
            for match in regex.finditer(split, word):
                cut.extend([word[position : match.start()], match[0]])
                position = match.end()
            cut.append(word[position:])
        words = [word for word in cut if word]
    return words


def naive_bpe(text: str, splits: tuple[str, ...], whole_words: bool) -> list[int]:
    ids = {token: i for i, token in enumerate(BPE_TOKENS)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(MERGES)}
    found = []
    for part in regex.split(r"(<\|eot\|>|<\|im_end\|>|<think>)", text):
        if part in ("<|eot|>", "<|im_end|>", "<think>"):
            found.append(ids[part])
            continue
        for word in naive_words(part, splits):
            symbols = [BYTE_CHARS[byte] for byte in word.encode()]
            if whole_words and "".join(symbols) in ids:
                symbols = ["".join(symbols)]
            while True:
                pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
                if not pairs:
                    break
                at = min(pairs)[1]
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            found.extend(ids[symbol] for symbol in symbols)
    return found


@pytest.mark.parametrize("pre", sorted(_PRE))
def test_every_pre_tokenizer_equals_the_naive_algorithm(pre: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe_file(tmp_path, pre))
    texts = [*synthetic_texts(40), *HOSTILE[:16], "hello hello 12345 hello's  !! <think>12<|eot|> hello<|im_end|>"]
    whole_words = pre.startswith(("llama3", "llama-", "falcon3", "falcon-h1", "pixtral", "midm", "lfm2", "tekken"))
    assert tokenizer.encode_batch(texts, False) == [naive_bpe(text, _PRE[pre], whole_words) for text in texts]
    begins = tokenizer.encode_batch(["hello"], True) != tokenizer.encode_batch(["hello"], False)
    assert begins == whole_words  # these begin with bos unless the file says otherwise
    assert tokenizer.decode_batch(tokenizer.encode_batch(texts, False), False) == texts  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "in 2024!", ["in", " ", "2", "0", "2", "4", "!"]),
        ("llama-bpe", "in 12345!", ["in", " ", "123", "45", "!"]),
        ("qwen2", "in 123 IT'S", ["in", " ", "1", "2", "3", " IT", "'S"]),
        ("gpt-2", "in 123 it's", ["in", " 123", " it", "'s"]),
        ("default", "a=123456", ["a", "=", "123", "456"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
    ],
)
def test_pre_tokenizer_splits_text_as_in_training(pre: str, text: str, words: list[str]) -> None:
    """Literal expectations: the naive algorithm above shares the expressions with the code under test."""
    assert naive_words(text, _PRE[pre]) == words


def test_smollm_splits_digits_then_gpt2() -> None:
    """What SmolLM2's own tokenizer.json says."""
    theirs = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in [*synthetic_texts(100), *HOSTILE]:
        words = ["".join(BYTE_CHARS[byte] for byte in word.encode()) for word in naive_words(text, _PRE["smollm"])]
        assert words == [word for word, _ in theirs.pre_tokenize_str(text)]


def test_eos_ids_include_named_end_tokens(tmp_path: Path) -> None:
    eot, im_end, think = (BPE_TOKENS.index(token) for token in ("<|eot|>", "<|im_end|>", "<think>"))
    assert load_tokenizer(bpe_file(tmp_path, "gpt-2")).eos_ids == {eot, im_end}
    assert load_tokenizer(bpe_file(tmp_path, "gpt-2", eom_token_id=think)).eos_ids == {eot, im_end, think}


def test_special_tokens_and_template_come_from_the_metadata(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe_file(tmp_path, "gpt-2", **{"tokenizer.chat_template": "{{ bos_token }}"}))
    assert tokenizer.special_tokens == {"bos_token": "<|eot|>", "eos_token": "<|eot|>"}
    assert tokenizer.chat_template == "{{ bos_token }}"
    [ids] = tokenizer.encode_batch(["<think>hello<|im_end|>"], False)
    assert tokenizer.decode_batch([ids], True) == ["<think>hello"]  # user-defined tokens are text, control ones are not


def test_phi3_strips_spaces_after_special_tokens(tmp_path: Path) -> None:
    by_name = load_tokenizer(spm_file(tmp_path, **{"general.name": "Phi-3-mini"}))
    assert by_name.encode_batch(["<|user|>\n ab"], False) == by_name.encode_batch(["<|user|>ab"], False)


def test_identity_changes_with_the_vocabulary(tmp_path: Path) -> None:
    first = load_tokenizer(bpe_file(tmp_path, "gpt-2")).identity()
    assert load_tokenizer(bpe_file(tmp_path, "gpt-2")).identity() == first
    assert load_tokenizer(bpe_file(tmp_path, "smollm")).identity() != first
    assert load_tokenizer(bpe_file(tmp_path, "gpt-2", merges=MERGES[:-1])).identity() != first


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pre": "no-such"}, r"pre-tokenizer 'no-such' is not known; known: .*smollm.*tokenizer:"),
        ({"model": "t5"}, r"GGUF tokenizer 't5' is not supported; known: gpt2, llama"),
        ({"merges": ["h e", "nospace"]}, r"the merge 'nospace' does not have two halves"),
        ({"merges": ["zz yy"]}, r"the tokenizer in the metadata is damaged: .*zz"),
        ({"token_type": [1, 1]}, r"tokens but 2 token types"),
    ],
)
def test_unusable_metadata_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_tokenizer(bpe_file(tmp_path, **{"pre": "gpt-2", **values}))


def test_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no 'tokenizer\.ggml\.model'"):
        load_tokenizer(write(tmp_path / "x.gguf", {}))
