"""What a step needs of the sequences that only decode, by seat.

A sequence is a dozen objects; at thousands of sequences a step that visits them all waits for memory at each. Most only
add a token in a block that they have: for these the next position, the last token and the place to put the new one are
here, side by side. `Scheduler` visits the sequence itself when it needs a block or comes to its end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items

from batchinfer.engine.sequence import Sequence
from batchinfer.request import StopCheck, TokenLogprob


class Decoding:
    """Lists by seat. A sequence is in them from `enter`, after its first token, until `leave`."""

    def __init__(self, max_num_seqs: int) -> None:
        self.positions = [0] * max_num_seqs  # of the last known token, which the next step computes
        self.last = [0] * max_num_seqs  # that token
        self._until = [0] * max_num_seqs  # while the position is below, a step adds a token and does nothing else
        self._tokens: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._sequences: dict[int, Sequence] = {}
        self._checks: dict[int, StopCheck] = {}
        self._stop_sets: Counter[frozenset[int]] = Counter()  # of those here; mostly one, which they share
        self._stop_ids: set[int] = set()  # all of these, and some of `_stale_sets` that have left
        self._stale_sets = 0

    def enter(self, sequence: Sequence, block_size: int) -> None:
        """All but its last token is computed. Once more whenever it has been visited."""
        seat = sequence.seat
        self.positions[seat] = len(sequence.tokens) - 1
        self.last[seat] = sequence.tokens[-1]
        self._until[seat] = min(len(sequence.blocks) * block_size - 1, sequence.limit - 2)
        if seat in self._sequences:
            return
        self._sequences[seat] = sequence
        self._tokens[seat] = sequence.tokens
        request = sequence.request
        if request.stop_check is not None:
            self._checks[seat] = request.stop_check
        self._stop_sets[request.stop_ids] += 1
        if self._stop_sets[request.stop_ids] == 1:
            self._stop_ids.update(request.stop_ids)

    def leave(self, seat: int) -> None:
        """Its sequence gives the seat up, whether it is here or not."""
        sequence = self._sequences.pop(seat, None)
        if sequence is None:
            return
        self._until[seat] = 0
        self._checks.pop(seat, None)
        stop_ids = sequence.request.stop_ids
        self._stop_sets[stop_ids] -= 1
        if not self._stop_sets[stop_ids]:
            del self._stop_sets[stop_ids]
            self._stale_sets += 1
            if self._stale_sets > len(self._stop_sets):
                self._stop_ids = set().union(*self._stop_sets)
                self._stale_sets = 0

    def adds_one(self, seat: int) -> bool:
        """Whether the next step adds a token to it and does nothing else."""
        return self.positions[seat] < self._until[seat]

    def split(self, seats: Iterable[int]) -> tuple[list[int], list[int]]:
        """Those to which the next step adds a token and does nothing else, and the others."""
        positions, until = self.positions, self._until
        adding: list[int] = []
        others: list[int] = []
        for seat in seats:
            (adding if positions[seat] < until[seat] else others).append(seat)
        return adding, others

    def take(self, seats: Items[int], tokens: Items[int], logprobs: Items[TokenLogprob | None] | None) -> set[int]:
        """Take in a token for each of `seats`, which `split` gave; the places of those that stop with it.

        `tokens` and `logprobs` may go on after that.
        """
        positions, last, stop_ids = self.positions, self.last, self._stop_ids
        # a loop in C: it reaches for the next lists while it waits for one
        deque(map(list.append, map(self._tokens.__getitem__, seats), tokens), maxlen=0)
        stopped: set[int] = set()
        for place, (seat, token) in enumerate(zip(seats, tokens, strict=False)):
            last[seat] = token
            positions[seat] += 1
            if token in stop_ids and token in self._sequences[seat].request.stop_ids:
                stopped.add(place)
        if self._checks:
            checks = map(self._checks.get, seats)
            stopped.update(place for place, check in enumerate(checks) if check is not None and check(tokens[place]))
        if logprobs is not None:
            for seat, logprob in zip(seats, logprobs, strict=False):
                if logprob is not None:
                    self._sequences[seat].add_logprob(logprob)
        return stopped

    def check_integrity(self, running: Mapping[int, Sequence], block_size: int) -> None:
        """Assert that what is here is what the running sequences that decode are."""
        assert self._sequences == {seat: sequence for seat, sequence in running.items() if sequence.decodes}
        assert self._stop_sets == Counter(sequence.request.stop_ids for sequence in self._sequences.values())
        assert all(self._stop_ids.issuperset(stop_ids) for stop_ids in self._stop_sets)
        for seat in set(range(len(self._until))) - self._sequences.keys():
            assert not self._until[seat], "an empty seat decodes"
        for seat, sequence in self._sequences.items():
            assert self._tokens[seat] is sequence.tokens, "another's tokens"
            assert self.positions[seat] == sequence.num_computed, "at another position"
            assert self.last[seat] == sequence.tokens[-1], "another last token"
            assert self._until[seat] < len(sequence.blocks) * block_size, "it decodes beyond its blocks"
            assert self._checks.get(seat) is sequence.request.stop_check, "another's stop check"
