"""Application with the batch routes only, over the fake model."""

from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from batchinfer.batches.catalog import Catalog
from batchinfer.batches.runner import BatchRunner
from batchinfer.llm import LLM
from batchinfer.openai.request_models import validation_error
from batchinfer.server.batch_routes import make_batch_router
from batchinfer.server.errors import ApiError, from_row_error
from batchinfer.spec import FakeSpec

MODEL = "fake"
JOB = {"model": "fake", "fake": {"answer_tokens": [2, 12]}, "engine": {"max_num_seqs": 32, "max_model_len": 4096}}


def fake_llm(step_s=0.0):
    return LLM("fake", fake=FakeSpec(answer_tokens=(2, 12), step_s=step_s), **JOB["engine"])


def make_app(root, llm=None, grace_s=5.0, **options):
    """Return the app; `app.state` has catalog and runner. Closing its lifespan stops the runner."""
    catalog = Catalog(Path(root))
    runner = BatchRunner(catalog, llm or fake_llm(), JOB, {MODEL})

    @asynccontextmanager
    async def lifespan(app):
        runner.start()
        yield
        runner.close(grace_s)
        catalog.close()

    app = FastAPI(lifespan=lifespan)
    app.state.catalog, app.state.runner = catalog, runner
    app.include_router(make_batch_router(catalog, runner, **options))

    @app.exception_handler(ApiError)
    async def api_error(request, error):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(request, error):
        return from_row_error(validation_error(error.errors())).response()

    return app
