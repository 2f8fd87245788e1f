"""From prompts to requests: chat templates, tokenizing and all checks of a prompt against the model, batch by batch.

`Preparer` works on batches, in a thread of its own (`Feeder`), so that tokenizing runs ahead of the engine. A prompt
that is wrong becomes an error completion here; no exception for one prompt leaves this module.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from batchinfer.errors import BadParameters, InvalidInput, RowError, TooLong
from batchinfer.pipeline.encoding import Content, PromptEncoder, PromptOptions, SpecialTokens, Text
from batchinfer.pipeline.scoring import Continuations, Pooled, Read, Rolling, pair, windows
from batchinfer.request import Completion, Pooling, Request, SamplingParams
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.detokenize import StopStrings, bad_word_ids
from batchinfer.text.grammar import Grammars
from batchinfer.text.tokenizer import Tokenizer

_MASK = (1 << 64) - 1
_READING = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=1)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: text as it is, token ids, or chat messages. `index` comes back in its completion.

    `params` None means the model's and job's defaults. `key` seeds the random numbers of its samples. A prompt that
    already has an `error` becomes an error completion, so that a stream of rows keeps one answer per row. With `read`
    nothing is generated: the prompt is scored or embedded, and `params` do not matter.
    """

    index: int
    content: Content | None
    params: SamplingParams | None = None
    key: int = 0
    error: RowError | None = None
    read: Read | None = None
    options: PromptOptions | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt that the engine can run: one request per sample, all with the same prompt ids.

    With `read`, a request per continuation, or per window of a long text.
    """

    index: int
    ids: list[int]
    params: SamplingParams
    requests: list[Request]
    stop: StopStrings | None
    read: Read | None = None


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model allows. `context` counts prompt and answer, in tokens."""

    context: int
    vocab_size: int
    eos_ids: frozenset[int]


def mix(key: int, number: int) -> int:
    """A 64-bit key for part `number` of `key` (the finaliser of splitmix64; Steele, Lea, Flood 2014)."""
    z = (key + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Preparer:
    """Checks and tokenizes prompts. Threads take turns."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: ModelLimits,
        defaults: SamplingParams,
        chat: ChatTemplate | None,
        chat_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokens | None = None,
    ) -> None:
        """The last three: see `PromptEncoder`."""
        self.encoder = PromptEncoder(tokenizer, chat, chat_kwargs, special_tokens)
        self._tokenizer = tokenizer
        self._limits = limits
        self._defaults = defaults
        self._grammars = Grammars(tokenizer, limits.vocab_size, limits.eos_ids)
        self._next_id = 0
        self._turn = threading.Lock()
        self._checked: SamplingParams | None = None  # the last whose token ids were found in the vocabulary
        self._stops: dict[tuple[tuple[str, ...], bool, bool], StopStrings] = {}

    def prepare(self, prompts: list[Prompt]) -> list[Prepared | Completion]:
        """One result per prompt, in order: ready to run, or an error completion."""
        for params in {id(one.params): one.params for one in prompts if one.read is None}.values():
            with contextlib.suppress(BadParameters):  # said again where its prompt is looked at
                self.compile(params or self._defaults)
        with self._turn:
            return self._prepare(prompts)

    def compile(self, params: SamplingParams) -> None:
        """Have the grammar of `params`, if they ask for one, at hand. Nobody waits meanwhile. Raises BadParameters."""
        if params.structured_outputs is not None:
            self._grammars.compile(params.structured_outputs)

    def _prepare(self, prompts: list[Prompt]) -> list[Prepared | Completion]:
        texts = [self._text(prompt) for prompt in prompts]
        results: list[Prepared | Completion] = []
        for prompt, text, ids in zip(prompts, texts, self._tokenize(prompts, texts), strict=True):
            try:
                if isinstance(ids, RowError):
                    raise ids
                ids = self._cut(prompt, ids)
                if prompt.read is None:
                    results.append(self._prepared(prompt, ids, isinstance(text, Text)))
                else:
                    results.append(self._read(prompt, text, ids))
            except RowError as error:
                known = ids if isinstance(ids, list) else []
                results.append(Completion(prompt.index, known, error=error))
        return results

    def _text(self, prompt: Prompt) -> Text | list[int] | RowError:
        return self.encoder.text(prompt.content, prompt.options) if prompt.error is None else prompt.error

    def _tokenize(self, prompts: list[Prompt], texts: list[Text | list[int] | RowError]) -> list[list[int] | RowError]:
        """Ids of each text. Contexts, and texts to be scored, get no special tokens here."""
        results: list[list[int] | RowError] = [[] if isinstance(text, Text) else text for text in texts]
        for special in (True, False):
            wanted = [
                (place, _context(prompt, text.text))
                for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
                if isinstance(text, Text)
                and (text.special and not isinstance(prompt.read, Continuations | Rolling)) is special
            ]
            encoded = self.encoder.encode([text for _, text in wanted], special)
            for (place, _), ids in zip(wanted, encoded, strict=True):
                results[place] = ids
        return results

    def _cut(self, prompt: Prompt, ids: list[int]) -> list[int]:
        """What a request's truncation leaves of its prompt. Raises BadParameters."""
        truncation = None if prompt.options is None else prompt.options.truncation
        if truncation is None:
            return ids
        wanted = (prompt.params or self._defaults).max_tokens
        answer = 0 if prompt.read is not None else 1 if wanted is None else wanted
        return truncation.cut(ids, self._limits.context, answer)

    def _prepared(self, prompt: Prompt, ids: list[int], tokenized: bool) -> Prepared:
        params = prompt.params or self._defaults
        limits = self._limits
        self._check_prompt(ids, 1 if params.max_tokens != 0 else -1, tokenized)
        if params is not self._checked:  # mostly all rows have one object
            _check_ids(params, limits.vocab_size)
            self._checked = params
        stop_ids: frozenset[int] = frozenset() if params.ignore_eos else limits.eos_ids
        if params.stop_token_ids:  # else all rows have one object: every token of each is looked up in it
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
        requests = []
        for sample in range(params.n):
            self._next_id += 1
            requests.append(
                Request(
                    request_id=self._next_id,
                    prompt=ids,
                    params=params,
                    max_tokens=max_tokens,
                    key=mix(prompt.key if params.seed is None else params.seed & _MASK, sample),
                    stop_ids=stop_ids,
                    bad_words=bad_words,
                    stop_check=stop.checker(params.min_tokens) if stop is not None else None,
                    constraint=constraint,
                    score_from=score_from if sample == 0 else None,
                )
            )
        return Prepared(prompt.index, ids, params, requests, stop)

    def _read(self, prompt: Prompt, text: Text | list[int] | RowError, ids: list[int]) -> Prepared:
        """A prompt that is scored or embedded."""
        read = prompt.read
        assert read is not None
        if isinstance(read, Pooled):
            self._check_prompt(ids, 0)
            request = self._request(ids, pooling=read.pooling)
            return Prepared(prompt.index, ids, _READING, [request], None, read)
        if isinstance(read, Rolling):
            if not ids:
                raise InvalidInput("the text is empty", param="prompt")
            parts = list(windows(ids, self._prefix_id(), self._limits.context))
        else:
            tails = self._continuations(text.text if isinstance(text, Text) else None, len(ids), read)
            ids = self.encoder.led(ids) if isinstance(text, Text) and text.special else ids
            ids = ids or [self._prefix_id()]
            parts = [([*ids, *tail], len(ids)) for tail in tails]
        for part, _ in parts:
            self._check_prompt(part, -1)
        requests = [self._request(part, score_from=first) for part, first in parts]
        return Prepared(prompt.index, ids, _READING, requests, None, read)

    def _check_prompt(self, ids: list[int], more: int, tokenized: bool = False) -> None:
        """Raises TooLong or InvalidInput.

        more: tokens that the context must hold besides, or need not hold (-1). tokenized: the ids are a tokenizer's.
        """
        limits = self._limits
        if not ids:
            raise InvalidInput("the prompt is empty", param="prompt")
        if len(ids) + more > limits.context:
            room = ", with room for an answer" if more > 0 else ""
            raise TooLong(f"the prompt has {len(ids)} tokens and the context {limits.context}{room}")
        if max(ids) >= limits.vocab_size or not (tokenized or min(ids) >= 0):
            raise InvalidInput(f"a prompt token id is out of vocabulary (0 to {limits.vocab_size - 1})")

    def _request(self, ids: list[int], score_from: int | None = None, pooling: Pooling | None = None) -> Request:
        self._next_id += 1
        return Request(self._next_id, ids, _READING, 0, score_from=score_from, pooling=pooling)

    def _continuations(self, before: str | None, skipped: int, read: Continuations) -> list[list[int]]:
        """The ids of each continuation: of texts, what the whole has after as many tokens as the context has alone.

        before: the context, where it is text.
        """
        read.check()
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
        """The token that the first of a text follows: beginning of sequence, or where there is none, its end."""
        if self._tokenizer.bos_id is not None:
            return self._tokenizer.bos_id
        if not self._limits.eos_ids:
            raise InvalidInput("the model has neither a BOS nor an EOS token to put before the first token")
        return min(self._limits.eos_ids)

    def _stop_strings(self, params: SamplingParams) -> StopStrings:
        key = (params.stop, params.include_stop_str_in_output, params.skip_special_tokens)
        if key not in self._stops:
            if len(self._stops) > 1000:  # stop strings of its own in every row
                self._stops.clear()
            self._stops[key] = StopStrings(self._tokenizer, *key)
        return self._stops[key]


def _context(prompt: Prompt, text: str) -> str:
    return pair(text, "")[0] if isinstance(prompt.read, Continuations) else text


def _check_room(params: SamplingParams, prompt_tokens: int, context: int) -> None:
    if params.max_tokens is not None and prompt_tokens + params.max_tokens > context:
        raise TooLong(
            f"this model's context is {context} tokens; the prompt has {prompt_tokens} and max_tokens asks for "
            f"{params.max_tokens} more",
            param="max_tokens",
        )


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
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


class Feeder:
    """Prepares prompts ahead of the engine in a thread, at most `depth` batches of `batch` prompts ahead.

    An exception of the prompts' own iterator ends the stream and is raised by `take`.
    """

    def __init__(self, prompts: Iterable[Prompt], preparer: Preparer, batch: int = 64, depth: int = 4) -> None:
        self._queue: queue.Queue[list[Prepared | Completion] | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._prompts = prompts
        self._preparer = preparer
        self._batch = batch
        self.done = False
        self._thread = threading.Thread(target=self._feed, name="batchinfer-feeder", daemon=True)
        self._thread.start()

    def take(self, wait_s: float | None) -> list[Prepared | Completion]:
        """The next batch; empty if none comes within `wait_s` (None: however long), or none will come: `done`."""
        if self.done:
            return []
        try:
            batch = self._queue.get(block=wait_s != 0.0, timeout=wait_s)
        except queue.Empty:
            return []
        if isinstance(batch, list):
            return batch
        self.done = True
        if batch is not None:
            raise batch
        return []

    def close(self) -> None:
        """Stop the thread; prompts that it has taken and not handed over are dropped."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _feed(self) -> None:
        end: BaseException | None = None
        prompts: Iterator[Prompt] = iter(self._prompts)
        try:
            while not self._closed.is_set() and (batch := list(islice(prompts, self._batch))):
                self._queue.put(self._preparer.prepare(batch))
        except BaseException as error:
            end = error
        finally:
            close = getattr(prompts, "close", None)
            if close is not None:
                close()
            self._queue.put(end)
