"""PostgreSQL behind a real PgBouncer: all clients share two connections without mixing up their statements."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import literal_column, select, text

from core.errors import SettingsError, Unavailable
from repository.engine import engines, event_log, migrations
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.statement import statement
from repository.engine.transaction import Transaction
from repository.generic import writes
from repository.generic.lists import ListRequest
from repository.transfers import exports
from repository.transfers.lines import FileOptions, Format
from resources.genres import GENRES
from tests.support.servers.pgbouncer import PgBouncer
from tests.support.servers.postgresql import PostgresServer
from tests.support.service import Service, eventually

CLIENTS = 12  # the clients share two connections
ROUNDS = 20
# The settings that PgBouncer must ignore to accept a client that sends them when it connects.
SETTINGS = "jit, lock_timeout, idle_in_transaction_session_timeout, statement_timeout, max_parallel_workers_per_gather"


@pytest.fixture
async def pooled(pgbouncer: PgBouncer, postgres: PostgresServer) -> AsyncIterator[Database]:
    """A migrated database behind PgBouncer."""
    database = Database(pgbouncer.url_of(postgres.create_database()), has_pooler=True)
    await migrations.migrate(database)
    yield database
    await database.close()


@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.parametrize("ignores", ["", SETTINGS])
async def test_the_start_is_refused_unless_the_setting_is_on(postgres: PostgresServer, mode: str, ignores: str) -> None:
    with PgBouncer(postgres, mode=mode, ignores=ignores) as pgbouncer:
        url = pgbouncer.url_of(postgres.create_database())
        without = Database(url)
        with pytest.raises(SettingsError) as refused:
            await migrations.migrate(without)
        await without.close()
        assert str(refused.value) == (
            "DATABASE_URL: PgBouncer is in front of the database; set DATABASE_POOLER=on, or connect to PostgreSQL "
            "directly."
        )
        database = Database(url, has_pooler=True)
        await migrations.migrate(database)
        await database.close()


async def test_statement_mode_is_refused_because_it_has_no_transactions(postgres: PostgresServer) -> None:
    with PgBouncer(postgres, mode="statement") as pgbouncer:
        database = Database(pgbouncer.url_of(postgres.create_database()), has_pooler=True)
        with pytest.raises(SettingsError, match=r"statement mode; set its pool_mode to transaction or session\.$"):
            await migrations.migrate(database)
        await database.close()


async def test_a_pooler_that_appears_later_gets_a_503_instead_of_statements(postgres: PostgresServer) -> None:
    """A worker reconnects, and PgBouncer is now at the database's address."""
    with PgBouncer(postgres, ignores=SETTINGS) as pgbouncer:
        database = Database(pgbouncer.url_of(postgres.create_database()))
        with pytest.raises(Unavailable):
            await database.fetch(statement("SELECT $1::int"), 1)
        with pytest.raises(Unavailable):
            await database.select(select(literal_column("1")))
        with pytest.raises(Unavailable):
            await database.write(add_genre("Noir"))
        assert "DATABASE_POOLER" in (await database.write_problem() or "")
        await database.close()


def add_genre(name: str) -> Any:
    async def work(tx: Transaction) -> None:
        await writes.store(tx, GENRES, [{"name": name}], None)

    return work


async def test_many_clients_share_two_connections_without_a_wrong_row(pooled: Database, pgbouncer: PgBouncer) -> None:
    """Each client's statements differ but have the same parameters, so a mixed-up statement returns a wrong row."""
    others = Database(pooled.url, has_pooler=True)  # to PgBouncer, this is another worker
    wrong: list[Any] = []

    def expect(found: Any, expected: Any) -> None:
        if found != expected:
            wrong.append((found, expected))

    async def client(number: int, database: Database) -> None:
        for turn in range(ROUNDS):
            rows = await database.fetch(statement(f"SELECT {number}, $1::int"), turn)
            expect([tuple(row) for row in rows], [(number, turn)])
            lane = list(Lane)[turn % len(Lane)]
            found = await database.select(select(literal_column(f"{number}"), literal_column(f"{turn}")), lane)
            expect([tuple(row) for row in found], [(number, turn)])
            if turn % 4 == 0:
                await database.write(add_genre(f"{number}-{turn}"))

    await asyncio.gather(*(client(number, (pooled, others)[number % 2]) for number in range(CLIENTS)))
    assert wrong == []
    head = await event_log.head(others)
    written = CLIENTS * len(range(0, ROUNDS, 4))
    assert head.seq == written
    events = await event_log.read_after(others, 0, max_rows=written + 1, max_bytes=1_000_000)
    assert [each.seq for each in events] == list(range(1, written + 1))
    await others.close()


async def test_each_transaction_has_its_limits_and_leaves_none_behind(pooled: Database, pgbouncer: PgBouncer) -> None:
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "jit")
    query = text("SELECT " + ", ".join(f"current_setting('{name}')" for name in names))
    idle = f"{engines.IDLE_IN_TRANSACTION_SECONDS:.0f}s"

    async def in_write(tx: Transaction) -> tuple[Any, ...]:
        return tuple((await tx.connection.execute(query)).one())

    assert await pooled.write(in_write) == ("15s", "10s", idle, "off")
    for lane in Lane:
        assert tuple((await pooled.select(query, lane))[0]) == ("31s", "0", idle, "off")
    by_key = await pooled.fetch(statement(f"{query} WHERE $1::int = 1"), 1)
    assert tuple(by_key[0]) == ("31s", "0", idle, "off")

    stranger = await asyncpg.connect(pooled.url, statement_cache_size=0)
    try:
        async with stranger.transaction():
            assert tuple(await stranger.fetchrow(str(query)))[:3] == ("0", "0", "0")
            assert await stranger.fetch("SELECT name FROM pg_prepared_statements") == []
    finally:
        await stranger.close()


@pytest.mark.parametrize("pause", [0, 0.001, 0.01, 0.2])  # cancel before, at the start of, or during the statement
async def test_a_cancelled_read_ends_in_the_database(pooled: Database, pause: float) -> None:
    for lane in Lane:
        reads = [asyncio.create_task(pooled.select(text("SELECT pg_sleep(600)"), lane)) for _ in range(2)]
        await asyncio.sleep(pause)
        for read in reads:
            read.cancel()
        await asyncio.wait(reads)
    active = text("SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND state = 'active'"
                  " AND datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip

    async def is_over() -> bool:
        return not await pooled.select(active)

    await eventually(is_over, "the statements have ended")
    for lane in Lane:
        assert [tuple(row) for row in await pooled.select(text("SELECT 7"), lane)] == [(7,)]
    assert [tuple(row) for row in await pooled.fetch(statement("SELECT $1::int"), 8)] == [(8,)]


async def test_an_export_behind_a_pooler_is_as_of_one_moment(pooled: Database) -> None:
    names = [f"{number:04}" for number in range(1_200)]

    async def add_all(tx: Transaction) -> None:
        await writes.store(tx, GENRES, [{"name": name} for name in names], None)

    await pooled.write(add_all)
    options = FileOptions(Format.CSV)
    for turn in range(3):
        async with exports.opened(pooled, GENRES, ListRequest(columns=("name",)), options) as export:
            found = [*await anext(export.batches)]
            await pooled.write(add_genre(f"later {turn}"))
            async for batch in export.batches:
                found += batch
        assert found[:1_200] == names
        assert len(found) == 1_200 + turn


async def test_two_workers_behind_a_pooler_miss_no_event(
    postgres: PostgresServer, pgbouncer: PgBouncer, tmp_path: Path
) -> None:
    url = pgbouncer.url_of(postgres.create_database())
    service = Service(url, "memory://", tmp_path, DATABASE_POOLER="on", WORKERS="2")
    with service.running():
        async with service.person() as alice, service.watch() as one, service.watch() as other:
            added = [await alice.add(title=f"movie {number}") for number in range(5)]
            await alice.add_bulk([{"title": f"m{number}"} for number in range(50)])
            for watcher in (one, other):
                seen = [(await watcher.expect("add", "movies"))["data"]["id"] for _ in added]
                assert seen == [movie["id"] for movie in added]
                assert (await watcher.expect("add_bulk", "movies"))["data"]["count"] == 50
            assert (await alice.http.get("/movies?q=movie")).status_code == 200
    service.check_log()


async def test_a_pooler_that_restarts_loses_no_write(postgres: PostgresServer) -> None:
    with PgBouncer(postgres) as pgbouncer:
        database = Database(pgbouncer.url_of(postgres.create_database()), has_pooler=True)
        await migrations.migrate(database)
        await database.write(add_genre("before"))
        with pgbouncer.down():
            with pytest.raises(Unavailable):
                await database.write(add_genre("meanwhile"))
        await database.write(add_genre("after"))
        assert (await event_log.head(database)).seq == 2
        await database.close()
