"""The sampler: from logits to tokens, for all rows of a step at once.

State: sampling parameters and logits processors by seat (`SamplingSeats`). Owner: the runner of the rank that samples.
Flow: `seat_sequence` compiles the parameters of a sequence when it takes a seat; `sample` reads one byte of flags per
row, and only the processors that some row asks for run: without any, sampling is one argmax. The order is vLLM's:
grammar, allowed ids, bad words, min_tokens, bias, penalties; then greedy, or temperature, min_p, top_k, top_p and the
draw. Failure: a row that cannot be sampled is reported in `StepResult.failed`, the other rows are not affected.

The result of a row depends on its logits, its request and its position alone: see `sample_tokens` and `philox`.

N rows that sample · V vocabulary · R rows that a processor handles
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchinfer.engine.plan import Join, StepResult
from batchinfer.errors import RowError
from batchinfer.request import Constraint, TokenLogprob
from batchinfer.runner.logprobs import NOT_FINITE, token_logprobs
from batchinfer.runner.sample_tokens import argmax, draw
from batchinfer.runner.sampling_seats import LOGPROBS, NOTHING_LEFT, ON_HOST, RANDOM, REFUSED, SamplingSeats

Ints = npt.NDArray[np.int64]


class Sampler:
    """Sampler of all seats. Call `seat_sequence` when a sequence takes a seat, then `sample` once per step."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._seats = SamplingSeats(max_num_seqs, vocab_size)

    @property
    def prompt_tokens(self) -> Ints:
        """Prompt lengths by seat."""
        return self._seats.prompt_tokens

    def seat_sequence(self, join: Join, constraint: Constraint | None = None) -> None:
        """Compile the parameters of a sequence that takes a seat; `constraint` is the grammar that it must follow."""
        self._seats.seat_sequence(join, constraint)

    def sample(self, logits_NV: Tensor, seats: Ints, positions: Ints) -> StepResult:
        """Sample one token per row. logits_NV is float32 and may be overwritten.

        seats [N]: the seat of each row, at most once per step unless its request is `stateless`. positions [N]: the
        position that the sampled token gets in its sequence.
        """
        flags_N = self._seats.flags[seats]
        asked = int(np.bitwise_or.reduce(flags_N, initial=0))
        values_N, tokens_N = argmax(logits_NV)
        if asked == 0:
            return self.result_of_largest(values_N, tokens_N)
        failed: dict[int, str | RowError] = dict.fromkeys(_not_finite(values_N), NOT_FINITE)
        if asked & REFUSED:
            failed |= self._seats.refused(seats, flags_N)
        edits_logits = asked & ON_HOST
        raw_NV, largest_N = logits_NV, values_N
        if edits_logits:
            raw_NV = logits_NV.clone() if asked & LOGPROBS else logits_NV
            broken = self._seats.edit_logits(logits_NV, seats, positions, flags_N, torch.from_numpy)
            values_N, tokens_N = argmax(logits_NV)
            failed = {**dict.fromkeys(_not_finite(values_N), NOTHING_LEFT), **broken, **failed}
        sound_N = np.ones(len(seats), dtype=bool)
        sound_N[list(failed)] = False
        if asked & RANDOM:
            rows_R = np.nonzero(sound_N & ((flags_N & RANDOM) != 0))[0]
            index_R = _index(rows_R, logits_NV)
            tokens_N[index_R] = draw(logits_NV, rows_R, self._seats.filters(seats[rows_R], positions[rows_R]))
        tokens = tokens_N.cpu().numpy()
        ended: list[int] = []
        if edits_logits:
            ended, refused = self._seats.append_tokens(seats, tokens, flags_N, sound_N)
            failed = {**failed, **refused}
        logprobs = None
        if asked & LOGPROBS:
            rows_R = np.nonzero(sound_N & ((flags_N & LOGPROBS) != 0))[0]
            logprobs = self._gather_logprobs(raw_NV, largest_N, seats, tokens, rows_R)
        return StepResult(tokens.tolist(), logprobs, failed or None, frozenset(ended))

    def all_plain_greedy(self, seats: Ints) -> bool:
        """Return True if all rows are plain greedy: then `result_of_largest` replaces `sample`."""
        return not self._seats.flags[seats].any()

    def result_of_largest(self, values_N: Tensor, tokens_N: Tensor) -> StepResult:
        """Return the result of plain greedy rows, given the largest logit of each row and its token."""
        return StepResult(tokens_N.tolist(), None, dict.fromkeys(_not_finite(values_N), NOT_FINITE) or None)

    def _gather_logprobs(
        self, raw_NV: Tensor, largest_N: Tensor, seats: Ints, tokens: Ints, rows_R: Ints
    ) -> list[TokenLogprob | None]:
        """Return the logprobs of the rows that asked, from the log-softmax of the unmodified logits."""
        result: list[TokenLogprob | None] = [None] * len(seats)
        if len(rows_R) == 0:
            return result
        index_R = _index(rows_R, raw_NV)
        raw_RV = raw_NV if len(rows_R) == len(seats) else raw_NV[index_R]
        seats_R = seats[rows_R]
        counts_R, named_R = self._seats.num_logprobs[seats_R], self._seats.named_tokens(seats_R)
        entries = token_logprobs(raw_RV, largest_N[index_R], tokens[rows_R], counts_R, named_R)
        for row, entry in zip(rows_R.tolist(), entries, strict=True):
            result[row] = entry
        return result


def _not_finite(values_N: Tensor) -> list[int]:
    """Return the rows whose value is not finite.

    In NumPy: after a pass over the weights, the code of every torch op has to be fetched from memory again.
    """
    finite_N = np.isfinite(values_N.cpu().numpy())
    return [] if finite_N.all() else np.flatnonzero(~finite_N).tolist()


def _index(values: Ints, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)
