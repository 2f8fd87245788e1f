"""The salvage journal: finished rows of open chunks, saved now and then, so that a stop loses seconds of work.

A cache: a journal that is damaged or belongs to another job is ignored with a warning. zstd-compressed lines: a header
with the fingerprint, then for each chunk a line {chunk, rows} and its rows, then {end: chunks}.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
import zstandard

from batchinfer.errors import InputMissing
from batchinfer.io.storage import Store
from batchinfer.job.plan import JobPlan
from batchinfer.job.results import RowResult, decode_results
from batchinfer.job.shard import Shard
from batchinfer.job.spool import Spool, explained
from batchinfer.log import log

SALVAGE = "salvage/"
_FORMAT = 2  # of the journal and of the lines in it; raise it when either changes
_NAME = re.compile(r"salvage/\d+-of-\d+-([0-9a-f]+)\.jsonl\.zst", re.ASCII)


def is_journal(name: str, plan: JobPlan) -> bool:
    """Return True if a worker of this plan may have written the object."""
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == plan.mark


class Salvage:
    """Writes this worker's journal and reads all workers': the number of shards may have changed between runs."""

    def __init__(self, store: Store, spool: Spool, shard: Shard, plan: JobPlan, pass_number: int) -> None:
        self._store = store
        self._spool = spool
        self._plan = plan
        self._name = f"{SALVAGE}{shard.name}-{plan.mark}.jsonl.zst"
        self._header = {"format": _FORMAT, "fingerprint": plan.digest, "pass": pass_number}
        self._lock = threading.Lock()
        self._saved_changes = 0
        self._recovered: dict[int, Path] = {}

    def save_journal(self) -> None:
        """Upload what is finished and not committed, if there is anything new."""
        with self._lock:
            changes = self._spool.changes
            if changes == self._saved_changes:
                return
            path = self._spool.scratch("salvage.zst")
            chunks = 0
            compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
            with explained(path), path.open("wb") as file, compressor.stream_writer(file) as out:
                out.write(orjson.dumps(self._header) + b"\n")
                for chunk, lines in chain(self._waiting(), self._spool.finished()):
                    out.write(orjson.dumps({"chunk": chunk, "rows": lines.count(b"\n")}) + b"\n" + lines)
                    chunks += 1
                out.write(orjson.dumps({"end": chunks}) + b"\n")
            self._store.put_file(self._name, path)
            self._saved_changes = changes

    def load_journals(self, wanted: set[int]) -> None:
        """Fetch the journals' rows of the `wanted` chunks into the spool directory."""
        journals = [name for name in self._store.find(SALVAGE) if is_journal(name, self._plan)]
        for number, name in enumerate(journals):
            packed, plain = self._spool.scratch(f"journal-{number}.zst"), self._spool.scratch(f"journal-{number}")
            try:
                self._store.get_file(name, packed)
                with explained(plain), packed.open("rb") as source, plain.open("wb") as target:
                    zstandard.ZstdDecompressor().copy_stream(source, target)
                self._split(plain, wanted)
            except (InputMissing, zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
                log.warning(
                    "salvage ignored: its rows will be computed again", file=f"{self._store.url}/{name}", why=str(error)
                )
            packed.unlink(missing_ok=True)
            plain.unlink(missing_ok=True)

    def results_of(self, chunk: int) -> list[RowResult]:
        """Return the recovered results of a chunk, one per row."""
        path = self._recovered.pop(chunk, None)
        if path is None:
            return []
        try:
            return list({row.offset: row for row in decode_results(path.read_bytes())}.values())
        except (ValueError, TypeError) as error:
            log.warning("salvage of a chunk ignored: its rows will be computed again", chunk=chunk, why=str(error))
            return []
        finally:
            path.unlink(missing_ok=True)

    def _waiting(self) -> Iterator[tuple[int, bytes]]:
        """Recovered rows of chunks that are not open yet: this journal replaces the one that they came from."""
        for chunk, path in sorted(self._recovered.items()):
            with contextlib.suppress(FileNotFoundError):  # opened meanwhile
                yield chunk, path.read_bytes()

    def _split(self, plain: Path, wanted: set[int]) -> None:
        """Check the whole journal first, then keep each wanted chunk's lines in a file of its own."""
        with plain.open("rb") as file:
            for _ in self._blocks(file):
                pass
        with explained(plain), plain.open("rb") as file:
            for chunk, lines in self._blocks(file):
                if chunk in wanted:
                    self._keep(chunk, lines)

    def _keep(self, chunk: int, lines: list[bytes]) -> None:
        path = self._recovered[chunk] = self._spool.scratch(f"{chunk:06d}.recovered")
        with path.open("ab") as target:
            target.writelines(lines)

    def _blocks(self, file: io.BufferedReader) -> Iterator[tuple[int, list[bytes]]]:
        header = _line(file)
        if header.get("format") != _FORMAT:
            raise ValueError("another version of batchinfer wrote it")
        if header != self._header:
            raise ValueError("it belongs to another job, or to another pass of this one")
        chunks = 0
        while "end" not in (block := _line(file)):
            lines = [file.readline() for _ in range(block["rows"])]
            if not all(line.endswith(b"\n") for line in lines):
                raise ValueError("it ends in the middle")
            yield block["chunk"], lines
            chunks += 1
        if block["end"] != chunks:
            raise ValueError("chunks are missing")


def _line(file: io.BufferedReader) -> dict[str, Any]:
    values = orjson.loads(file.readline())
    if not isinstance(values, dict):
        raise ValueError("it is not a salvage journal")
    return values
