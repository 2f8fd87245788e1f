"""Builder of a step's plan: what the scheduler has put into the next step so far, and the sequences it belongs to.

State: the parallel lists of a `StepPlan` for the sequences without a decode lane, and the sequences themselves; the
lanes are read when the plan is built. Owner: the scheduler, one builder per step.
"""

from __future__ import annotations

from batchinfer.engine.decode_lanes import DecodeLanes
from batchinfer.engine.plan import Copy, Grown, Join, PromptRead, StepPlan
from batchinfer.engine.sequence import Sequence


class PlanBuilder:
    """A plan under construction: first the decode lanes, one token each, then chunks of prompts and drafts.

    Until the plan is built sequences may leave their lanes. The lists are those of `StepPlan` for `sequences`, and
    places count from the first of these. `drafts` are in their order.
    """

    __slots__ = (
        "_lanes",
        "copies",
        "counts",
        "drafts",
        "grown",
        "joins",
        "reads",
        "samples",
        "seats",
        "sequences",
        "starts",
        "tokens",
    )

    def __init__(self, lanes: DecodeLanes) -> None:
        self._lanes = lanes
        self.sequences: list[Sequence] = []
        self.joins: list[Join] = []
        self.grown: list[Grown] = []
        self.seats: list[int] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.samples: list[int] = []
        self.tokens: list[int] = []
        self.reads: list[PromptRead] = []
        self.copies: list[Copy] = []
        self.drafts: list[list[int]] = []

    @property
    def num_tokens(self) -> int:
        return len(self._lanes.seats) + len(self.tokens)

    def add_join(self, sequence: Sequence) -> None:
        """Tell the runner that `sequence` has taken its seat."""
        self.joins.append(Join.of_request(sequence.seat, sequence.request, sequence.output))

    def add_blocks(self, sequence: Sequence, first: int) -> None:
        """Tell the runner about the blocks of `sequence` from number `first` on, if there are any."""
        if len(sequence.blocks) > first:
            added = tuple([block.index for block in sequence.blocks[first:]])
            self.grown.append(Grown(sequence.seat, first, added))

    def add_chunk(self, sequence: Sequence, start: int, tokens: list[int], samples: int) -> None:
        """Compute `tokens` from position `start` on, and sample at the last `samples` of them."""
        self.sequences.append(sequence)
        self.seats.append(sequence.seat)
        self.starts.append(start)
        self.counts.append(len(tokens))
        self.samples.append(samples)
        self.tokens.extend(tokens)

    def add_draft(self, sequence: Sequence, draft: list[int]) -> None:
        """Compute the last known token of a decoding sequence and a draft after it, and sample at each of them."""
        tokens = [sequence.tokens[-1], *draft]
        self.add_chunk(sequence, len(sequence.tokens) - 1, tokens, len(tokens))
        self.drafts.append(draft)

    def build_plan(self, step: int) -> StepPlan:
        """Return the plan, which begins with the decode lanes as they are now."""
        lanes = self._lanes
        ones = [1] * len(lanes.seats)
        return StepPlan(
            step=step,
            joins=tuple(self.joins),
            grown=tuple(self.grown),
            seats=lanes.seats + self.seats,
            starts=lanes.positions + self.starts,
            counts=ones + self.counts,
            samples=ones + self.samples,
            tokens=lanes.last_tokens + self.tokens,
            reads=tuple(read._replace(place=len(ones) + read.place) for read in self.reads),
            copies=tuple(self.copies),
        )
