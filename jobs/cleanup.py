"""Periodic clean-up under a lease: one of all workers runs it once per period."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

import structlog

from core.errors import Unavailable
from repository.accounts import deletion, one_time_tokens, outbox, sessions
from repository.engine import event_log, leases
from repository.engine.database import Database
from repository.generic import idempotency

PERIOD_SECONDS = 60.0
IDEMPOTENCY_KEY_HOURS = 24
PRUNE_ROWS_PER_TRANSACTION = 5_000  # bounds how long a concurrent write waits
EXPIRE_ROWS_PER_TRANSACTION = 500  # sessions, each with an event
FORGET_ROWS_PER_TRANSACTION = 25  # accounts, each with about eight statements and two events
FORGET_PAUSE_SECONDS = 0.1  # between two such transactions, so that other writes get their turn
SESSION_GRACE = timedelta(minutes=1)  # the clock of the worker that issued the token may be behind ours

log = structlog.get_logger("cleanup")


class Cleanup:
    """One per process; `run` works until cancelled."""

    def __init__(self, database: Database, owner: str, retention_hours: float, retention_rows: int) -> None:
        self._database = database
        self._owner = owner
        self._retention = timedelta(hours=retention_hours)
        self._retention_rows = retention_rows

    async def run(self) -> None:
        while True:
            # Jittered, so that workers that started together do not compete for the lease.
            await asyncio.sleep(PERIOD_SECONDS * random.uniform(0.8, 1.2))
            try:
                if await leases.take(self._database, "cleanup", self._owner, PERIOD_SECONDS * 0.9):
                    await self.clean()
            except Unavailable:
                pass  # the next period tries again
            except Exception as error:
                # An error here must not end the process, which also serves clients.
                log.error("clean-up failed", exc_info=error)

    async def clean(self) -> None:
        """Delete everything that is past its time. Raises Unavailable."""
        now = datetime.now(UTC)
        keys = await idempotency.forget(self._database, now - timedelta(hours=IDEMPOTENCY_KEY_HOURS))
        expired = await self._expire_sessions(now - SESSION_GRACE)
        waiting = await self._forget_waiting(now)
        tokens = await one_time_tokens.forget(self._database, now)
        forgotten = await outbox.forget(self._database, now)
        pruned = 0
        while True:
            count = await event_log.prune(
                self._database,
                keep_rows=self._retention_rows,
                older_than=now - self._retention,
                max_rows=PRUNE_ROWS_PER_TRANSACTION,
            )
            pruned += count
            if count < PRUNE_ROWS_PER_TRANSACTION:
                break
        gone = {
            "idempotency_keys": keys,
            "sessions": expired,
            "accounts": waiting,
            "one_time_tokens": tokens,
            "emails": forgotten,
            "events": pruned,
        }
        if any(gone.values()):
            log.info("clean-up finished", **gone)

    async def _forget_waiting(self, now: datetime) -> int:
        forgotten = 0
        while True:
            count = await deletion.forget_waiting(self._database, now, max_rows=FORGET_ROWS_PER_TRANSACTION)
            forgotten += count
            if not count:
                return forgotten
            await asyncio.sleep(FORGET_PAUSE_SECONDS)

    async def _expire_sessions(self, now: datetime) -> int:
        expired = 0
        while True:
            count = await sessions.expire(self._database, now, max_rows=EXPIRE_ROWS_PER_TRANSACTION)
            expired += count
            if count < EXPIRE_ROWS_PER_TRANSACTION:
                break
        await sessions.forget(self._database, now)
        return expired
