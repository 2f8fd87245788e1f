"""What lies in an output and is not its job's stays as it is: only names that carry the plan's mark are deleted."""

from __future__ import annotations

import json
from pathlib import Path

from tests.job.doubles import ScriptedLLM, job, run, write_parquet


def mark_of(out: Path) -> str:
    return json.loads((out / "plan.json").read_bytes())["digest"][:8]


def test_names_near_to_our_own_survive_the_sweep(tmp_path, capsys):
    """They came while the job ran: those with the plan's mark, at their place, are what a killed worker left."""
    write_parquet(tmp_path / "in.parquet", 8)
    out = tmp_path / "out"

    def meanwhile(done):
        if done == 1:
            mark = mark_of(out)
            for name in ours(mark) + theirs(mark):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text(name)

    run(job(tmp_path), ScriptedLLM(after=meanwhile))
    mark = mark_of(out)
    assert not [name for name in ours(mark) if (out / name).exists()]
    assert {name: (out / name).read_text() for name in theirs(mark)} == {name: name for name in theirs(mark)}
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "did not write" in line]
    assert said[0]["objects"] == sum(name.startswith("parts/") and "/." not in name for name in theirs(mark))


def ours(mark):
    return [f"parts/part-000001-{mark}-{'0' * 16}.parquet", f"salvage/3-of-7-{mark}.jsonl.zst"]


def theirs(mark):
    part = f"part-000001-{mark}-{'0' * 16}.parquet"
    return [
        "parts/notes.txt",
        "parts/.hidden",
        f"parts/deep/{part}",
        f"parts/{part}.crc",
        f"parts/{part.replace(mark, '0' * 8)}",
        f"parts/{part.upper()}",
        f"parts/{part.replace('000001', '0000001')}",
        f"parts/{part.replace('000001', '1')}",
        f"parts/part-000001-{'0' * 16}.parquet",
        f"salvage/3-of-7-{'0' * 8}.jsonl.zst",
        f"salvage/deep/3-of-7-{mark}.jsonl.zst",
        "salvage/3-of-7.jsonl.zst",
        f"part-000001-{mark}-{'0' * 16}.parquet",
        "README.md",
    ]
