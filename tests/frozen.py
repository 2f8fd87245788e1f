"""What users see and a change must show in a diff: CLI help pages and the README's reference tables.

`python -m tests.frozen` writes them anew after a change that is meant.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from batchinfer import errors
from batchinfer.cli.main import app, main
from batchinfer.spec import JobSpec

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
HELP = Path(__file__).parent / "golden" / "cli_help.txt"
COLUMNS = "100"


def help_pages() -> str:
    """Every page of the command line, as a terminal of 100 columns shows it."""
    names = [[command.callback.__name__] for command in app.registered_commands]
    for group in app.registered_groups:
        commands = group.typer_instance.registered_commands
        names += [[group.name], *([group.name, command.callback.__name__] for command in commands)]
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        pages = [_page(["--help"]), *(_page([*name, "--help"]) for name in names)]
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
    return "\n".join(pages)


def _page(arguments: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(arguments) == 0
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([f"$ batchinfer {' '.join(arguments)}", *lines, ""])


def job_fields() -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key of a job file."""
    return list(_fields(JobSpec, ""))


def _fields(model: type[BaseModel], prefix: str) -> Any:
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            yield from _fields(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _shown(field.default)
        yield f"{prefix}{name}", _type(field.annotation), default, field.description or ""


def _section(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *get_args(annotation)]
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)


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
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if origin is not None and parts and not hasattr(annotation, "__metadata__"):
        return " or ".join(dict.fromkeys(_type(part) for part in parts))
    return _type(parts[0]) if parts else names[annotation]


def exit_codes() -> dict[int, list[str]]:
    """Exit code → the errors of ours that mean it, in the order of the tree."""
    found: dict[int, list[str]] = {}
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, errors.BatchInferError):
            found.setdefault(value.exit_code, []).append(value.__name__)
    return found


def job_table() -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {default} | {meaning} |" for key, kind, default, meaning in job_fields()]
    return "\n".join(lines)


def section(text: str, name: str) -> str:
    """What the README has between the marks of a generated table."""
    match = re.search(_pattern(name), text, re.DOTALL)
    assert match is not None, f"README.md has no section marked {name}"
    return match[2].strip()


def _pattern(name: str) -> str:
    return rf"(<!-- {name}:.*?-->\n)(.*?)(<!-- end -->)"


def write() -> None:
    HELP.write_text(help_pages(), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    text = re.sub(_pattern("job"), lambda match: f"{match[1]}{job_table()}\n{match[3]}", text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
