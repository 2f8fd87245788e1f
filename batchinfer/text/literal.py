"""Encoder for texts in which some control-token spellings are plain text."""

from __future__ import annotations

import secrets

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from batchinfer.errors import InvalidInput
from batchinfer.text.control import ControlTokens, PromptText

_EDGE = "\U000f0000"  # around stand-in names; a private use character


class LiteralEncoder:
    """Copy of a tokenizer that parses no control token; real ones are encoded under secret stand-in names.

    So the surrounding text is split, normalized and merged by the tokenizer as one text.
    """

    def __init__(self, rust: RustTokenizer, control: ControlTokens, ids: frozenset[int], unknown: int | None) -> None:
        """Build the copy.

        ids: ids of the control tokens. unknown: id of the unknown token, which plain text may become.
        """
        copied = RustTokenizer.from_str(rust.to_str())
        copied.encode_special_tokens = True
        key = secrets.token_hex(8)  # so that no text can contain a stand-in name
        self._names: dict[str, str] = {}
        self._ids: dict[int, int] = {}
        for token_id, token in rust.get_added_tokens_decoder().items():
            if token_id not in ids:
                continue
            if not token.special:
                token.special = True
                copied.add_special_tokens([token])
            self._add(copied, token, f"{_EDGE}{key}:{token_id}{_EDGE}", token_id)
        self._border = f"{_EDGE}{key}{_EDGE}"  # splits a text in two; removed from the ids
        copied.add_tokens([AddedToken(self._border, normalized=False)])
        self._border_id = copied.token_to_id(self._border)
        self._rust = copied
        self._control = control
        self._refused = ids - {unknown}

    def encode(self, text: PromptText, add_special_tokens: bool) -> list[int] | InvalidInput:
        """Return the ids of a text. Raises the library's exception for a text that it cannot encode."""
        ids = self._encode(self._named(text, ""), add_special_tokens)
        if ids is None:  # the vocabulary has the control token's spelling as a word: split it in two
            ids = self._encode(self._named(text, self._border), add_special_tokens)
        if ids is None:
            return InvalidInput("the text spells a control token that this tokenizer has no other tokens for")
        return ids

    def _add(self, copied: RustTokenizer, token: AddedToken, name: str, token_id: int) -> None:
        flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        copied.add_tokens([AddedToken(name, special=False, **flags)])
        added = copied.token_to_id(name)
        assert added is not None, "a token that was just added"
        self._names[token.content] = name
        self._ids[added] = token_id

    def _named(self, text: PromptText, border: str) -> str:
        """Return `text` with stand-in names for real control tokens, and with `border` inside the literal ones."""
        literal, pieces, at = set(text.literal), [], 0
        for found in self._control.find(text):
            start, end = found.span()
            inner = text[start] + border + text[start + 1 : end] if start in literal else self._names[found[0]]
            pieces += [text[at:start], inner]
            at = end
        return "".join([*pieces, text[at:]])

    def _encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """Return the ids, or None if a literal control token was parsed as one."""
        encoding = self._rust.encode(text, add_special_tokens=add_special_tokens)
        added = encoding.special_tokens_mask  # tokens that the tokenizer adds around a text
        pairs = [(token, mask) for token, mask in zip(encoding.ids, added, strict=True) if token != self._border_id]
        if any(token in self._refused and not mask for token, mask in pairs):
            return None
        return [self._ids.get(token, token) for token, _ in pairs]
