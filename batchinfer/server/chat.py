"""/v1/chat/completions: messages through the model's template, answers as messages, tool calls parsed back."""

from __future__ import annotations

import secrets

from batchinfer.openai.chat_response import ChatShape
from batchinfer.openai.parse import parse_request
from batchinfer.openai.request_models import ChatRequest
from batchinfer.server.choices import Choices
from batchinfer.server.frontend import Frontend
from batchinfer.server.respond import ReplyWork


async def prepare(frontend: Frontend, body: ChatRequest, name: str) -> ReplyWork:
    """Raises ApiError, RowError."""
    asked = parse_request(body, frontend.model.facts)
    prepared = await frontend.prepare(await frontend.encode(asked), asked)
    shape = ChatShape(frontend.texts, asked, prepared[0].ids, lambda: f"call_{secrets.token_hex(12)}")
    return ReplyWork(Choices(shape, name, body), prepared, live=asked.params.prompt_logprobs is None)
