"""The waits for locks in the database: the deadline of a write and, for `/readyz`, how long the writes of this process
have been waiting for the lock that every write takes, and which tables another transaction has locked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import models
from core.errors import Unavailable
from repository.engine import failures
from repository.engine.statement import Statement

# The time of a write, with all its waits and attempts. On SQLite, it ends when the write has the lock that every write
# takes, so it does not include the write's own work. On PostgreSQL, where each statement may wait for a lock, it ends
# when COMMIT is sent, so it includes the work. The client gets its 503 within 15 s.
WRITE_SECONDS = 14.0
# A lock in one of these modes, or a request for it that is ahead of a write, makes every write to the table wait. Locks
# of single rows are not in this list: they delay only the writes to these rows.
_MAY_LOOK = Statement(sqlite="", postgresql="SELECT has_table_privilege('pg_catalog.pg_locks', 'SELECT')")
_LOCKED_TABLES = Statement(
    sqlite="",
    postgresql="SELECT DISTINCT relname FROM pg_locks JOIN pg_class ON pg_class.oid = relation"
    " WHERE locktype = 'relation'"
    " AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    " AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')"
    " AND relname = ANY($1::text[]) AND pg_table_is_visible(pg_class.oid) ORDER BY relname",
)


def lift(limit: asyncio.Timeout) -> float:
    """Lift the limit and return the seconds that were left. Raises TimeoutError if the limit has expired.

    A limit may expire without an exception, because before Python 3.12, `wait_for`, which the pools use, may swallow a
    cancellation.
    """
    if limit.expired():
        raise TimeoutError
    when = limit.when()
    limit.reschedule(None)
    return max(0.0, when - asyncio.get_running_loop().time()) if when is not None else 0.0


class LockWaits:
    """The waits for SQLite's write lock or, on PostgreSQL, for the row of the log's head."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}  # the start of each wait, oldest first
        self._next = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the duration of the `with` block as a wait."""
        self._next += 1
        number = self._next
        self._since[number] = time.monotonic()
        try:
            yield
        finally:
            del self._since[number]

    @property
    def seconds(self) -> float:
        """The time since the oldest wait began; 0 when there is none."""
        oldest = next(iter(self._since.values()), None)
        return time.monotonic() - oldest if oldest is not None else 0.0


class TableLocks:
    """The locks of whole tables that other transactions hold on PostgreSQL. `fetch` returns the rows of a statement,
    and raises Unavailable.

    They are looked up only after a write has failed or a read has timed out, so that the moment for which a harmless
    statement, such as a VACUUM, locks a table does not make a worker unready. The lookup only reads, because a LOCK
    TABLE would need rights that the service's role may lack, and could cause a deadlock with a migration.
    """

    def __init__(self, fetch: Callable[..., Awaitable[Sequence[Any]]]) -> None:
        self._fetch = fetch
        self._are_suspected = False

    def suspect(self) -> None:
        """Let `problem` look for locks until it finds none."""
        self._are_suspected = True

    async def problem(self) -> str | None:
        """Return which tables are locked, or why this is unknown; None if none is, or if the role may not know."""
        if not self._are_suspected:
            return None
        try:
            ((may_look,),) = await self._fetch(_MAY_LOOK)
            found = await self._fetch(_LOCKED_TABLES, list(models.metadata.tables)) if may_look else ()
        except Unavailable as error:
            return failures.in_words(error.__cause__)
        self._are_suspected = bool(found)
        return f"{failures.LOCKED}: {', '.join(name for (name,) in found)}" if found else None
