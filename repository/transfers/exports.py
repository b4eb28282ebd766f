"""Reads all rows of a list in one state of the database, in batches, so that memory does not grow with the list.

An export is one read-only transaction: its head of the log and all of its rows belong to the same state of the
database. While it is open, SQLite cannot reuse its write-ahead log, and PostgreSQL cannot remove old rows. So an export
is bounded in time and, on SQLite, by the growth of the log. No export begins while the log is large, because exports
that overlap without a pause would otherwise let the log grow without limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

import models
from core.errors import Unavailable
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.events import Head, head_of
from repository.generic import lists
from repository.generic.lists import ListRequest
from repository.transfers import lines
from repository.transfers.lines import FileOptions
from resources.resource import Resource

EXPORT_SECONDS = 300.0  # enough for a million movies, compressed, at 10 Mbit/s
BATCH_ROWS = 500
# The transaction of an export is idle while the export waits for its client. If the client reads nothing, the server
# closes its connection before this time has passed.
IDLE_SECONDS = 60
# SQLite's log may grow by this much during an export. Checkpoints copy the log to the file, but cannot empty it.
MAX_LOG_GROWTH_BYTES = 512 * 1024 * 1024
# A log that is larger than this must be emptied before the next export begins (`server.parts`).
MAX_LOG_BYTES = 128 * 1024 * 1024
LOG_CHECK_SECONDS = 0.5

Batch = Sequence[str]  # the lines of rows, without their ends


@dataclass(frozen=True, slots=True)
class Export:
    """An open export: the head of the log at its moment, and the lines of the rows."""

    head: Head
    batches: AsyncIterator[Batch]


@asynccontextmanager
async def opened(
    database: Database, resource: Resource, request: ListRequest, options: FileOptions
) -> AsyncIterator[Export]:
    """Open an export of `request.columns`, or all columns. The limit and the place in the list are ignored.

    The block must end within EXPORT_SECONDS. Raises Unavailable, also from the iterator.
    """
    database.schema.require()
    if database.log_bytes() > MAX_LOG_BYTES:
        raise Unavailable("SQLite's write-ahead log must be emptied before an export can begin; try again in a moment")
    async with _while_log_is_small(database), database.read(Lane.EXPORT, seconds=EXPORT_SECONDS) as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if database.is_sqlite:
            await driver.execute("BEGIN")
        else:
            await connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"))
        has_been_cancelled = False
        try:
            head = models.event_head.c
            position = head_of((await connection.execute(select(head.epoch, head.seq))).all())
            # The cursor must be closed before the connection goes back to its pool.
            async with aclosing(_batches(database, connection, resource, request, options)) as batches:
                yield Export(position, batches)
        except asyncio.CancelledError:
            has_been_cancelled = True  # `Database.read` interrupts the statement, and then ends the transaction
            raise
        finally:
            if database.is_sqlite and not has_been_cancelled:
                await driver.rollback()


async def _batches(
    database: Database,
    connection: AsyncConnection,
    resource: Resource,
    request: ListRequest,
    options: FileOptions,
) -> AsyncGenerator[Batch, None]:
    columns = request.columns or resource.columns
    line = lines.line_of(resource.table, columns, options, is_sqlite=database.is_sqlite)
    query = lists.whole(database, resource, request).with_only_columns(text(line.replace(":", r"\:")))
    async with connection.stream(query.execution_options(yield_per=BATCH_ROWS)) as found:
        async for batch in found.scalars().partitions():
            yield batch


@asynccontextmanager
async def _while_log_is_small(database: Database) -> AsyncIterator[None]:
    """End the block when SQLite's log has grown too much, even while its client reads nothing. Raises Unavailable."""
    if not database.is_sqlite:
        yield
        return
    most = database.log_bytes() + MAX_LOG_GROWTH_BYTES

    async def watch(limit: asyncio.Timeout) -> None:
        while True:
            await asyncio.sleep(LOG_CHECK_SECONDS)
            if database.log_bytes() > most:
                break
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as limit:
            watching = asyncio.create_task(watch(limit), name="export-log")
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError as error:
        raise Unavailable("Too many rows were written during the export; try again when fewer are written") from error
