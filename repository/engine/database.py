"""Engines and transactions on SQLite and PostgreSQL.

Rules:
- A write goes through `Database.write(work)`: rows and events commit together, the last statements before COMMIT append
  the events, and the `on_commit` listeners receive only events that committed.
- SQLite has one writer connection per process, and every transaction begins with BEGIN IMMEDIATE: a deferred one that
  reads first and writes later fails when another process has written in between. Readers have their own connections
  and cannot write. `synchronous=FULL`, because a number that a client has seen must survive a power cut.
- A transaction that the database refuses (deadlock, lost connection) before COMMIT was sent is run again, a bounded
  number of times. Once COMMIT has been sent, the outcome is unknown and the caller gets the error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import structlog
from sqlalchemy import ColumnElement, Executable, Row, Table, delete
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

from core import metrics
from core.errors import Unavailable
from core.identity import Identity
from repository.engine import engines, failures, rights
from repository.engine.append import append
from repository.engine.engines import Lane
from repository.engine.events import Event
from repository.engine.statement import Statement
from repository.engine.transaction import Transaction

BEGIN = "BEGIN IMMEDIATE"
MAX_ATTEMPTS = 5
RETRY_PAUSE_SECONDS = 0.05
READ_SECONDS = 10.0  # several times what a search of a million rows takes
PATIENCE = 3  # deadlines for a page of a snapshot, which may search a whole table for its few rows
FETCH_SECONDS = 5.0  # a read by key that takes longer has probably lost its connection
HOT_READERS = 2  # of the connections for point reads; more threads would only wait for one another

T = TypeVar("T")
Rows = Sequence[Row[*tuple[Any, ...]]]
log = structlog.get_logger("database")


class Database:
    """One per process. `close` it at the end. `read_seconds` is the deadline of a read, including its wait for a
    connection.
    """

    def __init__(self, url: str, *, read_seconds: float = READ_SECONDS) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self._read_seconds = read_seconds
        self._engines = (
            engines.open_sqlite(url) if self.is_sqlite else engines.open_postgresql(url, read_seconds * PATIENCE)
        )
        # Connections that `fetch` keeps: checking one out of the pool costs more than a read by key.
        self._hot = asyncio.Semaphore(HOT_READERS)
        self._hot_idle: list[tuple[AsyncConnection, Any]] = []
        self.on_commit: list[Callable[[list[Event]], None]] = []

    async def close(self) -> None:
        for connection, _ in self._hot_idle:
            await connection.close()
        self._hot_idle.clear()
        await self._engines.dispose()

    # --- reading

    @asynccontextmanager
    async def read(self, lane: Lane = Lane.POINT, *, patient: bool = False) -> AsyncIterator[AsyncConnection]:
        """Open a connection; each statement sees what is committed when it starts.

        The block has the deadline of all reads, or PATIENCE times as long. At the deadline, and when the caller is
        cancelled, the running statement is interrupted. Raises Unavailable.
        """
        limit = self._read_seconds * (PATIENCE if patient else 1)
        try:
            async with asyncio.timeout(limit):
                with _unavailable_when_lost():
                    async with self._engines.readers[lane].connect() as connection:
                        engines.allow(connection)
                        try:
                            yield connection
                        except asyncio.CancelledError:
                            await self._settle(connection)
                            raise
        except TimeoutError as error:
            metrics.READ_TIMEOUTS.labels(lane.value).inc()
            log.warning("read timed out", lane=lane.value, seconds=limit)
            message = f"The read took longer than {limit:g} seconds and was stopped; ask for less, or try again later"
            raise Unavailable(message) from error

    async def _settle(self, connection: AsyncConnection) -> None:
        """Wait until the statement of a cancelled read has ended, so that its connection can be used again.

        On PostgreSQL, asyncpg has asked the server to cancel it, and waits for that before the next statement.
        """
        if not self.is_sqlite or connection.invalidated:
            return
        engines.interrupt(connection)
        driver: Any = (await connection.get_raw_connection()).driver_connection
        # Done once the connection's thread has done everything before it. Outside a transaction it has no effect.
        await driver.rollback()

    async def reading(
        self, work: Callable[[AsyncConnection], Awaitable[T]], lane: Lane = Lane.POINT, *, patient: bool = False
    ) -> T:
        """Run `work` on a connection of `read` and return its result.

        It runs again on another connection when the first one turns out to be dead. Raises Unavailable.
        """

        async def once() -> T:
            async with self.read(lane, patient=patient) as connection:
                return await work(connection)

        return await self._again(once)

    async def select(self, query: Executable, lane: Lane = Lane.POINT, *, patient: bool = False) -> Rows:
        """Return the rows of a query. Raises Unavailable."""

        async def work(connection: AsyncConnection) -> Rows:
            return (await connection.execute(query)).all()

        return await self.reading(work, lane, patient=patient)

    async def fetch(self, statement: Statement, *values: Any) -> list[Any]:
        """Return the rows of one statement, through the driver itself, for reads so small and frequent that SQLAlchemy
        would cost several times as much as the read.

        Raises Unavailable when the database cannot be reached.
        """
        async with self._hot:
            try:
                return await self._fetch(statement, values)
            except Unavailable as error:
                if not failures.is_stale(error.__cause__):
                    raise
                await self._fetch_afresh()
                return await self._fetch(statement, values)

    async def _fetch(self, statement: Statement, values: Sequence[Any]) -> list[Any]:
        with _unavailable_when_lost():
            connection, driver = self._hot_idle.pop() if self._hot_idle else await self._connect_hot()
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    if self.is_sqlite:
                        found = await driver.execute_fetchall(statement.sqlite, values)
                    else:
                        found = await driver.fetch(statement.postgresql, *values)
            except BaseException as error:
                # SQLAlchemy has not seen the error, and an interrupted connection cannot be used again.
                await connection.invalidate(error)
                await connection.close()
                raise
        self._hot_idle.append((connection, driver))
        return list(found)

    async def _connect_hot(self) -> tuple[AsyncConnection, Any]:
        connection = await self._engines.readers[Lane.POINT].connect()
        return connection, (await connection.get_raw_connection()).driver_connection

    async def _fetch_afresh(self) -> None:
        """Give up the kept connections: where one is dead, the others usually are, too."""
        while self._hot_idle:
            connection, _ = self._hot_idle.pop()
            await connection.invalidate()
            await connection.close()

    async def _again(self, read: Callable[[], Awaitable[T]]) -> T:
        try:
            return await read()
        except Unavailable as error:
            if not failures.is_stale(error.__cause__):
                raise
            return await read()

    # --- writing

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[tuple[AsyncConnection, AsyncTransaction]]:
        """Open a transaction that appends no events by itself, for `write` and for migrations."""
        async with self._engines.writer.connect() as connection, connection.begin() as transaction:
            if self.is_sqlite:
                driver: Any = (await connection.get_raw_connection()).driver_connection
                await driver.execute_fetchall(BEGIN)
            yield connection, transaction

    async def delete_without_events(self, table: Table, which: ColumnElement[bool]) -> int:
        """Delete rows that no client sees. Return how many were deleted. Raises Unavailable."""

        async def work(tx: Transaction) -> int:
            return int((await tx.connection.execute(delete(table).where(which))).rowcount)

        return await self.write(work)

    async def write(self, work: Callable[[Transaction], Awaitable[T]], writer: Identity | None = None) -> T:
        """Run `work` in one transaction with the events it emits, and return its result. Listeners run after COMMIT.

        `work` may run again from the start when the database refuses the transaction, so it must change nothing
        outside the transaction. Any exception that it raises rolls everything back, including the numbers. Raises
        Unauthenticated or Forbidden when the `writer` has lost rights since it was authenticated, and Unavailable when
        the database cannot be reached or keeps refusing the transaction.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            committing = False
            try:
                async with self.begin() as (connection, transaction):
                    tx = Transaction(connection, writer)
                    result = await work(tx)
                    events = await append(tx) if tx.drafts else []
                    if tx.writer is not None and not events:
                        await rights.require(tx, tx.writer)
                    committing = True
                    await transaction.commit()
                metrics.COMMITS.inc()
                for listener in self.on_commit:
                    if events:
                        listener(events)
                return result
            except failures.DATABASE_ERRORS as error:
                if not failures.is_foreign(error):
                    raise
                if committing or attempt == MAX_ATTEMPTS or not failures.may_run_again(error):
                    raise _unavailable(error) from error
                reason = failures.first_line(error)
                metrics.COMMIT_RETRIES.inc()
                log.info("transaction refused; retrying", attempt=attempt, reason=reason)
                await asyncio.sleep(RETRY_PAUSE_SECONDS * attempt)
        raise AssertionError("unreachable")


@contextmanager
def _unavailable_when_lost() -> Iterator[None]:
    try:
        yield
    except failures.DATABASE_ERRORS as error:
        if not failures.is_foreign(error):
            raise
        raise _unavailable(error) from error


def _unavailable(error: BaseException) -> Unavailable:
    log.warning("database unavailable", reason=failures.first_line(error))
    return Unavailable("The database is unavailable; it is unknown whether anything was written")
