"""/v1/messages and its count_tokens: a chat in Anthropic's words, and its answer as content blocks."""

from __future__ import annotations

import time
from typing import Any

from batchinfer.openai.content_blocks import Head
from batchinfer.openai.messages_request import CountRequest, MessagesRequest
from batchinfer.openai.messages_response import MessageAnswer
from batchinfer.openai.parse import parse_request
from batchinfer.server.events import Events
from batchinfer.server.frontend import Frontend
from batchinfer.server.respond import ReplyWork, check_model
from batchinfer.server.responses import new_id


async def prepare(frontend: Frontend, body: MessagesRequest, name: str) -> ReplyWork:
    """Raises ApiError, RowError."""
    asked = parse_request(body, frontend.model.facts)
    prepared = await frontend.prepare(await frontend.encode(asked), asked)
    answer = MessageAnswer(asked, Head(new_id("msg"), int(time.time()), name), new_id)
    return ReplyWork(Events(answer), prepared)


async def count(frontend: Frontend, body: CountRequest) -> dict[str, Any]:
    """Raises ApiError, RowError."""
    check_model(frontend, body.model)
    (ids,) = await frontend.encode(parse_request(body, frontend.model.facts))
    return {"input_tokens": len(ids)}
