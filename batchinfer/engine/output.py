"""The output of one engine step: finished requests, and new tokens of the requests whose caller streams them.

State: per subscribed request its sequence and how many of its output tokens were reported. Owner: the engine; the
scheduler knows nothing of subscriptions. Flow: `Engine.add(request, subscribe=True)` → `subscribe` → after every step
`collect_new_tokens` → `StepOutput`; a subscription ends with its request. Failure: a step that raises yields no tokens,
and a request that fails reports the tokens that it got before. Cost: a step visits subscribed sequences only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from batchinfer.engine.sequence import Sequence
from batchinfer.request import Finished, TokenLogprob


class NewTokens(NamedTuple):
    """Output tokens of one request since the step before; `logprobs` is None unless the request asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


class StepOutput(NamedTuple):
    """News of one step.

    finished: requests that ended in it. started: ids of requests whose first output token it sampled. new_tokens: by
    request id, for subscribed requests that got any, in the order of their subscription; it covers finished requests.
    """

    finished: list[Finished]
    started: list[int]
    new_tokens: dict[int, NewTokens]


class Subscriptions:
    """Requests whose tokens are reported step by step."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}  # by request id
        self._reported: dict[int, int] = {}  # output tokens, by request id

    def subscribe(self, sequence: Sequence) -> None:
        """Report the tokens of `sequence` from now on."""
        self._sequences[sequence.request.request_id] = sequence
        self._reported[sequence.request.request_id] = 0

    def unsubscribe(self, request_id: int) -> None:
        """End the subscription of a request, if there is one."""
        self._sequences.pop(request_id, None)
        self._reported.pop(request_id, None)

    def collect_new_tokens(self, settle: Callable[[Sequence], None]) -> dict[int, NewTokens]:
        """Return the tokens since the last call. `settle` brings the tokens of a sequence up to date."""
        found = {}
        for request_id, sequence in self._sequences.items():
            settle(sequence)
            reported, count = self._reported[request_id], sequence.num_output
            if count > reported:
                logprobs = None if sequence.logprobs is None else sequence.logprobs[reported:]
                found[request_id] = NewTokens(sequence.tokens[sequence.num_prompt + reported :], logprobs)
                self._reported[request_id] = count
        return found
