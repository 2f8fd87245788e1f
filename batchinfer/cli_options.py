"""What commands share: the job file with `--set` on top, where its mistakes stand, and text that a reader may not want.

Reads BATCHINFER_CACHE.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchinfer.errors import UsageError, UserError

if TYPE_CHECKING:
    from batchinfer.spec import JobSpec

CACHE_VARIABLE = "BATCHINFER_CACHE"

Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the job file, e.g. engine.max_num_seqs=64."),
]


def print_text(text: str) -> None:
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader went away, as `| head` does; the exit code still says what was found, and nothing is flushed again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_job(job: Path, settings: list[str], limit: int | None = None, rehearse: bool = False) -> JobSpec:
    """The job as it will run: the file, then --set, --limit and --rehearse on top."""
    from batchinfer.spec import load_spec

    values = parse_settings(settings)
    if limit is not None:
        values["input.limit"] = limit
    spec = load_spec(job, values)
    spec = with_cache(spec)
    return _rehearsal(spec) if rehearse else spec


def with_cache(spec: JobSpec) -> JobSpec:
    """Models from URLs are copied to where the environment says, if the job does not say it."""
    cache = os.environ.get(CACHE_VARIABLE)
    if cache and spec.storage.cache is None:
        return spec.model_copy(update={"storage": spec.storage.model_copy(update={"cache": cache})})
    return spec


@contextmanager
def located(job: Path) -> Iterator[None]:
    """Mistakes that show only beside the input name file and line of their key, like those of the file alone."""
    try:
        yield
    except UserError as error:
        if not error.key:
            raise
        from batchinfer.spec import locate

        raise type(error)(f"{locate(job, error.key)}: {error}") from error


def _rehearsal(spec: JobSpec) -> JobSpec:
    """The same job with fake answers: the real output is not touched, a tokenizer on local disk is kept."""
    from batchinfer.spec import FAKE_MODEL

    local = spec.model if spec.model != FAKE_MODEL and Path(spec.model).exists() else None
    output = spec.output.model_copy(update={"path": spec.output.path.rstrip("/") + "-rehearsal"})
    return spec.model_copy(update={"model": FAKE_MODEL, "tokenizer": spec.tokenizer or local, "output": output})


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`seed=7` → {"seed": 7}. Values are YAML, as in the job file; what is not, as `{{ text }}` alone, is text."""
    import yaml

    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {setting}: must be KEY=VALUE, for example engine.max_num_seqs=64")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[key.strip()] = text
    return values
