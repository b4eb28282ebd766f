"""The pools of connections: one for writes, and one for each lane of reads, so that a search never delays a sign-in.

Behind PgBouncer in transaction mode, a connection to PostgreSQL is ours only from BEGIN to the end of the transaction.
Outside a transaction, the next message may go to another connection, which may know another prepared statement by the
same name: its rows would be wrong, without any error. So with `has_pooler`, every statement runs in a transaction, no
prepared statement is kept, and the limits are set in each transaction. Without `has_pooler`, a connection whose
settings are not in effect is refused.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, cast

import asyncpg
from sqlalchemy import URL, Connection, event, text
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from core.databases import postgresql_urls
from core.errors import SettingsError
from core.texts.normal import without_case
from repository.engine import failures, lock_waits
from repository.engine.sqlite_file import SqliteConnection, SqliteFile, path_of

BEGIN = "BEGIN IMMEDIATE"
BUSY_TIMEOUT_SECONDS = 10  # how long a SQLite writer waits for another process's transaction
POOL_TIMEOUT_SECONDS = 30
# A write waits up to 5 s for a free connection and up to 10 s for a lock, but never beyond its deadline. PostgreSQL
# ends the transaction of a frozen worker earlier, so that the others can continue.
WRITER_POOL_SECONDS = 5
LOCK_SECONDS = 10.0
IDLE_IN_TRANSACTION_SECONDS = 8.0
CONNECT_SECONDS = 5
SQLITE_CACHE_KIB = 16 * 1024
SQLITE_READER_CACHE_KIB = 4 * 1024
# SQLite's virtual machine checks the interrupt flag after this many steps, which take about a millisecond.
SQLITE_STEPS = 20_000
# SQLite truncates its write-ahead log to this size, twice the usual size, when it reuses the log.
SQLITE_LOG_BYTES = 32 * 1024 * 1024
# In earlier versions, a checkpoint by one process during a write by another can damage the database file.
SAFE_SQLITE = (3, 51, 3)
# A checkpoint runs after each 16 MB of write-ahead log, so that bulk writes cause few checkpoints.
SQLITE_CHECKPOINT_PAGES = 4_000
# With these options, asyncpg sends unnamed statements, so that no statement is left in the pooler's connections.
WITHOUT_KEPT_STATEMENTS = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
# Together with its readers, a worker has 22 connections, so that 4 workers stay below PostgreSQL's default of 100.
POSTGRESQL_WRITERS = 10
# PostgreSQL ends a statement that exceeds the deadline of its read or write by this much, in case the worker is frozen
# and cannot cancel it.
STATEMENT_GRACE_SECONDS = 1.0

# With `off`, PostgreSQL reports a commit that a crash of the server may still undo, and watchers would already have its
# events. Any other value is kept. The value is set for every connection, so that a reload cannot turn it off.
SYNCHRONOUS_COMMIT = "'synchronous_commit', COALESCE(NULLIF(current_setting('synchronous_commit'), 'off'), 'on')"


class Lane(Enum):
    """The class of a read by its cost. A read waits only for reads of its own lane."""

    # A point read finds a few rows by an index, as a sign-in does.
    POINT = "point"
    # Reading a list returns one page and counts the rows of the whole list.
    LIST = "list"
    # A costly read takes long on a large table: it searches or sorts all rows, or tests each row many times.
    COSTLY = "costly"
    # An export reads a whole list in one transaction, as fast as its client takes the rows.
    EXPORT = "export"


# The number of connections that each worker has for each lane.
POINT_READERS = 5
LIST_READERS = 3
# With more connections, costly reads would compete for the processor with one another and with all other work.
COSTLY_READERS = 2
EXPORT_READERS = 4
_SIZES = (POINT_READERS, LIST_READERS, COSTLY_READERS, EXPORT_READERS)
READERS: Mapping[Lane, int] = dict(zip(Lane, _SIZES, strict=True))
# The number of connections that one client may use at a time. Point reads are too short to need such a limit.
LIST_READERS_PER_CLIENT = 2
COSTLY_READERS_PER_CLIENT = COSTLY_READERS // 2
READERS_PER_CLIENT: Mapping[Lane, int] = {
    Lane.POINT: POINT_READERS,
    Lane.LIST: LIST_READERS_PER_CLIENT,
    Lane.COSTLY: COSTLY_READERS_PER_CLIENT,
    Lane.EXPORT: EXPORT_READERS,  # `services.transfers` limits the exports of a client
}
# The number of connections that the patient reads of all clients, which are those of snapshots, may use together.
PATIENT_LIST_READERS = 2
PATIENT_COSTLY_READERS = 1
PATIENT_READERS: Mapping[Lane, int] = {
    Lane.POINT: POINT_READERS,
    Lane.LIST: PATIENT_LIST_READERS,
    Lane.COSTLY: PATIENT_COSTLY_READERS,
    Lane.EXPORT: EXPORT_READERS,
}


@dataclass(frozen=True, slots=True)
class Engines:
    """The pools of one process."""

    writer: AsyncEngine
    readers: Mapping[Lane, AsyncEngine]
    # The statement that begins the transaction of a read that bypasses SQLAlchemy; empty if no transaction is needed.
    begin_read: str = ""

    async def dispose(self) -> None:
        for engine in (self.writer, *self.readers.values()):
            await engine.dispose()


def sqlite_is_safe(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> bool:
    """Return whether several processes may write to one file with this version of SQLite."""
    return version >= SAFE_SQLITE


def open_sqlite(url: str) -> tuple[Engines, SqliteFile]:
    """Return the engines of a SQLite file, and the file. Raises what SqliteFile raises."""
    path = path_of(url)
    file = SqliteFile(url)

    def engine(size: int, pragmas: Sequence[str]) -> AsyncEngine:
        made = create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(path)),
            pool_size=size,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT_SECONDS,
            connect_args={
                "async_creator_fn": file.connect,
                "factory": SqliteConnection,
                "timeout": BUSY_TIMEOUT_SECONDS,
                "isolation_level": None,
            },
        )
        event.listen(made.sync_engine, "connect", partial(_prepare_sqlite, pragmas))
        return made

    readers = {lane: _interruptible(engine(size, READER_PRAGMAS)) for lane, size in READERS.items()}
    for each in readers.values():
        event.listen(each.sync_engine, "connect", _add_flag)
        file.follow(each, is_writer=False)
    writer = engine(1, WRITER_PRAGMAS)
    file.follow(writer, is_writer=True)
    return Engines(writer, readers), file


@asynccontextmanager
async def busy_timeout(driver: Any, seconds: float) -> AsyncIterator[None]:
    """In the `with` block, let a SQLite connection wait for locks for `seconds`."""
    try:
        await driver.execute_fetchall(f"PRAGMA busy_timeout={_milliseconds(seconds)}")
        yield
    finally:
        await driver.execute_fetchall(f"PRAGMA busy_timeout={_milliseconds(BUSY_TIMEOUT_SECONDS)}")


async def begin_sqlite(driver: Any, seconds: float) -> None:
    """Begin a transaction that may write. Wait for the lock for at most `seconds`."""
    if seconds >= BUSY_TIMEOUT_SECONDS:  # the usual case, without the two statements that change the timeout
        await driver.execute_fetchall(BEGIN)
        return
    async with busy_timeout(driver, seconds):
        await driver.execute_fetchall(BEGIN)


def open_postgresql(url: str, read_seconds: float, *, has_pooler: bool = False) -> Engines:
    """Return the engines of a PostgreSQL database, for direct connections or for PgBouncer. Raises SettingsError for a
    certificate that cannot be read.
    """
    given = postgresql_urls.options_of(url)
    _require_files(given.passed_on)
    # SQLAlchemy parses the user, the password, the host and the database; only the driver understands the options.
    address = make_url("postgresql+asyncpg" + url[url.index("://") :]).set(query={})
    connect_args: dict[str, Any] = {"timeout": given.connect_seconds or CONNECT_SECONDS}
    connect_args |= {"dsn": given.dsn} if given.dsn is not None else {}
    if has_pooler:
        connect_args |= WITHOUT_KEPT_STATEMENTS

    def engine(size: int, pool_seconds: float, settings: dict[str, str], **options: Any) -> AsyncEngine:
        # A direct connection takes the settings when it is opened, without an additional round trip.
        at_connect = {} if has_pooler else settings
        server_settings = {"application_name": "marquee", **given.server_settings, **at_connect}
        made = create_async_engine(
            address,
            pool_size=size,
            max_overflow=0,
            pool_timeout=pool_seconds,
            connect_args={**connect_args, "server_settings": server_settings},
            **options,
        )
        event.listen(made.sync_engine, "checkout", _replace_closed)
        if has_pooler:
            event.listen(made.sync_engine, "begin", partial(_set_in_transaction, settings))
        else:
            # This check runs before SQLAlchemy's own first statements, because a pooler may mix those up.
            event.listen(made.sync_engine, "connect", partial(_require_settings, settings), insert=True)
        return made

    def reader(lane: Lane) -> AsyncEngine:
        settings = reader_settings(lane)
        if lane is Lane.EXPORT:  # all statements of such a transaction see the database as of its first statement
            return engine(READERS[lane], POOL_TIMEOUT_SECONDS, settings, isolation_level="REPEATABLE READ")
        if has_pooler:
            # With a pooler, reads are not interruptible, because after a cancelled BEGIN it is unknown whether a
            # transaction is open.
            return engine(READERS[lane], POOL_TIMEOUT_SECONDS, settings, isolation_level="READ COMMITTED")
        # Autocommit saves round trips: a read of one statement needs no BEGIN and ROLLBACK around it.
        return _interruptible(engine(READERS[lane], POOL_TIMEOUT_SECONDS, settings, isolation_level="AUTOCOMMIT"))

    def reader_settings(lane: Lane) -> dict[str, str]:
        # JIT compilation costs planning time and gains nothing for such short statements.
        settings = {"jit": "off", "statement_timeout": _milliseconds(read_seconds + STATEMENT_GRACE_SECONDS)}
        if lane is not Lane.POINT:
            # A generic plan, made without the words of a search, reads the whole table, as if many rows matched.
            settings["plan_cache_mode"] = "force_custom_plan"
        if lane in (Lane.COSTLY, Lane.EXPORT):
            # A parallel read would take processor cores from the cheaper lanes.
            settings["max_parallel_workers_per_gather"] = "0"
        if has_pooler:
            # Without this limit, a frozen worker would keep one of the pooler's connections.
            settings["idle_in_transaction_session_timeout"] = _milliseconds(IDLE_IN_TRANSACTION_SECONDS)
        return settings

    limits = {
        "jit": "off",
        "lock_timeout": _milliseconds(LOCK_SECONDS),
        "idle_in_transaction_session_timeout": _milliseconds(IDLE_IN_TRANSACTION_SECONDS),
        "statement_timeout": _milliseconds(lock_waits.WRITE_SECONDS + STATEMENT_GRACE_SECONDS),
    }
    writer = engine(POSTGRESQL_WRITERS, WRITER_POOL_SECONDS, limits)
    locally = "".join(f"; SET LOCAL {name} = '{value}'" for name, value in reader_settings(Lane.POINT).items())
    begin = f"BEGIN ISOLATION LEVEL READ COMMITTED{locally}" if has_pooler else ""
    return Engines(writer, {lane: reader(lane) for lane in Lane}, begin)


async def fetch(driver: Any, begin: str, query: str, values: Sequence[Any]) -> Sequence[Any]:
    """Return the rows of one statement on PostgreSQL, in a transaction unless `begin` is empty.

    After an error, the connection cannot be used again.
    """
    if not begin:
        return cast(Sequence[Any], await driver.fetch(query, *values))
    await driver.execute(begin)
    found: Sequence[Any] = await driver.fetch(query, *values)
    await driver.execute("COMMIT")
    return found


def _set_in_transaction(settings: Mapping[str, str], connection: Connection) -> None:
    values = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    connection.exec_driver_sql(f"SELECT {values}, set_config({SYNCHRONOUS_COMMIT}, true)")


def _require_settings(settings: Mapping[str, str], dbapi_connection: Any, _: Any) -> None:
    """Raise PoolerFound unless the settings of a new connection are in effect. Turn on synchronous commits.

    PgBouncer refuses connections with settings, or drops the settings that its `ignore_startup_parameters` lists.
    """
    is_set = f"current_setting('statement_timeout')::interval = '{settings['statement_timeout']} ms'::interval"
    query = f"SELECT {is_set}, set_config({SYNCHRONOUS_COMMIT}, false)"

    async def are_set(driver: Any) -> bool:
        try:
            found: bool = await driver.fetchval(query, timeout=CONNECT_SECONDS)
        except (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError):
            found = False  # the statement went to a connection that another client has used
        except BaseException:
            driver.terminate()
            raise
        if not found:
            driver.terminate()
        return found

    if not dbapi_connection.run_async(are_set):
        raise failures.PoolerFound(failures.POOLER)


def _require_files(options: Mapping[str, str]) -> None:
    """Raise SettingsError for a file that cannot be read. The driver's own error would not name the file."""
    for name in postgresql_urls.FILES:
        if name in options and not (Path(options[name]).is_file() and os.access(options[name], os.R_OK)):
            raise SettingsError(f"DATABASE_URL: expected a readable file for the option {name}.")


def _replace_closed(dbapi_connection: Any, record: Any, proxy: Any) -> None:
    """Let the pool connect again instead of handing out a connection that the server has closed."""
    if dbapi_connection.driver_connection.is_closed():
        raise InvalidatePoolError


async def require_utf8(connection: AsyncConnection) -> None:
    """Raise SettingsError unless the PostgreSQL database can store every string."""
    encoding = (await connection.execute(text("SHOW server_encoding"))).scalar_one()
    if encoding != "UTF8":
        raise SettingsError(
            f"DATABASE_URL: expected a database with the encoding UTF8, got {encoding}; create it with --encoding=UTF8."
        )


async def lift_limits(connection: AsyncConnection) -> None:
    """Remove the time limits of a transaction on PostgreSQL, for migrations."""
    for name in ("lock_timeout", "idle_in_transaction_session_timeout", "statement_timeout"):
        await connection.execute(text(f"SET LOCAL {name} = 0"))


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


# --- interrupted reads

# The key under which the interrupt flag of a SQLite connection is stored. The connection's thread checks the flag while
# a statement runs.
_INTERRUPT = "interrupt"


def _interruptible(engine: AsyncEngine) -> AsyncEngine:
    """Keep connections after a cancelled read, because both drivers can use them again once the statement has ended."""
    event.listen(engine.sync_engine, "handle_error", _on_error)
    return engine


def _on_error(context: ExceptionContext) -> None:
    if isinstance(context.original_exception, asyncio.CancelledError) and context.connection is not None:
        context.is_disconnect = False
        # The flag is set here because SQLAlchemy closes the cursor next, which waits for the end of the statement.
        _set_flag(context.connection, True)


def interrupt(connection: AsyncConnection) -> None:
    """Make the running statement, and any later one, end with an error. Do nothing on PostgreSQL."""
    _set_flag(connection.sync_connection, True)


def allow(connection: AsyncConnection) -> None:
    """Allow statements to run again after `interrupt`."""
    _set_flag(connection.sync_connection, False)


def _set_flag(connection: Connection | None, value: bool) -> None:
    flag: threading.Event | None = connection.info.get(_INTERRUPT) if connection is not None else None
    if flag is not None and value != flag.is_set():
        flag.set() if value else flag.clear()


def _add_flag(dbapi_connection: Any, record: Any) -> None:
    # Unlike `sqlite3_interrupt`, a flag also ends a statement that is about to begin.
    flag = record.info[_INTERRUPT] = threading.Event()
    dbapi_connection.run_async(lambda driver: driver.set_progress_handler(flag.is_set, SQLITE_STEPS))


# --- SQLite

WRITER_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    f"cache_size=-{SQLITE_CACHE_KIB}",
    f"wal_autocheckpoint={SQLITE_CHECKPOINT_PAGES}",
    f"journal_size_limit={SQLITE_LOG_BYTES}",
)
READER_PRAGMAS = ("query_only=ON", f"cache_size=-{SQLITE_READER_CACHE_KIB}")


def _prepare_sqlite(pragmas: Sequence[str], dbapi_connection: Any, _: Any) -> None:
    cursor = dbapi_connection.cursor()
    for pragma in (*pragmas, f"busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
    dbapi_connection.create_function("unicode_lower", 1, _lower, deterministic=True)
    dbapi_connection.create_function("has_words", -1, _has_words, deterministic=True)


def _lower(text: str | None) -> str | None:
    return text.lower() if text is not None else None


def _has_words(words: str, *texts: str | None) -> bool:
    """Return whether each of `words`, which are lowercase and separated by spaces, occurs in one of the texts, ignoring
    case.

    `repository.generic.filter_sql` calls this SQL function once per row, because a call from SQLite into Python costs
    more than the search.
    """
    searched = without_case("\n".join([text for text in texts if text is not None]))
    for word in words.split(" "):  # noqa: SIM110 (a generator would double the time of a search)
        if word not in searched:
            return False
    return True
