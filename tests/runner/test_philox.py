from __future__ import annotations

import numpy as np
import pytest

from batchinfer.runner.philox import philox4x32, uniforms

# kat_vectors of Random123 (D. E. Shaw Research): counter, key, answer
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_philox_gives_the_published_vectors():
    counters, keys, answers = (
        np.array([words(text) for text in part], dtype=np.uint64).T for part in zip(*PUBLISHED, strict=True)
    )
    assert np.array_equal(philox4x32(counters, keys), answers)
    for column in range(len(PUBLISHED)):
        one = slice(column, column + 1)
        assert np.array_equal(philox4x32(counters[:, one], keys[:, one]), answers[:, one])


def test_uniforms_are_uniform_and_uncorrelated():
    keys = np.arange(400, dtype=np.uint64) << np.uint64(32) | np.uint64(7)
    table = np.array([uniforms(keys, np.full(400, position)) for position in range(500)])
    assert table.min() >= 0 and table.max() < 1
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 180  # chi-square with 99 degrees of freedom: 1e-6
    for shifted in (table[1:, :] * table[:-1, :], table[:, 1:] * table[:, :-1]):
        assert abs(shifted.mean() - 0.25) < 0.0025


@pytest.mark.parametrize("key", [0, 1, 2**32, 2**64 - 1])
def test_a_number_depends_on_key_and_position_alone(key):
    alone = uniforms(np.array([key], dtype=np.uint64), np.array([11]))
    among = uniforms(np.array([5, key, 9], dtype=np.uint64), np.array([11, 11, 2]))
    assert alone[0] == among[1]
    assert len({*among, *uniforms(np.array([key], dtype=np.uint64), np.array([12]))}) == 4
