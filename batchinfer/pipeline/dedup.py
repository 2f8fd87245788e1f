"""Dedup: identical deterministic prompts run once, and the others wait for the answer or take a recent one."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

from batchinfer.pipeline.prompt import Prepared
from batchinfer.pipeline.scoring import Continuations
from batchinfer.request import Completion


class Repeats:
    """Answers of running and of recent prompts, by identity (see `identity`; None is never shared).

    Recent answers are an LRU cache of at most `max_tokens` tokens, prompts included; each number of an embedding counts
    as one token.
    """

    def __init__(self, max_tokens: int = 1 << 19) -> None:
        self._room = max_tokens
        self._running: dict[Hashable, list[Prepared]] = {}  # identity → prompts that wait for the one that runs
        self._answers: OrderedDict[Hashable, tuple[int, Completion]] = OrderedDict()

    def recent_answer(self, key: Hashable | None) -> Completion | None:
        """Return the answer of an identical prompt that has ended."""
        held = self._answers.get(key) if key is not None else None
        if held is None:
            return None
        self._answers.move_to_end(key)
        return held[1]

    def wait_or_run(self, key: Hashable | None, prepared: Prepared) -> bool:
        """Return True if an identical prompt runs, whose answer `prepared` will get; else `prepared` is to run."""
        if key is None:
            return False
        waiting = self._running.get(key)
        if waiting is None:
            self._running[key] = []
            return False
        waiting.append(prepared)
        return True

    def keep_answer(self, key: Hashable | None, prepared: Prepared, completion: Completion) -> list[Prepared]:
        """Remember the answer of a prompt that ran; return the prompts that waited for it."""
        if key is None:
            return []
        answered = (*completion.outputs, *(completion.scores or ()))
        size = len(prepared.ids) + sum(len(one.token_ids) for one in answered) + len(completion.embedding or ())
        self._answers[key] = (size, completion)
        self._room -= size
        while self._room < 0:
            self._room += self._answers.popitem(last=False)[1][0]
        return self._running.pop(key)

    def drop(self, key: Hashable | None) -> list[Prepared]:
        """Forget a prompt that failed, so an identical one may try again; return the prompts that waited for it."""
        return self._running.pop(key) if key is not None else []


def shared_answer(completion: Completion, prepared: Prepared) -> Completion:
    """Return the answer of an identical prompt as that of `prepared`, none of whose tokens was computed."""
    cached = 0 if completion.error is not None else len(prepared.ids)
    return replace(completion, index=prepared.index, prompt_token_ids=prepared.ids, cached_tokens=cached)


def identity(prepared: Prepared) -> Hashable | None:
    """Return all that decides the answer; None if the answer is sampled, so repeats must not share it."""
    params, read = prepared.params, prepared.read
    if (not params.greedy and params.seed is None) or params.logit_bias is not None:
        return None  # a logit_bias is a mapping: not worth hashing
    tails: tuple[bytes, ...] = ()
    if isinstance(read, Continuations):  # their ids are not those of their texts: spaces of the context may lead them
        tails = tuple(_packed(one.prompt[one.score_from :]) for one in prepared.requests)
    return _packed(prepared.ids), params, read, tails


def _packed(ids: list[int]) -> bytes:
    return array("q", ids).tobytes()
