"""Structured log on stderr: plain text on a terminal, one JSON object per line elsewhere."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Log:
    """Logger of events: a message and named values. Values without a JSON form are written as text."""

    def __init__(self, stream: TextIO | None = None, level: str = "info", as_json: bool | None = None) -> None:
        self._stream = stream
        self._level = _LEVELS[level]
        self._as_json = as_json

    def configure(self, level: str, as_json: bool | None = None) -> None:
        self._level = _LEVELS[level]
        self._as_json = as_json

    @property
    def as_json(self) -> bool:
        if self._as_json is not None:
            return self._as_json
        return not (self._stream or sys.stderr).isatty()

    def debug(self, message: str, **values: Any) -> None:
        self._write("debug", message, values)

    def info(self, message: str, **values: Any) -> None:
        self._write("info", message, values)

    def warning(self, message: str, **values: Any) -> None:
        self._write("warning", message, values)

    def error(self, message: str, **values: Any) -> None:
        self._write("error", message, values)

    def _write(self, level: str, message: str, values: dict[str, Any]) -> None:
        if _LEVELS[level] < self._level:
            return
        stream = self._stream or sys.stderr
        if self.as_json:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            line = json.dumps({"time": stamp, "level": level, "message": message, **values}, default=str)
        else:
            pairs = "  ".join(f"{name}={value}" for name, value in values.items())
            mark = "" if level == "info" else f"{level}: "
            line = f"{mark}{message}{'  ' + pairs if pairs else ''}"
        # one write per line, so that lines of several threads do not interleave
        stream.write(line + "\n")
        stream.flush()


log = Log()
