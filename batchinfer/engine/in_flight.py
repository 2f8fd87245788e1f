"""Steps in flight: launched, their results still to come. A launched step is *assumed* to succeed.

With its launch the positions, lanes and computed counts of its sequences are those after the step, so that the next
step can be planned; the values of the sampled tokens come with its result. A sequence that ends with a step may thus be
in the steps after it: these rows are surplus, and are dropped.

State: per step in flight the sequences that its result is about, in the order of its rows. Owner: the scheduler. Flow:
`launch` a planned step → `collect` its result, oldest first → `Outcome`, by which the scheduler ends sequences.
Failure: `discard` forgets all steps; the scheduler then preempts all sequences, which ends what was assumed of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from batchinfer.engine.decode_lanes import DecodeLanes
from batchinfer.engine.lane_rows import LaneRows
from batchinfer.engine.plan import StepResult
from batchinfer.engine.plan_builder import PlanBuilder
from batchinfer.engine.prompt_lookup import Speculation
from batchinfer.engine.sequence import Sequence
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import RowError
from batchinfer.request import FinishReason

Failure = str | RowError


class StepInFlight:
    """The sequences of one launched step.

    sampling: the sequence of each row, decode lanes first, up to the rows of drafts. rows: those of the lanes. chunks:
    sequences with a chunk or a draft. starting: (row, sequence) of first output tokens. drafted: (first row, sequence,
    draft). read_whole: sequences that end with the step, because nothing is left to read and nothing is generated.
    """

    __slots__ = ("chunks", "drafted", "num_tokens", "read_whole", "reads", "rows", "sampling", "starting")

    def __init__(self, sampling: list[Sequence], rows: LaneRows, builder: PlanBuilder) -> None:
        self.num_tokens = len(sampling) + len(builder.tokens)
        self.sampling = sampling
        self.rows = rows
        self.chunks = builder.sequences
        self.reads = builder.reads
        self.starting: list[tuple[int, Sequence]] = []
        self.drafted: list[tuple[int, Sequence, list[int]]] = []
        self.read_whole: list[Sequence] = []

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences of the step, each once."""
        return list(dict.fromkeys(self.sampling + self.chunks))


class Outcome:
    """The meaning of one result: what became of each sequence, beyond the tokens appended to it.

    A sequence in `failures` ends with this error, whatever `finished` says of it. failed: errors by row.
    """

    __slots__ = ("_result", "failed", "failures", "finished", "generated", "started")

    def __init__(self, result: StepResult) -> None:
        self.failed: dict[int, Failure] = dict(result.failed or {})
        self.failures: dict[Sequence, Failure] = {}
        self.finished: dict[Sequence, FinishReason] = {}
        self.started: list[int] = []  # ids of requests that got their first output token
        self.generated = 0  # tokens
        self._result = result

    def append_sampled(self, sequence: Sequence, row: int) -> bool:
        """Append the token sampled in a row, unless the row failed. Return True if the sequence ends."""
        self.generated += 1
        result = self._result
        if row in self.failed:
            self.failures[sequence] = self.failed[row]
            return True
        reason = sequence.append(result.tokens[row], None if result.logprobs is None else result.logprobs[row])
        if row in result.ended:
            reason = "stop"
        if reason is None:
            return False
        self.finished[sequence] = reason
        return True

    def append_drafted(self, sequence: Sequence, draft: list[int], row: int) -> int:
        """Append the token of a row, and of each next row while the tokens before it are those of the draft.

        Return how many tokens of the draft were right. The KV of the rest does not count: the next step overwrites it.
        """
        accepted = 0
        ended = self.append_sampled(sequence, row)
        while not ended and accepted < len(draft) and sequence.tokens[-1] == draft[accepted]:
            accepted += 1
            ended = self.append_sampled(sequence, row + accepted)
        return accepted


class StepsInFlight:
    """Launched steps, oldest first."""

    def __init__(self, lanes: DecodeLanes, speculation: Speculation, stats: EngineStats) -> None:
        self._lanes = lanes
        self._speculation = speculation
        self._stats = stats
        self._steps: deque[StepInFlight] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest(self) -> StepInFlight:
        return self._steps[0]

    @property
    def verify_drafts(self) -> bool:
        """True if a draft is in flight: how far its sequence gets is not known before the result."""
        return any(step.drafted for step in self._steps)

    def launch(self, builder: PlanBuilder) -> None:
        """Assume the planned step: sequences whose prompt ends take a lane, those whose answer ends give theirs up."""
        lanes = self._lanes
        step = StepInFlight(lanes.sequences.copy(), lanes.launch_step(), builder)
        self._steps.append(step)
        drafts = iter(builder.drafts)
        for sequence, count, samples in zip(builder.sequences, builder.counts, builder.samples, strict=True):
            row = len(step.sampling)
            if samples > 1:
                drafted = sum(1 + len(draft) for _, _, draft in step.drafted)
                step.drafted.append((row + drafted, sequence, next(drafts)))
                continue
            sequence.computed(count)
            if samples:
                if not sequence.num_output:
                    step.starting.append((row, sequence))
                step.sampling.append(sequence)
                lanes.enter_lane(sequence, row)
            elif sequence.num_computed == sequence.limit:
                lanes.remove(sequence.seat)
                step.read_whole.append(sequence)

    def collect(self, result: StepResult) -> Outcome:
        """Append tokens and readings of the oldest step to its sequences, except to those that ended before it."""
        step = self._steps.popleft()
        outcome = Outcome(result)
        if step.reads:
            _append_readings(step, result, outcome)
        failed = outcome.failed
        outcome.started += [one.request.request_id for row, one in step.starting if one.seat >= 0 and row not in failed]
        self._append_to_lanes(step, result, outcome)
        for row, sequence in step.rows.apart:
            if sequence.seat >= 0:
                outcome.append_sampled(sequence, row)
        for row, sequence, draft in step.drafted:
            if sequence.seat >= 0:
                self._append_drafted(sequence, draft, row, outcome)
        for sequence in step.read_whole:
            if sequence.seat >= 0:
                outcome.finished[sequence] = "length"
        for sequence in step.chunks:
            sequence.proven = True
        self._stats.generated_tokens += outcome.generated
        return outcome

    def discard(self) -> None:
        """Forget all steps. What was assumed of their sequences is wrong now."""
        self._steps.clear()
        self._lanes.discard_steps()

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Assert that the sequences without lane and prompt are those that end with a step in flight."""
        ending = {one for one in running if not self._lanes.has_place(one)}
        leaving = {one for step in self._steps for one in (*step.read_whole, *(one for _, one in step.rows.apart))}
        assert ending == {one for one in leaving if one.seat >= 0}, "a sequence is in no step"

    def _append_to_lanes(self, step: StepInFlight, result: StepResult, outcome: Outcome) -> None:
        lanes, sampling = self._lanes, step.sampling
        for sequence in lanes.append_tokens(result):
            outcome.finished[sequence] = "stop"
        outcome.generated += step.rows.num_rows
        for row in result.ended:
            if row < len(sampling) and lanes.has_lane(sampling[row]):
                outcome.finished[sampling[row]] = "stop"
        for row, failure in outcome.failed.items():
            if row < len(sampling) and lanes.has_lane(sampling[row]):
                lanes.drop_last_token(sampling[row])  # the token of a failed row is meaningless
                outcome.failures[sampling[row]] = failure

    def _append_drafted(self, sequence: Sequence, draft: list[int], row: int, outcome: Outcome) -> None:
        accepted = outcome.append_drafted(sequence, draft, row)
        self._stats.draft_tokens += len(draft)
        self._stats.accepted_tokens += accepted
        self._speculation.judge_draft(sequence.seat, len(draft), accepted, len(sequence.tokens))


def _append_readings(step: StepInFlight, result: StepResult, outcome: Outcome) -> None:
    """Append what was read of prompts. If a reading fails, so does the token that its sequence samples in this step."""
    rows = {sequence: row for row, sequence in enumerate(step.sampling)}
    for read, reading in zip(step.reads, result.readings, strict=True):
        sequence = step.chunks[read.place]
        if reading.failure is None:
            assert sequence.rows is not None
            sequence.rows.append_reading(reading, read.rows)
        elif sequence.seat >= 0:
            outcome.failures[sequence] = reading.failure
            if sequence in rows:
                outcome.failed[rows[sequence]] = reading.failure
