"""Tests of the sampling of large parameter tables (tests/sampling.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from tests import sampling


@dataclass(frozen=True)
class FakeItem:
    """Stand-in for a collected test, with the attributes that sampling reads."""

    function: str
    case: int
    marked: bool = True
    variant: str = field(default="")

    @property
    def nodeid(self) -> str:
        return f"tests/test_x.py::{self.function}[{self.variant}-{self.case}]"

    @property
    def callspec(self) -> SimpleNamespace:
        return SimpleNamespace(params={"n": self.case} | ({"variant": self.variant} if self.variant else {}))

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return pytest.mark.sampled([EDGE]).mark if self.marked and name == "sampled" else None


EDGE = 90
LARGE = [FakeItem("test_large", n) for n in range(EDGE + 1)]


def test_small_table_is_kept_whole():
    small = [FakeItem("test_small", n) for n in range(sampling.MOST)]
    assert sampling.sample(small) == set(small)


def test_table_without_the_mark_is_kept_whole():
    plain = [FakeItem("test_plain", n, marked=False) for n in range(99)]
    assert sampling.sample(plain) == set(plain)


def test_large_table_is_sampled_and_keeps_its_edge_cases():
    chosen = sampling.sample(LARGE)
    assert len(chosen) == sampling.MOST + 1 and LARGE[EDGE] in chosen


def test_each_backend_gets_its_own_sample():
    items = [FakeItem("test_op", n, variant=variant) for n in range(50) for variant in "ab"]
    chosen = sampling.sample(items)
    cases = {variant: {item.case for item in chosen if item.variant == variant} for variant in "ab"}
    assert len(cases["a"]) == len(cases["b"]) == sampling.MOST and cases["a"] != cases["b"]


def test_interpreted_kernels_get_a_small_sample_of_edges_and_others():
    items = [FakeItem("test_op", n, variant=sampling.INTERPRETED) for n in range(EDGE + 1)]
    assert len(sampling.sample(items)) == sampling.MOST_INTERPRETED


def test_sample_changes_only_with_the_version(monkeypatch: pytest.MonkeyPatch):
    chosen = sampling.sample(LARGE)
    assert sampling.sample(LARGE) == chosen
    monkeypatch.setattr(sampling, "__version__", "9.9.9")
    assert sampling.sample(LARGE) != chosen
