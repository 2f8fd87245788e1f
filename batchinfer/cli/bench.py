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
    from batchinfer.bench.processors import Processor
    from batchinfer.bench.session import Session
    from batchinfer.bench.step_work import Formats
    from batchinfer.bench.workload import Synthetic, Workload, WorkloadFile

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
WorkloadLines = Annotated[
    Path | None, typer.Option(metavar="FILE", help='Lines {"id", "ids", "max_tokens"}: token ids, greedy answers.')
]
Requests = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Number of requests. Default: 128, or the whole workload file.")
]
SharedPrefix = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Length of the prefix that all prompts share, part of their length."),
]
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
    workload: WorkloadLines = None
    requests: Requests = None
    input_tokens: Tokens = None
    output_tokens: Answers = None
    shared_prefix: SharedPrefix = None
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

    is_job = options.target.endswith(JOB_FILES) and "://" not in options.target
    if is_job:
        _refuse_random(options, "a job has its own input", options.workload)
        return _job_and_subject(options)
    workload = _token_workload(options)
    return workload, load_subject(model_spec(options.target, list(options.settings)))


def _token_workload(options: ThroughputOptions | RooflineOptions) -> Synthetic | WorkloadFile:
    """Return the workload file, or random tokens."""
    from batchinfer.bench.workload import WorkloadFile

    if options.workload is None:
        return _synthetic(options, options.requests, options.shared_prefix)
    _refuse_random(options, "a workload file has its own prompts")
    return WorkloadFile.read(options.workload, options.requests)


def _refuse_random(options: ThroughputOptions | RooflineOptions, instead: str, workload: Path | None = None) -> None:
    """Raise UsageError if an option of random tokens is given, or a workload file."""
    made_up = {
        "--input-tokens": options.input_tokens,
        "--output-tokens": options.output_tokens,
        "--shared-prefix": options.shared_prefix,
        "--seed": options.seed,
        "--workload": workload,
    }
    given = [name for name, value in made_up.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]}: {instead}; leave it out")


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
    options: ThroughputOptions | LatencyOptions | RooflineOptions,
    requests: int | None = None,
    shared_prefix: int | None = None,
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
    from batchinfer.bench import device_host
    from batchinfer.bench import host as measurement
    from batchinfer.bench.json_file import json_file
    from batchinfer.ops.resources import use_threads

    with json_file(json) as write:
        numbers = measurement.parse_sequences(sequences)
        use_threads(1)
        session = _begin()
        found = measurement.measure(numbers)
        print_text(measurement.describe(found))
        beside = device_host.measure(numbers)
        print_text("\nbeside a pretend device\n" + device_host.describe(beside))
        results = {"results": [one.as_json() for one in found], "device": [one.as_json() for one in beside]}
        _finish(write, "host", session, results)


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


# -- roofline ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RooflineOptions:
    """Options of `bench roofline`."""

    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Preset such as qwen3-0.6b, config.json, directory, .gguf file, URL or Hugging Face id.",
            show_default=False,
        ),
    ]
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="Such as h200; or cpu: this machine, as measured.", show_default=False)
    ]
    workload: WorkloadLines = None
    requests: Requests = None
    input_tokens: Tokens = None
    output_tokens: Answers = None
    shared_prefix: SharedPrefix = None
    seed: Seed = None
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Weights and activations (float8, int8: the layers' matrices). Default: bfloat16; on the CPU float32.",
        ),
    ] = None
    kv_cache_dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Keys and values. Default: as activations.")
    ] = None
    kv_cache_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=32, help="KV cache size. Default: what fits 0.9 of the memory.")
    ] = None
    max_num_seqs: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences that run concurrently.")] = 256
    max_step_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens per step.")] = 2048
    json: JsonFile = None


@bench.command(help=pages.BENCH_ROOFLINE)
@takes(RooflineOptions)
def roofline(options: RooflineOptions) -> None:
    from batchinfer.bench import roofline as computation
    from batchinfer.bench.json_file import json_file
    from batchinfer.bench.presets import find_config
    from batchinfer.bench.processors import CPU, find_gpu

    with json_file(options.json) as write:
        gpu = None if options.gpu == CPU else find_gpu(options.gpu)
        formats = computation.parse_formats(options.dtype, options.kv_cache_dtype, gpu)
        workload = _token_workload(options)
        config = find_config(options.target, with_cache(model_spec("fake", [])).storage)
        prompts = workload.token_prompts(config.vocab_size, config.context_tokens)
        limits = computation.Limits(options.max_num_seqs, options.max_step_tokens, options.kv_cache_tokens)
        processor, session = (gpu, None) if gpu is not None else _measure_cpu(formats)
        found = computation.compute(options.target, config, formats, processor, prompts, limits)
        print_text(computation.describe(found, workload.describe()))
        _finish(write, "roofline", session, found.as_json())


def _measure_cpu(formats: Formats) -> tuple[Processor, Session]:
    """Measure this machine on the threads that the engine would use, and print it."""
    import torch

    from batchinfer.bench.machine import describe
    from batchinfer.bench.processors import this_cpu
    from batchinfer.bench.session import Session
    from batchinfer.ops.resources import use_threads

    use_threads(None)
    session = Session(getattr(torch, formats.activation_dtype), formats.linear_dtype == "int8")
    print_text(describe(session.machine) + "\n")
    return this_cpu(session.machine), session


# -- all -----------------------------------------------------------------------------------------------------------


def _begin(subject: Subject | None = None) -> Session:
    """Measure the machine, and print it."""
    from batchinfer.bench.machine import describe
    from batchinfer.bench.session import Session

    cost = None if subject is None else subject.cost
    session = Session() if subject is None else Session(subject.dtype, cost is not None and cost.quantized)
    print_text(describe(session.machine) + "\n")
    return session


def _finish(write: Write, command: str, session: Session | None, found: dict[str, Any]) -> None:
    """Print the notes about the machine after the measurement, and write the JSON file. None: nothing was measured."""
    values, notes = ({}, []) if session is None else session.end()
    if notes:
        print_text("\n" + "\n".join(f"note: {note}" for note in notes))
    write({"command": command, **values, **found})
