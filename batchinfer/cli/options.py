"""Options shared by commands: the job file with `--set` applied, error locations, output for pipes.

Reads BATCHINFER_CACHE.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from batchinfer.errors import UsageError, UserError

if TYPE_CHECKING:
    from batchinfer.spec import JobSpec

CACHE_VARIABLE = "BATCHINFER_CACHE"

Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the job file, e.g. engine.max_num_seqs=64."),
]

Options = TypeVar("Options")
MODEL_SETTINGS = ("engine.", "storage.", "fake.")  # with a model alone, other keys of a job file have no meaning


def takes(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Return a decorator for a command whose options are the fields of a dataclass, passed as one value."""
    hints = get_type_hints(kind, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)  # type: ignore[arg-type]
    ]

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(kind(**values))

        command.__name__ = function.__name__
        command.__annotations__ = hints
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def print_text(text: str) -> None:
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader closed the pipe, as `| head` does: keep the exit code, and discard what would be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_job(job: Path, settings: list[str], limit: int | None = None, rehearse: bool = False) -> JobSpec:
    """Load the job file, then apply --set, --limit and --rehearse."""
    from batchinfer.spec import load_spec

    values = parse_settings(settings)
    if limit is not None:
        if "input.limit" in values:
            raise UsageError("--limit and --set input.limit are the same: use one of them")
        values["input.limit"] = limit
    spec = load_spec(job, values)
    spec = with_cache(spec)
    return _rehearsal(spec) if rehearse else spec


def with_cache(spec: JobSpec) -> JobSpec:
    """Set the model cache directory from the environment, unless the job sets it."""
    cache = os.environ.get(CACHE_VARIABLE)
    if cache and spec.storage.cache is None:
        return spec.model_copy(update={"storage": spec.storage.model_copy(update={"cache": cache})})
    return spec


@contextmanager
def located(job: Path, settings: Sequence[str]) -> Iterator[None]:
    """Add file and line of their key to errors that are only detected once the input is read."""
    try:
        yield
    except UserError as error:
        if not error.key:
            raise
        from batchinfer.spec import locate

        keys = list(parse_settings(list(settings)))
        raise type(error)(f"{locate(job, error.key, keys)}: {error}") from error


def _rehearsal(spec: JobSpec) -> JobSpec:
    """Return the job with the fake model and its own output path; a tokenizer on local disk is kept."""
    from batchinfer.io.filesystem import local_path
    from batchinfer.spec import FAKE_MODEL

    path = local_path(spec.model) if spec.model != FAKE_MODEL else None
    local = spec.model if path is not None and path.exists() else None
    output = spec.output.model_copy(update={"path": spec.output.path.rstrip("/") + "-rehearsal"})
    return spec.model_copy(update={"model": FAKE_MODEL, "tokenizer": spec.tokenizer or local, "output": output})


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parse `seed=7` to {"seed": 7}. Values are YAML, as in the job file; invalid YAML such as `{{ text }}` is text."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {setting}: must be KEY=VALUE, for example engine.max_num_seqs=64")
        if key in values or any(other.startswith(f"{key}.") for other in values):
            raise UsageError(f"--set {key}: given twice, or after a key below it")
        values[key] = _setting(key, text)
    return values


def _setting(key: str, text: str) -> Any:
    from batchinfer.yaml_text import NotYaml, read_yaml

    try:
        document = read_yaml(text, f"--set {key}")
    except NotYaml:
        return text
    # comments are not useful here, so `#` is text; neither is a list of one null, so `-` is standard input
    cut = text.strip() == "-" or () in document.comments or (document.value is None and text.lstrip().startswith("#"))
    return text if cut else document.value


def model_spec(model: str, settings: list[str], more: Sequence[str] = ()) -> JobSpec:
    """Return a job with a model and its settings only; `more` are further allowed keys or sections."""
    from batchinfer.spec import parse_spec

    values: dict[str, Any] = {
        "model": model,
        "input": {"path": "-"},
        "prompt": {"column": "ids"},
        "output": {"path": "-"},
    }
    known = (*MODEL_SETTINGS, *more)
    for key, value in parse_settings(settings).items():
        section, dot, name = key.partition(".")
        if key == "tokenizer":
            values[key] = value
        elif f"{section}{dot}" in known or key in known:
            values.setdefault(section, {})[name] = value
        else:
            listed = ", ".join(f"{name}*" if name.endswith(".") else name for name in ("tokenizer", *known))
            raise UsageError(f"--set {key}: with a model only these can be set: {listed}")
    return with_cache(parse_spec(values, "--set"))
