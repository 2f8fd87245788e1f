"""The block pool: which KV blocks are free, shared, or kept because a later prompt may begin the same way.

State: every block is either held (`refs` > 0) or on the free list. A free block may still be indexed: its content is
found by prefix until the block is allocated for another content. The free list is in order of eviction: unindexed
blocks first, then the least recently used. Owner: the scheduler. Flow: `allocate` → `index` when full → `release` →
found by prefix (`follow`, `acquire`) or evicted. Failure: after a failed step nothing indexed is trusted
(`forget_all`).

The prefix index is a trie in a dict: (uid of the parent block's content, the block's own tokens) → block. A uid names
one content for ever, so a hit is verified all the way to the root by dict equality on the tokens themselves; there is
no hash to trust. The root's uid is 0. A key is packed into bytes, because bytes cache their hash and Python's garbage
collector does not visit them. Of the blocks that follow one content, the last few are also remembered once they are
computed: a block that begins like one of them and then differs starts as a copy of it (copy-on-write).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from struct import Struct
from sys import byteorder

ROOT = 0
_REMEMBERED = 8  # blocks that follow one content: the newest, because rows come in the order of their prefixes
_WORTH_COPYING = 4  # a block is copied, or waited for, if a fourth of its tokens match
_TOKENS_AT = 8  # bytes of a key before its tokens


class Block:
    """One block of KV cache. `uid` and `key` are set while it is indexed; `prev`/`next` while it is free.

    `follows` is the uid of the content before it if the block may be remembered for copies, or None.
    """

    __slots__ = ("follows", "index", "key", "next", "prev", "refs", "uid")

    def __init__(self, index: int) -> None:
        self.index = index
        self.refs = 0
        self.uid = ROOT
        self.key: bytes | None = None
        self.follows: int | None = None
        self.prev: Block | None = None
        self.next: Block | None = None

    def __repr__(self) -> str:
        return f"Block({self.index}, refs={self.refs}, uid={self.uid})"


class BlockPool:
    """Pool of KV blocks: allocation, reference counts, and lookup by prefix."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block(index) for index in range(num_blocks)]
        self.num_free = 0
        self._least_alike = -(-block_size // _WORTH_COPYING)
        self._key = Struct(f"=Q{block_size}I").pack
        self._index: dict[bytes, Block] = {}
        self._following: dict[int, list[Block]] = {}  # uid → computed blocks after it, newest last
        self._coming: dict[int, list[Block]] = {}  # uid → blocks after it that the step being planned computes
        self._last_uid = ROOT
        self._head = Block(-1)  # sentinel: head.next is evicted first, head.prev last
        self._head.prev = self._head.next = self._head
        for block in self.blocks:
            self._link(block, self._head)

    def allocate(self) -> Block:
        """Return the first block in order of eviction, unindexed. The caller has checked `num_free`."""
        block = self._head.next
        assert block is not None and block is not self._head, "no free block"
        self._unlink(block)
        if block.key is not None:
            self._forget(block)
        block.refs = 1
        return block

    def find(self, parent: int, tokens: Sequence[int]) -> Block | None:
        """Return the block that holds `tokens`, which fill it, after the content `parent`, or None."""
        return self._index.get(self._key(parent, *tokens))

    def follow(self, parent: int, tokens: Sequence[int], start: int, end: int) -> list[Block]:
        """Return the indexed blocks that hold `tokens[start:end]` after the content `parent`, up to the first miss."""
        found: list[Block] = []
        if not self.enable_prefix_caching:
            return found
        for first in range(start, end - self.block_size + 1, self.block_size):
            block = self.find(parent, tokens[first : first + self.block_size])
            if block is None:
                break
            found.append(block)
            parent = block.uid
        return found

    def find_beginning(self, parent: int, tokens: Sequence[int]) -> tuple[Block, int] | None:
        """Return the remembered block after `parent` with the longest common beginning with `tokens`, and its length.

        Return None if no remembered block has enough tokens in common.
        """
        return self._most_alike(self._following.get(parent), tokens)

    def better_is_coming(self, parent: int, tokens: Sequence[int]) -> bool:
        """Return True if the step being planned computes a block with a longer common beginning, by enough tokens."""
        coming = self._most_alike(self._coming.get(parent), tokens)
        if coming is None:
            return False
        there = self.find_beginning(parent, tokens)
        return there is None or coming[1] - there[1] >= self._least_alike

    def computed(self) -> None:
        """Remember the blocks indexed since the last call: the step that computes them has run."""
        for parent, blocks in self._coming.items():
            following = self._following.setdefault(parent, blocks)
            if following is not blocks:
                following += blocks
            del following[:-_REMEMBERED]
        self._coming.clear()

    def acquire(self, block: Block) -> None:
        """Add a holder to a block that `find` returned."""
        if block.refs == 0:
            self._unlink(block)
        block.refs += 1

    def release(self, blocks: Sequence[Block]) -> None:
        """Drop a holder of each block of a chain, tail first, so that a prefix is evicted after what follows it."""
        for block in reversed(blocks):
            block.refs -= 1
            if block.refs == 0:
                # an unindexed block cannot be found again: evict it first
                self._link(block, self._head if block.key is not None else self._head.next)

    def index(self, block: Block, parent: int, tokens: Sequence[int], remember: bool = True) -> int:
        """Index a full block. Return the uid of its content (that of an equal block, if one is indexed already).

        remember: keep it for copies, because other prompts may begin like it and then differ.
        """
        key = self._key(parent, *tokens)
        known = self._index.get(key)
        if known is not None:
            return known.uid
        self._last_uid += 1
        block.uid, block.key = self._last_uid, key
        self._index[key] = block
        if remember:
            block.follows = parent
            self._coming.setdefault(parent, []).append(block)
        return block.uid

    def forget(self, blocks: Iterable[Block]) -> None:
        """Take blocks out of the index, because their content is not to be trusted."""
        for block in blocks:
            if block.key is not None:
                self._forget(block)

    def forget_all(self) -> None:
        """Drop the whole index: after a failed step the content of blocks is unknown."""
        self.forget(list(self._index.values()))

    def check_integrity(self, tables: Iterable[Sequence[Block]]) -> None:
        """Assert that reference counts, free list and index agree with the block tables of all live sequences."""
        held: dict[int, int] = {}
        for table in tables:
            for block in table:
                held[block.index] = held.get(block.index, 0) + 1
        free = set()
        cursor = self._head.next
        while cursor is not None and cursor is not self._head:
            assert cursor.index not in free and cursor.refs == 0, f"{cursor} is twice free, or free and held"
            assert cursor.next is not None and cursor.next.prev is cursor, f"broken link at {cursor}"
            free.add(cursor.index)
            cursor = cursor.next
        assert len(free) == self.num_free, f"{len(free)} blocks on the free list, {self.num_free} counted"
        for block in self.blocks:
            assert block.refs == held.get(block.index, 0), f"{block} is held {held.get(block.index, 0)} times"
            assert (block.refs == 0) == (block.index in free), f"{block} is neither free nor held, or both"
            assert block.key is None or self._index.get(block.key) is block, f"{block} is indexed elsewhere"
        assert all(block.key == key for key, block in self._index.items()), "stale index entry"
        for parent, following in (*self._following.items(), *self._coming.items()):
            assert following, f"an empty memory of what follows {parent}"
            assert len(set(following)) == len(following), f"{following} after {parent}: one is remembered twice"
            for block in following:
                assert block.key is not None, f"{block} is remembered, and not indexed"
                assert block.follows == parent, f"{block} is remembered after another content"
                assert block.key.startswith(parent.to_bytes(_TOKENS_AT, byteorder)), (
                    f"{block} has another content's key"
                )
        assert all(len(following) <= _REMEMBERED for following in self._following.values()), "too many remembered"

    def _forget(self, block: Block) -> None:
        assert block.key is not None
        del self._index[block.key]
        block.key = None
        if block.follows is None:
            return
        for remembered in (self._following, self._coming):
            following = remembered.get(block.follows, [])
            if block in following:
                following.remove(block)
                if not following:
                    del remembered[block.follows]
        block.follows = None

    def _most_alike(self, blocks: Sequence[Block] | None, tokens: Sequence[int]) -> tuple[Block, int] | None:
        """Return the block of the last few with the longest common beginning with `tokens`, and its length, or None."""
        least = self._least_alike
        if blocks is None or len(tokens) < least:
            return None
        best, most = None, least - 1
        start = array("I", tokens[:least]).tobytes()
        for block in reversed(blocks[-_REMEMBERED:]):
            assert block.key is not None
            if block.key.startswith(start, _TOKENS_AT):
                alike = _common_length(memoryview(block.key)[_TOKENS_AT:].cast("I"), tokens)
                if alike > most:
                    best, most = block, alike
        return None if best is None else (best, most)

    def _link(self, block: Block, before: Block | None) -> None:
        assert before is not None and before.prev is not None
        block.prev, block.next = before.prev, before
        before.prev.next = block
        before.prev = block
        self.num_free += 1

    def _unlink(self, block: Block) -> None:
        assert block.prev is not None and block.next is not None
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = None
        self.num_free -= 1


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
