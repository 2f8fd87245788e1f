"""Tests of the example jobs: each parses and runs with the fake model from the repository's root."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchinfer.cli.main import main
from batchinfer.job.drain import Drain
from batchinfer.job.inspect.verify import audit
from batchinfer.spec import StorageSpec

ROOT = Path(__file__).parent.parent.parent
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_example_job_runs_and_verifies(job, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Drain, "install", lambda self: None)
    settings = ["--set", f"output.path={tmp_path / 'out'}", "--set", "model=fake", "--set", "fake.step_s=0"]
    assert main(["run", str(job), *settings]) == 0
    report = audit(str(tmp_path / "out"), StorageSpec())
    assert report.differences == [] and report.rows > 0


def test_quickstart_data_matches_its_readme():
    table = pq.read_table(ROOT / "jobs" / "data" / "quickstart.parquet")
    rows = table.to_pylist()
    assert len(rows) == 240 and len({row["id"] for row in rows}) == 240
    assert all(row["prompt"].strip() for row in rows)
    readme = (ROOT / "jobs" / "data" / "README.md").read_text(encoding="utf-8")
    for source, license_ in {(row["source"], row["license"]) for row in rows}:
        line = next(line for line in readme.splitlines() if line.startswith(f"| {source} |"))
        count = sum(row["source"] == source for row in rows)
        assert f"| {count} |" in line and line.endswith(f"| {license_} |")
