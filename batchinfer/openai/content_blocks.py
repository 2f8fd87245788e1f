"""A generated answer as a sequence of content blocks (texts and tool calls), opened and closed one after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from batchinfer.openai.delta import Delta
from batchinfer.openai.tools import NewId, ToolStream, ToolUse, parse_answer
from batchinfer.request import TokenLogprob


class ResponseHead(NamedTuple):
    """Identity of a response. created: Unix time in seconds."""

    id: str
    created: int
    model: str


@dataclass(slots=True)
class ContentBlock:
    """A text, or the arguments of a tool call, which has a name and an id. logprobs: of a text's tokens, if known."""

    number: int
    name: str | None = None
    call_id: str = ""
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


class BlockEvent(NamedTuple):
    """A change of one block; `text` and `logprobs` are what an `append` adds."""

    kind: Literal["open", "append", "close"]
    block: ContentBlock
    text: str = ""
    logprobs: list[TokenLogprob] | None = None


class ContentBlocks:
    """Splitter of one answer into blocks, whole or streamed. new_id: returns the id of a new tool call.

    An answer without tools is one text block; an empty answer is an empty one.
    """

    def __init__(self, tool_use: ToolUse | None, new_id: NewId) -> None:
        self._tool_use = tool_use
        self._new_id = new_id
        self._stream = None if tool_use is None else ToolStream(tool_use, new_id)
        self._open: ContentBlock | None = None
        self._count = 0
        self._unshown: list[TokenLogprob] = []  # of tokens whose text is held back
        self.called = False

    def split_answer(self, delta: Delta) -> list[ContentBlock]:
        """Return all blocks of a complete answer."""
        answer = parse_answer(self._tool_use, delta.text)
        self.called = bool(answer.calls)
        blocks = []
        if answer.content or not answer.calls:
            blocks.append(ContentBlock(0, text=answer.content, logprobs=delta.logprobs))
        for call in answer.calls:
            blocks.append(ContentBlock(len(blocks), call.name, self._new_id(), call.arguments))
        return blocks

    def push_delta(self, delta: Delta) -> list[BlockEvent]:
        """Return the events that more of a streamed answer causes."""
        last = delta.finish_reason is not None
        self._unshown += delta.logprobs
        if self._stream is None:
            pieces = [{"content": delta.text}] if delta.text else []
        else:
            pieces = self._stream.push_text(delta.text, last)
            self.called = self._stream.called
        events = [event for piece in pieces for event in self._push_piece(piece)]
        if last:
            if self._count == 0:
                events += self._open_block()
            if self._unshown and self._open is not None and self._open.name is None:
                events.append(self._append(""))  # logprobs of tokens without shown text: the last, those held back
            events += self._close_block()
        return events

    def _push_piece(self, piece: dict[str, Any]) -> list[BlockEvent]:
        if "tool_calls" not in piece:
            events = [] if self._open is not None and self._open.name is None else self._open_block()
            return [*events, self._append(piece["content"])]
        (call,) = piece["tool_calls"]
        events = self._open_block(call["function"]["name"], call["id"]) if "id" in call else []
        arguments = call["function"]["arguments"]
        return [*events, self._append(arguments)] if arguments else events

    def _open_block(self, name: str | None = None, call_id: str = "") -> list[BlockEvent]:
        events = self._close_block()
        self._open = ContentBlock(self._count, name, call_id)
        self._count += 1
        return [*events, BlockEvent("open", self._open)]

    def _append(self, text: str) -> BlockEvent:
        assert self._open is not None, "a piece belongs to a block"
        logprobs, self._unshown = self._unshown, []
        self._open.text += text
        self._open.logprobs += logprobs
        return BlockEvent("append", self._open, text, logprobs)

    def _close_block(self) -> list[BlockEvent]:
        block, self._open = self._open, None
        return [] if block is None else [BlockEvent("close", block)]
