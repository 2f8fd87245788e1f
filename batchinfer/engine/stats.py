"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine started."""

    prompt_tokens_computed: int = 0
    prompt_tokens_reused: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    draft_tokens: int = 0  # drafted and computed
    accepted_tokens: int = 0  # draft tokens that were right
