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
from batchinfer.server.tool_use import Said, ToolStream, ToolUse, tool_use


async def prepare(frontend: Frontend, body: ChatRequest) -> Work:
    """Raises ApiError."""
    model = frontend.model
    use = tool_use(model, body)
    params = chat_params(
        body, model.parts.defaults, use.constraint if use else None, keep_special=use is not None and use.keeps_special
    )
    # a template writes its special tokens itself
    special = body.add_special_tokens is True
    ids = await frontend.in_pool(lambda: frontend.encode([render(model, body, body.messages)], special))
    prepared = await frontend.prepare(ids, params)
    wants_prompt = params.prompt_logprobs is not None
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
        self._readers: dict[int, ToolStream] = {}  # of choices that may hold tool calls

    def whole(self, deltas: list[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        more: dict[str, Any] = {}
        if self._shows_prompt and deltas[0].prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(self._texts, deltas[0].prompt_logprobs)
        return [self._choice(delta) for delta in deltas], more

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = []
        if delta.first:
            pieces.append(self._piece(delta, {"role": "assistant", "content": ""}))
        deltas, called = [{"content": delta.text}] if delta.text else [], False
        if self._use is not None:
            reader = self._readers.setdefault(delta.choice, ToolStream(self._use))
            deltas, called = reader.push(delta.text, delta.reason is not None), reader.called
        if delta.logprobs and not deltas:
            deltas = [{"content": ""}]
        pieces += [self._piece(delta, content) for content in deltas]
        if delta.logprobs:
            pieces[-1]["logprobs"] = self._table(delta)
        if delta.reason is not None:
            pieces.append({**self._piece(delta, {}), "finish_reason": _reason(delta, called)})
        return pieces

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
            "finish_reason": _reason(delta, bool(calls)),
        }

    def _piece(self, delta: Delta, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": delta.choice, "delta": content, "logprobs": None, "finish_reason": None}

    def _table(self, delta: Delta) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": chat_logprobs(self._texts, delta.logprobs, self._as_ids), "refusal": None}


def _reason(delta: Delta, called: bool) -> str | None:
    return "tool_calls" if called and delta.reason == "stop" else delta.reason
