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
# SQLSTATE classes (PostgreSQL manual, appendix A): connection exceptions; insufficient resources, including a full
# disk; shutdown, crash, cannot connect now; statement and lock time-outs; read-only, as after a failover.
_LOST_STATES = ("08", "53", "57P", "57014", "55P03", "25006")
_STALE_STATES = ("08", "57P01")  # connection exceptions; the connection was terminated
_LOST_ON_SQLITE = ("unable to open database", "disk i/o error", "database or disk is full", "readonly database")
_REFUSED_STATES = ("40",)  # serialization failure, deadlock
_REFUSED_ON_SQLITE = ("database is locked", "database table is locked")


def _state(error: BaseException) -> str:
    inner = error.orig if isinstance(error, DBAPIError) else error
    return str(getattr(inner, "sqlstate", None) or "")


def is_refused(error: BaseException) -> bool:
    """Return whether the database rolled back because of other transactions, so that another run may succeed."""
    return _state(error).startswith(_REFUSED_STATES) or any(text in str(error) for text in _REFUSED_ON_SQLITE)


def is_lost(error: BaseException) -> bool:
    """Return whether the database cannot be reached or cannot write."""
    if isinstance(error, OSError | PoolTimeout | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return _state(error).startswith(_LOST_STATES) or any(text in str(error).lower() for text in _LOST_ON_SQLITE)


def is_foreign(error: BaseException) -> bool:
    """Return whether the error comes from the database's environment rather than from our SQL or types."""
    return is_refused(error) or is_lost(error)


def is_stale(error: BaseException | None) -> bool:
    """Return whether a read failed only because its pooled connection was dead, or its prepared plan void."""
    inner = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(inner, ConnectionResetError | BrokenPipeError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return error is not None and _state(error).startswith(_STALE_STATES)


def may_run_again(error: BaseException) -> bool:
    """Return whether the transaction may be run again. With no free connection, it would only wait again."""
    return is_refused(error) or (is_lost(error) and not isinstance(error, PoolTimeout))


def first_line(error: BaseException) -> str:
    """Return the first line of the driver's message, for log events and start-up errors."""
    return str(getattr(error, "orig", None) or error).split("\n", 1)[0]
