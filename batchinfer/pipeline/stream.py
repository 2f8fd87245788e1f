"""One pass of prompts through the engine, and no work done twice on the way.

State: prompts that are prepared and not yet in the engine (`PrefixOrder`), groups of requests in it, groups that have
ended and are not yet text, and recent answers (`Repeats`). Data flow: feeder → order → engine → text → completions.
A prompt that fails anywhere becomes an error completion; an exception of the prompts' iterator ends the stream.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Generator, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import Protocol

from batchinfer.engine.output import StepOutput
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import RowError
from batchinfer.pipeline.prefix_order import PrefixOrder
from batchinfer.pipeline.prepare import Feeder, Prepared, Preparer, Prompt
from batchinfer.pipeline.scoring import Continuations, Pooled, best_choice, score_of
from batchinfer.request import Completion, CompletionOutput, Finished, Request
from batchinfer.text.tokenizer import Tokenizer

_DETOKENIZE_TOGETHER = 32  # finished prompts that are turned into text in one call
_GATHER_S = 0.05  # an idle engine waits so long for more prompts than the first: their order is worth it


class Batching(Protocol):
    """What a stream needs of an engine: `Engine` itself, or a share of one."""

    @property
    def wants_more(self) -> bool: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...

    def expected_tokens(self, request: Request) -> int: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: int) -> bool: ...

    def step(self) -> StepOutput: ...


class Stream:
    """Answers `prompts` in any order. `close` stops reading them and drops what is running."""

    def __init__(
        self, prompts: Iterable[Prompt], preparer: Preparer, engine: Batching, tokenizer: Tokenizer, max_num_seqs: int
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._order = PrefixOrder(max(1024, 4 * max_num_seqs))
        self._repeats = Repeats()
        self._groups: dict[int, _Group] = {}
        self._ready: list[_Group] = []
        self._feeder = Feeder(prompts, preparer)
        self._ended = False  # no more prompts come

    def completions(self) -> Generator[Completion, None, None]:
        while not self._feeder.done or self._order or self._engine.has_work or self._ready:
            yield from self._fill()
            self._ready += self._collect(self._engine.step().finished)
            if len(self._ready) >= _DETOKENIZE_TOGETHER or not self._engine.has_work:
                yield from self._answer()

    def close(self) -> None:
        self._feeder.close()
        for group in {id(group): group for group in self._groups.values()}.values():
            for request in group.prepared.requests:
                self._engine.abort(request.request_id)

    def _fill(self) -> Iterator[Completion]:
        """Keep window and engine full; yields what needs no engine: prompts in error, and repeated ones."""
        until = 0.0
        while self._order.has_room:
            batch = self._feeder.take(self._wait_s(until))
            until = until or time.monotonic() + _GATHER_S
            if not batch:
                break
            for item in batch:
                if isinstance(item, Completion):
                    yield item
                else:
                    self._order.add(item)
        if self._feeder.done and not self._ended:
            self._ended = True
            self._order.finish(lambda prepared: self._engine.expected_tokens(prepared.requests[0]))
        # no more than the next step can seat: those that come later may be better next
        while self._order and self._engine.wants_more:
            yield from self._start(self._order.pop())

    def _wait_s(self, until: float) -> float | None:
        """How long to wait for a batch: not beside work, until one comes if there is nothing, else till `until`."""
        if self._engine.has_work or self._ready:
            return 0.0
        return max(0.0, until - time.monotonic()) if self._order else None

    def _start(self, prepared: Prepared) -> Iterator[Completion]:
        group = _Group(prepared)
        known = self._repeats.find(group)
        if known is not None:
            self._engine.stats.prompt_tokens_reused += len(prepared.ids)
        if known is None:
            yield from self._submit(group)
        elif isinstance(known, _Group):
            known.followers.append(prepared)
        else:
            yield _again(known, prepared)

    def _submit(self, group: _Group) -> Iterator[Completion]:
        try:
            for request in group.prepared.requests:
                self._engine.add(request)
                self._groups[request.request_id] = group
        except RowError as error:
            for request in group.prepared.requests:
                self._engine.abort(request.request_id)
                self._groups.pop(request.request_id, None)
            self._repeats.drop(group)
            yield Completion(group.prepared.index, group.prepared.ids, error=error)

    def _collect(self, finished: list[Finished]) -> list[_Group]:
        """The prompts whose last sample is among `finished`."""
        complete = []
        for answer in finished:
            group = self._groups.pop(answer.request.request_id)
            group.answers.append(answer)
            if len(group.answers) == len(group.prepared.requests):
                complete.append(group)
        return complete

    def _answer(self) -> Iterator[Completion]:
        """Turn what is ready into text, together: one call of the tokenizer for most of it."""
        groups, self._ready = self._ready, []
        texts = self._texts([answer for group in groups for answer in group.answers if answer.error is None])
        for group in groups:
            error = next((answer.error for answer in group.answers if answer.error is not None), None)
            if error is None:
                completion = self._completion(group, texts)
                self._repeats.answered(group, completion)
            else:
                completion = Completion(group.prepared.index, group.prepared.ids, error=error)
                self._repeats.drop(group)
            yield completion
            for prepared in group.followers:
                yield _again(completion, prepared)

    def _completion(self, group: _Group, texts: dict[int, str]) -> Completion:
        """All samples of a prompt, and what its first read of the prompt."""
        prepared = group.prepared
        answers = sorted(group.answers, key=lambda answer: answer.request.request_id)
        if prepared.read is not None:
            return _reading(prepared, answers)
        outputs = []
        for answer in answers:
            text = self._cut(prepared, answer, texts[answer.request.request_id])
            outputs.append(CompletionOutput(text, answer.token_ids, answer.finish_reason, answer.logprobs))
        first = answers[0]
        scored, cached = first.prompt_logprobs, first.cached_tokens
        return Completion(prepared.index, prepared.ids, outputs, prompt_logprobs=scored, cached_tokens=cached)

    def _texts(self, answers: list[Finished]) -> dict[int, str]:
        """Request id → text."""
        texts: dict[int, str] = {}
        for skip in (True, False):
            same = [answer for answer in answers if answer.request.params.skip_special_tokens is skip]
            if same:
                decoded = self._tokenizer.decode_batch([_visible(answer) for answer in same], skip_special_tokens=skip)
                texts.update(zip((answer.request.request_id for answer in same), decoded, strict=True))
        return texts

    def _cut(self, prepared: Prepared, answer: Finished, text: str) -> str:
        if prepared.stop is None or answer.finish_reason != "stop" or answer.token_ids[-1] in answer.request.stop_ids:
            return text
        early = answer.token_ids[: prepared.params.min_tokens]  # a stop string that these complete does not count
        pieces = self._tokenizer.pieces(prepared.params.skip_special_tokens)
        return prepared.stop.cut(text, sum(len(pieces.push(token)) for token in early))


class _Group:
    """A prompt in the engine, those of its samples that have ended, and equal prompts that wait for its answer."""

    __slots__ = ("answers", "followers", "key", "prepared")

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.answers: list[Finished] = []
        self.followers: list[Prepared] = []
        self.key = _identity(prepared)


class Repeats:
    """Equal prompts with equal parameters whose answer chance has no part in run once.

    Holds those in the engine, and recent answers of at most `max_tokens` tokens, prompts included; a number of an
    embedding counts as one.
    """

    def __init__(self, max_tokens: int = 1 << 19) -> None:
        self._room = max_tokens
        self._running: dict[Hashable, _Group] = {}
        self._answers: OrderedDict[Hashable, tuple[int, Completion]] = OrderedDict()

    def find(self, group: _Group) -> _Group | Completion | None:
        """The answer of an equal prompt, or the group that will have it; None: `group` is the first, run it."""
        if group.key is None:
            return None
        held = self._answers.get(group.key)
        if held is not None:
            self._answers.move_to_end(group.key)
            return held[1]
        first = self._running.setdefault(group.key, group)
        return None if first is group else first

    def answered(self, group: _Group, completion: Completion) -> None:
        """Keep the answer of a group that `find` let run."""
        if group.key is None:
            return
        del self._running[group.key]
        answered = (*completion.outputs, *(completion.scores or ()))
        size = len(group.prepared.ids) + sum(len(one.token_ids) for one in answered) + len(completion.embedding or ())
        self._answers[group.key] = (size, completion)
        self._room -= size
        while self._room < 0:
            self._room += self._answers.popitem(last=False)[1][0]

    def drop(self, group: _Group) -> None:
        """The group failed: an equal prompt may try again."""
        if group.key is not None:
            del self._running[group.key]


def _again(completion: Completion, prepared: Prepared) -> Completion:
    """What a prompt that equals another one is answered: none of its tokens was computed."""
    cached = 0 if completion.error is not None else len(prepared.ids)
    return replace(completion, index=prepared.index, prompt_token_ids=prepared.ids, cached_tokens=cached)


def _identity(prepared: Prepared) -> Hashable | None:
    """All that decides the answer, if prompt and parameters do: what is computed, and how it is shown."""
    params, read = prepared.params, prepared.read
    if (not params.greedy and params.seed is None) or params.logit_bias is not None:
        return None  # a logit_bias is a mapping: not worth hashing
    tails: tuple[bytes, ...] = ()
    if isinstance(read, Continuations):  # their ids are not those of their texts: spaces of the context may lead them
        tails = tuple(_packed(one.prompt[one.score_from :]) for one in prepared.requests)
    return _packed(prepared.ids), params, read, tails


def _packed(ids: list[int]) -> bytes:
    return array("q", ids).tobytes()


def _reading(prepared: Prepared, answers: list[Finished]) -> Completion:
    """Scores or an embedding, of what was read for the one or the other; `answers` in the order of the requests."""
    if isinstance(prepared.read, Pooled):
        rows, hidden = answers[0].request.rows_read(), answers[0].hidden
        assert rows is not None and hidden is not None
        try:
            vector = prepared.read.vector(hidden, len(rows))
        except RowError as error:
            return Completion(prepared.index, prepared.ids, error=error)
        return Completion(prepared.index, prepared.ids, embedding=vector)
    readings = [answer.prompt_logprobs or [] for answer in answers]
    if not isinstance(prepared.read, Continuations):
        return Completion(prepared.index, prepared.ids, scores=[score_of(readings)])
    texts = [text if isinstance(text, str) else None for text in prepared.read.texts]
    scores = [score_of([reading], text) for reading, text in zip(readings, texts, strict=True)]
    return Completion(prepared.index, prepared.ids, scores=scores, choice=best_choice(scores, prepared.read.by))


def _visible(answer: Finished) -> list[int]:
    """The ids that become text: all but a stop token, unless it was asked for."""
    stopped = answer.finish_reason == "stop" and answer.token_ids[-1] in answer.request.stop_ids
    if stopped and not answer.request.params.include_stop_str_in_output:
        return answer.token_ids[:-1]
    return answer.token_ids
