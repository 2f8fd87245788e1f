"""Output of `--json`: checked before the measurement, written atomically."""

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
    """Yield a function that writes the whole content once, atomically. For None it writes nothing.

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
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
