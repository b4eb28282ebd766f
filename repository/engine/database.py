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
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy import ColumnElement, Table, delete, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction, create_async_engine

from core import metrics
from core.errors import Unavailable
from core.identity import Identity
from repository.engine import failures, rights
from repository.engine.append import append
from repository.engine.events import Event
from repository.engine.statement import Statement
from repository.engine.transaction import Transaction

BEGIN = "BEGIN IMMEDIATE"
MAX_ATTEMPTS = 5
RETRY_PAUSE_SECONDS = 0.05
BUSY_TIMEOUT_SECONDS = 10  # how long a SQLite writer waits for another process's transaction
POOL_TIMEOUT_SECONDS = 30
FETCH_SECONDS = 5.0  # a read by key that takes longer has probably lost its connection
SQLITE_READERS = 4
HOT_READERS = 2  # besides SQLITE_READERS; more threads would only wait for one another
POSTGRESQL_CONNECTIONS = 10  # per worker and engine; 4 workers fit PostgreSQL's default of 100
SQLITE_CACHE_KIB = 16 * 1024
SQLITE_CHECKPOINT_PAGES = 4_000  # 16 MB of write-ahead log, so that bulk writes cause few checkpoints

T = TypeVar("T")
log = structlog.get_logger("database")


class Database:
    """One per process. `close` it at the end."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        if self.is_sqlite:
            path = Path(url.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # opening the file reports the problem better
                # Other users of the machine must not read it. SQLite gives its other files the same mode.
                path.touch(mode=0o600)
            async_url = "sqlite+aiosqlite" + url.removeprefix("sqlite")
            options: dict[str, Any] = {
                "max_overflow": 0,
                "pool_timeout": POOL_TIMEOUT_SECONDS,
                "connect_args": {"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None},
            }
            self._writer = create_async_engine(async_url, pool_size=1, **options)
            self._reader = create_async_engine(async_url, pool_size=SQLITE_READERS + HOT_READERS, **options)
            event.listen(self._writer.sync_engine, "connect", partial(_prepare_sqlite, WRITER_PRAGMAS))
            event.listen(self._reader.sync_engine, "connect", partial(_prepare_sqlite, READER_PRAGMAS))
        else:
            async_url = "postgresql+asyncpg" + url[url.index("://") :]
            options = {
                "pool_size": POSTGRESQL_CONNECTIONS,
                "max_overflow": 0,
                "pool_timeout": POOL_TIMEOUT_SECONDS,
                # jit costs planning time and gains nothing for statements this short.
                "connect_args": {"timeout": 5, "server_settings": {"application_name": "marquee", "jit": "off"}},
            }
            self._writer = create_async_engine(async_url, **options)
            # One round trip for each statement: a read of one statement needs no BEGIN and ROLLBACK around it.
            self._reader = create_async_engine(async_url, isolation_level="AUTOCOMMIT", **options)
        # Connections that `fetch` keeps: checking one out of the pool costs more than a read by key.
        self._hot = asyncio.Semaphore(HOT_READERS)
        self._hot_idle: list[tuple[AsyncConnection, Any]] = []
        self.on_commit: list[Callable[[list[Event]], None]] = []

    async def close(self) -> None:
        for connection, _ in self._hot_idle:
            await connection.close()
        self._hot_idle.clear()
        await self._writer.dispose()
        await self._reader.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Open a connection, on which each statement sees what is committed when it starts. Raises Unavailable."""
        with _unavailable_when_lost():
            async with self._reader.connect() as connection:
                yield connection

    async def fetch(self, statement: Statement, *values: Any) -> list[Any]:
        """Return the rows of one statement, through the driver itself, for reads so small and frequent that SQLAlchemy
        would cost several times as much as the read.

        Raises Unavailable when the database cannot be reached.
        """
        async with self._hot:
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
        connection = await self._reader.connect()
        return connection, (await connection.get_raw_connection()).driver_connection

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[tuple[AsyncConnection, AsyncTransaction]]:
        """Open a transaction that appends no events by itself, for `write` and for migrations."""
        async with self._writer.connect() as connection, connection.begin() as transaction:
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


WRITER_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    f"cache_size=-{SQLITE_CACHE_KIB}",
    f"wal_autocheckpoint={SQLITE_CHECKPOINT_PAGES}",
)
READER_PRAGMAS = ("query_only=ON", f"cache_size=-{SQLITE_CACHE_KIB // SQLITE_READERS}")


def _prepare_sqlite(pragmas: Sequence[str], dbapi_connection: Any, _: Any) -> None:
    cursor = dbapi_connection.cursor()
    for pragma in (*pragmas, f"busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
    dbapi_connection.create_function("unicode_lower", 1, _lower, deterministic=True)


def _lower(text: str | None) -> str | None:
    return text.lower() if text is not None else None


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
