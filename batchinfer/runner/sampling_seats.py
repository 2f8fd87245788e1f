"""Sampling state by seat: parameters in arrays, and the logits processors that need the tokens before.

State: per seat its parameters, one byte of flags that says what the row needs, and the tables of the processors
(grammar, edits, penalties), which live on the host whatever device computes. Owner: a sampler. Flow: `seat_sequence`
when a sequence takes a seat; per step `edit_logits` for rows that need it and, once their tokens are known,
`append_tokens`. Failure: a row's own failure is returned, the other rows are not affected.

N rows that sample · R rows that a processor handles · V vocabulary
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from batchinfer.engine.plan import Join
from batchinfer.errors import BadParameters, RowError
from batchinfer.ops.streams import Upload
from batchinfer.request import Constraint, SamplingParams
from batchinfer.runner.grammar_mask import Accepted, GrammarMasks
from batchinfer.runner.logit_bias import LogitEdits
from batchinfer.runner.penalties import Penalties
from batchinfer.runner.philox import uniforms
from batchinfer.runner.sample_tokens import Filters

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.uint8]

RANDOM, EDITED, PENALISED, LOGPROBS, REFUSED, CONSTRAINED = 1, 2, 4, 8, 16, 32
"""Flags of a seat: what a row of it needs besides the largest logit."""
ON_HOST = EDITED | PENALISED | CONSTRAINED
"""Flags of rows whose logits are edited with what the host knows of the tokens before."""
NOTHING_LEFT = (
    "structured_outputs, allowed_token_ids, bad_words, logit_bias and min_tokens together exclude every token"
)

_INT64_MAX = np.iinfo(np.int64).max
_COLDEST = 1e-5  # a lower temperature is greedy: logits divided by it would overflow (vLLM's limit)
_HOTTEST = 1e30  # float32 divides by it without underflow to NaN; the distribution is uniform long before


class SamplingSeats:
    """Sampling state of all seats. Call `seat_sequence` when a sequence takes a seat."""

    def __init__(self, count: int, vocab_size: int) -> None:
        self.flags = np.zeros(count, dtype=np.uint8)
        self.prompt_tokens = np.zeros(count, dtype=np.int64)
        self.keys = np.zeros(count, dtype=np.uint64)
        self.temperature = np.ones(count, dtype=np.float32)
        self.top_k = np.zeros(count, dtype=np.int64)
        self.top_p = np.ones(count, dtype=np.float64)
        self.min_p = np.zeros(count, dtype=np.float64)
        self.num_logprobs = np.zeros(count, dtype=np.int64)
        self._vocab_size = vocab_size
        self._refusals: dict[int, str] = {}
        self._named: dict[int, tuple[int, ...]] = {}  # `logprob_token_ids`
        self._edits = LogitEdits(count, vocab_size)
        self._penalties = Penalties(count, vocab_size)
        self._grammars = GrammarMasks(vocab_size)

    def seat_sequence(self, join: Join, constraint: Constraint | None = None) -> None:
        """Compile the parameters of a sequence that takes a seat; `constraint` is the grammar that it must follow.

        Parameters that this model cannot honour make its first sample fail.
        """
        seat, params = join.seat, join.params
        self.prompt_tokens[seat] = len(join.prompt)
        self.keys[seat] = join.key & 0xFFFF_FFFF_FFFF_FFFF
        self.temperature[seat] = min(params.temperature, _HOTTEST)
        self.top_k[seat] = min(max(params.top_k, 0), _INT64_MAX)
        self.top_p[seat] = params.top_p
        self.min_p[seat] = params.min_p
        self.num_logprobs[seat] = 0 if params.logprob_token_ids else params.logprobs or 0
        self._refusals[seat] = refusal = self._refusal_of(params)
        self._named[seat] = params.logprob_token_ids or ()
        edited = self._edits.seat_sequence(join)
        penalised = self._penalties.seat_sequence(join)
        constrained = self._grammars.seat_sequence(seat, constraint, join.output)
        self.flags[seat] = (
            RANDOM * (params.temperature >= _COLDEST and params.top_k != 1)
            | EDITED * edited
            | PENALISED * penalised
            | LOGPROBS * (params.logprobs is not None)
            | REFUSED * bool(refusal)
            | CONSTRAINED * constrained
        )

    def filters(self, seats_R: Ints, positions_R: Ints) -> Filters:
        """Return the parameters and random numbers for drawing at these positions."""
        return Filters(
            self.temperature[seats_R],
            self.top_k[seats_R],
            self.top_p[seats_R],
            self.min_p[seats_R],
            uniforms(self.keys[seats_R], positions_R),
        )

    def named_tokens(self, seats_R: Ints) -> list[tuple[int, ...]]:
        """Return the tokens whose logprobs each row names; an empty tuple for a row that names none."""
        return [self._named[seat] for seat in seats_R.tolist()]

    def refused(self, seats_N: Ints, flags_N: Flags) -> dict[int, str | RowError]:
        """Return by row why this model cannot honour its parameters."""
        return {int(row): self._refusals[int(seats_N[row])] for row in np.flatnonzero(flags_N & REFUSED)}

    def drop_ended_grammars(self, seats_N: Ints, flags_N: Flags) -> Flags:
        """Return the flags without CONSTRAINED for rows whose answer is complete, or whose grammar has failed."""
        rows_R = np.flatnonzero(flags_N & CONSTRAINED)
        ended_R = rows_R[~self._grammars.going_on(seats_N[rows_R])]
        flags_N = flags_N.copy()
        flags_N[ended_R] &= ~np.uint8(CONSTRAINED)
        return flags_N

    def edit_logits(
        self, logits_NV: Tensor, seats_N: Ints, positions_N: Ints, flags_N: Flags, upload: Upload
    ) -> dict[int, BadParameters]:
        """Apply grammars, edits and penalties in place. Return by row the grammars that failed.

        positions_N: that the sampled token gets in its sequence. `upload` copies to the logits' device.
        """
        rows_R = np.flatnonzero(flags_N & CONSTRAINED)
        broken = self._grammars.apply(logits_NV, rows_R, seats_N[rows_R], upload) if len(rows_R) else {}
        if np.any(flags_N & EDITED):
            self._edits.apply(logits_NV, seats_N, positions_N - self.prompt_tokens[seats_N], upload)
        rows_R = np.flatnonzero(flags_N & PENALISED)
        if len(rows_R):
            self._penalties.apply(logits_NV, rows_R, seats_N[rows_R], upload)
        return broken

    def append_tokens(self, seats_N: Ints, tokens_N: Ints, flags_N: Flags, sound_N: npt.NDArray[np.bool_]) -> Accepted:
        """Tell the processors the tokens of a step; grammars those of sound rows only."""
        for flag, stage in ((EDITED, self._edits), (PENALISED, self._penalties)):
            rows_R = np.flatnonzero(flags_N & flag)
            if len(rows_R):
                stage.append_tokens(seats_N[rows_R], tokens_N[rows_R])
        rows_R = np.flatnonzero(sound_N & ((flags_N & CONSTRAINED) != 0))
        return self._grammars.append_tokens(rows_R, seats_N[rows_R], tokens_N[rows_R])

    def _refusal_of(self, params: SamplingParams) -> str:
        """Return why this model cannot honour these parameters, or an empty text."""
        for name in ("logit_bias", "allowed_token_ids", "logprob_token_ids"):
            wrong = [token for token in getattr(params, name) or () if not 0 <= token < self._vocab_size]
            if wrong:
                return f"{name} names token {wrong[0]}, and the model's vocabulary has {self._vocab_size} tokens"
        return ""
