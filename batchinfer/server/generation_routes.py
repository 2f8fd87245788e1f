"""Routes that run the model: completions, chats, responses, messages and embeddings, under /v1."""

from __future__ import annotations

import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from batchinfer.openai.chat_response import ChatChoices
from batchinfer.openai.completion_response import CompletionChoices
from batchinfer.openai.content_blocks import ResponseHead
from batchinfer.openai.messages_request import CountRequest, MessagesRequest
from batchinfer.openai.messages_response import MessageEvents
from batchinfer.openai.parse import ParsedRequest, parse_request
from batchinfer.openai.request_models import ChatRequest, CompletionRequest, EmbeddingRequest
from batchinfer.openai.responses_request import ResponseRequest
from batchinfer.openai.responses_response import ResponseEvents
from batchinfer.pipeline.prompt import Prepared
from batchinfer.server import embeddings
from batchinfer.server.choice_reply import ChoiceReply
from batchinfer.server.errors import JsonResponse
from batchinfer.server.event_reply import EventReply
from batchinfer.server.frontend import Frontend
from batchinfer.server.respond import check_model, respond

_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "The answer"}}


def make_generation_router(frontend: Frontend) -> APIRouter:
    """Return the routes; handlers of the app answer ApiError, RowError and validation errors."""
    router = APIRouter(prefix="/v1")
    texts = frontend.texts

    @router.post("/completions", responses=_STREAM)
    async def completion(body: CompletionRequest, request: Request) -> Response:
        def make_reply(parsed: ParsedRequest, prepared: list[Prepared], name: str) -> ChoiceReply:
            return ChoiceReply(CompletionChoices(texts, parsed, [prompt.ids for prompt in prepared]), name, body)

        return await respond(frontend, request.receive, body, make_reply)

    @router.post("/chat/completions", responses=_STREAM)
    async def chat_completion(body: ChatRequest, request: Request) -> Response:
        def make_reply(parsed: ParsedRequest, prepared: list[Prepared], name: str) -> ChoiceReply:
            return ChoiceReply(ChatChoices(texts, parsed, prepared[0].ids, lambda: _new_id("call")), name, body)

        return await respond(frontend, request.receive, body, make_reply)

    @router.post("/responses", responses=_STREAM)
    async def response(body: ResponseRequest, request: Request) -> Response:
        def make_reply(parsed: ParsedRequest, prepared: list[Prepared], name: str) -> EventReply:
            return EventReply(ResponseEvents(texts, parsed, _new_head("resp", name), _new_id))

        return await respond(frontend, request.receive, body, make_reply)

    @router.post("/messages", responses=_STREAM)
    async def message(body: MessagesRequest, request: Request) -> Response:
        def make_reply(parsed: ParsedRequest, prepared: list[Prepared], name: str) -> EventReply:
            return EventReply(MessageEvents(parsed, _new_head("msg", name), _new_id))

        return await respond(frontend, request.receive, body, make_reply)

    @router.post("/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> Response:
        check_model(frontend, body.model)
        (ids,) = await frontend.encode_request(parse_request(body, frontend.model.facts))
        return JsonResponse({"input_tokens": len(ids)})

    @router.post("/embeddings")
    async def embedding(body: EmbeddingRequest, request: Request) -> Response:
        return await embeddings.respond_with_vectors(frontend, request.receive, body)

    return router


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _new_head(prefix: str, model_name: str) -> ResponseHead:
    return ResponseHead(_new_id(prefix), int(time.time()), model_name)
