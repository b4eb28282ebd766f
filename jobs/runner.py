"""The runner: claims jobs and works on them chunk by chunk, a few jobs at a time in each worker.

Rules:
- One transaction stores a chunk's rows, its event and the job's `done`. When a worker is killed at any point, the job
  continues after its last stored chunk in the first worker that claims it once the lease has expired. On shutdown, the
  leases are released, so other workers can claim the jobs immediately.
- Users share the slots: a job that has held a slot for SLOT_SECONDS leaves it when another user's job is waiting.
- A paced job (a job with a `rate`) leaves its slot until its next chunk is due, unless the chunk is due within
  MAX_WAIT_IN_SLOT_SECONDS.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress

import structlog

from core import metrics
from core.errors import ContentTooLarge, Forbidden, Unavailable
from jobs import cascades, chunks, imports
from jobs.chunks import Chunk, Stopped
from repository import jobs
from repository.cascades import is_cascade
from repository.engine.database import Database
from repository.engine.events import Event
from repository.engine.transaction import Transaction
from repository.jobs import ClaimedJob, LeaseLost

CONCURRENT_JOBS = 2
POLL_SECONDS = 1.0
MAX_LATE_SECONDS = 5.0  # a paced job that waited for a slot catches up on at most MAX_LATE_SECONDS of delay
UNAVAILABLE_PAUSE_SECONDS = 0.5
SLOT_SECONDS = 1.0  # A job leaves its slot after SLOT_SECONDS if another user's job is waiting.
MAX_WAIT_IN_SLOT_SECONDS = 0.5  # Only a longer wait is worth the transactions that release the job and claim it again.

log = structlog.get_logger("jobs")


class SlotLeft(Exception):
    """The job leaves its slot and continues later, after at least `wait_seconds`.

    The job's next chunk is not due yet, another user's job is waiting, or the service is stopping.
    """

    def __init__(self, wait_seconds: float = 0.0) -> None:
        super().__init__()
        self.wait_seconds = wait_seconds


class Runner:
    """One per process. `run` continues until stopped or cancelled. `on_events` receives this process's own events."""

    def __init__(self, database: Database) -> None:
        self.owner = str(uuid.uuid4())
        self._database = database
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    def stop(self) -> None:
        """Finish the chunks that are being stored, then release the leases."""
        self._stopping.set()
        self._wake.set()

    async def ended(self, seconds: float) -> None:
        """Wait at most `seconds` for `run` to end after a stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    def on_events(self, events: Sequence[Event]) -> None:
        """Start jobs queued by this process immediately. Jobs queued by other workers are found by polling."""
        if any(event.topic == "jobs" and event.operation == "add" for event in events):
            self._wake.set()

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(CONCURRENT_JOBS):
                    tasks.create_task(self._work(f"{self.owner}:{number}"), name=f"job-runner-{number}")
        finally:
            self._ended.set()

    async def _work(self, owner: str) -> None:
        while not self._stopping.is_set():
            try:
                job = await jobs.claim(self._database, owner)
                if job is None:
                    await self._wait()
                else:
                    await self._run_job(job, owner)
            except Unavailable:
                await asyncio.sleep(UNAVAILABLE_PAUSE_SECONDS)
            except Exception as error:
                # An error here must not end the process, which also serves clients.
                if await self._database.schema.explain(error) is None:
                    log.error("job poll failed", exc_info=error)
                await asyncio.sleep(POLL_SECONDS)

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                await self._wake.wait()
            if not self._stopping.is_set():  # after a stop, `_wake` must stay set to wake all tasks
                self._wake.clear()

    async def _run_job(self, job: ClaimedJob, owner: str) -> None:
        if job.wait_seconds is None:
            log.info("job started", job=job.id, kind=job.kind, done=job.done, total=job.total)
        metrics.JOBS_RUNNING.inc()
        try:
            await self._run_chunks(job, owner)
            log.info("job finished", job=job.id, total=job.total)
        except LeaseLost:
            log.info("job cancelled or taken over", job=job.id)
        except Stopped as stopped:
            log.info("job stopped", job=job.id, reason=str(stopped))
        except SlotLeft as left:
            await self._give_back(job, owner, left.wait_seconds)
        except (Unavailable, asyncio.CancelledError):
            # The job itself has not failed: another attempt continues after the last stored chunk.
            await self._give_back(job, owner)
            raise
        except Exception as error:
            if (unavailable := await self._database.schema.explain(error)) is not None:
                await self._give_back(job, owner)
                raise unavailable from error
            log.error("job failed", job=job.id, exc_info=error)
            await jobs.fail(self._database, job.id, owner, "internal error; the log has the details")
        finally:
            metrics.JOBS_RUNNING.dec()

    async def _give_back(self, job: ClaimedJob, owner: str, wait_seconds: float = 0.0) -> None:
        with suppress(Unavailable):  # if the release fails, the lease expires by itself
            await jobs.release(self._database, job.id, owner, wait_seconds)
            if self._stopping.is_set():
                log.info("job released", job=job.id)

    async def _run_chunks(self, job: ClaimedJob, owner: str) -> None:
        """Store one chunk while a thread makes the next, until the job is done.

        Raises SlotLeft, LeaseLost, Stopped or Unavailable.
        """
        if imports.is_import(job.kind):
            await self._run_import(job, owner)
            return
        if is_cascade(job.kind):
            await self._run_cascade(job, owner)
            return
        done, started = job.done, time.monotonic()
        pace = Pace(job, started)
        self._leave_until(pace.due)
        may_stay_until = started + SLOT_SECONDS
        upcoming = asyncio.create_task(self._make_chunk(job, done))
        try:
            while done < job.total:
                chunk = await upcoming
                following = done + chunk.size
                if following < job.total:
                    upcoming = asyncio.create_task(self._make_chunk(job, following))
                await self._sleep_until(pace.due)
                if self._stopping.is_set():
                    raise SlotLeft(max(0.0, pace.due - time.monotonic()))
                await self._store_chunk(job, owner, done, chunk, started)
                metrics.ROWS_GENERATED.labels(job.kind).inc(chunk.size)
                done = following
                pace.stored(done)
                if done < job.total:
                    self._leave_until(pace.due)
                    may_stay_until = await self._make_room(job, may_stay_until, pace.due)
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)

    async def _run_import(self, job: ClaimedJob, owner: str) -> None:
        """Store one chunk of a file while a thread reads the next, until the job has ended. Then delete the file.

        Raises SlotLeft, LeaseLost or Unavailable.
        """
        work = await imports.opened(self._database, job, owner)
        may_stay_until = time.monotonic() + SLOT_SECONDS
        upcoming = asyncio.create_task(work.chunk_at(work.place))
        try:
            while not work.is_done:
                chunk = await upcoming
                if chunk.end.done < job.total:
                    upcoming = asyncio.create_task(work.chunk_at(chunk.end))
                if self._stopping.is_set():
                    raise SlotLeft
                if await work.store(chunk):
                    metrics.ROWS_GENERATED.labels(job.kind).inc(len(chunk.rows))
                    may_stay_until = await self._make_room(job, may_stay_until, time.monotonic())
                else:
                    upcoming.cancel()
                    await asyncio.gather(upcoming, return_exceptions=True)
                    upcoming = asyncio.create_task(work.chunk_at(work.place))
        except imports.Stopped as stopped:
            log.info("import stopped", job=job.id, reason=str(stopped))
            await jobs.fail(self._database, job.id, owner, str(stopped))
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
        await work.discard_file()

    async def _run_cascade(self, job: ClaimedJob, owner: str) -> None:
        """Store one chunk after another, until the job has ended. Raises SlotLeft, LeaseLost or Unavailable."""
        work = cascades.CascadeJob(self._database, job, owner)
        may_stay_until = time.monotonic() + SLOT_SECONDS
        try:
            while not work.is_done:
                if self._stopping.is_set():
                    raise SlotLeft
                metrics.ROWS_GENERATED.labels(job.kind).inc(await work.store())
                if not work.is_done:
                    may_stay_until = await self._make_room(job, may_stay_until, time.monotonic())
        except Forbidden as lost:
            log.info("deletion stopped", job=job.id, reason=str(lost))
            await jobs.fail(self._database, job.id, owner, str(lost))

    def _leave_until(self, due: float) -> None:
        """Raise SlotLeft when the next chunk is due in more than MAX_WAIT_IN_SLOT_SECONDS."""
        wait_seconds = due - time.monotonic()
        if wait_seconds > MAX_WAIT_IN_SLOT_SECONDS:
            raise SlotLeft(wait_seconds)

    async def _make_room(self, job: ClaimedJob, may_stay_until: float, due: float) -> float:
        """Return the time until which the job may keep its slot.

        Raises SlotLeft if `may_stay_until` has passed and another user's job is waiting.
        """
        now = time.monotonic()
        if now < may_stay_until:
            return may_stay_until
        if await jobs.others_wait(self._database, job.user_id):
            raise SlotLeft(max(0.0, due - now))
        return now + SLOT_SECONDS

    async def _make_chunk(self, job: ClaimedJob, done: int) -> Chunk:
        """Make a chunk in a thread, so that a large chunk does not block the event loop."""
        return await asyncio.to_thread(chunks.make, job, done, is_sqlite=self._database.is_sqlite)

    async def _sleep_until(self, due: float) -> None:
        """Wait until `due` or until the runner stops. The wait is much shorter than the lease."""
        if (left := due - time.monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._stopping.wait()

    async def _store_chunk(self, job: ClaimedJob, owner: str, done: int, chunk: Chunk, started: float) -> None:
        """Store a chunk and the job's progress. Raises LeaseLost, Stopped or Unavailable."""

        async def work(tx: Transaction) -> str | None:
            stored = await chunks.store(tx, job, done, chunk)
            reason = chunks.TOO_FEW_MOVIES if stored < chunk.size else None
            measured = (done - job.done + stored) / max(time.monotonic() - started, 1e-3)
            rows_per_second = int(min(measured, job.rate) if job.rate is not None else measured)
            await jobs.advance(tx, job, owner, done, stored, rows_per_second, error=reason)
            return reason

        try:
            reason = await self._database.write(work)
        except (Forbidden, ContentTooLarge) as error:
            reason = str(error)
            await jobs.fail(self._database, job.id, owner, reason)
        if reason is not None:
            raise Stopped(reason)


class Pace:
    """The time when the next chunk of a job is due: when the chunk's last row is due at the job's rate.

    `due` is a monotonic time.
    """

    def __init__(self, job: ClaimedJob, now: float) -> None:
        self._job = job
        self.due = now
        if job.rate is not None:
            # A job that left its slot continues as if it had stayed, but catches up on no more than MAX_LATE_SECONDS
            # of delay. It never waits longer than a chunk should take at the job's rate. Otherwise, it might wait for
            # hours after the database's clock was set back.
            longest = self._seconds_for(job.done)
            wait = longest if job.wait_seconds is None else job.wait_seconds
            self.due = now + min(max(wait, -MAX_LATE_SECONDS), longest)

    def _seconds_for(self, done: int) -> float:
        """Return how many seconds the chunk after the first `done` rows takes at the job's rate."""
        return chunks.size_after(self._job, done) / self._job.rate if self._job.rate is not None else 0.0

    def stored(self, done: int) -> None:
        if self._job.rate is not None:
            self.due = max(self.due, time.monotonic() - MAX_LATE_SECONDS) + self._seconds_for(done)
