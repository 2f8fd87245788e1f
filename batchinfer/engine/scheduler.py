"""The scheduler: which tokens of which sequences the next step computes, and what the result of a step means.

State: the waiting queue, the running sequences (in order of admission), free seats, every sequence's progress, and
through `BlockTables` the blocks. Owner: the engine's thread; nobody else writes to a sequence.
Flow: `add` → waiting → (`schedule` admits) running → (`update` ends) finished. A planned step is in flight until
`update`; `schedule_ahead` plans the next one meanwhile. A running sequence is either in prefill or has a decode lane
(`DecodeLanes`), so that a step appends the tokens of all decoding sequences without touching them; a sequence that
verifies a draft gives its lane up for that step.
Failure: no free block → the newest running sequence is preempted and computed again later; a sequence that does not fit
alone → its error; a failed step → `fail` bisects for the sequence at fault; out of memory → `shrink`.
"""

from __future__ import annotations

from batchinfer.engine.block_tables import BlockTables
from batchinfer.engine.blocks import Block, BlockPool
from batchinfer.engine.decode_lanes import DecodeLanes
from batchinfer.engine.in_flight import Failure, StepsInFlight
from batchinfer.engine.length_estimator import OutputLengthEstimator
from batchinfer.engine.plan import Copy, PromptRead, StepPlan, StepResult
from batchinfer.engine.plan_builder import PlanBuilder
from batchinfer.engine.prompt_lookup import Speculation
from batchinfer.engine.sequence import Sequence
from batchinfer.engine.stats import EngineStats
from batchinfer.engine.waiting_queue import WaitingQueue
from batchinfer.errors import EngineFailure, RowError, TooLong
from batchinfer.request import Finished, FinishReason, Request


class Scheduler:
    """Continuous batching over a block pool, in pure Python.

    max_num_seqs: seats. max_step_tokens: tokens of one step (at least one per seat, so that no sequence starves).
    speculative_tokens: of one draft. max_draft_rows: up to this many tokens a step takes about as long as with one
    token, because it is bound by reading the weights (a fact of the backend). Below it, drafts and prefixes that are
    computed twice cost nothing; a step with more tokens gets no drafts.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        max_step_tokens: int,
        speculative_tokens: int = 0,
        *,
        max_draft_rows: int,
    ) -> None:
        self.max_step_tokens = max(max_step_tokens, max_num_seqs)
        self.max_draft_rows = max_draft_rows
        self.stats = EngineStats()
        self.length_estimator = OutputLengthEstimator()
        self.waiting = WaitingQueue()
        self.running: dict[int, Sequence] = {}  # by seat, in order of admission
        self._max_num_seqs = max_num_seqs
        self._max_running = max_num_seqs  # fewer while `fail` bisects for a sequence at fault
        self._free_seats = list(range(max_num_seqs - 1, -1, -1))
        self._tables = BlockTables(pool)
        self._speculation = Speculation(speculative_tokens)
        self._lanes = DecodeLanes(pool.block_size)
        self._in_flight = StepsInFlight(self._lanes, self._speculation, self.stats)
        self._builder = PlanBuilder(self._lanes)
        self._finished: list[Finished] = []

    @property
    def pool(self) -> BlockPool:
        return self._tables.pool

    def add(self, request: Request) -> Sequence:
        """Queue a request and return its sequence.

        Raises TooLong if its prompt and one token more (if it generates any) cannot fit the whole cache.
        """
        capacity = len(self.pool.blocks) * self.pool.block_size
        sequence = Sequence(request)
        if min(len(sequence.tokens) + 1, sequence.limit) > capacity:
            raise TooLong(
                f"the prompt has {len(request.prompt)} tokens and the KV cache {capacity}: raise engine.kv_cache_tokens"
            )
        self.waiting.append(sequence)
        return sequence

    def abort(self, request_id: int) -> bool:
        """Forget a request wherever it is. Return False if it is not here. Call between steps."""
        for sequence in self.running.values():
            if sequence.request.request_id == request_id:
                self._leave(sequence, sound=True)
                return True
        return self.waiting.remove_request(request_id)

    @property
    def wants_more(self) -> bool:
        """True if the next step may seat more than is waiting: there are free seats, and free blocks for the queue."""
        capacity = len(self.pool.blocks) * self.pool.block_size
        return len(self.waiting) < len(self._free_seats) and self.waiting.num_tokens < capacity

    def settle(self, sequence: Sequence) -> None:
        """Bring the tokens of a sequence up to date: while it decodes they may lack the last few."""
        self._lanes.settle(sequence.seat)

    def take_finished(self) -> list[Finished]:
        """Return the requests that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    # -- one step -----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide the next step while none is in flight. An empty plan means that nothing can run."""
        assert not self._in_flight, "plan ahead, or collect first"
        self._lanes.admit_decoding()
        return self._plan_step()

    def schedule_ahead(self) -> StepPlan | None:
        """Decide the step after those in flight, or return None if it depends on their results or is empty.

        It does while `fail` bisects, while a draft is verified or one may be wanted, and if a sequence would have to be
        preempted, because its tokens are not all known.
        """
        if self._max_running < self._max_num_seqs or self._in_flight.verify_drafts or not self.running:
            return None
        if not self._fits_without_preemption() or self._may_draft():
            return None
        plan = self._plan_step()
        return plan if plan.seats else None

    def _plan_step(self) -> StepPlan:
        self.pool.computed()
        builder = self._builder = PlanBuilder(self._lanes)
        budget = self.max_step_tokens - len(self._lanes.seats)
        preemptions = self.stats.preemptions
        for sequence, end in self._lanes.visit_due():
            self._extend_decoding(sequence, end)
        for sequence in list(self._lanes.prefilling.values()):
            if sequence.seat >= 0 and budget > 0:
                budget -= self._advance(sequence, budget)
        if self.stats.preemptions > preemptions:
            builder.grown = [grown for grown in builder.grown if grown.seat in self.running]
        self._admit(budget)
        if builder.num_tokens < self.max_draft_rows and not self._in_flight:
            self._speculate()
        self.stats.steps += builder.num_tokens > 0
        plan = builder.build_plan(self.stats.steps)
        if plan.seats:
            self._in_flight.launch(builder)
        return plan

    def _fits_without_preemption(self) -> bool:
        """Return True if free blocks suffice for the next step, and for the prompts begun."""
        size = self.pool.block_size
        left = sum(-(-len(one.tokens) // size) - len(one.blocks) for one in self._lanes.prefilling.values())
        return left + self._lanes.num_growing() <= self.pool.num_free

    def _may_draft(self) -> bool:
        """Return True if the next step may have room for a draft, and the tokens known so far suggest one."""
        prefilling = self._lanes.prefilling.values()
        tokens = len(self._lanes.seats) + sum(len(one.tokens) - one.num_computed for one in prefilling)
        room = min(self.max_draft_rows, self.max_step_tokens) - tokens
        return room > 0 and self._speculation.may_draft(self._lanes)

    def update(self, result: StepResult) -> list[int]:
        """Apply the result of the oldest step in flight. Return ids of requests that got their first token."""
        outcome = self._in_flight.collect(result)
        for sequence, failure in outcome.failures.items():
            self._fail_row(sequence, failure)
        for sequence, reason in outcome.finished.items():
            if sequence.seat >= 0:
                self._finish(sequence, reason)
        self._max_running = min(self._max_num_seqs, self._max_running * 2)
        return outcome.started

    def _fail_row(self, sequence: Sequence, failure: Failure) -> None:
        """End a sequence with this error, and take its blocks out of the prefix index."""
        self.pool.forget(sequence.blocks)
        self._finish(sequence, "error", failure if isinstance(failure, RowError) else EngineFailure(failure))

    def fail(self, reason: str) -> None:
        """Bisect for the sequence that made the oldest step in flight raise, and end only that sequence.

        All sequences go back to the queue, first those that have not yet been in a good step, and half as many may run
        at once: the search halves the suspects until a sequence fails alone. Good steps widen the limit again.
        """
        scheduled = self._in_flight.oldest.sequences
        self._in_flight.discard()
        running = [sequence for sequence in scheduled if sequence.seat >= 0]  # others: a surplus row of the step
        if len(scheduled) == len(running) == 1:
            self._finish(scheduled[0], "error", EngineFailure(reason))
        suspects = [sequence for sequence in running if not sequence.proven]
        self._max_running = max(1, (len(suspects) or len(scheduled)) // 2)
        self._preempt_all()

    def shrink(self) -> bool:
        """Halve the tokens of a step, because the oldest step in flight did not fit the device's memory.

        All sequences go back to the queue; none is suspected. Return False if a step is as small as it can be.
        """
        least = max(self._max_num_seqs, self.pool.block_size)
        tokens = min(self.max_step_tokens, self._in_flight.oldest.num_tokens)
        self._in_flight.discard()
        self._preempt_all()
        shrinks = self.max_step_tokens > least
        self.max_step_tokens = max(least, tokens // 2)
        return shrinks

    def _preempt_all(self) -> None:
        """Send all sequences back to the queue, and trust no block: nothing of the steps in flight counts."""
        for sequence in sorted(self.running.values(), key=lambda sequence: sequence.proven)[::-1]:
            self._preempt(sequence)
        self.pool.forget_all()

    def check_integrity(self) -> None:
        """Assert that sequences, seats and blocks agree. Called after every step in tests."""
        self._tables.check_integrity(self.running.values())
        assert all(sequence.seat == seat for seat, sequence in self.running.items()), "a sequence sits elsewhere"
        seats = list(self.running)
        assert sorted(seats + self._free_seats) == list(range(self._max_num_seqs)), "seats lost or doubled"
        self.waiting.check_integrity()
        self._lanes.check_integrity(self.running)
        self._in_flight.check_integrity(self.running.values())
        for sequence in self.running.values():
            known, computed = self._lanes.known_tokens(sequence), self._lanes.num_computed(sequence)
            sequence.check_integrity(known, computed, self.pool.block_size)

    # -- growing ------------------------------------------------------------------------------------------------

    def _extend_decoding(self, sequence: Sequence, end: int) -> None:
        """Allocate the block of a decoding sequence up to position `end`, and index full ones for prefix reuse."""
        first = len(sequence.blocks)
        if end > first * self._tables.pool.block_size:
            self._tables.index_full_blocks(sequence, min(end - 1, len(sequence.tokens)))
            if self._grow(sequence, end):
                self._builder.add_blocks(sequence, first)

    def _advance(self, sequence: Sequence, budget: int) -> int:
        """Plan the next chunk of a sequence in prefill. Return its tokens: zero if it has to wait or had to leave."""
        builder, pool = self._builder, self._tables.pool
        size = pool.block_size
        start = sequence.num_computed
        known = len(sequence.tokens)
        first = len(sequence.blocks)
        beginning = None
        if known - start > 1 and start == first * size:
            self._reuse(sequence, self._tables.extend_with_cached(sequence))
            start = sequence.num_computed
            beginning = pool.find_beginning(sequence.chain, sequence.next_block(start, size))
            start += beginning[1] if beginning else 0
        count = known - start
        if count > budget:
            # whole blocks only: at a block border the next chunk can be found in the cache
            count = (start + budget) // size * size - start
            if count <= 0:
                count = 0 if builder.num_tokens else budget
        end = start + count
        if count and end > len(sequence.blocks) * size and not self._grow(sequence, end):
            return 0
        if beginning and count:
            source, tokens = beginning
            builder.copies.append(Copy(source.index, sequence.blocks[start // size].index))
            self._reuse(sequence, tokens)
        builder.add_blocks(sequence, first)
        if count == 0:
            return 0
        self._tables.index_full_blocks(sequence, end)  # now, so that a sequence later in the same step may share them
        builder.add_chunk(sequence, start, sequence.tokens[start:end], int(end == known))
        if start < sequence.num_prompt:
            self._read_prompt(sequence, end)
            self.stats.prompt_tokens_computed += min(end, sequence.num_prompt) - start
        return count

    def _read_prompt(self, sequence: Sequence, end: int) -> None:
        """Plan the reads of prompt positions before `end`, which this step computes."""
        builder, rows = self._builder, sequence.rows
        if rows is None:
            return
        if rows.left and rows.planned < end:
            builder.reads.append(PromptRead(len(builder.seats) - 1, rows.planned, min(end, rows.end) - rows.planned))
            rows.planned = min(end, rows.end)
        builder.samples[-1] &= len(sequence.tokens) < sequence.limit  # no sample if nothing is generated

    def _grow(self, sequence: Sequence, end: int) -> bool:
        """Allocate blocks up to position `end`, preempting the newest. Return False if `sequence` had to leave."""
        pool = self._tables.pool
        while len(sequence.blocks) * pool.block_size < end:
            if pool.num_free == 0:
                victim = next(reversed(self.running.values()))
                if victim is sequence and len(self.running) == 1:
                    self._finish(sequence, "error", _does_not_fit(sequence, pool))
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False
                continue
            self._tables.allocate_block(sequence)
        return True

    def _speculate(self) -> None:
        """Fill the step with drafts. Drafts displace nothing: they take rows and blocks that are free in this step."""
        builder = self._builder
        room = min(self.max_draft_rows, self.max_step_tokens) - builder.num_tokens
        for sequence, draft in self._speculation.propose_drafts(self._lanes, room):
            first = len(sequence.blocks)
            slots = self._tables.reserve_draft_slots(sequence, len(draft))
            builder.add_blocks(sequence, first)
            if slots:
                self._lanes.leave_lane(sequence)
                builder.add_draft(sequence, draft[:slots])

    def _reuse(self, sequence: Sequence, tokens: int) -> None:
        """Count the next tokens of `sequence` as computed: their KV was found in the cache."""
        reused = min(tokens, max(0, sequence.num_prompt - sequence.num_computed))
        sequence.computed(tokens)
        self.stats.prompt_tokens_reused += reused
        if not sequence.num_output:  # after a preemption it finds what it had computed itself
            sequence.num_cached += reused

    # -- coming and going ---------------------------------------------------------------------------------------

    def _admit(self, budget: int) -> None:
        """Seat waiting sequences while tokens, seats and expected memory last."""
        while self.waiting and self._free_seats and budget > 0 and len(self.running) < self._max_running:
            sequence = self.waiting.head
            needed = self._blocks_needed(sequence)
            if needed is None:
                return
            self.waiting.pop_head()
            sequence.seat = self._free_seats.pop()
            self._tables.promise_blocks(sequence, needed)
            self.running[sequence.seat] = self._lanes.prefilling[sequence.seat] = sequence
            self._builder.add_join(sequence)
            planned = self._advance(sequence, budget)
            if planned == 0:
                return
            budget -= planned

    def _blocks_needed(self, sequence: Sequence) -> int | None:
        """Return the blocks to promise to a waiting sequence, or None if it has to wait for running sequences."""
        available = self._tables.num_unpromised
        if self.running and available <= 0:
            return None
        cached = self._tables.find_cached(sequence)
        left = sequence.limit - len(sequence.tokens)
        expected = self.length_estimator.estimate(sequence.request) - sequence.num_output
        needed = -(-(len(sequence.tokens) + max(min(1, left), min(left, expected))) // self.pool.block_size)
        fresh = needed - len(cached) + sum(block.refs == 0 for block in cached)
        if self.running and (fresh > available or self._saves_prefill_by_waiting(sequence, cached)):
            return None
        return min(needed, len(self.pool.blocks))

    def _saves_prefill_by_waiting(self, sequence: Sequence, cached: list[Block]) -> bool:
        """Return True if this step already computes a longer shared prefix, so admission next step saves prefill."""
        full = self._builder.num_tokens >= self.max_draft_rows
        return full and self._tables.longer_prefix_is_coming(sequence, cached)

    def _preempt(self, sequence: Sequence) -> None:
        """Put a sequence back at the head of the queue; its blocks stay in the cache while memory allows."""
        assert not self._in_flight, "its tokens are not all known"
        self._leave(sequence, sound=True)
        sequence.proven = False
        self.waiting.push_front(sequence)
        self.stats.preemptions += 1

    def _finish(self, sequence: Sequence, reason: FinishReason, error: RowError | None = None) -> None:
        self._leave(sequence, sound=error is None)
        if error is None and sequence.request.max_tokens:
            self.length_estimator.observe(sequence.num_output)
        rows = sequence.rows
        read = (None, None) if rows is None else (rows.logprobs, rows.hidden)
        cached = min(sequence.num_cached, sequence.num_prompt)
        answer = Finished(
            sequence.request, sequence.output, reason, sequence.logprobs, error, *read, cached_tokens=cached
        )
        self._finished.append(answer)

    def _leave(self, sequence: Sequence, sound: bool) -> None:
        """Give the seat up. sound: the computed blocks may be found by other sequences."""
        self._lanes.remove(sequence.seat)
        if sound:
            self._tables.index_full_blocks(sequence, sequence.num_computed)
        del self.running[sequence.seat]
        self._tables.release_blocks(sequence)
        self._free_seats.append(sequence.seat)
        self._speculation.forget_seat(sequence.seat)
        sequence.leave_seat()


def _does_not_fit(sequence: Sequence, pool: BlockPool) -> TooLong:
    return TooLong(
        f"prompt ({sequence.num_prompt} tokens) and answer (so far {sequence.num_output}) do not fit the KV "
        f"cache of {len(pool.blocks) * pool.block_size} tokens: raise engine.kv_cache_tokens or lower max_tokens"
    )
