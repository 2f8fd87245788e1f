"""Decode lanes: struct-of-arrays state, so a step appends tokens to all decoding sequences without touching them.

A `Sequence` is a dozen objects; at thousands of sequences, a step that visits each of them waits for memory. A decoding
sequence therefore has a lane, an index into one list per fact: the tokens that a step samples, in the order of lanes,
are the next step's input tokens as they are.

State: the lists by lane, the tokens of the last steps, a calendar of visits, and the rows of each step in flight.
Owner: the scheduler. Flow: `visit_due` yields the sequences that need another block or end with this step, which is
known in advance; `launch_step` advances all lanes by a token that is still in flight; `enter_lane` gives a lane to a
sequence whose prompt ends with that step; `append_tokens` takes the oldest step's result; `settle` copies the tokens of
a lane to its sequence, when it is visited, streamed or removed. A sequence that verifies a draft leaves its lane for
that step, so that every lane computes one token. Failure: none here; a failed step preempts all sequences.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from operator import itemgetter

from batchinfer.engine.lane_rows import LaneRows
from batchinfer.engine.plan import IN_FLIGHT, StepResult
from batchinfer.engine.sequence import Sequence
from batchinfer.request import StopCheck

_HISTORY_STEPS = 64  # steps whose tokens are kept: a sequence is visited before it lacks more
_VISIT_STEPS = _HISTORY_STEPS - 4  # from visit to visit at most; at a visit, tokens of steps in flight are missing


class DecodeLanes:
    """Lists by lane, for the running sequences that compute one token per step; `prefilling` holds the others.

    When a sequence leaves, the last lane moves into the gap. Until it is settled, `tokens` of a sequence lacks the
    tokens of the last few steps.
    """

    def __init__(self, block_size: int) -> None:
        self.prefilling: dict[int, Sequence] = {}  # by seat, in order of admission; and sequences with a draft
        self.seats: list[int] = []
        self.positions: list[int] = []  # of the last token, which the next step computes
        self.last_tokens: list[int] = []  # IN_FLIGHT while the step that samples it is
        self.sequences: list[Sequence] = []
        self._settled_at: list[int] = []  # step count when the sequence's own tokens were complete
        self._visit_at: list[int] = []  # step count of the next visit
        self._lanes: dict[int, int] = {}  # by seat
        self._block_size = block_size
        self._rows: deque[LaneRows] = deque()  # of the steps in flight, oldest first
        self._steps = 0  # launched
        self._history: list[list[int]] = []  # tokens by lane, of the last steps whose results have come
        self._calendar: dict[int, list[Sequence]] = {}  # by step count: sequences that may be due, some out of date
        self._ending: list[Sequence] = []  # sequences that reach their limit with the step in progress
        self._stops = _StopConditions()

    @property
    def _collected(self) -> int:
        """Steps whose results have come."""
        return self._steps - len(self._rows)

    def admit_decoding(self) -> None:
        """Give a lane back to each sequence that left it for a draft. No step is in flight."""
        for sequence in list(self.prefilling.values()):
            if sequence.decodes:
                del self.prefilling[sequence.seat]
                self._enter(sequence, len(sequence.tokens) - 1, sequence.tokens[-1])

    def enter_lane(self, sequence: Sequence, row: int) -> None:
        """Give a lane to a sequence whose last known token the step launched last computes; `row` is its next token's.

        If the answer ends with that token, it gets no lane.
        """
        del self.prefilling[sequence.seat]
        if len(sequence.tokens) + 1 >= sequence.limit:
            self._rows[-1].apart.append((row, sequence))
            return
        self._rows[-1].enter_lane(row)
        self._enter(sequence, len(sequence.tokens), IN_FLIGHT)

    def leave_lane(self, sequence: Sequence) -> None:
        """Take the lane of a running sequence away until `admit_decoding`: it computes more than one token now."""
        self.remove(sequence.seat)
        self.prefilling[sequence.seat] = sequence

    def remove(self, seat: int) -> None:
        """Forget the sequence of a seat, with its tokens up to date. What is in flight of it is surplus."""
        if self.prefilling.pop(seat, None) is None and seat in self._lanes:
            self._leave(seat, surplus=True)

    def has_lane(self, sequence: Sequence) -> bool:
        """Return True for a sequence in a lane."""
        return sequence.seat in self._lanes

    def has_place(self, sequence: Sequence) -> bool:
        """Return True for a sequence in a lane or in prefill: not all that it will compute is in flight."""
        return sequence.seat in self._lanes or sequence.seat in self.prefilling

    def settle(self, seat: int) -> None:
        """Bring the tokens of the sequence of a seat up to date; nothing to do for a seat without a lane."""
        lane = self._lanes.get(seat)
        if lane is not None:
            self._settle_lane(lane)

    def settle_all(self) -> list[Sequence]:
        """Return the sequences in the order of lanes, with their tokens up to date."""
        for lane in range(len(self.seats)):
            self._settle_lane(lane)
        return self.sequences.copy()

    def drop_last_token(self, sequence: Sequence) -> None:
        """Remove the token that the last result brought for a sequence in a lane."""
        self.settle(sequence.seat)
        del sequence.tokens[-1]

    def num_growing(self) -> int:
        """Return how many sequences need another block in the next step."""
        due = ((one, self._due_lane(one)) for one in self._calendar.get(self._steps, ()))
        return sum(lane is not None and self.positions[lane] >= len(one.blocks) * self._block_size for one, lane in due)

    def visit_due(self) -> Iterator[tuple[Sequence, int]]:
        """Yield the sequences whose blocks are full or that reach their limit with this step; some early.

        Each comes settled, with the number of its positions once the step is computed. The next visit of a sequence is
        planned when the sequence after it is asked for.
        """
        self._ending.clear()
        for sequence in self._calendar.pop(self._steps, ()):
            lane = self._due_lane(sequence)
            if lane is None:
                continue
            self._settle_lane(lane)
            end = self.positions[lane] + 1
            if end + 1 == sequence.limit:
                self._ending.append(sequence)
            yield sequence, end
            if sequence.seat >= 0:
                self._plan_visit(sequence, self._lanes[sequence.seat], self._steps + 1)

    def launch_step(self) -> LaneRows:
        """Advance each lane by a token that is in flight from now on. Return the rows of the lanes.

        Sequences whose answer ends with it leave their lanes: their rows stay apart.
        """
        rows = LaneRows(len(self.seats))
        self._rows.append(rows)
        self._steps += 1
        self.positions = [position + 1 for position in self.positions]
        self.last_tokens = [IN_FLIGHT] * len(self.seats)
        for sequence in self._ending:
            if sequence.seat in self._lanes:
                self._leave(sequence.seat, surplus=False)
        self._ending.clear()
        return rows

    def append_tokens(self, result: StepResult) -> list[Sequence]:
        """Append the result of the oldest step in flight to the lanes. Return the sequences that stop with it."""
        rows = self._rows.popleft()
        tokens = rows.pick(result.tokens, IN_FLIGHT)
        self._history.append(tokens)
        del self._history[:-_HISTORY_STEPS]
        if not self._rows:
            self.last_tokens = tokens
        if result.logprobs is not None:
            for sequence, logprob in zip(self.sequences, rows.pick(result.logprobs, None), strict=False):
                if logprob is not None:
                    sequence.add_logprob(logprob)
        stopped = self._stops.find_stop_ids(tokens, self.sequences)
        for seat, check in self._stops.checks.items():
            lane = self._lanes[seat]
            if lane not in stopped and rows.has_row(lane) and check(tokens[lane]):
                stopped.add(lane)
        return [self.sequences[lane] for lane in sorted(stopped)]

    def discard_steps(self) -> None:
        """Forget what is in flight. The sequences leave their lanes next: their positions are wrong now."""
        self._steps -= len(self._rows)
        self._rows.clear()

    def known_tokens(self, sequence: Sequence) -> list[int]:
        """Return the tokens of a running sequence, up to date, without settling it."""
        lane = self._lanes.get(sequence.seat)
        if lane is None:
            return sequence.tokens
        missing = max(0, self._collected - self._settled_at[lane])
        return sequence.tokens + [tokens[lane] for tokens in self._history[len(self._history) - missing :]]

    def num_computed(self, sequence: Sequence) -> int:
        """Return how many positions of a running sequence are computed or in flight."""
        if not self.has_place(sequence):
            return sequence.limit - (sequence.request.max_tokens > 0)
        lane = self._lanes.get(sequence.seat)
        return sequence.num_computed if lane is None else self.positions[lane]

    def check_integrity(self, running: Mapping[int, Sequence]) -> None:
        """Assert that lanes and `prefilling` agree with the running sequences."""
        assert running.keys() >= self._lanes.keys() | self.prefilling.keys(), "a place without a sequence"
        assert not self._lanes.keys() & self.prefilling.keys(), "a sequence has two places"
        assert all(running[seat] is sequence for seat, sequence in self.prefilling.items()), "in another's place"
        assert len(self._lanes) == len(self.seats) == len(self._visit_at), "lanes lost or doubled"
        for lane, (seat, sequence) in enumerate(zip(self.seats, self.sequences, strict=True)):
            assert running.get(seat) is sequence and self._lanes[seat] == lane, "in another's lane"
            known = self.known_tokens(sequence)
            in_flight = sum(rows.has_row(lane) for rows in self._rows)
            assert sequence.decodes and self.positions[lane] == len(known) - 1 + in_flight, "at another position"
            assert self.last_tokens[lane] == (IN_FLIGHT if in_flight else known[-1]), "another last token"
            assert not self._rows or self._rows[-1].has_row(lane), "not in the last step"
            assert self._collected - self._settled_at[lane] <= len(self._history), "tokens forgotten"
            assert sequence in self._calendar[self._visit_at[lane]], "no visit is planned"
            end = self.positions[lane] + self._visit_at[lane] - self._steps
            assert end <= max(self.positions[lane], len(sequence.blocks) * self._block_size), "beyond its blocks"
        self._stops.check_integrity(self.sequences)

    def _enter(self, sequence: Sequence, position: int, last_token: int) -> None:
        sequence.decodes = True
        self._lanes[sequence.seat] = len(self.seats)
        self.seats.append(sequence.seat)
        self.positions.append(position)
        self.last_tokens.append(last_token)
        self.sequences.append(sequence)
        self._settled_at.append(self._steps - (last_token == IN_FLIGHT))
        self._visit_at.append(self._steps)
        self._stops.add(sequence)
        self._plan_visit(sequence, len(self.seats) - 1, self._steps)

    def _leave(self, seat: int, surplus: bool) -> None:
        """Take the lane of a seat away. Its rows in flight are surplus, or stay apart."""
        lane = self._lanes.pop(seat)
        self._settle_lane(lane)
        sequence = self.sequences[lane]
        self._stops.remove(sequence)
        end = len(self.seats) - 1
        for rows in self._rows:
            row = rows.leave_lane(lane, end)
            if row is not None and not surplus:
                rows.apart.append((row, sequence))
        if lane < end:
            self._settle_lane(end)  # the history of the lane that it moves to belongs to another sequence
            self._lanes[self.seats[end]] = lane
            self.seats[lane] = self.seats[end]
            self.positions[lane] = self.positions[end]
            self.last_tokens[lane] = self.last_tokens[end]
            self.sequences[lane] = self.sequences[end]
            self._settled_at[lane] = self._settled_at[end]
            self._visit_at[lane] = self._visit_at[end]
        del self.seats[end], self.positions[end], self.last_tokens[end]
        del self.sequences[end], self._settled_at[end], self._visit_at[end]

    def _settle_lane(self, lane: int) -> None:
        missing = self._collected - self._settled_at[lane]
        if missing > 0:
            self.sequences[lane].tokens.extend(map(itemgetter(lane), self._history[-missing:]))
            self._settled_at[lane] = self._collected

    def _due_lane(self, sequence: Sequence) -> int | None:
        """Return the lane of a sequence in the calendar of the next step, or None if it has left this lane since."""
        lane = self._lanes.get(sequence.seat)
        if lane is None or self.sequences[lane] is not sequence or self._visit_at[lane] != self._steps:
            return None
        return lane

    def _plan_visit(self, sequence: Sequence, lane: int, earliest: int) -> None:
        """Put the sequence into the calendar for the step that has no slot for its last token or ends its answer."""
        end = min(len(sequence.blocks) * self._block_size, sequence.limit - 2)
        due = max(earliest, self._steps + min(end - self.positions[lane], _VISIT_STEPS))
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
