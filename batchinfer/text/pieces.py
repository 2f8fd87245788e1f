"""Incremental decoders: text of one token at a time, in constant time, for stop strings and streaming.

The three kinds of decoders of language models: bytes (byte-level BPE), sentencepiece with byte fallback, and for any
other decoder a short window that is decoded again. Each gives the same text as decoding all tokens at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Hashable
from typing import Protocol

_WINDOW_TOKENS = 16  # limit for text without a valid end; a character has at most 4 bytes


class Pieces(Protocol):
    """Incremental decoder: `push` returns the text settled by a token; `pending` is text that may still change.

    A shallow copy continues independently. Decoders with equal `state` give equal text for equal tokens; the state None
    equals no other.
    """

    def push(self, token_id: int) -> str: ...

    @property
    def pending(self) -> str: ...

    @property
    def state(self) -> Hashable: ...


class BytePieces:
    """Decoder of byte tokens: UTF-8, with U+FFFD for an incomplete character until it is complete."""

    def __init__(self, token_bytes: Callable[[int], bytes], skip: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skip = skip
        self._cut = b""  # bytes of an incomplete character

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        data = self._cut + self._token_bytes(token_id)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._cut = data[used:]
        return text

    @property
    def pending(self) -> str:
        # usually one U+FFFD; two for the first bytes of a surrogate, which no byte can complete
        return self._cut.decode(errors="replace")

    @property
    def state(self) -> bytes:
        return self._cut


class SentencePieces:
    """Decoder of sentencepiece tokens: ▁ is a space, <0x0A> a byte.

    A run of byte tokens is UTF-8 text if all of it is valid, else one U+FFFD per byte.

    `strip` drops one space at the very beginning of the text.
    """

    def __init__(self, id_to_token: Callable[[int], str | None], skip: frozenset[int], strip: bool) -> None:
        self._id_to_token = id_to_token
        self._skip = skip
        self._strip = strip
        self._run = b""

    def push(self, token_id: int) -> str:
        token = None if token_id in self._skip else self._id_to_token(token_id)
        if token is None:
            return ""
        value = _fallback_byte(token)
        if value is not None:
            self._run += value
            return ""
        return self._settle(self._close() + token.replace("▁", " "))

    @property
    def pending(self) -> str:
        text = _run_text(self._run)
        return text.removeprefix(" ") if self._strip and text.startswith(" ") else text

    @property
    def state(self) -> tuple[bytes, bool] | None:
        return (self._run, self._strip) if len(self._run) < _WINDOW_TOKENS else None

    def _close(self) -> str:
        run, self._run = self._run, b""
        return _run_text(run)

    def _settle(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class DecodedPieces:
    """Decoder for any tokenizer: decodes the last few tokens with and without the new one.

    The difference is the new text.
    """

    def __init__(self, decode: Callable[[list[int]], str], skip: frozenset[int]) -> None:
        self._decode = decode
        self._skip = skip
        self._context: tuple[int, ...] = ()  # settled tokens, decoded before the new ones
        self._new: tuple[int, ...] = ()
        self._before = ""  # text of the context

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._new = (*self._new, token_id)
        text = self._text()
        unsettled = len(text) <= len(self._before) or text.endswith("\ufffd")
        if unsettled and len(self._new) < _WINDOW_TOKENS:
            return ""
        settled = text[len(self._before) :]
        self._context, self._new = self._new, ()
        self._before = self._text()
        return settled

    @property
    def pending(self) -> str:
        return self._text()[len(self._before) :] if self._new else ""

    @property
    def state(self) -> None:
        return None

    def _text(self) -> str:
        return self._decode([*self._context, *self._new])


def _fallback_byte(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes((int(token[3:5], 16),))
        except ValueError:
            return None
    return None


def sentencepiece_bytes(token: str) -> bytes:
    """Return the bytes of a token of a sentencepiece vocabulary."""
    byte = _fallback_byte(token)
    return token.replace("▁", " ").encode() if byte is None else byte


def _run_text(run: bytes) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable character for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


_CHARACTERS = {byte: char for char, byte in BYTE_ALPHABET.items()}


def byte_level_text(data: bytes) -> str:
    """Return the token of a byte-level vocabulary for these bytes."""
    return "".join(_CHARACTERS[byte] for byte in data)


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; an added token with other characters is its own UTF-8 text."""
    try:
        return bytes([BYTE_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()
