"""Workloads of benchmarks: random token ids, a file of token ids, or the first rows of a job.

Random and file prompts are greedy and run to their `max_tokens`: end-of-sequence tokens are ignored, so that two
engines, or two versions of one engine, do the same work.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from batchinfer.bench.measured import MeasuredLLM
from batchinfer.errors import InputError, InputMissing, UsageError, suggest
from batchinfer.llm import Prompt
from batchinfer.request import SamplingParams

_KEYS = ("id", "ids", "max_tokens")


class TokenSpan(NamedTuple):
    """A number of tokens, or a range for random numbers, both ends included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def parse_span(option: str, text: str) -> TokenSpan:
    """Parse `"128"` or `"64-256"`, at least 1. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text.strip())
    if match is None:
        raise UsageError(f"{option} {text}: must be a number of tokens, or LOW-HIGH, for example 128 or 64-256")
    span = TokenSpan(int(match[1]), int(match[2] or match[1]))
    if not 1 <= span.low <= span.high:
        raise UsageError(f"{option} {text}: must be at least 1, and LOW no more than HIGH")
    return span


_INPUT, _OUTPUT = TokenSpan(128, 128), TokenSpan(64, 64)


class TokenPrompt(NamedTuple):
    """Prompt of token ids, answered by `max_tokens` tokens."""

    ids: list[int]
    max_tokens: int


class Workload(Protocol):
    """Source of prompts for a model whose vocabulary and context are known."""

    def describe(self) -> str: ...

    def prompts(self, llm: MeasuredLLM) -> list[Prompt]: ...


@dataclass(frozen=True)
class Synthetic:
    """Random token ids. The first `shared_prefix` ids are the same in all prompts, and part of their lengths."""

    requests: int = 128
    input_tokens: TokenSpan = _INPUT
    output_tokens: TokenSpan = _OUTPUT
    shared_prefix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shared_prefix >= self.input_tokens.low:
            raise UsageError(
                f"--shared-prefix {self.shared_prefix}: must be less than the shortest prompt, "
                f"--input-tokens {self.input_tokens}"
            )

    def describe(self) -> str:
        shared = f", the first {self.shared_prefix} of them shared" if self.shared_prefix else ""
        return (
            f"{self.requests:,} requests of random tokens: {self.input_tokens} in{shared}, {self.output_tokens} out; "
            f"seed {self.seed}"
        )

    def prompts(self, llm: MeasuredLLM) -> list[Prompt]:
        """Return the prompts. Raises UsageError if they exceed the model's context."""
        return _greedy(self.token_prompts(llm.limits.vocab_size, llm.limits.context))

    def token_prompts(self, vocab_size: int, context: int) -> list[TokenPrompt]:
        """Return the prompts' ids and the lengths of their answers. Raises UsageError if they exceed the context."""
        longest = self.input_tokens.high + self.output_tokens.high
        if longest > context:
            raise UsageError(
                f"--input-tokens {self.input_tokens} and --output-tokens {self.output_tokens} are up to {longest} "
                f"tokens, and the context has {context}"
            )
        rng = random.Random(self.seed)
        shared = rng.choices(range(vocab_size), k=self.shared_prefix)
        prompts = []
        for _ in range(self.requests):
            own = rng.randint(*self.input_tokens) - self.shared_prefix
            ids = shared + rng.choices(range(vocab_size), k=own)
            prompts.append(TokenPrompt(ids, rng.randint(*self.output_tokens)))
        return prompts


class WorkloadLine(NamedTuple):
    """A line of a workload file, counted from 1."""

    number: int
    ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class WorkloadFile:
    """A workload from a file of JSON lines."""

    path: Path
    lines: list[WorkloadLine]

    @classmethod
    def read(cls, path: Path, requests: int | None) -> WorkloadFile:
        """Read the first `requests` lines, or all. Raises InputMissing, InputError with file and line."""
        try:
            with path.open(encoding="utf-8") as file:
                numbered = ((number, text) for number, text in enumerate(file, 1) if text.strip())
                lines = [_parse_line(f"{path}:{number}", number, text) for number, text in islice(numbered, requests)]
        except OSError as error:
            raise InputMissing(f"--workload {path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"--workload {path}: is not UTF-8 text: {error.reason}") from None
        if not lines:
            raise InputMissing(f"--workload {path}: has no requests")
        return cls(path, lines)

    def describe(self) -> str:
        return f"{self.path}: {len(self.lines):,} requests"

    def prompts(self, llm: MeasuredLLM) -> list[Prompt]:
        """Return the prompts. Raises InputError, with file and line, for what the model does not support."""
        return _greedy(self.token_prompts(llm.limits.vocab_size, llm.limits.context))

    def token_prompts(self, vocab_size: int, context: int) -> list[TokenPrompt]:
        """Return the lines' prompts. Raises InputError, with file and line, for ids or lengths beyond the model's."""
        for line in self.lines:
            self._check(line, vocab_size, context)
        return [TokenPrompt(line.ids, line.max_tokens) for line in self.lines]

    def _check(self, line: WorkloadLine, vocab_size: int, context: int) -> None:
        where = f"{self.path}:{line.number}"
        wrong = next((token for token in line.ids if token >= vocab_size), None)
        if wrong is not None:
            raise InputError(f"{where}: ids: token {wrong} is not in the model's vocabulary of {vocab_size} tokens")
        longest = len(line.ids) + line.max_tokens
        if longest > context:
            raise InputError(
                f"{where}: {len(line.ids)} ids and max_tokens {line.max_tokens} are {longest} tokens, and the "
                f"context has {context}"
            )


def _parse_line(where: str, number: int, text: str) -> WorkloadLine:
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f'{where}: must be an object, {{"id": …, "ids": [token, …], "max_tokens": number}}')
    for key in values:
        if key not in _KEYS:
            raise InputError(f"{where}: unknown key {key!r}{suggest(key, _KEYS)} (known: {', '.join(_KEYS)})")
    ids, max_tokens = values.get("ids"), values.get("max_tokens")
    if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise InputError(f"{where}: ids: must be a list of token ids, not empty")
    if type(max_tokens) is not int or max_tokens < 1:
        raise InputError(f"{where}: max_tokens: must be a whole number from 1, got {max_tokens!r}")
    return WorkloadLine(number, ids, max_tokens)


def _greedy(prompts: Sequence[TokenPrompt]) -> list[Prompt]:
    return [
        Prompt(index, [ids], SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))
        for index, (ids, max_tokens) in enumerate(prompts)
    ]
