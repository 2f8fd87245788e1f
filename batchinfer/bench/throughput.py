"""Tokens per second from prompts to text, through everything that a job uses except its files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from batchinfer.bench.cost import Limit, MachineRates, limit_of
from batchinfer.bench.machine import Machine
from batchinfer.bench.measured import MeasuredLLM, Subject
from batchinfer.bench.table import facts, number
from batchinfer.errors import InputError
from batchinfer.llm import Prompt
from batchinfer.request import SamplingParams

_WARM_PROMPTS = 8
_WARM_TOKENS = 4


@dataclass(frozen=True)
class Run:
    """One pass over the workload.

    Tokens as the engine counts them; `answer_tokens` counts deduplicated outputs each time.
    """

    seconds: float
    runner_s: float
    prompt_tokens: int
    computed_tokens: int
    reused_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_tokens: int
    answer_tokens: int
    steps: int
    mean_batch: float
    preemptions: int
    errors: int
    limit: Limit | None = None

    @property
    def share_of_limit(self) -> float | None:
        return self.limit.seconds / self.seconds if self.limit is not None else None

    def as_json(self) -> dict[str, Any]:
        rates = {
            "total_tokens_per_s": (self.prompt_tokens + self.answer_tokens) / self.seconds,
            "prompt_tokens_per_s": self.prompt_tokens / self.seconds,
            "answer_tokens_per_s": self.answer_tokens / self.seconds,
        }
        return {**asdict(self), **rates, "share_of_limit": self.share_of_limit}


@dataclass(frozen=True)
class Throughput:
    """All runs, in order.

    `example` is the first error, if any. The weight figures are 0 without weights (the fake model).
    """

    workload: str
    runs: list[Run]
    example: str
    weight_bytes: int
    weight_bytes_per_s: float

    @property
    def median(self) -> Run:
        """Return the run of median time, the faster one of two."""
        return sorted(self.runs, key=lambda run: run.seconds)[(len(self.runs) - 1) // 2]

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "runs": [run.as_json() for run in self.runs],
            "median": self.median.as_json(),
            "first_error": self.example,
            "weight_bytes": self.weight_bytes,
            "weight_bytes_per_s": self.weight_bytes_per_s,
        }


def measure(subject: Subject, prompts: list[Prompt], workload: str, machine: Machine, repeat: int) -> Throughput:
    """Run the prompts `repeat` times, each time from the initial state. Raises InputError if none can run."""
    llm, cost = subject.llm, subject.cost
    weight_bytes = 0 if cost is None else cost.weight_bytes(1)
    rates = None if cost is None else MachineRates.of(machine, cost)
    _drain(llm, map(_shortened, prompts[:_WARM_PROMPTS]))
    runs, example = [], ""
    for _ in range(repeat):
        run, example = _run(llm, prompts)
        if cost is not None and rates is not None:
            run = replace(run, limit=limit_of(cost, llm.steps, rates))
        if run.errors == len(prompts):
            raise InputError(f"{workload}: every request fails: {example}")
        runs.append(run)
    return Throughput(workload, runs, example, weight_bytes, 0.0 if rates is None else rates.bytes)


def _run(llm: MeasuredLLM, prompts: list[Prompt]) -> tuple[Run, str]:
    llm.restart()
    start = perf_counter()
    prompt_tokens, answer_tokens, errors = _drain(llm, prompts)
    seconds = perf_counter() - start
    stats, steps = llm.stats(), llm.steps
    run = Run(
        seconds=seconds,
        runner_s=sum(step.seconds for step in steps),
        prompt_tokens=prompt_tokens,
        computed_tokens=stats.prompt_tokens_computed,
        reused_tokens=stats.prompt_tokens_reused,
        generated_tokens=stats.generated_tokens,
        draft_tokens=stats.draft_tokens,
        accepted_tokens=stats.accepted_tokens,
        answer_tokens=answer_tokens,
        steps=len(steps),
        mean_batch=sum(step.sequences for step in steps) / max(1, len(steps)),
        preemptions=stats.preemptions,
        errors=len(errors),
    )
    return run, errors[0] if errors else ""


def _drain(llm: MeasuredLLM, prompts: Iterable[Prompt]) -> tuple[int, int, list[str]]:
    """Run all prompts; return their prompt tokens, their output tokens, and the errors of failed ones."""
    prompt_tokens = answer_tokens = 0
    errors = []
    for completion in llm.run_prompts(prompts):
        if completion.error is not None:
            errors.append(str(completion.error))
            continue
        prompt_tokens += len(completion.prompt_token_ids)
        answer_tokens += sum(len(output.token_ids) for output in completion.outputs)
    return prompt_tokens, answer_tokens, errors


def _shortened(prompt: Prompt) -> Prompt:
    return replace(prompt, params=SamplingParams(temperature=0.0, max_tokens=_WARM_TOKENS))


def describe(found: Throughput, machine: Machine) -> str:
    run, runs = found.median, found.runs
    of = (
        f"median of {len(runs)}, fastest {number(min(each.seconds for each in runs))} s" if len(runs) > 1 else "one run"
    )
    total = run.prompt_tokens + run.answer_tokens
    lines = [
        ("workload", found.workload),
        (
            "prompts",
            f"{run.prompt_tokens:,} tokens, {run.computed_tokens:,} computed, {run.reused_tokens:,} from the cache",
        ),
        ("answers", f"{run.answer_tokens:,} tokens, {run.generated_tokens:,} generated"),
        ("drafts", f"{run.draft_tokens:,} tokens proposed, {run.accepted_tokens:,} accepted"),
        ("time", f"{number(run.seconds)} s ({of}), {run.runner_s / run.seconds:.1%} of it in the model"),
        (
            "rate",
            f"{number(total / run.seconds)} tokens/s: {number(run.prompt_tokens / run.seconds)} in, "
            f"{number(run.answer_tokens / run.seconds)} out",
        ),
        ("steps", f"{run.steps:,}, with {number(run.mean_batch)} sequences on average; {run.preemptions} preemptions"),
    ]
    if run.limit is not None:
        lines += _limit_lines(found, run, run.limit, machine)
    if run.errors:
        lines.append(("errors", f"{run.errors:,} requests failed, the first: {found.example}"))
    return facts(lines)


def _limit_lines(found: Throughput, run: Run, limit: Limit, machine: Machine) -> list[tuple[str, str]]:
    weights = f"{found.weight_bytes / 1e6:,.0f} MB at {found.weight_bytes_per_s / 1e9:,.1f} GB/s"
    rate = machine.dtype if machine.int8_per_s is None else f"int8 and {machine.dtype}"
    return [
        ("limit", f"{number(limit.seconds)} s for the linear layers alone, in each step the longer of"),
        ("", f"their operations at the measured {rate} GEMM rate ({number(limit.arithmetic_s)} s in all)"),
        ("", f"and one read of their weights, {weights} ({number(limit.weights_s)} s in all)"),
        ("share", f"{run.share_of_limit:.1%} of that limit"),
    ]
