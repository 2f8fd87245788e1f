"""Stream of prompts through the engine: feeder → prefix order → engine → text → completions.

State: contents that are prepared and not yet in the engine (`PrefixOrder`), contents in it (`_Running`), those that
have ended and are not yet text, dedup (`Repeats`), and prompts some of whose contents are answered (`_Joined`).
A prompt that fails anywhere becomes an error completion; an exception of the prompts' iterator ends the stream.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Hashable, Iterable, Iterator
from typing import Protocol

from batchinfer.engine.output import StepOutput
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import RowError
from batchinfer.pipeline.completions import CompletionWriter
from batchinfer.pipeline.dedup import Repeats, identity, shared_answer
from batchinfer.pipeline.feeder import Feeder
from batchinfer.pipeline.prefix_order import PrefixOrder
from batchinfer.pipeline.prepare import Preparer
from batchinfer.pipeline.prompt import Prepared, Prompt, Refused
from batchinfer.request import Completion, Finished, Request
from batchinfer.text.tokenizer import Tokenizer

_DETOKENIZE_TOGETHER = 32  # finished prompts that are turned into text in one call
_GATHER_S = 0.05  # an idle engine waits so long for more prompts than the first: their order is worth it


class Batching(Protocol):
    """The engine as a stream uses it: `Engine` itself, or a share of one."""

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
    """Answers `prompts` in any order. `close` stops reading them and aborts what is running."""

    def __init__(
        self, prompts: Iterable[Prompt], preparer: Preparer, engine: Batching, tokenizer: Tokenizer, max_num_seqs: int
    ) -> None:
        self._engine = engine
        self._writer = CompletionWriter(tokenizer)
        self._order = PrefixOrder(max(1024, 4 * max_num_seqs))
        self._repeats = Repeats()
        self._joined = _Joined()
        self._running: dict[int, _Running] = {}  # by request id
        self._ended: list[_Running] = []  # not yet text
        self._feeder = Feeder(prompts, preparer)
        self._input_ended = False

    def completions(self) -> Generator[Completion, None, None]:
        """Yield one completion per prompt, as they finish."""
        while not self._feeder.done or self._order or self._engine.has_work or self._ended:
            yield from self._fill()
            self._ended += self._collect(self._engine.step().finished)
            if len(self._ended) >= _DETOKENIZE_TOGETHER or not self._engine.has_work:
                yield from self._answer()

    def close(self) -> None:
        self._feeder.close()
        for running in {id(running): running for running in self._running.values()}.values():
            for request in running.prepared.requests:
                self._engine.abort(request.request_id)

    def _fill(self) -> Iterator[Completion]:
        """Fill window and engine; yield what needs no engine: errors, and repeats of recent prompts."""
        until = 0.0
        while self._order.has_room:
            batch = self._feeder.next_batch(self._wait_s(until))
            until = until or time.monotonic() + _GATHER_S
            if not batch:
                break
            for item in batch:
                if isinstance(item, Refused):
                    yield from self._joined.add(item, Completion(item.index, item.ids, error=item.error))
                else:
                    self._order.add(item)
        if self._feeder.done and not self._input_ended:
            self._input_ended = True
            self._order.finish(lambda prepared: self._engine.expected_tokens(prepared.requests[0]))
        # no more than the next step can seat: prompts that come later may be better next
        while self._order and self._engine.wants_more:
            yield from self._start(self._order.pop())

    def _wait_s(self, until: float) -> float | None:
        """Return how long to wait for a batch, in s: 0 beside work, until `until` if prompts wait, else None."""
        if self._engine.has_work or self._ended:
            return 0.0
        return max(0.0, until - time.monotonic()) if self._order else None

    def _start(self, prepared: Prepared) -> Iterator[Completion]:
        key = identity(prepared)
        known = self._repeats.recent_answer(key)
        waits = known is None and self._repeats.wait_or_run(key, prepared)
        if known is not None or waits:
            self._engine.stats.prompt_tokens_reused += len(prepared.ids)
        if known is not None:
            yield from self._joined.add(prepared, shared_answer(known, prepared))
        elif not waits:
            yield from self._submit(_Running(prepared, key))

    def _submit(self, running: _Running) -> Iterator[Completion]:
        prepared = running.prepared
        try:
            for request in prepared.requests:
                self._engine.add(request)
                self._running[request.request_id] = running
        except RowError as error:
            for request in prepared.requests:
                self._engine.abort(request.request_id)
                self._running.pop(request.request_id, None)
            self._repeats.drop(running.key)
            yield from self._joined.add(prepared, Completion(prepared.index, prepared.ids, error=error))

    def _collect(self, finished: list[Finished]) -> list[_Running]:
        """Return the contents whose last request is among `finished`."""
        complete = []
        for answer in finished:
            running = self._running.pop(answer.request.request_id)
            running.answers.append(answer)
            if len(running.answers) == len(running.prepared.requests):
                complete.append(running)
        return complete

    def _answer(self) -> Iterator[Completion]:
        """Turn what has ended into text, together, and answer the repeats that waited for it."""
        ended, self._ended = self._ended, []
        completions = self._writer.write_all([(running.prepared, running.answers) for running in ended])
        for running, completion in zip(ended, completions, strict=True):
            prepared = running.prepared
            if any(answer.error is not None for answer in running.answers):
                waited = self._repeats.drop(running.key)
            else:
                waited = self._repeats.keep_answer(running.key, prepared, completion)
            yield from self._joined.add(prepared, completion)
            for other in waited:
                yield from self._joined.add(other, shared_answer(completion, other))


class _Running:
    """A content in the engine, and the answers to those of its requests that have ended."""

    __slots__ = ("answers", "key", "prepared")

    def __init__(self, prepared: Prepared, key: Hashable | None) -> None:
        self.prepared = prepared
        self.key = key
        self.answers: list[Finished] = []


class _Joined:
    """Joins the completions of prompts with several contents."""

    def __init__(self) -> None:
        self._open: dict[int, dict[int, Completion]] = {}  # index of the prompt → place → completion

    def add(self, content: Prepared | Refused, completion: Completion) -> Iterator[Completion]:
        """Yield the prompt's completion if this content was the last one."""
        if content.count == 1:
            yield completion
            return
        held = self._open.setdefault(content.index, {})
        held[content.place] = completion
        if len(held) == content.count:
            del self._open[content.index]
            yield _join(content.index, [held[place] for place in range(content.count)])


def _join(index: int, completions: list[Completion]) -> Completion:
    """Return all answers in the order of the contents; an error of one content is the prompt's."""
    ids = [token for completion in completions for token in completion.prompt_token_ids]
    error = next((completion.error for completion in completions if completion.error is not None), None)
    if error is not None:
        return Completion(index, ids, error=error)
    outputs = [output for completion in completions for output in completion.outputs]
    cached = sum(completion.cached_tokens for completion in completions)
    return Completion(index, ids, outputs, per_content=completions, cached_tokens=cached)
