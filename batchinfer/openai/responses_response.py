"""Response of /v1/responses: one object, or the stream events that build it, in the order that OpenAI documents.

See https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchinfer.openai.content_blocks import BlockEvent, ContentBlock, ContentBlocks, ResponseHead
from batchinfer.openai.delta import Delta, TokenUsage
from batchinfer.openai.logprobs import TokenTexts, chat_logprobs
from batchinfer.openai.parse import ParsedRequest
from batchinfer.openai.responses_request import ResponseRequest
from batchinfer.request import TokenLogprob


class ResponseEvents:
    """Writer of one response, whole or as stream events. new_id: returns a new id with a prefix (msg, fc, call)."""

    def __init__(
        self, texts: TokenTexts, request: ParsedRequest, head: ResponseHead, new_id: Callable[[str], str]
    ) -> None:
        assert isinstance(request.body, ResponseRequest)
        self._texts = texts
        self._params = request.params
        self._body = request.body
        self._head = head
        self._new_id = new_id
        self._blocks = ContentBlocks(request.tool_use, lambda: new_id("call"))
        self._sequence_number = 0  # of the next event
        self._item_id = ""  # of the open block
        self._output: list[dict[str, Any]] = []
        self._cut_off = False

    def whole_response(self, delta: Delta, usage: TokenUsage) -> dict[str, Any]:
        blocks = self._blocks.split_answer(delta)
        self._cut_off = delta.finish_reason == "length"
        for block in blocks:
            self._item_id = self._new_item_id(block)
            self._output.append(self._item(block, "completed" if block is not blocks[-1] else self._status))
        return self._response(self._status, usage)

    def opening_events(self, usage: TokenUsage) -> list[dict[str, Any]]:
        response = self._response("in_progress", None)
        return [self._event("created", response=response), self._event("in_progress", response=response)]

    def delta_events(self, delta: Delta) -> list[dict[str, Any]]:
        self._cut_off = delta.finish_reason == "length"
        block_events = self._blocks.push_delta(delta)
        events: list[dict[str, Any]] = []
        for block_event in block_events:
            is_end = block_event is block_events[-1] and delta.finish_reason is not None
            if block_event.kind == "open":
                events += self._open_item(block_event.block)
            elif block_event.kind == "append":
                events.append(self._append(block_event))
            else:
                events += self._close_item(block_event.block, self._status if is_end else "completed")
        return events

    def closing_events(self, usage: TokenUsage) -> list[dict[str, Any]]:
        return [self._event(self._status, response=self._response(self._status, usage))]

    def error_events(self, message: str) -> list[dict[str, Any]]:
        error = {"code": "server_error", "message": message}
        return [self._event("failed", response={**self._response("failed", None), "error": error})]

    @property
    def _status(self) -> str:
        return "incomplete" if self._cut_off else "completed"

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        number = self._sequence_number
        self._sequence_number += 1
        return {"type": f"response.{kind}", "sequence_number": number, **values}

    def _open_item(self, block: ContentBlock) -> list[dict[str, Any]]:
        self._item_id = self._new_item_id(block)
        empty = ContentBlock(block.number, block.name, block.call_id)  # the block may have text by now
        item = self._item(empty, "in_progress")
        if block.name is not None:
            return [self._event("output_item.added", output_index=block.number, item=item)]
        part = item["content"].pop()
        added = self._event("output_item.added", output_index=block.number, item=item)
        return [added, self._event("content_part.added", **self._place(block), part=part)]

    def _append(self, event: BlockEvent) -> dict[str, Any]:
        place = self._place(event.block)
        if event.block.name is not None:
            return self._event("function_call_arguments.delta", **place, delta=event.text)
        logprobs = self._logprobs(event.logprobs or [])
        return self._event("output_text.delta", **place, delta=event.text, logprobs=logprobs)

    def _close_item(self, block: ContentBlock, status: str) -> list[dict[str, Any]]:
        item, place = self._item(block, status), self._place(block)
        self._output.append(item)
        if block.name is not None:
            values = {"name": block.name, "arguments": block.text}
            events = [self._event("function_call_arguments.done", **place, **values)]
        else:
            (part,) = item["content"]
            text_done = self._event("output_text.done", **place, text=block.text, logprobs=part["logprobs"])
            events = [text_done, self._event("content_part.done", **place, part=part)]
        return [*events, self._event("output_item.done", output_index=block.number, item=item)]

    def _place(self, block: ContentBlock) -> dict[str, Any]:
        place = {"item_id": self._item_id, "output_index": block.number}
        return place if block.name is not None else {**place, "content_index": 0}

    def _new_item_id(self, block: ContentBlock) -> str:
        return self._new_id("msg" if block.name is None else "fc")

    def _item(self, block: ContentBlock, status: str) -> dict[str, Any]:
        if block.name is not None:
            call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
            return {"id": self._item_id, "type": "function_call", "status": status, **call}
        text = {"text": block.text, "annotations": [], "logprobs": self._logprobs(block.logprobs)}
        part = {"type": "output_text", **text}
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": [part]}

    def _logprobs(self, entries: list[TokenLogprob]) -> list[dict[str, Any]]:
        return chat_logprobs(self._texts, entries, False) if self._params.logprobs is not None else []

    def _response(self, status: str, usage: TokenUsage | None) -> dict[str, Any]:
        body, params = self._body, self._params
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._head.model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}, **(body.text or {})},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_logprobs": params.logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage_object(usage),
            "user": body.user,
        }


def _usage_object(usage: TokenUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
