"""Periodic clean-up under a lease, so that only one worker runs it in each period."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from core.errors import Unavailable
from repository import jobs, leases
from repository.accounts import deletion, one_time_tokens, outbox, sessions
from repository.engine import event_log
from repository.engine.database import Database
from repository.generic import idempotency
from repository.transfers import imports

PERIOD_SECONDS = 60.0
IDEMPOTENCY_KEY_HOURS = 24
PRUNE_ROWS_PER_TRANSACTION = 5_000  # Small transactions bound how long a concurrent write waits.
EXPIRE_ROWS_PER_TRANSACTION = 500  # Each ended session causes an event.
FORGET_ROWS_PER_TRANSACTION = 25  # Each deleted account costs about eight statements and two events.
FORGET_JOBS_PER_TRANSACTION = 100  # Each deleted job causes an event.
FORGET_PAUSE_SECONDS = 0.1  # A pause between the transactions lets other writes proceed.
SESSION_GRACE = timedelta(minutes=1)  # The clock of the worker that issued a session's token may be slow.
UPLOAD_GRACE = timedelta(hours=1)  # The upload of a file takes less.

log = structlog.get_logger("cleanup")


@dataclass(frozen=True, slots=True)
class Retention:
    """How long events and finished jobs are kept.

    The oldest events are deleted as soon as the log exceeds any of `hours`, `rows` and `bytes`.
    """

    hours: float
    rows: int
    bytes: int
    job_hours: float = 168.0


class Cleanup:
    """One per process. `run` continues until cancelled."""

    def __init__(self, database: Database, owner: str, retention: Retention) -> None:
        self._database = database
        self._owner = owner
        self._retention = retention

    async def run(self) -> None:
        while True:
            # Jittered, so that workers that started together do not compete for the lease.
            await asyncio.sleep(PERIOD_SECONDS * random.uniform(0.8, 1.2))
            try:
                if await leases.take(self._database, "cleanup", self._owner, PERIOD_SECONDS * 0.9):
                    await self.clean()
            except Unavailable:
                pass  # the clean-up is retried in the next period
            except Exception as error:
                # An error here must not end the process, which also serves clients.
                log.error("clean-up failed", exc_info=error)

    async def clean(self) -> None:
        """Delete all data that has expired or no longer needs to be kept. Raises Unavailable."""
        database, now = self._database, datetime.now(UTC)
        sessions_before, events_before = now - SESSION_GRACE, now - timedelta(hours=self._retention.hours)

        def expire_sessions() -> Awaitable[int]:
            return sessions.expire(database, sessions_before, max_rows=EXPIRE_ROWS_PER_TRANSACTION)

        def forget_accounts() -> Awaitable[int]:
            return deletion.forget_waiting(database, now, max_rows=FORGET_ROWS_PER_TRANSACTION)

        def forget_jobs() -> Awaitable[int]:
            return jobs.forget(
                database, now - timedelta(hours=self._retention.job_hours), max_rows=FORGET_JOBS_PER_TRANSACTION
            )

        def prune_events() -> Awaitable[int]:
            return event_log.prune(
                database,
                keep_rows=self._retention.rows,
                keep_bytes=self._retention.bytes,
                older_than=events_before,
                max_rows=PRUNE_ROWS_PER_TRANSACTION,
            )

        deleted = {
            "idempotency_keys": await idempotency.forget(database, now - timedelta(hours=IDEMPOTENCY_KEY_HOURS)),
            "sessions": await _repeat(expire_sessions, EXPIRE_ROWS_PER_TRANSACTION),
            "accounts": await _repeat(forget_accounts, 1, FORGET_PAUSE_SECONDS),
            "jobs": await _repeat(forget_jobs, FORGET_JOBS_PER_TRANSACTION, FORGET_PAUSE_SECONDS),
            "parts_of_imports": await imports.discard_unused(database, now - UPLOAD_GRACE),
            "one_time_tokens": await one_time_tokens.forget(database, now),
            "emails": await outbox.forget(database, now),
            "events": await _repeat(prune_events, PRUNE_ROWS_PER_TRANSACTION),
        }
        await sessions.forget(database, sessions_before)
        if any(deleted.values()):
            log.info("clean-up finished", **deleted)


async def _repeat(work: Callable[[], Awaitable[int]], at_least: int, pause_seconds: float = 0.0) -> int:
    """Repeat `work` until it deletes fewer than `at_least` rows. Return the total number of deleted rows."""
    total = 0
    while True:
        count = await work()
        total += count
        if count < at_least:
            return total
        await asyncio.sleep(pause_seconds)
