"""What a database error means: a refused transaction, a lost database, or a bug of ours.

The bulk and hot paths use the drivers directly, so errors arrive both wrapped by SQLAlchemy and bare.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from core.errors import Unavailable
from core.texts.shortened import shortened

MAX_REASON_LENGTH = 300  # a driver's message is shortened to this length in log events
DATABASE_ERRORS: tuple[type[Exception], ...] = (
    DBAPIError,
    PoolTimeout,
    OSError,  # refused connections, and time-outs
    sqlite3.Error,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that broke in the middle of a statement
)
MOVED_FILE = "the database file was moved or replaced; restart the service"
DAMAGED_FILE = "the database file is damaged"
DAMAGED_DATABASE = "the database is damaged"
FAILING_DISK = "the disk is failing"
TABLE_CHANGED = "a table has changed"
TABLE_MISSING = "a table is missing"
COLUMN_MISSING = "a column is missing"
COLUMN_CHANGED = "a column has an unexpected type"
LOCKED = "writes wait for a lock that another transaction holds"
HEAD_BEHIND = "the head of the event log is behind its events"
TABLE_FORBIDDEN = "the service's role is not allowed to use a table"
_LASTING = frozenset(
    (DAMAGED_FILE, DAMAGED_DATABASE, FAILING_DISK, TABLE_CHANGED, TABLE_MISSING, COLUMN_MISSING, COLUMN_CHANGED,
     TABLE_FORBIDDEN)
)  # fmt: skip
POOLER = "PgBouncer is in front of the database; set DATABASE_POOLER=on, or connect to PostgreSQL directly"
POOLER_MODE = "PgBouncer runs in statement mode; set its pool_mode to transaction or session"
# Parts of PgBouncer's error messages. The SQLSTATEs of these errors do not suffice, because other errors share them.
_OF_POOLERS = {"unsupported startup parameter": POOLER, "statement pooling mode": POOLER_MODE}
# What `/readyz` reports for an error, by the first characters of the SQLSTATE (PostgreSQL manual, appendix A) or by a
# part of SQLite's message. All these errors come from the database's environment, not from our SQL and types.
_FOREIGN_STATES = {
    "08": "the connection to the database is lost",
    "25006": "the database is read-only",  # for example after a failover
    "25P03": "the database ended an idle transaction",
    "0A000": TABLE_CHANGED,
    "22P02": COLUMN_CHANGED,
    "28": "the database rejects the service's role",
    "3D000": "the database does not exist",
    "42501": TABLE_FORBIDDEN,
    "42P01": TABLE_MISSING,
    "42703": COLUMN_MISSING,
    "42804": COLUMN_CHANGED,
    "42846": COLUMN_CHANGED,
    "42883": COLUMN_CHANGED,
    "42P18": COLUMN_CHANGED,
    "53100": "the disk is full",
    "53": "the database is out of resources",
    "55000": "the database does not accept connections",
    "55P03": LOCKED,
    "57014": "the database ended a statement that took too long",
    "57P": "the database is starting or stopping",
    "58": FAILING_DISK,
    "XX": DAMAGED_DATABASE,
}
_FOREIGN_ON_SQLITE = {
    "database or disk is full": "the disk is full",
    "unable to open database": "the database file cannot be opened",
    "disk i/o error": FAILING_DISK,
    "readonly database": "the database file is read-only",
    "database disk image is malformed": DAMAGED_FILE,
    "file is not a database": DAMAGED_FILE,
    "no such table": TABLE_MISSING,
    "no such column": COLUMN_MISSING,
    "has no column named": COLUMN_MISSING,
    "database is locked": LOCKED,
    "database table is locked": LOCKED,
    "interrupted": "a statement was interrupted",
    "unique constraint failed: events.seq": HEAD_BEHIND,
}
_REFUSED_STATES = ("40",)  # serialization failure, deadlock
_REFUSED_ON_SQLITE = ("database is locked", "database table is locked")
# The SQLSTATEs of statement time-outs and lock time-outs.
_WAITED_STATES = ("57014", "55P03")
# The SQLSTATEs of connection exceptions, terminated connections, ended idle sessions, and prepared plans that are
# invalid, or made for other types, because a table has changed.
_STALE_STATES = ("08", "57P01", "57P05", "0A000", "42804", "42883")
# A change of a table makes the prepared statements of a connection invalid, even after the change is undone.
_SCHEMA_STATES = ("0A000", "42", "3F000")
log = structlog.get_logger("database")


class PoolerFound(asyncpg.InterfaceError):  # type: ignore[misc]  # asyncpg has no types
    """A pooler is in front of the database, and would mix up the statements of different connections."""


class WriteTooLate(TimeoutError):
    """A write did not reach COMMIT by its deadline, and was rolled back."""


class FileLost(sqlite3.OperationalError):
    """SQLite's file cannot be used: rows committed now would be missing after a restart. The message says why."""


def _driver_error(error: BaseException) -> BaseException:
    """Return the driver's own error, even if SQLAlchemy has wrapped it."""
    if not isinstance(error, DBAPIError) or error.orig is None:
        return error
    return error.orig.__cause__ or error.orig


def _state(error: BaseException) -> str:
    # SQLAlchemy does not copy the SQLSTATE of an invalid plan to its own error, so read the driver's error.
    return str(getattr(_driver_error(error), "sqlstate", None) or "")


def _message(error: BaseException) -> str:
    """Return SQLite's message in lowercase, or an empty string for PostgreSQL, whose errors have SQLSTATEs.

    SQLAlchemy's own message is not used, because it repeats the statement's values, which a client can choose.
    """
    inner = _driver_error(error)
    return str(inner).lower() if isinstance(inner, sqlite3.Error) else ""


def pooler_problem(error: BaseException) -> str | None:
    """Return what is wrong with the pooler in front of the database, or None if the error has another cause."""
    inner = _driver_error(error)
    if isinstance(inner, PoolerFound):
        return POOLER
    # The SQLSTATE is not checked, because it depends on whether the connection was already open.
    if not isinstance(inner, asyncpg.PostgresConnectionError):
        return None
    return next((words for part, words in _OF_POOLERS.items() if part in str(inner)), None)


def is_refused(error: BaseException) -> bool:
    """Return whether the database rolled back because of other transactions, so that another run may succeed."""
    return _state(error).startswith(_REFUSED_STATES) or any(text in _message(error) for text in _REFUSED_ON_SQLITE)


def is_foreign(error: BaseException) -> bool:
    """Return whether the error comes from the database's environment rather than from our SQL or types."""
    return is_refused(error) or _words(error) is not None


def in_words(error: BaseException | None) -> str:
    """Return what is wrong with the database, in words for operators, without names and addresses."""
    return (_words(error) if error is not None else None) or "the database cannot be used"


def _words(error: BaseException) -> str | None:
    if (problem := pooler_problem(error)) is not None:
        return problem
    state, inner = _state(error), _driver_error(error)
    if isinstance(inner, FileLost):
        return str(inner)
    if isinstance(error, WriteTooLate):
        return "writes take too long, or wait too long for others"
    if getattr(inner, "constraint_name", None) == "pk_events":
        return HEAD_BEHIND
    for start, words in _FOREIGN_STATES.items():
        if state.startswith(start):
            return words
    if isinstance(error, PoolTimeout):
        return "all connections to the database are in use"
    if isinstance(inner, asyncpg.OutdatedSchemaCacheError):
        return TABLE_CHANGED
    if _does_not_fit(inner):
        return COLUMN_CHANGED
    if isinstance(error, OSError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return "not reachable"
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return "not reachable"
    message = _message(error)
    return next((words for part, words in _FOREIGN_ON_SQLITE.items() if part in message), None)


def _does_not_fit(inner: BaseException) -> bool:
    """Return whether asyncpg could not encode a value for its column. Server errors have subclasses of DataError."""
    return type(inner) is asyncpg.DataError


def is_lasting(error: BaseException) -> bool:
    """Return whether a table or the file is not as expected, a problem that lasts until an operator repairs it."""
    return _words(error) in _LASTING


def is_about_schema(error: BaseException) -> bool:
    """Return whether the connection's prepared statements may be invalid, because a table is not as expected."""
    return _does_not_fit(_driver_error(error)) or _state(error).startswith(_SCHEMA_STATES)


def is_stale(error: BaseException | None) -> bool:
    """Return whether a read failed only because its pooled connection was dead or its prepared plan invalid."""
    if error is None:
        return False
    dead = (ConnectionResetError, BrokenPipeError, asyncpg.InterfaceError, asyncpg.InternalClientError)
    if isinstance(_driver_error(error), (*dead, asyncpg.OutdatedSchemaCacheError)):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return _state(error).startswith(_STALE_STATES)


def may_run_again(error: BaseException) -> bool:
    """Return whether to run the transaction again: not if it timed out while waiting, because it would wait again."""
    has_waited = isinstance(error, PoolTimeout | WriteTooLate) or _state(error).startswith(_WAITED_STATES)
    # On SQLite, errors of the environment, such as a full disk or a missing table, are lasting. On PostgreSQL, an
    # invalid plan or a lost connection is not.
    is_sqlite = isinstance(_driver_error(error), sqlite3.Error)
    return is_refused(error) or (is_foreign(error) and not has_waited and not is_sqlite)


def is_blocked(error: BaseException) -> bool:
    """Return whether the database rolled back because another transaction held a lock for too long."""
    return _state(error) == "55P03" or any(text in _message(error) for text in _REFUSED_ON_SQLITE)


def first_line(error: BaseException) -> str:
    """Return the first line of the driver's message, for log events and start-up errors.

    The line is shortened, because it may quote a value that a client sent. If the message is empty, return the class of
    the error or, for a time-out, what it means.
    """
    line = shortened(str(getattr(error, "orig", None) or error).split("\n", 1)[0], MAX_REASON_LENGTH)
    if not line and isinstance(error, TimeoutError):
        # A server that is not PostgreSQL, such as Redis, usually waits for more input instead of responding.
        return "the server sent no valid response in time"
    return line or type(error).__name__


@contextmanager
def unavailable_when_lost() -> Iterator[None]:
    """Raise Unavailable for an error that comes from the database's environment."""
    try:
        yield
    except DATABASE_ERRORS as error:
        if not is_foreign(error):
            raise
        raise unavailable(error) from error


def unavailable(error: BaseException, *, is_unknown: bool = False) -> Unavailable:
    """Return the error for the client. With `is_unknown`, COMMIT was sent but no reply to it was received."""
    log.warning("database unavailable", reason=first_line(error))
    if isinstance(error, WriteTooLate):
        return Unavailable("The write took too long or had to wait too long for others. Nothing was written; try again")
    if is_blocked(error):
        return Unavailable("Another transaction holds a lock that this one needs. Nothing was written; try again")
    outcome = "it is unknown whether anything was written" if is_unknown else "nothing was written; try again later"
    return Unavailable(f"The database is unavailable; {outcome}")
