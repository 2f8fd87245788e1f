"""Reader of sentencepiece's `tokenizer.model`, without its library, with sentencepiece's own ids.

transformers 5 builds these tokenizers from the class that tokenizer_config.json names and drops the file's own
normalization (compared on models with NFKC, without a leading space and of the unigram kind); the file is
authoritative. The format is src/sentencepiece_model.proto of google/sentencepiece, in protobuf's wire encoding
(https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from batchinfer.errors import ModelError
from batchinfer.models.file_kind import said
from batchinfer.text.fast import set_framing
from batchinfer.text.spm import CONTROL, UNKNOWN, USER_DEFINED, PieceTable, SpaceRules, bpe_tokenizer, unigram_tokenizer

_UNIGRAM, _BPE = 1, 2
_NAMED = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}  # field, default id


@dataclass(frozen=True)
class SentencePieceModel:
    """Parsed content of the file. `named` are its special tokens ("bos_token" → "<s>")."""

    pieces: PieceTable
    kind: int
    byte_fallback: bool
    charsmap: bytes
    prefix: bool
    collapse: bool
    named: Mapping[str, str]


def load_sentencepiece(path: Path, config: Mapping[str, Any]) -> tuple[RustTokenizer, Mapping[str, str]]:
    """Return the tokenizer, and the special tokens that the file names.

    config: tokenizer_config.json, for `add_bos_token` and `add_eos_token`. Raises ModelError for a file that is not
    sentencepiece's, or of an unsupported kind.
    """
    data = path.read_bytes()
    try:
        model = _parse(data)
        if model.kind in (_UNIGRAM, _BPE):
            return _build(model, config), model.named
    except Exception as error:  # the library raises plain Exception for invalid content
        raise ModelError(f"{path} {said(path, _describe_content(data, error))}") from None
    raise ModelError(f"{path}: a sentencepiece model of words or characters; only BPE and unigram are supported")


def _describe_content(data: bytes, error: Exception) -> str:
    word, _, rank = data.partition(b"\n")[0].partition(b" ")
    if word and rank.strip().isdigit():
        return (
            "is a tiktoken vocabulary, which defines neither text splitting nor special tokens: provide a "
            "tokenizer.json"
        )
    return f"is not a sentencepiece model: {error}"


def _build(model: SentencePieceModel, config: Mapping[str, Any]) -> RustTokenizer:
    rules = SpaceRules(model.prefix, model.collapse)
    pieces = model.pieces
    if model.kind == _BPE:
        rust = bpe_tokenizer(pieces, rules, model.charsmap)
    else:
        rust = unigram_tokenizer(pieces, rules, model.charsmap, model.byte_fallback)
    special = [text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind in (CONTROL, UNKNOWN)]
    plain = [text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind == USER_DEFINED]
    rust.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    rust.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    bos = model.named.get("bos_token") if config.get("add_bos_token", True) else None
    eos = model.named.get("eos_token") if config.get("add_eos_token", False) else None
    if bos is not None or eos is not None:
        set_framing(rust, bos, eos)
    return rust


def _parse(data: bytes) -> SentencePieceModel:
    """Parse the file. Raises ValueError and other built-in exceptions for damage."""
    pieces: list[tuple[str, int, float]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((_text(piece), piece.get(3, 1), _float(piece.get(2, bytes(4)))))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces or not trainer:
        raise ValueError("it has no pieces, or no trainer specification")
    texts, types, scores = zip(*pieces, strict=True)
    named = {}
    for name, (field, default) in _NAMED.items():
        token_id = _signed(trainer.get(field, default))
        if 0 <= token_id < len(texts):
            named[name] = texts[token_id]
    return SentencePieceModel(
        PieceTable(texts, types, scores),
        kind=trainer.get(3, _UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        prefix=bool(normalizer.get(3, 1)),
        collapse=bool(normalizer.get(4, 1)),
        named=named,
    )


def _text(piece: Mapping[int, Any]) -> str:
    if 1 not in piece:
        raise ValueError("it has a piece without text")
    return str(piece[1], "utf-8")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield field numbers and values (int or bytes) of one message. Raises ValueError, IndexError for damage."""
    if not isinstance(data, bytes):
        raise ValueError("it has a number instead of a message")
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            length, position = _varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if position + length > len(data):
            raise ValueError(f"it ends inside a field at byte {position}")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"an unterminated number at byte {position}")


def _float(data: bytes) -> float:
    return float(struct.unpack("<f", data)[0])


def _signed(value: int) -> int:
    """Decode an int32 or int64 of protobuf: negative numbers are their 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value
