"""What a database error means: a refused transaction, a lost database, or a bug of ours.

The bulk and hot paths use the drivers directly, so errors arrive both wrapped by SQLAlchemy and bare.
"""

from __future__ import annotations

import sqlite3

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

DATABASE_ERRORS: tuple[type[Exception], ...] = (
    DBAPIError,
    PoolTimeout,
    OSError,  # refused connections, and time-outs
    sqlite3.Error,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that broke in the middle of a statement
)
# What readiness says, by the start of the SQLSTATE (PostgreSQL manual, appendix A), and by a part of SQLite's message.
# All of them come from the database's surroundings, not from our SQL and types.
_FOREIGN_STATES = {
    "08": "the connection to the database is lost",
    "25006": "the database is read-only",  # as after a failover
    "25P03": "the database ended a transaction that stood still",
    "28": "the database rejects the service's role",
    "3D000": "the database does not exist",
    "42501": "the service's role may not use a table",
    "42P01": "a table is missing",
    "42703": "a column is missing",
    "42804": "a column has another type",
    "42883": "a column has another type",
    "53100": "the disk is full",
    "53": "the database is out of resources",
    "55000": "the database does not accept connections",
    "55P03": "writes wait for a lock that another transaction holds",
    "57014": "the database ended a statement that took too long",
    "57P": "the database is starting or stopping",
    "58": "the database's disk fails",
    "XX": "the database is damaged",
}
_FOREIGN_ON_SQLITE = {
    "database or disk is full": "the disk is full",
    "unable to open database": "the database file cannot be opened",
    "disk i/o error": "the disk fails",
    "readonly database": "the database file is read-only",
    "database disk image is malformed": "the database file is damaged",
    "file is not a database": "the database file is damaged",
    "no such table": "a table is missing",
    "no such column": "a column is missing",
    "has no column named": "a column is missing",
    "database is locked": "writes wait for a lock that another transaction holds",
    "database table is locked": "writes wait for a lock that another transaction holds",
    "interrupted": "a statement was interrupted",
}
_REFUSED_STATES = ("40",)  # serialization failure, deadlock
_REFUSED_ON_SQLITE = ("database is locked", "database table is locked")
_WAITED_STATES = ("57014", "55P03")  # statement and lock time-outs
_STALE_STATES = ("08", "57P01")  # connection exceptions; the connection was terminated


def _state(error: BaseException) -> str:
    inner = error.orig if isinstance(error, DBAPIError) else error
    return str(getattr(inner, "sqlstate", None) or "")


def is_refused(error: BaseException) -> bool:
    """Return whether the database rolled back because of other transactions, so that running again may succeed."""
    return _state(error).startswith(_REFUSED_STATES) or any(text in str(error) for text in _REFUSED_ON_SQLITE)


def is_foreign(error: BaseException) -> bool:
    """Return whether the error comes from the database's surroundings rather than from our SQL or types."""
    return is_refused(error) or _words(error) is not None


def in_words(error: BaseException | None) -> str:
    """Return what is wrong with the database, for operators, without names and addresses."""
    return (_words(error) if error is not None else None) or "the database cannot be used"


def _words(error: BaseException) -> str | None:
    state, message = _state(error), str(error).lower()
    for start, words in _FOREIGN_STATES.items():
        if state.startswith(start):
            return words
    if isinstance(error, PoolTimeout):
        return "all connections to the database are in use"
    if isinstance(error, asyncpg.InvalidCachedStatementError | asyncpg.OutdatedSchemaCacheError):
        return "a table has changed"
    if isinstance(error, OSError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return "not reachable"
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return "not reachable"
    return next((words for part, words in _FOREIGN_ON_SQLITE.items() if part in message), None)


def is_stale(error: BaseException | None) -> bool:
    """Return whether a read failed only because its pooled connection was dead, or its prepared plan void."""
    inner = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(inner, ConnectionResetError | BrokenPipeError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return error is not None and _state(error).startswith(_STALE_STATES)


def may_run_again(error: BaseException) -> bool:
    """Return whether the transaction may be run again. Without a free connection, or a lock, it would wait again."""
    has_waited = isinstance(error, PoolTimeout) or _state(error).startswith(_WAITED_STATES)
    return is_refused(error) or (is_foreign(error) and not has_waited)


def is_blocked(error: BaseException) -> bool:
    """Return whether another transaction held a lock for so long that the database rolled back."""
    return _state(error) == "55P03" or any(text in str(error) for text in _REFUSED_ON_SQLITE)


def first_line(error: BaseException) -> str:
    """Return the first line of the driver's message, for logs and messages at start."""
    return str(getattr(error, "orig", None) or error).split("\n", 1)[0]
