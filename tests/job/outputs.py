"""Small finished jobs for the readers' tests: real runs with the fake model, on local disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.job.run import run_job
from batchinfer.spec import JobSpec, StorageSpec, parse_spec

ROWS = 30
CHUNK_ROWS = 10
STORAGE = StorageSpec()


def write_input(folder: Path, name: str = "in.parquet", rows: int = ROWS) -> Path:
    path = folder / name
    texts = [f"question {number}" for number in range(rows)]
    table = pa.table({"id": [f"r{n}" for n in range(rows)], "text": texts, "score": [n / 7 for n in range(rows)]})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), encoding="utf-8")
    return path


def make_spec(folder: Path, **sections: Any) -> JobSpec:
    """Return a job over `in.parquet`; keyword arguments replace or extend its sections."""
    values: dict[str, Any] = {
        "model": "fake",
        "input": {"path": str(folder / "in.parquet")},
        "prompt": {"template": "{{ text }}"},
        "fake": {"answer_tokens": [2, 9]},
        "output": {"path": str(folder / "out"), "chunk_rows": CHUNK_ROWS},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) and name in values else section
    return parse_spec(values)


def make_output(folder: Path, **sections: Any) -> Path:
    """Run a job to its end; returns the output directory."""
    if not (folder / "in.parquet").exists():
        write_input(folder)
    run_job(make_spec(folder, **sections))
    return folder / "out"


def commit_files(out: Path) -> list[Path]:
    return sorted((out / "commits").iterdir())


def part_of(out: Path, chunk: int) -> Path:
    return out / json.loads(commit_files(out)[chunk].read_bytes())["part"]


def rewrite(out: Path, chunk: int, table: pa.Table, honest: bool = True) -> None:
    """Put other rows into a part; `honest` also makes its size and hash in the commit record right."""
    part = part_of(out, chunk)
    pq.write_table(table, part)
    if honest:
        data = part.read_bytes()
        change_json(commit_files(out)[chunk], bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))
