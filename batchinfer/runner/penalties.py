"""Repetition, presence and frequency penalties: a logits processor with vLLM's meaning.

Repetition counts prompt and output, the other two the output alone; repetition is applied first.

State: per sequence with a penalty its distinct tokens and their counts, not a row over the vocabulary, so memory and
time follow the length of the text. Owner: the sampler.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchinfer.engine.plan import Join
from batchinfer.ops.streams import Upload

Ints = npt.NDArray[np.int64]
_NONE = -1
_MILDEST, _HARSHEST = 1e-30, 1e30  # beyond, float32 logits would overflow


class Penalties:
    """Token counts by seat: `seat_sequence`, then per step `apply` before tokens are chosen and `append_tokens` after.

    Legend: P places, one per sequence with penalties · L distinct tokens · M distinct tokens of all rows together.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._places = np.full(max_num_seqs, _NONE, dtype=np.int64)  # by seat
        self._free: list[int] = []
        self._tokens_PL = np.zeros((0, 0), dtype=np.int32)
        self._counts_PL = np.zeros(
            (0, 0), dtype=np.int32
        )  # occurrences in the output; 0 for tokens of the prompt alone
        self._lengths_P = np.zeros(0, dtype=np.int64)
        self._amounts_P3 = np.zeros((0, 3), dtype=np.float32)  # repetition, presence, frequency

    def seat_sequence(self, join: Join) -> bool:
        """Replace the counts of the seat. Return True if the sequence has any penalty."""
        seat, params, output = join.seat, join.params, join.output
        if self._places[seat] != _NONE:
            self._free.append(int(self._places[seat]))
            self._places[seat] = _NONE
        if not params.penalised:
            return False
        repetition = min(max(params.repetition_penalty, _MILDEST), _HARSHEST)
        amounts = (repetition, params.presence_penalty, params.frequency_penalty)
        prompt = np.array(join.prompt if params.repetition_penalty != 1.0 else [], dtype=np.int64)
        both = np.concatenate([np.array(output, dtype=np.int64), prompt])
        tokens_L, inverse = np.unique(both, return_inverse=True)
        counts_L = np.bincount(inverse[: len(output)], minlength=len(tokens_L))
        known_L = (tokens_L >= 0) & (tokens_L < self._vocab_size)
        tokens_L, counts_L = tokens_L[known_L], counts_L[known_L]
        if not self._free:
            self._add_places()
        place = self._free.pop()
        self._widen_to(len(tokens_L))
        self._places[seat] = place
        self._lengths_P[place] = len(tokens_L)
        self._tokens_PL[place, : len(tokens_L)] = tokens_L
        self._counts_PL[place, : len(tokens_L)] = counts_L
        self._amounts_P3[place] = amounts
        return True

    def apply(self, logits_NV: Tensor, rows_R: Ints, seats_R: Ints, upload: Upload) -> None:
        """Penalise the logits of the given rows, which belong to the given seats, in place."""
        places_R = self._places[seats_R]
        lengths_R = self._lengths_P[places_R]
        filled_RL = np.arange(lengths_R.max(initial=0)) < lengths_R[:, None]
        width = filled_RL.shape[1]
        tokens_M = self._tokens_PL[places_R, :width][filled_RL]
        counts_M = self._counts_PL[places_R, :width][filled_RL]
        amounts_M3 = np.repeat(self._amounts_P3[places_R], lengths_R, axis=0)
        flat_M = np.repeat(rows_R, lengths_R) * logits_NV.shape[1] + tokens_M
        repetition_M, presence_M, frequency_M = upload(np.ascontiguousarray(amounts_M3.T))
        count_M = upload(counts_M).float()
        index_M = upload(flat_M)
        flat = logits_NV.view(-1)
        values_M = flat[index_M]
        values_M = torch.where(values_M > 0, values_M / repetition_M, values_M * repetition_M)
        values_M -= frequency_M * count_M
        values_M -= presence_M * (count_M > 0)
        flat[index_M] = values_M

    def append_tokens(self, seats_R: Ints, tokens_R: Ints) -> None:
        """Count the tokens that these seats generated in this step."""
        places_R = self._places[seats_R]
        lengths_R = self._lengths_P[places_R]
        self._widen_to(int(lengths_R.max(initial=0)) + 1)
        width = int(lengths_R.max(initial=0))
        same_RL = self._tokens_PL[places_R, :width] == tokens_R[:, None]
        same_RL &= np.arange(width) < lengths_R[:, None]
        known_R = same_RL.any(1)
        column_R = np.where(known_R, same_RL.argmax(1) if width else 0, lengths_R)
        fresh_P = places_R[~known_R]
        self._tokens_PL[fresh_P, column_R[~known_R]] = tokens_R[~known_R]
        self._counts_PL[fresh_P, column_R[~known_R]] = 0
        self._lengths_P[fresh_P] += 1
        self._counts_PL[places_R, column_R] += 1

    def _add_places(self) -> None:
        old = len(self._lengths_P)
        added = max(8, old)
        self._free.extend(range(old + added - 1, old - 1, -1))
        self._tokens_PL = np.pad(self._tokens_PL, ((0, added), (0, 0)))
        self._counts_PL = np.pad(self._counts_PL, ((0, added), (0, 0)))
        self._lengths_P = np.pad(self._lengths_P, (0, added))
        self._amounts_P3 = np.pad(self._amounts_P3, ((0, added), (0, 0)))

    def _widen_to(self, needed: int) -> None:
        width = self._tokens_PL.shape[1]
        if needed > width:
            added = max(needed, min(2 * width, self._vocab_size), 64) - width
            self._tokens_PL = np.pad(self._tokens_PL, ((0, 0), (0, added)))
            self._counts_PL = np.pad(self._counts_PL, ((0, 0), (0, added)))
