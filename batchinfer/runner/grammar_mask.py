"""Grammar masks: the logits processor of structured outputs, one bit mask over the rows that have a grammar.

State: by seat a compiled grammar and the matcher of one answer. Owner: the sampler. Flow: the grammar of a sequence
comes beside the plan in which it joins; `apply` masks logits before tokens are chosen; `append_tokens` advances the
matchers. Failure: a matcher that cannot go on fails its own row.

R rows with a grammar · N rows that sample · V vocabulary · W words of 32 tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchinfer.errors import BadParameters
from batchinfer.ops.resources import HOST
from batchinfer.ops.streams import Upload
from batchinfer.request import Constraint, Matcher

Ints = npt.NDArray[np.int64]
_TOGETHER = 1 << 21  # logits at once: their mask in float32 should stay in the processor's cache


class _Held(NamedTuple):
    constraint: Constraint
    matcher: Matcher


class Accepted(NamedTuple):
    """Effect of a step's tokens on the grammars: rows whose answer is complete, and errors by row."""

    ended: list[int]
    failed: dict[int, BadParameters]


class GrammarMasks:
    """Matchers by seat: `seat_sequence`, then per step `apply` before tokens are chosen and `append_tokens` after."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._held: dict[int, _Held] = {}
        self._masks_RW = np.zeros((0, -(-vocab_size // 32)), dtype=np.int32)

    def seat_sequence(self, seat: int, constraint: Constraint | None, output: Sequence[int]) -> bool:
        """Replace the matcher of `seat` by one that has accepted `output`. Return True if there is a grammar."""
        self._held.pop(seat, None)
        if constraint is None:
            return False
        self._held[seat] = _Held(constraint, constraint.matcher(output))
        return True

    def going_on(self, seats_R: Ints) -> npt.NDArray[np.bool_]:
        """Return for which seats something may follow: their answers are neither complete nor failed."""
        matchers = [self._held[seat].matcher for seat in seats_R.tolist()]
        return np.array([not (one.complete or one.error) for one in matchers], dtype=bool)

    def apply(self, logits_NV: Tensor, rows_R: Ints, seats_R: Ints, upload: Upload) -> dict[int, BadParameters]:
        """Set logits that the grammars of these rows forbid to -inf, in place. Return errors of grammars by row."""
        if len(rows_R) > len(self._masks_RW):
            self._masks_RW = np.zeros((2 * len(rows_R), self._masks_RW.shape[1]), dtype=np.int32)
        masks_RW = self._masks_RW[: len(rows_R)]
        held = [self._held[seat] for seat in seats_R.tolist()]
        matchers = [one.matcher for one in held]
        held[0].constraint.fill(matchers, masks_RW.ctypes.data, masks_RW.strides[0])
        size = max(1, _TOGETHER // self._vocab_size)
        for start in range(0, len(rows_R), size):
            some = slice(start, start + size)
            caps_RV = _caps(masks_RW[some], self._vocab_size, logits_NV.device, upload)
            _lower(logits_NV, rows_R[some], caps_RV, upload)
        return _failures(rows_R, matchers)

    def append_tokens(self, rows_R: Ints, seats_R: Ints, tokens_R: Ints) -> Accepted:
        """Advance the matchers of these seats by the tokens of this step."""
        matchers = [self._held[seat].matcher for seat in seats_R.tolist()]
        for matcher, token in zip(matchers, tokens_R.tolist(), strict=True):
            matcher.accept(token)
        ended = [row for row, matcher in zip(rows_R.tolist(), matchers, strict=True) if matcher.complete]
        return Accepted(ended, _failures(rows_R, matchers))


def _failures(rows_R: Ints, matchers: list[Matcher]) -> dict[int, BadParameters]:
    return {
        row: BadParameters(f"structured_outputs: {matcher.error}")
        for row, matcher in zip(rows_R.tolist(), matchers, strict=True)
        if matcher.error
    }


def _lower(logits_NV: Tensor, rows_R: Ints, caps_RV: Tensor, upload: Upload) -> None:
    """Set rows to the minimum of logits and caps, in place. NaN stays NaN.

    (masked_fill branches on every logit, and is slower.)
    """
    first = int(rows_R[0])
    if int(rows_R[-1]) - first == len(rows_R) - 1:
        part_RV = logits_NV[first : first + len(rows_R)]
        torch.minimum(part_RV, caps_RV, out=part_RV)
    else:
        index_R = upload(rows_R)
        logits_NV[index_R] = torch.minimum(logits_NV[index_R], caps_RV)


def _caps(masks_RW: npt.NDArray[np.int32], vocab_size: int, device: torch.device, upload: Upload) -> Tensor:
    """Return float32 [R, V]: infinity if bit v of the row is set (least significant bit first), else -infinity."""
    if device.type == HOST.type:
        bits_RV = np.unpackbits(masks_RW.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        set_RV = torch.from_numpy(bits_RV)
    else:
        set_RV = _bits(upload(masks_RW), vocab_size)  # only the bits travel
    return set_RV.to(torch.float32).sub_(0.5).mul_(math.inf)


def _bits(masks_RW: Tensor, vocab_size: int) -> Tensor:
    places_B = torch.arange(32, dtype=torch.int32, device=masks_RW.device)
    return ((masks_RW[:, :, None] >> places_B) & 1).flatten(1)[:, :vocab_size]
