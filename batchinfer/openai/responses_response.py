"""The answer of /v1/responses: one object, or the events that build it, in the order of OpenAI's documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchinfer.openai.content_blocks import ContentBlock, ContentBlocks, Head, Step
from batchinfer.openai.delta import Delta, Used
from batchinfer.openai.logprobs import TokenTexts, chat_logprobs
from batchinfer.openai.parse import ParsedRequest
from batchinfer.openai.responses_request import ResponseRequest
from batchinfer.request import TokenLogprob


class ResponseAnswer:
    """new_id: makes an id from its prefix (msg, fc, call)."""

    def __init__(self, texts: TokenTexts, asked: ParsedRequest, head: Head, new_id: Callable[[str], str]) -> None:
        assert isinstance(asked.body, ResponseRequest)
        self._texts = texts
        self._asked = asked
        self._body = asked.body
        self._head = head
        self._new_id = new_id
        self._blocks = ContentBlocks(asked.tool_use, lambda: new_id("call"))
        self._number = 0  # of the next event
        self._item_id = ""  # of the open block
        self._output: list[dict[str, Any]] = []
        self._cut_off = False

    def whole(self, delta: Delta, used: Used) -> dict[str, Any]:
        blocks = self._blocks.whole(delta)
        self._cut_off = delta.reason == "length"
        for block in blocks:
            self._item_id = self._id_of(block)
            self._output.append(self._item(block, "completed" if block is not blocks[-1] else self._status))
        return self._response(self._status, used)

    def opening(self, used: Used) -> list[dict[str, Any]]:
        response = self._response("in_progress", None)
        return [self._event("created", response=response), self._event("in_progress", response=response)]

    def more(self, delta: Delta) -> list[dict[str, Any]]:
        self._cut_off = delta.reason == "length"
        steps = self._blocks.push(delta)
        events: list[dict[str, Any]] = []
        for step in steps:
            closes_all = step is steps[-1] and delta.reason is not None
            if step.what == "open":
                events += self._begin(step.block)
            elif step.what == "more":
                events.append(self._delta(step))
            else:
                events += self._done(step.block, self._status if closes_all else "completed")
        return events

    def closing(self, used: Used) -> list[dict[str, Any]]:
        return [self._event(self._status, response=self._response(self._status, used))]

    def failed(self, message: str) -> list[dict[str, Any]]:
        error = {"code": "server_error", "message": message}
        return [self._event("failed", response={**self._response("failed", None), "error": error})]

    @property
    def _status(self) -> str:
        return "incomplete" if self._cut_off else "completed"

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": f"response.{kind}", "sequence_number": number, **values}

    def _begin(self, block: ContentBlock) -> list[dict[str, Any]]:
        self._item_id = self._id_of(block)
        item = self._item(
            ContentBlock(block.number, block.name, block.call_id), "in_progress"
        )  # by now it may hold more
        if block.name is not None:
            return [self._event("output_item.added", output_index=block.number, item=item)]
        part = item["content"].pop()
        added = self._event("output_item.added", output_index=block.number, item=item)
        return [added, self._event("content_part.added", **self._place(block), part=part)]

    def _delta(self, step: Step) -> dict[str, Any]:
        place = self._place(step.block)
        if step.block.name is not None:
            return self._event("function_call_arguments.delta", **place, delta=step.text)
        logprobs = self._logprobs(step.logprobs or [])
        return self._event("output_text.delta", **place, delta=step.text, logprobs=logprobs)

    def _done(self, block: ContentBlock, status: str) -> list[dict[str, Any]]:
        item, place = self._item(block, status), self._place(block)
        self._output.append(item)
        if block.name is not None:
            values = {"name": block.name, "arguments": block.text}
            events = [self._event("function_call_arguments.done", **place, **values)]
        else:
            (part,) = item["content"]
            said = self._event("output_text.done", **place, text=block.text, logprobs=part["logprobs"])
            events = [said, self._event("content_part.done", **place, part=part)]
        return [*events, self._event("output_item.done", output_index=block.number, item=item)]

    def _place(self, block: ContentBlock) -> dict[str, Any]:
        place = {"item_id": self._item_id, "output_index": block.number}
        return place if block.name is not None else {**place, "content_index": 0}

    def _id_of(self, block: ContentBlock) -> str:
        return self._new_id("msg" if block.name is None else "fc")

    def _item(self, block: ContentBlock, status: str) -> dict[str, Any]:
        if block.name is not None:
            call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
            return {"id": self._item_id, "type": "function_call", "status": status, **call}
        text = {"text": block.text, "annotations": [], "logprobs": self._logprobs(block.logprobs)}
        part = {"type": "output_text", **text}
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": [part]}

    def _logprobs(self, entries: list[TokenLogprob]) -> list[dict[str, Any]]:
        return chat_logprobs(self._texts, entries, False) if self._asked.params.logprobs is not None else []

    def _response(self, status: str, used: Used | None) -> dict[str, Any]:
        body, params = self._body, self._asked.params
        cut_off = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut_off,
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
            "usage": None if used is None else _usage(used),
            "user": body.user,
        }


def _usage(used: Used) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
        "output_tokens": used.answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.prompt + used.answer,
    }
