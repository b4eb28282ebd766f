"""Database reads: their deadline, their cancellation when the client disconnects, and dead connections."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Executable, make_url, text, true

import models
from core.errors import SettingsError, Unavailable
from core.network.shares import CLIENT
from repository.engine import engines, migrations
from repository.engine.database import PATIENCE, Database
from repository.engine.engines import Lane
from repository.engine.statement import statement
from repository.generic.rows import delete_without_events
from tests.support.backends import POSTGRES_ONLY

DEADLINE_SECONDS = 0.3
ENDLESS = {
    True: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    False: "SELECT pg_sleep(600)",
}


@pytest.fixture
async def hurried(new_places: Callable[[], Any]) -> AsyncIterator[Database]:
    """A migrated database whose reads have a short deadline."""
    database = Database(new_places().database_url, read_seconds=DEADLINE_SECONDS)
    await migrations.migrate(database)
    yield database
    await database.close()


def endless(database: Database) -> Executable:
    return text(ENDLESS[database.is_sqlite])


async def connections_of(database: Database, lane: Lane = Lane.COSTLY) -> set[Any]:
    """Run a statement on every connection of a lane, and return the driver's connections."""
    found: set[Any] = set()
    barrier = asyncio.Barrier(engines.READERS[lane])

    async def use() -> None:
        async with database.read(lane) as connection:
            await connection.execute(text("SELECT 1"))
            found.add((await connection.get_raw_connection()).driver_connection)
            await barrier.wait()

    await asyncio.gather(*(use() for _ in range(barrier.parties)))
    return found


@pytest.mark.parametrize("lane", list(Lane))
async def test_a_read_ends_at_its_deadline_and_says_so(hurried: Database, lane: Lane) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"The read took longer than 0\.3 s and was stopped"):
        await hurried.select(endless(hurried), lane)
    assert time.monotonic() - started < 5


async def test_a_read_that_waits_for_a_connection_has_the_same_deadline(hurried: Database) -> None:
    waiting = engines.READERS[Lane.COSTLY] + 3
    started = time.monotonic()
    ended = await asyncio.gather(
        *(hurried.select(endless(hurried), Lane.COSTLY) for _ in range(waiting)), return_exceptions=True
    )
    assert time.monotonic() - started < 5
    assert {type(each) for each in ended} == {Unavailable}


async def test_a_cancelled_read_ends_in_the_database_and_leaves_its_connection_usable(database: Database) -> None:
    before = await connections_of(database)
    for pause in (0, 0.001, 0.05):  # cancel before the statement, at its start, or while it runs
        reads = [asyncio.create_task(database.select(endless(database), Lane.COSTLY)) for _ in before]
        await asyncio.sleep(pause)
        for read in reads:
            read.cancel()
        await asyncio.wait(reads)
        assert all(read.cancelled() for read in reads)
        async with asyncio.timeout(5):
            assert await connections_of(database) == before
    if not database.is_sqlite:
        active = text("SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND state = 'active'"
                      " AND datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip
        assert not await database.select(active)


async def test_a_read_by_key_may_follow_a_cancelled_read_on_its_connection(database: Database) -> None:
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)"
    long_enough = statement(f"{numbers} SELECT count(*) FROM n WHERE i > $1")  # the read can be interrupted
    reads = [asyncio.create_task(database.select(endless(database))) for _ in range(engines.READERS[Lane.POINT])]
    await asyncio.sleep(0.05)  # let the statements begin
    for read in reads:
        read.cancel()
    await asyncio.wait(reads)
    found = await asyncio.gather(*(database.fetch(long_enough, 0) for _ in range(4)))
    assert [tuple(row) for (row,) in found] == [(100_000,)] * 4


async def test_a_read_that_timed_out_leaves_its_connection_usable(hurried: Database) -> None:
    before = await connections_of(hurried)
    with pytest.raises(Unavailable):
        await hurried.select(endless(hurried), Lane.COSTLY)
    assert await connections_of(hurried) == before


async def test_reads_of_one_lane_do_not_wait_for_another(database: Database) -> None:
    reads = [asyncio.create_task(database.select(endless(database), Lane.COSTLY)) for _ in range(12)]
    try:
        async with asyncio.timeout(5):
            for lane in (Lane.POINT, Lane.LIST):
                await database.select(text("SELECT 1"), lane)
    finally:
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


@asynccontextmanager
async def endless_reads(database: Database, client: str, lane: Lane, *, patient: bool = False) -> AsyncIterator[None]:
    """Keep more endless reads of one client running than the lane has connections."""
    CLIENT.set(client)  # in this test's context; the reads below inherit it
    reads = [asyncio.create_task(database.select(endless(database), lane, patient=patient)) for _ in range(6)]
    await asyncio.sleep(0)  # let each read take a connection or begin to wait for one
    CLIENT.set("")
    try:
        yield
    finally:
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


async def read_as(client: str, database: Database, lane: Lane, *, patient: bool = False) -> None:
    CLIENT.set(client)
    async with asyncio.timeout(5):
        await database.select(text("SELECT 1"), lane, patient=patient)


@pytest.mark.parametrize("patient", [False, True], ids=["prompt", "patient"])
@pytest.mark.parametrize("lane", [Lane.LIST, Lane.COSTLY])
async def test_a_client_leaves_a_connection_of_each_lane_to_others(
    database: Database, lane: Lane, patient: bool
) -> None:
    async with endless_reads(database, "192.0.2.1", lane, patient=patient):
        await read_as("192.0.2.2", database, lane)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await read_as("192.0.2.1", database, lane)
    await read_as("192.0.2.1", database, lane)


@pytest.mark.parametrize("lane", [Lane.LIST, Lane.COSTLY])
async def test_patient_reads_of_all_clients_leave_a_connection_of_each_lane_to_others(
    database: Database, lane: Lane
) -> None:
    async with (
        endless_reads(database, "192.0.2.1", lane, patient=True),
        endless_reads(database, "192.0.2.2", lane, patient=True),
    ):
        await read_as("192.0.2.3", database, lane)


async def test_patient_reads_of_a_light_lane_do_not_wait_for_costly_ones(database: Database) -> None:
    async with endless_reads(database, "192.0.2.1", Lane.COSTLY, patient=True):
        await read_as("192.0.2.1", database, Lane.LIST, patient=True)


async def test_patient_reads_of_a_client_do_not_stand_in_the_queue_before_those_of_others(hurried: Database) -> None:
    """The second client's read waits for at most one of the first client's reads to reach its deadline."""
    async with endless_reads(hurried, "192.0.2.1", Lane.COSTLY, patient=True):
        started = time.monotonic()
        await read_as("192.0.2.2", hurried, Lane.COSTLY, patient=True)
        assert time.monotonic() - started < 2 * PATIENCE * DEADLINE_SECONDS


async def test_the_deadline_of_a_patient_read_begins_with_its_turn(hurried: Database) -> None:
    async with endless_reads(hurried, "192.0.2.1", Lane.COSTLY, patient=True):
        CLIENT.set("192.0.2.1")
        # The six reads before it end at their deadlines, one after another.
        await hurried.select(text("SELECT 1"), Lane.COSTLY, patient=True)


async def test_reads_of_the_service_itself_have_no_share(database: Database) -> None:
    assert len(await connections_of(database, Lane.COSTLY)) == engines.READERS[Lane.COSTLY]


async def test_costly_reads_have_fewer_connections_than_others() -> None:
    assert engines.READERS[Lane.COSTLY] < engines.READERS[Lane.LIST] < engines.READERS[Lane.POINT]


# --- dead connections and invalid prepared statements


def terminate_others(url: str) -> None:
    """Terminate every other connection to the database, as an operator could, while the event loop is blocked."""

    async def terminate() -> None:
        database = Database(url)
        await database.select(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                 " WHERE datname = current_database() AND pid <> pg_backend_pid()")
        )  # fmt: skip
        await database.close()

    thread = threading.Thread(target=lambda: asyncio.run(terminate()))
    thread.start()
    thread.join()


@POSTGRES_ONLY
async def test_dead_connections_are_replaced_before_a_read_or_write_fails(database: Database) -> None:
    genres = statement("SELECT count(*) FROM genres WHERE id > $1")
    for _ in range(2):
        await asyncio.gather(*(database.fetch(genres, 0) for _ in range(4)))
        for lane in (Lane.COSTLY, Lane.LIST):
            await connections_of(database, lane)
        await delete_without_events(database, models.leases, true())
        terminate_others(database.url)
        for lane in Lane:
            await database.select(text("SELECT 1"), lane)
        await asyncio.gather(*(database.fetch(genres, 0) for _ in range(4)))
        await delete_without_events(database, models.leases, true())


@POSTGRES_ONLY
async def test_statements_whose_plan_is_void_are_prepared_again(database: Database) -> None:
    other = Database(database.url)
    by_key = statement("SELECT * FROM genres WHERE name = $1")

    async def read_all() -> None:
        for lane in Lane:
            await database.select(text("SELECT * FROM genres"), lane)
        await database.fetch(by_key, "Noir")

    async def change(what: str) -> None:
        async with other.begin() as (connection, transaction):
            await connection.execute(text(f"ALTER TABLE genres ALTER COLUMN name TYPE {what}"))
            await transaction.commit()

    try:
        for what in ("varchar(300)", "text", "varchar(200)"):
            await read_all()
            await change(what)
            await read_all()
        assert await database.read_problem() is None
    finally:
        await other.close()


@POSTGRES_ONLY
async def test_a_database_of_another_encoding_is_refused(database: Database) -> None:
    async with database.read(Lane.COSTLY) as connection:
        await connection.execute(text("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"))
    latin = Database(str(make_url(database.url).set(database="latin")))
    try:
        with pytest.raises(SettingsError, match=r"^DATABASE_URL: expected .* encoding UTF8, got LATIN1; "):
            await migrations.migrate(latin)
    finally:
        await latin.close()
        async with database.read(Lane.COSTLY) as connection:
            await connection.execute(text("DROP DATABASE latin"))
