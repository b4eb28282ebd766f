"""Progress of jobs as ephemeral frames, made in each worker from the log itself.

A bulk event names its job; seeing one pass, the worker looks the job up and tells its watchers. So progress never runs
ahead of the rows, costs the bus nothing and works without one. At most five frames a second and job, the last of which
shows the job's end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import structlog

from core.errors import Unavailable
from realtime.fanout.hub import Hub
from realtime.wire import frames
from repository import jobs
from repository.engine.database import Database
from repository.engine.events import Event

INTERVAL_SECONDS = 0.2

log = structlog.get_logger("progress")


class Progress:
    """`see` is a listener of the feed; `run` sends until cancelled."""

    def __init__(self, database: Database, hub: Hub) -> None:
        self._database = database
        self._hub = hub
        self._moved: set[str] = set()
        self._wake = asyncio.Event()

    def see(self, events: Sequence[Event]) -> None:
        """Progress is for show: whatever is wrong with it keeps no event from anybody."""
        try:
            self._see(events)
        except Exception as error:
            log.error("progress cannot be shown", exc_info=error)

    def _see(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.topic == "jobs" and event.entity_id is not None and event.operation == "update":
                job_id: str | None = event.entity_id
            elif event.operation == "add_bulk":
                job_id = frames.job_of(event)
            else:
                continue
            if job_id is not None and self._hub.watches("jobs"):
                self._moved.add(job_id)
                self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            moved, self._moved = self._moved, set()
            for job_id in moved:
                try:
                    job = await jobs.find(self._database, job_id)
                except Unavailable:
                    continue  # the next chunk tries again
                except Exception as error:
                    log.error("looking up a job failed", exc_info=error)
                    continue
                if job is not None:
                    self._hub.send_ephemeral("jobs", job, partial(frames.progress, job))
            await asyncio.sleep(INTERVAL_SECONDS)
