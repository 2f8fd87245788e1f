"""Sampling of large parameter tables (tests/sampling.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from tests import sampling


@dataclass(frozen=True)
class FakeItem:
    """What sampling reads of a collected test."""

    function: str
    case: int
    marks: tuple[str, ...] = ()
    backend: str = field(default="")

    @property
    def nodeid(self) -> str:
        return f"tests/test_x.py::{self.function}[{self.backend}-{self.case}]"

    @property
    def callspec(self) -> SimpleNamespace:
        return SimpleNamespace(params={"backend": self.backend} if self.backend else {"n": self.case})

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


LARGE = [*(FakeItem("test_large", n) for n in range(90)), FakeItem("test_large", 90, ("edge",))]


def test_small_tables_are_kept_whole():
    small = [FakeItem("test_small", n) for n in range(sampling.MOST)]
    assert sampling.sample(small) == set(small)


def test_large_tables_are_sampled_and_their_edge_cases_kept():
    chosen = sampling.sample(LARGE)
    assert len(chosen) == sampling.MOST + 1 and LARGE[-1] in chosen


def test_every_backend_gets_a_sample_of_its_own():
    items = [FakeItem("test_op", n, backend=backend) for n in range(50) for backend in "ab"]
    chosen = sampling.sample(items)
    cases = {backend: {item.case for item in chosen if item.backend == backend} for backend in "ab"}
    assert len(cases["a"]) == len(cases["b"]) == sampling.MOST and cases["a"] != cases["b"]


def test_the_sample_is_the_same_within_a_version_and_another_in_the_next(monkeypatch: pytest.MonkeyPatch):
    chosen = sampling.sample(LARGE)
    assert sampling.sample(LARGE) == chosen
    monkeypatch.setattr(sampling, "__version__", "9.9.9")
    assert sampling.sample(LARGE) != chosen
