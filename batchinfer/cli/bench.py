"""`batchinfer bench`: options in, tables on stdout, JSON into a file. The measurements are in `batchinfer.bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchinfer.cli import help as pages
from batchinfer.cli.options import Settings, load_job, located, model_spec, print_text, takes, with_cache
from batchinfer.errors import UsageError

if TYPE_CHECKING:
    from batchinfer.bench.json_file import Write
    from batchinfer.bench.measured import Subject
    from batchinfer.bench.session import Session
    from batchinfer.bench.workload import Synthetic, Workload

JOB_FILES = (".yaml", ".yml", ".json")
_JOB_ROWS = 128  # default number of a job's rows

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, URL or Hugging Face id.", show_default=False)
]
ModelOrJob = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Directory, .gguf file, URL or Hugging Face id; or a job file, for its input.",
        show_default=False,
    ),
]
Tokens = Annotated[str | None, typer.Option(metavar="N|LOW-HIGH", help="Tokens per prompt, random ids. Default: 128.")]
Answers = Annotated[
    str | None, typer.Option(metavar="N|LOW-HIGH", help="Tokens per answer; end-of-sequence is ignored. Default: 64.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of random prompts and lengths. Default: 0.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results to FILE as JSON.")]
Threads = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="CPU threads. Default: cores, limited by the container's quota.")
]

bench = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help=pages.BENCH,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# -- throughput ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ThroughputOptions:
    """Options of `bench throughput`."""

    target: ModelOrJob
    workload: Annotated[
        Path | None, typer.Option(metavar="FILE", help='Lines {"id", "ids", "max_tokens"}: token ids, greedy answers.')
    ] = None
    requests: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of requests. Default: 128, or the whole workload file."),
    ] = None
    input_tokens: Tokens = None
    output_tokens: Answers = None
    shared_prefix: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Length of the prefix that all prompts share, part of their length."),
    ] = None
    seed: Seed = None
    settings: Settings = ()  # type: ignore[assignment]  # dataclass defaults must not be lists
    repeat: Annotated[int, typer.Option(metavar="K", min=1, help="Runs; the median counts.")] = 1
    json: JsonFile = None


@bench.command(help=pages.BENCH_THROUGHPUT)
@takes(ThroughputOptions)
def throughput(options: ThroughputOptions) -> None:
    from batchinfer.bench import throughput as measurement
    from batchinfer.bench.json_file import json_file

    with json_file(options.json) as write:
        workload, subject = _workload_and_subject(options)
        prompts = workload.prompts(subject.llm)
        session = _begin(subject)
        found = measurement.measure(subject, prompts, workload.describe(), session.machine, options.repeat)
        print_text(measurement.describe(found, session.machine))
        _finish(write, "throughput", session, {"model": options.target, **found.as_json()})


def _workload_and_subject(options: ThroughputOptions) -> tuple[Workload, Subject]:
    from batchinfer.bench.measured import load_subject
    from batchinfer.bench.workload import WorkloadFile

    made_up = {
        "--input-tokens": options.input_tokens,
        "--output-tokens": options.output_tokens,
        "--shared-prefix": options.shared_prefix,
        "--seed": options.seed,
    }
    is_job = options.target.endswith(JOB_FILES) and "://" not in options.target
    if is_job or options.workload is not None:
        instead = "a job has its own input" if is_job else "a workload file has its own prompts"
        given = [name for name, value in made_up.items() if value is not None]
        given += ["--workload"] if is_job and options.workload is not None else []
        if given:
            raise UsageError(f"{given[0]}: {instead}; leave it out")
    if is_job:
        return _job_and_subject(options)
    spec = model_spec(options.target, list(options.settings))
    if options.workload is not None:
        return WorkloadFile.read(options.workload, options.requests), load_subject(spec)
    return _synthetic(options, options.requests, options.shared_prefix), load_subject(spec)


def _job_and_subject(options: ThroughputOptions) -> tuple[Workload, Subject]:
    from batchinfer.bench.job_input import JobInput
    from batchinfer.bench.measured import load_subject

    path = Path(options.target)
    spec = load_job(path, list(options.settings))
    rows = options.requests or _JOB_ROWS
    rows = rows if spec.input.limit is None else min(rows, spec.input.limit)
    spec = spec.model_copy(update={"input": spec.input.model_copy(update={"limit": rows})})
    with located(path, options.settings):
        job = JobInput(options.target, spec)
    return job, load_subject(spec, job.files)


def _synthetic(
    options: ThroughputOptions | LatencyOptions, requests: int | None = None, shared_prefix: int | None = None
) -> Synthetic:
    from batchinfer.bench.workload import Synthetic, parse_span

    given: dict[str, Any] = {"requests": requests, "shared_prefix": shared_prefix, "seed": options.seed}
    if options.input_tokens is not None:
        given["input_tokens"] = parse_span("--input-tokens", options.input_tokens)
    if options.output_tokens is not None:
        given["output_tokens"] = parse_span("--output-tokens", options.output_tokens)
    return Synthetic(**{name: value for name, value in given.items() if value is not None})


# -- latency -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatencyOptions:
    """Options of `bench latency`."""

    target: Model
    input_tokens: Tokens = None
    output_tokens: Answers = None
    batch: Annotated[str, typer.Option(metavar="N,N", help="Concurrent requests; each number is measured in turn.")] = (
        "1,8"
    )
    seed: Seed = None
    settings: Settings = ()  # type: ignore[assignment]
    repeat: Annotated[int, typer.Option(metavar="K", min=1, help="Successive requests per slot of the batch.")] = 4
    json: JsonFile = None


@bench.command(help=pages.BENCH_LATENCY)
@takes(LatencyOptions)
def latency(options: LatencyOptions) -> None:
    from batchinfer.bench import latency as measurement
    from batchinfer.bench.json_file import json_file
    from batchinfer.bench.measured import load_subject

    with json_file(options.json) as write:
        batches = measurement.parse_batches(options.batch)
        plan = measurement.Plan(_synthetic(options), batches, options.repeat)
        subject = load_subject(model_spec(options.target, list(options.settings)))
        measurement.check(subject.llm, plan)
        session = _begin(subject)
        found = [measurement.measure(subject, plan, batch, session.machine) for batch in batches]
        print_text(measurement.describe(found))
        shape = {"input_tokens": list(plan.shape.input_tokens), "output_tokens": list(plan.shape.output_tokens)}
        results = [measurement.as_json(one) for one in found]
        _finish(write, "latency", session, {"model": options.target, **shape, "results": results})


# -- host and kernels ----------------------------------------------------------------------------------------------


@bench.command(help=pages.BENCH_HOST)
def host(
    sequences: Annotated[
        str, typer.Option(metavar="N,N", help="Concurrent sequences; the numbers are measured in turns.")
    ] = "64,256,1024,4096",
    json: JsonFile = None,
) -> None:
    from batchinfer.bench import host as measurement
    from batchinfer.bench.json_file import json_file
    from batchinfer.ops.resources import use_threads

    with json_file(json) as write:
        numbers = measurement.parse_sequences(sequences)
        use_threads(1)
        session = _begin()
        found = measurement.measure(numbers)
        print_text(measurement.describe(found))
        _finish(write, "host", session, {"results": [one.as_json() for one in found]})


@bench.command(help=pages.BENCH_KERNELS)
def kernels(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model whose shapes to measure. Default: SmolLM2-135M.")
    ] = None,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    from batchinfer.bench import kernels as measurement
    from batchinfer.bench.json_file import json_file
    from batchinfer.ops.resources import use_threads

    with json_file(json) as write:
        shapes = measurement.shapes_of(model, with_cache(model_spec(model, [])).storage) if model else None
        use_threads(threads)
        session = _begin()
        found = list(measurement.measure(shapes or measurement.Shapes(), session.machine))
        print_text(measurement.describe(found))
        results = [one.as_json() for one in found]
        _finish(write, "kernels", session, {"shapes": (shapes or measurement.Shapes()).name, "results": results})


# -- all -----------------------------------------------------------------------------------------------------------


def _begin(subject: Subject | None = None) -> Session:
    """Measure the machine, and print it."""
    from batchinfer.bench.machine import describe
    from batchinfer.bench.session import Session

    cost = None if subject is None else subject.cost
    session = Session() if subject is None else Session(subject.dtype, cost is not None and cost.quantized)
    print_text(describe(session.machine) + "\n")
    return session


def _finish(write: Write, command: str, session: Session, found: dict[str, Any]) -> None:
    """Print the notes about the machine after the measurement, and write the JSON file."""
    values, notes = session.end()
    if notes:
        print_text("\n" + "\n".join(f"note: {note}" for note in notes))
    write({"command": command, **values, **found})
