"""Leases end when the clock reaches their end, and also when the clock is set back by more than a lease lasts."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Table, insert, select, update

import models
from core.times import utc_now
from repository import jobs, leases, presence
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.leases import now_in_seconds

HOUR_SECONDS = 3600.0
JOB = {
    "id": "6f1c1f0c-8a43-4d4b-9f0e-0f6f0d6f1f11", "kind": "generate_movies", "state": "running", "done": 0, "total": 10,
    "seed": 1, "batch_size": 5, "created_at": utc_now(), "rows_per_second": 0, "attempts": 1, "lease_owner": "gone",
}  # fmt: skip


async def set_ahead(database: Database, table: Table, column: str, seconds: float) -> None:
    """Make leases end `seconds` from now, as if the clock had been set back by about that time."""

    async def work(tx: Transaction) -> None:
        until = now_in_seconds(is_sqlite=tx.is_sqlite) + seconds
        await tx.connection.execute(update(table).values({column: until}))

    await database.write(work)


async def store(database: Database, table: Table, row: dict[str, Any]) -> None:
    async def work(tx: Transaction) -> None:
        await tx.connection.execute(insert(table).values(row))

    await database.write(work)


@pytest.mark.parametrize(("ahead_seconds", "is_claimed"), [(-1.0, True), (4.0, False), (HOUR_SECONDS, True)])
async def test_a_job_is_claimed_after_the_clock_was_set_back(
    database: Database, ahead_seconds: float, is_claimed: bool
) -> None:
    await store(database, models.jobs, {**JOB, "lease_until": 0.0})
    await set_ahead(database, models.jobs, "lease_until", ahead_seconds)
    claimed = await jobs.claim(database, "worker")
    assert (claimed is not None) == is_claimed


async def test_a_lease_is_taken_after_the_clock_was_set_back(database: Database) -> None:
    assert await leases.take(database, "task", "gone", 60)
    assert not await leases.take(database, "task", "worker", 60)
    await set_ahead(database, models.leases, "until", HOUR_SECONDS)
    assert await leases.take(database, "task", "worker", 60)


async def test_a_worker_that_is_gone_is_not_present_after_the_clock_was_set_back(database: Database) -> None:
    assert await presence.store(database, "gone", 1, [presence.Row("movies", 0, None, 1, 0)], is_new=True)
    assert (await presence.workers(database)).live == {"gone": 1}
    await set_ahead(database, models.workers, "until", HOUR_SECONDS)
    assert await presence.workers(database) == presence.Workers({}, ["gone"])
    await presence.sweep(database, ["gone"])
    assert await presence.workers(database) == presence.Workers({}, [])
    assert not await database.select(select(models.presence))
