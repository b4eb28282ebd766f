"""Clean-up: old rows are deleted, recent ones stay, and only one of several workers does the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert, text, update
from sqlalchemy.dialects import sqlite

import models
from core.times import utc_text
from jobs.cleanup import FORGET_ROWS_PER_TRANSACTION, IDEMPOTENCY_KEY_HOURS, Cleanup, Retention
from repository import leases
from repository.accounts import deletion, one_time_tokens, outbox, users
from repository.accounts.one_time_tokens import Purpose
from repository.engine import event_log, migrations
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.service import eventually


@pytest.fixture
async def databases(new_places: Callable[[], Places]) -> AsyncIterator[list[Database]]:
    """The connections of three workers to one database."""
    places = new_places()
    found = [Database(places.database_url) for _ in range(3)]
    await migrations.migrate(found[0])
    yield found
    for database in found:
        await database.close()


async def test_only_one_worker_takes_a_lease(databases: list[Database]) -> None:
    for _ in range(2):
        taken = await asyncio.gather(
            *(leases.take(database, "task", f"worker {n}", 2.0) for n, database in enumerate(databases))
        )
        assert sum(taken) == 1

        async def is_free() -> bool:
            return await leases.take(databases[0], "task", "waiting", 0.0)

        await eventually(is_free, "the lease ends")


async def test_different_tasks_have_different_leases(databases: list[Database]) -> None:
    assert await leases.take(databases[0], "one", "worker", 60)
    assert await leases.take(databases[1], "two", "worker", 60)
    assert not await leases.take(databases[2], "one", "other", 60)


async def create(tx: Transaction, name: str, *, awaits_activation: bool = True, is_late: bool = True) -> int:
    """Create an account and return its id. With `is_late`, the account can no longer be activated."""
    fields = {"username": name, "email": f"{name}@example.org"}
    user = await users.create(tx, fields, "x", awaits_activation=awaits_activation)
    if is_late:
        late = utc_text(datetime.now(UTC) - deletion.KEPT_WAITING - timedelta(minutes=1))
        await tx.connection.execute(update(models.users).where(models.users.c.id == user["id"]).values(created_at=late))
    return int(user["id"])


async def test_only_late_accounts_are_deleted_and_their_names_are_free(databases: list[Database]) -> None:
    """An account stays if it was activated, can still be activated, has a picture, or has a group other than `user`.

    Tokens and emails do not keep an account. Only an account whose address was free can have any, so if they kept it, a
    sign-in would reveal that the address was free.
    """
    database = databases[0]
    numbers = {}

    async def store(tx: Transaction) -> None:
        for name in ("late", "young", "linked", "mailed", "active", "wanted", "pictured"):
            numbers[name] = await create(tx, name, awaits_activation=name != "active", is_late=name != "young")
        await tx.connection.execute(text(f"""UPDATE users SET "group" = 'moderator' WHERE id = {numbers["wanted"]}"""))
        await tx.connection.execute(text(f"UPDATE users SET avatar = 'x' WHERE id = {numbers['pictured']}"))
        await one_time_tokens.mint(tx, Purpose.ACTIVATE, numbers["linked"], "linked@example.org")
        await outbox.put(tx, numbers["mailed"], outbox.MailType.ACTIVATE, "mailed@example.org")

    await database.write(store)
    before = (await event_log.head(database)).seq
    await Cleanup(database, "worker", Retention(hours=12, rows=1_000, bytes=10**9)).clean()
    for name in ("late", "linked", "mailed"):
        assert await users.find(database, numbers[name]) is None, name
    for name in ("young", "active", "wanted", "pictured"):
        assert await users.find(database, numbers[name]) is not None, name
    async with database.read() as connection:
        events = await connection.execute(
            text(f"SELECT topic, operation FROM events WHERE seq > {before} ORDER BY seq")
        )
        assert [tuple(row) for row in events] == [("users", "delete"), ("account", "delete")] * 3
    await database.write(lambda tx: create(tx, "late"))


async def test_late_accounts_are_deleted_in_several_transactions(databases: list[Database]) -> None:
    async def store(tx: Transaction) -> list[int]:
        return [await create(tx, f"late{number}") for number in range(FORGET_ROWS_PER_TRANSACTION + 3)]

    late = await databases[0].write(store)
    await Cleanup(databases[0], "worker", Retention(hours=12, rows=1_000, bytes=10**9)).clean()
    assert [await users.find(databases[0], user_id) for user_id in late] == [None] * len(late)


async def test_an_account_that_is_activated_meanwhile_stays(databases: list[Database]) -> None:
    """On PostgreSQL, a lock on the row of the account makes the clean-up wait. SQLite has only one writer anyway."""
    database, other = databases[0], databases[1]
    late = await database.write(lambda tx: create(tx, "late0"))
    made, go_on = asyncio.Event(), asyncio.Event()

    async def activate(tx: Transaction) -> None:
        before = await users.lock(tx, late)
        await users.change(tx, before, {"is_active": True, "awaits_activation": False}, actor_id=late)
        made.set()
        await go_on.wait()

    activating = asyncio.create_task(other.write(activate))
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
    await activating
    assert await forgetting == 0
    assert await users.find(database, late) is not None


@SQLITE_ONLY  # PostgreSQL's planner uses no index for a table with few rows
async def test_the_search_for_late_accounts_uses_an_index(databases: list[Database]) -> None:
    database = databases[0]
    late = deletion.late_accounts(datetime.now(UTC), max_rows=1)
    compiled = late.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
    async with database.read() as connection:
        plan = await connection.execute(text(f"EXPLAIN QUERY PLAN {compiled}".replace(":", r"\:")))
        steps = [row[3] for row in plan]
    assert any("ix_users_awaiting" in step for step in steps), steps
    assert not any(step.startswith("SCAN users") for step in steps), steps


async def test_only_old_events_and_idempotency_keys_are_deleted(databases: list[Database]) -> None:
    database = databases[0]

    async def add(tx: Transaction) -> None:
        tx.emit("movies", "add", {"id": 1}, actor_id=None)

    for _ in range(6):
        await database.write(add)
    old = utc_text(datetime.now(UTC) - timedelta(hours=IDEMPOTENCY_KEY_HOURS + 1))

    async def age(tx: Transaction) -> None:
        await tx.connection.execute(update(models.events).where(models.events.c.seq <= 4).values(created_at=old))
        user_id = await create(tx, "holly", awaits_activation=False)
        for key, created_at in (("old", old), ("young", utc_text(datetime.now(UTC)))):
            row = {"user_id": user_id, "key": key, "fingerprint": "x", "created_at": created_at}
            await tx.connection.execute(insert(models.idempotency_keys).values(row))

    await database.write(age)
    await Cleanup(database, "worker", Retention(hours=12, rows=1_000, bytes=10**9)).clean()
    assert await event_log.oldest(database) == 5, "only the four old events are deleted"
    async with database.read() as connection:
        keys = await connection.execute(text("SELECT key FROM idempotency_keys"))
        assert list(keys.scalars()) == ["young"]
    await Cleanup(database, "worker", Retention(hours=12, rows=1, bytes=10**9)).clean()
    assert await event_log.oldest(database) == (await event_log.head(database)).seq
