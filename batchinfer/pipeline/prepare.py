"""Prompts to requests: chat template, tokenizing, and every check of a prompt against the model.

`Preparer` works on batches. A prompt that is wrong becomes a `Refused`: no exception for one prompt leaves this module.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchinfer.errors import BadParameters, InvalidInput, RowError, TooLong
from batchinfer.pipeline.encoding import PromptEncoder, SpecialTokens, Text
from batchinfer.pipeline.prompt import Prepared, Prompt, PromptContent, Refused, contents_of, mix
from batchinfer.pipeline.scoring import Continuations, Pooled, Rolling, pair, windows
from batchinfer.request import Pooling, Request, SamplingParams
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.detokenize import StopStrings, bad_word_ids
from batchinfer.text.grammar import Grammars
from batchinfer.text.tokenizer import Tokenizer

_SEED_MASK = (1 << 64) - 1
_READING = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=1)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Limits of a model. `context` counts prompt and answer, in tokens."""

    context: int
    vocab_size: int
    eos_ids: frozenset[int]


class Preparer:
    """Renders, tokenizes and checks prompts. Thread-safe: calls are serialised."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: ModelLimits,
        defaults: SamplingParams,
        chat: ChatTemplate | None,
        chat_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokens | None = None,
    ) -> None:
        """Make a preparer. The last three parameters: see `PromptEncoder`."""
        self.encoder = PromptEncoder(tokenizer, chat, chat_kwargs, special_tokens)
        self._tokenizer = tokenizer
        self._limits = limits
        self._defaults = defaults
        self._grammars = Grammars(tokenizer, limits.vocab_size, limits.eos_ids)
        self._next_id = 0
        self._lock = threading.Lock()
        self._checked: SamplingParams | None = None  # the last params whose token ids were found in the vocabulary
        self._stops: dict[tuple[tuple[str, ...], bool, bool], StopStrings] = {}

    def prepare(self, prompts: Iterable[Prompt]) -> list[Prepared | Refused]:
        """Prepare all contents of these prompts, in order."""
        return self.prepare_contents(list(contents_of(prompts)))

    def prepare_contents(self, contents: Sequence[PromptContent]) -> list[Prepared | Refused]:
        """Return one result per content, in order."""
        generating = [content.prompt.params for content in contents if content.prompt.read is None]
        for params in {id(params): params for params in generating}.values():
            with contextlib.suppress(BadParameters):  # raised again for each of its prompts
                self.compile_grammar(params or self._defaults)
        with self._lock:
            return self._prepare(contents)

    def compile_grammar(self, params: SamplingParams) -> None:
        """Compile and cache the grammar of `params`, if they ask for one, without the lock. Raises BadParameters."""
        if params.structured_outputs is not None:
            self._grammars.compile(params.structured_outputs)

    def _prepare(self, contents: Sequence[PromptContent]) -> list[Prepared | Refused]:
        texts = [self._render(content) for content in contents]
        results: list[Prepared | Refused] = []
        for content, text, ids in zip(contents, texts, self._tokenize(contents, texts), strict=True):
            try:
                if isinstance(ids, RowError):
                    raise ids
                ids = self._truncate(content.prompt, ids)
                if content.prompt.read is None:
                    results.append(self._generation(content, ids, isinstance(text, Text)))
                else:
                    results.append(self._reading(content, text, ids))
            except RowError as error:
                known = ids if isinstance(ids, list) else []
                results.append(Refused(content.prompt.index, known, error, content.place, content.count))
        return results

    def _render(self, content: PromptContent) -> Text | list[int] | RowError:
        prompt = content.prompt
        return self.encoder.text(content.content, prompt.options) if prompt.error is None else prompt.error

    def _tokenize(
        self, contents: Sequence[PromptContent], texts: list[Text | list[int] | RowError]
    ) -> list[list[int] | RowError]:
        """Return the ids of each text. Contexts, and texts to be scored, get no special tokens here."""
        results: list[list[int] | RowError] = [[] if isinstance(text, Text) else text for text in texts]
        for special in (True, False):
            wanted = [
                (place, _context(content.prompt, text.text))
                for place, (content, text) in enumerate(zip(contents, texts, strict=True))
                if isinstance(text, Text)
                and (text.special and not isinstance(content.prompt.read, Continuations | Rolling)) is special
            ]
            encoded = self.encoder.encode([text for _, text in wanted], special)
            for (place, _), ids in zip(wanted, encoded, strict=True):
                results[place] = ids
        return results

    def _truncate(self, prompt: Prompt, ids: list[int]) -> list[int]:
        """Apply the request's truncation to its prompt. Raises BadParameters."""
        truncation = None if prompt.options is None else prompt.options.truncation
        if truncation is None:
            return ids
        wanted = (prompt.params or self._defaults).max_tokens
        answer = 0 if prompt.read is not None else 1 if wanted is None else wanted
        return truncation.cut(ids, self._limits.context, answer)

    def _generation(self, content: PromptContent, ids: list[int], tokenized: bool) -> Prepared:
        """Return the requests of a prompt that is answered, one per sample. tokenized: a tokenizer made the ids."""
        prompt = content.prompt
        params = prompt.params or self._defaults
        limits = self._limits
        self._check_ids(ids, 1 if params.max_tokens != 0 else -1, tokenized)
        if params is not self._checked:  # mostly all rows have one object
            _check_params(params, limits.vocab_size)
            self._checked = params
        stop_ids: frozenset[int] = frozenset() if params.ignore_eos else limits.eos_ids
        if params.stop_token_ids:  # else all rows share one set, and every token of each row is looked up in it
            stop_ids = stop_ids.union(params.stop_token_ids)
        room = max(0, limits.context - len(ids))
        if prompt.options is not None and prompt.options.whole_answer:
            _check_room(params, len(ids), limits.context)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        score_from = None if params.prompt_logprobs is None else 1
        bad_words = bad_word_ids(self._tokenizer, params.bad_words) if params.bad_words else ()
        stop = self._stop_strings(params) if params.stop else None
        wanted = params.structured_outputs
        constraint = self._grammars.compile(wanted) if wanted is not None else None
        key = content.key if params.seed is None else params.seed & _SEED_MASK
        requests = []
        for sample in range(params.n):
            self._next_id += 1
            requests.append(
                Request(
                    request_id=self._next_id,
                    prompt=ids,
                    params=params,
                    max_tokens=max_tokens,
                    key=mix(key, sample),
                    stop_ids=stop_ids,
                    bad_words=bad_words,
                    stop_check=stop.checker(params.min_tokens) if stop is not None else None,
                    constraint=constraint,
                    score_from=score_from if sample == 0 else None,
                )
            )
        return Prepared(prompt.index, ids, params, requests, stop, None, content.place, content.count)

    def _reading(self, content: PromptContent, text: Text | list[int] | RowError, ids: list[int]) -> Prepared:
        """Return the requests of a prompt that is scored or embedded."""
        read = content.prompt.read
        assert read is not None
        if isinstance(read, Pooled):
            self._check_ids(ids, 0)
            requests = [self._reading_request(ids, pooling=read.pooling)]
        else:
            if isinstance(read, Rolling):
                if not ids:
                    raise InvalidInput("the text is empty", param="prompt")
                pieces = list(windows(ids, self._prefix_id(), self._limits.context))
            else:
                tails = self._continuations(text.text if isinstance(text, Text) else None, len(ids), read)
                ids = self.encoder.led(ids) if isinstance(text, Text) and text.special else ids
                ids = ids or [self._prefix_id()]
                pieces = [([*ids, *tail], len(ids)) for tail in tails]
            for piece, _ in pieces:
                self._check_ids(piece, -1)
            requests = [self._reading_request(piece, score_from=first) for piece, first in pieces]
        return Prepared(content.prompt.index, ids, _READING, requests, None, read, content.place, content.count)

    def _check_ids(self, ids: list[int], more: int, tokenized: bool = False) -> None:
        """Raise TooLong or InvalidInput for prompt ids that the model cannot take.

        more: tokens that the context must hold besides, or need not hold (-1). tokenized: a tokenizer made the ids.
        """
        limits = self._limits
        if not ids:
            raise InvalidInput("the prompt is empty", param="prompt")
        if len(ids) + more > limits.context:
            room = ", with room for an answer" if more > 0 else ""
            raise TooLong(f"the prompt has {len(ids)} tokens and the context {limits.context}{room}")
        if max(ids) >= limits.vocab_size or not (tokenized or min(ids) >= 0):
            raise InvalidInput(f"a prompt token id is out of vocabulary (0 to {limits.vocab_size - 1})")

    def _reading_request(
        self, ids: list[int], score_from: int | None = None, pooling: Pooling | None = None
    ) -> Request:
        self._next_id += 1
        return Request(self._next_id, ids, _READING, 0, score_from=score_from, pooling=pooling)

    def _continuations(self, before: str | None, skipped: int, read: Continuations) -> list[list[int]]:
        """Return the ids of each continuation. Raises InvalidInput.

        The ids of a text are those of context and text together, less as many as the context has alone (`skipped`).
        before: the context, where it is text.
        """
        read.check_texts()
        texts = [text for text in read.texts if isinstance(text, str)]
        tails: Iterator[list[int]] = iter(())
        if texts and before is not None:
            kept = pair(before, "")[0]
            wholes = self._encode([kept + pair(before, text)[1] for text in texts])
            tails = (whole[skipped:] for whole in wholes)
        elif texts:
            tails = iter(self._encode(texts))
        found = [next(tails) if isinstance(text, str) else list(text) for text in read.texts]
        if not all(found):
            raise InvalidInput("a continuation has no tokens of its own")
        return found

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self.encoder.encode(texts, special=False)
        for ids in encoded:
            if isinstance(ids, RowError):
                raise ids
        return [ids for ids in encoded if isinstance(ids, list)]

    def _prefix_id(self) -> int:
        """Return the token that precedes the first one of a text: BOS, or EOS if there is none. Raises InvalidInput."""
        if self._tokenizer.bos_id is not None:
            return self._tokenizer.bos_id
        if not self._limits.eos_ids:
            raise InvalidInput("the model has neither a BOS nor an EOS token to put before the first token")
        return min(self._limits.eos_ids)

    def _stop_strings(self, params: SamplingParams) -> StopStrings:
        key = (params.stop, params.include_stop_str_in_output, params.skip_special_tokens)
        if key not in self._stops:
            if len(self._stops) > 1000:  # every row brings its own stop strings
                self._stops.clear()
            self._stops[key] = StopStrings(self._tokenizer, *key)
        return self._stops[key]


def _context(prompt: Prompt, text: str) -> str:
    return pair(text, "")[0] if isinstance(prompt.read, Continuations) else text


def _check_room(params: SamplingParams, prompt_tokens: int, context: int) -> None:
    """Raise TooLong if the context has no room for `max_tokens` after the prompt."""
    if params.max_tokens is not None and prompt_tokens + params.max_tokens > context:
        raise TooLong(
            f"this model's context is {context} tokens; the prompt has {prompt_tokens} and max_tokens asks for "
            f"{params.max_tokens} more",
            param="max_tokens",
        )


def _check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise BadParameters if a parameter names a token outside the vocabulary."""
    given = {
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
        "logprob_token_ids": params.logprob_token_ids or (),
    }
    for name, ids in given.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise BadParameters(f"{name} names token {token}, out of vocabulary ({vocab_size} tokens, from 0)")
