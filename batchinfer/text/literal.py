"""Encodes texts in which some control tokens are meant as such and others are text that only looks like them."""

from __future__ import annotations

import secrets

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from batchinfer.errors import InvalidInput
from batchinfer.text.control import ControlTokens, PromptText

_EDGE = "\U000f0000"  # around names of the stand-ins; Unicode gives it no meaning


class LiteralEncoder:
    """A copy of a tokenizer that takes no control token for one; those that are meant go in under another name.

    So everything around them is split, normalized and merged as the tokenizer does it, in one text.
    """

    def __init__(self, rust: RustTokenizer, control: ControlTokens, ids: frozenset[int], unknown: int | None) -> None:
        """ids: of the control tokens. unknown: of the token for what the vocabulary lacks, which text may become."""
        copied = RustTokenizer.from_str(rust.to_str())
        copied.encode_special_tokens = True
        key = secrets.token_hex(8)  # so that no text can hold a name
        self._names: dict[str, str] = {}
        self._ids: dict[int, int] = {}
        for token_id, token in rust.get_added_tokens_decoder().items():
            if token_id not in ids:
                continue
            if not token.special:
                token.special = True
                copied.add_special_tokens([token])
            self._add(copied, token, f"{_EDGE}{key}:{token_id}{_EDGE}", token_id)
        self._border = f"{_EDGE}{key}{_EDGE}"  # between two halves of a text; it becomes no token
        copied.add_tokens([AddedToken(self._border, normalized=False)])
        self._border_id = copied.token_to_id(self._border)
        self._rust = copied
        self._control = control
        self._refused = ids - {unknown}

    def encode(self, text: PromptText, add_special_tokens: bool) -> list[int] | InvalidInput:
        """Raises what the library raises for a text that it cannot encode."""
        ids = self._encode(self._named(text, ""), add_special_tokens)
        if ids is None:  # a vocabulary that has the name of a control token among its words: cut it in two
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
        """`text` with the names of the control tokens that are meant, and with `border` within the others."""
        literal, pieces, at = set(text.literal), [], 0
        for found in self._control.find(text):
            start, end = found.span()
            inner = text[start] + border + text[start + 1 : end] if start in literal else self._names[found[0]]
            pieces += [text[at:start], inner]
            at = end
        return "".join([*pieces, text[at:]])

    def _encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """None if a control token is among the ids that is not meant."""
        encoding = self._rust.encode(text, add_special_tokens=add_special_tokens)
        added = encoding.special_tokens_mask  # those that the tokenizer puts around a text
        pairs = [(token, mask) for token, mask in zip(encoding.ids, added, strict=True) if token != self._border_id]
        if any(token in self._refused and not mask for token, mask in pairs):
            return None
        return [self._ids.get(token, token) for token, _ in pairs]
