"""Where `--json` goes: a path that cannot be written is found before anything is measured, and no half file is left."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchinfer.errors import UsageError

Write = Callable[[Mapping[str, Any]], None]


@contextmanager
def json_file(path: Path | None) -> Iterator[Write]:
    """Gives a function that takes the whole content, once; the file appears complete. None: nothing is written.

    Raises UsageError if the path cannot be written.
    """
    if path is None:
        yield lambda content: None
        return
    if path.is_dir():
        raise UsageError(f"--json {path}: is a directory; name a file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UsageError(f"--json {path}: cannot be written: {error.strerror}") from None
    os.close(handle)
    partial = Path(name)

    def write(content: Mapping[str, Any]) -> None:
        try:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            partial.chmod(0o666 & ~_umask())
            partial.replace(path)
        except OSError as error:
            raise UsageError(f"--json {path}: cannot be written: {error.strerror}") from None

    try:
        yield write
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    """What the process takes away from the mode of new files; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
