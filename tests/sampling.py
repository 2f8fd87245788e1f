"""Sampling of large parameter tables: `pytest` runs some cases of each, `pytest --all` runs every one.

A table is the parameter list of one test function marked `sampled`, for each backend of the kernels. A sample keeps the
edge cases of the table, `sampled(edges)`, where an edge is a parameter's value, and a random MOST of the rest; of
Triton's interpreter, which takes a thousand times as long, a random MOST_INTERPRETED of both together. The seed
is the release's version: within a release every run tests the same cases; over the releases every case gets its turn.
Tests named on the command line (`::` or -k) always run.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from batchinfer import __version__

MOST = 16
MOST_INTERPRETED = 5
INTERPRETED = "triton"  # parameter of the fixture `variant` of the kernels' tests

_left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case of large parameter tables, not a sample")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sampled(edges): a large table, of which `pytest --all` alone runs every case")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all") or config.option.keyword or any("::" in str(arg) for arg in config.args):
        return
    chosen = sample(items)
    left_out = [item for item in items if item not in chosen]
    config.stash[_left_out] = len(left_out)
    if hasattr(config, "workeroutput"):  # of pytest-xdist: a worker's message to the process that started it
        config.workeroutput["left_out"] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item in chosen]


def sample(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Return the items to run."""
    chosen: set[pytest.Item] = set()
    tables: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is None or (_variant(item) != INTERPRETED and _is_edge(item, *mark.args)):
            chosen.add(item)
        else:
            tables.setdefault((item.nodeid.split("[")[0], _variant(item)), []).append(item)
    for (name, variant), table in tables.items():
        most = MOST_INTERPRETED if variant == INTERPRETED else MOST
        chosen.update(random_sample(table, most, f"{name} {variant}"))
    return chosen


def random_sample(cases: Sequence[object], most: int, name: str) -> list[object]:
    """Return up to `most` of the cases, the same ones in all runs of a release."""
    return random.Random(f"{__version__} {name}").sample(cases, min(most, len(cases)))


def _is_edge(item: pytest.Item, edges: Sequence[object] = ()) -> bool:
    return any(value in edges for value in item.callspec.params.values())


def _variant(item: pytest.Item) -> str:
    return str(item.callspec.params.get("variant", "")) if hasattr(item, "callspec") else ""


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object | None) -> None:
    """Store the number of cases that pytest-xdist's workers left out: every worker collects the same tests."""
    node.config.stash[_left_out] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(_left_out, 0):
        terminalreporter.write_line(
            f"{config.stash[_left_out]} cases of large tables were left out (seed: version {__version__}); "
            "`make test-all` or `pytest --all` runs them"
        )
