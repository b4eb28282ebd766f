"""Clean-up: what is old goes, what is young stays, and of many workers one does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.dialects import sqlite

from core.times import utc_text
from jobs.cleanup import FORGET_ROWS_PER_TRANSACTION, IDEMPOTENCY_KEY_HOURS, Cleanup
from repository.accounts import deletion, one_time_tokens, outbox, users
from repository.accounts.one_time_tokens import DAYS_TO_ACTIVATE, Purpose
from repository.engine import event_log, leases, migrations
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.service import eventually


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


async def test_accounts_that_nobody_activated_go_and_their_names_are_free(databases: list[Database]) -> None:
    """Those whose link still works, or is on its way, stay; so does whoever was activated, and whom an admin wants."""
    database = databases[0]
    numbers = {}
    late = utc_text(datetime.now(UTC) - timedelta(days=DAYS_TO_ACTIVATE, minutes=1))

    async def store(tx: Transaction) -> None:
        for name in ("late", "young", "linked", "mailed", "active", "wanted", "pictured"):
            fields = {"username": name, "email": f"{name}@example.org"}
            user = await users.create(tx, fields, "x", awaits_activation=name != "active")
            numbers[name] = user["id"]
            if name != "young":
                cast = "" if tx.is_sqlite else "::timestamptz"
                await tx.connection.execute(
                    text(f"UPDATE users SET created_at = '{late}'{cast} WHERE id = {user['id']}")
                )
        await tx.connection.execute(text(f"""UPDATE users SET "group" = 'moderator' WHERE id = {numbers["wanted"]}"""))
        await tx.connection.execute(text(f"UPDATE users SET avatar = 'x' WHERE id = {numbers['pictured']}"))
        await one_time_tokens.mint(tx, Purpose.ACTIVATE, numbers["linked"], "linked@example.org")
        await outbox.put(tx, numbers["mailed"], outbox.MailType.ACTIVATE, "mailed@example.org")

    await database.write(store)
    before = (await event_log.head(database)).seq
    await Cleanup(database, "worker", retention_hours=12, retention_rows=1_000).clean()
    assert await users.find(database, numbers["late"]) is None
    for name in ("young", "linked", "mailed", "active", "wanted", "pictured"):
        assert await users.find(database, numbers[name]) is not None, name
    async with database.read() as connection:
        told = await connection.execute(text(f"SELECT topic, operation FROM events WHERE seq > {before} ORDER BY seq"))
        assert [tuple(row) for row in told] == [("users", "delete"), ("account", "delete")]

    async def again(tx: Transaction) -> None:
        await users.create(tx, {"username": "late", "email": "late@example.org"}, "x")

    await database.write(again)


async def store_late(database: Database, number: int) -> list[int]:
    """Accounts that should have been activated by now."""
    late = utc_text(datetime.now(UTC) - timedelta(days=DAYS_TO_ACTIVATE, minutes=1))

    async def store(tx: Transaction) -> list[int]:
        made = []
        for each in range(number):
            fields = {"username": f"late{each}", "email": f"late{each}@example.org"}
            made.append((await users.create(tx, fields, "x", awaits_activation=True))["id"])
        cast = "" if tx.is_sqlite else "::timestamptz"
        await tx.connection.execute(text(f"UPDATE users SET created_at = '{late}'{cast}"))
        return made

    return await database.write(store)


async def test_however_many_wait_they_go_some_at_a_time(databases: list[Database]) -> None:
    made = await store_late(databases[0], FORGET_ROWS_PER_TRANSACTION + 3)
    await Cleanup(databases[0], "worker", retention_hours=12, retention_rows=1_000).clean()
    for user_id in made:
        assert await users.find(databases[0], user_id) is None


async def test_a_link_that_is_made_meanwhile_counts(databases: list[Database]) -> None:
    """Whoever makes one holds the account's row, as `mails` does; on SQLite there is one writer anyway."""
    database, other = databases[0], databases[1]
    [late] = await store_late(database, 1)
    made, go_on = asyncio.Event(), asyncio.Event()

    async def link(tx: Transaction) -> None:
        await users.lock(tx, late)
        await one_time_tokens.mint(tx, Purpose.ACTIVATE, late, "late0@example.org")
        made.set()
        await go_on.wait()

    linking = asyncio.create_task(other.write(link))
    await made.wait()
    forgetting = asyncio.create_task(
        deletion.forget_waiting(database, datetime.now(UTC), max_rows=FORGET_ROWS_PER_TRANSACTION)
    )
    if not database.is_sqlite:

        async def waits_for_the_row() -> bool:
            async with databases[2].read() as connection:
                waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                found = await connection.execute(text(waiting + " AND wait_event_type = 'Lock'"))
                return bool(found.scalar_one())

        await eventually(waits_for_the_row, "the clean-up waits for the account")
    go_on.set()
    await linking
    assert await forgetting == 0
    assert await users.find(database, late) is not None


# PostgreSQL's planner counts rows, and does what it likes with few of them.
@SQLITE_ONLY
async def test_the_look_for_them_reads_no_other_accounts(databases: list[Database]) -> None:
    database = databases[0]
    late = deletion.late_accounts(datetime.now(UTC), max_rows=1)
    compiled = late.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
    async with database.read() as connection:
        plan = await connection.execute(text(f"EXPLAIN QUERY PLAN {compiled}".replace(":", r"\:")))
        steps = [row[3] for row in plan]
    assert any("ix_users_awaiting" in step for step in steps), steps
    assert not any(step.startswith("SCAN users") for step in steps), steps


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
