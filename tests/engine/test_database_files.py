"""Problems with SQLite's file and disk: readiness reports them, and no write succeeds whose rows would be lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from core.errors import SettingsError, Unavailable
from repository.engine import migrations, sqlite_file
from repository.engine.database import Database
from repository.engine.engines import BUSY_TIMEOUT_SECONDS, Lane
from repository.engine.sqlite_file import SqliteFile, path_of
from repository.engine.transaction import Transaction
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.service import Service, eventually

LARGE = "x" * 100_000
PAGE_BYTES = 4096
SLOW = "WITH RECURSIVE n(i) AS (VALUES(1) UNION ALL SELECT i + 1 FROM n WHERE i < 1000000) SELECT count(*) FROM n"


async def fill(tx: Transaction) -> None:
    for number in range(20):
        tx.emit("movies", "add", {"id": number, "title": LARGE}, actor_id=None)


@SQLITE_ONLY
async def test_a_full_disk_is_noticed_before_it_is_full(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert database.file_problem() is None
    monkeypatch.setattr(sqlite_file, "MIN_FREE_BYTES", 2**62)
    assert database.file_problem() == "the disk is full"


@SQLITE_ONLY
async def test_a_write_that_found_the_disk_full_is_a_503(database: Database) -> None:
    async with database.begin() as (connection, _):
        await connection.execute(text("PRAGMA max_page_count = 1"))  # SQLite raises this limit to the current size
    with pytest.raises(Unavailable) as caught:
        await database.write(fill)
    assert "full" in str(caught.value.__cause__)


async def note(tx: Transaction) -> None:
    tx.emit("movies", "add", {"id": 1}, actor_id=None)


async def is_refused(write: Callable[[], Awaitable[None]], problem: str | None) -> None:
    """Check that the write is refused, and that readiness reported `problem`."""
    assert "moved or replaced" in (problem or "")
    with pytest.raises(Unavailable, match="nothing was written"):
        await write()


@SQLITE_ONLY
async def test_no_write_goes_to_a_moved_file(database: Database) -> None:
    async def write() -> None:
        await database.write(note)

    await write()
    path = path_of(database.url)
    away = path.with_suffix(".away")
    path.rename(away)
    await is_refused(write, database.file_problem())
    assert not path.exists()
    path.touch()
    await is_refused(write, database.file_problem())
    path.unlink()
    away.rename(path)
    assert database.file_problem() is None
    await write()
    assert await database.write_problem() is None
    ((count,),) = await database.select(text("SELECT count(*) FROM events"))
    assert count == 2


@SQLITE_ONLY
@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_no_write_goes_to_a_removed_file(database: Database, suffix: str) -> None:
    async def write() -> None:
        await database.write(note)

    await write()
    path_of(database.url + suffix).unlink()
    await is_refused(write, database.file_problem())


@SQLITE_ONLY
async def test_no_write_goes_to_an_emptied_file(database: Database) -> None:
    await database.write(note)
    await database.shrink_log()
    path_of(database.url).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(Unavailable):
            await database.write(note)
        assert database.file_problem() == "the database file is damaged"


@SQLITE_ONLY
async def test_a_file_moved_during_a_write_is_noticed_before_commit(database: Database) -> None:
    path = path_of(database.url)

    async def move(tx: Transaction) -> None:
        await note(tx)
        path.rename(path.with_suffix(".away"))

    with pytest.raises(Unavailable, match="nothing was written"):
        await database.write(move)


@SQLITE_ONLY
async def test_a_closed_connection_holds_no_lock(database: Database) -> None:
    """A cancelled write closes its connection, although one of its cursors may still be open."""
    cursors = []
    async with database.begin() as (connection, transaction):
        await connection.execute(text("UPDATE event_head SET seq = seq"))
        driver: Any = (await connection.get_raw_connection()).driver_connection
        cursors.append(await driver.execute("SELECT 1 UNION SELECT 2"))
        await connection.invalidate()
        await transaction.rollback()
    async with asyncio.timeout(BUSY_TIMEOUT_SECONDS / 2):
        await database.write(note)


@SQLITE_ONLY
async def test_no_thread_outlives_the_database(new_places: Callable[[], Places]) -> None:
    """A write that is cancelled twice leaves its connection to be closed in the background."""
    before = set(threading.enumerate())
    database = Database(new_places().database_url)
    await migrations.migrate(database)
    is_running = asyncio.Event()

    async def work(tx: Transaction) -> None:
        is_running.set()
        await tx.connection.execute(text(SLOW))

    writing = asyncio.create_task(database.write(work))
    await is_running.wait()
    for _ in range(2):
        writing.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert set(threading.enumerate()) - before
    await database.close()
    assert not set(threading.enumerate()) - before


async def test_a_connection_that_is_stopped_while_it_closes_is_closed(tmp_path: Path) -> None:
    connection = SqliteFile(f"sqlite:///{tmp_path}/marquee.db").connect(":memory:")
    await connection
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)
    stopped = connection.stop()
    assert stopped is not None
    async with asyncio.timeout(10):
        await closing
        await stopped


@SQLITE_ONLY
@pytest.mark.parametrize("turns", range(1, 12, 2))
async def test_no_thread_of_a_cancelled_opening_outlives_the_database(
    new_places: Callable[[], Places], turns: int
) -> None:
    before = set(threading.enumerate())
    database = Database(new_places().database_url)
    reading = asyncio.create_task(database.select(text("SELECT 1")))
    for _ in range(turns):
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await database.close()
    assert not set(threading.enumerate()) - before


@SQLITE_ONLY
async def test_no_connection_is_opened_to_another_file(database: Database) -> None:
    path = path_of(database.url)
    path.rename(path.with_suffix(".away"))
    with pytest.raises(Unavailable):
        await database.select(text("SELECT 1"), Lane.COSTLY)
    assert not path.exists(), "SQLite would have created an empty file"


@SQLITE_ONLY
async def test_a_file_moved_while_a_connection_is_opened_keeps_its_log(database: Database) -> None:
    """When SQLite creates a database file, it deletes a write-ahead log that is left from an earlier file."""
    await database.write(note)
    path = path_of(database.url)
    away = path.with_suffix(".away")

    def move(*_: Any) -> None:
        path.rename(away)

    reader = database._engines.readers[Lane.COSTLY].sync_engine
    event.listen(reader, "do_connect", move)  # called after the check for a moved file
    with pytest.raises(Unavailable):
        await database.select(text("SELECT 1"), Lane.COSTLY)
    event.remove(reader, "do_connect", move)
    assert not path.exists()
    away.rename(path)
    ((count,),) = await database.select(text("SELECT count(*) FROM events"), Lane.COSTLY)
    assert count == 1


@pytest.mark.parametrize("form", ["{}/a b#c%41ü/d&e=f.db", "/{}/slashes.db", "{}/link/../beside.db"])
async def test_a_path_may_have_any_form(tmp_path: Path, form: str) -> None:
    (tmp_path / "elsewhere" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "folder")
    url = "sqlite:///" + form.format(tmp_path)
    database = Database(url)
    try:
        await migrations.migrate(database)
        await database.write(note)
    finally:
        await database.close()
    path = path_of(url)
    assert path.stat().st_size > 0
    assert [found for found in path.parent.iterdir() if found.is_file()] == [path]


async def test_a_symbolic_link_to_another_file_is_noticed(tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    for name in ("first.db", "second.db"):
        (tmp_path / name).touch()
    link.symlink_to("first.db")
    database = Database(f"sqlite:///{link}")
    try:
        await migrations.migrate(database)
        await database.write(note)
        assert database.file_problem() is None
        assert database.log_bytes() > 0
        link.unlink()
        link.symlink_to("second.db")
        await is_refused(lambda: database.write(note), database.file_problem())
    finally:
        await database.close()


@SQLITE_ONLY
async def test_the_log_may_be_new_when_all_connections_were_closed(database: Database) -> None:
    await database.write(note)
    await database.close()  # SQLite removes the log, and the pools open new connections when they are needed
    await database.write(note)
    assert database.file_problem() is None


@SQLITE_ONLY
async def test_a_service_acknowledges_no_write_to_a_moved_file(new_service: Callable[..., Service]) -> None:
    service = new_service(WORKERS="2").start()
    path = path_of(service.database_url)
    async with service.person() as alice:
        before = await alice.add(title="Before")
        path.rename(path.with_suffix(".away"))
        for response in await asyncio.gather(
            *(alice.http.post("/movies", json={"title": f"Lost {number}"}) for number in range(10)),
            alice.http.patch(f"/movies/{before['id']}", json={"title": "Lost"}),
            alice.http.post("/auth/logout"),
        ):
            assert response.status_code == 503, response.text
            assert "othing was written" in response.json()["detail"]
        path.with_suffix(".away").rename(path)

        async def is_accepted() -> bool:
            return (await alice.http.post("/movies", json={"title": "After"})).status_code == 201

        await eventually(is_accepted, "writes are accepted again")
        titles = {movie["title"] for movie in (await alice.http.get("/movies")).json()}
        assert titles == {"Before", "After"}


@SQLITE_ONLY
@pytest.mark.parametrize("is_replaced", [False, True])
async def test_a_log_without_its_file_is_kept(database: Database, *, is_replaced: bool) -> None:
    """A worker that starts before the file is moved back finds no file, or an empty one."""
    await database.write(note)
    path = path_of(database.url)
    away = path.with_suffix(".away")
    path.rename(away)
    if is_replaced:
        path.touch()
    with pytest.raises(SettingsError, match="missing or empty, although its write-ahead log"):
        Database(database.url)
    assert path.exists() == is_replaced
    away.rename(path)
    again = Database(database.url)
    try:
        ((count,),) = await again.select(text("SELECT count(*) FROM events"))
    finally:
        await again.close()
    assert count == 1


@SQLITE_ONLY
async def test_a_log_is_kept_when_its_file_is_moved_while_a_worker_starts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await database.write(note)
    path = path_of(database.url)
    touch = Path.touch

    def move_and_touch(self: Path, mode: int = 0o666) -> None:
        path.rename(path.with_suffix(".away"))
        touch(self, mode)

    monkeypatch.setattr(Path, "touch", move_and_touch)
    with pytest.raises(SettingsError, match="missing or empty"):
        Database(database.url)


def test_workers_may_create_a_database_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first look at a file, another worker creates the database and its log."""
    path = tmp_path / "new.db"
    look = sqlite_file._found

    def look_and_create(at: Path) -> Any:
        found = look(at)
        path.write_bytes(b"x" * PAGE_BYTES)
        Path(f"{path}-wal").write_bytes(b"x")
        return found

    monkeypatch.setattr(sqlite_file, "_found", look_and_create)
    SqliteFile(f"sqlite:///{path}")


@SQLITE_ONLY
async def test_a_damaged_file_is_noticed(database: Database) -> None:
    await database.write(fill)
    await database.shrink_log()
    await database.close()
    path = path_of(database.url)
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
        with pytest.raises(Unavailable, match="nothing was written"):
            await again.write(note)
    finally:
        await again.close()
