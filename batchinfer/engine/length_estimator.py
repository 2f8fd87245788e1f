"""Estimate of output lengths: a running quantile of the answers of this job so far.

State: the last output lengths, also in sorted order. Owner: the scheduler, which adds every finished answer and admits
sequences by the estimate.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from batchinfer.request import Request

_PRIOR_TOKENS = 256


class OutputLengthEstimator:
    """Quantile over the last `window` output lengths; a fixed prior until `enough` lengths are known.

    Admission by `max_tokens` would leave most of the cache empty, admission by zero would thrash: the quantile keeps
    preemption rare without knowing the distribution.
    """

    def __init__(self, quantile: float = 0.8, window: int = 512, enough: int = 16) -> None:
        self._quantile = quantile
        self._enough = enough
        self._recent: deque[int] = deque(maxlen=window)
        self._sorted: list[int] = []

    def observe(self, length: int) -> None:
        """Add the output length, in tokens, of a finished sequence."""
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(length)
        insort(self._sorted, length)

    def estimate(self, request: Request) -> int:
        """Return the expected output length of `request`, in tokens; exact if nothing can end the answer early."""
        if not request.stop_ids and request.stop_check is None:
            return request.max_tokens
        return self.estimate_up_to(request.max_tokens)

    def estimate_up_to(self, max_tokens: int) -> int:
        """Return the expected length, in tokens, of an answer of at most `max_tokens`."""
        if len(self._sorted) < self._enough:
            return min(max_tokens, _PRIOR_TOKENS)
        return min(max_tokens, self._sorted[int(self._quantile * (len(self._sorted) - 1))])
