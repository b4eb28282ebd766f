"""A snapshot shows one moment, whatever is written while its pages are read."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest

from core.filters import EVERYTHING, Filter, parse_json
from core.identity import ANONYMOUS_AUDIENCES, Group, Identity
from core.network import unsent
from realtime.fanout.snapshot import MAX_UNDO_ROWS, Snapshot, SnapshotLost, Snapshots, Wanted
from realtime.feed.feed import Feed
from realtime.wire.frames import Rendering
from repository.engine import event_log
from repository.engine.database import Database
from repository.generic import lists, writes
from resources.movies import MOVIES
from tests.support.backends import SQLITE_ONLY
from tests.support.feeds import following

ADMIN = Identity(1, Group.ADMIN, 2**40, "session", "chief")


async def add(database: Database, count: int, **fields: Any) -> list[int]:
    rows = [{"title": "m", **fields}] * count
    return [orjson.loads(row)["id"] for row in await database.write(lambda tx: writes.store(tx, MOVIES, rows, None))]


async def edit(database: Database, movie_id: int, **fields: Any) -> None:
    await database.write(lambda tx: writes.edit(tx, MOVIES, ADMIN, movie_id, fields, None))


async def remove(database: Database, ids: list[int]) -> None:
    await database.write(lambda tx: writes.remove_bulk(tx, MOVIES, ADMIN, ids))


async def listed(database: Database, wanted: Filter) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while True:
        page = lists.ListRequest(filter=wanted, limit=1000, after=rows[-1]["id"] if rows else 0)
        found = (await lists.page_of(database, MOVIES, page)).rows
        rows += found
        if len(found) < 1000:
            return rows


async def begun(
    database: Database, feed: Feed, wanted: Filter, source: Snapshots | None = None, client: str = ""
) -> Snapshot:
    source = source or Snapshots(database, feed)
    filters = {"movies": wanted} if wanted else {}
    how = Wanted(("movies",), filters, Rendering("items", "s1"), ANONYMOUS_AUDIENCES, None, client)
    return Snapshot(source, how, await source.begin(["movies"]))


def items(texts: list[bytes]) -> list[dict[str, Any]]:
    return [row for text in texts for row in orjson.loads(text)["data"]["items"]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("value", [{}, {"rating": {"gte": 50}}, {"or": [{"rating": 1}, {"title": "in"}]}])
async def test_pages_read_late_show_the_moment_the_snapshot_began(
    database: Database, seed: int, value: dict[str, Any]
) -> None:
    """Between the pages, rows are added, changed and deleted, before and after the row that was read last."""
    dice = random.Random(seed)
    wanted = parse_json(value, MOVIES.fields)[0] if value else EVERYTHING
    ids: list[int] = []
    for _ in range(6):
        ids += await add(database, 300, rating=dice.randint(1, 100))
    async with following(database) as (feed, _):
        snapshot = await begun(database, feed, wanted)
        expected = await listed(database, wanted)
        seq = feed.head.seq
        rows: list[dict[str, Any]] = []
        while not snapshot.is_done:
            for _ in range(6):
                match dice.randrange(4):
                    case 0:
                        ids += await add(database, dice.randint(1, 40), rating=dice.randint(1, 100))
                    case 1:
                        gone = dice.sample(ids, dice.randint(1, 20))
                        ids = [each for each in ids if each not in gone]
                        await remove(database, gone)
                    case _:
                        title = dice.choice(["in", "out"])
                        await edit(database, dice.choice(ids[-60:] + ids), rating=dice.randint(1, 100), title=title)
            texts = await snapshot.next_page()
            assert {orjson.loads(text)["seq"] for text in texts} <= {seq}
            rows += items(texts)
        assert rows == expected


@SQLITE_ONLY
async def test_a_snapshot_is_lost_after_too_many_changes(database: Database) -> None:
    for _ in range(3):
        ids = await add(database, 7_000)
    async with following(database) as (feed, _):
        snapshot = await begun(database, feed, EVERYTHING)
        await snapshot.next_page()
        for start in range(ids[0] - 14_000 + 500, ids[-1], 5_000):
            await remove(database, list(range(start, min(start + 5_000, ids[-1] + 1))))
        assert MAX_UNDO_ROWS < 20_500
        with pytest.raises(SnapshotLost):
            await snapshot.next_page()


@SQLITE_ONLY
async def test_the_changed_rows_of_all_snapshots_of_a_client_are_bounded(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsent, "MAX_CLIENT_BYTES", 350_000)  # about 190 rows
    monkeypatch.setattr(unsent, "RECOUNT_SECONDS", 0.0)
    ids = await add(database, 1_000)
    async with following(database) as (feed, _):
        source = Snapshots(database, feed)
        first, second = [await begun(database, feed, EVERYTHING, source, "192.0.2.1") for _ in range(2)]
        other = await begun(database, feed, EVERYTHING, source, "192.0.2.2")
        for snapshot in (first, second, other):
            assert len(items(await snapshot.next_page())) == 100
        await remove(database, ids[-150:])
        await first.next_page()
        await other.next_page()
        with pytest.raises(SnapshotLost):
            await second.next_page()
        second.close()
        while not (first.is_done and other.is_done):
            for snapshot in (first, other):
                if not snapshot.is_done:
                    await snapshot.next_page()
        assert source.undo.total == 0, "nothing is counted any longer"


async def test_a_snapshot_is_lost_when_the_log_is_replaced(database: Database) -> None:
    await add(database, 1_000)
    async with following(database) as (feed, _):
        snapshot = await begun(database, feed, EVERYTHING)
        await snapshot.next_page()
        await event_log.renew_epoch(database)
        with pytest.raises(SnapshotLost):
            await snapshot.next_page()


async def test_a_worker_that_starts_remembers_the_newest_events(database: Database) -> None:
    await add(database, 10)
    for number in range(5):
        await add(database, 1, rating=number + 1)
    async with following(database) as (feed, _):
        reads = feed.log_reads
        head = feed.head.seq
        assert [event.seq for event in await feed.read_after(head - 5)] == list(range(head - 4, head + 1))
        assert [event.seq for event in await feed.read_after(0)] == list(range(1, head + 1))
        assert feed.log_reads == reads, "expected the events from memory"
