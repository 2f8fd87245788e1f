"""Roofline of a workload: the least time that a processor's bandwidth and rates allow, op by op.

The engine's own scheduler plans every step, with its seats, chunks of prompts, block pool and prefix cache; prompts
come in the order of the pipeline, and nothing is computed. So steps and batches are those of a run of these prompts
without drafts. In each step an op takes the longer of two times, its bytes over the bandwidth and its operations over
the rate (Williams et al. 2009, "Roofline"), and the ops of a step follow one another. Host work, launches and idle
processors take additional time in any engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from batchinfer.bench.processors import CPU_DTYPES, Processor
from batchinfer.bench.step_work import OPS, Formats, ModelWork, OpWork, StepTokens
from batchinfer.bench.table import facts, number, table
from batchinfer.bench.workload import TokenPrompt
from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.plan import StepResult
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import TooLong, UsageError, suggest
from batchinfer.models.config import ModelConfig
from batchinfer.pipeline.prefix_order import PrefixOrder
from batchinfer.pipeline.prompt import Prepared
from batchinfer.request import Request, SamplingParams

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
_KV_DTYPES = ("float32", "bfloat16", "float16", "float8")
_WIDE = {"float8": "bfloat16", "int8": "float32"}  # activations and LM head beside linear layers of 8 bits
_MEMORY_SHARE = 0.9  # for weights and KV cache: the rest is for activations, logits and graphs
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Limits:
    """Settings of the engine that decide a step. `kv_tokens` None: all that fits the memory."""

    max_num_seqs: int
    max_step_tokens: int
    kv_tokens: int | None = None


def parse_formats(dtype: str | None, kv_dtype: str | None, gpu: Processor | None) -> Formats:
    """Return the formats that the options ask for on a GPU, or on this CPU (None). Raises UsageError."""
    dtypes = CPU_DTYPES if gpu is None else tuple(gpu.operations_per_s)
    dtype = dtype or ("float32" if gpu is None else "bfloat16")
    if dtype not in dtypes:
        where = "a CPU" if gpu is None else gpu.name
        raise UsageError(f"--dtype {dtype}: unknown on {where}{suggest(dtype, dtypes)} (known: {', '.join(dtypes)})")
    wide = _WIDE.get(dtype, dtype)
    kv_dtype = kv_dtype or wide
    if kv_dtype not in _KV_DTYPES:
        known = ", ".join(_KV_DTYPES)
        raise UsageError(f"--kv-cache-dtype {kv_dtype}: unknown{suggest(kv_dtype, _KV_DTYPES)} (known: {known})")
    return Formats(_BYTES[dtype], _BYTES[wide], _BYTES[kv_dtype], dtype, wide)


@dataclass
class OpLimit:
    """Sums of an op over all steps: the time of its bytes, of its operations, and of whichever is longer in a step."""

    bytes: float = 0.0
    operations: float = 0.0
    memory_s: float = 0.0
    compute_s: float = 0.0
    limit_s: float = 0.0

    def add(self, work: OpWork, processor: Processor) -> None:
        memory_s = work.memory_bytes / processor.bytes_per_s
        memory_s += work.passed_bytes / (processor.cache_bytes_per_s or processor.bytes_per_s)
        compute_s = work.operations / processor.operations_per_s[work.dtype]
        self.bytes += work.memory_bytes + work.passed_bytes
        self.operations += work.operations
        self.memory_s += memory_s
        self.compute_s += compute_s
        self.limit_s += max(memory_s, compute_s)

    @property
    def bound(self) -> str:
        return "bandwidth" if self.memory_s >= self.compute_s else "operations"


class Counted(NamedTuple):
    """Counts of the simulated run."""

    steps: int
    sequence_steps: int
    kv_tokens: int
    stats: EngineStats


@dataclass(frozen=True)
class Roofline:
    """Limits of the ops, and what was run. Tokens are prompt and answer tokens of the workload."""

    model: str
    processor: Processor
    work: ModelWork
    kv_token_bytes: int
    counted: Counted
    ops: dict[str, OpLimit]
    prompt_tokens: int
    answer_tokens: int

    @property
    def limit_s(self) -> float:
        return sum(op.limit_s for op in self.ops.values())

    def as_json(self) -> dict[str, Any]:
        counted, processor = self.counted, self.processor
        return {
            "model": self.model,
            "processor": {**processor._asdict(), "operations_per_s": dict(processor.operations_per_s)},
            "formats": self.work.formats._asdict(),
            "weights": self.work.weights,
            "weight_bytes": self.work.weight_bytes,
            "kv_token_bytes": self.kv_token_bytes,
            "kv_tokens": counted.kv_tokens,
            "steps": counted.steps,
            "mean_batch": counted.sequence_steps / counted.steps,
            "preemptions": counted.stats.preemptions,
            "prompt_tokens": self.prompt_tokens,
            "computed_tokens": counted.stats.prompt_tokens_computed,
            "answer_tokens": self.answer_tokens,
            "ops": {name: {**vars(op), "bound": op.bound} for name, op in self.ops.items()},
            "limit_s": self.limit_s,
            "answer_tokens_per_s": self.answer_tokens / self.limit_s,
            "total_tokens_per_s": (self.prompt_tokens + self.answer_tokens) / self.limit_s,
        }


def compute(
    model: str,
    config: ModelConfig,
    formats: Formats,
    processor: Processor,
    prompts: Sequence[TokenPrompt],
    limits: Limits,
) -> Roofline:
    """Simulate the workload and sum the limits of all steps. Raises UsageError if the model or a prompt does not fit.

    model: its name, for the report.
    """
    work = ModelWork(config, formats)
    layers, kv_heads, head_size = config.kv_shape
    token_bytes = 2 * layers * kv_heads * head_size * formats.kv
    most = limits.max_num_seqs * config.context_tokens
    kv_tokens = limits.kv_tokens or min(_kv_tokens(work, token_bytes, processor), most)
    pool, drafts = BlockPool(kv_tokens // _BLOCK_SIZE, _BLOCK_SIZE), processor.max_draft_rows
    scheduler = Scheduler(pool, limits.max_num_seqs, limits.max_step_tokens, max_draft_rows=drafts)
    ops = {name: OpLimit() for name in OPS}
    steps = sequence_steps = 0
    for step in _steps(scheduler, prompts):
        for name, op in work.works(step).items():
            ops[name].add(op, processor)
        steps += 1
        sequence_steps += len(step.decode_lengths) + len(step.counts)
    return Roofline(
        model=model,
        processor=processor,
        work=work,
        kv_token_bytes=token_bytes,
        counted=Counted(steps, sequence_steps, kv_tokens, scheduler.stats),
        ops=ops,
        prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
        answer_tokens=sum(prompt.max_tokens for prompt in prompts),
    )


def _kv_tokens(work: ModelWork, token_bytes: int, processor: Processor) -> int:
    room = _MEMORY_SHARE * processor.memory_bytes - work.weight_bytes
    tokens = int(room // token_bytes)
    if tokens < _BLOCK_SIZE:
        raise UsageError(
            f"{processor.name} has {processor.memory_bytes / 1e9:,.0f} GB, and the weights take "
            f"{work.weight_bytes / 1e9:,.1f}: no room for a KV cache in {_MEMORY_SHARE:.0%} of the memory"
        )
    return tokens


def _steps(scheduler: Scheduler, prompts: Sequence[TokenPrompt]) -> Iterator[StepTokens]:
    """Yield the steps of a run of all prompts, greedy and without end-of-sequence tokens. Raises UsageError."""
    order = _ordered(prompts, lambda prepared: scheduler.length_estimator.estimate(prepared.requests[0]))
    while order or scheduler.waiting or scheduler.running:
        while order and scheduler.wants_more:
            _add(scheduler, order.pop())
        plan = scheduler.schedule()
        if plan.seats:
            step = StepTokens.of_plan(plan)
            yield step
            scheduler.update(StepResult([0] * step.sampled))
        for answer in scheduler.take_finished():
            if answer.error is not None:
                raise UsageError(f"the workload does not fit: {answer.error}")


def _ordered(prompts: Sequence[TokenPrompt], expected: Callable[[Prepared], int]) -> PrefixOrder:
    """Return the prompts in the order in which a job's come to the engine."""
    order = PrefixOrder(len(prompts))
    for place, (ids, max_tokens) in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        order.add(Prepared(place, ids, params, [Request(place, ids, params, max_tokens)], None))
    order.finish(expected)
    return order


def _add(scheduler: Scheduler, prepared: Prepared) -> None:
    try:
        scheduler.add(prepared.requests[0])
    except TooLong as error:
        raise UsageError(f"the workload does not fit: {error}") from None


def describe(found: Roofline, workload: str) -> str:
    counted, work, processor = found.counted, found.work, found.processor
    rates = ", ".join(
        f"{processor.operations_per_s[dtype] / 1e12:,.3g} TFLOP/s in {dtype}"
        for dtype in dict.fromkeys((work.formats.linear_dtype, work.formats.activation_dtype))
    )
    stats = counted.stats
    lines = [
        ("model", f"{found.model}: {work.weights / 1e6:,.0f} million weights, {work.weight_bytes / 1e9:,.3g} GB"),
        ("processor", f"{processor.name}, {processor.memory_bytes / 1e9:,.0f} GB ({processor.source})"),
        ("rates", f"{_bandwidth(processor)}; {rates}"),
        ("workload", workload),
        (
            "tokens",
            f"{found.prompt_tokens:,} in, {stats.prompt_tokens_computed:,} computed; {found.answer_tokens:,} out",
        ),
        ("KV cache", f"{counted.kv_tokens:,} tokens of {found.kv_token_bytes:,} bytes"),
        (
            "steps",
            f"{counted.steps:,} by the scheduler, with {number(counted.sequence_steps / counted.steps)} sequences on "
            f"average; {stats.preemptions} preemptions",
        ),
    ]
    total = found.prompt_tokens + found.answer_tokens
    end = [
        ("limit", f"{number(found.limit_s)} s, ops one after another"),
        ("rate", f"{number(found.answer_tokens / found.limit_s)} tokens/s out, {number(total / found.limit_s)} in all"),
    ]
    return "\n".join([facts(lines), "", _op_table(found), "", facts(end)])


def _bandwidth(processor: Processor) -> str:
    text = f"{processor.bytes_per_s / 1e12:,.3g} TB/s"
    if processor.reached_bytes_per_s is not None:
        text += f", what reading reaches of the nominal {processor.nominal_bytes_per_s / 1e12:,.3g}"
    elif processor.cache_bytes_per_s is not None:
        text += f" from memory, {processor.cache_bytes_per_s / 1e12:,.3g} from a cache between ops"
    else:
        text += " nominal"
    return text


def _op_table(found: Roofline) -> str:
    rows = [
        (
            name,
            number(op.bytes / 1e9),
            number(op.operations / 1e12),
            number(op.limit_s),
            f"{op.limit_s / found.limit_s:.1%}",
            op.bound,
        )
        for name, op in found.ops.items()
    ]
    return table(("op", "GB", "TFLOP", "limit, s", "share", "bound by"), rows)
