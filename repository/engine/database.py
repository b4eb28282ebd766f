"""Engines and transactions on SQLite and PostgreSQL.

Rules:
- A write goes through `Database.write(work)`: rows and events commit together, the last statements before COMMIT append
  the events, and the `on_commit` listeners receive only events that committed.
- SQLite has one writer connection per process, and every transaction begins with BEGIN IMMEDIATE, because a deferred
  one that reads first and writes later fails when another process has written in between. Readers have their own
  connections and cannot write. `synchronous=FULL` is set: a number that a client has seen must survive a power cut.
- A transaction that the database refuses (deadlock, lost connection) before COMMIT was sent is run again, a bounded
  number of times. Once COMMIT has been sent, the outcome is unknown and the caller gets the error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import structlog
from sqlalchemy import Executable, Row, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

import models
from core import metrics
from core.errors import Unavailable
from core.identity import Identity
from core.network.shares import CLIENT, Shares
from repository.engine import engines, failures, lock_waits, rights
from repository.engine.append import append, tell_position
from repository.engine.engines import PATIENT_READERS, READERS, READERS_PER_CLIENT, Lane
from repository.engine.events import Event, Newest
from repository.engine.lock_waits import LockWaits, TableLocks
from repository.engine.schema import Schema
from repository.engine.sqlite_file import SqliteFile
from repository.engine.statement import Statement
from repository.engine.transaction import Transaction

MAX_ATTEMPTS = 5
RETRY_SECONDS = 5.0  # A transaction is not run again once this time has passed since its start.
RETRY_PAUSE_SECONDS = 0.05
STALLED_SECONDS = 3.0  # Writes hold the lock for milliseconds, so a worker that waits this long for it is not ready.
PROBE_SECONDS = 1.0
SHRINK_SECONDS = 1.0
READ_SECONDS = 10.0  # several times as long as a search of a million rows takes
PATIENCE = 3
FETCH_SECONDS = 5.0  # A read by key that takes longer has probably lost its connection.
MAX_DEAD_CONNECTIONS = max(READERS.values())
HOT_READERS = 2  # `fetch` keeps this many connections for point reads; more threads would only wait for one another.

T = TypeVar("T")
Rows = Sequence[Row[*tuple[Any, ...]]]
log = structlog.get_logger("database")


class Database:
    """The database, one object per process; call `close` at the end. `read_seconds` is the deadline of a read,
    including its wait for a connection. With `has_pooler`, PostgreSQL may be behind PgBouncer.
    """

    def __init__(self, url: str, *, read_seconds: float = READ_SECONDS, has_pooler: bool = False) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self._read_seconds = read_seconds
        self._file: SqliteFile | None = None  # None on PostgreSQL
        if self.is_sqlite:
            self._engines, self._file = engines.open_sqlite(url)
        else:
            self._engines = engines.open_postgresql(url, read_seconds * PATIENCE, has_pooler=has_pooler)
        self._hot = asyncio.Semaphore(HOT_READERS)
        # Connections that `fetch` keeps: checking one out of the pool costs more than a read by key.
        self._hot_idle: list[tuple[AsyncConnection, Any]] = []
        self._shares = {lane: Shares(size) for lane, size in READERS_PER_CLIENT.items()}
        self._patient_shares = {lane: Shares(size) for lane, size in READERS_PER_CLIENT.items()}
        self._patient = {lane: asyncio.Semaphore(size) for lane, size in PATIENT_READERS.items()}
        self.schema = Schema(self._fetch_ahead, is_sqlite=self.is_sqlite)
        self._lock_waits = LockWaits()
        self._table_locks = TableLocks(self._fetch_ahead)
        self._read_failure: str | None = None  # the problem with a table or the file, until it is repaired
        self._write_failure: str | None = None
        self._probe: asyncio.Task[None] | None = None
        self.newest = Newest()
        self.on_commit: list[Callable[[list[Event]], None]] = []

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        for connection, _ in self._hot_idle:
            await connection.close()
        self._hot_idle.clear()
        await self._engines.dispose()
        if self._file is not None:
            await self._file.closed()

    # --- SQLite's files

    def file_problem(self) -> str | None:
        """Return what is wrong with SQLite's file or its disk, or None."""
        return self._file.problem() if self._file is not None else None

    def _require_intact_file(self) -> None:
        """Raise FileLost if rows committed to SQLite's file now would be missing after a restart."""
        if self._file is not None:
            self._file.require_intact()
            if self._read_failure == failures.DAMAGED_FILE:
                raise failures.FileLost(failures.DAMAGED_FILE)

    def log_bytes(self) -> int:
        """Return the size of SQLite's write-ahead log in bytes; 0 on PostgreSQL."""
        return self._file.log_bytes() if self._file is not None else 0

    async def shrink_log(self) -> None:
        """Empty SQLite's write-ahead log, which grows while reads overlap without a pause. Raises Unavailable.

        It waits up to SHRINK_SECONDS for running reads to end. Meanwhile, other writes wait, but new reads do not.
        """
        with failures.unavailable_when_lost():
            async with self._engines.writer.connect() as connection:
                driver: Any = (await connection.get_raw_connection()).driver_connection
                async with engines.busy_timeout(driver, SHRINK_SECONDS):
                    await driver.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")

    # --- reading

    @asynccontextmanager
    async def read(
        self, lane: Lane = Lane.POINT, *, patient: bool = False, seconds: float | None = None
    ) -> AsyncIterator[AsyncConnection]:
        """Open a connection on which each statement sees what is committed when the statement starts.

        The block must end within `seconds`, by default `read_seconds`. At this deadline, or when cancelled, the running
        statement is interrupted. A `patient` read, for a client that does not wait for a response, may take PATIENCE
        times as long, not counting its wait for a turn among the client's and all patient reads. Raises Unavailable.
        """
        limit = seconds or self._read_seconds * (PATIENCE if patient else 1)
        deadline = asyncio.timeout(None if patient else limit)
        try:
            async with AsyncExitStack() as turns:
                await turns.enter_async_context(deadline)
                if patient:
                    # First wait for the client's other patient reads, so that one client cannot fill the queue of all.
                    # Take the share that all its reads use last, so that the others need not wait, too.
                    await turns.enter_async_context(self._patient_shares[lane].of(CLIENT.get()))
                    await turns.enter_async_context(self._patient[lane])
                await turns.enter_async_context(self._shares[lane].of(CLIENT.get()))
                if patient:
                    deadline.reschedule(asyncio.get_running_loop().time() + limit)
                with failures.unavailable_when_lost():
                    async with self._engines.readers[lane].connect() as connection:
                        engines.allow(connection)
                        if self._engines.begin_read:
                            await connection.begin()  # SQLAlchemy begins none if the driver is used directly
                        try:
                            yield connection
                        except asyncio.CancelledError:
                            await self._settle(connection)
                            raise
                        except failures.DATABASE_ERRORS as error:
                            self._note_read_failure(error)
                            if failures.is_about_schema(error) or failures.is_stale(error):
                                await connection.invalidate(error)
                            raise
        except TimeoutError as error:
            self._table_locks.suspect()
            metrics.READ_TIMEOUTS.labels(lane.value).inc()
            log.warning("read timed out", lane=lane.value, seconds=limit)
            message = f"The read took longer than {limit:g} s and was stopped; request less data, or try again later"
            raise Unavailable(message) from error

    async def _settle(self, connection: AsyncConnection) -> None:
        """Wait until the statement of a cancelled read has ended, so that its connection can be used again.

        On PostgreSQL, asyncpg waits for that. But the connection is closed if a ROLLBACK comes next (see `begin`).
        """
        if self._engines.begin_read:
            await connection.invalidate()
        if not self.is_sqlite or connection.invalidated:
            return
        engines.interrupt(connection)
        driver: Any = (await connection.get_raw_connection()).driver_connection
        # The connection's thread runs this rollback after all earlier calls. It changes nothing outside a transaction.
        await driver.rollback()

    async def reading(
        self, work: Callable[[AsyncConnection], Awaitable[T]], lane: Lane = Lane.POINT, *, patient: bool = False
    ) -> T:
        """Run `work` on a connection of `read` and return its result.

        If the connection turns out to be dead, `work` runs again on another one. Raises Unavailable.
        """
        self.schema.require()

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
        """Return the rows of one statement, run by the driver directly: for small and frequent reads, SQLAlchemy would
        cost several times as much as the read. Raises Unavailable when the database cannot be reached.
        """
        self.schema.require()
        with failures.unavailable_when_lost():
            async with asyncio.timeout(FETCH_SECONDS if self._hot.locked() else None):
                await self._hot.acquire()
        try:
            return await self._fetch_ahead(statement, *values)
        finally:
            self._hot.release()

    async def _fetch_ahead(self, statement: Statement, *values: Any) -> list[Any]:
        """Fetch for the checks of readiness, which must not wait for reads that wait for a lock."""
        return await self._again(partial(self._fetch, statement, values))

    async def _fetch(self, statement: Statement, values: Sequence[Any]) -> list[Any]:
        with failures.unavailable_when_lost():
            if self._hot_idle:
                connection, driver = self._hot_idle.pop()
            else:
                async with asyncio.timeout(FETCH_SECONDS):
                    connection, driver = await self._connect_hot()
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    if self.is_sqlite:
                        found = await driver.execute_fetchall(statement.sqlite, values)
                    else:
                        found = await engines.fetch(driver, self._engines.begin_read, statement.postgresql, values)
            except BaseException as error:
                if isinstance(error, TimeoutError):
                    self._table_locks.suspect()
                elif isinstance(error, Exception):
                    self._note_read_failure(error)
                # SQLAlchemy has not seen the error, so tell it: an interrupted connection cannot be used again.
                await connection.invalidate(error)
                await connection.close()
                raise
        if len(self._hot_idle) < HOT_READERS:
            self._hot_idle.append((connection, driver))
        else:
            await connection.close()
        return list(found)

    async def _connect_hot(self) -> tuple[AsyncConnection, Any]:
        connection = await self._engines.readers[Lane.POINT].connect()
        engines.allow(connection)  # a cancelled read may have used this connection before
        return connection, (await connection.get_raw_connection()).driver_connection

    async def _close_hot(self) -> None:
        """Close the kept connections: if one is dead, the others usually are, too."""
        while self._hot_idle:
            connection, _ = self._hot_idle.pop()
            await connection.invalidate()
            await connection.close()

    async def _again(self, read: Callable[[], Awaitable[T]]) -> T:
        """Run `read` again while it gets dead connections, because all connections of a pool may die unnoticed."""
        for _ in range(MAX_DEAD_CONNECTIONS):
            try:
                return await read()
            except Unavailable as error:
                if not failures.is_stale(error.__cause__):
                    raise
                await self._close_hot()
        return await read()

    # --- writing

    @asynccontextmanager
    async def begin(
        self, limit: asyncio.Timeout | None = None
    ) -> AsyncIterator[tuple[AsyncConnection, AsyncTransaction]]:
        """Open a transaction that appends no events by itself, for `write` and for migrations.

        On SQLite, the wait for the lock ends when `limit` would expire. `limit` is lifted before the wait.
        """
        async with self._engines.writer.connect() as connection, connection.begin() as transaction:
            if self.is_sqlite:
                driver: Any = (await connection.get_raw_connection()).driver_connection
                # The connection's thread cannot be interrupted during the wait, so SQLite ends the wait itself.
                seconds = lock_waits.lift(limit) if limit is not None else engines.BUSY_TIMEOUT_SECONDS
                with self._lock_waits.waiting():
                    await engines.begin_sqlite(driver, seconds)
            try:
                yield connection, transaction
            except asyncio.CancelledError:
                if not self.is_sqlite:
                    # Before a ROLLBACK, asyncpg waits until the server has cancelled the statement, without a limit if
                    # the server does not respond. Closing the connection waits for at most two seconds.
                    await connection.invalidate()
                raise

    async def write(self, work: Callable[[Transaction], Awaitable[T]], writer: Identity | None = None) -> T:
        """Run `work` in one transaction with the events it emits, and return its result. Listeners run after COMMIT.

        `work` may run again from the start when the database refuses the transaction, so it must change nothing
        outside the transaction. Any exception that it raises rolls everything back, including event numbers. Raises
        Unauthenticated or Forbidden when the `writer` has lost rights since it was authenticated, or Unavailable when
        the database cannot be reached, keeps refusing the transaction, or delays it beyond WRITE_SECONDS.
        """
        self.schema.require()
        started = time.monotonic()
        deadline = asyncio.get_running_loop().time() + lock_waits.WRITE_SECONDS
        for attempt in range(1, MAX_ATTEMPTS + 1):
            committing = False
            limit = asyncio.timeout_at(deadline)
            try:
                async with limit, self.begin(limit) as (connection, transaction):
                    tx = Transaction(connection, writer, lock_waits=self._lock_waits, newest=self.newest)
                    try:
                        result = await work(tx)
                        events = await append(tx) if tx.drafts else []
                        if tx.writer is not None and not events:
                            await rights.require(tx, tx.writer)
                        await tell_position(tx, events)
                    except failures.DATABASE_ERRORS as caught:
                        if failures.is_about_schema(caught):
                            await connection.invalidate(caught)
                        raise
                    self._require_intact_file()
                    lock_waits.lift(limit)
                    committing = True
                    await transaction.commit()
                self._write_failure = None
                metrics.COMMITS.inc()
                if events:
                    self.newest.note(events[-1])
                    for listener in self.on_commit:
                        listener(events)
                return result
            except failures.DATABASE_ERRORS as caught:
                error = failures.WriteTooLate("the deadline of a write has passed") if limit.expired() else caught
                if not failures.is_foreign(error):
                    raise
                is_over = attempt == MAX_ATTEMPTS or time.monotonic() - started > RETRY_SECONDS
                if committing or is_over or not failures.may_run_again(error):
                    self._write_failure = failures.in_words(error)
                    self._table_locks.suspect()
                    self._note_read_failure(error)
                    raise failures.unavailable(error, is_unknown=committing) from error
                reason = failures.first_line(error)
                metrics.COMMIT_RETRIES.inc()
                log.info("transaction refused; retrying", attempt=attempt, reason=reason)
                await asyncio.sleep(RETRY_PAUSE_SECONDS * attempt)
        raise AssertionError("unreachable")

    def _note_read_failure(self, error: Exception) -> None:
        if failures.is_lasting(error) and self._read_failure != failures.DAMAGED_FILE:
            self._read_failure = failures.in_words(error)
            self.schema.expire()

    async def read_problem(self) -> str | None:
        """Return what is wrong with the tables, or None.

        If a read has failed because of a table or the file, check by reading every table.
        """
        if self._read_failure == failures.DAMAGED_FILE:
            return self._read_failure  # a successful read would prove nothing, because it may miss the damaged pages
        if self._read_failure is not None:
            for table in models.metadata.sorted_tables:
                try:
                    await self.select(select(table).limit(1))
                except Unavailable as error:
                    return failures.in_words(error.__cause__)
            self._read_failure = None
        return None

    async def write_problem(self) -> str | None:
        """Return why writes fail or have to wait, or None.

        If the newest write has failed, try one that changes nothing, so that a recovery is noticed without a client's.
        That write would not notice a lock on a table, so such locks are looked up first.
        """
        if self._lock_waits.seconds > STALLED_SECONDS:
            return f"writes have been waiting for a lock for {self._lock_waits.seconds:.0f} s"
        if not self.is_sqlite and (problem := await self._table_locks.problem()) is not None:
            return problem
        if self._write_failure is not None:
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._try_to_write(), name="write-probe")
            await asyncio.wait({self._probe}, timeout=PROBE_SECONDS)
        return self._write_failure

    async def _try_to_write(self) -> None:
        async def touch(tx: Transaction) -> None:
            await tx.connection.execute(text("UPDATE event_head SET seq = seq WHERE id = 1"))

        with suppress(Unavailable):
            await self.write(touch)
