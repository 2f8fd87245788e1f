"""Sampling of large parameter tables: `pytest` runs some cases of each, `pytest --all` runs every one.

A table is the parameter list of one test function, for each backend of the kernels. A table with more than MOST cases
keeps its edge cases (`edge` below) and a random MOST of the rest. The seed is the release's version: within a release
every run tests the same cases; over the releases every case gets its turn. Tests named on the command line (`::` or -k)
always run.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from batchinfer import __version__

MOST = 16

_left_out = pytest.StashKey[int]()


def edge(*values: object, **settings: object) -> object:
    """Return a case for `parametrize` that sampling keeps."""
    return pytest.param(*values, marks=pytest.mark.edge, **settings)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case of large parameter tables, not a sample")


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
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        tables.setdefault(_table_of(item), []).append(item)
    for name, table in tables.items():
        kept = [item for item in table if item.get_closest_marker("edge")]
        rest = [item for item in table if not item.get_closest_marker("edge")]
        chosen.update(kept, random.Random(f"{__version__} {name}").sample(rest, min(MOST, len(rest))))
    return chosen


def _table_of(item: pytest.Item) -> str:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return f"{item.nodeid.split('[')[0]} {parameters.get('backend', '')}"


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
