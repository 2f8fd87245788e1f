"""The input files of a plan, found again where a job file says they are now."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from batchinfer.io.discover import FoundFile, find_files
from batchinfer.io.partitions import partition_values, partitions_match
from batchinfer.io.rows import InputFile, Inputs
from batchinfer.io.source import Sources
from batchinfer.job.fingerprint import input_parts
from batchinfer.job.plan import JobPlan
from batchinfer.spec import JobSpec

_STAT_THREADS = 8


def same_inputs(spec: JobSpec, known: JobPlan) -> Inputs | None:
    """Return a plan's inputs at the place where this job finds them; None if it would read other rows or content.

    Nobody needs to count their rows again. Raises as `find_files`.
    """
    asked = input_parts(spec)
    if asked != {name: known.fingerprint.get(name) for name in asked}:
        return None
    sources = Sources(spec.storage)
    found = find_files(spec.input, sources)
    files = known.inputs.files
    # the scan ended where the limit was full
    ended_early = spec.input.limit is not None and spec.input.where is None and len(files) < len(found)
    if not ended_early and len(files) != len(found):
        return None

    def again(file: InputFile, here: FoundFile) -> InputFile | None:
        with sources.open(here.url) as source:
            agreed = file.format == here.format and partitions_match(
                file, partition_values(here.path), known.inputs.schema
            )
            if not agreed or not source.same(file.stat, source.opened):
                return None
            return replace(file, url=here.url, mark=source.opened.mark, known_as=file.name)

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        same = [file for file in pool.map(again, files, found) if file is not None]
    return replace(known.inputs, files=tuple(same)) if len(same) == len(files) else None
