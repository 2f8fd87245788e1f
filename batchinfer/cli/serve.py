"""`batchinfer serve`: options in, an endpoint while it is needed, its command's exit code out.

Reads BATCHINFER_API_KEY.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from batchinfer.cli.options import Settings, model_spec
from batchinfer.errors import ModelError, UsageError
from batchinfer.log import log

if TYPE_CHECKING:
    from batchinfer.server.frontend import ServedModel
    from batchinfer.server.lifecycle import Command
    from batchinfer.spec import JobSpec

T = TypeVar("T")

_MORE_SETTINGS = ("sampling.", "prompt.chat_template", "prompt.chat_template_kwargs", "prompt.special_tokens")
_PORT = 8000
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


@dataclass(frozen=True)
class ServeOptions:
    """Options of `serve`."""

    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, URL or Hugging Face id.", show_default=False)
    ]
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- COMMAND ARGS",
            help="Run it with the endpoint, then stop. {base_url}, {model} and {port} are replaced.",
            show_default=False,
        ),
    ] = None
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", min=0, max=65535, help="0: any free port. Default: 8000; with a command, any free port."
        ),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Key that clients must send.", envvar="BATCHINFER_API_KEY", show_default=False
        ),
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Model name for clients; may be repeated. Default: MODEL."),
    ] = None
    max_lifetime: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.0, help="Stop after this time in any case.")
    ] = None
    idle_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.0, help="Stop after this time without a request.")
    ] = None
    max_waiting: Annotated[
        int, typer.Option(metavar="N", min=0, help="Limit of waiting sequences; beyond it clients get 429.")
    ] = 2048
    max_body_mb: Annotated[
        int, typer.Option("--max-body-mb", metavar="N", min=1, help="Largest request body, in MiB; beyond it 413.")
    ] = 32
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory of uploaded files and batches. Default: in the cache directory, by port; with --port 0 "
            "a temporary one.",
            show_default=False,
        ),
    ] = None
    settings: Settings = ()  # type: ignore[assignment]  # dataclass defaults must not be lists


def serve(options: ServeOptions) -> None:
    _check_packages()
    spec = model_spec(options.model, list(options.settings), _MORE_SETTINGS)
    from batchinfer.batches.catalog import Catalog
    from batchinfer.batches.runner import BatchRunner
    from batchinfer.server.app import AppOptions, create_app
    from batchinfer.server.batch_routes import make_batch_router
    from batchinfer.server.frontend import Frontend
    from batchinfer.server.lifecycle import Endpoint, ServeLimits, listen
    from batchinfer.server.metrics import Metrics
    from batchinfer.server.shared_engine import SharedAnswerer

    port = options.port if options.port is not None else 0 if options.command else _PORT
    if options.api_key == "":
        raise UsageError("--api-key is empty: set a key, or omit it")
    if options.api_key is None and options.host not in _LOOPBACK:
        log.warning(
            "everybody who can connect to this host may use the endpoint: --api-key is not set", host=options.host
        )
    sock = listen(options.host, port)  # before the model is loaded, so that a used port is reported at once
    model = _in_thread(lambda: _load(spec, options.served_model_name))
    frontend = Frontend(model, Metrics(), options.max_waiting)
    catalog = Catalog(options.data_dir or _data_dir(spec, port))
    batches = BatchRunner(catalog, SharedAnswerer(frontend), _job_values(spec), model.names)
    routers, uploads = (make_batch_router(catalog, batches),), ("/v1/files",)
    gate = create_app(frontend, AppOptions(options.api_key, options.max_body_mb << 20, routers, uploads, batches.start))
    endpoint = Endpoint(gate, frontend, sock, ServeLimits(options.max_lifetime, options.idle_timeout), batches)
    try:
        code = endpoint.serve(_command(options, model))
    finally:
        catalog.close()
    if code:
        raise typer.Exit(code)


def _data_dir(spec: JobSpec, port: int) -> Path:
    """Return a folder per port, which only one endpoint can own; for any free port, a temporary one."""
    from batchinfer.io.fetch import cache_folder

    if port == 0:
        folder = tempfile.mkdtemp(prefix="batchinfer-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)
    return cache_folder(spec.storage) / f"endpoint-{port}"


def _job_values(spec: JobSpec) -> dict[str, Any]:
    """Return the job keys that all batches share."""
    values = spec.model_dump(exclude_none=True, include={"model", "tokenizer", "engine", "storage", "fake", "sampling"})
    return {name: value for name, value in values.items() if value}


def _check_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs more packages: pip install {' '.join(missing)}")


def _load(spec: JobSpec, names: list[str] | None) -> ServedModel:
    from batchinfer.io.fetch import fetch_model
    from batchinfer.llm import LLM
    from batchinfer.server.frontend import ServedModel
    from batchinfer.spec import FAKE_MODEL

    files = None if spec.model == FAKE_MODEL else fetch_model(spec.model, spec.storage)
    parts = LLM.from_spec(spec, files).parts()
    if not parts.limits.context > 1:
        raise ModelError(f"{spec.model}: its context of {parts.limits.context} tokens has no room for an answer")
    prompt = spec.prompt
    template = (prompt.chat_template if prompt else None) or parts.tokenizer.chat_template
    template_options = (prompt.chat_template_kwargs, prompt.special_tokens) if prompt else ()
    return ServedModel(parts, tuple(dict.fromkeys(names or [spec.model])), template, *template_options)


def _in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends with it, together with the thread's pool of OpenMP workers.

    A pool kept by the main thread would count in addition to the engine thread's own: with more workers than cores,
    libgomp makes them sleep at every barrier instead of spinning, and steps take a tenth longer.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="batchinfer-load", daemon=True).start()
    return done.result()


def _command(options: ServeOptions, model: ServedModel) -> Command | None:
    from batchinfer.server.lifecycle import Command

    if not options.command:
        return None
    return Command(options.command, model.names[0], options.api_key, os.environ)
