"""Runs a plan on a model: from token ranges to sampled tokens.

It owns, by seat, block tables and sampling state, and the KV cache; a plan says what changes in them. Per step the host
does a fixed number of array operations whatever the number of sequences; only those that join or grow are looped over.
If a step raises, nothing in it counts, and whoever was in it joins again: nothing needs to be undone here.

T tokens of a step · S sequences in it · N rows that are sampled from, then rows that are read · W blocks per table ·
V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from batchinfer_kernels.contract import StepInputs
from torch import Tensor

from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.errors import RowError
from batchinfer.models.decoder import Decoder
from batchinfer.request import Constraint
from batchinfer.runner.kv_cache import KVCache
from batchinfer.runner.prompt_outputs import PromptReader
from batchinfer.runner.sampler import Sampler

Ints = npt.NDArray[np.int64]

_LOGITS_BYTES = 1 << 29  # at once; with more rows than that, LM head and sampler run several times
_READ_LOGITS_BYTES = 1 << 26  # of rows of a prompt, which come by thousands: what is in a cache is read faster


class _Sampled(NamedTuple):
    """Seats that sample a token in this step, and the position that the token gets in its sequence."""

    seats_N: Ints
    positions_N: Ints


class ModelRunner:
    """Executes plans in the order in which the scheduler made them. A step is done when `launch` returns."""

    depth = 0

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the KV cache, in the decoder's dtype unless told. Raises ModelError without room."""
        backend = decoder.backend
        self.decoder = decoder
        self.cache = KVCache(backend, decoder.config.kv_shape, num_blocks, block_size, kv_dtype or decoder.dtype)
        self.sampler = Sampler(max_num_seqs, decoder.config.vocab_size)
        self.reader = PromptReader(decoder)
        self._device = backend.device
        self._capabilities = backend.capabilities
        self._tables_SW = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint] | None = None) -> StepResult:
        """Run one forward pass over the plan's tokens. `constraints`: grammars of sequences that join, by seat.

        Raises whatever goes wrong; the runner stays usable.
        """
        for join in plan.joins:
            self.sampler.seat_sequence(join, constraints.get(join.seat) if constraints else None)
            self.reader.seat_sequence(join)
        for seat, first, blocks in plan.grown:
            self._tables_SW[seat, first : first + len(blocks)] = blocks
        if not plan.seats:
            return StepResult([])
        if plan.copies:
            self.cache.copy(plan.copies)
        inputs, sampled = self._inputs(plan)
        hidden_NE = self.decoder(inputs, self.cache.layers)
        result = self._sample(hidden_NE[: len(sampled.seats_N)], sampled)
        if not plan.reads:
            return result
        rows = max(1, _READ_LOGITS_BYTES // (4 * self.decoder.config.vocab_size))
        return result._replace(readings=self.reader.read_prompts(hidden_NE[len(sampled.seats_N) :], plan, rows))

    def collect(self, ticket: StepResult) -> StepResult:
        """Return the result that `launch` returned."""
        return ticket

    def discard(self) -> None:
        """Do nothing: no step is in flight."""

    def _inputs(self, plan: StepPlan) -> tuple[StepInputs, _Sampled]:
        seats_S = np.array(plan.seats, dtype=np.int64)
        starts_S = np.array(plan.starts, dtype=np.int64)
        counts_S = np.array(plan.counts, dtype=np.int64)
        samples_S = np.array(plan.samples, dtype=np.int64)
        tokens_T = np.array(plan.tokens, dtype=np.int64)
        read_rows = self.reader.token_rows(plan, counts_S.cumsum() - counts_S) if plan.reads else None
        together_S = self._together(seats_S, starts_S, counts_S, samples_S)
        if ((counts_S > 1) & (starts_S + counts_S > together_S)).any():
            seats_S, starts_S, counts_S, samples_S = split_decode_rows(
                together_S, seats_S, starts_S, counts_S, samples_S
            )
        sampling_S = samples_S > 0
        ends_S = starts_S + counts_S
        starts_X = np.zeros(len(counts_S) + 1, dtype=np.int64)
        stops_S = np.cumsum(counts_S, out=starts_X[1:])
        longest = int(ends_S.max())
        self._check(tokens_T, int(stops_S[-1]), longest)
        positions_T = np.arange(len(tokens_T)) + np.repeat(starts_S - starts_X[:-1], counts_S)
        size = self.cache.block_size
        blocks_T = self._tables_SW[np.repeat(seats_S, counts_S), positions_T // size].astype(np.int64)
        self.cache.prefault(int(blocks_T.max()) + 1)
        rows_N = stops_S[sampling_S] - 1
        if read_rows is not None:  # after those that sample
            rows_N = np.concatenate([rows_N, read_rows])
        inputs = StepInputs(
            tokens_T=self._to_device(tokens_T),
            positions_T=self._to_device(positions_T),
            slots_T=self._to_device(blocks_T * size + positions_T % size),
            block_tables_SW=self._to_device(self._tables_SW[seats_S, : -(-longest // size)]),
            query_starts_X=self._to_device(starts_X),
            lengths_S=self._to_device(ends_S),
            prompt_S=self._to_device(starts_S < self.sampler.prompt_tokens[seats_S]),
            output_rows_N=self._to_device(rows_N),
            max_length=longest,
        )
        return inputs, _Sampled(seats_S[sampling_S], ends_S[sampling_S])

    def _together(self, seats_S: Ints, starts_S: Ints, counts_S: Ints, samples_S: Ints) -> Ints:
        """Return the position from which on a sequence's tokens are computed one by one, as `split_decode_rows` does.

        With exact rows that is the end of the prompt: then a token gets the same bits, however it came to be computed.
        Otherwise only drafts are split, if that is faster.
        """
        if self._capabilities.exact_rows:
            return self.sampler.prompt_tokens[seats_S]
        ends_S = starts_S + counts_S
        return np.where(samples_S > 1, starts_S, ends_S) if self._capabilities.drafts_as_sequences else ends_S

    def _sample(self, hidden_NE: Tensor, sampled: _Sampled) -> StepResult:
        tokens: list[int] = []
        logprobs = []
        failed: dict[int, str | RowError] = {}
        ended: set[int] = set()
        size = max(1, _LOGITS_BYTES // (4 * self.decoder.config.vocab_size))
        if 0 < len(hidden_NE) <= size:
            return self._sample_rows(hidden_NE, *sampled)
        for start in range(0, len(hidden_NE), size):
            rows = slice(start, start + size)
            result = self._sample_rows(hidden_NE[rows], sampled.seats_N[rows], sampled.positions_N[rows])
            tokens += result.tokens
            logprobs += result.logprobs or [None] * len(result.tokens)
            failed |= {start + row: reason for row, reason in (result.failed or {}).items()}
            ended |= {start + row for row in result.ended}
        return StepResult(tokens, logprobs if any(logprobs) else None, failed or None, frozenset(ended))

    def _sample_rows(self, hidden_NE: Tensor, seats_N: Ints, positions_N: Ints) -> StepResult:
        largest = self.decoder.largest_logits(hidden_NE) if self.sampler.all_plain_greedy(seats_N) else None
        if largest is not None:
            return self.sampler.result_of_largest(*largest)
        return self.sampler.sample(self.decoder.logits(hidden_NE), seats_N, positions_N)

    def _check(self, tokens_T: Ints, num_tokens: int, longest: int) -> None:
        """Bounds-check the plan on the host: on a GPU an invalid index aborts the process, or reads wrong memory."""
        assert len(tokens_T) == num_tokens, f"a plan declares {num_tokens} tokens but carries {len(tokens_T)}"
        limit = self._tables_SW.shape[1] * self.cache.block_size
        if longest > limit:
            raise ValueError(f"a sequence of {longest} tokens is beyond the context of {limit}")
        lowest, highest = int(tokens_T.min()), int(tokens_T.max())
        vocab = self.decoder.config.vocab_size
        if lowest < 0 or highest >= vocab:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"token {wrong} is not in the model's vocabulary of {vocab} tokens")

    def _to_device(self, values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def split_decode_rows(
    together_S: Ints, seats_S: Ints, starts_S: Ints, counts_S: Ints, samples_S: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """Split every token at or after `together_S` into its own length-1 query, so that it takes the decode kernel.

    A draft's tokens are then computed as they are without a draft, and after a preemption as before it. The queries
    share a block table; all of a step's keys are written before any is read, and a length hides what comes after.
    """
    inside_S = np.clip(together_S - starts_S, 0, counts_S)
    parts_S = (inside_S > 0) + counts_S - inside_S
    owners_P = np.repeat(np.arange(len(parts_S)), parts_S)
    part_P = np.arange(len(owners_P)) - np.repeat(parts_S.cumsum() - parts_S, parts_S)  # of its sequence's
    inside_P = inside_S[owners_P]
    whole_P = (inside_P > 0) & (part_P == 0)
    return (
        seats_S[owners_P],
        starts_S[owners_P] + np.where(whole_P, 0, part_P + np.maximum(inside_P - 1, 0)),
        np.where(whole_P, inside_P, 1),
        (parts_S[owners_P] - part_P <= samples_S[owners_P]).astype(np.int64),
    )
