"""Job progress as ephemeral frames, which each worker sends after the job's events.

A bulk event names its job, and updates of a job are events of the topic `jobs`. After each such event, the worker reads
the job's row and sends it to the subscriptions to `jobs`. Progress therefore never runs ahead of the rows, adds nothing
to the bus and works without a shared bus. A job has at most five frames a second, and the last one shows that the job
has ended.
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
    """One per process. `on_events` is a feed listener; `run` sends frames until cancelled."""

    def __init__(self, database: Database, hub: Hub) -> None:
        self._database = database
        self._hub = hub
        self._changed_jobs: set[str] = set()
        self._wake = asyncio.Event()

    def on_events(self, events: Sequence[Event]) -> None:
        """Note which jobs have changed. Never raises: a failure here must not keep events from the other listeners."""
        try:
            self._note_jobs(events)
        except Exception as error:
            log.error("job progress not noted", exc_info=error)

    def _note_jobs(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.topic == "jobs" and event.entity_id is not None and event.operation == "update":
                job_id: str | None = event.entity_id
            elif event.operation.endswith("_bulk"):
                job_id = frames.job_of(event)
            else:
                continue
            if job_id is not None and self._hub.has_subscribers("jobs"):
                self._changed_jobs.add(job_id)
                self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            changed, self._changed_jobs = self._changed_jobs, set()
            for job_id in changed:
                try:
                    job = await jobs.find(self._database, job_id)
                    if job is not None:
                        self._hub.send_ephemeral("jobs", job, partial(frames.progress, job))
                except Unavailable:
                    # Read the job again, because no further event may follow its last one.
                    self._changed_jobs.add(job_id)
                    self._wake.set()
                except Exception as error:
                    # An error here must not end the process, which also serves clients.
                    if await self._database.schema.explain(error) is None:
                        log.error("job progress not sent", exc_info=error)
            await asyncio.sleep(INTERVAL_SECONDS)
