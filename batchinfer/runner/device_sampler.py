"""Sampler on the device: launches what samples a step's rows, and reads the tokens when they have come.

State: parameters by seat on the device, where the kernels read them, and `SamplingSeats` on the host for the rows whose
logits it edits (grammars, edits, penalties). Owner: the device runner. Flow: `seat_sequence` and `join_words` for
sequences that take a seat; `launch` for rows whose tokens before are known to whoever needs them; `collect` in the
order of the steps, which tells the processors the tokens. Failure: a row that cannot be sampled is reported, the other
rows are not affected.

N rows that are sampled together · R rows with logprobs · E hidden size · V vocabulary · C listed tokens ·
J sequences that join
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from batchinfer_kernels.steps import JOIN_WORDS, SAMPLED, SampledRows, SampleRows, SeatState
from torch import Tensor

from batchinfer.engine.plan import Join
from batchinfer.errors import RowError
from batchinfer.models.decoder import Decoder
from batchinfer.ops.step_kernels import StepKernels
from batchinfer.ops.streams import Download, Streams, Upload
from batchinfer.request import MAX_LOGPROBS, Constraint, TokenLogprob
from batchinfer.runner.logprobs import NOT_FINITE, listed_logprobs
from batchinfer.runner.sampling_seats import LOGPROBS, NOTHING_LEFT, ON_HOST, RANDOM, REFUSED, SamplingSeats

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]

LOGITS_BYTES = 1 << 29
"""Logits that exist at once; with more rows than that, LM head and sampler run several times."""

_INT32_MAX = np.iinfo(np.int32).max


def rows_at_once(vocab_size: int) -> int:
    """Return the rows whose logits exist at once; a multiple of 4 keeps views of each slice aligned."""
    rows = LOGITS_BYTES // (4 * vocab_size)
    return max(1, rows - rows % 4 if rows > 4 else rows)


class HostRows(NamedTuple):
    """Rows that are sampled together, as the host knows them."""

    places_N: Ints  # in the step's result
    seats_N: Ints
    positions_N: Ints  # that the sampled token gets in its sequence
    flags_N: npt.NDArray[np.uint8]
    taken_N: Ints  # how often the seat had been taken: tells whether it still has the same sequence

    @property
    def asked(self) -> int:
        """Flags that any of the rows has."""
        return int(np.bitwise_or.reduce(self.flags_N, initial=0))

    def select(self, chosen: slice | Ints) -> HostRows:
        if isinstance(chosen, slice) and chosen == slice(0, len(self.places_N)):
            return self
        places_N, seats_N, positions_N, flags_N, taken_N = self
        return HostRows(places_N[chosen], seats_N[chosen], positions_N[chosen], flags_N[chosen], taken_N[chosen])


class _LogprobsInFlight(NamedTuple):
    """Logprobs on their way: of some rows their own and the listed ones, [R, 1 + C], and the listed ids [R, C]."""

    rows_R: Ints
    counts_R: Ints
    values: Download
    ids: Download


class SamplesInFlight(NamedTuple):
    """Rows whose sampling was launched. `sampled`: int32 [3, N], tokens, statuses, and 1 for bad unedited logits."""

    rows: HostRows
    sampled: Download
    logprobs: list[_LogprobsInFlight]
    refused: dict[int, str | RowError]
    broken: dict[int, RowError]  # grammars that failed


class Samples(NamedTuple):
    """Tokens of rows [N]; logprobs by row, failures by row, and the rows that complete an answer by its grammar."""

    tokens_N: Ints
    logprobs: dict[int, TokenLogprob]
    failed: dict[int, str | RowError]
    ended: list[int]


class DeviceSampler:
    """Sampler of all seats, without a wait but in `collect`."""

    def __init__(self, decoder: Decoder, steps: StepKernels, streams: Streams, state: SeatState) -> None:
        count = len(state.last_tokens_P) - 1
        self.seats = SamplingSeats(count, decoder.config.vocab_size)
        self._decoder = decoder
        self._steps = steps
        self._streams = streams
        self._state = state
        self._taken = np.zeros(count, dtype=np.int64)
        self._slice_rows = rows_at_once(decoder.config.vocab_size)

    def seat_sequence(self, join: Join, constraint: Constraint | None) -> None:
        """Compile the parameters of a sequence that takes a seat; `constraint` is the grammar that it must follow."""
        self.seats.seat_sequence(join, constraint)
        self._taken[join.seat] += 1

    def join_words(self, joins: Sequence[Join]) -> Words:
        """Return the rows of `SeatUpdates.joins_J12` of sequences that have taken their seats."""
        if not joins:
            return np.zeros((0, JOIN_WORDS), dtype=np.int32)
        seats, seats_J = self.seats, np.array([join.seat for join in joins], dtype=np.int64)
        words_J12 = np.zeros((len(joins), JOIN_WORDS), dtype=np.int32)
        is_random_J = (seats.flags[seats_J] & RANDOM) != 0
        with np.errstate(divide="ignore"):
            log_min_p_J = np.log(seats.min_p[seats_J]).astype(np.float32)
        words_J12[:, 0] = seats_J
        words_J12[:, 1] = seats.prompt_tokens[seats_J]
        words_J12[:, 2:4] = seats.keys[seats_J].view(np.int32).reshape(-1, 2)
        words_J12[:, 4] = np.where(is_random_J, seats.temperature[seats_J], np.float32(0)).view(np.int32)
        words_J12[:, 5] = np.minimum(seats.top_k[seats_J], _INT32_MAX)
        words_J12[:, 6] = log_min_p_J.view(np.int32)
        words_J12[:, 7:9] = seats.top_p[seats_J].view(np.int32).reshape(-1, 2)
        return words_J12

    def rows_of(self, seats_N: Ints, positions_N: Ints) -> tuple[HostRows, int]:
        """Return the rows of a step, and how many of them, the first ones, need nothing of the host.

        Refused rows have no logprobs: what they name may be no token.
        """
        flags_N = self.seats.flags[seats_N]
        rows = HostRows(np.arange(len(seats_N)), seats_N, positions_N, flags_N, self._taken[seats_N])
        asked = rows.asked
        if asked & REFUSED:
            flags_N[(flags_N & REFUSED) != 0] &= ~np.uint8(LOGPROBS)
        if not asked & ON_HOST:
            return rows, len(seats_N)
        on_host_N = (flags_N & ON_HOST) != 0
        return rows.select(np.argsort(on_host_N, kind="stable")), len(seats_N) - int(on_host_N.sum())

    def launch(self, hidden_NE: Tensor, rows: HostRows, where: SampleRows, upload: Upload) -> SamplesInFlight:
        """Sample from the hidden states of rows, which `where` begins with. Their processors know all tokens before.

        Rows of an answer that has ended are sampled like others; nobody will look at them.
        """
        if rows.asked & ON_HOST:
            rows = rows._replace(flags_N=self.seats.drop_ended_grammars(rows.seats_N, rows.flags_N))
        count = len(rows.seats_N)
        out_3N = _aligned_rows(count, hidden_NE.device)
        logprobs: list[_LogprobsInFlight] = []
        broken: dict[int, RowError] = {}
        for start in range(0, count, self._slice_rows):
            part = slice(start, min(start + self._slice_rows, count))
            some, out_3M = rows.select(part), out_3N[:, part]
            logits_MV = self._decoder.logits(hidden_NE[part])
            raw_MV, asked = logits_MV, some.asked
            if asked & ON_HOST:
                raw_MV = logits_MV.clone() if asked & LOGPROBS else logits_MV
                out_3M[2] = ~logits_MV.amax(1).isfinite()
                found = self.seats.edit_logits(logits_MV, some.seats_N, some.positions_N, some.flags_N, upload)
                broken |= {start + row: error for row, error in found.items()}
            where_M = SampleRows(*(values[part] for values in where))
            self._steps.sample_rows(logits_MV, where_M, self._state, SampledRows(out_3M[0], out_3M[1]))
            if asked & LOGPROBS:
                found_R = self._launch_logprobs(raw_MV, out_3M[0], some, upload)
                logprobs.append(found_R._replace(rows_R=found_R.rows_R + start))
        refused = self.seats.refused(rows.seats_N, rows.flags_N) if rows.asked & REFUSED else {}
        return SamplesInFlight(rows, self._streams.download(out_3N), logprobs, refused, broken)

    def collect(self, flight: SamplesInFlight) -> Samples:
        """Wait for tokens, and tell the processors those of sequences that still have their seats."""
        rows = flight.rows
        tokens_N, status_N, raw_N = (values[: len(rows.seats_N)] for values in flight.sampled.wait().numpy())
        tokens_N = tokens_N.astype(np.int64)
        failed: dict[int, str | RowError] = {}
        unsound_N = status_N != SAMPLED
        if unsound_N.any() or flight.broken or flight.refused:
            on_host_N = (rows.flags_N & ON_HOST) != 0
            failed |= dict.fromkeys(np.flatnonzero(unsound_N & on_host_N).tolist(), NOTHING_LEFT)
            failed |= flight.broken
            failed |= dict.fromkeys(np.flatnonzero((unsound_N & ~on_host_N) | (raw_N != 0)).tolist(), NOT_FINITE)
            failed |= flight.refused
        ended: list[int] = []
        if rows.asked & ON_HOST:
            sound_N = np.ones(len(tokens_N), dtype=bool)
            sound_N[list(failed)] = False
            flags_N = np.where(self._taken[rows.seats_N] == rows.taken_N, rows.flags_N, np.uint8(0))
            ended, refused = self.seats.append_tokens(rows.seats_N, tokens_N, flags_N, sound_N)
            failed |= refused
        logprobs: dict[int, TokenLogprob] = {}
        for found in flight.logprobs:
            values_RC, ids_RC = found.values.wait().numpy(), found.ids.wait().numpy()
            entries = listed_logprobs(tokens_N[found.rows_R], values_RC, ids_RC, found.counts_R)
            logprobs |= zip(found.rows_R.tolist(), entries, strict=True)
        return Samples(tokens_N, logprobs, failed, ended)

    def launch_largest(self, hidden_NE: Tensor, where: SampleRows) -> None:
        """Sample as many rows as are sampled at once at most, with logprobs: what takes the most memory."""
        part = slice(0, self._slice_rows)
        logits_MV = self._decoder.logits(hidden_NE[part])
        out_3M = _aligned_rows(len(logits_MV), logits_MV.device)[:, : len(logits_MV)]
        where_M = SampleRows(*(values[part] for values in where))
        self._steps.sample_rows(logits_MV, where_M, self._state, SampledRows(out_3M[0], out_3M[1]))
        self._steps.gather_logprobs(logits_MV, out_3M[0], min(MAX_LOGPROBS, logits_MV.shape[1]))

    def _launch_logprobs(self, raw_NV: Tensor, tokens_N: Tensor, rows: HostRows, upload: Upload) -> _LogprobsInFlight:
        """Gather the logprobs of the rows that asked, from the log-softmax of the unmodified logits."""
        rows_R = np.flatnonzero(rows.flags_N & LOGPROBS)
        if len(rows_R) < len(raw_NV):
            index_R = upload(rows_R)
            raw_NV, tokens_N = raw_NV.index_select(0, index_R), tokens_N.index_select(0, index_R)
        seats_R = rows.seats_N[rows_R]
        counts_R = np.minimum(self.seats.num_logprobs[seats_R], raw_NV.shape[1])
        named = self.seats.named_tokens(seats_R)
        named_RC = None
        if any(named):
            ids_RC = np.full((len(named), max(map(len, named))), -1, dtype=np.int32)
            for row, tokens in enumerate(named):
                ids_RC[row, : len(tokens)] = tokens
            named_RC = upload(ids_RC)
            counts_R = np.where([bool(tokens) for tokens in named], [len(tokens) for tokens in named], counts_R)
        found = self._steps.gather_logprobs(raw_NV, tokens_N, int(counts_R.max()), named_RC)
        values_RC = torch.cat([found.own_N[:, None], found.values_NC], dim=1)
        return _LogprobsInFlight(
            rows_R, counts_R, self._streams.download(values_RC), self._streams.download(found.ids_NC)
        )


def _aligned_rows(count: int, device: torch.device) -> Tensor:
    """Return int32 [3, N] with aligned rows: a kernel is compiled once more for addresses that are not."""
    return torch.zeros(3, -(-count // 4) * 4, dtype=torch.int32, device=device)
