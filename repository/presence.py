"""Presence rows: each worker stores its counts of watchers for the other workers, under a lease.

The lease of a dead worker expires, and another worker deletes its rows. A worker that was only paused learns of the
deletion from `store`. Presence is ephemeral, so nothing here emits an event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, update
from sqlalchemy.dialects import postgresql, sqlite

import models
from repository.engine.database import Database
from repository.engine.statement import Statement, statement
from repository.engine.transaction import Transaction
from repository.leases import CLOCK_GRACE_SECONDS, has_expired, now_in_seconds

LEASE_SECONDS = 9.0
ANONYMOUS = 0  # the user id of every anonymous connection

_NOW = [now_in_seconds(is_sqlite=is_sqlite) for is_sqlite in (True, False)]
_LATEST = LEASE_SECONDS + CLOCK_GRACE_SECONDS  # the same limit as in `leases.has_expired`
_IS_LIVE = [f"until BETWEEN {now} AND {now} + {_LATEST}" for now in _NOW]
_WORKERS = Statement(*(f"SELECT id, version, {is_live} FROM workers" for is_live in _IS_LIVE))  # noqa: S608 (our own clock)
_ROWS = statement("SELECT topic, user_id, username, connections, lingering FROM presence WHERE worker = $1")
_PUT = statement(
    "INSERT INTO presence (worker, topic, user_id, username, connections, lingering) VALUES ($1, $2, $3, $4, $5, $6)"
    " ON CONFLICT (worker, topic, user_id) DO UPDATE SET"
    " username = excluded.username, connections = excluded.connections, lingering = excluded.lingering"
)
_DROP = statement("DELETE FROM presence WHERE worker = $1 AND topic = $2 AND user_id = $3")


@dataclass(frozen=True, slots=True)
class Row:
    """One user's sockets on one worker that watch a topic: how many are open, and how many have just closed."""

    topic: str
    user_id: int
    username: str | None
    connections: int
    lingering: int

    @property
    def is_empty(self) -> bool:
        return self.connections == 0 and self.lingering == 0


async def store(database: Database, worker: str, version: int, changed: Sequence[Row], *, is_new: bool) -> bool:
    """Write the changed rows, delete the empty ones, and renew the lease, or take it if `is_new`.

    Return False, and write nothing, when another worker has deleted this worker's rows after its lease expired.
    """

    async def work(tx: Transaction) -> bool:
        table = models.workers
        values = {"until": now_in_seconds(is_sqlite=tx.is_sqlite) + LEASE_SECONDS, "version": version}
        if is_new:
            insert = sqlite.insert(table) if tx.is_sqlite else postgresql.insert(table)
            taken = insert.values(id=worker, **values).on_conflict_do_update(index_elements=[table.c.id], set_=values)
            await tx.connection.execute(taken)
        else:
            renewed = update(table).where(table.c.id == worker).values(values).returning(table.c.id)
            if (await tx.connection.execute(renewed)).one_or_none() is None:
                return False
        put = [
            (worker, row.topic, row.user_id, row.username, row.connections, row.lingering)
            for row in changed
            if not row.is_empty
        ]
        drop = [(worker, row.topic, row.user_id) for row in changed if row.is_empty]
        for one, records in ((_PUT, put), (_DROP, drop)):
            if records:
                await tx.execute_many(one, records)
        return True

    return await database.write(work)


async def leave(database: Database, worker: str) -> None:
    """Delete the worker's lease and rows."""

    async def work(tx: Transaction) -> None:
        await tx.connection.execute(delete(models.workers).where(models.workers.c.id == worker))
        await tx.connection.execute(delete(models.presence).where(models.presence.c.worker == worker))

    await database.write(work)


async def linger(database: Database, worker: str, version: int, seconds: float) -> None:
    """Turn the connections of a stopping worker into lingering ones, which expire after `seconds`.

    The worker's clients reconnect to other workers meanwhile.
    """

    async def work(tx: Transaction) -> None:
        table, rows = models.workers, models.presence
        until = now_in_seconds(is_sqlite=tx.is_sqlite) + seconds
        await tx.connection.execute(update(table).where(table.c.id == worker).values(until=until, version=version))
        left = {"lingering": rows.c.lingering + rows.c.connections, "connections": 0}
        await tx.connection.execute(update(rows).where(rows.c.worker == worker).values(left))

    await database.write(work)


@dataclass(frozen=True, slots=True)
class Workers:
    """The version of each live worker by its id, and the ids of the workers whose lease has expired."""

    live: dict[str, int]
    expired: list[str]


async def workers(database: Database) -> Workers:
    found = await database.fetch(_WORKERS)
    return Workers({row[0]: row[1] for row in found if row[2]}, [row[0] for row in found if not row[2]])


async def rows_of(database: Database, worker: str) -> list[Row]:
    """Return the rows that a worker has stored."""
    return [Row(*row) for row in await database.fetch(_ROWS, worker)]


async def sweep(database: Database, expired: Sequence[str]) -> None:
    """Delete the rows of workers whose lease has expired, unless they have renewed it meanwhile."""

    async def work(tx: Transaction) -> None:
        table = models.workers
        for worker in sorted(expired):  # in a fixed order, so that two transactions cannot deadlock
            gone = await tx.connection.execute(
                delete(table)
                .where(table.c.id == worker, has_expired(table.c.until, LEASE_SECONDS, is_sqlite=tx.is_sqlite))
                .returning(table.c.id)
            )
            if gone.one_or_none() is not None:
                await tx.connection.execute(delete(models.presence).where(models.presence.c.worker == worker))

    await database.write(work)
