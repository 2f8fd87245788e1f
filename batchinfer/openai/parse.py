"""Parse a request body into prompts, prompt options and sampling parameters for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import ValidationError

from batchinfer.errors import InvalidInput
from batchinfer.openai.as_chat import ChatLikeRequest
from batchinfer.openai.chat_messages import parse_conversation
from batchinfer.openai.messages_request import MessagesRequest
from batchinfer.openai.request_models import ChatRequest, CompletionRequest, EmbeddingRequest, validation_error
from batchinfer.openai.responses_request import ResponseRequest
from batchinfer.openai.sampling_fields import chat_params, completion_params, effective_value, is_echo_only
from batchinfer.openai.tools import ToolUse, parse_tool_use
from batchinfer.pipeline.encoding import Content, PromptOptions, Truncation
from batchinfer.pipeline.scoring import Pooled
from batchinfer.request import Pooling, SamplingParams
from batchinfer.text.tokenizer import Tokenizer

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ROUTES = (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES)
DEFAULT_POOLING: Pooling = "mean"
MAX_SAMPLES = 16384  # per request: prompts times n

Body = ChatRequest | CompletionRequest | EmbeddingRequest | ChatLikeRequest
_REQUEST_MODELS: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    COMPLETIONS: CompletionRequest,
    EMBEDDINGS: EmbeddingRequest,
    RESPONSES: ResponseRequest,
}
_FIELD_NAMES: dict[str, Mapping[str, str]] = {
    EMBEDDINGS: {"prompt": "input"},
    RESPONSES: ResponseRequest.field_names,
    MESSAGES: MessagesRequest.field_names,
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about a model that decide how bodies are parsed and responses written.

    names: model names that clients may ask for. chat_template: its Jinja source, None without one. defaults: sampling
    parameters of requests that leave them out.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    chat_template: str | None
    defaults: SamplingParams

    def response_name(self, body: Body) -> str:
        """Return the `model` of the response: the requested name if it is one of `names`, else the first of them."""
        return body.model if body.model in self.names else self.names[0]


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A parsed request: each of `contents` is a prompt with `params.n` samples, or one embedding if `pooling` is set.

    echo_only: the client wants no tokens, so whatever the engine generates is not shown. returns_prompt_logprobs: the
    response has the `prompt_logprobs` table. tool_use: how tool calls are parsed from generated text.
    """

    body: Body
    contents: list[Content]
    params: SamplingParams
    options: PromptOptions
    pooling: Pooled | None = None
    echo_only: bool = False
    returns_prompt_logprobs: bool = False
    tool_use: ToolUse | None = None

    @property
    def returns_token_ids(self) -> bool:
        """Return True if the response shows token ids, or cannot be written without them."""
        body = self.body
        if isinstance(body, EmbeddingRequest):
            return False
        echoes = isinstance(body, CompletionRequest) and bool(body.echo)
        return bool(body.return_token_ids) or (echoes and self.options.truncation is not None)

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """Return the chat messages, whichever route they came by; None for completions and embeddings."""
        if isinstance(self.body, CompletionRequest | EmbeddingRequest):
            return None
        return cast(list[dict[str, Any]], self.contents[0])


def parse_body(url: Any, body: Any) -> Body:
    """Validate the body of a batch line against the request model of its route. Raises InvalidInput."""
    route = _match_route(url)
    if route is None:
        problem = "url is missing" if url is None else f"url {url!r} is not supported"
        raise InvalidInput(f"{problem}: {', '.join(ROUTES)} are")
    if not isinstance(body, Mapping):
        raise InvalidInput("body must be a JSON object")
    try:
        return _REQUEST_MODELS[route].model_validate(body)
    except ValidationError as error:
        raise validation_error(error.errors()) from None


def _match_route(url: Any) -> str | None:
    """Return the route that `url` ends with; some clients put the server's address before it.

    /chat/completions ends with /completions, so `ROUTES` lists it first.
    """
    return next((route for route in ROUTES if isinstance(url, str) and url.endswith(route.removeprefix("/v1"))), None)


def route_field(url: Any, param: str | None) -> str | None:
    """Return the name that the route at `url` gives to the field `param`."""
    names = next((names for route, names in _FIELD_NAMES.items() if isinstance(url, str) and route in url), {})
    return param if param is None else names.get(param, param)


def parse_request(body: Body, model: ModelFacts) -> ParsedRequest:
    """Return the prompts and parameters that `body` asks for. Raises BadParameters, InvalidInput."""
    if isinstance(body, ChatLikeRequest):
        request = _parse_chat(body.to_chat(), model)
        return replace(request, body=body, options=replace(request.options, whole_answer=body.whole_answer))
    if isinstance(body, ChatRequest):
        return _parse_chat(body, model)
    if isinstance(body, CompletionRequest):
        return _parse_completion(body, model.defaults)
    return _parse_embedding(body, model)


def _parse_chat(body: ChatRequest, model: ModelFacts) -> ParsedRequest:
    tool_use = parse_tool_use(body, model.chat_template)
    constraint = tool_use.constraint if tool_use is not None else None
    keep_special = tool_use is not None and tool_use.keeps_special
    params = chat_params(body, model.defaults, constraint, keep_special)
    messages, options = parse_conversation(body, body.messages, model.chat_template)
    options = replace(options, whole_answer=True, truncation=_truncation(body))
    shows_prompt = params.prompt_logprobs is not None
    return ParsedRequest(body, [messages], params, options, returns_prompt_logprobs=shows_prompt, tool_use=tool_use)


def _parse_completion(body: CompletionRequest, defaults: SamplingParams) -> ParsedRequest:
    params = completion_params(body, defaults)
    contents = _prompts(body.prompt, "prompt")
    if len(contents) * params.n > MAX_SAMPLES:
        raise InvalidInput(f"{len(contents)} prompts times n {params.n} are more than {MAX_SAMPLES} samples", param="n")
    options = replace(_prompt_options(body), whole_answer=True)
    echo_only = is_echo_only(body, defaults)
    shows_prompt = effective_value(body, "prompt_logprobs", defaults) is not None
    return ParsedRequest(body, contents, params, options, echo_only=echo_only, returns_prompt_logprobs=shows_prompt)


def _parse_embedding(body: EmbeddingRequest, model: ModelFacts) -> ParsedRequest:
    contents = _prompts(body.input, "input")
    if len(contents) > MAX_SAMPLES:
        raise InvalidInput(f"{len(contents)} inputs are more than {MAX_SAMPLES}", param="input")
    pooling = Pooled(body.pooling or DEFAULT_POOLING, body.normalize is not False, body.dimensions)
    return ParsedRequest(body, contents, model.defaults, _prompt_options(body), pooling)


def _prompt_options(body: CompletionRequest | EmbeddingRequest) -> PromptOptions:
    special = body.add_special_tokens is not False
    return PromptOptions(special, truncation=_truncation(body), special_tokens=body.special_tokens)


def _truncation(body: Body) -> Truncation | None:
    kept = body.truncate_prompt_tokens
    return None if kept is None else Truncation(kept, first=body.truncation_side == "right")


def _prompts(value: Any, param: str) -> list[Content]:
    """Return the list of prompts in `value`: a text, token ids, or a list of either. Raises InvalidInput if empty.

    An empty text is a prompt: the tokenizer may still add its beginning-of-sequence token.
    """
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        value = [value]
    if not value or [] in value:
        raise InvalidInput(f"{param} is empty", param=param)
    return list(value)
