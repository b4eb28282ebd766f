"""The feed, the ring and the bus: listeners get every event once and in order, whatever the bus does."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from core.errors import Unavailable
from core.filters import parse_json
from core.network import unsent
from core.network.unsent import UnsentBytes
from realtime.fanout import subscription
from realtime.fanout.hub import Hub
from realtime.fanout.job_progress import Progress
from realtime.fanout.snapshot import Snapshots
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import Subscription
from realtime.feed import bus, feed
from realtime.feed.bus import Bus
from realtime.feed.bus_messages import Heartbeat
from realtime.feed.feed import Feed, PositionTooOld
from realtime.feed.positions import check_position, find_start
from realtime.feed.redis_backend import _decode, _encode_event, _encode_heartbeat
from realtime.feed.ring import Ring
from realtime.sse.replay import Replay
from realtime.wire.frames import Frames, Rendering, event_text
from realtime.wire.room import Room
from repository import jobs
from repository.engine import event_log, migrations
from repository.engine.database import Database
from repository.engine.events import Event, Head
from repository.engine.transaction import Transaction
from resources.movies import MOVIES
from tests.support.event_logs import lose_newest, prune_log
from tests.support.feeds import following, running
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import SECRET, eventually


async def write(database: Database, count: int, size: int = 10) -> list[Event]:
    """Commit `count` events, one transaction each, and return them."""
    committed: list[Event] = []
    database.on_commit.append(committed.extend)

    async def work(tx: Transaction) -> None:
        tx.emit("movies", "add", {"id": 1, "title": "x" * size}, actor_id=None)

    for _ in range(count):
        await database.write(work)
    database.on_commit.remove(committed.extend)
    return committed


@pytest.mark.parametrize("seed", range(8))
async def test_listeners_see_every_event_once_whatever_the_bus_does(database: Database, seed: int) -> None:
    dice = random.Random(seed)
    async with following(database) as (followed, seen):
        events = await write(database, 60)
        heard = [event for event in events if dice.random() > 0.25]
        heard += [event for event in events if dice.random() < 0.2]
        for index in range(len(heard)):
            other = min(len(heard) - 1, index + dice.randrange(5))
            heard[index], heard[other] = heard[other], heard[index]
        while heard:
            batch = [heard.pop(0) for _ in range(min(len(heard), dice.randrange(1, 6)))]
            followed.offer(batch)
            await asyncio.sleep(dice.choice((0, 0, 0.001)))
        followed.offer_head(Head(events[-1].epoch, events[-1].seq))
        await eventually(lambda: len(seen) >= len(events), "all events are seen", 5)
        assert seen == [event.seq for event in events]


async def test_events_from_the_bus_cost_no_reads_of_the_log(database: Database) -> None:
    async with following(database, runs=False) as (followed, seen):
        events = await write(database, 20)
        followed.offer([events[1], events[0], *events[2:]])
        assert seen == [event.seq for event in events]
        assert followed.log_reads == 0


async def test_the_log_is_read_when_the_bus_is_silent(database: Database) -> None:
    async with following(database) as (_, seen):
        events = await write(database, 5)
        await eventually(lambda: seen, "the feed polls the log", feed.POLL_SECONDS_SHARED + 2)
        assert seen == [event.seq for event in events]


async def test_early_events_are_kept_up_to_a_bound_and_then_read_from_the_log(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PENDING_EVENTS", 3)
    async with following(database, runs=False) as (followed, seen):
        events = await write(database, 30)
        followed.offer(events[1:])
        assert len(followed._pending) == 3
        async with running(followed):
            await eventually(lambda: len(seen) == 30, "the rest comes from the log", 5)
        assert seen == [event.seq for event in events]
        assert followed._pending == {}
        assert followed._pending_bytes == 0


async def test_a_crowd_that_connects_at_once_shares_a_read_of_the_head(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    real = event_log.head

    async def counted(database: Database) -> Head:
        nonlocal reads
        reads += 1
        return await real(database)

    async with following(database) as (followed, seen):
        await write(database, 3)
        monkeypatch.setattr(event_log, "head", counted)
        begun = time.monotonic()
        await asyncio.gather(*(followed.reach_head() for _ in range(500)))
        polls = (time.monotonic() - begun) / feed.MIN_POLL_SECONDS
        assert seen == [1, 2, 3]
        assert reads <= 4 + polls, "expected one or two reads for all clients, besides the feed's own"


async def test_events_of_another_log_are_ignored(database: Database) -> None:
    async with following(database) as (followed, seen):
        (event,) = await write(database, 1)
        followed.offer([replace(event, epoch="another")])
        await eventually(lambda: seen, "the event is read from the log", 5)
        assert followed.head == Head(event.epoch, event.seq)


async def test_a_page_comes_from_the_ring_or_the_log_and_never_skips(database: Database) -> None:
    async with following(database, runs=False) as (followed, _):
        events = await write(database, 10)
        followed.ring = Ring(max_events=4)
        followed.offer(events)
        assert [event.seq for event in await followed.read_after(6)] == [7, 8, 9, 10]
        assert followed.log_reads == 0
        assert [event.seq for event in await followed.read_after(2)] == [3, 4, 5, 6, 7, 8, 9, 10]
        assert followed.log_reads == 1
        assert await followed.read_after(10) == []
        await prune_log(database, keep_rows=7)
        with pytest.raises(PositionTooOld):
            await followed.read_after(2)
        assert await check_position(followed, 2) == "position is older than the log"
        assert await check_position(followed, 3) is None
        assert await check_position(followed, 10) is None
        assert await check_position(followed, 11) == "position is newer than the log"


def add(seq: int, size: int = 100) -> Event:
    payload = b'{"id":1,"title":"' + b"x" * size + b'"}'
    return Event("e", seq, "movies", "add", "1", "public", payload, None, (), None, "2026-01-01T00:00:00.000000Z")


def test_the_ring_keeps_both_bounds() -> None:
    def after(seq: int, max_bytes: int = 10**9) -> list[int] | None:
        found = ring.after(seq, max_events=10, max_bytes=max_bytes)
        return None if found is None else [event.seq for event in found]

    ring = Ring(max_bytes=10**9, max_events=3)
    for seq in range(1, 6):
        ring.append(add(seq))
    assert (after(1), after(2)) == (None, [3, 4, 5])
    ring = Ring(max_bytes=add(1, 1000).size * 2, max_events=100)
    for seq in range(1, 6):
        ring.append(add(seq, 1000))
    assert (after(2), after(3)) == (None, [4, 5])
    ring.append(add(6, 100_000))  # an event larger than the ring is kept as the only one
    assert after(5, max_bytes=1) == [6]


def test_the_ring_finds_an_event_by_its_number() -> None:
    ring = Ring(max_events=3)
    assert ring.at(1) is None
    events = [add(seq) for seq in range(1, 6)]
    for event in events:
        ring.append(event)
    assert [ring.at(seq) for seq in range(1, 7)] == [None, None, *events[2:], None]


@pytest.mark.parametrize("changed", [(), ("title", "rating")])
@pytest.mark.parametrize("before", [None, b'{"id":1}'])
def test_an_event_survives_the_bus_byte_for_byte(changed: tuple[str, ...], before: bytes | None) -> None:
    whole = replace(add(7), changed=changed, before=before, payload=b'{"a":"\n"}', entity_id=None, actor_id=3)
    assert _decode(_encode_event(whole)) == (whole,)
    beat = Heartbeat("worker", Head("e", 5))
    assert _decode(_encode_heartbeat(beat)) == beat


def test_an_outbox_that_is_full_drops_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "OUTBOX_EVENTS", 5)
    full = Bus("memory://", ())
    full.publish([add(seq) for seq in range(1, 9)])
    assert full.dropped == 3
    monkeypatch.setattr(bus, "OUTBOX_BYTES", 10)
    full.publish([add(9)])
    assert full.dropped == 4


async def test_foreign_messages_on_the_channel_are_ignored(redis: RedisServer) -> None:
    heard: list[Sequence[Event]] = []
    heads: list[Head] = []
    listening = Bus(redis.url, [SECRET])
    listening.on_events.append(heard.append)
    listening.on_head.append(heads.append)
    running = asyncio.create_task(listening.run(lambda: Head("e", 1)))
    await eventually(lambda: heads, "a bus message arrives")
    reader, writer = await asyncio.open_connection("127.0.0.1", redis.port)
    for junk in (b"junk", b"{}", b"[]", b"{}\nx", b'{"worker":1}', b"\n", b"\xff"):
        writer.write(b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%s\r\n" % (len(bus.CHANNEL), bus.CHANNEL.encode()))
        writer.write(b"$%d\r\n%s\r\n" % (len(junk), junk))
        await reader.readline()

    async def published() -> bool:
        listening.publish([add(1)])
        await asyncio.sleep(0.05)
        return bool(heard)

    await eventually(published, "the bus delivers its own message")
    assert not running.done()
    running.cancel()
    writer.close()
    await asyncio.gather(running, return_exceptions=True)


def test_a_summary_needs_ids_only() -> None:
    bulk = replace(add(3), operation="delete_bulk", payload=b'{"count":2,"ids":[9,4]}')
    text: Any = event_text(bulk, Rendering("summary"))
    assert b'"data":{"count":2,"first_id":4,"last_id":9,"job_id":null}' in text


async def test_a_gap_that_was_pruned_resets_the_feed_and_is_not_read_again(database: Database) -> None:
    resets: list[Head] = []
    async with following(database, runs=False) as (followed, seen):
        followed.on_reset.append(resets.append)
        events = await write(database, 10)
        await event_log.prune(database, keep_rows=0, keep_bytes=10**9, older_than=datetime.now(UTC), max_rows=100)
        assert await event_log.oldest(database) is None
        followed.offer_head(Head(events[-1].epoch, events[-1].seq))
        async with running(followed):
            await eventually(lambda: resets, "the feed starts over", 5)
            assert followed.head == Head(events[-1].epoch, events[-1].seq)
            assert seen == []
            assert followed.log_reads < 10
            more = await write(database, 2)
            followed.offer(more)
            assert seen == [event.seq for event in more]


async def test_only_one_of_several_workers_renews_the_epoch(database: Database) -> None:
    before = await event_log.head(database)
    await asyncio.gather(*(event_log.renew_epoch(database, before.epoch) for _ in range(5)))
    after = await event_log.head(database)
    assert after.epoch != before.epoch
    await event_log.renew_epoch(database, before.epoch)
    assert await event_log.head(database) == after


async def test_numbers_from_the_bus_count_when_the_log_loses_its_newest_events(database: Database) -> None:
    """A worker whose next write takes the number of an event that only other workers wrote renews the epoch."""
    other = Database(database.url)
    for first_heard in (0, 2):  # in the second round, the bus delivers only the newest event
        async with following(database, runs=False) as (followed, _):
            events = await write(other, 3)
            followed.offer(events[first_heard:])
        await lose_newest(database.url, 1)
        (again,) = await write(database, 1)
        assert (again.epoch != events[2].epoch, again.seq) == (True, events[2].seq)
    await other.close()


async def test_another_event_with_a_known_number_renews_the_epoch(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "POLL_SECONDS_SHARED", 60)
    other, unaware = Database(database.url), Database(database.url)
    resets: list[Head] = []
    async with following(database) as (followed, seen):
        followed.on_reset.append(resets.append)
        events = await write(other, 3)
        followed.offer(events)
        followed.offer([*events, *(await event_log.read_after(database, 0, max_rows=10, max_bytes=10**6))])
        assert seen == [1, 2, 3], "repeated events are ignored"
        assert followed._conflict is None
        await lose_newest(database.url, 1)
        (again,) = await write(unaware, 1)
        assert (again.epoch, again.seq) == (events[2].epoch, events[2].seq), "this worker knew of no lost event"
        followed.offer([again])
        await eventually(lambda: resets, "the feed starts over", 5)
        assert (followed.head.epoch != again.epoch, followed.head.seq) == (True, again.seq)
        assert await event_log.head(database) == followed.head
    await other.close()
    await unaware.close()


@pytest.mark.parametrize("rewritten", [1, 2])
async def test_an_idle_feed_without_a_bus_notices_that_its_newest_event_was_replaced(
    database: Database, monkeypatch: pytest.MonkeyPatch, rewritten: int
) -> None:
    monkeypatch.setattr(feed, "POLL_SECONDS_SHARED", 60)
    other, unaware = Database(database.url), Database(database.url)
    resets: list[Head] = []
    async with following(database) as (followed, seen):
        followed.on_reset.append(resets.append)
        events = await write(other, 3)
        followed.poll_now()
        await eventually(lambda: len(seen) == 3, "the feed has read the log", 5)
        for _ in range(3):
            followed.poll_now()
            await eventually(lambda: not followed._poll_due.is_set(), "the feed polls", 5)
        assert not resets
        await lose_newest(database.url, 1)
        again = await write(unaware, rewritten)
        assert (again[0].epoch, again[0].seq) == (events[2].epoch, events[2].seq), "the writer knew of no lost event"
        followed.poll_now()
        await eventually(lambda: resets, "the feed starts over", 5)
        assert (followed.head.epoch != again[-1].epoch, followed.head.seq) == (True, again[-1].seq)
        assert seen == [1, 2, 3], "no event of the other history follows the lost one"
        # The ring is empty now, but the next poll remembers what identifies the event at the head.
        followed.poll_now()
        await eventually(lambda: followed._mark is not None and followed._mark[0] == followed.head, "a poll follows", 5)
        await lose_newest(database.url, 1)
        another = Database(database.url)
        await write(another, 1)
        await another.close()
        followed.poll_now()
        await eventually(lambda: len(resets) == 2, "the feed starts over again", 5)
    await other.close()
    await unaware.close()


class BreakingWriter:
    """A writer whose next write raises an error if `breaks` is set, as a write to a closing transport may."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.breaks = False
        self.closed: int | None = None

    def write(self, frames: Frames) -> None:
        if self.breaks:
            self.breaks = False
            raise RuntimeError("the transport is closed")
        self.texts += frames.texts

    def buffered(self) -> int:
        return 0

    def taken(self) -> int:
        return 0

    async def drained(self) -> None:
        pass

    def count_control_frames(self, on_control_frame: Callable[[], bool]) -> None:
        pass

    def close(self, code: int) -> None:
        self.closed = code


def hub_of(feed: Feed) -> Hub:
    hub = Hub(feed)
    hub.start(feed.head.seq)
    feed.on_events.append(hub.publish)
    return hub


async def test_sockets_whose_client_has_many_unread_pages_do_not_wait_for_one_another_for_ever(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription that waits to begin a page does not keep others of its socket from sending theirs."""
    monkeypatch.setattr(unsent, "MAX_CLIENT_BYTES", feed.PAGE_BYTES)
    monkeypatch.setattr(unsent, "RECOUNT_SECONDS", 0.0)
    monkeypatch.setattr(subscription, "PAUSE_SECONDS", 0.01)
    async with following(database, runs=False) as (followed, _):
        read_after = followed.read_after

        async def slowly(position: int) -> Sequence[Event]:
            await asyncio.sleep(0.01)
            return await read_after(position)

        monkeypatch.setattr(followed, "read_after", slowly)
        hub = hub_of(followed)
        followed.offer(await write(database, 3))
        counted: UnsentBytes[Any] = UnsentBytes()
        writers = [BreakingWriter(), BreakingWriter()]
        for writer in writers:
            room = Room(writer, counted, "a client")
            for _ in range(4):
                snapshots = Snapshots(database, followed)
                spec = Spec(frozenset({"movies"}))
                Subscription(spec, writer, room, feed=followed, live=hub, snapshots=snapshots).start(0)
        await eventually(lambda: all(len(each.texts) == 12 for each in writers), "all have all events", 5)
        await eventually(lambda: counted.total == 0, "nothing is counted any longer", 5)


def subscribe(spec: Spec, feed: Feed, hub: Hub) -> BreakingWriter:
    writer = BreakingWriter()
    snapshots = Snapshots(feed.database, feed)
    subscription = Subscription(spec, writer, Room(writer), feed=feed, live=hub, snapshots=snapshots)
    subscription.start(feed.head.seq)
    return writer


async def test_a_failing_socket_costs_no_socket_an_event(database: Database) -> None:
    async with following(database, runs=False) as (followed, _):
        hub = hub_of(followed)
        writers = [subscribe(Spec(frozenset({"movies"})), followed, hub) for _ in range(3)]
        writers[1].breaks = True
        for committed in await write(database, 3):
            followed.offer([committed])
            await eventually(lambda: hub.is_idle, "the hub has written the events", 5)
        await eventually(lambda: all(len(writer.texts) == 3 for writer in writers), "all writers have all events", 5)
        assert writers[0].texts == writers[1].texts == writers[2].texts


async def test_an_event_that_cannot_be_encoded_closes_the_sockets_that_need_it(database: Database) -> None:
    """Sockets that do not need to filter the event stay open and get all events."""
    async with following(database, runs=False) as (followed, _):
        hub = hub_of(followed)
        wanted, _ = parse_json({"title": {"prefix": "x"}}, MOVIES.fields)
        movies = frozenset({"movies"})
        plain = subscribe(Spec(movies), followed, hub)
        filtered = subscribe(Spec(movies, filters=(("movies", wanted),)), followed, hub)
        events = await write(database, 3)
        strange = replace(events[1], payload=b'{"id":5')  # no JSON
        followed.offer([events[0], strange, events[2]])
        await eventually(lambda: hub.is_idle, "the hub has written the events", 5)
        assert len(plain.texts) == 3
        await eventually(lambda: filtered.closed, "the filtered socket is closed", 5)
        assert len(filtered.texts) <= 2


async def test_waiting_for_an_event_that_never_comes_ends(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "REACH_EVENT_SECONDS", 0.1)
    async with following(database, runs=False) as (followed, _):
        with pytest.raises(Unavailable):
            await asyncio.wait_for(followed.reach(1), 5)
        events = await write(database, 1)
        reaching = asyncio.create_task(followed.reach(1))
        followed.offer(events)
        await reaching


async def test_a_replaced_log_is_read_before_a_position_in_it_is_checked(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "POLL_SECONDS_SHARED", 60)
    async with following(database) as (followed, seen):
        followed.offer(await write(database, 5))
        assert len(seen) == 5
        await event_log.renew_epoch(database, followed.head.epoch)
        new = await event_log.head(database)
        assert followed.head.epoch != new.epoch, "the worker must still have the old epoch"
        source = Replay(database, followed)
        assert await find_start(followed, new) is None
        assert followed.head == new
        await event_log.renew_epoch(database, new.epoch)
        newest = await event_log.head(database)
        await followed.reach_head()
        await source.check(newest)
        assert await find_start(followed, Head("elsewhere", newest.seq)) == "another epoch"


async def test_no_task_of_a_feed_outlives_it(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(database: Database, seq: int) -> tuple[Head, event_log.Mark | None]:
        await asyncio.Event().wait()
        raise AssertionError

    def tasks() -> list[str]:
        return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("feed-")]

    async with following(database) as (followed, _):
        monkeypatch.setattr(event_log, "head_and_mark", never)
        waiting = [asyncio.create_task(followed.reach_head())]
        await eventually(lambda: followed._current_head_read is not None, "the head is being read")
        waiting.append(asyncio.create_task(followed.reach_head()))
        await eventually(lambda: tasks().count("feed-reach") == 2, "another read waits for its turn")
    assert tasks() == []
    await asyncio.gather(*waiting)


async def test_progress_that_cannot_be_encoded_costs_no_listener_an_event(database: Database) -> None:
    async with following(database, runs=False) as (followed, seen):
        progress = Progress(database, Hub(followed))
        followed.on_events.insert(0, progress.on_events)
        first, second = await write(database, 2)
        followed.offer([replace(first, operation="add_bulk", payload=b'{"job_id":"\xff"}'), second])
        assert seen == [first.seq, second.seq]


async def test_the_last_progress_is_sent_once_the_database_responds_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    sent: list[dict[str, Any]] = []

    async def find(_: Database, job_id: str) -> dict[str, Any]:
        reads.append(job_id)
        if len(reads) == 1:
            raise Unavailable("The database is unavailable")
        return {"id": job_id, "state": "completed"}

    async with following(database, runs=False) as (followed, _):
        hub = Hub(followed)
        progress = Progress(database, hub)
        monkeypatch.setattr(jobs, "find", find)
        monkeypatch.setattr(hub, "has_subscribers", lambda topic: True)
        monkeypatch.setattr(hub, "send_ephemeral", lambda topic, job, frame: sent.append(job))
        (event,) = await write(database, 1)
        progress.on_events([replace(event, topic="jobs", operation="update", entity_id="the job")])
        running = asyncio.create_task(progress.run())
        await eventually(lambda: sent, "the last state of the job is sent")
        running.cancel()
    assert (reads, sent) == (["the job"] * 2, [{"id": "the job", "state": "completed"}])


async def test_connections_that_died_leave_the_pool(postgres: PostgresServer) -> None:
    url = postgres.create_database()
    database, other = Database(url), Database(url)
    await migrations.migrate(database)
    await asyncio.gather(*(event_log.head(database) for _ in range(10)))
    async with other.read() as connection:
        await connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    await other.close()
    failed = 0
    for _ in range(20):
        try:
            await event_log.head(database)
        except Unavailable:
            failed += 1
    assert failed <= 10, "expected each dead connection to fail at most once"
    assert (await event_log.head(database)).seq == 0
    await database.close()
