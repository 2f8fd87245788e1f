"""The queue of sequences that wait for a seat, and the number of their known tokens.

State: the queue and the token count. Owner: the scheduler. Flow: new sequences join at the end, preempted ones at the
head; admission takes from the head.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from batchinfer.engine.sequence import Sequence


class WaitingQueue:
    """First in, first out; a preempted sequence goes first."""

    def __init__(self) -> None:
        self.num_tokens = 0  # known tokens of all waiting sequences
        self._sequences: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def head(self) -> Sequence:
        return self._sequences[0]

    def append(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._sequences.append(sequence)
        self.num_tokens += len(sequence.tokens)

    def push_front(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before all others."""
        self._sequences.appendleft(sequence)
        self.num_tokens += len(sequence.tokens)

    def pop_head(self) -> None:
        """Remove the head."""
        self.num_tokens -= len(self._sequences.popleft().tokens)

    def remove_request(self, request_id: int) -> bool:
        """Remove the sequence of a request. Return False if it is not here."""
        for sequence in self._sequences:
            if sequence.request.request_id == request_id:
                self._sequences.remove(sequence)
                self.num_tokens -= len(sequence.tokens)
                return True
        return False

    def check_integrity(self) -> None:
        """Assert that the token count is right and that no waiting sequence has a seat or blocks."""
        assert self.num_tokens == sum(len(sequence.tokens) for sequence in self), "the queue is miscounted"
        assert all(not sequence.blocks and sequence.seat < 0 for sequence in self), "waiting with blocks or a seat"
