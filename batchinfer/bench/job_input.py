"""The first rows of a job as a workload: its input, templates and sampling; its output is not touched."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from batchinfer.bench.measured import MeasuredLLM
from batchinfer.io.rows import stream_rows
from batchinfer.job.prepare import Draft, draft_plan
from batchinfer.job.row_prompts import RowContext
from batchinfer.llm import Prompt
from batchinfer.spec import JobSpec


class JobInput:
    """Workload from a job named `name`. `spec.input.limit` bounds its rows; `files` are its model's."""

    def __init__(self, name: str, spec: JobSpec) -> None:
        """Scan the input. Raises the errors of `run` before the model is loaded."""
        self._name = name
        self._draft: Draft = draft_plan(spec, weights=True)
        self._rows = 0
        self.files = self._draft.files

    def describe(self) -> str:
        return f"{self._name}: its first {self._rows:,} rows, with its templates and sampling"

    def prompts(self, llm: MeasuredLLM) -> list[Prompt]:
        """Return the prompts; rows in error become prompts in error, as in the job."""
        plan, rows, spec = self._draft.plan, self._draft.rows, self._draft.spec
        inputs = plan.inputs.select(rows.read_columns)
        prompts: list[Prompt] = []
        batches: Any = stream_rows(inputs, plan.chunks, spec.storage)
        with closing(batches):
            for number, (_, batch) in enumerate(batches):
                selected = rows.select(batch, inputs.text_json)
                context = RowContext(inputs.text_json, llm.model_facts, plan.bases[number], spec.seed)
                prompts += rows.prompts(batch, selected, context, {})
        self._rows = len(prompts)
        return prompts
