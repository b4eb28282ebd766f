"""The event log: numbers without gaps, in commit order, with concurrent writers and roll-backs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text, update

import models
from core.errors import ContentTooLarge, SettingsError, Unavailable
from repository.engine import event_log, failures, migrations
from repository.engine.append import append
from repository.engine.database import Database
from repository.engine.events import Event, Head
from repository.engine.transaction import MAX_EVENT_BYTES, MAX_EVENT_ITEMS, Transaction
from tests.conftest import Places
from tests.support.backends import POSTGRES_ONLY
from tests.support.event_logs import lose_newest

WRITERS = 32
WRITES_EACH = 4


class RolledBack(Exception):
    pass


def note(number: int) -> dict[str, Any]:
    return {"id": number, "name": f"note {number}"}


async def write(database: Database, number: int, events: int = 1, *, fails: bool = False) -> None:
    async def work(tx: Transaction) -> None:
        await asyncio.sleep(random.uniform(0, 0.003))
        await tx.connection.execute(select(models.event_head.c.epoch))
        for _ in range(events):
            tx.emit("movies", "add", note(number), actor_id=None)
        if fails:
            raise RolledBack

    await database.write(work)


async def fail_after_append(database: Database) -> None:
    """Roll back a transaction after its events were numbered, as a failing COMMIT does."""

    async def work(tx: Transaction) -> None:
        tx.emit("movies", "add", note(0), actor_id=None)
        await append(tx)
        raise RolledBack

    await database.write(work)


class Reader:
    """A reader that polls the log while it is written, as the feed does, and records every number."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.seen: list[int] = []
        self.stopped = False

    async def run(self) -> None:
        while True:
            last_round = self.stopped
            page = await event_log.read_after(
                self.database, self.seen[-1] if self.seen else 0, max_rows=1000, max_bytes=10**9
            )
            self.seen += [event.seq for event in page]
            if last_round and not page:
                return
            await asyncio.sleep(0)


async def storm(database: Database) -> tuple[list[int], list[BaseException]]:
    """Run 32 concurrent writers with random roll-backs. Return the numbers that a reader saw, and other errors."""
    reader = Reader(database)
    reading = asyncio.create_task(reader.run())
    errors: list[BaseException] = []

    async def writer(number: int) -> None:
        dice = random.Random(number)
        for _ in range(WRITES_EACH):
            try:
                if dice.random() < 0.15:
                    await fail_after_append(database)
                else:
                    await write(database, number, events=dice.choice((1, 1, 1, 3)), fails=dice.random() < 0.3)
            except RolledBack:
                pass
            except Exception as error:  # noqa: BLE001 (any other error is a result of the test)
                errors.append(error)

    await asyncio.gather(*(writer(number) for number in range(WRITERS)))
    reader.stopped = True
    await reading
    return reader.seen, errors


def is_contiguous(seen: list[int]) -> bool:
    return seen == list(range(1, len(seen) + 1))


async def test_concurrent_writers_and_rollbacks_leave_no_gap_and_no_late_number(database: Database) -> None:
    committed: list[int] = []
    database.on_commit.append(lambda events: committed.extend(event.seq for event in events))
    other = Database(database.url)  # to the database, this is another process
    other.on_commit.append(lambda events: committed.extend(event.seq for event in events))
    epoch = (await event_log.head(database)).epoch
    (seen, errors), (seen_too, errors_too) = await asyncio.gather(storm(database), storm(other))
    await other.close()
    assert errors == errors_too == []
    assert len(seen) > WRITERS
    for numbers in (seen, seen_too):
        assert is_contiguous(numbers), "expected ascending numbers without a gap"
    head = await event_log.head(database)
    assert sorted(committed) == list(range(1, head.seq + 1)), "exactly the committed events were announced"
    assert head.epoch == epoch, "numbers of rolled back transactions are not mistaken for lost events"


async def test_without_the_lock_on_the_head_the_same_writers_leave_gaps(
    new_places: Callable[[], Places], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prove that the test above can fail: run its writers without the lock."""
    monkeypatch.setattr("repository.engine.database.append", _unlocked_append)
    # On SQLite the lock is BEGIN IMMEDIATE. Without it, a transaction reads the head before it has the write lock.
    monkeypatch.setattr("repository.engine.engines.BEGIN", "BEGIN DEFERRED")
    # Writers overlap only by chance, so a single try may find no gap on a busy machine.
    for _ in range(20):
        if await goes_wrong(new_places().database_url):
            return
    raise AssertionError("expected a gap without the lock, got none")


async def goes_wrong(url: str) -> bool:
    """Return whether a reader of an unlocked log sees a gap or, on SQLite, a writer fails."""
    databases = [Database(url) for _ in range(2)]
    await migrations.migrate(databases[0])
    if not databases[0].is_sqlite:
        # Allow two events with the same number, so that only the reader can detect the error.
        async with databases[0].begin() as (connection, transaction):
            await connection.execute(text("ALTER TABLE events DROP CONSTRAINT pk_events"))
            await transaction.commit()
    storms = await asyncio.gather(*(storm(database) for database in databases))
    for database in databases:
        await database.close()
    failures = [errors for _, errors in storms if errors]
    assert databases[0].is_sqlite or not failures, "on PostgreSQL, only the reader can detect the error"
    return bool(failures) or not all(is_contiguous(seen) for seen, _ in storms)


async def _unlocked_append(tx: Transaction) -> list[Event]:
    """Append like `append`, but read the head without a lock."""
    head = (await tx.connection.execute(select(models.event_head))).one()
    await asyncio.sleep(0.001)
    await tx.connection.execute(update(models.event_head).values(seq=head.seq + len(tx.drafts)))
    for seq, draft in enumerate(tx.drafts, head.seq + 1):
        row = {name: getattr(draft, name) for name in ("topic", "operation", "audience", "payload")}
        row |= {"seq": seq, "created_at": "2026-01-01T00:00:00.000000Z"}
        await tx.connection.execute(insert(models.events).values(row))
    return []


async def test_a_rollback_releases_the_numbers(database: Database) -> None:
    await write(database, 1)
    with pytest.raises(RolledBack):
        await fail_after_append(database)
    await write(database, 2, events=2)
    page = await event_log.read_after(database, 0, max_rows=10, max_bytes=10**6)
    assert [event.seq for event in page] == [1, 2, 3]


async def test_events_are_read_as_they_were_written(database: Database) -> None:
    committed: list[Event] = []
    database.on_commit.append(committed.extend)

    async def work(tx: Transaction) -> None:
        before, after = {"id": 7, "title": "É"}, {"id": 7, "title": "Ω"}
        tx.emit("movies", "update", after, actor_id=3, before=before, changed=["title"], audience="user:3")

    await database.write(work)
    assert await event_log.read_after(database, 0, max_rows=10, max_bytes=10**6) == committed
    assert committed[0].payload == '{"id":7,"title":"Ω"}'.encode()
    assert committed[0].before == '{"title":"É"}'.encode(), "expected only the changed fields"


async def test_a_page_is_bounded_but_never_empty_before_the_end(database: Database) -> None:
    async def work(tx: Transaction) -> None:
        for number in range(10):
            tx.emit("movies", "add", note(number) | {"description": "x" * 10_000}, actor_id=None)

    await database.write(work)
    assert len(await event_log.read_after(database, 0, max_rows=4, max_bytes=10**9)) == 4
    assert len(await event_log.read_after(database, 0, max_rows=100, max_bytes=35_000)) == 3
    assert len(await event_log.read_after(database, 0, max_rows=100, max_bytes=1)) == 1
    assert await event_log.read_after(database, 10, max_rows=100, max_bytes=1) == []


async def test_bulk_events_are_split_at_the_limits(database: Database) -> None:
    committed: list[Event] = []
    database.on_commit.append(committed.extend)

    async def work(tx: Transaction) -> None:
        tx.emit_bulk("movies", "delete_bulk", [b"%d" % n for n in range(MAX_EVENT_ITEMS + 1)], actor_id=None)
        tx.emit_bulk("movies", "add_bulk", [b'"' + b"x" * 200_000 + b'"'] * 5, actor_id=None, job_id="j")

    await database.write(work)
    assert [event.operation for event in committed] == ["delete_bulk"] * 2 + ["add_bulk"] * 2
    assert all(len(event.payload) < MAX_EVENT_BYTES + 1_000 for event in committed)
    assert committed[2].payload.endswith(b'],"job_id":"j"}')


async def test_a_transaction_is_bounded_in_bytes(database: Database) -> None:
    """A write above the limit stores nothing, and the write after it gets the next number."""
    rows = [b'"' + b"x" * 700_000 + b'"'] * 12

    async def work(tx: Transaction, times: int) -> None:
        for _ in range(times):
            tx.emit_bulk("movies", "update_bulk", rows, actor_id=None, before=rows)

    for _ in range(2):
        with pytest.raises(ContentTooLarge, match="at most 16,777,216 bytes"):
            await database.write(partial(work, times=1))
    await write(database, 1)
    assert await event_log.head(database) == Head((await event_log.head(database)).epoch, 1)


async def test_pruning_keeps_the_newest_events_that_fit_into_the_bytes(database: Database) -> None:
    """Each event has slightly more than 1,000 bytes, so nine of them fit into 10,000."""

    async def work(tx: Transaction) -> None:
        for number in range(4):
            tx.emit("movies", "add", note(number) | {"description": "x" * 1_000}, actor_id=None)

    for _ in range(5):
        await database.write(work)
    ancient = datetime.now(UTC) - timedelta(days=1)
    prune = partial(event_log.prune, database, keep_rows=100, keep_bytes=10_000, older_than=ancient)
    assert await prune(max_rows=3) == 3
    assert await prune(max_rows=100) == 8
    assert await prune(max_rows=100) == 0
    assert await event_log.oldest(database) == 12
    async with database.read() as connection:
        kept = await connection.execute(text("SELECT sum(length(payload)) FROM events"))
        size = await connection.execute(text("SELECT size FROM event_head"))
        assert kept.scalar() == size.scalar()


async def test_pruning_deletes_the_oldest_events_and_keeps_the_numbers(database: Database) -> None:
    for number in range(10):
        await write(database, number)
    ancient = datetime.now(UTC) - timedelta(days=1)
    assert await event_log.prune(database, keep_rows=100, keep_bytes=10**9, older_than=ancient, max_rows=100) == 0
    assert await event_log.prune(database, keep_rows=6, keep_bytes=10**9, older_than=ancient, max_rows=3) == 3
    assert await event_log.prune(database, keep_rows=6, keep_bytes=10**9, older_than=ancient, max_rows=3) == 1
    assert await event_log.oldest(database) == 5
    assert (
        await event_log.prune(database, keep_rows=6, keep_bytes=10**9, older_than=datetime.now(UTC), max_rows=100) == 6
    )
    assert await event_log.oldest(database) is None
    await write(database, 11)
    page = await event_log.read_after(database, 10, max_rows=10, max_bytes=10**6)
    assert [event.seq for event in page] == [11]


async def test_concurrent_migrations_create_one_epoch(empty_places: Callable[[], Places]) -> None:
    places = empty_places()
    databases = [Database(places.database_url) for _ in range(3)]
    await asyncio.gather(*(migrations.migrate(database) for database in databases))
    heads = {await event_log.head(database) for database in databases}
    assert len(heads) == 1
    await event_log.renew_epoch(databases[0])
    assert await event_log.head(databases[1]) not in heads
    for database in databases:
        async with database.read() as connection:
            assert (await connection.execute(text("SELECT count(*) FROM event_head"))).scalar() == 1
        await database.close()


async def test_a_lost_head_is_replaced_at_the_start_without_using_numbers_again(database: Database) -> None:
    for number in range(3):
        await write(database, number)
    async with database.begin() as (connection, _):
        was = (await connection.execute(select(models.event_head.c.epoch, models.event_head.c.size))).one()
        await connection.execute(delete(models.event_head))
    with pytest.raises(Unavailable):
        await write(database, 3)
    await migrations.migrate(database)
    async with database.read() as connection:
        now = (await connection.execute(select(models.event_head.c.epoch, models.event_head.c.size))).one()
    assert (now.epoch != was.epoch, now.size) == (True, was.size)
    await write(database, 4)
    assert (await event_log.head(database)).seq == 4


async def test_a_write_that_takes_the_number_of_a_lost_event_renews_the_epoch(database: Database) -> None:
    committed: list[Event] = []
    database.on_commit.append(committed.extend)
    for number in range(3):
        await write(database, number)
    await lose_newest(database.url, 2)
    with pytest.raises(RolledBack):
        await fail_after_append(database)  # its new epoch is rolled back, too
    await write(database, 3, events=2)
    await write(database, 4)
    assert [event.seq for event in committed] == [1, 2, 3, 2, 3, 4]
    before, after = committed[0].epoch, committed[-1].epoch
    assert before != after
    assert [event.epoch for event in committed] == [before] * 3 + [after] * 3
    assert await event_log.head(database) == Head(after, 4)


@POSTGRES_ONLY
@pytest.mark.parametrize("has_pooler", [False, True])
@pytest.mark.parametrize(("configured", "used"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")])
async def test_a_write_is_never_committed_asynchronously(
    database: Database, has_pooler: bool, configured: str, used: str
) -> None:
    async def setting(tx: Transaction) -> Any:
        return (await tx.connection.execute(text("SHOW synchronous_commit"))).scalar_one()

    async with database.begin() as (connection, transaction):
        name = (await connection.execute(text("SELECT current_database()"))).scalar_one()
        await connection.execute(text(f'ALTER DATABASE "{name}" SET synchronous_commit = {configured}'))
        await transaction.commit()
    fresh = Database(database.url, has_pooler=has_pooler)
    assert await fresh.write(setting) == used
    await fresh.close()


@pytest.mark.parametrize("starts_again", [False, True])
async def test_a_head_that_was_restored_alone_does_not_use_numbers_again(
    database: Database, starts_again: bool
) -> None:
    for number in range(3):
        await write(database, number)
    async with database.begin() as (connection, _):
        await connection.execute(update(models.event_head).values(seq=1))
    with pytest.raises(Unavailable) as caught:
        await write(database, 3)
    assert failures.in_words(caught.value.__cause__) == failures.HEAD_BEHIND
    await (migrations.migrate(database) if starts_again else event_log.renew_epoch(database))
    await write(database, 4)
    assert (await event_log.head(database)).seq == 4


async def test_a_schema_of_a_newer_version_is_refused_in_one_sentence(database: Database) -> None:
    async def work(tx: Transaction) -> None:
        await tx.connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    await database.write(work)
    with pytest.raises(SettingsError, match=r"^DATABASE_URL: expected a schema up to .*, got 9999, which a newer"):
        await migrations.migrate(database)
