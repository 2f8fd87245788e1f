"""Prompt outputs: logprobs of prompt tokens, and pooled hidden states.

State: by seat the joins of sequences whose prompt is read. Owner: the runner. Flow: `seat_sequence` → per step
`token_rows` before the forward pass and `read_prompts` after it. Logits exist for a slice of rows at a time, never for
a long prompt times the vocabulary. Failure: a reading that is not finite is a failure of its own.

T tokens of a step · R rows that are read · E hidden size · V vocabulary
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchinfer.engine.plan import Join, PromptRead, Reading, StepPlan
from batchinfer.models.decoder import Decoder
from batchinfer.request import TokenLogprob
from batchinfer.runner.logprobs import NOT_FINITE, token_logprobs
from batchinfer.runner.sample_tokens import argmax

Ints = npt.NDArray[np.int64]

_NOT_FINITE_STATES = NOT_FINITE.replace("logits", "hidden states")


class PromptJoins:
    """Joins of the sequences whose prompt is read, by seat."""

    def __init__(self) -> None:
        self._joins: dict[int, Join] = {}

    def seat_sequence(self, join: Join) -> None:
        """Keep the prompt of a sequence that takes a seat, if it is read."""
        if join.reads_prompt:
            self._joins[join.seat] = join
        else:
            self._joins.pop(join.seat, None)

    def joins_of(self, plan: StepPlan) -> list[Join]:
        """Return the join of each read of the plan."""
        return [self._joins[plan.seats[read.place]] for read in plan.reads]


class PromptReader(PromptJoins):
    """Reader of prompts, by seat: `seat_sequence`, then per step `token_rows` and `read_prompts`."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._decoder = decoder

    def token_rows(self, plan: StepPlan, query_starts: Ints) -> Ints:
        """Return which tokens of the step are read: [R] indices into T. query_starts [S]: first token by sequence."""
        spans = [
            np.arange(read.rows) + query_starts[read.place] + read.first - plan.starts[read.place]
            for read in plan.reads
        ]
        return np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)

    def read_prompts(self, hidden_RE: Tensor, plan: StepPlan, slice_rows: int) -> list[Reading]:
        """Return one reading per read of the plan. Logits exist for at most `slice_rows` rows at once."""
        ends = np.cumsum([read.rows for read in plan.reads]).tolist()
        parts = [slice(end - read.rows, end) for read, end in zip(plan.reads, ends, strict=True)]
        joins = self.joins_of(plan)
        readings: list[Reading | None] = [
            None if join.pooling is None else pooled_reading(pooled_states(hidden_RE[part]).tolist())
            for join, part in zip(joins, parts, strict=True)
        ]
        scored = [place for place, reading in enumerate(readings) if reading is None]
        if len(scored) < len(readings) and scored:
            hidden_RE = torch.cat([hidden_RE[parts[place]] for place in scored])
        if scored:
            reads, owners = [plan.reads[place] for place in scored], [joins[place] for place in scored]
            for place, reading in zip(scored, self._score_prompts(hidden_RE, reads, owners, slice_rows), strict=True):
                readings[place] = reading
        return [reading for reading in readings if reading is not None]

    def _score_prompts(
        self, hidden_RE: Tensor, reads: list[PromptRead], joins: list[Join], slice_rows: int
    ) -> list[Reading]:
        targets_R, best_R = scored_tokens(reads, joins)
        entries: list[TokenLogprob] = []
        unsound = np.zeros(len(targets_R), dtype=bool)
        for start in range(0, len(targets_R), slice_rows):
            rows = slice(start, start + slice_rows)
            logits_RV = self._decoder.logits(hidden_RE[rows])
            largest_R = argmax(logits_RV)[0]
            unsound[rows] = (~largest_R.isfinite()).cpu().numpy()
            entries += token_logprobs(logits_RV, largest_R, targets_R[rows], best_R[rows])
        return cut_readings(reads, entries, unsound)


def scored_tokens(reads: Sequence[PromptRead], joins: Sequence[Join]) -> tuple[Ints, Ints]:
    """Return the prompt token that each row of these reads scores, and how many of the best tokens it lists."""
    targets = [
        np.array(join.prompt[read.first + 1 : read.first + 1 + read.rows], dtype=np.int64)
        for read, join in zip(reads, joins, strict=True)
    ]
    best = [join.params.prompt_logprobs or 0 for join in joins]
    return np.concatenate(targets), np.repeat(best, [read.rows for read in reads])


def cut_readings(
    reads: Sequence[PromptRead], entries: list[TokenLogprob], unsound_R: npt.NDArray[np.bool_]
) -> list[Reading]:
    """Return the reading of each read. unsound_R: rows whose logits are not finite."""
    readings = []
    first = 0
    for read in reads:
        rows = slice(first, first + read.rows)
        readings.append(Reading(failure=NOT_FINITE) if unsound_R[rows].any() else Reading(entries[rows]))
        first += read.rows
    return readings


def pooled_states(hidden_RE: Tensor) -> Tensor:
    """Return the sum of the rows in float64 [E], so that it does not depend on how the rows are cut into steps."""
    return hidden_RE.double().sum(0)


def pooled_reading(total_E: Sequence[float]) -> Reading:
    """Return the reading of a sum of hidden states."""
    total = array("d", total_E)
    return Reading(hidden=total) if np.isfinite(total).all() else Reading(failure=_NOT_FINITE_STATES)
