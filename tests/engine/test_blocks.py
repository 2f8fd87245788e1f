"""The block pool's memory of what follows a content."""

from __future__ import annotations

from batchinfer.engine.blocks import ROOT, BlockPool


def test_newest_blocks_after_a_content_are_compared_during_and_after_their_step() -> None:
    pool = BlockPool(20, 4)
    blocks = [pool.allocate() for _ in range(12)]
    for number, block in enumerate(blocks):
        pool.index(block, ROOT, (number, number, number, 99))

    def coming() -> list[int]:
        return [number for number in range(12) if pool.better_is_coming(ROOT, [number, number, number, 77])]

    def computed() -> list[int]:
        found = [pool.find_beginning(ROOT, [number, number, number, 77]) for number in range(12)]
        assert all(one is None or one == (blocks[number], 3) for number, one in enumerate(found))
        return [number for number, one in enumerate(found) if one is not None]

    assert coming() == list(range(4, 12)) and computed() == []
    pool.forget([blocks[10]])
    assert coming() == [3, 4, 5, 6, 7, 8, 9, 11]
    pool.computed()
    assert coming() == [] and computed() == [3, 4, 5, 6, 7, 8, 9, 11]
    pool.index(pool.allocate(), ROOT, (50, 50, 50, 99))
    pool.computed()
    assert computed() == [4, 5, 6, 7, 8, 9, 11]
    pool.forget_all()
    assert computed() == []
    pool.check_integrity([[block] for block in pool.blocks if block.refs])


def test_a_common_beginning_of_a_fourth_of_a_block_is_worth_a_copy_or_a_wait() -> None:
    pool = BlockPool(4, 8)
    there, coming = pool.allocate(), pool.allocate()
    pool.index(there, ROOT, [1, 2, 3, 4, 0, 0, 0, 0])
    pool.computed()
    assert pool.find_beginning(ROOT, [1, 2, 9]) == (there, 2)
    assert pool.find_beginning(ROOT, [1, 9, 3, 4]) is None and pool.find_beginning(ROOT, [1]) is None
    pool.index(coming, ROOT, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pool.better_is_coming(ROOT, [1, 2, 3, 4, 5, 6, 9])
    assert not pool.better_is_coming(ROOT, [1, 2, 3, 4, 5, 9])
    assert not pool.better_is_coming(there.uid, [1, 2, 3, 4, 5, 6, 9])


def test_a_block_indexed_without_remember_is_found_only_whole() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.index(block, ROOT, [1, 2, 3, 4], remember=False)
    assert not pool.better_is_coming(ROOT, [1, 2, 3])
    pool.computed()
    assert pool.find_beginning(ROOT, [1, 2, 3]) is None and pool.find(ROOT, [1, 2, 3, 4]) is block
    pool.check_integrity([[block]])
    pool.forget([block])
    assert pool.find(ROOT, [1, 2, 3, 4]) is None
