"""The block pool's memory of what follows a content."""

from __future__ import annotations

from batchinfer.engine.blocks import ROOT, BlockPool


def test_the_newest_blocks_after_a_content_are_compared_in_their_step_and_after_it() -> None:
    pool = BlockPool(20, 4)
    blocks = [pool.allocate() for _ in range(12)]
    for number, block in enumerate(blocks):
        pool.index(block, ROOT, (number, number, number, 99))

    def compared(find: object) -> list[int]:
        assert callable(find)
        found = [find(ROOT, [number, number, number, 77]) for number in range(12)]
        assert all(alike == (0 if block is None else 3) for block, alike in found)
        assert all(block in (None, blocks[number]) for number, (block, _) in enumerate(found))
        return [number for number, (block, _) in enumerate(found) if block is not None]

    assert compared(pool.find_coming) == list(range(4, 12)) and compared(pool.find_beginning) == []
    pool.forget([blocks[10]])
    assert compared(pool.find_coming) == [3, 4, 5, 6, 7, 8, 9, 11]
    pool.computed()
    assert compared(pool.find_coming) == [] and compared(pool.find_beginning) == [3, 4, 5, 6, 7, 8, 9, 11]
    pool.index(pool.allocate(), ROOT, (50, 50, 50, 99))
    pool.computed()
    assert compared(pool.find_beginning) == [4, 5, 6, 7, 8, 9, 11]
    pool.forget_all()
    assert compared(pool.find_beginning) == []
    pool.check_integrity([[block] for block in pool.blocks if block.refs])
