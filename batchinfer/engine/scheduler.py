"""The scheduler: which tokens of which sequences the next step computes, and what a step's result means.

State it owns: the waiting queue, the running sequences (in order of admission), free seats, every sequence's progress,
and through `BlockPool` the blocks. Data flow: `add` → waiting → (`schedule` admits) running → (`update` ends) finished.
`schedule` and `update` alternate. On failure: no free block → the newest running sequence is preempted and computed
again later; a sequence that does not fit alone → its error; a failed step → `fail` looks for the sequence at fault.
"""

from __future__ import annotations

from collections import deque

from batchinfer.engine.blocks import Block, BlockPool
from batchinfer.engine.decode_lanes import Decoding
from batchinfer.engine.length_estimator import OutputLengthEstimator
from batchinfer.engine.plan import Copy, Join, PromptRead, StepPlan, StepResult
from batchinfer.engine.plan_builder import PlanBuilder
from batchinfer.engine.prompt_lookup import MAX_ROWS, Speculation
from batchinfer.engine.sequence import Sequence
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import EngineFailure, RowError, TooLong
from batchinfer.request import Finished, FinishReason, Request


class Scheduler:
    """Continuous batching over a block pool, in pure Python.

    max_num_seqs: seats. max_step_tokens: tokens of one step (at least one per seat, so that no sequence starves).
    speculative_tokens: of a draft.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_step_tokens: int, speculative_tokens: int = 0) -> None:
        self.pool = pool
        self.max_step_tokens = max(max_step_tokens, max_num_seqs)
        self.stats = EngineStats()
        self.expected = OutputLengthEstimator()
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}  # by seat, in order of admission
        self._max_num_seqs = max_num_seqs
        self._careful = max_num_seqs  # how many may run: below max_num_seqs while a failing sequence is looked for
        self._seats = list(range(max_num_seqs - 1, -1, -1))
        self._promised = 0  # sum of `promised` over the running sequences
        self._queued_tokens = 0  # known tokens of the waiting sequences
        self._speculation = Speculation(speculative_tokens)
        self._decoding = Decoding(pool.block_size)
        self._making = PlanBuilder([])
        self._finished: list[Finished] = []

    def add(self, request: Request) -> None:
        """Queue a request. Raises TooLong if its prompt and one token more (if any) cannot fit the whole cache."""
        capacity = len(self.pool.blocks) * self.pool.block_size
        sequence = Sequence(request)
        if min(len(sequence.tokens) + 1, sequence.limit) > capacity:
            raise TooLong(
                f"the prompt has {len(request.prompt)} tokens and the KV cache {capacity}: raise engine.kv_cache_tokens"
            )
        self.waiting.append(sequence)
        self._queued_tokens += len(sequence.tokens)

    def abort(self, request_id: int) -> bool:
        """Forget a request wherever it is; False if it is not here. Call between steps."""
        for sequence in self.running.values():
            if sequence.request.request_id == request_id:
                self._leave(sequence, sound=True)
                return True
        for sequence in self.waiting:
            if sequence.request.request_id == request_id:
                self.waiting.remove(sequence)
                self._queued_tokens -= len(sequence.tokens)
                return True
        return False

    @property
    def wants_more(self) -> bool:
        """Whether the next step may seat more than what waits, which has free seats and does not yet fill the cache."""
        capacity = len(self.pool.blocks) * self.pool.block_size
        return len(self.waiting) < len(self._seats) and self._queued_tokens < capacity

    def settle(self, sequence: Sequence) -> None:
        """Bring the tokens of a running sequence up to date: else they may lack the last few."""
        self._decoding.settle(sequence.seat)

    def take_finished(self) -> list[Finished]:
        """What ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    # -- one step -----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide the next step. An empty plan means that nothing can run."""
        if self._speculation.most and len(self.running) < MAX_ROWS:  # each may get a draft
            self._decoding.scatter(self.running)
        else:
            self._decoding.gather()
        making = self._making = PlanBuilder(self._decoding.seats)
        budget = self.max_step_tokens - len(self._decoding.seats)
        preemptions = self.stats.preemptions
        for sequence in self._decoding.visits():
            self._visit(sequence, making)
        for sequence in list(self._decoding.others.values()):
            if sequence.seat >= 0 and budget > 0:
                budget -= self._advance(sequence, budget, making)
        if self.stats.preemptions > preemptions:
            making.grown = [grown for grown in making.grown if grown.seat in self.running]
        self._admit(budget, making)
        if making.num_tokens < MAX_ROWS:
            self._speculate(making)
        self.stats.steps += making.num_tokens > 0
        return making.plan(self.stats.steps, self._decoding)

    def update(self, result: StepResult) -> None:
        """Take in the result of the plan that `schedule` returned last."""
        making = self._making
        self.pool.computed()
        failed = dict(result.failed or {})
        if making.reads:
            self._take_readings(making, result, failed)
        self._take_decoded(making.decoding, result, failed)
        drafts = iter(making.drafts)
        row = len(making.decoding)
        for sequence, count, samples in zip(making.sequences, making.counts, making.samples, strict=True):
            sequence.proven = True
            if samples > 1:
                self._take_drafted(sequence, next(drafts), row, result, failed)
            elif samples:
                self._take_sampled(sequence, row, result, failed)
            else:
                sequence.computed(count)
                if sequence.num_computed == sequence.limit and sequence.seat >= 0:
                    self._finish(sequence, "length")
            row += samples
        self.stats.generated_tokens += row
        self._careful = min(self._max_num_seqs, self._careful * 2)

    def _take_decoded(self, seats: list[int], result: StepResult, failed: dict[int, str | RowError]) -> None:
        """Take in the first rows of the result: one for each of these seats, by lane."""
        ended = self._decoding.take(result)
        for row in sorted({*ended, *(row for row in failed if row < len(seats))}):
            sequence = self.running[seats[row]]
            if row in failed:
                self.settle(sequence)
                del sequence.tokens[-1]  # which has no meaning
                self._fail_row(sequence, failed[row])
            else:
                self._finish(sequence, ended[row])

    def _take_sampled(
        self, sequence: Sequence, row: int, result: StepResult, failed: dict[int, str | RowError]
    ) -> bool:
        """Take in what was sampled in a row of the result; whether the sequence ended with it."""
        failure = failed.get(row) if failed else None
        if failure is not None:
            self._fail_row(sequence, failure)
            return True
        reason = sequence.append(result.tokens[row], None if result.logprobs is None else result.logprobs[row])
        if row in result.ended:
            reason = "stop"
        if reason is None:
            return False
        self._finish(sequence, reason)
        return True

    def _take_drafted(
        self, sequence: Sequence, draft: list[int], row: int, result: StepResult, failed: dict[int, str | RowError]
    ) -> None:
        """Take in a row, and each next one while the tokens before it are the draft's.

        What was computed for the rest of the draft does not count: the next step writes over it.
        """
        seat = sequence.seat
        accepted = 0
        ended = self._take_sampled(sequence, row, result, failed)
        while not ended and accepted < len(draft) and sequence.tokens[-1] == draft[accepted]:
            accepted += 1
            ended = self._take_sampled(sequence, row + accepted, result, failed)
        self.stats.draft_tokens += len(draft)
        self.stats.accepted_tokens += accepted
        self.stats.generated_tokens -= len(draft) - accepted  # `update` counts all rows
        self._speculation.judge(seat, len(draft), accepted, len(sequence.tokens))

    def _take_readings(self, making: PlanBuilder, result: StepResult, failed: dict[int, str | RowError]) -> None:
        """What was read of prompts, to their sequences. Those whose reading is not sound end.

        Those that sample in this step as well are put with the `failed` samples, and end as these do.
        """
        for read, reading in zip(making.reads, result.readings, strict=True):
            sequence = making.sequences[read.place]
            if reading.failure is None:
                assert sequence.rows is not None
                sequence.rows.take(reading, read.rows)
            elif making.samples[read.place]:
                failed[len(making.decoding) + sum(making.samples[: read.place])] = reading.failure
            else:
                self._fail_row(sequence, reading.failure)

    def _fail_row(self, sequence: Sequence, failure: str | RowError) -> None:
        """End it with this error; nobody is to find what it computed."""
        self.pool.forget(sequence.blocks)
        self._finish(sequence, "error", failure if isinstance(failure, RowError) else EngineFailure(failure))

    def fail(self, reason: str) -> None:
        """The step of the last plan raised. Find out which sequence is at fault, and end only that one.

        All go back to the queue, those that have not yet been in a good step first, and half as many may run at once:
        the search halves the suspects until a sequence fails alone. Good steps widen the limit again.
        """
        scheduled = [self.running[seat] for seat in self._making.decoding] + self._making.sequences
        if len(scheduled) == 1:
            self._finish(scheduled[0], "error", EngineFailure(reason))
        suspects = [sequence for sequence in scheduled if not sequence.proven]
        self._careful = max(1, (len(suspects) or len(scheduled)) // 2)
        for sequence in sorted(self.running.values(), key=lambda sequence: sequence.proven)[::-1]:
            self._preempt(sequence)
        self.pool.forget_all()

    def check_integrity(self) -> None:
        """Assert that sequences, seats and blocks agree. Called after every step in tests."""
        self.pool.check_integrity(sequence.blocks for sequence in self.running.values())
        assert all(sequence.seat == seat for seat, sequence in self.running.items()), "a sequence sits elsewhere"
        seats = list(self.running)
        assert sorted(seats + self._seats) == list(range(self._max_num_seqs)), "seats lost or doubled"
        assert self._queued_tokens == sum(len(sequence.tokens) for sequence in self.waiting), "the queue is miscounted"
        assert self._promised == sum(sequence.promised for sequence in self.running.values()), "promises"
        self._decoding.check_integrity(self.running)
        for sequence in self.running.values():
            sequence.check_integrity(self._decoding.known(sequence), self.pool.block_size)
        assert all(not sequence.blocks and sequence.seat < 0 for sequence in self.waiting), "waiting with blocks"

    # -- growing ------------------------------------------------------------------------------------------------

    def _visit(self, sequence: Sequence, making: PlanBuilder) -> None:
        """Where one that decodes has filled its blocks: another one, and others may find what they hold."""
        known, first = len(sequence.tokens), len(sequence.blocks)
        if known > first * self.pool.block_size:
            self._index_full_blocks(sequence, known - 1)
            if self._grow(sequence, known):
                making.grow(sequence, first)

    def _advance(self, sequence: Sequence, budget: int, making: PlanBuilder) -> int:
        """Plan the next tokens of a running sequence; how many. Zero if it has to wait or had to leave."""
        if sequence.decodes:
            self._visit(sequence, making)
            if sequence.seat < 0:
                return 0
            making.add(sequence, len(sequence.tokens) - 1, 1, 1)
            making.tokens.append(sequence.tokens[-1])
            return 1
        size = self.pool.block_size
        start = sequence.num_computed
        known = len(sequence.tokens)
        first = len(sequence.blocks)
        beginning = None
        if known - start > 1 and start == first * size:
            start = self._extend_by_hits(sequence)
            beginning = self.pool.find_beginning(sequence.chain, sequence.next_block(start, size))
            start += beginning[1] if beginning else 0
        count = known - start
        if count > budget:
            # whole blocks only: at a block border the next chunk can be found in the cache
            count = (start + budget) // size * size - start
            if count <= 0:
                count = 0 if making.num_tokens else budget
        end = start + count
        if count and end > len(sequence.blocks) * size and not self._grow(sequence, end):
            return 0
        if beginning and count:
            source, tokens = beginning
            making.copies.append(Copy(source.index, sequence.blocks[start // size].index))
            self._reuse(sequence, tokens)
        making.grow(sequence, first)
        if count == 0:
            return 0
        self._index_full_blocks(sequence, end)  # now, so that a sequence later in the same step may share them
        making.add(sequence, start, count, int(end == known))
        making.tokens.extend(sequence.tokens[start:end])
        if start < sequence.num_prompt:
            self._read_prompt(sequence, end, making)
            self.stats.prompt_tokens_computed += min(end, sequence.num_prompt) - start
        return count

    def _read_prompt(self, sequence: Sequence, end: int, making: PlanBuilder) -> None:
        """This step computes positions of the prompt before `end`: read those that are wanted of them."""
        rows = sequence.rows
        if rows is None:
            return
        if rows.left and rows.at < end:
            making.reads.append(PromptRead(len(making.seats) - 1, rows.at, min(end, rows.end) - rows.at))
        making.samples[-1] &= len(sequence.tokens) < sequence.limit  # where nothing is generated the end is here

    def _grow(self, sequence: Sequence, end: int) -> bool:
        """Allocate blocks up to position `end`, preempting the newest. False if `sequence` itself had to leave."""
        while len(sequence.blocks) * self.pool.block_size < end:
            if self.pool.num_free == 0:
                victim = next(reversed(self.running.values()))
                if victim is sequence and len(self.running) == 1:
                    self._finish(sequence, "error", _does_not_fit(sequence, self.pool))
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False
                continue
            self._allocate(sequence)
        return True

    def _speculate(self, making: PlanBuilder) -> None:
        """Fill the step with drafts. They displace nothing: rows and blocks are those that nobody else needs now."""
        room = min(MAX_ROWS, self.max_step_tokens) - making.num_tokens
        for place, draft in self._speculation.propose(making, room):
            sequence = making.sequences[place]
            slots = self._slots(sequence, len(draft), making)
            if slots:
                making.add_draft(place, draft[:slots])

    def _slots(self, sequence: Sequence, wanted: int, making: PlanBuilder) -> int:
        """How many slots it has after its known tokens, up to `wanted`: takes blocks promised to it, or to nobody."""
        known, size, first = len(sequence.tokens), self.pool.block_size, len(sequence.blocks)
        while len(sequence.blocks) * size < known + wanted:
            if self.pool.num_free <= (0 if sequence.promised else self._promised):
                break
            self._allocate(sequence)
        making.grow(sequence, first)
        return min(wanted, len(sequence.blocks) * size - known)

    def _allocate(self, sequence: Sequence) -> None:
        sequence.blocks.append(self.pool.allocate())
        if sequence.promised:
            sequence.promised -= 1
            self._promised -= 1

    def _extend_by_hits(self, sequence: Sequence) -> int:
        """Take over cached blocks that continue this sequence; its new `num_computed`."""
        hits = self._hits(sequence)
        for block in hits:
            self.pool.acquire(block)
            sequence.blocks.append(block)
            sequence.chain = block.uid
            released = min(1, sequence.promised)
            sequence.promised -= released
            self._promised -= released
        sequence.num_indexed += len(hits)
        self._reuse(sequence, len(hits) * self.pool.block_size)
        return sequence.num_computed

    def _reuse(self, sequence: Sequence, tokens: int) -> None:
        """The next tokens of `sequence` need not be computed."""
        reused = min(tokens, max(0, sequence.num_prompt - sequence.num_computed))
        sequence.computed(tokens)
        self.stats.prompt_tokens_reused += reused
        if not sequence.num_output:  # what it finds again after a preemption, it had computed itself
            sequence.num_cached += reused

    def _better_next_step(self, sequence: Sequence, hits: list[Block]) -> bool:
        """Whether a full step computes what `sequence` then need not: more than there is of its block after `hits`."""
        if self._making.num_tokens < MAX_ROWS:
            return False
        parent, size = hits[-1].uid if hits else sequence.chain, self.pool.block_size
        tokens = sequence.next_block(sequence.num_computed + len(hits) * size, size)
        return self.pool.better_is_coming(parent, tokens)

    def _hits(self, sequence: Sequence) -> list[Block]:
        """Indexed blocks that continue `sequence`."""
        return self.pool.follow(sequence.chain, sequence.tokens, sequence.num_computed, sequence.reusable)

    def _index_full_blocks(self, sequence: Sequence, end: int) -> None:
        """Its tokens before `end` are computed, or will be in this step."""
        size = self.pool.block_size
        if end < (sequence.num_indexed + 1) * size or not self.pool.enable_prefix_caching:
            return
        for number in range(sequence.num_indexed, end // size):
            tokens = sequence.tokens[number * size : (number + 1) * size]
            prompt = number * size < sequence.num_prompt  # none begins as another's answer and then differs
            sequence.chain = self.pool.index(sequence.blocks[number], sequence.chain, tokens, remember=prompt)
        sequence.num_indexed = end // size

    # -- coming and going ---------------------------------------------------------------------------------------

    def _admit(self, budget: int, making: PlanBuilder) -> None:
        """Seat waiting sequences while tokens, seats and expected memory last."""
        while self.waiting and self._seats and budget > 0 and len(self.running) < self._careful:
            sequence = self.waiting[0]
            promised = self._blocks_needed(sequence)
            if promised is None:
                return
            self.waiting.popleft()
            self._queued_tokens -= len(sequence.tokens)
            sequence.seat = self._seats.pop()
            sequence.promised = promised
            self._promised += promised
            self.running[sequence.seat] = self._decoding.others[sequence.seat] = sequence
            making.joins.append(Join.of_request(sequence.seat, sequence.request, sequence.output))
            taken = self._advance(sequence, budget, making)
            if taken == 0:
                return
            budget -= taken

    def _blocks_needed(self, sequence: Sequence) -> int | None:
        """Blocks to promise to a waiting sequence; None if waiting for others, or for what they compute, can help."""
        available = self.pool.num_free - self._promised
        if self.running and available <= 0:
            return None
        size = self.pool.block_size
        hits = self._hits(sequence)
        left = sequence.limit - len(sequence.tokens)
        expected = max(min(1, left), min(left, self.expected.of(sequence.request) - sequence.num_output))
        needed = -(-(len(sequence.tokens) + expected) // size)
        fresh = needed - len(hits) + sum(block.refs == 0 for block in hits)
        if self.running and (fresh > available or self._better_next_step(sequence, hits)):
            return None
        return min(needed, len(self.pool.blocks))

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; what it computed stays in the cache for as long as memory allows."""
        self._leave(sequence, sound=True)
        sequence.proven = False
        self.waiting.appendleft(sequence)
        self._queued_tokens += len(sequence.tokens)
        self.stats.preemptions += 1

    def _finish(self, sequence: Sequence, reason: FinishReason, error: RowError | None = None) -> None:
        self._leave(sequence, sound=error is None)
        if error is None and sequence.request.max_tokens:
            self.expected.observe(sequence.num_output)
        rows = sequence.rows
        read = (None, None) if rows is None else (rows.logprobs, rows.hidden)
        cached = min(sequence.num_cached, sequence.num_prompt)
        answer = Finished(
            sequence.request, sequence.output, reason, sequence.logprobs, error, *read, cached_tokens=cached
        )
        self._finished.append(answer)

    def _leave(self, sequence: Sequence, sound: bool) -> None:
        """sound: others may find what it has computed."""
        self._decoding.leave(sequence.seat)
        if sound:
            self._index_full_blocks(sequence, sequence.num_computed)
        del self.running[sequence.seat]
        self.pool.release(sequence.blocks)
        self._promised -= sequence.promised
        self._seats.append(sequence.seat)
        self._speculation.forget(sequence.seat)
        sequence.leave()


def _does_not_fit(sequence: Sequence, pool: BlockPool) -> TooLong:
    return TooLong(
        f"prompt ({sequence.num_prompt} tokens) and answer (so far {sequence.num_output}) do not fit the KV "
        f"cache of {len(pool.blocks) * pool.block_size} tokens: raise engine.kv_cache_tokens or lower max_tokens"
    )
