"""Presence: who watches what, on all workers, with and without a bus. Reconnects are hidden; dead workers vanish."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import text

import repository.presence as stored
from core.errors import Unavailable
from realtime.feed.bus import Bus
from realtime.presence import presence
from realtime.presence.presence import Presence, View, Watching, changes, state_of, view_of
from repository.engine import migrations
from repository.engine.database import Database
from repository.engine.events import Head
from repository.presence import ANONYMOUS, Row
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.resources import sql
from tests.support.servers.postgresql import PostgresServer
from tests.support.service import SECRET, Person, Service, Watcher, eventually
from tests.support.sockets import signed_in

MOVIES = frozenset({"movies"})
BOTH = frozenset({"movies", "characters"})
HOLLY, ANNA, HARRY = 1, 2, 3
NAMES = {HOLLY: "holly", ANNA: "anna", HARRY: "harry"}


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "LINGER_SECONDS", 0.6)
    monkeypatch.setattr(presence, "RENEW_SECONDS", 0.4)
    monkeypatch.setattr(presence, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(presence, "INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(stored, "LEASE_SECONDS", 1.6)


@dataclass
class Observer:
    """What a client knows about one topic, from the state in the reply and every frame after the reply."""

    count: int = 0
    users: dict[int, str | None] = field(default_factory=dict)
    frames: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, state: Any) -> None:
        self.count = state["count"]
        self.users = {user["user_id"]: user["username"] for user in state["users"]}

    def take(self, text: bytes) -> None:
        frame = json.loads(text)
        assert set(frame) == {"operation", "topic", "data"}
        data = frame["data"]
        for user in data["joined"]:
            assert user["user_id"] not in self.users, "joined twice"
            assert user["connections"] > 0
            self.users[user["user_id"]] = user["username"]
        for user in data["left"]:
            assert self.users.pop(user["user_id"]) == user["username"], "left, but never joined"
            assert user["connections"] == 0
        self.count = data["count"]
        self.frames.append(frame)

    @property
    def sees(self) -> tuple[int, set[int]]:
        return self.count, set(self.users)

    @property
    def joined_and_left(self) -> tuple[list[int], list[int]]:
        changes = [frame["data"] for frame in self.frames]
        joined = [user["user_id"] for change in changes for user in change["joined"]]
        return joined, [user["user_id"] for change in changes for user in change["left"]]


@dataclass
class Worker:
    """The parts of a worker that presence needs."""

    presence: Presence
    database: Database
    life: asyncio.Task[None]
    nudges: list[str]

    def enter(self, user_id: int | None = None, topics: frozenset[str] = MOVIES) -> None:
        self.presence.enter(topics, user_id, NAMES.get(user_id or 0))

    def leave(self, user_id: int | None = None, topics: frozenset[str] = MOVIES) -> None:
        self.presence.leave(topics, user_id)

    async def observer(self, topic: str = "movies", *, sees_users: bool = True, **more: Any) -> Observer:
        observer = Observer()
        found = await self.presence.watch(id(observer), frozenset({topic}), sees_users, observer.take, **more)
        assert set(found) == {topic}
        observer.begin(found[topic])
        return observer

    def dismiss(self, observer: Observer) -> None:
        self.presence.unwatch(id(observer))

    async def stop(self) -> None:
        self.life.cancel()
        await asyncio.gather(self.life, return_exceptions=True)


NewWorker = Callable[..., Worker]


@pytest.fixture
async def new_worker(new_places: Callable[[], Places]) -> AsyncIterator[NewWorker]:
    """Yield a function that makes workers on one database. They nudge each other if there is a bus, and poll if not."""
    places = new_places()
    database = Database(places.database_url)
    await migrations.migrate(database)
    await database.close()
    async with workers_on(places.database_url, is_nudged=places.broadcast_url.startswith("redis")) as make:
        yield make


@asynccontextmanager
async def workers_on(url: str, *, is_nudged: bool) -> AsyncIterator[NewWorker]:
    made: list[Worker] = []

    def make() -> Worker:
        database = Database(url)
        nudges: list[str] = []

        def nudge(topic: str) -> None:
            nudges.append(topic)
            if is_nudged:
                for each in made:
                    each.presence.on_nudge(topic)

        attendance = Presence(database, nudge)
        made.append(Worker(attendance, database, asyncio.create_task(attendance.run()), nudges))
        return made[-1]

    yield make
    for worker in made:
        if worker.life.done():
            assert worker.life.cancelled() or worker.life.exception() is None
        await worker.stop()
        await worker.database.close()


async def query(database: Database, statement: str) -> list[tuple[Any, ...]]:
    async with database.read() as connection:
        return [tuple(row) for row in await connection.execute(text(statement))]


async def tables(database: Database) -> tuple[int, int]:
    """Return how many rows the tables `workers` and `presence` have."""
    [(workers, rows)] = await query(database, "SELECT (SELECT count(*) FROM workers), (SELECT count(*) FROM presence)")
    return workers, rows


async def have(database: Database, workers: int, rows: int) -> None:
    async def are_there() -> bool:
        return await tables(database) == (workers, rows)

    await eventually(are_there, f"{workers} workers with {rows} rows", 5)


async def sees(observer: Observer, count: int, *users: int, seconds: float = 5.0) -> None:
    try:
        await eventually(lambda: observer.sees == (count, set(users)), "", seconds)
    except AssertionError:
        raise AssertionError(f"expected {(count, set(users))}, sees {observer.sees}") from None


# --- what observers see


async def test_users_on_every_worker_are_seen(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    first.enter(None)
    second.enter(HOLLY)
    second.enter(ANNA)
    second.enter(HARRY, frozenset({"characters"}))
    observer = await first.observer()
    await sees(observer, 4, HOLLY, ANNA)
    assert observer.users == {HOLLY: "holly", ANNA: "anna"}
    other = await second.observer("characters")
    await sees(other, 1, HARRY)

    async def is_whole() -> bool:
        found = await second.presence.watch("late", BOTH, True, lambda _: None)
        return found == {
            "movies": {
                "count": 4,
                "users": [
                    {"user_id": HOLLY, "username": "holly", "connections": 2},
                    {"user_id": ANNA, "username": "anna", "connections": 1},
                ],
            },
            "characters": {"count": 1, "users": [{"user_id": HARRY, "username": "harry", "connections": 1}]},
        }

    await eventually(is_whole, "a later observer gets the whole state", 5)


async def test_joins_and_leaves_are_seen_on_every_worker(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    observers = [await first.observer(), await second.observer()]
    for observer in observers:
        await sees(observer, 1, HOLLY)
        observer.frames.clear()
    second.enter(ANNA)
    second.enter(ANNA)
    for observer in observers:
        await sees(observer, 3, HOLLY, ANNA)
    second.leave(ANNA)
    for observer in observers:
        await sees(observer, 2, HOLLY, ANNA)
    second.leave(ANNA)
    for observer in observers:
        await sees(observer, 1, HOLLY)
        assert observer.joined_and_left == ([ANNA], [ANNA])


async def test_an_observer_without_the_right_to_see_users_gets_counts_only(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.enter(HOLLY)
    observer = await worker.observer(sees_users=False)
    assert observer.sees == (1, set())
    worker.enter(ANNA)
    await sees(observer, 2)
    worker.enter(None)
    await sees(observer, 3)
    assert "anna" not in json.dumps(observer.frames)
    frames = len(observer.frames)
    # A socket changes from one user to another. The count stays the same, so there is nothing to send.
    witness = await worker.observer()
    worker.enter(HARRY)
    worker.presence.leave(MOVIES, ANNA, lingers=False)
    await sees(witness, 3, HOLLY, HARRY)
    assert len(observer.frames) == frames


async def test_a_dismissed_observer_gets_no_more_frames(new_worker: NewWorker) -> None:
    worker = new_worker()
    gone, stays = await worker.observer(), await worker.observer()
    worker.dismiss(gone)
    worker.enter(HOLLY)
    await sees(stays, 1, HOLLY)
    assert gone.frames == []


async def test_an_observer_that_leaves_before_its_reply_is_not_kept(new_worker: NewWorker) -> None:
    worker = new_worker()
    observer = Observer()
    async with worker.presence._polling:  # the read must wait for this lock
        watching = asyncio.create_task(worker.presence.watch("it", MOVIES, True, observer.take))
        await asyncio.sleep(0)  # let the read begin to wait
        worker.presence.unwatch("it")
    assert await watching == {}
    witness = await worker.observer()
    worker.enter(HOLLY)
    await sees(witness, 1, HOLLY)
    assert observer.frames == []


async def test_a_full_socket_gets_the_difference_later(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.enter(ANNA)
    full = True
    slow, quick = await worker.observer(is_full=lambda: full), await worker.observer()
    worker.enter(HOLLY)
    await sees(quick, 2, HOLLY, ANNA)
    worker.presence.leave(MOVIES, ANNA, lingers=False)
    worker.enter(HARRY)
    await sees(quick, 2, HOLLY, HARRY)
    assert slow.frames == []
    full = False
    await sees(slow, 2, HOLLY, HARRY)
    assert len(slow.frames) == 1


# --- reconnects


async def test_a_client_that_reconnects_is_not_seen_to_leave(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "LINGER_SECONDS", 2.0)  # ten times as long as a reconnect takes
    first, second, third = new_worker(), new_worker(), new_worker()
    first.enter(HOLLY)
    first.enter(None)
    observers = [await worker.observer() for worker in (first, second, third)]
    for observer in observers:
        await sees(observer, 2, HOLLY)
        observer.frames.clear()
    now, then = first, second
    for _ in range(4):
        for user in (HOLLY, None):
            now.leave(user)
        await asyncio.sleep(0.2)  # a reconnect takes this long
        for user in (HOLLY, None):
            then.enter(user)
        now, then = then, now

    async def is_calm() -> bool:
        """Return whether nothing lingers and all changes have reached the table."""
        versions = "SELECT id, version FROM workers ORDER BY id"
        lingering = await query(first.database, "SELECT 1 FROM presence WHERE lingering > 0")
        before = await query(first.database, versions)
        await asyncio.sleep(2 * presence.INTERVAL_SECONDS)  # give pending changes time to arrive
        return not lingering and before == await query(first.database, versions)

    await eventually(is_calm, "nothing lingers", 15)
    for observer in observers:
        await sees(observer, 2, HOLLY)
        assert observer.frames == []


async def test_a_worker_that_stops_leaves_its_sockets_time_to_come_back(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    first.enter(ANNA)
    observer = await second.observer()
    await sees(observer, 2, HOLLY, ANNA)
    observer.frames.clear()
    await first.stop()
    stopped_at = asyncio.get_running_loop().time()
    await eventually(lambda: second.presence._polled_at > stopped_at, "the second worker has polled", 5)
    second.enter(HOLLY)
    await sees(observer, 1, HOLLY)
    assert observer.joined_and_left == ([], [ANNA])
    await have(second.database, 1, 1)


@pytest.mark.parametrize(
    ("before", "connections", "lingering", "number"),
    [
        (0, 0, 0, 0), (0, 2, 0, 2), (0, 2, 3, 2),
        (0, 0, 3, 0),  # sockets that linger do not make a user appear
        (1, 0, 1, 1), (1, 0, 5, 1),
        (1, 1, 1, 1),  # the user is back
        (2, 1, 1, 2), (2, 3, 1, 3), (3, 1, 1, 2), (3, 0, 0, 0),
        (None, 2, 1, 2), (None, 0, 2, 2), (None, 0, 0, 0),
    ],
)  # fmt: skip
def test_lingering_keeps_a_count_from_falling_and_never_raises_it(
    before: int | None, connections: int, lingering: int, number: int
) -> None:
    seen: View | None = {HOLLY: Watching(before, "holly")} if before else None if before is None else {}
    on_two_workers = [Row("movies", HOLLY, "holly", connections, 0), Row("movies", HOLLY, "holly", 0, lingering)]
    assert view_of(seen, on_two_workers) == ({HOLLY: (number, "holly")} if number else {})


# --- leases


async def test_the_rows_of_a_dead_worker_are_deleted(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.enter(HOLLY)
    observer = await worker.observer()
    rows = [Row("movies", ANNA, "anna", 2, 0), Row("movies", ANONYMOUS, None, 3, 0)]
    assert await stored.store(worker.database, "a dead worker", 1, rows, is_new=True)
    await sees(observer, 6, HOLLY, ANNA)
    await sees(observer, 1, HOLLY)
    await have(worker.database, 1, 1)


async def test_expired_workers_are_deleted_when_the_next_one_begins(new_worker: NewWorker) -> None:
    worker = new_worker()
    assert await stored.store(worker.database, "ghost", 1, [Row("movies", ANNA, "anna", 2, 0)], is_new=True)

    async def has_expired() -> bool:
        return (await stored.workers(worker.database)).expired == ["ghost"]

    await eventually(has_expired, "its lease expires", 5)
    assert await tables(worker.database) == (1, 1)
    worker.enter(HOLLY)
    await have(worker.database, 1, 1)
    assert list((await stored.workers(worker.database)).live) != ["ghost"]


async def test_a_worker_that_was_taken_for_dead_comes_back(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    first.enter(None)
    observer = await second.observer()
    await sees(observer, 2, HOLLY)
    await stored.leave(second.database, first.presence._worker)
    first.enter(ANNA)
    await sees(observer, 3, HOLLY, ANNA)


async def test_a_sweep_keeps_live_workers(database: Database) -> None:
    assert await stored.store(database, "alive", 1, [Row("movies", HOLLY, "holly", 1, 0)], is_new=True)
    await stored.sweep(database, ["alive"])
    assert await tables(database) == (1, 1)


async def test_nothing_is_stored_without_sockets(new_worker: NewWorker) -> None:
    worker = new_worker()
    observer = await worker.observer()
    for _ in range(2):
        assert await tables(worker.database) == (0, 0)
        worker.enter(HOLLY, BOTH)
        worker.enter(None)
        await have(worker.database, 1, 3)
        worker.leave(HOLLY, BOTH)
        worker.leave(None)
        await have(worker.database, 0, 0)
        await sees(observer, 0)


async def test_a_lease_is_renewed_without_any_change(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    observer = await second.observer()
    await sees(observer, 1, HOLLY)
    nudges = len(first.nudges)
    observer.frames.clear()
    await asyncio.sleep(2 * stored.LEASE_SECONDS)  # wait longer than the lease lasts
    assert (observer.sees, observer.frames, len(first.nudges)) == ((1, {HOLLY}), [], nudges)


async def test_a_crowd_that_enters_costs_few_writes(new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "INTERVAL_SECONDS", 0.25)
    first, second = new_worker(), new_worker()
    observer = await second.observer(sees_users=False)
    for user_id in range(1, 301):
        first.enter(user_id, BOTH)
        first.enter(None)
        if user_id % 10 == 0:
            await asyncio.sleep(0.01)  # spread the arrivals over more than one interval
    await sees(observer, 600)
    assert len(first.nudges) <= 8
    assert len(observer.frames) <= 8


async def test_more_rows_than_one_write_takes(new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_ROWS_PER_WRITE", 20)
    first, second = new_worker(), new_worker()
    for user_id in range(1, 91):
        first.enter(user_id)
    observer = await second.observer()
    await sees(observer, 90, *range(1, 91))
    assert len(first.nudges) >= 5


# --- bounds


async def test_a_long_list_is_cut_but_its_count_is_exact(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "MAX_USERS_LISTED", 10)
    worker = new_worker()
    for user_id in range(1, 26):
        worker.enter(user_id)
    assert (await worker.observer()).sees == (25, set(range(1, 11)))


def test_a_large_change_is_split_into_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_USERS_PER_FRAME", 10)
    before: View = dict.fromkeys(range(1, 26), Watching(1, None))
    after: View = dict.fromkeys(range(20, 61), Watching(2, None))
    observer = Observer()
    observer.begin(state_of(before, sees_users=True))
    frames = changes("movies", before, after, sees_users=True)
    assert len(frames) == 4  # 35 joined, 19 left
    for frame in frames:
        observer.take(frame)
    assert observer.sees == (82, set(after))


def test_state_and_changes_add_up() -> None:
    chance = random.Random(7)

    def some() -> View:
        users = chance.sample(range(ANONYMOUS, 8), chance.randint(0, 8))
        return {user_id: Watching(chance.randint(1, 3), f"user {user_id}") for user_id in users}

    for _ in range(300):
        before, after = some(), some()
        for sees_users in (True, False):
            observer = Observer()
            observer.begin(state_of(before, sees_users=sees_users))
            for frame in changes("movies", before, after, sees_users=sees_users):
                observer.take(frame)
            expected = set(after) - {ANONYMOUS} if sees_users else set()
            assert observer.sees == (sum(number for number, _ in after.values()), expected)
    one, two = Watching(1, None), Watching(2, None)
    assert changes("movies", {HOLLY: one, ANNA: two}, {HOLLY: two, ANNA: one}, sees_users=True) == []


# --- everything together


async def test_every_observer_is_right_after_random_changes(new_worker: NewWorker) -> None:
    chance = random.Random(11)
    workers = [new_worker() for _ in range(3)]
    observers = [await worker.observer(topic) for worker in workers for topic in sorted(BOTH)]
    topics_of = [topic for _ in workers for topic in sorted(BOTH)]
    sockets: list[tuple[Worker, int | None, frozenset[str]]] = []
    for _ in range(3):
        for _ in range(60):
            if sockets and chance.random() < 0.45:
                worker, user_id, topics = sockets.pop(chance.randrange(len(sockets)))
                worker.leave(user_id, topics)
            else:
                one = chance.choice(workers), chance.choice([None, HOLLY, ANNA, HARRY]), chance.choice([MOVIES, BOTH])
                one[0].enter(one[1], one[2])
                sockets.append(one)
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.1)  # spread the changes over the interval
        for observer, topic in zip(observers, topics_of, strict=True):
            there = Counter(user_id for _, user_id, topics in sockets if topic in topics)
            await sees(observer, there.total(), *(user_id for user_id in there if user_id is not None))


async def test_presence_is_right_again_after_the_database_was_down(own_postgres: PostgresServer) -> None:
    async with workers_on(own_postgres.create_database(), is_nudged=False) as new_worker:
        first, second = new_worker(), new_worker()
        await migrations.migrate(first.database)
        first.enter(HOLLY)
        observer = await second.observer()
        await sees(observer, 1, HOLLY)
        with own_postgres.down():
            first.enter(ANNA)
            second.enter(HARRY)
            await sees(observer, 2, HOLLY, HARRY)
            third = new_worker()
            with pytest.raises(Unavailable):
                await third.observer()
        await sees(observer, 3, HOLLY, ANNA, HARRY, seconds=20)


# --- the bus


async def test_a_nudge_reaches_every_process_and_its_own(new_places: Callable[[], Places]) -> None:
    url = new_places().broadcast_url
    first, second = Bus(url, [SECRET]), Bus(url, [SECRET])
    here: list[str] = []
    there: list[str] = []
    first.on_nudge.append(here.append)
    second.on_nudge.append(there.append)
    running = [asyncio.create_task(bus.run(lambda: Head("epoch", 0))) for bus in (first, second)]

    async def has_arrived() -> bool:
        first.nudge("presence")
        await asyncio.sleep(0.02)  # wait before the next nudge
        return "presence" in here and ("presence" in there or not first.is_shared)

    await eventually(has_arrived, "the nudge arrives", 5)
    assert set(here) == {"presence"}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


# --- on real sockets


@asynccontextmanager
async def observing(service: Service, person: Person | None = None) -> AsyncIterator[tuple[Watcher, Observer]]:
    """Open a socket that requests the presence of `movies` and watches only `jobs`, so that it is not counted."""
    async with service.watch("topics=jobs", **(signed_in(person) if person is not None else {})) as watcher:
        reply = await watcher.ask({"id": "who", "action": "presence", "topics": ["movies"]})
        assert reply["ok"], reply
        observer = Observer()
        observer.begin(reply["data"]["movies"])
        yield watcher, observer


async def until_it_sees(watcher: Watcher, observer: Observer, count: int, *users: int, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while observer.sees != (count, set(users)):
            frame = await watcher.until(lambda each: each.get("operation") == "presence")
            observer.take(json.dumps(frame).encode())


@SQLITE_ONLY
async def test_sockets_are_counted_while_they_watch(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as holly, service.person() as anna:
        async with observing(service, holly) as (watcher, observer), observing(service) as (anonymous, outside):
            assert observer.sees == outside.sees == (0, set())
            async with service.watch("topics=movies", **signed_in(anna)) as first:
                await until_it_sees(watcher, observer, 1, anna.id)
                async with service.watch() as second:
                    await until_it_sees(watcher, observer, 2, anna.id)
                    await until_it_sees(anonymous, outside, 2)
                    # An anonymous socket signs in.
                    assert (await second.ask({"id": 1, "action": "auth", "token": holly.token}))["ok"]
                    await until_it_sees(watcher, observer, 2, anna.id, holly.id)
                    subscribe = {"id": 2, "action": "subscribe", "topics": ["characters"]}
                    assert (await first.ask(subscribe))["ok"], "the socket no longer watches movies"
            await until_it_sees(watcher, observer, 0)
            await until_it_sees(anonymous, outside, 0)
            assert all(not frame["data"]["joined"] and not frame["data"]["left"] for frame in outside.frames)
            assert (await watcher.ask({"id": 3, "action": "presence", "topics": []}))["data"] == {}


# Each way of stopping is tested on one database only; the tests without a service run on both.
@pytest.mark.parametrize(
    ("backend", "how"), [("sqlite", "kill"), ("postgres", "stop")], indirect=["backend"], scope="session"
)
async def test_the_sockets_of_a_worker_leave_with_it_unless_they_reconnect(
    new_service: Callable[..., Service], new_places: Callable[[], Places], how: str
) -> None:
    places = new_places()
    first, second = new_service(places).start(), new_service(places).start()
    async with second.person() as holly, second.person() as anna, observing(second, holly) as (watcher, observer):
        async with first.watch(**signed_in(holly)) as hollys, first.watch(**signed_in(anna)) as annas:
            await until_it_sees(watcher, observer, 2, holly.id, anna.id)
            observer.frames.clear()
            os.kill(first.pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)
            for each in (hollys, annas):
                await each.socket.wait_closed()
        ended_at = asyncio.get_running_loop().time()
        async with second.watch(**signed_in(holly)):  # Holly reconnects immediately
            await until_it_sees(watcher, observer, 1, holly.id)
            assert asyncio.get_running_loop().time() - ended_at < 15
            assert observer.joined_and_left == ([], [anna.id])

            async def is_alone() -> bool:
                stored_by = "SELECT (SELECT count(*) FROM workers), (SELECT count(DISTINCT worker) FROM presence)"
                return await sql(second, stored_by) == [(1, 1)]

            await eventually(is_alone, "the rows of the other worker are deleted", 5)
