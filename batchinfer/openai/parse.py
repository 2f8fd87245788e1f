"""From a body to what the engine is asked: prompts, parameters, and what the chat template gets besides messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import ValidationError

from batchinfer.errors import InvalidInput
from batchinfer.openai.as_chat import Rephrased
from batchinfer.openai.chat_messages import conversation
from batchinfer.openai.messages_request import MessagesRequest
from batchinfer.openai.request_models import ChatRequest, CompletionRequest, EmbeddingRequest, of_validation
from batchinfer.openai.responses_request import ResponseRequest
from batchinfer.openai.sampling_fields import chat_params, completion_params, effective, says_nothing
from batchinfer.openai.tools import ToolUse, tool_use
from batchinfer.pipeline.encoding import Content, PromptOptions, Truncation
from batchinfer.pipeline.scoring import Pooled
from batchinfer.request import Pooling, SamplingParams
from batchinfer.text.tokenizer import Tokenizer

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ROUTES = (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES)
DEFAULT_POOLING: Pooling = "mean"
MAX_SAMPLES = 16384  # of one request: prompts times n

Body = ChatRequest | CompletionRequest | EmbeddingRequest | Rephrased
_BODIES: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    COMPLETIONS: CompletionRequest,
    EMBEDDINGS: EmbeddingRequest,
    RESPONSES: ResponseRequest,
}
_NAMES: dict[str, Mapping[str, str]] = {
    EMBEDDINGS: {"prompt": "input"},
    RESPONSES: ResponseRequest.names,
    MESSAGES: MessagesRequest.names,
}


@dataclass(frozen=True, slots=True)
class WireModel:
    """What of a model decides how bodies are read and answers written. `chat_template` is its source.

    `names`: what it answers to.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    chat_template: str | None
    defaults: SamplingParams

    def signature(self, body: Body) -> str:
        """The name that an answer bears: the one that was asked for if it is one of `names`, else the first of them."""
        return body.model if body.model in self.names else self.names[0]


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """`contents` are prompts, each of which gets `params.n` answers, or a vector where they are `read`.

    `nothing`: no tokens are wanted, and what the engine generates is not shown. `shows_prompt`: logprobs of the prompt
    are wanted as a table of their own. `use`: how tool calls are read from the answers.
    """

    body: Body
    contents: list[Content]
    params: SamplingParams
    framing: PromptOptions
    read: Pooled | None = None
    nothing: bool = False
    shows_prompt: bool = False
    use: ToolUse | None = None

    @property
    def shows_ids(self) -> bool:
        """Whether the answer has the token ids of prompts and answers, or cannot be written without them."""
        body = self.body
        if isinstance(body, EmbeddingRequest):
            return False
        echoes = isinstance(body, CompletionRequest) and bool(body.echo)
        return bool(body.return_token_ids) or (echoes and self.framing.truncation is not None)

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """Of a chat, in whatever words it was asked for."""
        if isinstance(self.body, CompletionRequest | EmbeddingRequest):
            return None
        return cast(list[dict[str, Any]], self.contents[0])


def parse(url: Any, body: Any) -> Body:
    """The body of a request line. Raises InvalidInput."""
    found = _route(url)
    if found is None:
        what = "url is missing" if url is None else f"url {url!r} is not supported"
        raise InvalidInput(f"{what}: {', '.join(ROUTES)} are")
    if not isinstance(body, Mapping):
        raise InvalidInput("body must be a JSON object")
    try:
        return _BODIES[found].model_validate(body)
    except ValidationError as error:
        raise of_validation(error.errors()) from None


def _route(url: Any) -> str | None:
    """Some write their server's address before it; a chat's url ends as a completion's does, and so comes first."""
    return next((route for route in ROUTES if isinstance(url, str) and url.endswith(route.removeprefix("/v1"))), None)


def field_of(url: Any, param: str | None) -> str | None:
    """What a route calls the field that an error is about."""
    names = next((names for route, names in _NAMES.items() if isinstance(url, str) and route in url), {})
    return param if param is None else names.get(param, param)


def ask(body: Body, model: WireModel) -> ParsedRequest:
    """Raises BadParameters, InvalidInput."""
    if isinstance(body, Rephrased):
        asked = _ask_chat(body.chat(), model)
        return replace(asked, body=body, framing=replace(asked.framing, whole_answer=body.whole_answer))
    if isinstance(body, ChatRequest):
        return _ask_chat(body, model)
    return _ask_completion(body, model.defaults) if isinstance(body, CompletionRequest) else _ask_vectors(body, model)


def _ask_chat(body: ChatRequest, model: WireModel) -> ParsedRequest:
    use = tool_use(body, model.chat_template)
    forced = use.constraint if use is not None else None
    params = chat_params(body, model.defaults, forced, keep_special=use is not None and use.keeps_special)
    messages, framing = conversation(body, body.messages, model.chat_template)
    framing = replace(framing, whole_answer=True, truncation=_truncation(body))
    return ParsedRequest(body, [messages], params, framing, shows_prompt=params.prompt_logprobs is not None, use=use)


def _ask_completion(body: CompletionRequest, defaults: SamplingParams) -> ParsedRequest:
    params = completion_params(body, defaults)
    contents = _contents(body.prompt, "prompt")
    if len(contents) * params.n > MAX_SAMPLES:
        raise InvalidInput(f"{len(contents)} prompts times n {params.n} are more than {MAX_SAMPLES} samples", param="n")
    framing = replace(_framing(body), whole_answer=True)
    nothing = says_nothing(body, defaults)
    shows = effective(body, "prompt_logprobs", defaults) is not None
    return ParsedRequest(body, contents, params, framing, nothing=nothing, shows_prompt=shows)


def _ask_vectors(body: EmbeddingRequest, model: WireModel) -> ParsedRequest:
    contents = _contents(body.input, "input")
    if len(contents) > MAX_SAMPLES:
        raise InvalidInput(f"{len(contents)} inputs are more than {MAX_SAMPLES}", param="input")
    read = Pooled(body.pooling or DEFAULT_POOLING, body.normalize is not False, body.dimensions)
    return ParsedRequest(body, contents, model.defaults, _framing(body), read)


def _framing(body: CompletionRequest | EmbeddingRequest) -> PromptOptions:
    special = body.add_special_tokens is not False
    return PromptOptions(special, truncation=_truncation(body), special_tokens=body.special_tokens)


def _truncation(body: Body) -> Truncation | None:
    kept = body.truncate_prompt_tokens
    return None if kept is None else Truncation(kept, first=body.truncation_side == "right")


def _contents(given: Any, name: str) -> list[Content]:
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given or [] in given:  # an empty text may still have the token that all texts begin with
        raise InvalidInput(f"{name} is empty", param=name)
    return list(given)
