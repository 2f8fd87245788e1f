"""Decode lanes: struct-of-arrays state, so a step appends tokens to all decoding sequences without touching them.

A `Sequence` is a dozen objects; at thousands of sequences, a step that visits each of them waits for memory. A decoding
sequence therefore has a lane, an index into one list per fact: the tokens that a step samples, in the order of lanes,
are the next step's input tokens as they are.

State: the lists by lane, the tokens of the last steps, and a calendar of visits. Owner: the scheduler. Flow:
`admit_decoding` gives a lane to each sequence that has left prefill; `visit_due` yields the sequences that need another
block or end with this step, which is known in advance; `append_tokens` takes a step's result; `settle` copies the
tokens of a lane to its sequence, when it is visited, streamed or removed. A sequence that verifies a draft leaves its
lane for that step, so that every lane computes one token. Failure: none here; a failed step preempts all sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from operator import itemgetter

from batchinfer.engine.plan import StepResult
from batchinfer.engine.sequence import Sequence
from batchinfer.request import FinishReason, StopCheck

_HISTORY_STEPS = 64  # steps whose tokens are kept: a sequence is visited before it lacks more


class DecodeLanes:
    """Lists by lane, for the running sequences that compute one token per step; `prefilling` holds the others.

    When a sequence leaves, the last lane moves into the gap. Until it is settled, `tokens` of a sequence lacks the
    tokens of the last few steps.
    """

    def __init__(self, block_size: int) -> None:
        self.prefilling: dict[int, Sequence] = {}  # by seat, in order of admission; and sequences with a draft
        self.seats: list[int] = []
        self.positions: list[int] = []  # of the last known token, which the next step computes
        self.last_tokens: list[int] = []  # the last known tokens
        self._sequences: list[Sequence] = []
        self._settled_at: list[int] = []  # step count when the sequence's own tokens were complete
        self._visit_at: list[int] = []  # step count of the next visit
        self._lanes: dict[int, int] = {}  # by seat
        self._block_size = block_size
        self._steps = 0  # results appended
        self._history: list[list[int]] = []  # tokens by lane, of the last steps
        self._calendar: dict[int, list[Sequence]] = {}  # by step count: sequences that may be due, some out of date
        self._ending: list[Sequence] = []  # sequences that reach their limit with the step in progress
        self._stops = _StopConditions()

    def admit_decoding(self) -> None:
        """Give a lane to each sequence that decodes and has none."""
        for sequence in list(self.prefilling.values()):
            if sequence.decodes:
                del self.prefilling[sequence.seat]
                self._enter(sequence)

    def leave_lane(self, sequence: Sequence) -> None:
        """Take the lane of a running sequence away until `admit_decoding`: it computes more than one token now."""
        self.remove(sequence.seat)
        self.prefilling[sequence.seat] = sequence

    def remove(self, seat: int) -> None:
        """Forget the sequence of a seat, with its tokens up to date."""
        if self.prefilling.pop(seat, None) is not None:
            return
        lane = self._lanes.pop(seat)
        self._settle_lane(lane)
        self._stops.remove(self._sequences[lane])
        end = len(self.seats) - 1
        if lane < end:
            self._settle_lane(end)  # the history of the lane that it moves to belongs to another sequence
            self._lanes[self.seats[end]] = lane
            self.seats[lane] = self.seats[end]
            self.positions[lane] = self.positions[end]
            self.last_tokens[lane] = self.last_tokens[end]
            self._sequences[lane] = self._sequences[end]
            self._settled_at[lane] = self._settled_at[end]
            self._visit_at[lane] = self._visit_at[end]
        del self.seats[end], self.positions[end], self.last_tokens[end]
        del self._sequences[end], self._settled_at[end], self._visit_at[end]

    def settle(self, seat: int) -> None:
        """Bring the tokens of the sequence of a seat up to date; nothing to do for a seat without a lane."""
        lane = self._lanes.get(seat)
        if lane is not None:
            self._settle_lane(lane)

    def settle_all(self) -> list[Sequence]:
        """Return the sequences in the order of lanes, with their tokens up to date."""
        for lane in range(len(self.seats)):
            self._settle_lane(lane)
        return self._sequences.copy()

    def visit_due(self) -> Iterator[Sequence]:
        """Yield, settled, the sequences whose blocks are full or that reach their limit with this step; some early.

        The next visit of a sequence is planned when the sequence after it is asked for.
        """
        self._ending.clear()
        for sequence in self._calendar.pop(self._steps, ()):
            lane = self._lanes.get(sequence.seat)
            if lane is None or self._sequences[lane] is not sequence or self._visit_at[lane] != self._steps:
                continue  # out of date: the sequence has left this lane
            self._settle_lane(lane)
            if len(sequence.tokens) + 1 == sequence.limit:
                self._ending.append(sequence)
            yield sequence
            if sequence.seat >= 0:
                self._plan_visit(sequence, self._lanes[sequence.seat], self._steps + 1)

    def append_tokens(self, result: StepResult) -> dict[int, FinishReason]:
        """Append a token to each lane: the first rows of the result. Return the lanes that end with it, and why."""
        self.last_tokens = list(result.tokens[: len(self.seats)])
        self.positions = [position + 1 for position in self.positions]
        self._steps += 1
        self._history.append(self.last_tokens)
        del self._history[:-_HISTORY_STEPS]
        if result.logprobs is not None:
            for sequence, logprob in zip(self._sequences, result.logprobs, strict=False):
                if logprob is not None:
                    sequence.add_logprob(logprob)
        ended: dict[int, FinishReason] = {
            self._lanes[one.seat]: "length" for one in self._ending if one.seat in self._lanes
        }
        ended |= dict.fromkeys(self._stops.find_stop_ids(self.last_tokens, self._sequences), "stop")
        for seat, check in self._stops.checks.items():
            lane = self._lanes[seat]
            if ended.get(lane) != "stop" and check(self.last_tokens[lane]):
                ended[lane] = "stop"
        return ended | {row: "stop" for row in result.ended if row < len(self.seats)}

    def known_tokens(self, sequence: Sequence) -> list[int]:
        """Return the tokens of a running sequence, up to date, without settling it."""
        lane = self._lanes.get(sequence.seat)
        if lane is None:
            return sequence.tokens
        missing = self._steps - self._settled_at[lane]
        return sequence.tokens + [tokens[lane] for tokens in self._history[len(self._history) - missing :]]

    def check_integrity(self, running: Mapping[int, Sequence]) -> None:
        """Assert that lanes and `prefilling` agree with the running sequences."""
        assert running.keys() == self._lanes.keys() ^ self.prefilling.keys(), "a sequence has two places, or none"
        assert all(running[seat] is sequence for seat, sequence in self.prefilling.items()), "in another's place"
        assert len(self._lanes) == len(self.seats) == len(self._visit_at), "lanes lost or doubled"
        for lane, (seat, sequence) in enumerate(zip(self.seats, self._sequences, strict=True)):
            assert running.get(seat) is sequence and self._lanes[seat] == lane, "in another's lane"
            known = self.known_tokens(sequence)
            assert sequence.decodes and self.positions[lane] == len(known) - 1, "at another position"
            assert self.last_tokens[lane] == known[-1], "another last token"
            assert self._steps - self._settled_at[lane] <= len(self._history), "tokens forgotten"
            assert sequence in self._calendar[self._visit_at[lane]], "no visit is planned"
            end = self.positions[lane] + self._visit_at[lane] - self._steps
            assert end <= max(self.positions[lane], len(sequence.blocks) * self._block_size), "beyond its blocks"
        self._stops.check_integrity(self._sequences)

    def _enter(self, sequence: Sequence) -> None:
        self._lanes[sequence.seat] = len(self.seats)
        self.seats.append(sequence.seat)
        self.positions.append(len(sequence.tokens) - 1)
        self.last_tokens.append(sequence.tokens[-1])
        self._sequences.append(sequence)
        self._settled_at.append(self._steps)
        self._visit_at.append(self._steps)
        self._stops.add(sequence)
        self._plan_visit(sequence, len(self.seats) - 1, self._steps)

    def _settle_lane(self, lane: int) -> None:
        missing = self._steps - self._settled_at[lane]
        if missing:
            self._sequences[lane].tokens.extend(map(itemgetter(lane), self._history[-missing:]))
            self._settled_at[lane] = self._steps

    def _plan_visit(self, sequence: Sequence, lane: int, earliest: int) -> None:
        """Put the sequence into the calendar for the step that has no slot for its last token or ends its answer."""
        end = min(len(sequence.blocks) * self._block_size, sequence.limit - 2)
        due = max(earliest, self._steps + min(end - self.positions[lane], _HISTORY_STEPS))
        self._visit_at[lane] = due
        self._calendar.setdefault(due, []).append(sequence)


class _StopConditions:
    """Stop ids and stop checks of the sequences in lanes."""

    def __init__(self) -> None:
        self.checks: dict[int, StopCheck] = {}  # by seat
        self._sets: Counter[frozenset[int]] = Counter()  # stop ids; mostly one set, shared by all sequences
        self._ids: set[int] = set()  # union of the sets, and of `_stale` sets that have left
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

    def find_stop_ids(self, tokens: Items[int], sequences: Items[Sequence]) -> set[int]:
        """Return the lanes whose token is a stop id of their sequence."""
        ids = self._ids
        found = [lane for lane, token in enumerate(tokens) if token in ids]
        return {lane for lane in found if tokens[lane] in sequences[lane].request.stop_ids}

    def check_integrity(self, sequences: Items[Sequence]) -> None:
        """Assert that the conditions are those of `sequences`."""
        assert self._sets == Counter(sequence.request.stop_ids for sequence in sequences), "another's stop ids"
        assert all(self._ids.issuperset(stop_ids) for stop_ids in self._sets), "stop ids forgotten"
        checks = {one.seat: one.request.stop_check for one in sequences if one.request.stop_check is not None}
        assert self.checks == checks, "another's stop check"
