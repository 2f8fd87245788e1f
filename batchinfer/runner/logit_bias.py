"""Edits of single logits: the logits processor of logit_bias, allowed_token_ids, bad_words and min_tokens.

State: entries by seat, and one flat table per kind over all seats that have entries, so that a step costs a few array
operations whatever the number of entries. The tables are host arrays: entries change when a sequence takes a seat, and
only the entries that act in a step are copied to the device. Owner: the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from batchinfer.engine.plan import Join
from batchinfer.ops.streams import Upload

Ints = npt.NDArray[np.int64]
_ALWAYS = np.iinfo(np.int64).max


class _Entries(NamedTuple):
    """Entries of one seat. `until_M`: the entry acts while the output has fewer tokens."""

    added_ids_M: Ints
    added_M: npt.NDArray[np.float32]
    until_M: Ints
    allowed_ids_M: Ints
    last_ids_M: Ints
    prefix_ML: Ints  # bad words of several tokens: all but the last, right-aligned; -1 matches anything


class _Tables(NamedTuple):
    """Entries of all seats, and the seat of each entry."""

    added_seats_M: Ints
    added_ids_M: Ints
    added_M: npt.NDArray[np.float32]
    until_M: Ints
    allowed_seats_M: Ints
    allowed_ids_M: Ints
    word_seats_M: Ints
    last_ids_M: Ints
    prefix_ML: Ints


class LogitEdits:
    """Edits by seat: `seat_sequence`, then per step `apply` before tokens are chosen and `append_tokens` after."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._entries: dict[int, _Entries] = {}
        self._tables: _Tables | None = None
        self._tails_SL = np.full((max_num_seqs, 0), -2, dtype=np.int64)  # by seat: the last tokens of its output

    def seat_sequence(self, join: Join) -> bool:
        """Replace the entries of the seat. Return True if there are any. Ids beyond the vocabulary are left out."""
        seat = join.seat
        entries = self._compile_entries(join)
        if entries is None:
            if self._entries.pop(seat, None) is not None:
                self._tables = None
            return False
        self._entries[seat] = entries
        self._tables = None
        length = entries.prefix_ML.shape[1]
        if length > self._tails_SL.shape[1]:
            wider = np.full((len(self._tails_SL), length), -2, dtype=np.int64)
            wider[:, length - self._tails_SL.shape[1] :] = self._tails_SL
            self._tails_SL = wider
        length = self._tails_SL.shape[1]
        if length:
            self._tails_SL[seat] = -2
            tail = list(join.output[-length:])
            self._tails_SL[seat, length - len(tail) :] = tail
        return True

    def apply(self, logits_NV: Tensor, seats_N: Ints, num_output_N: Ints, upload: Upload) -> None:
        """Edit the rows in place. seats_N: the seat of each row; num_output_N: output tokens of its sequence."""
        tables = self._tables = self._tables or self._join_tables()
        rows_of = np.full(len(self._tails_SL), -1, dtype=np.int64)  # by seat
        rows_of[seats_N] = np.arange(len(seats_N))
        if len(tables.allowed_ids_M):
            _keep_only(logits_NV, *_select(rows_of, tables.allowed_seats_M, tables.allowed_ids_M), upload)
        rows_M = rows_of[tables.added_seats_M]
        # a seat that is not in this step has row -1, which reads num_output_N[-1]; the mask drops it
        acts_M = (rows_M >= 0) & (num_output_N[rows_M] < tables.until_M)
        _add(logits_NV, rows_M[acts_M], tables.added_ids_M[acts_M], tables.added_M[acts_M], upload)
        if len(tables.last_ids_M):
            tails_ML = self._tails_SL[tables.word_seats_M]
            hit_M = ((tables.prefix_ML == -1) | (tables.prefix_ML == tails_ML)).all(1)
            rows_M, ids_M = _select(rows_of, tables.word_seats_M[hit_M], tables.last_ids_M[hit_M])
            _add(logits_NV, rows_M, ids_M, np.full(len(ids_M), -math.inf, dtype=np.float32), upload)

    def append_tokens(self, seats_N: Ints, tokens_N: Ints) -> None:
        """Shift the tokens that these seats generated in this step into their tails."""
        if self._tails_SL.shape[1]:
            self._tails_SL[seats_N, :-1] = self._tails_SL[seats_N, 1:]
            self._tails_SL[seats_N, -1] = tokens_N

    def _compile_entries(self, join: Join) -> _Entries | None:
        params = join.params
        if not (params.logit_bias or params.allowed_token_ids or params.min_tokens or join.bad_words):
            return None
        bias = params.logit_bias or {}
        single = {word[0] for word in join.bad_words if len(word) == 1}
        stops = join.stop_ids if params.min_tokens else frozenset()
        added = [(token, amount, _ALWAYS) for token, amount in bias.items()]
        added += [(token, -math.inf, _ALWAYS) for token in sorted(single)]
        added += [(token, -math.inf, min(params.min_tokens, _ALWAYS)) for token in sorted(stops)]
        added = [entry for entry in added if 0 <= entry[0] < self._vocab_size]
        words = [word for word in join.bad_words if len(word) > 1 and 0 <= word[-1] < self._vocab_size]
        allowed = {token for token in params.allowed_token_ids or () if 0 <= token < self._vocab_size}
        if not (added or words or allowed):
            return None
        prefix_ML = np.full((len(words), max((len(word) - 1 for word in words), default=0)), -1, dtype=np.int64)
        for row_L, word in zip(prefix_ML, words, strict=True):
            row_L[len(row_L) - len(word) + 1 :] = word[:-1]
        return _Entries(
            np.array([entry[0] for entry in added], dtype=np.int64),
            np.array([entry[1] for entry in added], dtype=np.float32),
            np.array([entry[2] for entry in added], dtype=np.int64),
            np.array(sorted(allowed), dtype=np.int64),
            np.array([word[-1] for word in words], dtype=np.int64),
            prefix_ML,
        )

    def _join_tables(self) -> _Tables:
        seats = np.fromiter(self._entries, dtype=np.int64, count=len(self._entries))
        entries = list(self._entries.values())
        length = self._tails_SL.shape[1]
        prefixes = [_left_pad(entry.prefix_ML, length) for entry in entries]

        def seats_of(values_of: Callable[[_Entries], Ints]) -> Ints:
            return np.repeat(seats, [len(values_of(entry)) for entry in entries])

        return _Tables(
            seats_of(lambda entry: entry.added_ids_M),
            np.concatenate([entry.added_ids_M for entry in entries]),
            np.concatenate([entry.added_M for entry in entries]),
            np.concatenate([entry.until_M for entry in entries]),
            seats_of(lambda entry: entry.allowed_ids_M),
            np.concatenate([entry.allowed_ids_M for entry in entries]),
            seats_of(lambda entry: entry.last_ids_M),
            np.concatenate([entry.last_ids_M for entry in entries]),
            np.concatenate(prefixes),
        )


def _left_pad(prefix_ML: Ints, length: int) -> Ints:
    return np.pad(prefix_ML, ((0, 0), (length - prefix_ML.shape[1], 0)), constant_values=-1)


def _select(rows_of: Ints, seats_M: Ints, ids_M: Ints) -> tuple[Ints, Ints]:
    """Return rows and ids of the entries whose seat is in the step."""
    rows_M = rows_of[seats_M]
    here_M = rows_M >= 0
    return rows_M[here_M], ids_M[here_M]


def _add(logits_NV: Tensor, rows_M: Ints, ids_M: Ints, amounts_M: npt.NDArray[np.float32], upload: Upload) -> None:
    """Add amounts in place. Amounts for the same logit add up: a banned token stays banned whatever its bias."""
    logits_NV.index_put_((upload(rows_M), upload(ids_M)), upload(amounts_M), accumulate=True)


def _keep_only(logits_NV: Tensor, rows_M: Ints, ids_M: Ints, upload: Upload) -> None:
    """Set all logits but those of the given ids to -inf, in the rows that have any ids."""
    place = (upload(rows_M), upload(ids_M))
    kept_M = logits_NV[place]
    logits_NV.index_fill_(0, upload(np.unique(rows_M)), -math.inf)
    logits_NV[place] = kept_M
