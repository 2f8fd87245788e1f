"""A plan in the making: what the scheduler has put into the next step so far, and whose it is."""

from __future__ import annotations

from batchinfer.engine.decode_lanes import Decoding
from batchinfer.engine.plan import Copy, Grown, Join, PromptRead, StepPlan
from batchinfer.engine.sequence import Sequence


class PlanBuilder:
    """`decoding` are the seats of those that decode, by lane: the plan begins with them. Until `plan` they may leave.

    Then lists as in `StepPlan`, and the sequences that they are about. `drafts` are in their order. Places count from
    the first of these sequences.
    """

    __slots__ = (
        "copies",
        "counts",
        "decoding",
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

    def __init__(self, decoding: list[int]) -> None:
        self.decoding = decoding
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
        return len(self.decoding) + len(self.tokens)

    def add(self, sequence: Sequence, start: int, count: int, samples: int) -> None:
        """Its tokens the caller adds to `tokens`."""
        self.sequences.append(sequence)
        self.seats.append(sequence.seat)
        self.starts.append(start)
        self.counts.append(count)
        self.samples.append(samples)

    def grow(self, sequence: Sequence, first: int) -> None:
        """Its blocks from number `first` on, if there are any, are new."""
        if len(sequence.blocks) > first:
            added = tuple([block.index for block in sequence.blocks[first:]])
            self.grown.append(Grown(sequence.seat, first, added))

    def add_draft(self, place: int, draft: list[int]) -> None:
        """The sequence at `place`, which computes its last known token, computes these after it and samples at each.

        In the order of places.
        """
        after = sum(self.counts[: place + 1])
        self.tokens[after:after] = draft
        self.counts[place] += len(draft)
        self.samples[place] += len(draft)
        self.drafts.append(draft)

    def plan(self, step: int, decoding: Decoding) -> StepPlan:
        seats = self.decoding = decoding.seats.copy()
        ones = [1] * len(seats)
        return StepPlan(
            step=step,
            joins=tuple(self.joins),
            grown=tuple(self.grown),
            seats=seats + self.seats,
            starts=decoding.positions + self.starts,
            counts=ones + self.counts,
            samples=ones + self.samples,
            tokens=decoding.last + self.tokens,
            reads=tuple(read._replace(place=len(seats) + read.place) for read in self.reads),
            copies=tuple(self.copies),
        )
