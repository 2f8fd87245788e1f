"""Generated parts of the documentation: the job file's keys and the command line's pages.

A hook of mkdocs: a page holds `<!-- generated: NAME -->`, which the build replaces by the result of GENERATORS[NAME].
Nothing generated is committed to docs/; tests/frozen.py freezes the same texts, so that a change shows in a diff.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from batchinfer.cli.main import app, main
from batchinfer.spec import JobSpec

COLUMNS = "100"
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page, as mkdocs reads it. Raises KeyError for an unknown name."""
    return _MARK.sub(lambda match: GENERATORS[match[1]](), markdown)


# -- the command line ----------------------------------------------------------------------------------------------


def help_pages() -> dict[str, str]:
    """Return every help page of the command line by its arguments, as a terminal of 100 columns shows it."""
    names = [[name] for name in _names(app)]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        names += [[str(group.name)], *([str(group.name), name] for name in _names(group.typer_instance))]
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        return {" ".join(page): _help_page(page) for page in (["--help"], *([*name, "--help"] for name in names))}
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _names(group: typer.Typer) -> list[str]:
    return [command.callback.__name__ for command in group.registered_commands if command.callback]


def _help_page(arguments: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(arguments)
    assert code == 0, arguments
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def cli_sections() -> str:
    """Return a section per command: its help page without the exit codes."""
    sections = []
    for arguments, page in help_pages().items():
        command = arguments.removesuffix("--help").strip()
        text = page.partition("\n  Exit codes:")[0].rstrip()
        sections.append(f"## batchinfer {command}".rstrip() + f"\n\n```text\n{text}\n```\n")
    return "\n".join(sections)


# -- the job file --------------------------------------------------------------------------------------------------


def job_fields() -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, meaning) of every key of a job file."""
    return list(_fields(JobSpec, ""))


def job_table() -> str:
    """Return the table of all keys of a job file."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {default} | {meaning} |" for key, kind, default, meaning in job_fields()]
    return "\n".join(lines)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            yield from _fields(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _shown(field.default)
        yield f"{prefix}{name}", _type(field.annotation), default, field.description or ""


def _section(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *get_args(annotation)]
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _shown(default: Any) -> str:
    if default is None or default is PydanticUndefined or default in ({}, ""):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _type(annotation: Any) -> str:
    names = {str: "text", int: "integer", float: "number", bool: "true/false", dict: "mapping", tuple: "list"}
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (dict, tuple):
        return names[origin]
    options = [option for option in get_args(annotation) if option is not type(None)]
    if origin is not None and options and not hasattr(annotation, "__metadata__"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    return _type(options[0]) if options else names[annotation]


GENERATORS: Mapping[str, Callable[[], str]] = {"cli": cli_sections, "job_fields": job_table}
