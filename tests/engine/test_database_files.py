"""Problems with SQLite's file and disk, as readiness reports them."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from core.errors import Unavailable
from repository.engine import database as database_module
from repository.engine import engines
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.transaction import Transaction
from tests.support.backends import SQLITE_ONLY

LARGE = "x" * 100_000
PAGE_BYTES = 4096


async def fill(tx: Transaction) -> None:
    for number in range(20):
        tx.emit("movies", "add", {"id": number, "title": LARGE}, actor_id=None)


@SQLITE_ONLY
async def test_a_full_disk_is_noticed_before_it_is_full(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert database.file_problem() is None
    monkeypatch.setattr(database_module, "MIN_FREE_BYTES", 2**62)
    assert database.file_problem() == "the disk is full"


@SQLITE_ONLY
async def test_a_write_that_found_the_disk_full_is_a_503(database: Database) -> None:
    async with database.begin() as (connection, _):
        await connection.execute(text("PRAGMA max_page_count = 1"))  # SQLite raises this limit to the current size
    with pytest.raises(Unavailable) as caught:
        await database.write(fill)
    assert "full" in str(caught.value.__cause__)


@SQLITE_ONLY
async def test_a_moved_file_is_noticed(database: Database) -> None:
    path = engines.path_of(database.url)
    away = path.with_suffix(".away")
    path.rename(away)
    assert "moved or replaced" in (database.file_problem() or "")
    path.touch()
    assert "moved or replaced" in (database.file_problem() or "")
    path.unlink()
    away.rename(path)
    assert database.file_problem() is None


@SQLITE_ONLY
async def test_a_damaged_file_is_noticed(database: Database) -> None:
    await database.write(fill)
    await database.shrink_log()
    await database.close()
    path = engines.path_of(database.url)
    content = path.read_bytes()
    damaged = bytearray(content)
    pages = len(content) // PAGE_BYTES
    for page in range(pages // 2, pages - 1):  # the pages that hold events
        start = page * PAGE_BYTES  # the first bytes tell SQLite how to read the page
        damaged[start : start + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    again = Database(database.url)
    try:
        with pytest.raises(Unavailable):
            await again.select(text("SELECT max(payload) FROM events"), Lane.COSTLY)
        assert await again.read_problem() == "the database file is damaged"
        assert await again.read_problem() == "the database file is damaged", "the problem persists"
    finally:
        await again.close()
