"""Presence: who watches what, over all workers, with and without a bus; nobody flaps, and ghosts go."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
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
from tests.support.resources import sql
from tests.support.servers import PostgresServer
from tests.support.service import Person, Service, Watcher, eventually

MOVIES = frozenset({"movies"})
BOTH = frozenset({"movies", "characters"})
HOLLY, ANNA, HARRY = 1, 2, 3
NAMES = {HOLLY: "holly", ANNA: "anna", HARRY: "harry"}


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in a fraction of the time."""
    monkeypatch.setattr(presence, "LINGER_SECONDS", 0.6)
    monkeypatch.setattr(presence, "RENEW_SECONDS", 0.4)
    monkeypatch.setattr(presence, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(presence, "INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(stored, "LEASE_SECONDS", 1.6)


@dataclass
class Guest:
    """Keeps what a client knows of one topic: the reply's state and every frame after it."""

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
            assert self.users.pop(user["user_id"]) == user["username"], "left without having been there"
            assert user["connections"] == 0
        self.count = data["count"]
        self.frames.append(frame)

    @property
    def sees(self) -> tuple[int, set[int]]:
        return self.count, set(self.users)


@dataclass
class Worker:
    """A process of the service, as far as presence goes."""

    presence: Presence
    database: Database
    life: asyncio.Task[None]
    nudges: list[str]

    def enter(self, user_id: int | None = None, topics: frozenset[str] = MOVIES) -> None:
        self.presence.enter(topics, user_id, NAMES.get(user_id or 0))

    def leave(self, user_id: int | None = None, topics: frozenset[str] = MOVIES) -> None:
        self.presence.leave(topics, user_id)

    async def guest(self, topic: str = "movies", *, sees_users: bool = True, **more: Any) -> Guest:
        guest = Guest()
        found = await self.presence.watch(guest_key(guest), frozenset({topic}), sees_users, guest.take, **more)
        assert set(found) == {topic}
        guest.begin(found[topic])
        return guest

    def dismiss(self, guest: Guest) -> None:
        self.presence.unwatch(guest_key(guest))

    async def stop(self) -> None:
        self.life.cancel()
        await asyncio.gather(self.life, return_exceptions=True)


def guest_key(guest: Guest) -> object:
    return id(guest)


NewWorker = Callable[..., Worker]


@pytest.fixture
async def new_worker(new_places: Callable[[], Places]) -> AsyncIterator[NewWorker]:
    """Makes workers on one database, which nudge one another where a bus goes with it, else look by the clock."""
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


async def tables(database: Database) -> tuple[int, int]:
    async with database.read() as connection:
        query = text("SELECT (SELECT count(*) FROM workers), (SELECT count(*) FROM presence)")
        row = (await connection.execute(query)).one()
        return row[0], row[1]


async def is_over(database: Database) -> bool:
    """Nothing lingers in the database any more."""
    async with database.read() as connection:
        return (await connection.execute(text("SELECT count(*) FROM presence WHERE lingering > 0"))).scalar() == 0


async def sees(guest: Guest, count: int, *users: int, seconds: float = 5.0) -> None:
    try:
        await eventually(lambda: guest.sees == (count, set(users)), "", seconds)
    except AssertionError:
        raise AssertionError(f"expected {(count, set(users))}, sees {guest.sees}") from None


# --- what is seen


async def test_those_on_every_worker_are_seen(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    first.enter(None)
    second.enter(HOLLY)
    second.enter(ANNA)
    second.enter(HARRY, frozenset({"characters"}))
    guest = await first.guest()
    await sees(guest, 4, HOLLY, ANNA)
    assert guest.users == {HOLLY: "holly", ANNA: "anna"}
    other = await second.guest("characters")
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

    await eventually(is_whole, "a late guest is told all of it", 5)


async def test_a_guest_sees_its_own_worker_at_once(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.enter(HOLLY)
    assert (await worker.guest()).sees == (1, {HOLLY})


async def test_joins_and_leaves_are_told_on_every_worker(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    guests = [await first.guest(), await second.guest()]
    for guest in guests:
        await sees(guest, 1, HOLLY)
        guest.frames.clear()
    second.enter(ANNA)
    second.enter(ANNA)
    for guest in guests:
        await sees(guest, 3, HOLLY, ANNA)
    second.leave(ANNA)
    for guest in guests:
        await sees(guest, 2, HOLLY, ANNA)
    second.leave(ANNA)
    for guest in guests:
        await sees(guest, 1, HOLLY)
        joined = [user["user_id"] for frame in guest.frames for user in frame["data"]["joined"]]
        left = [user["user_id"] for frame in guest.frames for user in frame["data"]["left"]]
        assert (joined, left) == ([ANNA], [ANNA])


async def test_only_counts_are_told_to_those_who_may_not_see_users(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.enter(HOLLY)
    guest = await worker.guest(sees_users=False)
    assert guest.sees == (1, set())
    worker.enter(ANNA)
    await sees(guest, 2)
    worker.enter(None)
    await sees(guest, 3)
    assert "anna" not in json.dumps(guest.frames)
    told = len(guest.frames)
    # One goes on as another: the count stays, so there is nothing to tell.
    witness = await worker.guest()
    worker.enter(HARRY)
    worker.presence.leave(MOVIES, ANNA, lingers=False)
    await sees(witness, 3, HOLLY, HARRY)
    assert len(guest.frames) == told


async def test_who_is_dismissed_is_told_no_more(new_worker: NewWorker) -> None:
    worker = new_worker()
    gone, stays = await worker.guest(), await worker.guest()
    worker.dismiss(gone)
    worker.enter(HOLLY)
    await sees(stays, 1, HOLLY)
    assert gone.frames == []


async def test_whoever_goes_while_asking_is_not_kept(new_worker: NewWorker) -> None:
    worker = new_worker()
    guest = Guest()
    async with worker.presence._polling:  # the read takes its time
        asking = asyncio.create_task(worker.presence.watch("it", MOVIES, True, guest.take))
        await asyncio.sleep(0)
        worker.presence.unwatch("it")
    assert await asking == {}
    witness = await worker.guest()
    worker.enter(HOLLY)
    await sees(witness, 1, HOLLY)
    assert guest.frames == []


async def test_a_full_socket_is_told_the_difference_later(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.enter(ANNA)
    full = True
    slow, quick = await worker.guest(is_full=lambda: full), await worker.guest()
    worker.enter(HOLLY)
    await sees(quick, 2, HOLLY, ANNA)
    worker.presence.leave(MOVIES, ANNA, lingers=False)
    worker.enter(HARRY)
    await sees(quick, 2, HOLLY, HARRY)
    assert slow.frames == []
    full = False
    await sees(slow, 2, HOLLY, HARRY)
    assert len(slow.frames) == 1


# --- nobody flaps


async def test_who_reconnects_is_not_seen_to_leave(new_worker: NewWorker) -> None:
    first, second, third = new_worker(), new_worker(), new_worker()
    first.enter(HOLLY)
    first.enter(None)
    guests = [await worker.guest() for worker in (first, second, third)]
    for guest in guests:
        await sees(guest, 2, HOLLY)
        guest.frames.clear()
    now, then = first, second
    for _ in range(4):
        for who in (HOLLY, None):
            now.leave(who)
        await asyncio.sleep(0.2)  # how long the reconnect takes
        for who in (HOLLY, None):
            then.enter(who)
        now, then = then, now

    async def calm() -> bool:
        return await is_over(first.database) and not await is_over_soon(first.database)

    await eventually(calm, "nothing lingers any more", 5)
    for guest in guests:
        await sees(guest, 2, HOLLY)
        assert guest.frames == []


async def is_over_soon(database: Database) -> bool:
    """Whether something may still be on its way into the table."""
    before = await versions(database)
    await asyncio.sleep(2 * presence.INTERVAL_SECONDS)
    return before != await versions(database)


async def versions(database: Database) -> list[tuple[Any, ...]]:
    async with database.read() as connection:
        return [tuple(row) for row in await connection.execute(text("SELECT id, version FROM workers ORDER BY id"))]


async def test_a_worker_that_stops_leaves_its_sockets_time_to_come_back(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    first.enter(ANNA)
    guest = await second.guest()
    await sees(guest, 2, HOLLY, ANNA)
    guest.frames.clear()
    await first.stop()
    stopped_at = asyncio.get_running_loop().time()
    await eventually(lambda: second.presence._polled_at > stopped_at, "the other one has looked", 5)
    second.enter(HOLLY)
    await sees(guest, 1, HOLLY)
    left = [user["user_id"] for frame in guest.frames for user in frame["data"]["left"]]
    joined = [user["user_id"] for frame in guest.frames for user in frame["data"]["joined"]]
    assert (joined, left) == ([], [ANNA])
    await eventually(lambda: has_tables(second.database, (1, 1)), "what the stopped one stored is deleted", 5)


async def has_tables(database: Database, expected: tuple[int, int]) -> bool:
    return await tables(database) == expected


@pytest.mark.parametrize(
    ("before", "connections", "lingering", "number"),
    [
        (0, 0, 0, 0),
        (0, 2, 0, 2),
        (0, 2, 3, 2),
        (0, 0, 3, 0),  # who was not seen does not begin to linger
        (1, 0, 1, 1),
        (1, 1, 1, 1),  # back again
        (1, 0, 5, 1),
        (2, 1, 1, 2),
        (2, 3, 1, 3),
        (3, 1, 1, 2),
        (3, 0, 0, 0),
        (None, 2, 1, 2),
        (None, 0, 2, 2),
        (None, 0, 0, 0),
    ],
)
def test_what_lingers_keeps_a_number_from_falling_and_adds_nothing(
    before: int | None, connections: int, lingering: int, number: int
) -> None:
    seen: View | None = {HOLLY: Watching(before, "holly")} if before else None if before is None else {}
    # Split over two workers.
    rows = [
        Row("movies", HOLLY, "holly", connections, 0),
        Row("movies", HOLLY, "holly", 0, lingering),
    ]
    assert view_of(seen, rows) == ({HOLLY: (number, "holly")} if number else {})


# --- leases


async def test_what_a_dead_worker_left_goes(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.enter(HOLLY)
    guest = await worker.guest()
    rows = [Row("movies", ANNA, "anna", 2, 0), Row("movies", ANONYMOUS, None, 3, 0)]
    assert await stored.store(worker.database, "a dead worker", 1, rows, is_new=True)
    await sees(guest, 6, HOLLY, ANNA)
    await sees(guest, 1, HOLLY)
    await eventually(lambda: has_tables(worker.database, (1, 1)), "what it left is deleted", 5)


async def test_ghosts_go_when_the_next_worker_begins(new_worker: NewWorker) -> None:
    worker = new_worker()
    assert await stored.store(worker.database, "ghost", 1, [Row("movies", ANNA, "anna", 2, 0)], is_new=True)
    await eventually(lambda: is_a_ghost(worker.database), "its lease runs out", 5)
    assert await tables(worker.database) == (1, 1)
    worker.enter(HOLLY)
    await eventually(lambda: has_tables(worker.database, (1, 1)), "only the living", 5)
    assert list((await stored.workers(worker.database)).live) != ["ghost"]


async def is_a_ghost(database: Database) -> bool:
    return (await stored.workers(database)).expired == ["ghost"]


async def test_a_worker_that_was_taken_for_dead_comes_back(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    first.enter(None)
    guest = await second.guest()
    await sees(guest, 2, HOLLY)
    await stored.leave(second.database, first.presence._worker)
    first.enter(ANNA)
    await sees(guest, 3, HOLLY, ANNA)


async def test_nothing_is_swept_that_lives(database: Database) -> None:
    assert await stored.store(database, "alive", 1, [Row("movies", HOLLY, "holly", 1, 0)], is_new=True)
    await stored.sweep(database, ["alive"])
    assert await tables(database) == (1, 1)


async def test_nobody_there_is_nothing_stored(new_worker: NewWorker) -> None:
    worker = new_worker()
    guest = await worker.guest()
    for _ in range(2):
        assert await tables(worker.database) == (0, 0)
        worker.enter(HOLLY, BOTH)
        worker.enter(None)
        await eventually(lambda: has_tables(worker.database, (1, 3)), "a lease and three rows", 5)
        worker.leave(HOLLY, BOTH)
        worker.leave(None)
        await eventually(lambda: has_tables(worker.database, (0, 0)), "nothing", 5)
        await sees(guest, 0)


async def test_a_lease_is_held_without_any_change(new_worker: NewWorker) -> None:
    first, second = new_worker(), new_worker()
    first.enter(HOLLY)
    guest = await second.guest()
    await sees(guest, 1, HOLLY)
    nudges = len(first.nudges)
    guest.frames.clear()
    await asyncio.sleep(2 * stored.LEASE_SECONDS)  # longer than the lease
    assert (guest.sees, guest.frames, len(first.nudges)) == ((1, {HOLLY}), [], nudges)


async def test_a_crowd_is_a_few_writes(new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "INTERVAL_SECONDS", 0.25)
    first, second = new_worker(), new_worker()
    guest = await second.guest(sees_users=False)
    for user_id in range(1, 301):
        first.enter(user_id, BOTH)
        first.enter(None)
        if user_id % 10 == 0:
            await asyncio.sleep(0.01)
    await sees(guest, 600)
    assert len(first.nudges) <= 8
    assert len(guest.frames) <= 8


async def test_more_rows_than_one_write_takes(new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_ROWS_PER_WRITE", 20)
    first, second = new_worker(), new_worker()
    for user_id in range(1, 91):
        first.enter(user_id)
    guest = await second.guest()
    await sees(guest, 90, *range(1, 91))
    assert len(first.nudges) >= 5


# --- bounds


async def test_a_long_list_is_cut_and_its_count_is_true(new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_USERS_LISTED", 10)
    worker = new_worker()
    for user_id in range(1, 26):
        worker.enter(user_id)
    assert (await worker.guest()).sees == (25, set(range(1, 11)))


def test_a_great_change_is_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_USERS_PER_FRAME", 10)
    before: View = dict.fromkeys(range(1, 26), Watching(1, None))
    after: View = dict.fromkeys(range(20, 61), Watching(2, None))
    guest = Guest()
    guest.begin(state_of(before, sees_users=True))
    frames = changes("movies", before, after, sees_users=True)
    assert len(frames) == 4  # 35 came, 19 went
    for frame in frames:
        guest.take(frame)
    assert guest.sees == (82, set(after))


def test_state_and_changes_add_up() -> None:
    chance = random.Random(7)

    def some() -> View:
        users = chance.sample(range(ANONYMOUS, 8), chance.randint(0, 8))
        return {user_id: Watching(chance.randint(1, 3), f"user {user_id}") for user_id in users}

    for _ in range(300):
        before, after = some(), some()
        for sees_users in (True, False):
            guest = Guest()
            guest.begin(state_of(before, sees_users=sees_users))
            for frame in changes("movies", before, after, sees_users=sees_users):
                guest.take(frame)
            expected = set(after) - {ANONYMOUS} if sees_users else set()
            assert guest.sees == (sum(number for number, _ in after.values()), expected)
    one, two = Watching(1, None), Watching(2, None)
    assert changes("movies", {HOLLY: one, ANNA: two}, {HOLLY: two, ANNA: one}, sees_users=True) == []


# --- all of it at once


async def test_every_guest_is_right_when_it_is_quiet(new_worker: NewWorker) -> None:
    chance = random.Random(11)
    workers = [new_worker() for _ in range(3)]
    guests = [await worker.guest(topic) for worker in workers for topic in sorted(BOTH)]
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
                await asyncio.sleep(chance.random() * 0.1)
        for guest, topic in zip(guests, topics_of, strict=True):
            there = Counter(user_id for _, user_id, topics in sockets if topic in topics)
            await sees(guest, there.total(), *(user_id for user_id in there if user_id is not None))


async def test_it_is_right_again_after_the_database_was_away(own_postgres: PostgresServer) -> None:
    async with workers_on(own_postgres.create_database(), is_nudged=False) as new_worker:
        first, second = new_worker(), new_worker()
        await migrations.migrate(first.database)
        first.enter(HOLLY)
        guest = await second.guest()
        await sees(guest, 1, HOLLY)
        with own_postgres.down():
            first.enter(ANNA)
            second.enter(HARRY)
            await sees(guest, 2, HOLLY, HARRY)
            third = new_worker()
            with pytest.raises(Unavailable):
                await third.guest()
        await sees(guest, 3, HOLLY, ANNA, HARRY, seconds=20)


# --- the bus


@asynccontextmanager
async def buses(url: str, number: int) -> AsyncIterator[list[tuple[Bus, list[str]]]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(number):
            heard: list[str] = []
            bus = Bus(url)
            bus.on_nudge.append(heard.append)
            task = asyncio.create_task(bus.run(lambda: Head("epoch", 0)))
            stack.push_async_callback(_end, task)
            made.append((bus, heard))
        yield made


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_nudge_reaches_every_process_and_this_one(new_places: Callable[[], Places]) -> None:
    url = new_places().broadcast_url
    async with buses(url, 2) as ((first, here), (_, there)):

        async def has_arrived() -> bool:
            first.nudge("presence")
            await asyncio.sleep(0.02)
            return "presence" in here and ("presence" in there or not first.is_shared)

        await eventually(has_arrived, "the nudge arrives", 5)
        assert set(here) == {"presence"}


# --- on real sockets


@asynccontextmanager
async def asking(service: Service, person: Person | None = None) -> AsyncIterator[tuple[Watcher, Guest]]:
    """A socket that watches nothing counted here, and asks who watches movies."""
    headers = {"Authorization": f"Bearer {person.token}"} if person is not None else {}
    async with service.watch("topics=jobs", additional_headers=headers) as watcher:
        reply = await watcher.ask({"id": "who", "action": "presence", "topics": ["movies"]})
        assert reply["ok"], reply
        guest = Guest()
        guest.begin(reply["data"]["movies"])
        yield watcher, guest


async def until_it_sees(watcher: Watcher, guest: Guest, count: int, *users: int, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while guest.sees != (count, set(users)):
            frame = await watcher.until(lambda each: each.get("operation") == "presence")
            guest.take(json.dumps(frame).encode())


def sign_of(person: Person) -> dict[str, str]:
    return {"Authorization": f"Bearer {person.token}"}


async def test_sockets_are_counted_while_they_watch(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as holly, service.person() as anna:
        async with asking(service, holly) as (watcher, guest), asking(service) as (nobody, outside):
            assert guest.sees == outside.sees == (0, set())
            async with service.watch("topics=movies", additional_headers=sign_of(anna)) as first:
                await until_it_sees(watcher, guest, 1, anna.id)
                async with service.watch() as second:
                    await until_it_sees(watcher, guest, 2, anna.id)
                    await until_it_sees(nobody, outside, 2)
                    # Signing in: the same socket goes on as somebody.
                    assert (await second.ask({"id": 1, "action": "auth", "token": holly.token}))["ok"]
                    await until_it_sees(watcher, guest, 2, anna.id, holly.id)
                    subscribe = {"id": 2, "action": "subscribe", "topics": ["characters"]}
                    assert (await first.ask(subscribe))["ok"], "it watches no movies any more"
            # It and the other that is gone.
            await until_it_sees(watcher, guest, 0)
            await until_it_sees(nobody, outside, 0)
            assert all(not frame["data"]["joined"] and not frame["data"]["left"] for frame in outside.frames)
            assert (await watcher.ask({"id": 3, "action": "presence", "topics": []}))["data"] == {}


async def test_topics_that_one_may_not_watch_are_not_told_of(service: Service) -> None:
    async with service.person() as alice, service.watch(additional_headers=sign_of(alice)) as watcher:
        for topics in (["users"], ["movies", "users"], ["sessions"]):
            reply = await watcher.ask({"id": 1, "action": "presence", "topics": topics})
            assert (reply["ok"], reply["error"]["code"]) == (False, "forbidden")


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_the_sockets_of_a_worker_go_with_it_and_those_that_come_back_never_left(
    new_service: Callable[..., Service], new_places: Callable[[], Places], how: str
) -> None:
    places = new_places()
    first, second = new_service(places).start(), new_service(places).start()
    async with second.person() as holly, second.person() as anna, asking(second, holly) as (watcher, guest):
        async with (
            first.watch(additional_headers=sign_of(holly)) as hollys,
            first.watch(additional_headers=sign_of(anna)) as annas,
        ):
            await until_it_sees(watcher, guest, 2, holly.id, anna.id)
            guest.frames.clear()
            assert first.process is not None
            first.process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
            for each in (hollys, annas):
                await each.socket.wait_closed()
        ended_at = asyncio.get_running_loop().time()
        # As every client does: at once.
        async with second.watch(additional_headers=sign_of(holly)):
            await until_it_sees(watcher, guest, 1, holly.id)
            assert asyncio.get_running_loop().time() - ended_at < 15
            left = [user["user_id"] for frame in guest.frames for user in frame["data"]["left"]]
            joined = [user["user_id"] for frame in guest.frames for user in frame["data"]["joined"]]
            assert (joined, left) == ([], [anna.id])
            await eventually(lambda: stored_by(second, 1), "what the other one stored is deleted", 5)


async def stored_by(service: Service, workers: int) -> bool:
    found = await sql(service, "SELECT (SELECT count(*) FROM workers), (SELECT count(DISTINCT worker) FROM presence)")
    return found == [(workers, workers)]
