"""Choices of /v1/chat/completions: messages, with tool calls read back from their text."""

from __future__ import annotations

from typing import Any

from batchinfer.openai.delta import Delta
from batchinfer.openai.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from batchinfer.openai.parse import ParsedRequest
from batchinfer.openai.request_models import ChatRequest
from batchinfer.openai.tools import NewId, ParsedAnswer, ToolStream, wire_call


class ChatShape:
    """ids: of the prompt. new_id: makes the ids of tool calls."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, texts: TokenTexts, asked: ParsedRequest, ids: list[int], new_id: NewId) -> None:
        body = asked.body
        assert isinstance(body, ChatRequest)
        self._texts = texts
        self._logprobs = asked.params.logprobs is not None
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._shows_prompt = asked.returns_prompt_logprobs
        self._use = asked.tool_use
        self._new_id = new_id
        self._shows_ids = bool(body.return_token_ids)
        self.opening: dict[str, Any] = {"prompt_token_ids": ids} if self._shows_ids else {}
        self._readers: dict[int, ToolStream] = {}  # of choices that may hold tool calls

    def whole(self, deltas: list[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        more = dict(self.opening)
        if self._shows_prompt and deltas[0].prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(self._texts, deltas[0].prompt_logprobs)
        return [self._choice(delta) for delta in deltas], more

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = []
        if delta.first:
            pieces.append(self._piece(delta, {"role": "assistant", "content": ""}))
        deltas, called = [{"content": delta.text}] if delta.text else [], False
        if self._use is not None:
            reader = self._readers.setdefault(delta.choice, ToolStream(self._use, self._new_id))
            deltas, called = reader.push(delta.text, delta.reason is not None), reader.called
        shows_ids = self._shows_ids and bool(delta.token_ids)
        if (delta.logprobs or shows_ids) and not deltas:
            deltas = [{"content": ""}]
        pieces += [self._piece(delta, content) for content in deltas]
        if delta.logprobs:
            pieces[-1]["logprobs"] = self._table(delta)
        if shows_ids:
            pieces[-1]["token_ids"] = delta.token_ids
        if delta.reason is not None:
            pieces.append({**self._piece(delta, {}), "finish_reason": _reason(delta, called)})
        return pieces

    def _choice(self, delta: Delta) -> dict[str, Any]:
        text, calls = ParsedAnswer(delta.text, []) if self._use is None else self._use.read(delta.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [wire_call(call, self._new_id) for call in calls]
        choice = {
            "index": delta.choice,
            "message": message,
            "logprobs": self._table(delta),
            "finish_reason": _reason(delta, bool(calls)),
        }
        return {**choice, "token_ids": delta.token_ids} if self._shows_ids else choice

    def _piece(self, delta: Delta, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": delta.choice, "delta": content, "logprobs": None, "finish_reason": None}

    def _table(self, delta: Delta) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": chat_logprobs(self._texts, delta.logprobs, self._as_ids), "refusal": None}


def _reason(delta: Delta, called: bool) -> str | None:
    return "tool_calls" if called and delta.reason == "stop" else delta.reason
