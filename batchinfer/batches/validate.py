"""Validation of a batch's file before anything runs: https://platform.openai.com/docs/guides/batch.

Every line is a request of its own; the first faults are listed with their lines. What only the body decides (a sampling
value out of range, a prompt too long) is that request's error and no fault of the batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.batches.catalog import Problem
from batchinfer.errors import InputError, InvalidInput
from batchinfer.io.inputs import InputLine
from batchinfer.io.jsonl import parse
from batchinfer.io.lines import read_lines
from batchinfer.io.seen_ids import IdPlace, SeenIds
from batchinfer.io.source import Sources
from batchinfer.job.spool import Spool
from batchinfer.spec import StorageSpec

MAX_PROBLEMS = 100
_LOOK_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Checked:
    """`problems`: the first of them, by line; a file without any is as good as it can be known without a model."""

    rows: int
    problems: tuple[Problem, ...]


def check_lines(
    path: Path, endpoint: str, models: Collection[str], spool: Spool, stopping: Callable[[], bool]
) -> Checked | None:
    """Read the whole file once, in bounded memory; what that needs is in `spool`. None if `stopping`."""
    seen = SeenIds(spool.path)
    rows = 0
    problems: list[Problem] = []
    try:
        for line in _lines(path):
            rows += 1
            problems += _check(line, endpoint, models, seen)
            if len(problems) >= MAX_PROBLEMS:
                break
            if rows % _LOOK_ROWS == 0 and stopping():
                return None
        else:
            problems += heapq.nsmallest(MAX_PROBLEMS, map(_twice, seen.repeated()), key=lambda one: one.line or 0)
    except InputError as error:  # UTF-16, or damaged compression
        problems.append(Problem("invalid_file", str(error).replace(str(path), "the input file")))
    finally:
        seen.close()
    if not rows and not problems:
        problems.append(Problem("empty_file", "The input file is empty: a batch needs at least one request."))
    return Checked(rows, tuple(sorted(problems, key=lambda problem: problem.line or 0)[:MAX_PROBLEMS]))


def _twice(places: tuple[IdPlace, IdPlace]) -> Problem:
    again, first = places
    message = f"This custom_id was used on line {first.line} already."
    return Problem("duplicate_custom_id", message, again.line, "custom_id")


def _lines(path: Path) -> Iterator[InputLine]:
    with Sources(StorageSpec()).open(str(path)) as source:
        for lines in read_lines(source):
            yield from lines


def _check(line: InputLine, endpoint: str, models: Collection[str], seen: SeenIds) -> Iterator[Problem]:
    try:
        row = parse(line.raw)
    except InvalidInput as error:
        yield Problem("invalid_json_line", f"This line is not a JSON object: {error}.", line.number)
        return
    custom_id = row.get("custom_id")
    if isinstance(custom_id, str) and custom_id:
        seen.add(0, [custom_id], [line.number])
    else:
        yield _missing("custom_id", custom_id, "a string", line)
    yield from _check_target(row, endpoint, line)
    body = row.get("body")
    if not isinstance(body, dict):
        yield _missing("body", body, "a JSON object", line)
        return
    model = body.get("model")
    if not isinstance(model, str):
        yield _missing("body.model", model, "a string", line)
    elif model not in models:
        known = ", ".join(sorted(models))
        message = f"The model {model!r} is not served here; this server has: {known}."
        yield Problem("model_not_found", message, line.number, "body.model")


def _check_target(row: dict[str, Any], endpoint: str, line: InputLine) -> Iterator[Problem]:
    method, url = row.get("method"), row.get("url")
    if not isinstance(method, str):
        yield _missing("method", method, "the string 'POST'", line)
    elif method != "POST":
        yield Problem("invalid_method", f"The method {method!r} is not supported: use 'POST'.", line.number, "method")
    if not isinstance(url, str):
        yield _missing("url", url, "a string", line)
    elif url != endpoint:
        message = f"The url {url!r} is not the endpoint of this batch, {endpoint!r}."
        yield Problem("invalid_url", message, line.number, "url")


def _missing(param: str, value: Any, wanted: str, line: InputLine) -> Problem:
    if value is None:
        return Problem("missing_required_parameter", f"{param} is missing: it must be {wanted}.", line.number, param)
    return Problem("invalid_type", f"{param} must be {wanted}.", line.number, param)
