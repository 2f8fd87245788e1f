"""Prompt contents to token ids: the chat template, and the special tokens around and within a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from batchinfer.errors import BadParameters, InvalidInput, RowError
from batchinfer.text.chat import ChatTemplate, Turn
from batchinfer.text.tokenizer import Tokenizer

Content = str | list[int] | list[dict[str, Any]]
SpecialTokens = Literal["text", "allow"]
"""What looks like a control token in a prompt's data: it is text, or it is one. By default messages hold text, and a
ready prompt what it says."""


class Truncation(NamedTuple):
    """Truncation of a prompt to its last `tokens`, or the `first`; -1 keeps what fits the context beside the answer."""

    tokens: int
    first: bool = False

    def cut(self, ids: list[int], context: int, answer_tokens: int) -> list[int]:
        """Truncate token ids. Raises BadParameters."""
        if not (self.tokens == -1 or 1 <= self.tokens <= context):
            problem = f"truncate_prompt_tokens must be -1, or 1 to {context} (the context), got {self.tokens}"
            raise BadParameters(problem, param="truncate_prompt_tokens")
        kept = max(1, context - answer_tokens) if self.tokens == -1 else self.tokens
        return ids[:kept] if self.first else ids[-kept:]


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """Options of a prompt beside its content.

    special: whether the tokenizer adds its special tokens. variables: of the chat template, over those of the job.
    whole_answer: room for fewer tokens than `max_tokens` asks for is an error; else the answer ends with the context.
    truncation: of a long prompt, its special tokens included. special_tokens: see `SpecialTokens`. continues: the last
    message stays open, and the answer goes on with it.
    """

    special: bool
    variables: Mapping[str, Any] = field(default_factory=dict)
    whole_answer: bool = False
    truncation: Truncation | None = None
    special_tokens: SpecialTokens | None = None
    continues: bool = False


_OF_A_ROW = PromptOptions(special=False)


class Text(NamedTuple):
    """A prompt as text. special: whether the tokenizer adds its special tokens."""

    text: str
    special: bool


class PromptEncoder:
    """Writes prompts with the chat template and tokenizes them.

    chat_kwargs: variables of the template that belong to it. special_tokens: what holds where a prompt says nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatTemplate | None,
        chat_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokens | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._chat_kwargs = chat_kwargs or {}
        self._special_tokens = special_tokens

    def text(self, content: Content | None, options: PromptOptions | None) -> Text | list[int] | RowError:
        """Return the prompt before it is tokenized, or its token ids, or what is wrong."""
        if isinstance(content, str):
            literal = options is not None and options.special_tokens == "text"
            text = self._tokenizer.control.literal(content) if literal else content
            return Text(text, options is None or options.special)
        if content == []:
            return InvalidInput("the prompt is empty", param="prompt")
        if not isinstance(content, list):
            return InvalidInput("a prompt is text, token ids or messages")
        if all(isinstance(message, dict) for message in content):
            return self._render(content, options or _OF_A_ROW)
        if all(isinstance(token, int) and not isinstance(token, bool) for token in content):
            return [int(token) for token in content if isinstance(token, int)]
        return InvalidInput("a prompt list holds token ids (integers) or chat messages (mappings)")

    def encode(self, texts: list[str], special: bool) -> list[list[int] | InvalidInput]:
        """Ids of each text, or what is wrong with it. special: the tokenizer adds its special tokens.

        A text that begins with the token that all texts begin with does not get another one.
        """
        if not texts:
            return []
        found = self._tokenizer.encode_batch(texts, add_special_tokens=special)
        if not special or not self._lead:
            return found
        twice = 2 * self._lead
        return [ids[1:] if isinstance(ids, list) and ids[:2] == twice else ids for ids in found]

    def led(self, ids: list[int]) -> list[int]:
        """`ids` after what the tokenizer puts before a text, if it does and they do not begin with it."""
        return ids if ids[:1] == self._lead else [*self._lead, *ids]

    @cached_property
    def _lead(self) -> list[int]:
        """The beginning-of-sequence token, where all texts get it."""
        bos = self._tokenizer.bos_id
        framed = self._tokenizer.encode_batch([" "], add_special_tokens=True)[0]
        return [bos] if bos is not None and isinstance(framed, list) and framed[:1] == [bos] else []

    def _render(self, messages: list[Any], options: PromptOptions) -> Text | RowError:
        if self._chat is None:
            return InvalidInput("this model has no chat template: give prompt.chat_template, or a ready prompt")
        turn = Turn(options.continues, (options.special_tokens or self._special_tokens) == "allow")
        try:
            # a template writes its special tokens itself
            return Text(self._chat.render(messages, turn, self._chat_kwargs, **options.variables), options.special)
        except RowError as error:
            return error
