"""The sequences that decode, side by side: a step takes in a token for each of them without a look at any.

A sequence is a dozen objects; at thousands of sequences a step that visits them all waits for memory at each. Here each
has a lane, and what a step needs is one list per fact: the tokens that a step samples, in the order of the lanes, are
the next step's inputs as they are. Of some steps these are kept, and a sequence gets its own from there when it is
visited: when it comes to the end of its blocks or of its answer, which is known in advance, or when it leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from operator import itemgetter
from typing import Any

from batchinfer.engine.plan import StepResult
from batchinfer.engine.sequence import Sequence
from batchinfer.request import FinishReason, StopCheck

_REMEMBERED = 64  # steps whose tokens are kept: a sequence is visited before it lacks more


class Decoding:
    """Lists by lane, for running sequences of which all but the last token is computed. `others` have no lane.

    Whoever leaves is replaced by the last. Until it is settled, a sequence's `tokens` lack those of the last few steps.
    """

    def __init__(self, block_size: int) -> None:
        self.others: dict[int, Sequence] = {}  # by seat, in order of admission
        self.seats: list[int] = []
        self.positions: list[int] = []  # of the last known token, which the next step computes
        self.last: list[int] = []  # that token
        self._sequences: list[Sequence] = []
        self._settled: list[int] = []  # the number of steps when its own tokens were complete
        self._due: list[int] = []  # the number of steps before the one that visits it
        self._lanes: dict[int, int] = {}  # by seat
        self._block_size = block_size
        self._steps = 0  # taken in
        self._tokens: list[list[int]] = []  # of the last of these
        self._calendar: dict[int, list[Sequence]] = {}  # by number of steps: whom the next may have to visit
        self._ending: list[Sequence] = []  # those whose answer the step to be taken in ends
        self._stops = _Stops()

    def gather(self) -> None:
        """Whoever decodes gets a lane."""
        for sequence in list(self.others.values()):
            if sequence.decodes:
                del self.others[sequence.seat]
                self._enter(sequence)

    def scatter(self, running: Mapping[int, Sequence]) -> None:
        """Nobody has a lane any more."""
        if not self.seats:
            return
        for seat in self.seats[::-1]:
            self.leave(seat)
        self.others = dict(running)
        self._calendar.clear()

    def leave(self, seat: int) -> None:
        """Its sequence gives the seat up."""
        if self.others.pop(seat, None) is not None:
            return
        lane = self._lanes.pop(seat)
        self._settle(lane)
        self._stops.remove(self._sequences[lane])
        end = len(self.seats) - 1
        if lane < end:
            self._settle(end)  # the lane that it moves to has another's tokens
            self._lanes[self.seats[end]] = lane
        lists: list[list[Any]] = [self.seats, self.positions, self.last, self._sequences, self._settled, self._due]
        for facts in lists:
            facts[lane] = facts[end]
            del facts[end]

    def settle(self, seat: int) -> None:
        """Bring the tokens of its sequence up to date, whether it is here or not."""
        lane = self._lanes.get(seat)
        if lane is not None:
            self._settle(lane)

    def visits(self) -> Iterator[Sequence]:
        """Those who have filled their blocks, or whose answer ends with this step, settled; and some who come early.

        Each waits for its next visit from when the one after it is asked for.
        """
        self._ending.clear()
        for sequence in self._calendar.pop(self._steps, ()):
            lane = self._lanes.get(sequence.seat)
            if lane is None or self._sequences[lane] is not sequence or self._due[lane] != self._steps:
                continue  # it has left since then
            self._settle(lane)
            if len(sequence.tokens) + 1 == sequence.limit:
                self._ending.append(sequence)
            yield sequence
            if sequence.seat >= 0:
                self._wait(sequence, self._lanes[sequence.seat], self._steps + 1)

    def take(self, result: StepResult) -> dict[int, FinishReason]:
        """Take in a token for each lane: the first of the result. The lanes whose answers end with it, and why."""
        self.last = list(result.tokens[: len(self.seats)])
        self.positions = [position + 1 for position in self.positions]
        self._steps += 1
        self._tokens.append(self.last)
        del self._tokens[:-_REMEMBERED]
        if result.logprobs is not None:
            for sequence, logprob in zip(self._sequences, result.logprobs, strict=False):
                if logprob is not None:
                    sequence.add_logprob(logprob)
        ended: dict[int, FinishReason] = {
            self._lanes[one.seat]: "length" for one in self._ending if one.seat in self._lanes
        }
        ended |= dict.fromkeys(self._stops.by_ids(self.last, self._sequences), "stop")
        for seat, check in self._stops.checks.items():
            lane = self._lanes[seat]
            if ended.get(lane) != "stop" and check(self.last[lane]):
                ended[lane] = "stop"
        return ended | {row: "stop" for row in result.ended if row < len(self.seats)}

    def known(self, sequence: Sequence) -> list[int]:
        """Its tokens, up to date, whether it is here or not; it stays as it is."""
        lane = self._lanes.get(sequence.seat)
        if lane is None:
            return sequence.tokens
        missing = self._steps - self._settled[lane]
        return sequence.tokens + [tokens[lane] for tokens in self._tokens[len(self._tokens) - missing :]]

    def check_integrity(self, running: Mapping[int, Sequence]) -> None:
        """Assert that what is here is what these running sequences are."""
        assert running.keys() == self._lanes.keys() ^ self.others.keys(), "somebody has two places, or none"
        assert all(running[seat] is sequence for seat, sequence in self.others.items()), "in another's place"
        assert len(self._lanes) == len(self.seats) == len(self._due), "lanes lost or doubled"
        for lane, (seat, sequence) in enumerate(zip(self.seats, self._sequences, strict=True)):
            assert running.get(seat) is sequence and self._lanes[seat] == lane, "in another's lane"
            known = self.known(sequence)
            assert sequence.decodes and self.positions[lane] == len(known) - 1, "at another position"
            assert self.last[lane] == known[-1], "another last token"
            assert self._steps - self._settled[lane] <= len(self._tokens), "tokens forgotten"
            assert sequence in self._calendar[self._due[lane]], "nobody will visit it"
            end = self.positions[lane] + self._due[lane] - self._steps
            assert end <= max(self.positions[lane], len(sequence.blocks) * self._block_size), "beyond its blocks"
        self._stops.check_integrity(self._sequences)

    def _enter(self, sequence: Sequence) -> None:
        self._lanes[sequence.seat] = len(self.seats)
        self.seats.append(sequence.seat)
        self.positions.append(len(sequence.tokens) - 1)
        self.last.append(sequence.tokens[-1])
        self._sequences.append(sequence)
        self._settled.append(self._steps)
        self._due.append(self._steps)
        self._stops.add(sequence)
        self._wait(sequence, len(self.seats) - 1, self._steps)

    def _settle(self, lane: int) -> None:
        missing = self._steps - self._settled[lane]
        if missing:
            self._sequences[lane].tokens.extend(map(itemgetter(lane), self._tokens[-missing:]))
            self._settled[lane] = self._steps

    def _wait(self, sequence: Sequence, lane: int, earliest: int) -> None:
        """Until the step that has no slot for its last known token, or that ends its answer."""
        end = min(len(sequence.blocks) * self._block_size, sequence.limit - 2)
        due = max(earliest, self._steps + min(end - self.positions[lane], _REMEMBERED))
        self._due[lane] = due
        self._calendar.setdefault(due, []).append(sequence)


class _Stops:
    """What ends the answers of some sequences."""

    def __init__(self) -> None:
        self.checks: dict[int, StopCheck] = {}  # by seat
        self._sets: Counter[frozenset[int]] = Counter()  # stop ids; mostly one set, which all share
        self._ids: set[int] = set()  # all of these, and some of `_stale` sets that have left
        self._stale = 0

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        if request.stop_check is not None:
            self.checks[sequence.seat] = request.stop_check
        self._sets[request.stop_ids] += 1
        if self._sets[request.stop_ids] == 1:
            self._ids.update(request.stop_ids)

    def remove(self, sequence: Sequence) -> None:
        self.checks.pop(sequence.seat, None)
        stop_ids = sequence.request.stop_ids
        self._sets[stop_ids] -= 1
        if not self._sets[stop_ids]:
            del self._sets[stop_ids]
            self._stale += 1
            if self._stale > len(self._sets):
                self._ids = set().union(*self._sets)
                self._stale = 0

    def by_ids(self, tokens: Items[int], sequences: Items[Sequence]) -> set[int]:
        """The places of those whose token is a stop id of theirs."""
        ids = self._ids
        found = [place for place, token in enumerate(tokens) if token in ids]
        return {place for place in found if tokens[place] in sequences[place].request.stop_ids}

    def check_integrity(self, sequences: Items[Sequence]) -> None:
        """Assert that it is of these."""
        assert self._sets == Counter(sequence.request.stop_ids for sequence in sequences), "another's stop ids"
        assert all(self._ids.issuperset(stop_ids) for stop_ids in self._sets), "stop ids forgotten"
        checks = {one.seat: one.request.stop_check for one in sequences if one.request.stop_check is not None}
        assert self.checks == checks, "another's stop check"
