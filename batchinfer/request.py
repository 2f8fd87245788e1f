"""Requests to the engine and their results: plain values, no torch, no numpy.

A row asks for `n` samples; each sample is one `Request`. Token ids are ints, logprobs natural logarithms.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol, cast

from batchinfer.errors import BadParameters, RowError, format_value, suggest
from batchinfer.numeric import to_integer, to_number
from batchinfer.structured import StructuredOutputs

FinishReason = Literal["stop", "length", "error"]
Pooling = Literal["mean", "last", "cls"]
"""Pooling of a prompt's hidden states to its embedding: mean of all tokens, last token, or first token (cls)."""

StopCheck = Callable[[int], bool]
"""Function of the next output token id; True if that token completed a stop string."""

MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128  # vLLM's limit
_MOST = (1 << 63) - 1
_TOKEN_ID = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters and stop conditions, with the field names of vLLM and OpenAI.

    temperature 0 is greedy. top_k 0 or -1 and top_p 1 mean off. `max_tokens` None means up to the end of the context.
    `logprobs` k returns the logprob of the sampled token and of the k best tokens, from the unmodified log-softmax;
    `prompt_logprobs` k does the same for the tokens of the prompt, and allows `max_tokens` 0: nothing is generated.
    `logprob_token_ids` names the tokens to return logprobs of instead of the best ones, and implies logprobs.
    `structured_outputs` may be given as a mapping: see `StructuredOutputs.of`.
    Raises BadParameters for a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logprob_token_ids"):
            _freeze(self, name)
        if self.logprob_token_ids is not None:
            _name_logprobs(self, self.logprob_token_ids)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "structured_outputs", StructuredOutputs.of(self.structured_outputs))
        for name, limits in _RANGES.items():
            given = getattr(self, name)
            plain = limits.checked(name, given)
            if plain is not given:
                object.__setattr__(self, name, plain)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise BadParameters(f"{name} must be true or false, got {format_value(getattr(self, name))}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise BadParameters(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise BadParameters("max_tokens 0 asks for nothing: it goes with prompt_logprobs")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise BadParameters("allowed_token_ids is empty: no token could be chosen")

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], base: SamplingParams | None = None, without: Collection[str] = ()
    ) -> SamplingParams:
        """Return `base` without the fields `without`, overridden by `values`; a None in `values` overrides nothing.

        Raises BadParameters for an unknown name.
        """
        known = {f.name for f in fields(cls)}
        merged = {name: getattr(base, name) for name in known.difference(without)} if base is not None else {}
        for name, value in values.items():
            if name not in known:
                raise BadParameters(f"unknown sampling parameter {name!r}{suggest(str(name), known)}")
            if value is not None:
                merged[name] = value
        return cls(**merged)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """True if any penalty is on."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class _Range(NamedTuple):
    """Range of a numeric field. `above`: `low` itself is excluded; `optional`: None is allowed."""

    whole: bool
    low: float
    high: float
    above: bool = False
    optional: bool = False

    def checked(self, name: str, value: Any) -> int | float | None:
        """Return `value` as a plain number. Raises BadParameters."""
        if value is None and self.optional:
            return None
        given = to_integer(value) if self.whole else to_number(value)
        if given is None or (self.whole and type(given) is not int):
            raise BadParameters(
                f"{name} must be {'an integer' if self.whole else 'a number'}, got {format_value(value)}"
            )
        if not self.low <= given <= self.high or given == math.inf or (self.above and given == self.low):
            raise BadParameters(f"{name} must be {self._words(given)}, got {format_value(value)}")
        return cast(int | float, given)

    def _words(self, given: int | float) -> str:
        if self.high < _MOST:
            return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"
        if given > self.low:
            return "finite" if self.high == math.inf else f"at most {self.high}"
        return f"{'above' if self.above else 'at least'} {self.low:g}" if self.low > -_MOST else f"at least {self.low}"


_RANGES = {
    "n": _Range(True, 1, 1024),
    "temperature": _Range(False, 0, math.inf),
    "top_p": _Range(False, 0, 1, above=True),
    "top_k": _Range(True, -1, _MOST),
    "min_p": _Range(False, 0, 1),
    "repetition_penalty": _Range(False, 0, math.inf, above=True),
    "presence_penalty": _Range(False, -2, 2),
    "frequency_penalty": _Range(False, -2, 2),
    "seed": _Range(True, -_MOST - 1, _MOST, optional=True),
    "max_tokens": _Range(True, 0, _MOST, optional=True),
    "min_tokens": _Range(True, 0, _MOST),
    "logprobs": _Range(True, 0, MAX_LOGPROBS, optional=True),
    "prompt_logprobs": _Range(True, 0, MAX_LOGPROBS, optional=True),
}


def _freeze(params: SamplingParams, name: str) -> None:
    """Turn a list into a tuple and a single stop string into a tuple of one, and check the type of the items."""
    value = getattr(params, name)
    if value is None and name in ("allowed_token_ids", "logprob_token_ids"):
        return
    if name == "stop" and isinstance(value, str):
        value = (value,)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise BadParameters(f"{name} must be a list, got {format_value(value)}")
    texts = name in ("stop", "bad_words")
    items = tuple(value if texts else map(to_integer, value))
    for entry in items:
        if type(entry) is not (str if texts else int) or entry == "":
            wanted = "a non-empty string" if texts else "a token id"
            raise BadParameters(f"{name} holds {format_value(entry)}; every item must be {wanted}")
    object.__setattr__(params, name, items)


def _name_logprobs(params: SamplingParams, ids: tuple[int, ...]) -> None:
    """Drop repeated ids, and turn logprobs on."""
    if not 1 <= len(ids) <= MAX_LOGPROB_TOKEN_IDS:
        raise BadParameters(f"logprob_token_ids must name 1 to {MAX_LOGPROB_TOKEN_IDS} tokens, got {len(ids)}")
    if params.max_tokens == 0:
        raise BadParameters("logprob_token_ids is about the tokens of the answer, and max_tokens is 0")
    object.__setattr__(params, "logprob_token_ids", tuple(dict.fromkeys(ids)))
    if params.logprobs is None:
        object.__setattr__(params, "logprobs", 0)


def _bias(value: Any) -> dict[int, float]:
    """Return logit_bias by token id. Ids may be text: JSON has no other keys."""
    if not isinstance(value, Mapping):
        raise BadParameters(f"logit_bias must map token ids to numbers, got {format_value(value)}")
    bias = {}
    for key, given in value.items():
        token = int(key) if isinstance(key, str) and _TOKEN_ID.fullmatch(key) else to_integer(key)
        amount = to_number(given)
        if type(token) is not int or amount is None:
            raise BadParameters(
                f"logit_bias must map token ids to numbers, got {format_value(key)}: {format_value(given)}"
            )
        if not -100.0 <= amount <= 100.0:
            raise BadParameters(f"logit_bias of token {token} must be in [-100, 100], got {given!r}")
        bias[token] = float(amount)
    return bias


class Matcher(Protocol):
    """Parser state of one answer in its grammar.

    complete: True if nothing may follow. error: why the grammar cannot be followed any further (a limit, a token that
    it forbids), else empty.
    """

    def accept(self, token: int) -> None:
        """Advance by the next token of the answer."""
        ...

    @property
    def complete(self) -> bool: ...

    @property
    def error(self) -> str: ...


class Constraint(Protocol):
    """A compiled grammar, shared by all sequences that must follow it."""

    def matcher(self, output: Sequence[int]) -> Matcher:
        """Return a matcher for one sequence, which has generated `output` so far."""
        ...

    def fill(self, matchers: Sequence[Matcher], address: int, row_bytes: int) -> None:
        """Write the bit mask of the tokens that may come next, for matchers of any constraints of this tokenizer.

        Row i starts at `address + i * row_bytes`: 32-bit words, bit t % 32 of word t // 32 for token t.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One sample of one row, ready for the engine: everything that needs a tokenizer is already resolved.

    `max_tokens` fits the context; it may be 0 if the prompt is read. `key` seeds the counter-based random numbers of
    this sample. `stop_ids` end the sequence (end-of-sequence tokens unless ignored, and the ids of the user).
    `bad_words` are token id sequences. `score_from` reads the logprob of each prompt token from that position (≥ 1) on,
    and of its `params.prompt_logprobs` alternatives; `pooling` reads the sum of hidden states. `stop_check` and
    `constraint` stay in the scheduler's process: see `engine.plan`.
    """

    request_id: int
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    key: int = 0
    stop_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_check: StopCheck | None = None
    constraint: Constraint | None = None
    score_from: int | None = None
    pooling: Pooling | None = None

    @property
    def stateless(self) -> bool:
        """True if a token depends on its logits, position and key alone, not on state kept of the tokens before."""
        params = self.params
        edited = self.bad_words or params.logit_bias or params.allowed_token_ids or params.min_tokens
        return self.constraint is None and not params.penalised and not edited

    def rows_read(self) -> range | None:
        """Return the prompt positions whose final hidden state is read, or None if only the KV cache is filled."""
        length = len(self.prompt)
        if self.score_from is not None:  # the hidden state at a position gives the logprob of the next token
            return range(min(self.score_from, length) - 1, length - 1)
        if self.pooling is None:
            return None
        return {"mean": range(length), "last": range(length - 1, length), "cls": range(1)}[self.pooling]


class TokenLogprob(NamedTuple):
    """The logprob of a token, and in `top` the best tokens (as many as requested) with their logprobs, best first.

    All are gathered from one log-softmax: the most probable token has the logprob of the first in `top`.
    With `logprob_token_ids`, `top` holds the named tokens instead, in their order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of a continuation or of a whole text. `logprob` is the sum of `token_logprobs`.

    `is_greedy`: True if no other token was more probable at any position. `text`: the continuation, if it was given as
    text.
    """

    logprob: float
    is_greedy: bool
    token_ids: list[int]
    token_logprobs: list[float]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """Result of a request. `token_ids` includes the stop token, if one ended it. `error` excludes the rest.

    `prompt_logprobs` has an entry per prompt token, None before `score_from`. `hidden` is the sum of the pooled rows'
    final hidden states, [hidden size].
    `cached_tokens` of the prompt were found in the prefix cache.
    """

    request: Request
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    error: RowError | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    hidden: array[float] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """Answer of one sample."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Answer to one prompt: `n` outputs, or an error and no output.

    `prompt_logprobs`, if requested: one entry per prompt token, None for the first and for tokens before `score_from`.
    `scores`: one per continuation (`choice` is the most likely), or one of the whole text. `embedding` has the hidden
    size of the model. With scores or an embedding there are no outputs. `per_content`: of a prompt with several
    contents, the completion of each. `cached_tokens` of the prompt were not computed for it.
    """

    index: int
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    error: RowError | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    scores: list[Score] | None = None
    choice: int | None = None
    embedding: list[float] | None = None
    per_content: list[Completion] | None = None
    cached_tokens: int = 0
