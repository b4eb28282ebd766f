"""Run the service as `python main.py` does, while a probe in the event loop writes measurements to a file.

The probe sleeps for a millisecond at a time. If it wakes late, the loop was blocked, or the machine was running other
processes. Measure on a quiet machine to exclude the latter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn

import main
from core import logs
from core.settings import load_settings
from server import serving

PROBE_SECONDS = 0.001


async def probe(path: Path) -> None:
    """Keep the file `path` up to date with the longest pauses of the loop, in milliseconds, and the memory in use."""
    worst: list[float] = []
    written = time.monotonic()
    while True:
        before = time.monotonic()
        await asyncio.sleep(PROBE_SECONDS)
        late = (time.monotonic() - before - PROBE_SECONDS) * 1000
        if late > 5:
            worst.append(round(late, 1))
            worst = sorted(worst, reverse=True)[:20]
        if time.monotonic() - written > 0.25:
            written = time.monotonic()
            rss = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            path.write_text(json.dumps({"worst_ms": worst, "rss": rss}))


def serve(path: Path) -> None:
    settings = load_settings()
    logs.configure(settings.log_format, settings.log_level)
    app = main.build_app(settings)
    inner: Any = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app_: Any) -> AsyncIterator[Mapping[str, Any] | None]:
        async with inner(app_) as state:
            watching = asyncio.create_task(probe(path))
            yield state
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    router: Any = app.router
    router.lifespan_context = lifespan
    uvicorn.Server(serving.server_config(settings, app)).run(sockets=[serving.listen(settings)])


if __name__ == "__main__":
    os.environ.setdefault("LOG_LEVEL", "warning")
    serve(Path(sys.argv[1]))
