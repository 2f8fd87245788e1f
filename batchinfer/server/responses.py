"""/v1/responses: a chat in other words, and its answer as items. Nothing is stored: every request has all it needs."""

from __future__ import annotations

import secrets
import time

from batchinfer.openai.content_blocks import Head
from batchinfer.openai.parse import parse_request
from batchinfer.openai.responses_request import ResponseRequest
from batchinfer.openai.responses_response import ResponseAnswer
from batchinfer.server.events import Events
from batchinfer.server.frontend import Frontend
from batchinfer.server.respond import ReplyWork


async def prepare(frontend: Frontend, body: ResponseRequest, name: str) -> ReplyWork:
    """Raises ApiError, RowError."""
    asked = parse_request(body, frontend.model.facts)
    prepared = await frontend.prepare(await frontend.encode(asked), asked)
    answer = ResponseAnswer(frontend.texts, asked, Head(new_id("resp"), int(time.time()), name), new_id)
    return ReplyWork(Events(answer), prepared)


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
