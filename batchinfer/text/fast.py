"""Tokenizer of the `tokenizers` library, which runs in Rust with the GIL released."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.processors import TemplateProcessing

from batchinfer.errors import InvalidInput
from batchinfer.text.control import ControlTokens, PromptText
from batchinfer.text.literal import LiteralEncoder
from batchinfer.text.pieces import (
    BytePieces,
    DecodedPieces,
    Pieces,
    SentencePieces,
    byte_level_bytes,
    sentencepiece_bytes,
)

_SENTENCEPIECE_STEPS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@dataclass(frozen=True)
class TokenizerFacts:
    """Facts outside the vocabulary. `source_digest` is a hash of the files that decide the ids."""

    source_digest: str
    eos_ids: frozenset[int] = frozenset()
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None


class FastTokenizer:
    """Tokenizer backed by the `tokenizers` library."""

    def __init__(self, rust: RustTokenizer, facts: TokenizerFacts) -> None:
        # tokenizer.json may enable truncation, but text is never cut silently
        rust.no_truncation()
        rust.no_padding()
        self._rust = rust
        self._digest = facts.source_digest
        added = rust.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(rust.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        self.eos_ids = facts.eos_ids
        self.special_tokens = facts.special_tokens
        self.chat_template = facts.chat_template
        bos = facts.special_tokens.get("bos_token")
        self.bos_id: int | None = None if bos is None else rust.token_to_id(bos)
        self._control_ids = self.special_ids | (facts.eos_ids & added.keys())
        control = [added[token_id] for token_id in self._control_ids]
        normalized = rust.normalizer is not None and any(token.normalized for token in control)
        self.control = ControlTokens([token.content for token in control], normalized)
        self._decoder = json.loads(rust.decoder.__getstate__()) if rust.decoder is not None else None
        self._bytes: dict[int, bytes] = {}

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int] | InvalidInput]:
        plain = [text for text in texts if not isinstance(text, PromptText)]
        try:
            encodings = iter(self._rust.encode_batch_fast(plain, add_special_tokens=add_special_tokens))
        except Exception:  # one invalid text fails the whole batch
            return [self._encode(text, add_special_tokens) for text in texts]
        return [
            self._encode(text, add_special_tokens) if isinstance(text, PromptText) else next(encodings).ids
            for text in texts
        ]

    @functools.cached_property
    def _literal(self) -> LiteralEncoder:
        """Return the literal encoder, built on first use because most jobs never need it."""
        unknown = self._rust.token_to_id(self.special_tokens.get("unk_token", ""))
        return LiteralEncoder(self._rust, self.control, self._control_ids, unknown)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int] | InvalidInput:
        try:
            if isinstance(text, PromptText):
                return self._literal.encode(text, add_special_tokens)
            ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library raises plain Exception for text without tokens
            return unicode_error(text) or InvalidInput(f"the text cannot be tokenized: {error}")
        return ids

    def decode_batch(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return self._rust.decode_batch(ids, skip_special_tokens=skip_special_tokens)

    def pieces(self, skip_special_tokens: bool) -> Pieces:
        skip = self.special_ids if skip_special_tokens else frozenset()
        if self._decoder is not None and self._decoder["type"] == "ByteLevel":
            return BytePieces(self.bytes_of, skip)
        spaced = sentencepiece_strip(self._decoder)
        if spaced is not None:
            return SentencePieces(self._rust.id_to_token, skip, strip=spaced)
        return DecodedPieces(lambda ids: self._rust.decode(ids, skip_special_tokens=False), skip)

    def token_bytes(self) -> list[bytes] | None:
        if self._decoder is not None and self._decoder["type"] == "ByteLevel":
            return [self.bytes_of(token_id) for token_id in range(self.vocab_size)]
        metaspace = self._decoder is not None and self._decoder["type"] == "Metaspace"
        if not metaspace and sentencepiece_strip(self._decoder) is None:
            return None
        return [sentencepiece_bytes(self._rust.id_to_token(token_id) or "") for token_id in range(self.vocab_size)]

    def bytes_of(self, token_id: int) -> bytes:
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._look_up(token_id)
        return data

    def _look_up(self, token_id: int) -> bytes:
        token = self._rust.id_to_token(token_id)
        if token is None:
            return b""
        if self._decoder is not None and self._decoder["type"] == "ByteLevel":
            return byte_level_bytes(token)
        if sentencepiece_strip(self._decoder) is not None and token_id not in self.special_ids:
            return sentencepiece_bytes(token)
        return self._rust.decode([token_id], skip_special_tokens=False).encode()

    def name_of(self, token_id: int) -> str:
        return self._rust.id_to_token(token_id) or ""

    def identity(self) -> str:
        return self._digest


def sentencepiece_strip(decoder: Mapping[str, Any] | None) -> bool | None:
    """Return True if a sentencepiece decoder strips one leading space; None for any other kind of decoder."""
    steps = decoder["decoders"] if decoder is not None and decoder["type"] == "Sequence" else []
    if steps[:3] != _SENTENCEPIECE_STEPS or steps[3:] not in ([], [_STRIP]):
        return None
    return steps[3:] == [_STRIP]


def set_framing(rust: RustTokenizer, bos: str | None, eos: str | None) -> None:
    """Add these tokens before and after every text that is encoded with special tokens."""
    ids = {token: rust.token_to_id(token) for token in (bos, eos) if token is not None}
    before = [bos] if bos is not None and ids[bos] is not None else []
    after = [eos] if eos is not None and ids[eos] is not None else []
    rust.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(token, number) for token, number in ids.items() if number is not None],
    )


def unicode_error(text: str) -> InvalidInput | None:
    r"""Return the error of a text that cannot be encoded as UTF-8 (JSON's \\ud800 and the like), or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return InvalidInput(f"the text is not valid Unicode: lone surrogate U+{code:04X} at character {error.start}")
    return None
