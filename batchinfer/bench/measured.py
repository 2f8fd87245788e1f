"""An LLM that records each step and its runner's time, and that can be reset to its initial state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

from batchinfer.bench.cost import LinearCost, StepWork
from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.engine import Engine, StepRunner, Ticket
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.io.fetch import ModelFiles, fetch_model
from batchinfer.llm import LLM, Defaults, make_engine
from batchinfer.pipeline.load import Assembly
from batchinfer.pipeline.prepare import ModelLimits
from batchinfer.request import Constraint
from batchinfer.spec import FAKE_MODEL, EngineSpec, JobSpec

if TYPE_CHECKING:
    import torch


class NotingRunner:
    """Runner that delegates to another one and records completed steps in `steps`. Failed steps are not recorded.

    A step takes from its launch, or from the end of the step before if that is later, until its result has come.
    """

    def __init__(self, runner: StepRunner) -> None:
        self.depth = runner.depth
        self.runner = runner
        self.steps: list[StepWork] = []
        self._ended = 0.0  # of the last step, in seconds

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint]) -> tuple[Ticket, StepPlan, float]:
        start = perf_counter()
        return self.runner.launch(plan, constraints), plan, start

    def collect(self, ticket: tuple[Ticket, StepPlan, float]) -> StepResult:
        inner, plan, start = ticket
        result = self.runner.collect(inner)
        end = perf_counter()
        self.steps.append(
            StepWork(len(plan.tokens), len(result.tokens), len(plan.seats), end - max(start, self._ended))
        )
        self._ended = end
        return result

    def discard(self) -> None:
        self.runner.discard()


class MeasuredLLM(LLM):
    """LLM with recorded steps. `limits` are the model's; `steps` cover the time since the last `restart`."""

    limits: ModelLimits

    def _setup(self, assembly: Assembly, engine: EngineSpec, defaults: Defaults) -> None:
        self._noting = NotingRunner(assembly.runner)
        self._engine_spec = engine
        self.limits = assembly.limits
        super()._setup(replace(assembly, runner=self._noting), engine, defaults)

    @property
    def steps(self) -> list[StepWork]:
        return self._noting.steps

    @property
    def runner(self) -> StepRunner:
        return self._noting.runner

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def max_num_seqs(self) -> int:
        return self._max_num_seqs

    @property
    def kv_cache_tokens(self) -> int:
        pool = self._engine.scheduler.pool
        return len(pool.blocks) * pool.block_size

    def restart(self) -> None:
        """Reset cached prefixes, length estimates, counters and steps, so that the next run is like the first."""
        old = self._engine.scheduler.pool
        pool = BlockPool(len(old.blocks), old.block_size, old.enable_prefix_caching)
        self._engine = make_engine(pool, self._noting, self._engine_spec, self._assembly.max_draft_rows)
        self._noting.steps = []


@dataclass(frozen=True)
class Subject:
    """A model to measure. `cost` is None for the fake model, which has no weights."""

    llm: MeasuredLLM
    cost: LinearCost | None
    dtype: torch.dtype


def load_subject(spec: JobSpec, files: ModelFiles | None = None) -> Subject:
    """Load the model of a job or of a model-only spec. Raises ModelError.

    files: the result of `fetch_model`, if it is known already.
    """
    import torch

    from batchinfer.ops.resources import use_threads
    from batchinfer.runner.model_runner import ModelRunner

    use_threads(spec.engine.num_threads)
    if files is None and spec.model != FAKE_MODEL:
        files = fetch_model(spec.model, spec.storage)
    llm = MeasuredLLM.from_spec(spec, files)
    cost = LinearCost.of(llm.runner.decoder) if isinstance(llm.runner, ModelRunner) else None
    return Subject(llm, cost, getattr(torch, spec.engine.dtype or "float32"))
