"""Several processes on one database: every watcher on each sees every write, in one order, whatever the bus does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import PostgresServer, RedisServer
from tests.support.service import Person, Service, Watcher, eventually

WATCHERS_EACH = 50
FEW_EACH = 10  # where the trouble is between the processes, and does not know who watches
WRITES = 2_000
FEW_WRITES = 500
WRITERS_EACH = 8


@pytest.fixture
def two_servers(postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path) -> Iterator[tuple[Service, Service]]:
    """Two server processes on one PostgreSQL and one Redis."""
    url = postgres.create_database()
    settings = {"LOG_LEVEL": "warning"}
    services = [Service(url, own_redis.url, tmp_path, **settings) for _ in range(2)]
    with services[0].running() as first, services[1].running() as second:
        yield first, second


@asynccontextmanager
async def crowd(services: tuple[Service, ...], each: int) -> AsyncIterator[list[Watcher]]:
    async with AsyncExitStack() as stack:
        sockets = [service.watch("topics=movies", ping_interval=None) for service in services for _ in range(each)]
        yield [await stack.enter_async_context(socket) for socket in sockets]


async def write_to(service: Service, token: str, number: int, writers: int) -> None:
    """`number` writes by `writers` at once: adds, edits and deletes."""
    left = iter(range(number))
    async with httpx.AsyncClient(
        base_url=service.url, timeout=60, headers={"Authorization": f"Bearer {token}"}
    ) as client:

        async def writer() -> None:
            own: list[int] = []
            for index in left:
                if index % 4 == 2 and own:
                    change = {"rating": index % 100 + 1, "title": f"edit {index}"}
                    answer = await client.patch(f"/movies/{own[-1]}", json=change)
                elif index % 4 == 3 and own:
                    answer = await client.delete(f"/movies/{own.pop()}")
                else:
                    answer = await client.post("/movies", json={"title": f"movie {index}"})
                    own.append(answer.json()["id"])
                assert answer.status_code < 300, answer.text

        await asyncio.gather(*(writer() for _ in range(writers)))


async def all_have_arrived(person: Person, watchers: list[Watcher]) -> int:
    """Every watcher has seen one same event and forgets what was before. Answers its number.

    A worker may be a little behind when it welcomes somebody, so welcomes are no common place to count from.
    """
    marker = await person.add(title="everybody is here")
    seen = await asyncio.gather(*(watcher.until(lambda frame: frame.get("data") == marker) for watcher in watchers))
    for watcher in watchers:
        watcher.events.clear()
    return int(seen[0]["seq"])


async def all_see_the_same(watchers: list[Watcher], first: int, number: int, seconds: float = 60.0) -> None:
    expected = list(range(first, first + number))
    await asyncio.gather(*(watcher.until_seq(expected[-1], seconds) for watcher in watchers))
    reference = watchers[0].events
    for watcher in watchers:
        assert watcher.seqs == expected
        assert watcher.events == reference


async def scene(
    services: tuple[Service, ...],
    person: Person,
    watchers: list[Watcher],
    trouble: Callable[[], Any] | None = None,
    writes: int = WRITES,
) -> None:
    """Writes to all services at once, with trouble in the middle; then every watcher is asked what it saw."""
    first = await all_have_arrived(person, watchers) + 1
    half = writes // 2 // len(services)

    async def everywhere() -> None:
        await asyncio.gather(*(write_to(service, person.token, half, WRITERS_EACH) for service in services))

    await everywhere()
    if trouble is None:
        await everywhere()
    else:
        await asyncio.gather(everywhere(), trouble())
    await all_see_the_same(watchers, first, writes)


async def test_two_servers_show_all_watchers_the_same_order(two_servers: tuple[Service, Service]) -> None:
    async with two_servers[0].person() as alice, crowd(two_servers, WATCHERS_EACH) as watchers:
        await scene(two_servers, alice, watchers)


async def test_redis_killed_and_restarted_loses_nothing(
    two_servers: tuple[Service, Service], own_redis: RedisServer
) -> None:
    async def trouble() -> None:
        with own_redis.down():
            await asyncio.sleep(1.0)  # how long the outage is
        async with httpx.AsyncClient() as client:
            for service in two_servers:
                await eventually(partial(_is_ready, client, service.url), "the bus is heard again")

    async with two_servers[0].person() as alice, crowd(two_servers, FEW_EACH) as watchers:
        await scene(two_servers, alice, watchers, trouble)
        movie = await alice.add(title="after the outage")
        for watcher in watchers:
            assert (await watcher.expect("add"))["data"] == movie


async def _is_ready(client: httpx.AsyncClient, url: str) -> bool:
    return bool((await client.get(f"{url}/readyz")).json()["status"] == "ready")


async def test_redis_frozen_for_five_seconds_loses_nothing_and_holds_up_nobody(
    two_servers: tuple[Service, Service], own_redis: RedisServer
) -> None:
    async with two_servers[0].person() as alice, crowd(two_servers, FEW_EACH) as watchers:

        async def trouble() -> None:
            with own_redis.frozen():
                async with httpx.AsyncClient() as client, two_servers[1].watch() as latecomer:

                    async def says_so() -> bool:
                        answer = await client.get(f"{two_servers[0].url}/readyz")
                        return answer.status_code == 200 and answer.json()["checks"]["bus"] != "ok"

                    await eventually(says_so, "readiness says that the bus is silent", 4)
                    movie = await alice.add("characters", name="sent while Redis is frozen")
                    await latecomer.until(lambda frame: frame.get("data") == movie, 2.0)
                    await asyncio.sleep(2.5)  # with what went before, five seconds

        first = await all_have_arrived(alice, watchers) + 1
        half = WRITES // 4
        await asyncio.gather(*(write_to(service, alice.token, half, WRITERS_EACH) for service in two_servers))
        await asyncio.gather(
            *(write_to(service, alice.token, half, WRITERS_EACH) for service in two_servers), trouble()
        )
        last = await alice.add(title="the last")
        await asyncio.gather(*(watcher.until(lambda frame: frame.get("data") == last) for watcher in watchers))
        reference = watchers[0].events
        assert len(reference) == WRITES + 1
        assert watchers[0].seqs[0] == first
        assert watchers[0].seqs == sorted(set(watchers[0].seqs))
        assert all(watcher.events == reference for watcher in watchers)


async def test_the_service_starts_and_works_while_redis_is_away(
    postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path
) -> None:
    own_redis.kill()
    service = Service(postgres.create_database(), own_redis.url, tmp_path)
    with service.running():
        async with service.person() as alice, service.watch() as watcher:
            movie = await alice.add()
            assert (await watcher.expect("add", seconds=3))["data"] == movie
            own_redis.start()
            async with httpx.AsyncClient() as client:
                await eventually(lambda: _is_ready(client, service.url), "the bus is heard")
            movie = await alice.add()
            assert (await watcher.expect("add"))["data"] == movie


@pytest.mark.slow
async def test_two_servers_on_sqlite_need_no_redis(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    services = [Service(url, "memory://", tmp_path, LOG_LEVEL="warning") for _ in range(2)]
    with services[0].running() as first, services[1].running() as second:
        both = (first, second)
        async with first.person() as alice, crowd(both, FEW_EACH) as watchers:
            await scene(both, alice, watchers, writes=FEW_WRITES)


async def test_two_servers_on_postgresql_need_no_redis(postgres: PostgresServer, tmp_path: Path) -> None:
    url = postgres.create_database()
    services = [Service(url, "memory://", tmp_path, LOG_LEVEL="warning") for _ in range(2)]
    with services[0].running() as first, services[1].running() as second:
        async with first.person() as alice, second.watch() as watcher:
            for _ in range(20):
                movie = await alice.add()
                assert (await watcher.expect("add", seconds=2))["data"] == movie


async def test_workers_of_one_server_share_everything(new_service: Callable[..., Service], tmp_path: Path) -> None:
    service = new_service(WORKERS="2", LOG_LEVEL="warning").start()
    async with service.person() as alice, crowd((service,), 20) as watchers:
        first = await all_have_arrived(alice, watchers) + 1
        await write_to(service, alice.token, 200, 8)
        await all_see_the_same(watchers, first, 200)
        job = await alice.generate("movies", 3000)
        for watcher in watchers:
            seen = 0
            while seen < 3000:
                seen += (await watcher.expect("add_bulk"))["data"]["count"]
        assert (await alice.job_ended(job["id"]))["state"] == "done"
    assert await asyncio.to_thread(service.stop) == 0


async def test_a_database_that_restarts_loses_nothing_that_was_answered(
    own_postgres: PostgresServer, own_redis: RedisServer, tmp_path: Path
) -> None:
    url = own_postgres.create_database()
    service = Service(url, own_redis.url, tmp_path, LOG_LEVEL="warning")
    with service.running():
        async with service.person() as alice, service.watch() as watcher:
            added = [(await alice.add(title=f"before {n}"))["id"] for n in range(20)]
            own_postgres.kill()
            refused = await alice.http.post("/movies", json={"title": "meanwhile"})
            assert refused.status_code == 503
            assert "Retry-After" in refused.headers
            async with httpx.AsyncClient() as client:
                assert (await client.get(f"{service.url}/readyz")).status_code == 503
                assert (await client.get(f"{service.url}/healthz")).status_code == 200
            own_postgres.start()

            async def works() -> bool:
                answer = await alice.http.post("/movies", json={"title": "after"})
                if answer.status_code == 201:
                    added.append(answer.json()["id"])
                return answer.status_code == 201

            await eventually(works, "writes work again")
            await watcher.until(lambda frame: frame.get("data", {}).get("id") == added[-1])
            assert [event["data"]["id"] for event in watcher.events] == added
            assert watcher.seqs == list(range(watcher.seqs[0], watcher.seqs[0] + len(added)))


async def test_pubsub_connections_that_are_cut_come_back(
    two_servers: tuple[Service, Service], own_redis: RedisServer
) -> None:
    async with two_servers[0].person() as alice, two_servers[1].watch() as watcher:
        for number in range(10):
            await _command(own_redis, "CLIENT KILL TYPE pubsub")
            movie = await alice.add(title=f"cut {number}")
            assert (await watcher.expect("add", seconds=3))["data"] == movie


async def _command(redis: RedisServer, line: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", redis.port)
    writer.write(line.encode() + b"\r\n")
    answer = await reader.readline()
    writer.close()
    return answer.decode()


async def test_a_worker_frozen_for_longer_than_its_lease_repeats_nothing(
    two_servers: tuple[Service, Service],
) -> None:
    """Another worker takes its job over; when it wakes up, its chunk is refused."""
    first, second = two_servers
    async with first.person() as alice, second.watch("topics=movies") as watcher:
        job = await alice.generate("movies", 9_000, "?rate=1000")
        await watcher.expect("add_bulk")
        assert first.process is not None
        os.kill(first.process.pid, signal.SIGSTOP)
        try:
            total = watcher.events[-1]["data"]["count"]
            while total < 6_000:
                total += (await watcher.expect("add_bulk"))["data"]["count"]
        finally:
            os.kill(first.process.pid, signal.SIGCONT)
        while total < 9_000:
            total += (await watcher.expect("add_bulk"))["data"]["count"]
        assert (await alice.job_ended(job["id"]))["done"] == 9_000
        ids = [row["id"] for event in watcher.events for row in event["data"]["items"]]
        assert len(set(ids)) == len(ids) == 9_000
