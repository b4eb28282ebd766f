"""Clean-up: what is old goes, what is young stays, and of many workers one does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from jobs.cleanup import IDEMPOTENCY_KEY_HOURS, Cleanup
from repository import event_log, leases, migrations
from repository.database import Database
from repository.transaction import Transaction
from tests.conftest import Places
from tests.service import eventually
from times import utc_text


@pytest.fixture
async def databases(new_places: Callable[[], Places]) -> AsyncIterator[list[Database]]:
    """Three workers' connections to one database."""
    places = new_places()
    found = [Database(places.database_url) for _ in range(3)]
    await migrations.migrate(found[0])
    yield found
    for database in found:
        await database.close()


async def test_one_worker_takes_a_lease(databases: list[Database]) -> None:
    for _ in range(3):
        taken = await asyncio.gather(
            *(leases.take(database, "task", f"worker {n}", 0.3) for n, database in enumerate(databases))
        )
        assert sum(taken) == 1

        async def is_free() -> bool:
            return await leases.take(databases[0], "task", "waiting", 0.0)

        await eventually(is_free, "the lease runs out")


async def test_different_tasks_have_different_leases(databases: list[Database]) -> None:
    assert await leases.take(databases[0], "one", "worker", 60)
    assert await leases.take(databases[1], "two", "worker", 60)
    assert not await leases.take(databases[2], "one", "other", 60)


async def test_old_events_and_keys_go_and_young_ones_stay(databases: list[Database]) -> None:
    database = databases[0]

    async def add(tx: Transaction) -> None:
        tx.emit("movies", "add", {"id": 1}, actor_id=None)

    for _ in range(6):
        await database.write(add)
    old = utc_text(datetime.now(UTC) - timedelta(hours=IDEMPOTENCY_KEY_HOURS + 1))

    async def age(tx: Transaction) -> None:
        cast = "" if tx.is_sqlite else "::timestamptz"
        await tx.connection.execute(text(f"UPDATE events SET created_at = '{old}'{cast} WHERE seq <= 4"))
        await tx.connection.execute(
            text(
                'INSERT INTO users (id, password_hash, "group", is_active, version, created_at, updated_at)'
                f" VALUES (1, 'x', 'user', true, 1, '{old}', '{old}')"
            )
        )
        young = utc_text(datetime.now(UTC))
        for key, created_at in (("old", old), ("young", young)):
            await tx.connection.execute(
                text(
                    "INSERT INTO idempotency_keys (user_id, key, fingerprint, created_at)"
                    f" VALUES (1, '{key}', 'x', '{created_at}')"
                )
            )

    await database.write(age)
    await Cleanup(database, "worker", retention_hours=12, retention_rows=1_000).clean()
    assert await event_log.oldest(database) == 5
    async with database.read() as connection:
        keys = await connection.execute(text("SELECT key FROM idempotency_keys"))
        assert list(keys.scalars()) == ["young"]
    await Cleanup(database, "worker", retention_hours=12, retention_rows=1).clean()
    assert await event_log.oldest(database) == 6
