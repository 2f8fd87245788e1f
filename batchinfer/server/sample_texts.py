"""Samples of one HTTP request while they run: tokens to text, token usage and metrics, in the order of the choices."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from batchinfer.openai.delta import Delta, TokenUsage
from batchinfer.pipeline.prompt import Prepared
from batchinfer.server.engine_loop import Event
from batchinfer.server.frontend import Frontend
from batchinfer.server.text_stream import TextStream


class DeltaSource(Protocol):
    """Source of deltas for a reply: `SampleTexts`, or `EmptySamples` if nothing is generated."""

    def delta_batches(self) -> AsyncIterator[list[Delta]]: ...

    async def whole_deltas(self) -> list[Delta]: ...

    def usage(self) -> TokenUsage: ...

    def close(self) -> None: ...


class _Sample:
    __slots__ = ("choice", "started", "text")

    def __init__(self, choice: int, text: TextStream) -> None:
        self.choice = choice
        self.text = text
        self.started = False


class SampleTexts:
    """Samples of all prompts of a request: choices are numbered through, n per prompt, in order."""

    def __init__(self, frontend: Frontend, prepared: list[Prepared], stream: bool, arrived_s: float) -> None:
        """Submit the samples to the engine. arrived_s: arrival of the request, on the clock of time.monotonic."""
        self._frontend = frontend
        self._arrived_s = arrived_s
        tokenizer = frontend.model.parts.tokenizer
        pairs = [(prompt, request) for prompt in prepared for request in prompt.requests]
        self._samples = {
            request.request_id: _Sample(choice, TextStream(tokenizer, prompt, request))
            for choice, (prompt, request) in enumerate(pairs)
        }
        self._samples_per_prompt = len(prepared[0].requests)
        self._prompt_tokens = sum(len(prompt.ids) for prompt in prepared)
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._generation = frontend.open_generation(prepared, stream)

    async def delta_batches(self) -> AsyncIterator[list[Delta]]:
        """Yield the new deltas of each engine step. Raises ApiError."""
        async for events in self._generation.event_batches():
            yield [self._delta(event) for event in events]
        self._frontend.metrics.observe_request(time.monotonic() - self._arrived_s)

    async def whole_deltas(self) -> list[Delta]:
        """Return one delta per choice, in order, for samples submitted without `stream`. Raises ApiError."""
        deltas = [delta async for batch in self.delta_batches() for delta in batch]
        deltas.sort(key=lambda delta: delta.choice)
        # the first sample of a prompt has its prompt logprobs
        scored = [delta.prompt_logprobs for delta in deltas[:: self._samples_per_prompt]]
        return [replace(delta, prompt_logprobs=scored[delta.choice // self._samples_per_prompt]) for delta in deltas]

    def close(self) -> None:
        """Abort the samples that still run."""
        self._frontend.close_generation(self._generation)

    def usage(self) -> TokenUsage:
        return TokenUsage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    def _delta(self, event: Event) -> Delta:
        sample = self._samples[event.request_id]
        finished = event.finished
        self._completion_tokens += len(event.token_ids)
        if finished is None:
            text, reason, scored = sample.text.push_tokens(event.token_ids), None, None
        else:
            text, reason = sample.text.finish(event.token_ids, finished.finish_reason), finished.finish_reason
            scored = finished.prompt_logprobs
            if sample.choice % self._samples_per_prompt == 0:  # count a prompt once, whatever n is
                self._cached_tokens += finished.cached_tokens
            now_s = time.monotonic()
            first_s = event.first_token_s or now_s
            self._frontend.metrics.observe_sample(self._arrived_s, first_s, now_s, len(finished.token_ids))
        first, sample.started = not sample.started, True
        stop_string = sample.text.stopped_by
        return Delta(sample.choice, text, event.token_ids, event.logprobs or [], reason, first, scored, stop_string)


class EmptySamples:
    """Samples without tokens: the engine does not run."""

    def __init__(self, prepared: list[Prepared]) -> None:
        self._prompt_tokens = sum(len(prompt.ids) for prompt in prepared)
        count = sum(len(prompt.requests) for prompt in prepared)
        self._deltas = [Delta(choice, "", [], [], "length", True) for choice in range(count)]

    async def delta_batches(self) -> AsyncIterator[list[Delta]]:
        yield self._deltas

    async def whole_deltas(self) -> list[Delta]:
        return self._deltas

    def usage(self) -> TokenUsage:
        return TokenUsage(self._prompt_tokens, 0, 0)

    def close(self) -> None:
        """Do nothing: no sequence runs."""
