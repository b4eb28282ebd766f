"""Blocked writes fail in time, and large deletions that would block other transactions are refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

import models
from core.errors import Conflict, Unavailable
from core.identity import Group, Identity
from core.times import utc_now
from repository.accounts import users
from repository.engine import database as database_module
from repository.engine import engines, failures, lock_waits, migrations
from repository.engine.database import Database
from repository.engine.migrations import POSTGRESQL_LOCK
from repository.engine.statement import statement
from repository.engine.transaction import Transaction
from repository.generic import dependants, rows, writes
from resources.characters import CHARACTERS
from resources.movies import MOVIES
from tests.support.backends import POSTGRES_ONLY
from tests.support.locks import head_locked
from tests.support.servers.postgresql import PostgresServer
from tests.support.service import eventually


async def admin_of(database: Database) -> Identity:
    fields = {"username": "chief"}
    user = await database.write(lambda tx: users.create_admin(tx, fields, "hash"))
    return Identity(user["id"], Group.ADMIN, time.time() + 3600, "session", "chief")


async def note(tx: Transaction) -> None:
    tx.emit("movies", "add", {"id": 1}, actor_id=None)


async def test_a_blocked_write_fails_in_time_and_readiness_says_so(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "LOCK_SECONDS", 1.0)
    monkeypatch.setattr(engines, "BUSY_TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(database_module, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(database_module, "STALLED_SECONDS", 0.1)
    blocked = Database(database.url)
    await blocked.write(note)
    assert await blocked.write_problem() is None
    try:
        async with head_locked(database.url):
            started = time.monotonic()
            write = asyncio.create_task(blocked.write(note))
            await eventually(blocked.write_problem, "readiness reports the waiting write")
            with pytest.raises(Unavailable, match=r"Another transaction holds a lock that this one needs\. Nothing"):
                await write
            assert time.monotonic() - started < 10
            assert "lock" in (await blocked.write_problem() or "")
        await eventually(lambda: is_well(blocked), "readiness recovers even if no client writes")
        await blocked.write(note)
    finally:
        await blocked.close()


async def test_the_waits_of_a_write_do_not_add_up(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_waits, "WRITE_SECONDS", 1.0)
    for name in ("BUSY_TIMEOUT_SECONDS", "LOCK_SECONDS", "WRITER_POOL_SECONDS"):
        monkeypatch.setattr(engines, name, 60)
    blocked = Database(database.url)
    try:
        await blocked.write(note)
        async with head_locked(database.url):
            async with asyncio.timeout(20):  # without the deadline, even the first write would wait for 60 s
                results = await asyncio.gather(
                    *(blocked.write(note) for _ in range(engines.POSTGRESQL_WRITERS + 5)), return_exceptions=True
                )
            assert all(isinstance(each, Unavailable) and "Nothing was written" in str(each) for each in results)
            assert await blocked.write_problem() is not None
        await blocked.write(note)
        ((count,),) = await blocked.select(select(func.count()).select_from(models.events))
        assert count == 2
        if blocked.is_sqlite:
            async with blocked.begin() as (connection, _):
                assert (await connection.execute(text("PRAGMA busy_timeout"))).scalar_one() == 60_000
    finally:
        await blocked.close()


async def test_only_waiting_is_bounded_on_sqlite(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_waits, "WRITE_SECONDS", 0.5)

    async def long(tx: Transaction) -> None:
        await note(tx)
        await asyncio.sleep(1)  # work for longer than the deadline

    if database.is_sqlite:  # the write holds the only lock, so it waits for nothing
        await database.write(long)
        return
    with pytest.raises(Unavailable, match="had to wait too long for others"):
        await database.write(long)
    monkeypatch.undo()
    await database.write(note)
    ((count,),) = await database.select(select(func.count()).select_from(models.events))
    assert count == 1


# --- locks on whole tables


@asynccontextmanager
async def another_program(database: Database) -> AsyncIterator[Any]:
    """Open a connection that begins a transaction, and roll it back at the end of the block."""
    foreign = await asyncpg.connect(database.url)
    try:
        await foreign.execute("BEGIN")
        yield foreign
    finally:
        await foreign.close()


@pytest.fixture
async def impatient(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    """The database, in a process that waits for a lock for a moment only."""
    monkeypatch.setattr(engines, "LOCK_SECONDS", 0.3)
    monkeypatch.setattr(database_module, "FETCH_SECONDS", 0.3)
    impatient = Database(database.url, read_seconds=0.3)
    yield impatient
    await impatient.close()


async def is_well(database: Database) -> bool:
    return await database.write_problem() is None


@POSTGRES_ONLY
@pytest.mark.parametrize("mode", ["SHARE", "ACCESS EXCLUSIVE"])
@pytest.mark.parametrize("table", ["movies", "events"])
async def test_a_lock_on_a_table_is_reported_until_it_is_gone(
    backend: str, impatient: Database, table: str, mode: str
) -> None:
    admin = await admin_of(impatient)

    async def add_movie(tx: Transaction) -> None:
        await writes.add(tx, MOVIES, admin, {"title": "Blocked"})

    async with another_program(impatient) as foreign:
        await foreign.execute(f"LOCK TABLE {table} IN {mode} MODE")
        assert await impatient.write_problem() is None, "no write has had to wait yet"
        with pytest.raises(Unavailable, match="Another transaction holds a lock"):
            await impatient.write(add_movie)
        for _ in range(3):
            assert await impatient.write_problem() == f"{failures.LOCKED}: {table}"
            await impatient.write(lambda tx: users.lock(tx, admin.user_id))  # needs none of the locked tables
    await eventually(lambda: is_well(impatient), "readiness recovers even if no client writes")
    await impatient.write(add_movie)


@POSTGRES_ONLY
async def test_a_read_that_waits_for_a_lock_is_reported(backend: str, impatient: Database) -> None:
    for read in (
        lambda: impatient.select(select(models.users)),
        lambda: impatient.fetch(statement("SELECT $1::int FROM users"), 1),
    ):
        async with another_program(impatient) as foreign:
            await foreign.execute("LOCK TABLE users")
            with pytest.raises(Unavailable):
                await read()
            assert await impatient.write_problem() == f"{failures.LOCKED}: users"
        assert await impatient.write_problem() is None
        await read()


@POSTGRES_ONLY
async def test_a_lock_on_single_rows_is_not_reported_for_ever(backend: str, impatient: Database) -> None:
    admin = await admin_of(impatient)
    async with another_program(impatient) as foreign:
        await foreign.execute("SELECT FROM users FOR UPDATE")
        with pytest.raises(Unavailable, match="Another transaction holds a lock"):
            await impatient.write(lambda tx: users.lock(tx, admin.user_id))
        await eventually(lambda: is_well(impatient), "ready, although the row is still locked")


@POSTGRES_ONLY
async def test_a_role_that_may_not_see_locks_is_ready(
    backend: str, impatient: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with another_program(impatient) as owner:
        await owner.execute("REVOKE SELECT ON pg_locks FROM PUBLIC; CREATE ROLE locksmith; COMMIT; BEGIN")
        for kind in ("SCHEMA public", "ALL TABLES IN SCHEMA public"):
            await owner.execute(f"GRANT ALL ON {kind} TO locksmith; COMMIT; BEGIN")
        restricted = Database(f"{impatient.url}?options=-crole%3Dlocksmith")
        try:
            await owner.execute("LOCK TABLE movies")
            with pytest.raises(Unavailable, match="Another transaction holds a lock"):
                await restricted.write(lambda tx: tx.connection.execute(text("DELETE FROM movies")))
            await eventually(lambda: is_well(restricted), "ready, because no lock is known of")
            assert await restricted.read_problem() is None
        finally:
            await restricted.close()
            await owner.execute("ROLLBACK; BEGIN; DROP OWNED BY locksmith; DROP ROLE locksmith; COMMIT")


@POSTGRES_ONLY
async def test_many_point_reads_of_a_locked_table_do_not_wait_for_one_another(
    backend: str, impatient: Database
) -> None:
    async with another_program(impatient) as foreign:
        await foreign.execute("LOCK TABLE users")
        reads = [impatient.fetch(statement("SELECT $1::int FROM users"), number) for number in range(50)]
        started = time.monotonic()
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(each, Unavailable) for each in results)
        assert time.monotonic() - started < 3, "expected less than the time that the reads take one after another"
    await impatient.fetch(statement("SELECT $1::int FROM users"), 1)


@POSTGRES_ONLY
async def test_readiness_names_a_locked_table_while_reads_wait_for_it(backend: str, impatient: Database) -> None:
    async with another_program(impatient) as foreign:
        await foreign.execute("LOCK TABLE users")
        with pytest.raises(Unavailable):
            await impatient.fetch(statement("SELECT $1::int FROM users"), 1)
        reads = [impatient.fetch(statement("SELECT $1::int FROM users"), number) for number in range(6)]
        waiting = [asyncio.create_task(read) for read in reads]
        await asyncio.sleep(0)  # let the reads take the kept connections
        assert await impatient.write_problem() == f"{failures.LOCKED}: users"
        assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting, return_exceptions=True)
    await eventually(lambda: is_well(impatient), "ready, because the lock is gone")


# --- writes that are cut


async def sleeps(tx: Transaction) -> None:
    await (await tx.driver()).fetch("SELECT pg_sleep(60)")


async def sleeps_through_sqlalchemy(tx: Transaction) -> None:
    await tx.connection.execute(text("SELECT pg_sleep(60)"))


async def copies(tx: Transaction) -> None:
    async def endless() -> AsyncIterator[tuple[int]]:
        while True:
            yield (1,)
            await asyncio.sleep(0.01)

    driver = await tx.driver()
    await driver.execute("CREATE TEMPORARY TABLE copied (id bigint) ON COMMIT DROP")
    await driver.copy_records_to_table("copied", records=endless(), columns=["id"])


async def runs_a_batch(tx: Transaction) -> None:
    await (await tx.driver()).executemany("SELECT pg_sleep($1::float8)", [(0.05,)] * 1000)


CUT_WORKS = (sleeps, sleeps_through_sqlalchemy, copies, runs_a_batch)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Database]:
    """Return a function that opens a database with one connection for writes, whose writes have a second."""
    monkeypatch.setattr(lock_waits, "WRITE_SECONDS", 1.0)
    monkeypatch.setattr(engines, "POSTGRESQL_WRITERS", 1)
    return Database


@POSTGRES_ONLY
@pytest.mark.parametrize("has_pooler", [False, True])
@pytest.mark.parametrize("work", CUT_WORKS)
async def test_the_next_write_works_after_one_is_cut_at_its_deadline(
    database: Database, hasty: Callable[..., Database], work: Callable[[Transaction], Awaitable[None]], has_pooler: bool
) -> None:
    cut = hasty(database.url, has_pooler=has_pooler)
    try:
        with pytest.raises(Unavailable, match="took too long"):
            await cut.write(work)
        for _ in range(3):
            await cut.write(note)
        query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state LIKE '%transaction%'"
        assert await database.select(text(query)) == [], "the cut transaction is over"
    finally:
        await cut.close()


@POSTGRES_ONLY
@pytest.mark.parametrize("work", CUT_WORKS[:3])
async def test_a_write_is_cut_even_if_the_server_does_not_respond(
    backend: str,
    own_postgres: PostgresServer,
    hasty: Callable[..., Database],
    work: Callable[[Transaction], Awaitable[None]],
) -> None:
    cut = hasty(own_postgres.create_database())
    await migrations.migrate(cut)
    started = asyncio.Event()

    async def announced(tx: Transaction) -> None:
        await tx.driver()
        started.set()
        await work(tx)

    await assert_ends_while_frozen(own_postgres, cut.write(announced), started)
    await cut.write(note)
    await cut.close()


@POSTGRES_ONLY
@pytest.mark.parametrize("has_pooler", [False, True])
async def test_a_read_is_cut_even_if_the_server_does_not_respond(
    backend: str, own_postgres: PostgresServer, has_pooler: bool
) -> None:
    cut = Database(own_postgres.create_database(), read_seconds=1, has_pooler=has_pooler)
    started = asyncio.Event()

    async def sleep() -> None:
        async with cut.read() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            started.set()
            await driver.fetch("SELECT pg_sleep(60)")

    await assert_ends_while_frozen(own_postgres, sleep(), started)
    for _ in range(engines.POINT_READERS + 1):
        await cut.select(text("SELECT 1"))
    await cut.close()


async def assert_ends_while_frozen(
    server: PostgresServer, statement: Coroutine[Any, Any, Any], started: asyncio.Event
) -> None:
    """Freeze the server once the statement has `started`, and assert that it is cut at its deadline nevertheless."""
    task = asyncio.create_task(statement)
    await started.wait()
    server.freeze()
    try:
        done, _ = await asyncio.wait({task}, timeout=10)
    finally:
        server.thaw()
    assert done, "expected the statement to be cut while the server is frozen"
    with pytest.raises(Unavailable, match=r"took (too long|longer)"):
        await task


@POSTGRES_ONLY
async def test_a_worker_that_is_frozen_in_a_statement_does_not_keep_the_head_of_the_log(
    database: Database, hasty: Callable[..., Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "STATEMENT_GRACE_SECONDS", 0.0)
    frozen = hasty(database.url)

    async def write_without_deadline() -> None:
        async with frozen.begin() as (connection, _):
            await connection.execute(text("UPDATE event_head SET seq = seq"))
            await connection.execute(text("SELECT pg_sleep(60)"))

    with pytest.raises(SQLAlchemyError, match="statement timeout"):
        await asyncio.wait_for(write_without_deadline(), 10)
    await database.write(note)
    await frozen.close()


@POSTGRES_ONLY
async def test_a_frozen_worker_does_not_keep_the_head_of_the_log(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "IDLE_IN_TRANSACTION_SECONDS", 0.5)
    frozen = Database(database.url)
    try:
        with suppress(SQLAlchemyError):  # the server has ended the transaction
            async with frozen.begin() as (connection, _):
                await connection.execute(text("UPDATE event_head SET seq = seq"))
                # From here on, the transaction is idle, like that of a frozen process.
                async with asyncio.timeout(engines.LOCK_SECONDS):
                    await database.write(note)
    finally:
        await frozen.close()


async def test_a_frozen_worker_loses_its_transaction_before_others_give_up() -> None:
    assert engines.IDLE_IN_TRANSACTION_SECONDS < engines.LOCK_SECONDS
    assert engines.WRITER_POOL_SECONDS + engines.IDLE_IN_TRANSACTION_SECONDS < lock_waits.WRITE_SECONDS


@POSTGRES_ONLY
async def test_a_migration_may_wait_and_take_long(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCK_SECONDS", "IDLE_IN_TRANSACTION_SECONDS", "STATEMENT_GRACE_SECONDS"):
        monkeypatch.setattr(engines, name, 0.2)
    monkeypatch.setattr(lock_waits, "WRITE_SECONDS", 0.2)
    late = Database(database.url)
    try:
        async with database.begin() as (connection, transaction):
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({POSTGRESQL_LOCK})"))
            migration = asyncio.create_task(migrations.migrate(late))
            done, _ = await asyncio.wait({migration}, timeout=1)
            assert not done, "expected the migration to wait"
            await transaction.commit()
        await migration
    finally:
        await late.close()


async def test_a_movie_with_too_many_characters_is_not_deleted(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependants, "MAX_DEPENDANTS", 3)

    admin = await admin_of(database)

    async def cast(tx: Transaction, title: str, number: int) -> int:
        movie = await writes.add(tx, MOVIES, admin, {"title": title})
        names: list[dict[str, Any]] = [{"name": f"{title} {each}", "movie_id": movie.id} for each in range(number)]
        await writes.store(tx, CHARACTERS, names, admin.user_id)
        return movie.id

    small = await database.write(lambda tx: cast(tx, "Small", 3))
    large = await database.write(lambda tx: cast(tx, "Large", 4))
    other = await database.write(lambda tx: cast(tx, "Other", 1))
    with pytest.raises(
        Conflict, match=rf"Movie {large} has more than 3 characters.*DELETE /movies/{{id}} accepts a movie"
    ):
        await database.write(lambda tx: writes.remove(tx, MOVIES, admin, large, None))
    with pytest.raises(Conflict, match="These movies have more than 3 characters"):
        await database.write(lambda tx: writes.remove_bulk(tx, MOVIES, admin, [small, other]))
    await database.write(lambda tx: writes.remove(tx, MOVIES, admin, small, None))
    ((left,),) = await database.select(select(func.count()).select_from(models.movies))
    assert left == 2


async def test_rows_without_events_are_deleted_in_several_transactions(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "DELETED_ROWS", 2)
    table = models.idempotency_keys

    admin = await admin_of(database)

    async def fill(tx: Transaction) -> None:
        own = {"user_id": admin.user_id, "fingerprint": "", "created_at": utc_now()}
        keys = [{**own, "key": f"key {number}"} for number in range(6)]
        await tx.connection.execute(insert(table), keys)

    await database.write(fill)
    assert await rows.delete_without_events(database, table, table.c.key != "key 3") == 5
    assert [row.key for row in await database.select(select(table.c.key))] == ["key 3"]
