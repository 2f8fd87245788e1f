"""Routes for clients that count tokens: /tokenize, /detokenize and /tokenizer_info, at the root and under /v1."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from batchinfer.openai.chat_messages import parse_conversation
from batchinfer.openai.request_models import DetokenizeRequest, TokenizeRequest
from batchinfer.pipeline.encoding import PromptOptions
from batchinfer.server.errors import JsonResponse, bad_request
from batchinfer.server.frontend import Frontend
from batchinfer.server.respond import check_model


def make_tokenize_router(frontend: Frontend) -> APIRouter:
    """Return the routes; handlers of the app answer ApiError and validation errors."""
    router = APIRouter()
    model = frontend.model
    tokenizer = model.parts.tokenizer

    @router.post("/tokenize")
    @router.post("/v1/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        check_model(frontend, body.model)
        ids = await frontend.run_in_pool(lambda: _tokenize(frontend, body))
        names = [tokenizer.name_of(token) for token in ids] if body.return_token_strs else None
        limit = model.parts.limits.context
        return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": limit, "token_strs": names})

    @router.post("/detokenize")
    @router.post("/v1/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        check_model(frontend, body.model)
        size = model.parts.limits.vocab_size
        for token in body.tokens:
            if token >= size:
                raise bad_request(f"token {token} is out of vocabulary ({size} tokens, from 0)", "tokens")
        texts = await frontend.run_in_pool(lambda: tokenizer.decode_batch([body.tokens], skip_special_tokens=False))
        return JsonResponse({"prompt": texts[0]})

    @router.get("/tokenizer_info")
    @router.get("/v1/tokenizer_info")
    async def tokenizer_info() -> Response:
        missing = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))
        facts = {**missing, **tokenizer.special_tokens, "chat_template": model.chat_template}
        limits = {"vocab_size": model.parts.limits.vocab_size, "model_max_length": model.parts.limits.context}
        return JsonResponse({**facts, **limits})

    return router


def _tokenize(frontend: Frontend, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.messages is not None:
        messages, options = parse_conversation(body, body.messages, frontend.model.facts.chat_template)
        return frontend.encode_prompts([messages], options)[0]
    options = PromptOptions(body.add_special_tokens is not False, special_tokens=body.special_tokens)
    return frontend.encode_prompts([body.prompt or ""], options)[0]
