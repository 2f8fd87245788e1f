"""Tokenizer of a GGUF file, built from its metadata with llama.cpp's ids.

Source: src/llama-vocab.cpp of llama.cpp: vocabulary kinds, regular expressions of each named pre-tokenizer, default
flags, and tokens that end a generation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from batchinfer.errors import ModelError
from batchinfer.models.gguf_header import GGUFHeader, read_header
from batchinfer.text.fast import FastTokenizer, TokenizerFacts, set_framing
from batchinfer.text.spm import CONTROL, UNKNOWN, USER_DEFINED, PieceTable, SpaceRules, bpe_tokenizer

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _CASED_TAIL
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}" + _CASED_TAIL
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# pre-tokenizer names → regular expressions that split the text in turn
_SPLITS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "mellum", "exaone4"): (_GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): (r"\p{N}", _GPT2),
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ("falcon",): (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): (_LLAMA3,),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): (_LLAMA3,),
    ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"): (_QWEN2,),
    ("qwen35",): (_QWEN35,),
    ("tekken",): (_TEKKEN,),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): (_GPT4O,),
    ("deepseek-v3", "hunyuan-dense"): (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
    ("poro-chat", "bloom", "gpt3-finnish"): (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    ("viking",): (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"),
}
_PRE = {name: splits for names, splits in _SPLITS.items() for name in names}
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"})
_WHOLE_WORDS |= {"tekken"}  # these look up whole words before merging, and add bos by default

# tokens that llama.cpp treats as the end of a turn by name, whatever the metadata says (without </s>, which it has for
# the sake of one model: in Gemma's vocabulary that is the end of struck-out HTML)
_END_NAMES = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"),
        "<｜end▁of▁sentence｜>",
    }
)
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {"bos": 11, "eos": 11}}


def load_gguf(path: Path) -> FastTokenizer:
    """Build the tokenizer of a GGUF file.

    Raises ModelError for a file without a usable vocabulary, and for an unknown kind of tokenizer.
    """
    header = read_header(path)
    model = header.need("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ModelError(f"{path}: GGUF tokenizer {model!r} is not supported; known: gpt2, llama. Give `tokenizer:`")
    tokens, types = _vocabulary(header)
    try:
        rust = _byte_level(header, tokens) if model == "gpt2" else _sentencepiece(header, tokens, types)
    except ModelError:
        raise
    except Exception as error:  # the library raises plain Exception, for a merge of unknown tokens and the like
        raise ModelError(f"{path}: the tokenizer in the metadata is damaged: {error}") from None
    _add_tokens(header, rust, tokens, types)
    named = _special_tokens(header, tokens, model)
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    add_bos = header.metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in _WHOLE_WORDS)
    add_eos = header.metadata.get("tokenizer.ggml.add_eos_token", False)
    if add_bos or add_eos:
        set_framing(rust, named.get("bos_token") if add_bos else None, named.get("eos_token") if add_eos else None)
    template = header.metadata.get("tokenizer.chat_template")
    facts = TokenizerFacts(_digest(header), _eos_ids(header, tokens, named), named, template)
    return FastTokenizer(rust, facts)


def _vocabulary(header: GGUFHeader) -> tuple[list[str], list[int]]:
    """Return tokens by id, and their types; empty tokens get a name, because ids must not shift."""
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(header.need("tokenizer.ggml.tokens"))]
    types = header.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) < len(tokens):
        raise ModelError(f"{header.path}: {len(tokens)} tokens but {len(types)} token types")
    return tokens, types


def _byte_level(header: GGUFHeader, tokens: list[str]) -> RustTokenizer:
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE:
        raise ModelError(
            f"{header.path}: pre-tokenizer {pre!r} is not known; known: {', '.join(sorted(_PRE))}. "
            "Give the directory or id of the original model as `tokenizer:`"
        )
    merges = [_halves(header.path, merge) for merge in header.need("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    rust = RustTokenizer(BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _PRE[pre]]
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    rust.decoder = decoders.ByteLevel()
    return rust


def _halves(path: Path, merge: str) -> tuple[str, str]:
    """Split "a b" into ("a", "b"); the first half has at least one character, which may be a space."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise ModelError(f"{path}: the merge {merge!r} does not have two halves")
    return merge[:cut], merge[cut + 1 :]


def _sentencepiece(header: GGUFHeader, tokens: list[str], types: list[int]) -> RustTokenizer:
    scores = header.need("tokenizer.ggml.scores")
    if len(scores) < len(tokens):
        raise ModelError(f"{header.path}: {len(tokens)} tokens but {len(scores)} scores")
    rules = SpaceRules(prefix=header.metadata.get("tokenizer.ggml.add_space_prefix", True))
    return bpe_tokenizer(PieceTable(tokens, types, scores), rules)


def _add_tokens(header: GGUFHeader, rust: RustTokenizer, tokens: list[str], types: list[int]) -> None:
    """Register the tokens that are matched in text first: control tokens, which are special, and user-defined ones."""
    # Phi-3's special tokens strip the spaces after them; the file lacks the flag, and llama.cpp goes by the name
    name = str(header.metadata.get("general.name", "")).lower()
    strips = "phi-3" in name or "phi3" in name
    special, plain = [], []
    for token, kind in zip(tokens, types, strict=False):
        rstrip = strips and token not in ("<unk>", "<s>", "<|endoftext|>")
        if kind in (CONTROL, UNKNOWN) or token in _END_NAMES:
            special.append(AddedToken(token, special=True, normalized=False, rstrip=rstrip))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False, rstrip=rstrip))
    rust.add_special_tokens(special)
    rust.add_tokens(plain)


def _special_tokens(header: GGUFHeader, tokens: list[str], model: str) -> dict[str, str]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    named = {}
    for name, key in keys.items():
        token_id = header.metadata.get(f"tokenizer.ggml.{key}_token_id", _DEFAULT_IDS[model].get(key))
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            named[f"{name}_token"] = tokens[token_id]
    return named


def _eos_ids(header: GGUFHeader, tokens: list[str], named: dict[str, str]) -> frozenset[int]:
    keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    ids = {header.metadata[key] for key in keys if isinstance(header.metadata.get(key), int)}
    ends = {token for token in tokens if token in _END_NAMES} | {named.get("eos_token")}
    # if <|return|> and <|call|> end a turn, <|end|> only ends a message within it
    if {"<|return|>", "<|call|>"} <= ends:
        ends.discard("<|end|>")
    return frozenset(ids | {i for i, token in enumerate(tokens) if token in ends})


def _digest(header: GGUFHeader) -> str:
    digest = hashlib.sha256()
    for key in sorted(key for key in header.metadata if key.startswith("tokenizer.")):
        digest.update(f"{key}\0".encode())
        for part in _parts(header.metadata[key]):
            digest.update(f"{part!r}\0".encode(errors="surrogatepass"))
    digest.update(str(header.metadata.get("general.name")).encode())  # see _add_tokens
    return digest.hexdigest()


def _parts(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]
