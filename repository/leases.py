"""Leases, which let one worker at a time do a task. They are timed by the database's clock, which all workers share."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Float, literal_column, or_
from sqlalchemy.dialects import postgresql, sqlite

import models
from repository.engine.database import Database
from repository.engine.transaction import Transaction

CLOCK_GRACE_SECONDS = 1.0  # a small correction of the clock must not end a lease


def now_in_seconds(*, is_sqlite: bool) -> ColumnElement[Any]:
    """Return the database's time as an SQL expression, in seconds since 1970."""
    if is_sqlite:
        return literal_column("((julianday('now') - 2440587.5) * 86400.0)", Float)
    return literal_column("extract(epoch from clock_timestamp())::double precision", Float)


def has_expired(
    until: ColumnElement[Any], longest_seconds: float | ColumnElement[Any], *, is_sqlite: bool
) -> ColumnElement[bool]:
    """Return the SQL condition for a lease of at most `longest_seconds` that has expired.

    If a lease ends later than one taken now would, it was taken before the clock was set back, and counts as expired.
    """
    now = now_in_seconds(is_sqlite=is_sqlite)
    return or_(until < now, until > now + (longest_seconds + CLOCK_GRACE_SECONDS))


async def take(database: Database, name: str, owner: str, seconds: float) -> bool:
    """Take the lease for `seconds`; nothing releases it earlier. Return False while any worker holds the lease."""

    async def work(tx: Transaction) -> bool:
        table = models.leases
        now = now_in_seconds(is_sqlite=tx.is_sqlite)
        new = sqlite.insert(table) if tx.is_sqlite else postgresql.insert(table)
        taken = await tx.connection.execute(
            new.values(name=name, owner=owner, until=now + seconds)
            .on_conflict_do_update(
                index_elements=[table.c.name],
                set_={"owner": owner, "until": now + seconds},
                where=has_expired(table.c.until, seconds, is_sqlite=tx.is_sqlite),
            )
            .returning(table.c.owner)
        )
        return taken.one_or_none() is not None

    return await database.write(work)
