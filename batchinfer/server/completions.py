"""/v1/completions: prompts as text or token ids, answers as text, logprobs of the prompt with `echo`."""

from __future__ import annotations

from batchinfer.openai.completion_response import CompletionShape
from batchinfer.openai.parse import parse_request
from batchinfer.openai.request_models import CompletionRequest
from batchinfer.server.choices import Choices
from batchinfer.server.frontend import Frontend
from batchinfer.server.respond import ReplyWork


async def prepare(frontend: Frontend, body: CompletionRequest, name: str) -> ReplyWork:
    """Raises ApiError, RowError."""
    asked = parse_request(body, frontend.model.facts)
    prepared = await frontend.prepare(await frontend.encode(asked), asked)
    wants_prompt = asked.params.prompt_logprobs is not None
    shape = CompletionShape(frontend.texts, asked, [one.ids for one in prepared])
    return ReplyWork(Choices(shape, name, body), prepared, live=not wants_prompt, nothing=asked.echo_only)
