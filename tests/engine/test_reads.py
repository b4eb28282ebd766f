"""Reads of the database: their deadline, their end when nobody waits for them, and connections that died."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import Executable, text

from core.errors import Unavailable
from repository.engine import engines, migrations
from repository.engine.database import Database
from repository.engine.engines import Lane

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


async def connections_of(database: Database) -> set[Any]:
    """Return the identities of all connections of the costly lane, each of which runs a statement."""
    found: set[Any] = set()
    barrier = asyncio.Barrier(engines.READERS[Lane.COSTLY])

    async def use() -> None:
        async with database.read(Lane.COSTLY) as connection:
            await connection.execute(text("SELECT 1"))
            found.add((await connection.get_raw_connection()).driver_connection)
            await barrier.wait()

    await asyncio.gather(*(use() for _ in range(barrier.parties)))
    return found


@pytest.mark.parametrize("lane", list(Lane))
async def test_a_read_ends_at_its_deadline_and_says_so(hurried: Database, lane: Lane) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"The read took longer than 0\.3 seconds and was stopped"):
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
    for pause in (0, 0.001, 0.05):  # before the statement begins, about then, and while it runs
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


async def test_costly_reads_have_fewer_connections_than_others() -> None:
    assert engines.READERS[Lane.COSTLY] < engines.READERS[Lane.LIST] < engines.READERS[Lane.POINT]
