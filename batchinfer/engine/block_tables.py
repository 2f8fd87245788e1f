"""Block tables of the running sequences: growth, prefix reuse, and the blocks that admission promised.

State: per sequence `blocks`, `chain`, `num_indexed` and `promised` (fields of `Sequence`), and the sum of all promises.
Owner: the scheduler; the pool below counts references and finds blocks by prefix. Flow: admission promises blocks,
growing takes promised blocks first, leaving returns blocks and promises. Failure: none here; the scheduler checks
`pool.num_free` before it allocates, and preempts.
"""

from __future__ import annotations

from collections.abc import Iterable

from batchinfer.engine.blocks import Block, BlockPool
from batchinfer.engine.sequence import Sequence


class BlockTables:
    """Blocks of sequences, taken from one pool."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self._promised = 0  # sum of `promised` over the running sequences

    @property
    def num_unpromised(self) -> int:
        """Free blocks that no running sequence was promised."""
        return self.pool.num_free - self._promised

    def promise_blocks(self, sequence: Sequence, count: int) -> None:
        """Set `count` blocks aside for a sequence that takes a seat."""
        sequence.promised = count
        self._promised += count

    def allocate_block(self, sequence: Sequence) -> None:
        """Append a free block to the table of `sequence`. The caller has checked `pool.num_free`."""
        sequence.blocks.append(self.pool.allocate())
        if sequence.promised:
            sequence.promised -= 1
            self._promised -= 1

    def release_blocks(self, sequence: Sequence) -> None:
        """Return the blocks and promises of a sequence that leaves its seat."""
        self.pool.release(sequence.blocks)
        self._promised -= sequence.promised

    def find_cached(self, sequence: Sequence) -> list[Block]:
        """Return the indexed blocks that continue `sequence`."""
        return self.pool.follow(sequence.chain, sequence.tokens, sequence.num_computed, sequence.reusable)

    def extend_with_cached(self, sequence: Sequence) -> int:
        """Append the cached blocks that continue `sequence` to its table. Return the number of tokens they hold."""
        cached = self.find_cached(sequence)
        for block in cached:
            self.pool.acquire(block)
            sequence.blocks.append(block)
            sequence.chain = block.uid
            if sequence.promised:
                sequence.promised -= 1
                self._promised -= 1
        sequence.num_indexed += len(cached)
        return len(cached) * self.pool.block_size

    def longer_prefix_is_coming(self, sequence: Sequence, cached: list[Block]) -> bool:
        """Return True if the step being planned computes a longer prefix of `sequence` than `cached` blocks hold."""
        parent, size = cached[-1].uid if cached else sequence.chain, self.pool.block_size
        tokens = sequence.next_block(sequence.num_computed + len(cached) * size, size)
        return self.pool.better_is_coming(parent, tokens)

    def index_full_blocks(self, sequence: Sequence, end: int) -> None:
        """Index the full blocks before position `end`: their tokens are computed, or will be in this step."""
        size = self.pool.block_size
        if end < (sequence.num_indexed + 1) * size or not self.pool.enable_prefix_caching:
            return
        for number in range(sequence.num_indexed, end // size):
            tokens = sequence.tokens[number * size : (number + 1) * size]
            prompt = number * size < sequence.num_prompt  # no other sequence begins with an answer and then differs
            sequence.chain = self.pool.index(sequence.blocks[number], sequence.chain, tokens, remember=prompt)
        sequence.num_indexed = end // size

    def reserve_draft_slots(self, sequence: Sequence, wanted: int) -> int:
        """Return how many slots, up to `wanted`, follow the known tokens. Allocates promised and unpromised blocks."""
        known, size = len(sequence.tokens), self.pool.block_size
        while len(sequence.blocks) * size < known + wanted:
            if self.pool.num_free <= (0 if sequence.promised else self._promised):
                break
            self.allocate_block(sequence)
        return min(wanted, len(sequence.blocks) * size - known)

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Assert that pool and promises agree with the running sequences."""
        sequences = list(running)
        self.pool.check_integrity(sequence.blocks for sequence in sequences)
        assert self._promised == sum(sequence.promised for sequence in sequences), "promises"
