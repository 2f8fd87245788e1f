"""Command line: options and environment in, exit codes out. Commands import what they need when they run.

The environment is read only here, in `cli.options` and in `cli.serve`: the platform variables of an array job,
BATCHINFER_SHARD_INDEX and BATCHINFER_SHARD_COUNT, BATCHINFER_CACHE, BATCHINFER_API_KEY.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchinfer.cli import help as pages
from batchinfer.cli.bench import bench
from batchinfer.cli.options import Settings, load_job, located, parse_settings, print_text, takes
from batchinfer.cli.progress import choose_progress, summary
from batchinfer.cli.serve import ServeOptions, serve
from batchinfer.errors import EXIT_OK, BatchInferError, SpecError, UsageError
from batchinfer.log import log

if TYPE_CHECKING:
    from batchinfer.job.drain import Drain
    from batchinfer.job.report import Report
    from batchinfer.job.shard import Shard
    from batchinfer.spec import JobSpec, StorageSpec

# Spins of an idle thread of torch's pool (GNU OpenMP) before it sleeps. On two cores, GEMMs of 32 rows
# take 15 ms with the default and with this; beside one busy process 370 ms with the default and 72 ms with this.
SPIN = ("GOMP_SPINCOUNT", "10000")
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
_COMMANDS_WITH_LOG = ("run", "retry", "serve")
_LEVELS = ("debug", "info", "warning", "error")
_JOB_FILES = (".yaml", ".yml", ".json")
_PIPED_COLUMNS = 100  # text width without a terminal

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Where = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="Output directory or URL, or its job file.", show_default=False)
]
ShardFlag = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Process only share I (from 0) of N. Default: the scheduler's variables."),
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after N selected rows (input.limit).")]
Rehearse = Annotated[
    bool, typer.Option("--rehearse", help="Fake answers, into <output.path>-rehearsal; loads no model.")
]
SpoolDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Local disk for unfinished parts. Default: a temporary directory.")
]

app = typer.Typer(
    name="batchinfer",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(bench, name="bench")
app.command(epilog=pages.EXIT_CODES, help=pages.SERVE)(takes(ServeOptions)(serve))


def process() -> None:
    """Run `main`, then exit without interpreter shutdown.

    A read-ahead thread may be inside C++ code, and shutting the interpreter down under it would abort the process.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader closed the pipe
            stream.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error becomes one message on stderr."""
    os.environ.setdefault(*SPIN)  # before torch is loaded
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # rows may hold characters that the locale lacks
    try:
        code = app(args=arguments, prog_name="batchinfer", standalone_mode=False)
    except BatchInferError as error:
        values = {"error": error.name, "exit_code": error.exit_code} if log.as_json else {}
        log.error(str(error), **values)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        return _usage_error(error) or _bug(error)
    return int(code or EXIT_OK)


def _usage_error(error: Exception) -> int:
    """Print a usage error and return its exit code; return 0 if `error` is something else.

    Depending on its version, Typer bundles click or imports it; the usage errors of both have these attributes.
    """
    describe, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
    if describe is None:
        return 0
    message = describe().rstrip(".")
    command = context.command_path if context is not None else "batchinfer"
    if getattr(error, "option_name", "") in ("--log-level", "--log-json", "--no-log-json"):
        message += "; it goes before the command: batchinfer --log-level debug run JOB.yaml"
    sys.stderr.write(f"error: {message}\nSee '{command} --help'.\n")
    return UsageError.exit_code


def _bug(error: Exception) -> int:
    traceback.print_exception(error)
    sys.stderr.write(
        "error: this is a bug in batchinfer; nothing that was committed is lost. "
        "Please report the lines above together with the job file.\n"
    )
    return EXIT_BUG


def _print_version(requested: bool) -> None:
    if requested:
        from batchinfer import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback(epilog=pages.EXIT_CODES, help=pages.OVERVIEW)
def _options(
    context: typer.Context,
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.", envvar="BATCHINFER_LOG_LEVEL")
    ] = "info",
    log_json: Annotated[
        bool | None, typer.Option(help="Log JSON lines, or text. Default: text on a terminal, else JSON.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if log_json is None and context.invoked_subcommand not in _COMMANDS_WITH_LOG:
        log_json = False  # interactive commands log text
    known = log_level in _LEVELS
    log.configure(log_level if known else "info", log_json)
    if not known:
        raise UsageError(f"--log-level: {log_level!r} is not one of {', '.join(_LEVELS)}")


def _job_at(output: str, settings: list[str]) -> JobSpec | None:
    """Load the job if `output` is a job file."""
    is_file = output.endswith(_JOB_FILES) and "://" not in output
    return load_job(Path(output), settings) if is_file else None


def _locate(output: str, settings: list[str]) -> tuple[str, StorageSpec]:
    """Return the URL and storage options of an output, from its job file or from its URL and `--set storage.…`."""
    from batchinfer.spec import StorageSpec, parse_section

    spec = _job_at(output, settings)
    if spec is not None:
        return spec.output.path, spec.storage
    values = parse_settings(settings)
    known = {f"storage.{name}" for name in StorageSpec.model_fields}
    for key in values:
        if key not in known:
            raise UsageError(f"--set {key}: with an output URL only these can be set: {', '.join(sorted(known))}")
    given = {key.removeprefix("storage."): value for key, value in values.items()}
    try:
        return output, parse_section(StorageSpec, given, lambda _: "--set storage")
    except SpecError as error:
        raise UsageError(str(error)) from None


@dataclass(frozen=True)
class JobOptions:
    """Options of `run` and `retry`."""

    job: JobFile
    settings: Settings = ()  # type: ignore[assignment]  # dataclass defaults must not be lists
    shard: ShardFlag = None
    limit: Limit = None
    rehearse: Rehearse = False
    spool_dir: SpoolDir = None


@app.command(epilog=pages.EXIT_CODES, help=pages.RUN)
@takes(JobOptions)
def run(options: JobOptions) -> None:
    drain = _install_drain()
    from batchinfer.job.run import run_job

    _run_job_command(run_job, options, drain)


@app.command(epilog=pages.EXIT_CODES, help=pages.RETRY)
@takes(JobOptions)
def retry(options: JobOptions) -> None:
    drain = _install_drain()
    from batchinfer.job.retry import retry_job

    _run_job_command(retry_job, options, drain)


def _run_job_command(job: Callable[..., Report], options: JobOptions, drain: Drain) -> None:
    spec = load_job(options.job, list(options.settings), options.limit, options.rehearse)
    shard = _resolve_shard(options.shard)
    with located(options.job, options.settings):
        report = job(spec, shard=shard, spool_dir=options.spool_dir, drain=drain, progress=choose_progress())
    if log.as_json:
        log.info("done", output=report.output, rows=report.rows, tokens=report.tokens, complete=report.complete)
    else:
        print_text(summary(report))


def _install_drain() -> Drain:
    """Install the signal handlers before the slow imports, which take a second."""
    from batchinfer.job.drain import Drain

    drain = Drain()
    drain.install()
    return drain


def _resolve_shard(flag: str | None) -> Shard:
    from batchinfer.job.shard import resolve_shard

    return resolve_shard(flag, os.environ)


@app.command(epilog=pages.EXIT_CODES, help=pages.PLAN)
def plan(
    job: JobFile,
    settings: Settings = [],  # noqa: B006
    limit: Limit = None,
    sample: Annotated[int, typer.Option(metavar="N", min=1, help="Rows to render and tokenize.")] = 1000,
) -> None:
    from batchinfer.job.inspect.preview import describe_preview, preview

    spec = load_job(job, settings, limit)
    with located(job, settings):
        found = preview(spec, sample)
    print_text(describe_preview(found))
    if found.conflict is not None:
        raise found.conflict


@app.command(epilog=pages.EXIT_CODES, help=pages.STATUS)
def status(
    output: Where,
    settings: Settings = [],  # noqa: B006  typer reads the default and never changes it
    shards: Annotated[int, typer.Option(metavar="N", min=1, help="Show the share of each of N workers.")] = 1,
) -> None:
    from batchinfer.job.inspect.status import describe_status, read_status
    from batchinfer.job.ledger import open_output

    print_text(describe_status(read_status(open_output(*_locate(output, settings)), shards)))


@app.command(epilog=pages.EXIT_CODES, help=pages.VERIFY)
def verify(
    output: Where,
    settings: Settings = [],  # noqa: B006
) -> None:
    from batchinfer.errors import VerifyFailed
    from batchinfer.job.inspect.verify import audit, describe_audit

    spec = _job_at(output, settings)
    url, storage = _locate(output, settings) if spec is None else (spec.output.path, spec.storage)
    found = audit(url, storage, spec)
    print_text(describe_audit(found))
    if found.differences:
        raise VerifyFailed(f"{url}: {len(found.differences)} differences")


@app.command(epilog=pages.EXIT_CODES, help=pages.SHOW)
def show(
    output: Where,
    rows: Annotated[int, typer.Option("--rows", "-n", metavar="N", min=1, help="Number of rows.")] = 5,
    errors: Annotated[bool, typer.Option("--errors", help="Only rows that failed.")] = False,
    row: Annotated[int | None, typer.Option(metavar="N", min=0, help="The row at this position of its file.")] = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    import shutil

    from batchinfer.job.inspect.show import describe_rows, pick
    from batchinfer.job.ledger import open_output

    url, storage = _locate(output, settings)
    shown = pick(open_output(url, storage), storage, rows, errors=errors, row=row)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPED_COLUMNS
    print_text(describe_rows(shown, width))
