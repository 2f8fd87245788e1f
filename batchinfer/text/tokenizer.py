"""Tokenizers: text to token ids and back, from a model directory, a GGUF file, or plain bytes.

Decoding never "cleans up" spaces: the text is exactly that of the tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from batchinfer.errors import InvalidInput, ModelError
from batchinfer.text.control import ControlTokens
from batchinfer.text.fast import unicode_error
from batchinfer.text.gguf_tokenizer import load_gguf
from batchinfer.text.model_directory import load_directory
from batchinfer.text.pieces import BytePieces, Pieces


class Tokenizer(Protocol):
    """Interface of a tokenizer.

    `eos_ids` end a generation. `special_ids` are not text: decoding can omit them. `special_tokens` ("bos_token" →
    "<s>") are variables of the chat template. `control` finds the spellings that encoding parses as control tokens.
    """

    vocab_size: int
    eos_ids: frozenset[int]
    special_ids: frozenset[int]
    bos_id: int | None
    special_tokens: dict[str, str]
    control: ControlTokens
    chat_template: str | None

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int] | InvalidInput]:
        """Return the ids of each text, or the error of a text that is not valid Unicode.

        Control tokens in a text are parsed, except those that a PromptText marks as literal.
        """
        ...

    def decode_batch(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """Return the text of each sequence. Bytes that are not UTF-8 become U+FFFD; unknown ids are skipped."""
        ...

    def pieces(self, skip_special_tokens: bool) -> Pieces:
        """Return a new incremental decoder: the same text as `decode_batch`, one token at a time."""
        ...

    def token_bytes(self) -> list[bytes] | None:
        """Return the bytes that each token adds to a text, by id; None if tokens have no bytes of their own."""
        ...

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token within a text, possibly part of a character. Empty for unknown ids."""
        ...

    def name_of(self, token_id: int) -> str:
        """Return a token as the vocabulary writes it (`Ġworld`, `▁world`); empty for unknown ids."""
        ...

    def identity(self) -> str:
        """Return a hash of everything that decides ids and text."""
        ...


class ByteTokenizer:
    """Tokenizer of UTF-8 bytes; 256 is <bos>, 257 <eos>. Used by `model: fake`, which has no vocabulary."""

    vocab_size = 258
    eos_ids = frozenset({257})
    special_ids = frozenset({256, 257})
    bos_id: int | None = 256
    control = ControlTokens()  # none are parsed
    chat_template: str | None = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def __init__(self) -> None:
        self.special_tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int] | InvalidInput]:
        """Return the bytes of each text; special tokens are never added or parsed."""
        try:
            return [list(text.encode()) for text in texts]
        except UnicodeEncodeError:
            return [unicode_error(text) or list(text.encode()) for text in texts]

    def decode_batch(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [self._decode(sequence, skip_special_tokens) for sequence in ids]

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        try:
            return bytes(ids).decode(errors="replace")
        except ValueError:  # an id above 255
            skip = self.special_ids if skip_special_tokens else frozenset()
            return b"".join(self.bytes_of(i) for i in ids if i not in skip).decode(errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes((token_id,))
        return {256: b"<bos>", 257: b"<eos>"}.get(token_id, b"")

    def name_of(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode("latin-1")

    def pieces(self, skip_special_tokens: bool) -> Pieces:
        return BytePieces(self.bytes_of, self.special_ids if skip_special_tokens else frozenset())

    def token_bytes(self) -> list[bytes] | None:
        return [self.bytes_of(token_id) for token_id in range(self.vocab_size)]

    def identity(self) -> str:
        return "bytes-1"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model directory or .gguf file. Raises ModelError if there is no usable one."""
    path = Path(path)
    if path.is_dir():
        return load_directory(path)
    if path.is_file():
        return load_gguf(path)
    raise ModelError(f"{path}: no such model directory or GGUF file")
