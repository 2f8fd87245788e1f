"""/v1/chat/completions: messages through the model's template, answers as messages, tool calls parsed back."""

from __future__ import annotations

from typing import Any

from batchinfer.server.chat_prompt import render
from batchinfer.server.frontend import Frontend
from batchinfer.server.params import chat_params
from batchinfer.server.replies import Work
from batchinfer.server.samples import Delta
from batchinfer.server.schemas import ChatRequest
from batchinfer.server.token_texts import TokenTexts, chat_logprobs, prompt_logprobs
from batchinfer.server.tool_use import Said, ToolUse, tool_use


async def prepare(frontend: Frontend, body: ChatRequest) -> Work:
    """Raises ApiError."""
    model = frontend.model
    use = tool_use(model, body)
    params = chat_params(body, model.parts.defaults, use.constraint if use else None, keep_special=use is not None)
    # a template writes its special tokens itself
    special = body.add_special_tokens is True
    ids = await frontend.in_pool(lambda: frontend.encode([render(model, body, body.messages)], special))
    prepared = await frontend.prepare(ids, params)
    wants_prompt = getattr(params, "prompt_logprobs", None) is not None
    return Work(ChatShape(frontend.texts, body, use), prepared, live=not wants_prompt)


class ChatShape:
    """Choices of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, texts: TokenTexts, body: ChatRequest, use: ToolUse | None) -> None:
        self._texts = texts
        self._logprobs = bool(body.logprobs)
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._shows_prompt = body.prompt_logprobs is not None
        self._use = use
        self._texts_so_far: dict[int, str] = {}  # of streamed choices that may hold tool calls

    def whole(self, deltas: list[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        more: dict[str, Any] = {}
        if self._shows_prompt and deltas[0].prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(self._texts, deltas[0].prompt_logprobs)
        return [self._choice(delta) for delta in deltas], more

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = []
        if delta.first:
            pieces.append(self._piece(delta, {"role": "assistant", "content": ""}))
        text, calls = Said(delta.text, [])
        if self._use is not None:
            text, calls = self._read(self._use, delta)
        if text or delta.logprobs:
            pieces.append({**self._piece(delta, {"content": text}), "logprobs": self._table(delta)})
        for index, call in enumerate(calls):
            pieces.append(self._piece(delta, {"tool_calls": [{"index": index, **call}]}))
        if delta.reason is not None:
            pieces.append({**self._piece(delta, {}), "finish_reason": _reason(delta, calls)})
        return pieces

    def _read(self, use: ToolUse, delta: Delta) -> tuple[str, list[dict[str, Any]]]:
        """A tool call shows when it is whole: text that may hold one waits for the end."""
        text = self._texts_so_far.get(delta.choice, "") + delta.text
        if delta.reason is None:
            self._texts_so_far[delta.choice] = text
            return "", []
        said = use.read(text)
        return said.content, said.calls

    def _choice(self, delta: Delta) -> dict[str, Any]:
        text, calls = Said(delta.text, []) if self._use is None else self._use.read(delta.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = calls
        return {
            "index": delta.choice,
            "message": message,
            "logprobs": self._table(delta),
            "finish_reason": _reason(delta, calls),
        }

    def _piece(self, delta: Delta, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": delta.choice, "delta": content, "logprobs": None, "finish_reason": None}

    def _table(self, delta: Delta) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": chat_logprobs(self._texts, delta.logprobs, self._as_ids), "refusal": None}


def _reason(delta: Delta, calls: list[dict[str, Any]]) -> str | None:
    return "tool_calls" if calls and delta.reason == "stop" else delta.reason
