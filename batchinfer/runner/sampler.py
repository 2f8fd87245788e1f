"""The sampler: from logits to tokens, for all rows of a step at once.

State: sampling parameters by seat, in arrays; the tables of the logits processors (grammar, edits, penalties). Owner:
the runner of the rank that samples. Flow: `seat_sequence` compiles the parameters of a sequence when it takes a seat;
`sample` reads one byte of flags per row, and only the processors that some row asks for run: without any, sampling is
one argmax. The order is vLLM's: grammar, allowed ids, bad words, min_tokens, bias, penalties; then greedy, or
temperature, min_p, top_k, top_p and the draw. Failure: a row that cannot be sampled is reported in
`StepResult.failed`, the other rows are not affected.

The result of a row depends on its logits, its request and its position alone: see `sample_tokens` and `philox`.

N rows that sample · V vocabulary · R rows that a processor handles
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchinfer.engine.plan import Join, StepResult
from batchinfer.errors import BadParameters, RowError
from batchinfer.request import Constraint, SamplingParams, TokenLogprob
from batchinfer.runner.grammar_mask import GrammarMasks
from batchinfer.runner.logit_bias import LogitEdits
from batchinfer.runner.logprobs import NOT_FINITE, token_logprobs
from batchinfer.runner.penalties import Penalties
from batchinfer.runner.philox import uniforms
from batchinfer.runner.sample_tokens import Filters, argmax, draw

Ints = npt.NDArray[np.int64]

_INT64_MAX = np.iinfo(np.int64).max
_RANDOM, _EDITED, _PENALISED, _LOGPROBS, _REFUSED, _CONSTRAINED = 1, 2, 4, 8, 16, 32
_COLDEST = 1e-5  # a lower temperature is greedy: logits divided by it would overflow (vLLM's limit)
_HOTTEST = 1e30  # float32 divides by it without underflow to NaN; the distribution is uniform long before
_NOTHING_LEFT = (
    "structured_outputs, allowed_token_ids, bad_words, logit_bias and min_tokens together exclude every token"
)


class _SeatParams:
    """Sampling parameters by seat, as a struct of arrays."""

    def __init__(self, count: int) -> None:
        self.flags = np.zeros(count, dtype=np.uint8)
        self.prompt_tokens = np.zeros(count, dtype=np.int64)
        self.keys = np.zeros(count, dtype=np.uint64)
        self.temperature = np.ones(count, dtype=np.float32)
        self.top_k = np.zeros(count, dtype=np.int64)
        self.top_p = np.ones(count, dtype=np.float64)
        self.min_p = np.zeros(count, dtype=np.float64)
        self.num_logprobs = np.zeros(count, dtype=np.int64)

    def seat_sequence(self, join: Join) -> None:
        seat, params = join.seat, join.params
        self.prompt_tokens[seat] = len(join.prompt)
        self.keys[seat] = join.key & 0xFFFF_FFFF_FFFF_FFFF
        self.temperature[seat] = min(params.temperature, _HOTTEST)
        self.top_k[seat] = min(max(params.top_k, 0), _INT64_MAX)
        self.top_p[seat] = params.top_p
        self.min_p[seat] = params.min_p
        self.num_logprobs[seat] = 0 if params.logprob_token_ids else params.logprobs or 0

    def filters(self, seats_R: Ints, positions_R: Ints) -> Filters:
        """Return the parameters and random numbers for drawing at these positions."""
        return Filters(
            self.temperature[seats_R],
            self.top_k[seats_R],
            self.top_p[seats_R],
            self.min_p[seats_R],
            uniforms(self.keys[seats_R], positions_R),
        )


class Sampler:
    """Sampler of all seats. Call `seat_sequence` when a sequence takes a seat, then `sample` once per step."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._seats = _SeatParams(max_num_seqs)
        self._edits = LogitEdits(max_num_seqs, vocab_size)
        self._penalties = Penalties(max_num_seqs, vocab_size)
        self._grammars = GrammarMasks(vocab_size)
        self._refusals: dict[int, str] = {}
        self._named: dict[int, tuple[int, ...]] = {}  # `logprob_token_ids` by seat

    @property
    def prompt_tokens(self) -> Ints:
        """Prompt lengths by seat."""
        return self._seats.prompt_tokens

    def seat_sequence(self, join: Join, constraint: Constraint | None = None) -> None:
        """Compile the parameters of a sequence that takes a seat; `constraint` is the grammar that it must follow.

        Parameters that this model cannot honour make its first sample fail.
        """
        seat, params = join.seat, join.params
        self._seats.seat_sequence(join)
        refusal = self._refusal_of(params)
        self._refusals[seat] = refusal
        self._named[seat] = params.logprob_token_ids or ()
        edited = self._edits.seat_sequence(join)
        penalised = self._penalties.seat_sequence(join)
        constrained = self._grammars.seat_sequence(seat, constraint, join.output)
        self._seats.flags[seat] = (
            _RANDOM * (params.temperature >= _COLDEST and params.top_k != 1)
            | _EDITED * edited
            | _PENALISED * penalised
            | _LOGPROBS * (params.logprobs is not None)
            | _REFUSED * bool(refusal)
            | _CONSTRAINED * constrained
        )

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
        if asked & _REFUSED:
            failed |= {int(row): self._refusals[int(seats[row])] for row in np.nonzero(flags_N & _REFUSED)[0]}
        edits_logits = asked & (_EDITED | _PENALISED | _CONSTRAINED)
        raw_NV, largest_N = logits_NV, values_N
        if edits_logits:
            raw_NV = logits_NV.clone() if asked & _LOGPROBS else logits_NV
            broken = self._apply_grammars(logits_NV, seats, flags_N)
            values_N, tokens_N = self._apply_edits(logits_NV, seats, positions, flags_N)
            failed = {**dict.fromkeys(_not_finite(values_N), _NOTHING_LEFT), **broken, **failed}
        sound_N = np.ones(len(seats), dtype=bool)
        sound_N[list(failed)] = False
        if asked & _RANDOM:
            rows_R = np.nonzero(sound_N & ((flags_N & _RANDOM) != 0))[0]
            index_R = _index(rows_R, logits_NV)
            tokens_N[index_R] = draw(logits_NV, rows_R, self._seats.filters(seats[rows_R], positions[rows_R]))
        tokens = tokens_N.cpu().numpy()
        ended: list[int] = []
        if edits_logits:
            self._append_tokens(seats, tokens, flags_N)
            rows_R = np.nonzero(sound_N & ((flags_N & _CONSTRAINED) != 0))[0]
            ended, refused = self._grammars.append_tokens(rows_R, seats[rows_R], tokens[rows_R])
            failed = {**failed, **refused}
        logprobs = None
        if asked & _LOGPROBS:
            rows_R = np.nonzero(sound_N & ((flags_N & _LOGPROBS) != 0))[0]
            logprobs = self._gather_logprobs(raw_NV, largest_N, seats, tokens, rows_R)
        return StepResult(tokens.tolist(), logprobs, failed or None, frozenset(ended))

    def all_plain_greedy(self, seats: Ints) -> bool:
        """Return True if all rows are plain greedy: then `result_of_largest` replaces `sample`."""
        return not self._seats.flags[seats].any()

    def result_of_largest(self, values_N: Tensor, tokens_N: Tensor) -> StepResult:
        """Return the result of plain greedy rows, given the largest logit of each row and its token."""
        return StepResult(tokens_N.tolist(), None, dict.fromkeys(_not_finite(values_N), NOT_FINITE) or None)

    def _apply_grammars(
        self, logits_NV: Tensor, seats: Ints, flags_N: npt.NDArray[np.uint8]
    ) -> dict[int, BadParameters]:
        """Mask the rows that have a grammar, in place. Return the rows whose grammar failed."""
        rows_R = np.nonzero(flags_N & _CONSTRAINED)[0]
        return self._grammars.apply(logits_NV, rows_R, seats[rows_R]) if len(rows_R) else {}

    def _apply_edits(
        self, logits_NV: Tensor, seats: Ints, positions: Ints, flags_N: npt.NDArray[np.uint8]
    ) -> tuple[Tensor, Tensor]:
        """Apply edits and penalties in place. Return the new largest logits and their tokens."""
        if np.any(flags_N & _EDITED):
            self._edits.apply(logits_NV, seats, positions - self._seats.prompt_tokens[seats])
        rows_R = np.nonzero(flags_N & _PENALISED)[0]
        if len(rows_R):
            self._penalties.apply(logits_NV, rows_R, seats[rows_R])
        return argmax(logits_NV)

    def _append_tokens(self, seats: Ints, tokens: Ints, flags_N: npt.NDArray[np.uint8]) -> None:
        for flag, stage in ((_EDITED, self._edits), (_PENALISED, self._penalties)):
            rows_R = np.nonzero(flags_N & flag)[0]
            if len(rows_R):
                stage.append_tokens(seats[rows_R], tokens[rows_R])

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
        counts_R, named_R = self._seats.num_logprobs[seats_R], [self._named[seat] for seat in seats_R.tolist()]
        entries = token_logprobs(raw_RV, largest_N[index_R], tokens[rows_R], counts_R, named_R)
        for row, entry in zip(rows_R.tolist(), entries, strict=True):
            result[row] = entry
        return result

    def _refusal_of(self, params: SamplingParams) -> str:
        """Return why this model cannot honour these parameters, or an empty text."""
        for name in ("logit_bias", "allowed_token_ids", "logprob_token_ids"):
            wrong = [token for token in getattr(params, name) or () if not 0 <= token < self._vocab_size]
            if wrong:
                return f"{name} names token {wrong[0]}, and the model's vocabulary has {self._vocab_size} tokens"
        return ""


def _not_finite(values_N: Tensor) -> list[int]:
    """Return the rows whose value is not finite.

    In NumPy: after a pass over the weights, the code of every torch op has to be fetched from memory again.
    """
    finite_N = np.isfinite(values_N.cpu().numpy())
    return [] if finite_N.all() else np.flatnonzero(~finite_N).tolist()


def _index(values: Ints, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)
