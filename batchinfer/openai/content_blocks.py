"""An answer as a row of blocks, texts and calls of tools, that are opened, written and closed one after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from batchinfer.openai.delta import Delta
from batchinfer.openai.tools import NewId, ParsedAnswer, ToolStream, ToolUse
from batchinfer.request import TokenLogprob


class Head(NamedTuple):
    """What signs an answer. created: in seconds since 1970."""

    id: str
    created: int
    model: str


@dataclass(slots=True)
class ContentBlock:
    """A text, or the arguments of a call, which has a name and an id. `logprobs` of a text's tokens, where known."""

    number: int
    name: str | None = None
    call_id: str = ""
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Step(NamedTuple):
    """What happens to a block: `text` and `logprobs` are what is new of it."""

    what: Literal["open", "more", "close"]
    block: ContentBlock
    text: str = ""
    logprobs: list[TokenLogprob] | None = None


class ContentBlocks:
    """Takes one answer, as it comes or whole. new_id: makes the ids of calls.

    An answer without tools is one text. One that says and calls nothing is an empty text.
    """

    def __init__(self, use: ToolUse | None, new_id: NewId) -> None:
        self._use = use
        self._new_id = new_id
        self._stream = None if use is None else ToolStream(use, new_id)
        self._open: ContentBlock | None = None
        self._count = 0
        self._unshown: list[TokenLogprob] = []  # of tokens whose text is held back
        self.called = False

    def whole(self, delta: Delta) -> list[ContentBlock]:
        """All blocks of an answer that is complete."""
        said = ParsedAnswer(delta.text, []) if self._use is None else self._use.read(delta.text)
        self.called = bool(said.calls)
        blocks = []
        if said.content or not said.calls:
            blocks.append(ContentBlock(0, text=said.content, logprobs=delta.logprobs))
        for call in said.calls:
            blocks.append(ContentBlock(len(blocks), call.name, self._new_id(), call.arguments))
        return blocks

    def push(self, delta: Delta) -> list[Step]:
        """The steps that more of the answer takes."""
        last = delta.reason is not None
        self._unshown += delta.logprobs
        if self._stream is None:
            pieces = [{"content": delta.text}] if delta.text else []
        else:
            pieces = self._stream.push(delta.text, last)
            self.called = self._stream.called
        steps = [step for piece in pieces for step in self._take(piece)]
        if last:
            if self._count == 0:
                steps += self._begin()
            if self._unshown and self._open is not None and self._open.name is None:
                steps.append(self._more(""))  # tokens that have no text: the one that ended it, those held back
            steps += self._close()
        return steps

    def _take(self, piece: dict[str, Any]) -> list[Step]:
        if "tool_calls" not in piece:
            steps = [] if self._open is not None and self._open.name is None else self._begin()
            return [*steps, self._more(piece["content"])]
        (call,) = piece["tool_calls"]
        steps = self._begin(call["function"]["name"], call["id"]) if "id" in call else []
        arguments = call["function"]["arguments"]
        return [*steps, self._more(arguments)] if arguments else steps

    def _begin(self, name: str | None = None, call_id: str = "") -> list[Step]:
        steps = self._close()
        self._open = ContentBlock(self._count, name, call_id)
        self._count += 1
        return [*steps, Step("open", self._open)]

    def _more(self, text: str) -> Step:
        assert self._open is not None, "a piece belongs to a block"
        logprobs, self._unshown = self._unshown, []
        self._open.text += text
        self._open.logprobs += logprobs
        return Step("more", self._open, text, logprobs)

    def _close(self) -> list[Step]:
        block, self._open = self._open, None
        return [] if block is None else [Step("close", block)]
