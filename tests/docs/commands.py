"""Rules for command lines in the documentation: each known program has one, and an unknown program fails.

Lines of programs that cannot run here (of a cluster, of a package index) are checked for their part of ours: the
batchinfer command inside, names of extras, variables, targets and routes.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer.main

from batchinfer.cli.main import app
from tests.docs.pages import ROOT

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_EXTRAS = _PROJECT["optional-dependencies"]
_NEEDS = [*_PROJECT["dependencies"], *(need for needs in _EXTRAS.values() for need in needs)]
_NAMES = {re.split(r"[>=<;\[ ]", need)[0].lower() for need in _NEEDS}
_TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def check(line: str) -> None:
    """Raise AssertionError for a command line that would not work as it stands."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["exec"]:
        words = words[1:]
    program, arguments = words[0], words[1:]
    rule = _RULES.get(program)
    assert rule is not None, f"no rule for the program {program!r}: {line}"
    rule(arguments)


def check_batchinfer(arguments: list[str]) -> None:
    """Parse a command line with the CLI's own parser, without running anything."""
    root = typer.main.get_command(app)
    command, name, parent = root, "batchinfer", None
    while True:
        context = command.make_context(name, list(arguments), parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*getattr(context, "_protected_args", []), *context.args]
        assert rest, "batchinfer without a command"
        name, command, arguments = command.resolve_command(context, rest)
        parent = context


def sbatch(arguments: list[str]) -> tuple[range, str]:
    """Return the array's indices and the command that each runs."""
    indices, wrapped = range(0), ""
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--array":
            first, last = value.split("-")
            indices = range(int(first), int(last) + 1)
        elif name == "--signal":
            assert re.fullmatch(r"B:(TERM|USR1)@\d+", value), value
        elif name == "--wrap":
            wrapped = value or next(words)
        else:
            assert name == "--requeue", f"sbatch {name}"
    assert indices and wrapped, arguments
    check(wrapped)
    return indices, wrapped


def slurm(indices: range, index: int) -> Mapping[str, str]:
    """Return what Slurm sets for a task of an array."""
    values = {"ID": index, "COUNT": len(indices), "MIN": indices[0], "MAX": indices[-1], "STEP": 1}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def _sbatch(arguments: list[str]) -> None:
    sbatch(arguments)


def _aws(arguments: list[str]) -> None:
    assert arguments[:2] == ["batch", "submit-job"], arguments
    options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert set(options) == {
        "--job-name",
        "--job-queue",
        "--job-definition",
        "--array-properties",
        "--container-overrides",
    }
    assert re.fullmatch(r"size=\d+", options["--array-properties"])
    name, _, command = options["--container-overrides"].partition("=")
    words = json.loads(command)
    assert name == "command" and words[0] == "batchinfer"
    check_batchinfer(words[1:])


def _make(arguments: list[str]) -> None:
    for word in arguments:
        assert word in _TARGETS or re.fullmatch(r"[A-Z]+=.*", word), f"make {word}"


def _pip(arguments: list[str]) -> None:
    verb, *words = arguments
    assert verb in ("install", "wheel"), arguments
    while words:
        word = words.pop(0)
        if word == "-c":
            assert (ROOT / words.pop(0)).is_file()
        elif word == "--wheel-dir":
            words.pop(0)
        elif word.startswith("-"):
            assert word in ("--no-deps", "--no-build-isolation", "-e"), f"pip {word}"
        else:
            _check_requirement(word)


def _check_requirement(word: str) -> None:
    local = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
    if local:
        assert set((local[1] or "s3").split(",")) <= set(_EXTRAS), word
    elif not word.endswith(".whl"):
        assert word.lower() in _NAMES, f"pip install {word}: not a dependency of ours"


def curl(arguments: list[str]) -> tuple[str, Any]:
    """Return the route that a request is for, and its body."""
    url, header, kind, data, body = arguments
    assert (header, kind, data) == ("-H", "Content-Type: application/json", "-d"), arguments
    route = re.fullmatch(r"http://127\.0\.0\.1:8000(/.+)", url)
    assert route is not None, url
    return route[1], json.loads(body)


def _curl(arguments: list[str]) -> None:
    curl(arguments)


def _python(arguments: list[str]) -> None:
    assert arguments[0] == "-m", arguments
    module = Path(arguments[1].replace(".", "/"))
    known = arguments[1] == "pytest" or (ROOT / module).with_suffix(".py").is_file()
    assert known, f"python -m {arguments[1]}"
    paths = [word.partition("::")[0] for word in arguments[2:] if word.startswith("tests/")]
    assert all((ROOT / path).exists() for path in paths), paths


def _pre_commit(arguments: list[str]) -> None:
    assert arguments in (["install"], ["run", "--all-files"]), arguments


_RULES: Mapping[str, Callable[[list[str]], None]] = {
    "aws": _aws,
    "batchinfer": check_batchinfer,
    "curl": _curl,
    "make": _make,
    "pip": _pip,
    "pre-commit": _pre_commit,
    "python": _python,
    "sbatch": _sbatch,
}
