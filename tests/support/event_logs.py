"""Change the event log of a service from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from unittest.mock import patch

from sqlalchemy import text

from repository.engine import append, event_log
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from tests.support.service import Service


@asynccontextmanager
async def database_of(service: Service) -> AsyncIterator[Database]:
    database = Database(service.database_url)
    yield database
    await database.close()


async def renew_epoch(service: Service) -> str:
    async with database_of(service) as database:
        return await event_log.renew_epoch(database)


async def lose_newest(url: str, count: int) -> None:
    """Remove the newest `count` events and their numbers, as a crash that undoes commits does."""

    async def lose(tx: Transaction) -> None:
        newest = f"SELECT seq - {count} FROM event_head"
        for table in ("events", "event_spans"):
            await tx.connection.execute(text(f"DELETE FROM {table} WHERE seq > ({newest})"))
        await tx.connection.execute(text(f"UPDATE event_head SET seq = seq - {count}"))

    database = Database(url)  # another process, so that the service's own does not learn of it
    await database.write(lose)
    await database.close()


@contextmanager
def without_spans() -> Iterator[None]:
    """In the `with` block, let this process write to a log of a version that stored no spans of bulk events."""
    with patch.object(append, "spans_of", lambda drafts, first: []):
        yield


async def prune(service: Service, keep_rows: int) -> int:
    """Delete all but the newest `keep_rows` events, and return the number of deleted events."""
    async with database_of(service) as database:
        return await prune_log(database, keep_rows)


async def prune_log(database: Database, keep_rows: int) -> int:
    long_ago = datetime(2000, 1, 1, tzinfo=UTC)  # older than any event: none is deleted because of its age
    return await event_log.prune(database, keep_rows=keep_rows, keep_bytes=10**9, older_than=long_ago, max_rows=1_000)
