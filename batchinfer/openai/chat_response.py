"""Choices of /v1/chat/completions: messages, with tool calls parsed from their text."""

from __future__ import annotations

from typing import Any

from batchinfer.openai.delta import Delta
from batchinfer.openai.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from batchinfer.openai.parse import ParsedRequest
from batchinfer.openai.request_models import ChatRequest
from batchinfer.openai.tools import NewId, ToolStream, parse_answer, tool_call_object


class ChatChoices:
    """Writer of chat choices, whole or in chunks.

    prompt_ids: token ids of the prompt. new_id: returns the id of a new tool call.
    """

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, texts: TokenTexts, request: ParsedRequest, prompt_ids: list[int], new_id: NewId) -> None:
        body = request.body
        assert isinstance(body, ChatRequest)
        self._texts = texts
        self._has_logprobs = request.params.logprobs is not None
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._returns_prompt_logprobs = request.returns_prompt_logprobs
        self._tool_use = request.tool_use
        self._new_id = new_id
        self._returns_ids = bool(body.return_token_ids)
        self.first_chunk_fields: dict[str, Any] = {"prompt_token_ids": prompt_ids} if self._returns_ids else {}
        self._tool_streams: dict[int, ToolStream] = {}  # choice → its parser, if there are tools

    def whole_choices(self, deltas: list[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the choices of a complete answer, one per delta, and further fields of the response."""
        fields = dict(self.first_chunk_fields)
        if self._returns_prompt_logprobs and deltas[0].prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(self._texts, deltas[0].prompt_logprobs)
        return [self._whole_choice(delta) for delta in deltas], fields

    def chunk_choices(self, delta: Delta) -> list[dict[str, Any]]:
        """Return the choices of chunks, one per chunk; empty while all new text is held back."""
        choices: list[dict[str, Any]] = []
        if delta.first:
            choices.append(self._chunk_choice(delta, {"role": "assistant", "content": ""}))
        contents, called = [{"content": delta.text}] if delta.text else [], False
        if self._tool_use is not None:
            stream = self._tool_streams.setdefault(delta.choice, ToolStream(self._tool_use, self._new_id))
            contents = stream.push_text(delta.text, delta.finish_reason is not None)
            called = stream.called
        has_ids = self._returns_ids and bool(delta.token_ids)
        if (delta.logprobs or has_ids) and not contents:
            contents = [{"content": ""}]
        choices += [self._chunk_choice(delta, content) for content in contents]
        if delta.logprobs:
            choices[-1]["logprobs"] = self._logprobs(delta)
        if has_ids:
            choices[-1]["token_ids"] = delta.token_ids
        if delta.finish_reason is not None:
            choices.append({**self._chunk_choice(delta, {}), "finish_reason": _finish_reason(delta, called)})
        return choices

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        text, calls = parse_answer(self._tool_use, delta.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [tool_call_object(call, self._new_id) for call in calls]
        choice = {
            "index": delta.choice,
            "message": message,
            "logprobs": self._logprobs(delta),
            "finish_reason": _finish_reason(delta, bool(calls)),
        }
        return {**choice, "token_ids": delta.token_ids} if self._returns_ids else choice

    def _chunk_choice(self, delta: Delta, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": delta.choice, "delta": content, "logprobs": None, "finish_reason": None}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        return {"content": chat_logprobs(self._texts, delta.logprobs, self._as_ids), "refusal": None}


def _finish_reason(delta: Delta, called: bool) -> str | None:
    return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
