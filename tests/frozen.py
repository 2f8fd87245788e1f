"""Generator of the frozen texts: CLI help pages and the keys of a job file, so that changes show in a diff.

`python -m tests.frozen` rewrites them after an intended change.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from batchinfer import errors

ROOT = Path(__file__).parent.parent
HELP = Path(__file__).parent / "golden" / "cli_help.txt"
FIELDS = Path(__file__).parent / "golden" / "job_fields.md"


def _load() -> ModuleType:
    """Import docs/generated.py, which is a hook of mkdocs and not a module of a package."""
    spec = importlib.util.spec_from_file_location("docs_generated", ROOT / "docs" / "generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generated = _load()


def help_pages() -> str:
    """Return every page of the command line, as a terminal of 100 columns shows it."""
    return "\n".join(f"$ batchinfer {arguments}\n{page}\n" for arguments, page in generated.help_pages().items())


def exit_codes() -> dict[int, list[str]]:
    """Return exit code → names of our errors, in the order of the tree."""
    names: dict[int, list[str]] = {}
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, errors.BatchInferError):
            names.setdefault(value.exit_code, []).append(value.__name__)
    return names


def write() -> None:
    HELP.write_text(help_pages(), encoding="utf-8")
    FIELDS.write_text(f"{generated.job_table()}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
