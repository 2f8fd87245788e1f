"""`batchinfer` with one more route, for the soak: what the process holds. Takes the command's arguments."""

import asyncio
import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

from fastapi import APIRouter

from batchinfer.cli.main import process
from batchinfer.server import app

PATH = "/soak/state"


def create_app(frontend, options=None):
    router = APIRouter()

    @router.get(PATH)
    async def state():
        gc.collect()
        problem = await asyncio.wrap_future(frontend.engine.call(_integrity))
        return {
            "integrity": problem,
            "sequences": frontend.engine.snapshot.running + frontend.engine.snapshot.waiting,
            "samples": frontend.open_samples,
            "reported": len(frontend.engine._live),
            "tasks": len(asyncio.all_tasks()),
            "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            "objects": len(gc.get_objects()),
            "rss_mib": _rss_mib(),
        }

    options = options or app.AppOptions()
    return _create_app(frontend, replace(options, routers=(*options.routers, router)))


def _integrity(engine):
    try:
        engine.scheduler.check_integrity()
    except AssertionError as error:
        return str(error)
    return ""


def _rss_mib():
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


_create_app, app.create_app = app.create_app, create_app

if __name__ == "__main__":
    process()
