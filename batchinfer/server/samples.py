"""One request's samples while they run: tokens into text and counts, in the order of the wire's choices."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace

from batchinfer.openai.delta import Delta, Used
from batchinfer.pipeline.prompt import Prepared
from batchinfer.request import Request
from batchinfer.server.engine_loop import Event
from batchinfer.server.frontend import Frontend, Generation
from batchinfer.server.text_stream import TextStream


class _Sample:
    __slots__ = ("choice", "started", "text")

    def __init__(self, choice: int, text: TextStream) -> None:
        self.choice = choice
        self.text = text
        self.started = False


class Samples:
    """All samples of one request: prompts in order, and the n samples of each; choices count through."""

    def __init__(self, frontend: Frontend, prepared: list[Prepared], stream: bool, arrived_s: float) -> None:
        """Hands them to the engine. arrived_s: when the request came, on the clock of time.monotonic."""
        self._frontend = frontend
        self._arrived_s = arrived_s
        self._by_id: dict[int, _Sample] = {}
        for one in prepared:
            for request in one.requests:
                self._by_id[request.request_id] = self._sample(len(self._by_id), one, request)
        self._samples_each = len(prepared[0].requests)
        self.prompt_tokens = sum(len(one.ids) for one in prepared)
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._generation: Generation = frontend.open(prepared, stream)

    def _sample(self, choice: int, prepared: Prepared, request: Request) -> _Sample:
        return _Sample(choice, TextStream(self._frontend.model.parts.tokenizer, prepared, request))

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """What the engine's steps bring. Raises ApiError."""
        async for events in self._generation.batches():
            yield [self._delta(event) for event in events]
        self._frontend.metrics.request_done(time.monotonic() - self._arrived_s)

    async def whole(self) -> list[Delta]:
        """One delta for each choice, in order: for samples that were opened without `stream`. Raises ApiError."""
        deltas = [delta async for batch in self.batches() for delta in batch]
        deltas.sort(key=lambda delta: delta.choice)
        # a prompt is scored once, with its first sample
        scored = [delta.prompt_logprobs for delta in deltas[:: self._samples_each]]
        return [replace(delta, prompt_logprobs=scored[delta.choice // self._samples_each]) for delta in deltas]

    def close(self) -> None:
        """Abort what still runs."""
        self._frontend.close(self._generation)

    def used(self) -> Used:
        return Used(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def _delta(self, event: Event) -> Delta:
        sample = self._by_id[event.request_id]
        finished = event.finished
        self.completion_tokens += len(event.token_ids)
        if finished is None:
            text, reason, scored = sample.text.push(event.token_ids), None, None
        else:
            text, reason = sample.text.finish(event.token_ids, finished.finish_reason), finished.finish_reason
            scored = finished.prompt_logprobs
            if sample.choice % self._samples_each == 0:  # a prompt counts once, however many samples it has
                self.cached_tokens += finished.cached_tokens
            now_s = time.monotonic()
            first_s = event.first_token_s or now_s
            self._frontend.metrics.sample_done(self._arrived_s, first_s, now_s, len(finished.token_ids))
        first, sample.started = not sample.started, True
        logprobs, stop = event.logprobs or [], sample.text.stopped_by
        return Delta(sample.choice, text, event.token_ids, logprobs, reason, first, scored, stop)
