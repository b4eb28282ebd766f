"""Named leases: of all workers, one does a periodic task per period."""

from __future__ import annotations

from sqlalchemy.dialects import postgresql, sqlite

import models
from repository.engine import clock
from repository.engine.database import Database
from repository.engine.transaction import Transaction


async def take(database: Database, name: str, owner: str, seconds: float) -> bool:
    """Take the lease if it is free or has run out; it stays taken for `seconds`, done or not."""

    async def work(tx: Transaction) -> bool:
        table = models.leases
        now = clock.now(is_sqlite=tx.is_sqlite)
        new = sqlite.insert(table) if tx.is_sqlite else postgresql.insert(table)
        taken = await tx.connection.execute(
            new.values(name=name, owner=owner, until=now + seconds)
            .on_conflict_do_update(
                index_elements=[table.c.name],
                set_={"owner": owner, "until": now + seconds},
                where=table.c.until < now,
            )
            .returning(table.c.owner)
        )
        return taken.one_or_none() is not None

    return await database.write(work)
