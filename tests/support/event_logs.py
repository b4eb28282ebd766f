"""Change the event log of a service from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from repository.engine import event_log
from repository.engine.database import Database
from tests.support.service import Service


@asynccontextmanager
async def database_of(service: Service) -> AsyncIterator[Database]:
    database = Database(service.database_url)
    yield database
    await database.close()


async def renew_epoch(service: Service) -> str:
    async with database_of(service) as database:
        return await event_log.renew_epoch(database)


async def prune(service: Service, keep_rows: int) -> int:
    """Delete all but the newest `keep_rows` events, and return the number of deleted events."""
    async with database_of(service) as database:
        return await prune_log(database, keep_rows)


async def prune_log(database: Database, keep_rows: int) -> int:
    long_ago = datetime(2000, 1, 1, tzinfo=UTC)  # older than any event: none is deleted because of its age
    return await event_log.prune(database, keep_rows=keep_rows, keep_bytes=10**9, older_than=long_ago, max_rows=1_000)
