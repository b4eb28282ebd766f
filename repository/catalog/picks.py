"""A few existing movies for generated characters to play in."""

from __future__ import annotations

from random import Random

from sqlalchemy import func, select

import models
from repository.engine.transaction import Transaction


async def pick(tx: Transaction, random: Random, count: int) -> list[int]:
    """Up to `count` ids of movies that exist, from a random place on, locked so that they stay. May be empty."""
    table = models.movies
    row = (await tx.connection.execute(select(func.min(table.c.id), func.max(table.c.id)))).one()
    if row[0] is None:
        return []
    start = random.randint(row[0], row[1])
    found = await tx.connection.execute(
        select(table.c.id).where(table.c.id >= start).order_by(table.c.id).limit(count).with_for_update()
    )
    return list(found.scalars())
