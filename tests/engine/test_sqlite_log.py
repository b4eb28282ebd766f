"""The size of SQLite's write-ahead log."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

import main
from core.settings import Settings
from repository.engine import engines
from repository.engine.database import Database
from repository.engine.sqlite_file import path_of
from repository.engine.transaction import Transaction
from tests.support.backends import SQLITE_ONLY

CHUNK_BYTES = 8 * 1024 * 1024


@asynccontextmanager
async def overlapping_read(database: Database) -> AsyncIterator[None]:
    """Keep a read open, so that SQLite cannot reuse the log from its beginning."""
    file = sqlite3.connect(path_of(database.url), isolation_level=None)
    try:
        file.execute("BEGIN")
        file.execute("SELECT count(*) FROM event_head").fetchall()
        yield
    finally:
        file.close()


async def fill(database: Database, number_of_bytes: int) -> None:
    async def work(tx: Transaction) -> None:
        tx.emit("movies", "add", {"id": 1, "title": "x" * CHUNK_BYTES}, actor_id=None)

    for _ in range(0, number_of_bytes, CHUNK_BYTES):
        await database.write(work)


@SQLITE_ONLY
async def test_the_log_shrinks_when_it_is_used_again(database: Database) -> None:
    limit = engines.SQLITE_LOG_BYTES
    async with overlapping_read(database):
        await fill(database, limit + 2 * CHUNK_BYTES)
        assert database.log_bytes() > limit
    await fill(database, 2 * CHUNK_BYTES)
    assert 0 < database.log_bytes() <= limit


@SQLITE_ONLY
async def test_the_log_is_emptied_between_reads(database: Database) -> None:
    async with overlapping_read(database):
        await fill(database, CHUNK_BYTES)
        shrinking = asyncio.create_task(database.shrink_log())
        await asyncio.wait({shrinking}, timeout=0.2)
        assert database.log_bytes() > 0
    await shrinking
    assert database.log_bytes() == 0
    await database.select(text("SELECT 1"))


def test_several_workers_need_a_library_without_the_race() -> None:
    assert engines.sqlite_is_safe((3, 51, 3))
    assert not engines.sqlite_is_safe((3, 51, 2))
    assert not engines.sqlite_is_safe((3, 40, 1))


@pytest.mark.parametrize(
    ("workers", "url", "is_safe", "warns"),
    [
        (2, "sqlite:///marquee.db", False, True),
        (2, "sqlite:///marquee.db", True, False),
        (1, "sqlite:///marquee.db", False, False),
        (2, "postgresql://localhost/marquee", False, False),
    ],
)
def test_the_start_warns_of_a_library_with_the_race(
    monkeypatch: pytest.MonkeyPatch, workers: int, url: str, is_safe: bool, warns: bool
) -> None:
    monkeypatch.setattr(main, "sqlite_is_safe", lambda: is_safe)
    with capture_logs() as lines:
        main.warn_of_old_sqlite(Settings.model_construct(workers=workers, database_url=url))
    assert [line["event"] for line in lines] == ["sqlite too old for several workers"] * warns
